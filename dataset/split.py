"""Reads a stored split of the patients into parts and applies it to a table."""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dataset.slice_table import SliceTable, text_sha256

FORMAT_VERSION = 1
"""Format version of split.json; increased when a change makes older splits unreadable."""

PARTS = ("train", "validation", "test")

Parts = dict[str, list[str]]
"""Sorted ids of the patients, or with `unit=slice` of the slices, by part."""


def slice_ids(table: SliceTable) -> np.ndarray:
    """Returns (rows,) str "SCAN_ID/Z", the entries of a split by slice."""
    scan_ids = table.scans["scan_id"][table.rows["scan"]].tolist()
    z = table.rows["z"].tolist()
    return np.array([f"{s}/{i}" for s, i in zip(scan_ids, z, strict=True)])


def split_sha256(parts: Mapping[str, Sequence[str]]) -> str:
    """Computes the SHA-256 of the parts, independent of the order within a part."""
    return text_sha256(json.dumps({part: sorted(parts[part]) for part in PARTS}))


def read_split(path: Path) -> dict[str, Any]:
    """Reads the record in a split.json.

    A split by patient that is written by hand needs only `format_version`, `settings` and
    `parts`.

    Raises:
        FileNotFoundError: If the file is missing.
        ValueError: If it has another version, was edited (remove `sha256` to accept that),
            or lists a patient twice.
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
            f"{path}: the parts do not match the stored sha256; the file was edited. "
            "Remove its sha256 to accept that, or run slice_idx.py again"
        )
    record.setdefault("leaks", record["settings"]["unit"] == "slice")
    return record


def _refuse_shared(parts: Mapping[str, Sequence[str]], path: Path) -> None:
    """Raises ValueError if an entry is listed twice."""
    counts = Counter(entry for part in PARTS for entry in parts[part])
    twice = sorted(entry for entry, count in counts.items() if count > 1)
    if twice:
        where = [part for part in PARTS if twice[0] in parts[part]]
        raise ValueError(
            f"{path}: {twice[0]} is listed twice, in {' and '.join(where)} ({len(twice)} "
            "such entries), which leaks data; run slice_idx.py again"
        )


def rows_of_part(split: Mapping[str, Any], table: SliceTable, part: str) -> np.ndarray:
    """Returns the table's rows in a part of a split.

    Args:
        split: Record from `read_split`.
        table: The table whose patients were split.
        part: "train", "validation" or "test".

    Returns:
        Sorted row numbers.

    Raises:
        ValueError: If the patients or slices of the split are not those of the table.
    """
    by_slice = split["settings"]["unit"] == "slice"
    entries = slice_ids(table) if by_slice else table.patient_ids
    known = set((entries if by_slice else table.scans["patient_id"]).tolist())
    listed = {entry for members in split["parts"].values() for entry in members}
    if known != listed:
        kind = "slices" if by_slice else "patients"
        raise ValueError(
            f"the split lists other {kind} than {table.path}: "
            f"{_some(known - listed)} only in the table, {_some(listed - known)} only in "
            "the split; run slice_idx.py again on this table"
        )
    return np.flatnonzero(np.isin(entries, split["parts"][part]))


def scans_of_part(split: Mapping[str, Any], table: SliceTable, part: str) -> np.ndarray:
    """Returns the sorted indices of the table's scans in a part of a split by patient.

    Raises:
        ValueError: If the split is by slice, or its patients are not those of the table.
    """
    if split["settings"]["unit"] == "slice":
        raise ValueError(
            "the split is by slice, but volumes can only be split by patient; run "
            "slice_idx.py with --split.unit patient"
        )
    rows_of_part(split, table, part)  # raises if the split lists other patients
    return np.flatnonzero(np.isin(table.scans["patient_id"], split["parts"][part]))


def _some(entries: set[str]) -> str:
    if not entries:
        return "none"
    first = min(entries)
    return first if len(entries) == 1 else f"{first} and {len(entries) - 1} more"


def patients_of_part(split: Mapping[str, Any], part: str) -> list[str]:
    """Returns the sorted patients in a part; in a split by slice, those with a slice there."""
    entries = split["parts"][part]
    if split["leaks"]:
        scan_ids = {entry.rpartition("/")[0] for entry in entries}
        entries = {split["patient_of_scan"][scan_id] for scan_id in scan_ids}
    return sorted(entries)


def slices_of_part(split: Mapping[str, Any], part: str) -> dict[str, list[int]]:
    """Returns the slices (z) in a part by scan id; for a split by slice only."""
    slices: dict[str, list[int]] = {}
    for entry in split["parts"][part]:
        scan_id, _, z = entry.rpartition("/")
        slices.setdefault(scan_id, []).append(int(z))
    return {scan_id: sorted(members) for scan_id, members in slices.items()}
