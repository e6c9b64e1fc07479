"""CPU time of simulated lesions in the slice generator, and in a patch of a volume.

Example:
    LUNG_DATA=/path/to/data python -m benchmarks.lesions

The generators make the same batches of 400x400 px from one table, without lesions and with
lesions in 8 of 10 samples, and take turns batch by batch. The CPU time of one thread is
reported as a ratio to the batch without lesions of the same turn, since other programs slow
both. Slices are those of `benchmarks.generator`.
"""

import os
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np

import config
from augment import lesions, nodule_shapes, textures
from benchmarks.generator import bench_scans, build_table
from configs.lungs2d import LUNG2D
from ct.scan import Scan
from dataset.generator2d import SliceGenerator
from dataset.slice_table import SliceTable

TURNS = 40
PROBABILITY = 0.8
SETTINGS = {
    "flip, rotation, zoom, shift": config.Augment(),
    "as configs/lungs2d.py": LUNG2D.augment,
}
NOTHING = "none"
PATCH = 96
CALLS = 20


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        scans, origin = bench_scans()
        path = build_table(scans, Path(folder), copies=1)
        with SliceTable(path) as table:
            print(f"{len(table)} slices, {origin}; {os.cpu_count()} cores")
            for name, changes in SETTINGS.items():
                compare(table, name, changes)
        time_findings(scans[0])


def compare(table: SliceTable, name: str, changes: config.Augment) -> None:
    """Prints the CPU time of a slice with each kind of lesions, and its ratio to no lesions."""
    generators = {
        kind: SliceGenerator(
            table,
            np.arange(len(table)),
            LUNG2D.batches,
            changes,
            pathology=None
            if kind == NOTHING
            else config.Lesions(probability=PROBABILITY, kind=kind),
            seed=0,
        )
        for kind in (NOTHING, "circles", "realistic")
    }
    for number in range(nodule_shapes.SHAPES):  # read once per process
        nodule_shapes.nodule_shape(number, nodule_shapes.SHAPE_MM)
    textures.stored_cells()
    cpu_ms = {kind: [] for kind in generators}
    for turn in range(TURNS + 1):
        for kind, generator in generators.items():
            started = time.thread_time()
            slices = len(generator[turn % len(generator)][0])
            cpu_ms[kind].append(1000 * (time.thread_time() - started) / slices)
    print(f"{name} (CPU ms per slice: median; ratio to no lesions)")
    for kind, times in cpu_ms.items():
        ratios = np.divide(times, cpu_ms[NOTHING])[1:]  # the first turn warms up
        low, middle, high = np.percentile(ratios, (25, 50, 75))
        print(
            f"  {kind:10s}{statistics.median(times[1:]):6.2f}   "
            f"{middle:.2f} ({low:.2f} to {high:.2f})"
        )


def time_findings(scan: Scan) -> None:
    """Prints the CPU time of each finding in a slice and in a cubic patch."""
    if scan.lung is None:
        raise ValueError(f"scan {scan.scan_id} has no lung mask")
    z = int(np.count_nonzero(scan.lung, (1, 2)).argmax())
    corner = [max((length - PATCH) // 2, 0) for length in scan.hu.shape]
    box = tuple(slice(start, start + PATCH) for start in corner)
    places = {
        f"{scan.hu[z].shape} slice": (scan.hu[z], scan.lung[z], scan.spacing_mm[1:]),
        f"{scan.hu[box].shape} patch": (scan.hu[box], scan.lung[box], scan.spacing_mm),
    }
    base = config.Lesions(probability=1.0)
    kinds = {name: replace(base, findings=(name,)) for name in base.findings}
    kinds |= {"circles": replace(base, kind="circles"), "all": base}
    for place, (hu, lung, spacing_mm) in places.items():
        print(f"CPU ms, {place}")
        for name, settings in kinds.items():
            times = []
            for seed in range(CALLS + 1):
                rng = np.random.default_rng(seed)
                started = time.thread_time()
                lesions.simulate_lesions(
                    hu, lung, spacing_mm, settings, rng, held_out=frozenset()
                )
                times.append(1000 * (time.thread_time() - started))
            print(f"  {name:14s}{statistics.median(times[1:]):7.2f}")


if __name__ == "__main__":
    cv2.setNumThreads(1)
    main()
