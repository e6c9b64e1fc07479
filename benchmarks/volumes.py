"""Volume generator against one that warps with SciPy: crops per second, as ratios.

Example:
    LUNG_DATA=/path/to/data python -m benchmarks.volumes

Both make the same crops of 96^3 voxels at 3 mm with the augmentation of `lung3d-3mm`. They
take turns and the median over the rounds is reported, so a busy machine slows both alike. The
scans are those of benchmarks/generator.py.
"""

import itertools
import os
import statistics
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
from scipy import ndimage

import config
from augment import augment2d, augment3d, synthesis
from benchmarks.generator import bench_scans, cpu_ms, speed_and_cpu
from configs.lungs3d import LUNG3D_3MM
from ct import inputs
from ct.scan import AIR_HU, write_scan
from dataset.generator3d import VolumeGenerator
from dataset.slice_table import SliceTable
from table import write_table

ROUNDS = 5
THREADS = 2


class SciPyGenerator(VolumeGenerator):
    """Generator of the same crops that warps with `map_coordinates`; same scanner model."""

    def changed(self, volume, crop, changes, rng):
        size = self.batches.volume_px
        warp = augment3d.draw_volume_warp(changes, crop, size, rng)
        scanner = augment3d.draw_scanner(changes, size, rng)
        points = points_of(warp, size)
        marks = ndimage.map_coordinates(
            volume.marks, points, order=0, mode="grid-constant", cval=0
        )
        hu = ndimage.map_coordinates(
            volume.hu.astype(np.float32),
            points,
            order=1,
            mode="grid-constant",
            cval=AIR_HU,
        )
        if rng.random() < changes.synthesis:
            hu = synthesis.synthesize_patch(hu, marks & augment2d.LUNG_BIT, rng)
        hu = augment3d.simulate_scanner(hu, scanner, rng)
        marks = augment3d.cut_to_field(marks, scanner.field, 0)
        image = inputs.to_input(hu, None, self.batches, gamma=scanner.gamma)
        return image, marks & augment2d.TARGET_BIT


def points_of(warp: augment3d.VolumeWarp, size_px: tuple[int, ...]) -> np.ndarray:
    """Returns (3, z, y, x): the source position of each output voxel."""
    z, y, x = np.ogrid[tuple(slice(size) for size in size_px)]
    points = np.stack(
        [a * z + b * y + c * x + start for a, b, c, start in warp.matrix]
    ).astype(np.float32)
    return points if warp.displacement is None else points + warp.displacement


def main() -> None:
    scans, origin = bench_scans()
    with tempfile.TemporaryDirectory() as folder:
        for scan in scans:
            write_scan(scan, Path(folder) / "scans" / f"{scan.scan_id}.h5", {})
        path = Path(folder) / "table.h5"
        write_table(Path(folder) / "scans", path, LUNG3D_3MM.table)
        with SliceTable(path) as table:
            print(f"{len(table.scans)} scans, {origin}; {os.cpu_count()} cores")
            moved = config.Augment(rotate_deg=20, tilt_deg=12, stretch=0.1)
            everything = LUNG3D_3MM.augment
            compare(table, "turns, zoom, stretch, shift", moved)
            compare(table, "and elastic", replace(moved, elastic_px=1.5))
            compare(table, "all of lung3d-3mm", everything)
            where_time_goes(table, everything)


def compare(table: SliceTable, name: str, changes: config.Augment) -> None:
    """Prints crops per second and the CPU time of a crop for one augmentation."""
    scans, batches = np.arange(len(table.scans)), LUNG3D_3MM.batches
    options = {"seed": 0, "steps_per_epoch": 1000}
    ours = VolumeGenerator(table, scans, batches, changes, **options)
    plainly = SciPyGenerator(table, scans, batches, changes, **options)
    agree(ours, plainly)
    contenders = {
        "ours": (ours, THREADS),
        "SciPy": (plainly, THREADS),
        "ours, one thread": (ours, 1),
    }
    measured = {key: [] for key in contenders}
    for _, (key, contender) in itertools.product(range(ROUNDS), contenders.items()):
        measured[key].append(speed_and_cpu(*contender))
    print(f"{name} (crops/s: median, best round; CPU ms per crop)")
    for key, rounds in measured.items():
        speeds, cpu = zip(*rounds, strict=True)
        median = statistics.median(speeds)
        print(
            f"  {key:18s}{median:6.1f} {max(speeds):6.1f} {statistics.median(cpu):7.0f}"
        )
    pairs = list(zip(measured["ours"], measured["SciPy"], strict=True))
    by_speed = statistics.median(a[0] / b[0] for a, b in pairs)
    by_cpu = statistics.median(b[1] / a[1] for a, b in pairs)
    print(f"  ours / SciPy: {by_speed:.1f}x by speed, {by_cpu:.1f}x by CPU time")


def agree(ours: VolumeGenerator, other: VolumeGenerator) -> None:
    """Prints the differences between the first batches of two generators."""
    (x, y), (other_x, other_y) = ours[0], other[0]
    print(
        f"mean difference of the input {np.abs(x - other_x).mean():.4f} (sd 1), "
        f"reference differs in {100 * np.mean(y != other_y):.2f} % of the voxels"
    )


def where_time_goes(table: SliceTable, changes: config.Augment) -> None:
    """Prints the CPU time of each stage of a crop, on one thread."""
    batches = LUNG3D_3MM.batches
    size, rng = batches.volume_px, np.random.default_rng(0)
    generator = VolumeGenerator(table, np.array([0]), batches, changes, seed=0)
    volume = generator.cache.read(0)
    crop = generator.crop(volume, rng)
    bent = augment3d.draw_volume_warp(changes, crop, size, rng)
    flat = augment3d.VolumeWarp(bent.matrix)
    hu = augment3d.warp_volume(volume.hu, bent, size)
    marks = augment3d.warp_volume_labels(volume.marks, bent, size)
    stages: dict[str, Callable[[], object]] = {
        "read a volume (not kept)": lambda: table.volume(0, "hu"),
        "draw an elastic warp": lambda: augment3d.draw_volume_warp(
            changes, crop, size, rng
        ),
        "warp HU, affine": lambda: augment3d.warp_volume(volume.hu, flat, size),
        "warp HU, elastic": lambda: augment3d.warp_volume(volume.hu, bent, size),
        "warp masks, elastic": lambda: augment3d.warp_volume_labels(
            volume.marks, bent, size
        ),
        "synthesis": lambda: synthesis.synthesize_patch(hu, marks, rng),
        "curve of HU": lambda: augment3d.apply_hu_curve(
            hu, np.add(augment3d.CURVE_HU, 10)
        ),
        "blur": lambda: augment3d.blur_volume(hu, 1.0),
        "noise": lambda: augment3d.draw_noise(hu.shape, 1.0, rng),
        "thick slices": lambda: augment3d.thick_slices(hu, 2.5, 0.3),
        "window, gamma": lambda: inputs.to_input(hu, None, batches, gamma=1.2),
        "one-hot": lambda: inputs.one_hot(marks & 1),
    }
    print("CPU time by stage, ms on one thread:")
    for name, stage in stages.items():
        print(f"  {name:26s} {cpu_ms(stage, calls=10):6.1f}")


if __name__ == "__main__":
    cv2.setNumThreads(1)
    main()
