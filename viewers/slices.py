"""Shows the slices of a prepared scan in a window, with its masks outlined.

Takes a scan file of preprocess.py, or a folder of .npy slices that table.py wrote.

Arrow keys, the wheel and the slider change the slice; page up and page down move by ten.

Example:
    python -m viewers.slices work/scans/SCAN_ID.h5
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import tyro

import config
import steps
from ct.scan import LEFT, RIGHT, Scan, read_scan
from viewers.slice_window import Picture, browse


def picture_of(scan: Scan, z: int, window_hu: tuple[float, float]) -> Picture:
    """Returns a slice with its lungs and nodules outlined; see `slice_window`."""
    low, high = window_hu
    outlined = {}
    if scan.lung is not None:
        outlined["right lung"] = scan.lung[z] == RIGHT
        outlined["left lung"] = scan.lung[z] == LEFT
    if scan.reader_bits is not None:
        outlined["nodule of any reader"] = scan.reader_bits[z] > 0
    return Picture(
        np.clip((scan.hu[z] - low) / (high - low), 0, 1),
        outlined,
        f"{scan.scan_id}\nz {z} of 0 to {len(scan.hu) - 1}",
    )


def read(path: Path) -> Scan:
    """Reads the scan of a scan file or of a folder of .npy slices.

    Raises:
        ValueError: If the scan cannot be read, or the folder holds several.
    """
    if not path.is_dir():
        return read_scan(path)
    from cohorts import npy

    sources = npy.find_scans(path)
    if len(sources) > 1:
        raise ValueError(
            f"{path}: {len(sources)} scans ({sources[0].scan_id}, ...); expected one; name "
            "the folder of one patient"
        )
    return npy.load_scan(sources[0])


def first_slice(scan: Scan) -> int:
    """Returns the slice with most nodule pixels; without nodules, the middle slice."""
    if scan.reader_bits is None or not scan.reader_bits.any():
        return len(scan.hu) // 2
    return int(np.count_nonzero(scan.reader_bits, axis=(1, 2)).argmax())


@dataclass(frozen=True)
class Arguments:
    scan: Annotated[Path, tyro.conf.Positional]
    """Scan file of preprocess.py, or folder with the .npy slices of one scan."""
    window_hu: tuple[float, float] = (-1000.0, 400.0)
    """HU shown as black and as white."""

    def __post_init__(self) -> None:
        low, high = self.window_hu
        config.require(
            low < high, "window_hu", self.window_hu, "(low, high), low < high"
        )


def show(arguments: Arguments) -> steps.Report:
    """Opens the window and returns once it is closed."""
    scan = read(arguments.scan)
    browse(
        len(scan.hu),
        [lambda z: picture_of(scan, z, arguments.window_hu)],
        start=first_slice(scan),
    )
    return steps.Report(f"showed {len(scan.hu)} slices of {scan.scan_id}")


def main(argv: Sequence[str] | None = None) -> None:
    steps.run(show, Arguments, argv=argv)


if __name__ == "__main__":
    main()
