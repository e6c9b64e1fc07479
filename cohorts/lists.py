"""Reads CSV lists of scans, with columns pid, image_path and optional ones."""

import csv
import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cohorts import dicom_headers, pseudonyms
from cohorts.volume_file import is_volume, stem
from ct import files
from ct.scan import ScanSource
from nodules import lidc_database

log = logging.getLogger(__name__)

REQUIRED_COLUMNS = ("pid", "image_path")
SPACING_COLUMNS = ("spacing_z_mm", "spacing_y_mm", "spacing_x_mm")
"""Spacing of a TIFF stack, or of another volume whose header states none."""
OPTIONAL_COLUMNS = ("seg_path", "lung_path", "patient_id", *SPACING_COLUMNS)


def read_list(path: Path) -> list[ScanSource]:
    """Reads the scans of a CSV list.

    Raises:
        ValueError: If a column or value is missing, an id occurs twice or cannot be a file
            name, or none of the images exists. The message names the line.
    """
    sources = [_row_source(row, path.parent, where) for where, row in _rows(path)]
    check_unique([(s.scan_id, f"image {s.paths[0]}") for s in sources], path)
    _check_exists(sources, path)
    return sources


def read_usable(path: Path) -> tuple[list[ScanSource], dict[str, str]]:
    """Reads the usable rows of a CSV list, and reports the errors of the others.

    Rejects all rows that share an id, because their results could not be told apart.

    Returns:
        The scans, and a mapping from "line N" to the error of each rejected row.

    Raises:
        ValueError: If a column is missing, no row is usable, or none of the images exists.
    """
    found, refused = {}, {}
    for where, row in _rows(path):
        try:
            found[where] = _row_source(row, path.parent, where)
        except ValueError as error:
            refused[where] = str(error)
    lines: dict[str, list[str]] = {}
    for where, source in found.items():
        lines.setdefault(source.scan_id.casefold(), []).append(_line(where))
    for where, source in list(found.items()):
        same = lines[source.scan_id.casefold()]
        if len(same) > 1:
            refused[where] = (
                f"{where}: the id {source.scan_id} occurs in {' and '.join(same)}; "
                "expected every id once"
            )
            del found[where]
    if not found:
        raise ValueError(
            f"{path}: no row is usable; the first error: {next(iter(refused.values()))}"
        )
    sources = list(found.values())
    _check_exists(sources, path)
    # Drop the path of the list: hospitals name folders after patients.
    return sources, {
        _line(where): reason.replace(where, _line(where))
        for where, reason in refused.items()
    }


def _line(where: str) -> str:
    """Returns the last part of a location from `_rows`, e.g. "line 3"."""
    return where.rpartition(", ")[2]


def _rows(path: Path) -> list[tuple[str, dict[Any, Any]]]:
    """Reads the rows of a list, each with its location; checks the columns."""
    if not path.is_file():
        raise ValueError(f"{path}: no such file; expected a CSV list")
    with path.open(newline="", encoding="utf-8-sig") as file:
        rows = csv.DictReader(file, strict=True)
        try:
            _check_columns(rows.fieldnames or (), path)
            found = [(f"{path}, line {rows.line_num}", row) for row in rows]
        except (csv.Error, UnicodeDecodeError) as error:
            raise ValueError(f"{path}: not a readable CSV list ({error})") from error
    if not found:
        raise ValueError(f"{path}: no rows; expected one scan per line")
    return found


def _check_exists(sources: Sequence[ScanSource], path: Path) -> None:
    if not any(s.paths[0].exists() for s in sources):
        raise ValueError(
            f"{path}: none of its {len(sources)} images exists, the first is "
            f"{sources[0].paths[0]}; relative paths start at the folder of the list"
        )


def _check_columns(columns: Sequence[str], path: Path) -> None:
    missing = [name for name in REQUIRED_COLUMNS if name not in columns]
    if missing:
        raise ValueError(
            f"{path}, line 1: no column {', '.join(missing)} (found "
            f"{', '.join(columns) or 'nothing'}); expected pid,image_path and optionally "
            f"{', '.join(OPTIONAL_COLUMNS)}"
        )
    others = sorted(set(columns) - set(REQUIRED_COLUMNS + OPTIONAL_COLUMNS))
    if others:
        log.warning("%s: ignoring unknown columns: %s", path, ", ".join(others))


def _row_source(row: dict[Any, Any], folder: Path, where: str) -> ScanSource:
    if None in row or None in row.values():
        raise ValueError(f"{where}: the number of values differs from the first line")
    value = {name: text.strip() for name, text in row.items()}
    if not value["image_path"]:
        raise ValueError(f"{where}: image_path is empty; expected a file or folder")
    pid = files.checked_id(value["pid"], where=f"{where}, column pid")
    image = folder / value["image_path"]
    patient_id = value.get("patient_id") or find_patient_id(image, pid) or pid
    return ScanSource(
        scan_id=pid,
        patient_id=files.checked_id(patient_id, where=f"{where}, column patient_id"),
        paths=(image,),
        annotations=(folder / value["seg_path"],) if value.get("seg_path") else (),
        lung=folder / value["lung_path"] if value.get("lung_path") else None,
        spacing_mm=_row_spacing_mm(value, where),
    )


def _row_spacing_mm(
    value: dict[str, str], where: str
) -> tuple[float, float, float] | None:
    """Reads the spacing columns of a row; None if all are empty."""
    texts = [value.get(name, "") for name in SPACING_COLUMNS]
    if not any(texts):
        return None
    try:
        z, y, x = map(float, texts)
    except ValueError:
        z = y = x = math.nan
    if not all(0 < step < math.inf for step in (z, y, x)):
        raise ValueError(
            f"{where}: {', '.join(SPACING_COLUMNS)} are {', '.join(texts)}; expected three "
            "numbers above 0, or none"
        )
    return z, y, x


def find_patient_id(image: Path, pid: str) -> str:
    """Finds the patient id of a scan that a list does not state; "" if unknown.

    A volume or its pid may be named after a series of LIDC-IDRI. For a DICOM file or
    folder, the id is the `pseudonyms.safe_patient_id` of its header.
    """
    if is_volume(image) and not image.is_dir():
        of_pid, of_file = map(lidc_database.known_patient, (pid, stem(image)))
        return of_pid or of_file
    path = dicom_headers.first_ct_image(image) if image.is_dir() else image
    found = (
        dicom_headers.identify(path) if path is not None and path.is_file() else None
    )
    if found is None or not found.ct_image:
        return ""
    try:
        return lidc_database.known_patient(
            found.series_uid
        ) or pseudonyms.safe_patient_id(found)
    except OSError as error:
        log.warning(
            "scan %s: no pseudonym for its patient, using the pid: %s", pid, error
        )
        return ""


def check_unique(named: Sequence[tuple[str, str]], where: Path) -> None:
    """Raises ValueError if two pairs of (scan id, origin) have the same id."""
    # Ignore case: on some file systems "A1" and "a1" are the same file.
    seen: dict[str, str] = {}
    for name, what in named:
        if name.casefold() in seen:
            raise ValueError(
                f"{where}: two scans have the id {name}: {seen[name.casefold()]} and "
                f"{what}; expected every id once"
            )
        seen[name.casefold()] = what
