"""Slices in .npy files, one folder per patient; table.py --npy-slices writes such folders.

`find_scans` takes a folder with a slices.csv, or one whose folders have it. A row is a slice:

    pid                    the scan
    z                      its place in the scan, 0 at the feet; no number is left out
    spacing_z_mm, spacing_y_mm, spacing_x_mm
                           distance between slices, rows and columns; of all slices alike
    image_path             (y, x) HU of any type of number; y to the back, x to the left
    lung_path, seg_path    optional: lung labels (1 right, 2 left), and a mask of nodules
    patient_id             optional; else the pid

Paths are those of files beside the list. Nothing says where slices lie in the scanner: the
middle of each is taken for x = y = 0, and z = 0 for slice 0.
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
    """A row of the list.

    Attributes:
        pid, patient_id, z: As in the list.
        spacing_mm: (z, y, x).
        image, lung, seg: The files; None where there is no mask.
    """

    pid: str
    patient_id: str
    z: int
    spacing_mm: tuple[float, ...]
    image: Path
    lung: Path | None
    seg: Path | None


def find_scans(source: Path) -> list[ScanSource]:
    """The scans of a folder's lists, by scan id; see the head of this module.

    Raises:
        ValueError: If there is no list, or one cannot be used as a whole.
    """
    source = Path(source)
    lists = sorted(path for path in (source / LIST, *source.glob(f"*/{LIST}")))
    lists = [path for path in lists if path.is_file()]
    if not lists:
        raise ValueError(
            f"{source}: no {LIST} in it or in its folders; expected one per patient with "
            f"columns {', '.join(REQUIRED_COLUMNS)}, as table.py --npy-slices writes it"
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
    """The rows of a list.

    Raises:
        ValueError: Naming the line, if a column or value is missing, is no number, or
            cannot name a file beside the list.
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
        raise ValueError(f"{where}: another number of values than the first line has")
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
            f"{where}: {found}; expected z from 0, spacing in mm above 0 and a file"
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
    """The finite number a text says, or 0."""
    try:
        number = float(text)
    except ValueError:
        return 0.0
    return number if math.isfinite(number) else 0.0


def load_scan(source: ScanSource, *, repair: Sequence[str] = ()) -> Scan:
    """Reads one scan and its masks.

    Args:
        source: As `find_scans` gives it.
        repair: Not used; missing slices are not made up.

    Raises:
        ScanError: If a slice is missing, doubled or damaged, slices or masks do not fit
            each other, or the values are no HU.
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
                f"{name}: slice z {above.z} follows {below.z}; expected every number once. "
                "Of a table with all slices (table.slices=all or lung) none is left out"
            )
        if above.spacing_mm != below.spacing_mm:
            raise ScanError(
                f"{name}: spacing {above.spacing_mm} mm at z {above.z}, "
                f"{below.spacing_mm} mm below; expected one (z, y, x) spacing"
            )


def _grid(shape: tuple[int, ...], first: NpySlice) -> Grid:
    """Axes rise to S, P and L; see the head of this module for where it lies."""
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
    """(z, y, x) integer labels; None if no slice has any."""
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
            f"{name}: {labels.shape} {labels.dtype} from {labels.min()} to {labels.max()}; "
            f"expected labels 0, 1, 2, ... of shape {shape}, the images'"
        )
    return labels


def _stack(paths: Sequence[Path]) -> np.ndarray:
    images = [read_image(path) for path in paths]
    for path, image in zip(paths, images, strict=True):
        if image.shape != images[0].shape:
            raise ScanError(
                f"{path}: shape {image.shape}; {paths[0].name} has {images[0].shape}; "
                "expected all slices alike"
            )
    return np.stack(images)


def read_image(path: Path) -> np.ndarray:
    """A (y, x) array of numbers from a .npy file; nothing is unpickled.

    Raises:
        ScanError: If the file is missing, damaged, or holds something else.
    """
    if not path.is_file():
        raise ScanError(f"{path}: no such file; expected a slice in .npy format")
    try:
        # Mapped, so that a header that promises too much is an error and takes no memory.
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
