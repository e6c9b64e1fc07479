"""A stored split: who is in which part, read and applied to a table."""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dataset.slice_table import SliceTable, text_sha256

FORMAT_VERSION = 1
"""Raised when a change makes older splits unreadable."""

PARTS = ("train", "validation", "test")

Parts = dict[str, list[str]]
"""Part to the sorted ids of its patients, or with `unit=slice` its slices."""


def slice_ids(table: SliceTable) -> np.ndarray:
    """(rows,) str "SCAN_ID/Z" of each row, the entries of a split by slice."""
    scan_ids = table.scans["scan_id"][table.rows["scan"]].tolist()
    z = table.rows["z"].tolist()
    return np.array([f"{s}/{i}" for s, i in zip(scan_ids, z, strict=True)])


def split_sha256(parts: Mapping[str, Sequence[str]]) -> str:
    """SHA-256 of who is in which part; the order within a part does not matter."""
    return text_sha256(json.dumps({part: sorted(parts[part]) for part in PARTS}))


def read_split(path: Path) -> dict[str, Any]:
    """The record in a split.json.

    A split by patient that is written by hand needs `format_version`, `settings` and
    `parts` alone.

    Raises:
        FileNotFoundError: If there is none.
        ValueError: If it is of another version, was edited (remove `sha256` to accept
            that), or puts a patient in two parts.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no split {path}; run slice_idx.py first")
    try:
        record = json.loads(path.read_text())
        version, parts = record["format_version"], record["parts"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not a split; run slice_idx.py again") from error
    if version != FORMAT_VERSION or set(parts) != set(PARTS):
        raise ValueError(
            f"{path} has split format {version} and parts {sorted(parts)}; expected "
            f"{FORMAT_VERSION} and {sorted(PARTS)}; run slice_idx.py again"
        )
    _refuse_shared(parts, path)
    sha256 = split_sha256(parts)
    if record.setdefault("sha256", sha256) != sha256:
        raise ValueError(
            f"{path}: the parts do not have the checksum it states; it was edited. "
            "Remove its sha256 to accept that, or run slice_idx.py again"
        )
    record.setdefault("leaks", record["settings"]["unit"] == "slice")
    return record


def _refuse_shared(parts: Mapping[str, Sequence[str]], path: Path) -> None:
    """Raises ValueError if an entry stands twice."""
    counts = Counter(entry for part in PARTS for entry in parts[part])
    twice = sorted(entry for entry, count in counts.items() if count > 1)
    if twice:
        where = [part for part in PARTS if twice[0] in parts[part]]
        raise ValueError(
            f"{path}: {twice[0]} stands twice, in {' and '.join(where)} ({len(twice)} "
            "such entries); that leaks; run slice_idx.py again"
        )


def rows_of_part(split: Mapping[str, Any], table: SliceTable, part: str) -> np.ndarray:
    """The table's rows in a part of a split.

    Args:
        split: From `read_split`.
        table: The table whose patients were split.
        part: "train", "validation" or "test".

    Returns:
        Sorted row numbers.

    Raises:
        ValueError: If the split is of other patients than the table's.
    """
    by_slice = split["settings"]["unit"] == "slice"
    entries = slice_ids(table) if by_slice else table.patient_ids
    known = set((entries if by_slice else table.scans["patient_id"]).tolist())
    listed = {entry for members in split["parts"].values() for entry in members}
    if known != listed:
        kind = "slices" if by_slice else "patients"
        raise ValueError(
            f"the split is of other {kind} than {table.path}: "
            f"{_some(known - listed)} only in the table, {_some(listed - known)} only in "
            "the split; run slice_idx.py again on this table"
        )
    return np.flatnonzero(np.isin(entries, split["parts"][part]))


def scans_of_part(split: Mapping[str, Any], table: SliceTable, part: str) -> np.ndarray:
    """Sorted indices of the table's scans in a part of a split by patient.

    Raises:
        ValueError: If the split is by slice, or of other patients than the table's.
    """
    if split["settings"]["unit"] == "slice":
        raise ValueError(
            "the split is by slice, and volumes have no slices to share out; run "
            "slice_idx.py with --split.unit patient"
        )
    rows_of_part(split, table, part)  # refuses a split of others
    return np.flatnonzero(np.isin(table.scans["patient_id"], split["parts"][part]))


def _some(entries: set[str]) -> str:
    if not entries:
        return "none"
    first = min(entries)
    return first if len(entries) == 1 else f"{first} and {len(entries) - 1} more"


def patients_of_part(split: Mapping[str, Any], part: str) -> list[str]:
    """Sorted patients in a part; of a split by slice, those with a slice in it."""
    entries = split["parts"][part]
    if split["leaks"]:
        scan_ids = {entry.rpartition("/")[0] for entry in entries}
        entries = {split["patient_of_scan"][scan_id] for scan_id in scan_ids}
    return sorted(entries)


def slices_of_part(split: Mapping[str, Any], part: str) -> dict[str, list[int]]:
    """Scan id to the slices (z) in a part; only of a split by slice."""
    slices: dict[str, list[int]] = {}
    for entry in split["parts"][part]:
        scan_id, _, z = entry.rpartition("/")
        slices.setdefault(scan_id, []).append(int(z))
    return {scan_id: sorted(members) for scan_id, members in slices.items()}
