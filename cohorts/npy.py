"""Reads .npy slices, one folder per patient, as table.py --npy-slices writes them.

`find_scans` takes a folder that contains slices.csv, or whose subfolders do. A row of
slices.csv describes a slice:

    pid                    scan id
    z                      position in the scan, 0 at the feet; consecutive
    spacing_z_mm, spacing_y_mm, spacing_x_mm
                           distance between slices, rows and columns; equal for all slices
    image_path             (y, x) HU of any numeric type; y to the back, x to the left
    lung_path, seg_path    optional: lung labels (1 right, 2 left), and a nodule mask
    patient_id             optional; default: the pid

Files are in the folder of the list. The position in the scanner is unknown, so the centre
of each slice is set to x = y = 0, and slice 0 to z = 0.
"""

import csv
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cohorts import nifti, plausible, volume_file
from cohorts.lists import check_unique
from ct import files
from ct.geometry import Grid
from ct.scan import Scan, ScanError, ScanSource

LIST = "slices.csv"
SPACING = ("spacing_z_mm", "spacing_y_mm", "spacing_x_mm")
REQUIRED_COLUMNS = ("pid", "z", *SPACING, "image_path")
COLUMNS: tuple[str, ...] = (*REQUIRED_COLUMNS, "lung_path", "seg_path", "patient_id")


@dataclass(frozen=True)
class NpySlice:
    """A row of slices.csv.

    Attributes:
        pid, patient_id, z: Values of the row.
        spacing_mm: (z, y, x).
        image, lung, seg: Paths of the files; None for a missing mask.
    """

    pid: str
    patient_id: str
    z: int
    spacing_mm: tuple[float, ...]
    image: Path
    lung: Path | None
    seg: Path | None


def find_scans(source: Path) -> list[ScanSource]:
    """Finds the scans of the lists in a folder, by scan id; see the module docstring.

    Raises:
        ValueError: If there is no list, or a list as a whole is unusable.
    """
    source = Path(source)
    lists = sorted(path for path in (source / LIST, *source.glob(f"*/{LIST}")))
    lists = [path for path in lists if path.is_file()]
    if not lists:
        raise ValueError(
            f"{source}: no {LIST} in it or its subfolders; expected one per patient with "
            f"columns {', '.join(REQUIRED_COLUMNS)}; write it with table.py --npy-slices"
        )
    sources = [found for path in lists for found in _sources(path)]
    check_unique([(s.scan_id, str(s.annotations[0])) for s in sources], source)
    return sorted(sources, key=lambda source: source.scan_id)


def _sources(path: Path) -> list[ScanSource]:
    scans: dict[str, list[NpySlice]] = {}
    for row in read_slice_list(path):
        scans.setdefault(row.pid, []).append(row)
    return [
        ScanSource(
            scan_id=pid,
            patient_id=rows[0].patient_id,
            paths=tuple(row.image for row in rows),
            annotations=(path, *(m for r in rows for m in (r.lung, r.seg) if m)),
        )
        for pid, rows in scans.items()
    ]


def read_slice_list(path: Path) -> list[NpySlice]:
    """Reads the rows of a list.

    Raises:
        ValueError: If a column or value is missing, a value is not a number, or a path does
            not name a file in the folder of the list. The message names the line.
    """
    with path.open(newline="", encoding="utf-8-sig") as file:
        rows = csv.DictReader(file, strict=True)
        try:
            found = [(f"{path}, line {rows.line_num}", row) for row in rows]
        except (csv.Error, UnicodeDecodeError) as error:
            raise ValueError(f"{path}: not a readable CSV list ({error})") from error
    columns = rows.fieldnames or ()
    missing = [name for name in REQUIRED_COLUMNS if name not in columns]
    if missing:
        raise ValueError(
            f"{path}, line 1: no column {', '.join(missing)} (found "
            f"{', '.join(columns) or 'nothing'}); expected {', '.join(COLUMNS)}"
        )
    return [_slice(row, path.parent, where) for where, row in found]


def _slice(row: dict[Any, Any], folder: Path, where: str) -> NpySlice:
    if None in row or None in row.values():
        raise ValueError(f"{where}: the number of values differs from the first line")
    value = {name: text.strip() for name, text in row.items()}

    def file(column: str) -> Path | None:
        name = value.get(column)
        if not name:
            return None
        return folder / files.checked_id(name, where=f"{where}, column {column}")

    image = file("image_path")
    spacing_mm = tuple(_number(value[name]) for name in SPACING)
    if image is None or not value["z"].isdecimal() or not min(spacing_mm) > 0:
        found = ", ".join(f"{name} {value[name]!r}" for name in REQUIRED_COLUMNS[1:])
        raise ValueError(
            f"{where}: {found}; expected z from 0, spacing in mm above 0 and a file name"
        )
    pid = files.checked_id(value["pid"], where=f"{where}, column pid")
    patient_id = value.get("patient_id") or pid
    return NpySlice(
        pid=pid,
        patient_id=files.checked_id(patient_id, where=f"{where}, column patient_id"),
        z=int(value["z"]),
        spacing_mm=spacing_mm,
        image=image,
        lung=file("lung_path"),
        seg=file("seg_path"),
    )


def _number(text: str) -> float:
    """Parses a finite number; returns 0 if the text is not one."""
    try:
        number = float(text)
    except ValueError:
        return 0.0
    return number if math.isfinite(number) else 0.0


def load_scan(source: ScanSource, *, repair: Sequence[str] = ()) -> Scan:
    """Reads one scan and its masks.

    Args:
        source: A scan from `find_scans`.
        repair: Not used; missing slices are not interpolated.

    Raises:
        ScanError: If a slice is missing, duplicate or damaged, slices or masks do not fit
            each other, or the values are not HU.
    """
    listed = source.annotations[0]
    rows = [row for row in read_slice_list(listed) if row.pid == source.scan_id]
    rows = sorted(rows, key=lambda row: row.z)
    name = f"{listed}, scan {source.scan_id}"
    _check_rows(rows, name)
    images = _stack([row.image for row in rows])
    hu = volume_file.to_hu(images, listed)
    grid = _grid(hu.shape, rows[0])
    plausible.check_field(grid, name)
    plausible.check_hu(hu, name)
    known: dict[str, Any] = {}
    lung = _mask([row.lung for row in rows], hu.shape, f"{name}, lung_path")
    if lung is not None:
        known["lung"] = volume_file.checked_lung_labels(lung, f"{name}, lung_path")
    seg = _mask([row.seg for row in rows], hu.shape, f"{name}, seg_path")
    if seg is not None:
        known |= nifti.nodules_of_mask(seg > 0, grid, f"{name}, seg_path")
    return Scan(
        scan_id=source.scan_id,
        patient_id=source.patient_id,
        hu=hu,
        grid=grid,
        source_grid=grid,
        **known,
    )


def _check_rows(rows: Sequence[NpySlice], name: str) -> None:
    for below, above in itertools.pairwise(rows):
        if above.z != below.z + 1:
            raise ScanError(
                f"{name}: slice z {above.z} follows {below.z}; expected every number once; "
                "make the table with all slices (table.slices=all or lung)"
            )
        if above.spacing_mm != below.spacing_mm:
            raise ScanError(
                f"{name}: spacing {above.spacing_mm} mm at z {above.z}, "
                f"{below.spacing_mm} mm below it; expected one (z, y, x) spacing"
            )


def _grid(shape: tuple[int, ...], first: NpySlice) -> Grid:
    """Returns a grid with axes to S, P and L; origin as in the module docstring."""
    z_mm, y_mm, x_mm = first.spacing_mm
    _, height, width = shape
    affine = np.zeros((4, 4))
    affine[2, 0], affine[1, 1], affine[0, 2] = z_mm, -y_mm, -x_mm
    affine[:, 3] = (
        (width - 1) / 2 * x_mm,
        (height - 1) / 2 * y_mm,
        first.z * z_mm,
        1,
    )
    return Grid((shape[0], height, width), affine)


def _mask(
    paths: Sequence[Path | None], shape: tuple[int, ...], name: str
) -> np.ndarray | None:
    """Reads masks as (z, y, x) integer labels; returns None if no slice has a mask."""
    named = [path for path in paths if path is not None]
    if not named:
        return None
    if len(named) < len(paths):
        raise ScanError(
            f"{name}: {len(paths) - len(named)} of {len(paths)} slices have no mask; "
            "expected all or none"
        )
    labels = _stack(named)
    if labels.shape != shape or labels.dtype.kind not in "iub" or labels.min() < 0:
        raise ScanError(
            f"{name}: {labels.dtype} of shape {labels.shape} from {labels.min()} to "
            f"{labels.max()}; expected labels 0, 1, 2, ... of the image shape {shape}"
        )
    return labels


def _stack(paths: Sequence[Path]) -> np.ndarray:
    images = [read_image(path) for path in paths]
    for path, image in zip(paths, images, strict=True):
        if image.shape != images[0].shape:
            raise ScanError(
                f"{path}: shape {image.shape}, but {paths[0].name} has {images[0].shape}; "
                "expected the same shape for all slices"
            )
    return np.stack(images)


def read_image(path: Path) -> np.ndarray:
    """Reads a (y, x) array of numbers from a .npy file; never unpickles.

    Raises:
        ScanError: If the file is missing or damaged, or does not hold such an array.
    """
    if not path.is_file():
        raise ScanError(f"{path}: no such file; expected a slice in .npy format")
    try:
        # Map the file, so that a header with too large a shape fails without using memory.
        array = np.lib.format.open_memmap(path, mode="r")
    except (OSError, ValueError) as error:
        raise ScanError(
            f"{path}: not a readable .npy file ({error}); restore it from its source"
        ) from error
    if array.ndim != 2 or array.dtype.kind not in "iufb":
        raise ScanError(
            f"{path}: shape {array.shape} of {array.dtype}; expected a (y, x) array of "
            "numbers"
        )
    return np.array(array)
