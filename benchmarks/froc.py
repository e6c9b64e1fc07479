"""Time of FROC with bootstrap at LUNA16's size: 888 scans of 500 candidates, 1,000 draws.

Example:
    python -m benchmarks.froc
"""

import sys
import time

import numpy as np

from metrics.froc import froc, mark

SCANS, CANDIDATES, NODULES = 888, 500, 1186


def main() -> None:
    """Prints the seconds for marking and for the curve with its intervals."""
    rng = np.random.default_rng(0)
    ids = [f"scan-{number}" for number in range(SCANS)]
    owners = rng.integers(SCANS, size=NODULES)
    nodules = {
        ids[scan]: np.column_stack(
            (rng.uniform(0, 300, (count, 3)), rng.uniform(3, 30, (count, 1)))
        )
        for scan, count in zip(*np.unique(owners, return_counts=True), strict=True)
    }
    candidates = {
        scan: np.column_stack(
            (rng.uniform(0, 300, (CANDIDATES, 3)), rng.random((CANDIDATES, 1)))
        )
        for scan in ids
    }
    started = time.perf_counter()
    marks = mark(ids, candidates, nodules)
    marked = time.perf_counter()
    froc(marks, draws=1000)
    done = time.perf_counter()
    sys.stdout.write(
        f"{SCANS * CANDIDATES} candidates: marked in {marked - started:.1f} s, curve and "
        f"1,000 draws in {done - marked:.1f} s\n"
    )


if __name__ == "__main__":
    main()
