"""Simulated lesions: what they cost the generator of slices, and a patch of a volume.

Example:
    LUNG_DATA=/path/to/data python -m benchmarks.lesions

The generators make the same batches of 400x400 px from one table, with and without lesions
in 8 of 10 samples, and take turns, so a busy machine slows all of them; the median over the
rounds counts. Slices are those of `benchmarks.generator`.
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
import lesions
from benchmarks.generator import bench_scans, build_table, speed_and_cpu
from data_generator import SliceGenerator
from scan import Scan
from slice_table import SliceTable

ROUNDS = 5
PROBABILITY = 0.8
THREADS = 2
BATCHES = config.Batches(
    input_px=(400, 400), batch_size=8, target="lung", lung_mask=False
)
SETTINGS = {
    "flip, rotation, zoom, shift": config.Augment(),
    "and noise, gamma": config.Augment(noise_hu=20, gamma=0.2),
    "and elastic": config.Augment(noise_hu=20, gamma=0.2, elastic_px=3),
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
    """Prints speed and CPU time with each kind of lesions, and their ratio to none."""
    rows = np.arange(len(table))
    generators = {
        kind: SliceGenerator(
            table,
            rows,
            BATCHES,
            changes,
            pathology=None
            if kind == NOTHING
            else config.Lesions(probability=PROBABILITY, kind=kind),
            seed=0,
        )
        for kind in (NOTHING, "circles", "realistic")
    }
    for number in range(lesions.SHAPES):  # read once per process
        lesions.nodule_shape(number)
    lesions.stored_cells()
    measured = {kind: [] for kind in generators}
    for _ in range(ROUNDS):
        for kind, generator in generators.items():
            measured[kind].append(speed_and_cpu(generator, THREADS))
    print(f"{name} (slices/s; CPU ms per slice; time of a slice against none)")
    for kind, rounds in measured.items():
        speed, cpu = (statistics.median(v) for v in zip(*rounds, strict=True))
        pairs = list(zip(measured[NOTHING], rounds, strict=True))
        by_speed = statistics.median(a[0] / b[0] for a, b in pairs)
        by_cpu = statistics.median(b[1] / a[1] for a, b in pairs)
        print(
            f"  {kind:10s}{speed:6.0f}{cpu:8.2f}   {by_speed:.2f}x wall, {by_cpu:.2f}x CPU"
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
                lesions.simulate(hu, lung, spacing_mm, settings, rng)
                times.append(1000 * (time.thread_time() - started))
            print(f"  {name:14s}{statistics.median(times[1:]):7.2f}")


if __name__ == "__main__":
    cv2.setNumThreads(1)
    main()
