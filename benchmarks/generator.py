"""Slice generator against one that warps with SciPy: speed as ratios, and peak memory.

Example:
    LUNG_DATA=/path/to/data python -m benchmarks.generator

Both make the same batches of 400x400 px from one table, with two threads. They take turns and
the median over the rounds is reported, so a busy machine slows both alike. Slices come from the
LIDC-IDRI scans below LUNG_DATA (or ../shared/data) with their cleaned lung masks, or else from
phantoms. The table lies in the page cache, so the disk is not measured.
"""

import itertools
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
from scipy import ndimage

import config
import data_generator
from augment import augment2d
from ct import boxes, inputs
from ct.scan import AIR_HU, Scan, scan_path, write_scan
from dataset import generator2d
from dataset.generator2d import SliceGenerator
from dataset.slice_table import SliceTable
from table import write_table

ROOT = Path(__file__).resolve().parent.parent
ROUNDS = 5
SECONDS = 2.0
THREADS = 2
BATCHES = config.Batches(input_px=(400, 400), batch_size=8)
SETTINGS = {
    "thesis: flip, rotation, zoom": config.Augment(shift_px=0),
    "and shift, noise": config.Augment(noise_hu=20),
    "and elastic, gamma": config.Augment(noise_hu=20, elastic_px=3, gamma=0.2),
}
MEMORY_BATCHES = 60
"""Number of batches made before the peak memory is read."""


class SciPyGenerator(SliceGenerator):
    """Generator of the same batches that warps float slices with `scipy.ndimage`."""

    def sample(self, row: int, rng: np.random.Generator):
        changes = self.augmentation or config.Augment()
        hu = self.table.read("hu", row).astype(np.float32)
        lung = self.table.read("lung", row) > 0
        mask = generator2d.row_target(self.table, row, self.batches)
        size = self.batches.input_px
        warp = augment2d.draw_warp(changes, self.crop(mask, lung, rng), size, rng)
        image = scipy_warp(hu, warp, size, order=1, fill=AIR_HU)
        lung = scipy_warp(lung.astype(np.uint8), warp, size, order=0, fill=0)
        mask = scipy_warp(mask, warp, size, order=0, fill=0)
        gamma, noise_hu = augment2d.draw_intensity(changes, rng)
        if noise_hu > 0:
            white = rng.normal(0, noise_hu, size)
            image += ndimage.gaussian_filter(white, augment2d.NOISE_CORRELATION_PX)
        low, high = self.batches.window_hu
        image = np.clip((image - low) / (high - low), 0, 1) ** gamma
        image[lung == 0] = 0
        return image, mask


def scipy_warp(image, warp: augment2d.Warp, size_px, *, order: int, fill: int):
    """Warps an image; `ndimage` takes (y, x) where the warp holds (x, y)."""
    if warp.points is not None:
        return ndimage.map_coordinates(
            image, warp.points[::-1], order=order, mode="constant", cval=fill
        )
    by_yx = warp.matrix[::-1][:, [1, 0, 2]]
    return ndimage.affine_transform(
        image,
        by_yx[:, :2],
        by_yx[:, 2],
        output_shape=size_px,
        order=order,
        mode="constant",
        cval=fill,
    )


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        scans, origin = bench_scans()
        once = build_table(scans, Path(folder) / "once", copies=1)
        with SliceTable(once) as table:
            print(
                f"{len(table)} slices of 512x512 px, {origin}; {os.cpu_count()} cores"
            )
            for name, changes in SETTINGS.items():
                compare(table, name, changes)
            where_time_goes(table)
        four_times = build_table(scans, Path(folder) / "four", copies=4)
        compare_memory(once, four_times)


def bench_scans() -> tuple[list[Scan], str]:
    """Returns scans with lung masks and nodules, and the name of their source."""
    from lungs.classical import with_lungs

    data = Path(os.environ.get("LUNG_DATA", ROOT.parent / "shared/data")) / "LIDC-IDRI"
    if data.is_dir():
        from cohorts import lidc

        loaded = [lidc.load_scan(source) for source in lidc.find_scans(data)]
        return [with_lungs(scan, config.LungMask()) for scan in loaded], "LIDC-IDRI"
    from phantoms import chest, write

    return [write.to_scan(chest.make_phantom(seed)) for seed in (0, 1)], "phantoms"


def build_table(scans: list[Scan], folder: Path, *, copies: int) -> Path:
    """Writes a table of all slices with lung; each copy of a scan is another patient."""
    for copy, scan in itertools.product(range(copies), scans):
        name = f"{copy}-{scan.scan_id}"
        other = replace(scan, scan_id=name, patient_id=name)
        write_scan(other, scan_path(folder, name), {})
    out = folder / "table.h5"
    write_table(folder, out, config.Table(slices="lung"), workers=THREADS)
    return out


def compare(table: SliceTable, name: str, changes: config.Augment) -> None:
    """Prints slices per second and the CPU time of a slice for one augmentation."""
    rows = np.arange(len(table))
    ours = SliceGenerator(table, rows, BATCHES, changes, seed=0)
    contenders = {
        "ours": (ours, THREADS),
        "SciPy": (SciPyGenerator(table, rows, BATCHES, changes, seed=0), THREADS),
        "ours, one thread": (ours, 1),
        "no augmentation": (
            SliceGenerator(table, rows, BATCHES, None, seed=0),
            THREADS,
        ),
    }
    measured = {key: [] for key in contenders}
    for _ in range(ROUNDS):
        for key, (generator, threads) in contenders.items():
            measured[key].append(speed_and_cpu(generator, threads))
    print(f"{name} (slices/s: median, best round; CPU ms per slice)")
    for key, rounds in measured.items():
        speeds, cpu_ms = zip(*rounds, strict=True)
        median = statistics.median(speeds)
        print(
            f"  {key:18s}{median:6.0f} {max(speeds):6.0f} "
            f"{statistics.median(cpu_ms):7.2f}"
        )
    pairs = list(zip(measured["ours"], measured["SciPy"], strict=True))
    by_speed = statistics.median(a[0] / b[0] for a, b in pairs)
    by_cpu = statistics.median(b[1] / a[1] for a, b in pairs)
    print(f"  ours / SciPy: {by_speed:.1f}x by speed, {by_cpu:.1f}x by CPU time")


def speed_and_cpu(generator: SliceGenerator, threads: int) -> tuple[float, float]:
    """Measures slices per second and the CPU milliseconds of one slice.

    The CPU time is the better measure if other programs use the cores.
    """
    wall, cpu = time.perf_counter(), time.process_time()
    speed = data_generator.slices_per_second(
        generator, threads=threads, seconds=SECONDS
    )
    slices = speed * (time.perf_counter() - wall)
    return speed, 1000 * (time.process_time() - cpu) / slices


def where_time_goes(table: SliceTable) -> None:
    """Prints the CPU time of each stage for a slice with a nodule, on one thread."""
    row = int(np.flatnonzero(table.rows["nodule_px"])[0])
    size, changes = BATCHES.input_px, config.Augment(noise_hu=20, elastic_px=3)
    rng = np.random.default_rng(0)
    crop = boxes.crop_at_centre(table.settings.size_px, size)
    bent = augment2d.draw_warp(changes, crop, size, rng)
    flat = augment2d.Warp(bent.matrix)
    hu, lung = table.read("hu", row), table.read("lung", row)
    image, marks = (
        augment2d.warp_image(hu, flat, size),
        augment2d.warp_labels(lung, flat, size),
    )
    field = augment2d.noise_field(size, seed=0)
    stages: dict[str, Callable[[], object]] = {
        "read HU": lambda: table.read("hu", row),
        "read lung": lambda: table.read("lung", row),
        "read readers, consensus": lambda: generator2d.row_target(table, row, BATCHES),
        "draw an affine warp": lambda: augment2d.draw_warp(
            config.Augment(), crop, size, rng
        ),
        "warp HU": lambda: augment2d.warp_image(hu, flat, size),
        "warp masks": lambda: augment2d.warp_labels(lung, flat, size),
        "window and lung mask": lambda: inputs.to_input(image, marks, BATCHES),
        "one-hot": lambda: inputs.one_hot(marks & 1),
        "(noise)": lambda: augment2d.add_noise(image, field, 10, rng),
        "(gamma)": lambda: inputs.to_input(image, marks, BATCHES, gamma=1.2),
        "(draw an elastic warp)": lambda: augment2d.draw_warp(changes, crop, size, rng),
        "(warp HU elastically)": lambda: augment2d.warp_image(hu, bent, size),
        "(warp masks elastically)": lambda: augment2d.warp_labels(lung, bent, size),
    }
    print("CPU time by stage, ms on one thread (in brackets: not in the thesis):")
    for name, stage in stages.items():
        print(f"  {name:26s} {cpu_ms(stage):6.3f}")


def cpu_ms(stage: Callable[[], object], calls: int = 40) -> float:
    """Measures the median CPU time of a call in ms, after one call to warm up."""
    stage()
    times = []
    for _ in range(calls):
        started = time.thread_time()
        stage()
        times.append(time.thread_time() - started)
    return 1000 * statistics.median(times)


def compare_memory(once: Path, four_times: Path) -> None:
    """Prints the peak memory of two processes that stream tables of different length."""
    for path in (once, four_times):
        command = [sys.executable, "-m", "benchmarks.generator", str(path)]
        done = subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True, check=True
        )
        print(done.stdout.strip())


def stream(path: Path) -> None:
    """Makes batches of a table with two threads and prints the peak memory."""
    with SliceTable(path) as table:
        rows = np.arange(len(table))
        generator = SliceGenerator(table, rows, BATCHES, config.Augment(), seed=0)
        opened_mb = peak_mb()
        numbers = (index % len(generator) for index in range(MEMORY_BATCHES))
        with ThreadPoolExecutor(THREADS) as pool:
            made = sum(pool.map(lambda index: len(generator[index][0]), numbers))
        hu_mb = len(table) * 2 * np.prod(table.settings.size_px) / 1e6
        print(
            f"{len(table)} rows ({hu_mb:.0f} MB of HU): peak memory {peak_mb():.0f} MB "
            f"after {made} slices, {opened_mb:.0f} MB before the first"
        )


def peak_mb() -> float:
    """Returns the peak resident memory of this process so far (Linux).

    `resource.getrusage` would also count the process that started this one.
    """
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1000


if __name__ == "__main__":
    cv2.setNumThreads(1)
    if len(sys.argv) == 2:
        stream(Path(sys.argv[1]))
    else:
        main()
