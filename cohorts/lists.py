"""CSV lists of scans: columns pid, image_path and the optional ones."""

import csv
import logging
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
OPTIONAL_COLUMNS = ("seg_path", "lung_path", "patient_id")


def read_list(path: Path) -> list[ScanSource]:
    """The scans of a CSV list.

    Raises:
        ValueError: Naming the line, if a column or value is missing, an id is doubled or
            cannot be a file name, or none of the images exists.
    """
    sources = [_row_source(row, path.parent, where) for where, row in _rows(path)]
    check_unique([(s.scan_id, f"image {s.paths[0]}") for s in sources], path)
    _check_exists(sources, path)
    return sources


def read_usable(path: Path) -> tuple[list[ScanSource], dict[str, str]]:
    """The scans of a CSV list whose rows can be used, and what is wrong with the others.

    Of rows with the same id none is used: nobody can say whose result it would be.

    Returns:
        The scans, and "line N" -> reason for the other rows.

    Raises:
        ValueError: If a column is missing, or no row can be used or none of their images
            exists.
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
                f"{where}: the id {source.scan_id} is that of {' and '.join(same)}; "
                "expected every id once"
            )
            del found[where]
    if not found:
        raise ValueError(
            f"{path}: no row can be used; the first: {next(iter(refused.values()))}"
        )
    sources = list(found.values())
    _check_exists(sources, path)
    # Without the folder of the list, which hospitals name after patients.
    return sources, {
        _line(where): reason.replace(where, _line(where))
        for where, reason in refused.items()
    }


def _line(where: str) -> str:
    """The last part of a place that `_rows` gives, e.g. "line 3"."""
    return where.rpartition(", ")[2]


def _rows(path: Path) -> list[tuple[str, dict[Any, Any]]]:
    """The rows of a list, each with its place; their columns are checked."""
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
            f"{sources[0].paths[0]}; relative paths start at the list's folder"
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
        log.warning("%s: columns passed over: %s", path, ", ".join(others))


def _row_source(row: dict[Any, Any], folder: Path, where: str) -> ScanSource:
    if None in row or None in row.values():
        raise ValueError(f"{where}: another number of values than the first line has")
    value = {name: text.strip() for name, text in row.items()}
    if not value["image_path"]:
        raise ValueError(f"{where}: image_path is empty; expected a file or folder")
    pid = files.checked_id(value["pid"], where=f"{where}, column pid")
    image = folder / value["image_path"]
    patient_id = value.get("patient_id") or patient_by_itself(image, pid) or pid
    return ScanSource(
        scan_id=pid,
        patient_id=files.checked_id(patient_id, where=f"{where}, column patient_id"),
        paths=(image,),
        annotations=(folder / value["seg_path"],) if value.get("seg_path") else (),
        lung=folder / value["lung_path"] if value.get("lung_path") else None,
    )


def patient_by_itself(image: Path, pid: str) -> str:
    """Whose scan it is, where no list says so; "" if that is unknown.

    A volume, or its pid, may be called after a series of LIDC-IDRI. The patient of a DICOM
    file or folder is that of its header, as `dicom.safe_patient_id` makes it.
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
            "scan %s: no pseudonym for its patient, the pid counts: %s", pid, error
        )
        return ""


def check_unique(named: Sequence[tuple[str, str]], where: Path) -> None:
    """Raises ValueError if two of (scan id, where it is from) have the same id."""
    # Compared without case: some file systems have one file for "A1" and "a1".
    seen: dict[str, str] = {}
    for name, what in named:
        if name.casefold() in seen:
            raise ValueError(
                f"{where}: two scans are called {name}: {seen[name.casefold()]} and "
                f"{what}; expected every id once"
            )
        seen[name.casefold()] = what
