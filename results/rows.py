"""Rows of lungs.csv, nodules.csv and candidates.csv."""

import csv
from collections.abc import Sequence
from dataclasses import asdict, astuple, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ct import files
from ct.files import write_rows
from ct.geometry import flip_xy
from ct.scan import Scan
from nodules.found import Candidate, FoundNodule

NODULE_COLUMNS = (
    "case_id",
    "series_uid",
    "nodule_id",
    "score",
    "score_std",
    "max_prob",
    "x_lps_mm",
    "y_lps_mm",
    "z_lps_mm",
    "i_source",
    "j_source",
    "k_source",
    "z_slice",
    "long_axis_mm",
    "short_axis_mm",
    "equivalent_diameter_mm",
    "volume_mm3",
    "mean_hu",
    "side",
    "pleura_distance_mm",
)
"""Columns of nodules.csv; docs/formats.md describes each."""


def shared_columns(found: Any, scan: Scan) -> dict[str, Any]:
    """Returns the columns shared by nodules.csv and candidates.csv for one finding."""
    centre_ras_mm = scan.grid.index_to_ras_mm(np.array(found.centre_zyx))
    x_mm, y_mm, z_mm = flip_xy(centre_ras_mm).tolist()
    i, j, k = scan.source_grid.ras_mm_to_index(centre_ras_mm).tolist()
    numbers = {
        "score": found.score,
        "score_std": found.score_std,
        "max_prob": found.max_prob,
        "x_lps_mm": x_mm,
        "y_lps_mm": y_mm,
        "z_lps_mm": z_mm,
        "i_source": i,
        "j_source": j,
        "k_source": k,
        "equivalent_diameter_mm": found.equivalent_diameter_mm,
    }
    return {
        "case_id": scan.scan_id,
        "series_uid": scan.series_uid,
        "nodule_id": found.nodule_id or "",
        "z_slice": round(found.centre_zyx[0]),
        **numbers_text(numbers),
    }


def numbers_text(numbers: dict[str, float | None]) -> dict[str, str]:
    """Formats numbers for the tables, with "" for None."""
    return {name: "" if n is None else f"{n:.4f}" for name, n in numbers.items()}


def nodule_row(nodule: FoundNodule, scan: Scan) -> dict[str, Any]:
    """Returns the row of nodules.csv for a nodule."""
    numbers = {
        "long_axis_mm": nodule.long_axis_mm,
        "short_axis_mm": nodule.short_axis_mm,
        "volume_mm3": nodule.volume_mm3,
        "mean_hu": nodule.mean_hu,
        "pleura_distance_mm": nodule.pleura_distance_mm,
    }
    return {
        **shared_columns(nodule, scan),
        "side": nodule.side,
        **numbers_text(numbers),
    }


LUNGS_CSV, LUNGS_JSON = "lungs.csv", "lungs.json"
NODULES_CSV, CANDIDATES_CSV = "nodules.csv", "candidates.csv"
CANDIDATE_COLUMNS = (
    *NODULE_COLUMNS[: NODULE_COLUMNS.index("z_slice") + 1],
    "equivalent_diameter_mm",
    "marked_by",
)
"""Columns of candidates.csv; docs/formats.md describes each."""

COLUMNS = {NODULES_CSV: NODULE_COLUMNS, CANDIDATES_CSV: CANDIDATE_COLUMNS}

ScanRows = dict[str, list[dict[str, Any]]]
"""Rows of a table by scan id."""


@dataclass(frozen=True)
class LungRow:
    """A row of lungs.csv; docs/formats.md describes each column."""

    pid: str
    n: int
    right_ml: float
    left_ml: float
    score: float
    flag: int
    reason: str
    seconds: float
    warnings: str = ""
    unsearched_ml: float = 0.0
    nodules_searched: str = ""


LATER_COLUMNS = "warnings", "unsearched_ml"
"""First of the columns that an older file lacks."""


def read_lung_rows(path: Path) -> list[LungRow]:
    """Reads the rows of lungs.csv; returns none if the file is missing.

    Older files lack the last columns, and their rows have the default values.

    Raises:
        ValueError: If the columns differ, or an id cannot be a file name.
    """
    if not path.exists():
        return []
    types = {name: field.type for name, field in LungRow.__dataclass_fields__.items()}
    with path.open(newline="", encoding="utf-8") as file:
        rows = csv.DictReader(file)
        columns, all_columns = list(rows.fieldnames or ()), list(types)
        older = [all_columns[: all_columns.index(name)] for name in LATER_COLUMNS]
        if columns not in (all_columns, *older):
            raise ValueError(
                f"{path}: columns {rows.fieldnames}; expected {all_columns}; run infer.py "
                "again with --overwrite"
            )
        found = [
            LungRow(**{name: types[name](row[name]) for name in columns})
            for row in rows
        ]
    for row in found:
        files.checked_id(row.pid, where=str(path))
    return found


def write_lung_rows(path: Path, rows: list[LungRow]) -> None:
    """Writes lungs.csv, sorted by pid."""
    with (
        files.write_atomically(path) as partial,
        partial.open("w", newline="", encoding="utf-8") as file,
    ):
        table = csv.writer(file)
        table.writerow(LungRow.__dataclass_fields__)
        table.writerows(astuple(row) for row in sorted(rows, key=lambda row: row.pid))


def read_rows(path: Path) -> ScanRows:
    """Reads nodules.csv or candidates.csv by scan; returns none if the file is missing.

    Raises:
        ValueError: If the columns differ.
    """
    if not path.exists():
        return {}
    rows: ScanRows = {}
    columns = COLUMNS[path.name]
    with path.open(newline="", encoding="utf-8") as file:
        table = csv.DictReader(file)
        if tuple(table.fieldnames or ()) != columns:
            raise ValueError(
                f"{path}: columns {table.fieldnames}; expected {list(columns)}; "
                "choose another --result_dir"
            )
        for row in table:
            rows.setdefault(row["case_id"], []).append(row)
    return rows


def write_scan_rows(path: Path, rows: ScanRows) -> None:
    """Writes nodules.csv or candidates.csv, sorted by scan."""
    some = [row for pid in sorted(rows) for row in rows[pid]]
    write_rows(some, COLUMNS[path.name], path)


def candidate_row(candidate: Candidate, scan: Scan) -> dict[str, Any]:
    """Returns the row of candidates.csv for a candidate."""
    return shared_columns(candidate, scan) | {"marked_by": candidate.marked_by}


def lung_row(
    pid: str, n: int, verdict: Any, seconds: float, warnings: Sequence[str] = ()
) -> LungRow:
    """Returns the row of lungs.csv for a `lungs.checks.Verdict`."""
    facts = asdict(verdict)
    reasons, searched = facts.pop("reasons"), facts.pop("nodules_searched")
    warnings = (*warnings, *facts.pop("mended"))
    rounded = {name: round(value, 4) for name, value in facts.items()}
    return LungRow(
        pid=pid,
        n=n,
        **rounded,
        flag=int(bool(reasons)),
        reason="; ".join(reasons),
        seconds=round(seconds, 2),
        warnings="; ".join(warnings),
        nodules_searched=searched,
    )
