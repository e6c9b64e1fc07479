"""Step 3 of 9: split the table's patients into train, validation and test.

Example:
    python slice_idx.py thesis --table work/table.h5 --out work/split.json

Patients are split, never slices: neighbouring slices look alike, and a network tested on
the neighbour of a slice it has learned looks better than it is. Every part gets its share
of patients with small, large and no nodules.
"""

import logging
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

import config
import steps
from ct import files
from dataset.slice_table import SliceTable
from dataset.split import (
    FORMAT_VERSION,
    PARTS,
    Parts,
    read_split,
    rows_of_part,
    slice_ids,
    split_sha256,
)

log = logging.getLogger(__name__)

LIMITS_MM = (6.0, 10.0, 20.0)
STRATA = ("none", "below 6 mm", "6 to 10 mm", "10 to 20 mm", "20 mm or more")
"""Patients are grouped by the diameter of their largest nodule."""


def split_patients(strata: Mapping[str, str], settings: config.Split) -> Parts:
    """Assigns every patient to one part, by shares or folds.

    Args:
        strata: Patient to the group it is counted in; every part gets its share of each
            group. The order of the patients does not matter.
        settings: `method` "ratios" or "folds".

    Returns:
        Each part's patients. With enough patients no part with a share is empty; with
        two, nobody validates.

    Raises:
        ValueError: If there are too few patients.
    """
    if settings.method == "folds":
        return _parts_of_folds(split_folds(strata, settings), settings.fold)
    counts = part_counts(len(strata), settings.fractions)
    groups = _deal(strata, counts, settings.seed)
    return dict(zip(PARTS, groups, strict=True))


def split_folds(strata: Mapping[str, str], settings: config.Split) -> list[list[str]]:
    """All folds, each a list of patients; `settings.fold` plays no part.

    Raises:
        ValueError: If a fold would be empty, or nobody would be left to train on.
    """
    if settings.folds < 3:
        raise ValueError(
            f"split.folds is {settings.folds}: one fold tests and the next validates, so "
            "nobody is left to train on; expected 3 or more"
        )
    if len(strata) < settings.folds:
        raise ValueError(
            f"split.folds is {settings.folds}, but the table has {len(strata)} patients; "
            "expected at least one patient per fold"
        )
    counts = part_counts(len(strata), [1 / settings.folds] * settings.folds)
    return _deal(strata, counts, settings.seed)


def split_subsets(
    subset_of_scan: Iterable[tuple[str, str]], settings: config.Split
) -> Parts:
    """LUNA16's subsets as folds: `fold` tests, the next validates, the others train.

    Args:
        subset_of_scan: (patient, subset) of every scan.
        settings: `fold` counts the subsets in their order.

    Raises:
        ValueError: If a scan has no subset, a patient lies in two, or there are fewer
            than three subsets or no such fold.
    """
    subset_of: dict[str, str] = {}
    for patient_id, subset in subset_of_scan:
        if not subset:
            raise ValueError(
                f"patient {patient_id} has a scan in no subset; split.method=subsets "
                "expects LUNA16's; take --split.method folds"
            )
        if subset_of.setdefault(patient_id, subset) != subset:
            raise ValueError(
                f"patient {patient_id} has scans in {subset_of[patient_id]} and {subset}: "
                "training on one and testing on the other would leak; leave one scan "
                "out, or take --split.method folds"
            )
    names = sorted(set(subset_of.values()), key=lambda name: (len(name), name))
    if len(names) < 3 or settings.fold >= len(names):
        raise ValueError(
            f"the table has {len(names)} subsets ({', '.join(names)}); split.fold="
            f"{settings.fold} expects at least {max(3, settings.fold + 1)}"
        )
    folds = [sorted(p for p, s in subset_of.items() if s == name) for name in names]
    return _parts_of_folds(folds, settings.fold)


def part_counts(total: int, fractions: Sequence[float]) -> list[int]:
    """How many of `total` each part gets; shares rounded by the largest remainder.

    A part with a share gets at least one, taken from the largest. When there are fewer
    than parts with a share, the first and the last come first: training and test.

    Raises:
        ValueError: If `total` is below 2.
    """
    if total < 2:
        raise ValueError(f"the table has {total} patients; a split needs at least 2")
    shares = np.array(fractions) * total
    counts = np.floor(shares + 1e-9).astype(int)
    rest = np.argsort(counts - shares, kind="stable")[: total - counts.sum()]
    counts[rest] += 1
    wanted = np.flatnonzero(np.array(fractions) > 0)
    if total < len(wanted):
        wanted = wanted[[0, -1]]
        counts = np.where(np.isin(np.arange(len(counts)), wanted), counts, 0)
        counts[wanted[0]] += total - counts.sum()
    for part in wanted:
        if not counts[part]:
            counts[np.argmax(counts)] -= 1
            counts[part] = 1
    return counts.tolist()


def _deal(
    strata: Mapping[str, str], counts: Sequence[int], seed: int
) -> list[list[str]]:
    """Deals items out in the proportion of `counts`, stratum after stratum.

    Each goes to the part that lags most behind its share so far, so any run of items, a
    stratum too, is divided as the whole is.
    """
    rng = np.random.default_rng(seed)
    shuffled = rng.permutation(sorted(strata)).tolist()
    dealt: list[list[str]] = [[] for _ in counts]
    shares = np.array(counts) / sum(counts)
    in_order = sorted(shuffled, key=lambda item: strata[item])
    for number, item in enumerate(in_order, start=1):
        lengths = np.array([len(group) for group in dealt])
        lag = np.where(lengths < counts, shares * number - lengths, -np.inf)
        dealt[int(np.argmax(np.round(lag, 9)))].append(item)
    return [sorted(group) for group in dealt]


def _parts_of_folds(folds: Sequence[list[str]], fold: int) -> Parts:
    validation = (fold + 1) % len(folds)
    train = [
        item
        for index, members in enumerate(folds)
        if index not in (fold, validation)
        for item in members
    ]
    return {
        "train": sorted(train),
        "validation": folds[validation],
        "test": folds[fold],
    }


def strata_of_patients(table: SliceTable) -> dict[str, str]:
    """The stratum of every patient in the table, one of `STRATA`."""
    largest_mm = dict.fromkeys(table.scans["patient_id"].tolist(), 0.0)
    patient_of_nodule = table.scans["patient_id"][table.nodules["scan"]].tolist()
    for patient_id, diameter_mm in zip(
        patient_of_nodule, table.nodules["diameter_mm"].tolist(), strict=True
    ):
        largest_mm[patient_id] = max(largest_mm[patient_id], diameter_mm)
    return {
        patient_id: STRATA[1 + np.digitize(size_mm, LIMITS_MM) if size_mm else 0]
        for patient_id, size_mm in largest_mm.items()
    }


def split_table(table: SliceTable, settings: config.Split) -> dict[str, Any]:
    """The record of a split, as split.json holds it.

    Raises:
        ValueError: If the split would leak or cannot be made.
    """
    _refuse_shared_series(table)
    if settings.unit == "slice":
        if settings.method == "subsets":
            raise ValueError("split.unit=slice cannot keep subsets of patients")
        marked = np.where(table.rows["nodule_px"] > 0, "nodule", "none").tolist()
        strata = dict(zip(slice_ids(table).tolist(), marked, strict=True))
        parts = split_patients(strata, settings)
    elif settings.method == "subsets":
        pairs = table.scans[["patient_id", "subset"]].tolist()
        strata, parts = strata_of_patients(table), split_subsets(pairs, settings)
    else:
        strata = strata_of_patients(table)
        parts = split_patients(strata, settings)
    record = {
        "format_version": FORMAT_VERSION,
        "settings": config.to_json(settings),
        "leaks": settings.unit == "slice",
        "table_sha256": table.sha256,
        "sha256": split_sha256(parts),
        "nodules": {
            part: dict(sorted(Counter(strata[i] for i in members).items()))
            for part, members in parts.items()
        },
        "parts": parts,
    }
    if record["leaks"]:
        pairs = table.scans[["scan_id", "patient_id"]].tolist()
        record["patient_of_scan"] = dict(pairs)
    return record


def _refuse_shared_series(table: SliceTable) -> None:
    """Raises ValueError if one series is listed under two patients."""
    patient_of: dict[str, str] = {}
    for series_uid, patient_id in table.scans[["series_uid", "patient_id"]].tolist():
        if series_uid and patient_of.setdefault(series_uid, patient_id) != patient_id:
            raise ValueError(
                f"series {series_uid} is in the table as patient {patient_id} and as "
                f"{patient_of[series_uid]}, which would leak; give both scans one patient "
                "id, or remove one scan file and run table.py again"
            )


def nnunet_splits(table: SliceTable, settings: config.Split) -> list[dict[str, Any]]:
    """All folds as nnU-Net's splits_final.json lists them: per fold, scans by their id.

    nnU-Net has no test part, so each fold validates and all others train.
    """
    folds = split_folds(strata_of_patients(table), settings)
    scans = dict(table.scans[["scan_id", "patient_id"]].tolist())
    return [
        {
            "train": sorted(s for s, patient in scans.items() if patient not in fold),
            "val": sorted(s for s, patient in scans.items() if patient in fold),
        }
        for fold in map(set, folds)
    ]


def write_split(
    table_path: Path, out: Path, settings: config.Split, *, overwrite: bool = False
) -> steps.Report:
    """Splits the patients of a table into `out`; an equal split there is left as it is.

    Raises:
        ValueError: If the split cannot be made, or `out` exists and differs.
    """
    out = Path(out)
    with SliceTable(table_path) as table:
        record = split_table(table, settings)
        rows = {part: len(rows_of_part(record, table, part)) for part in PARTS}
    stands = False
    if out.exists() and not overwrite:
        stands = read_split(out)["parts"] == record["parts"]
        if not stands:
            raise ValueError(
                f"{out} exists and splits otherwise; runs made with it would no longer "
                "match; add --overwrite to replace it"
            )
    if not stands:
        files.write_json(out, record)
    return steps.Report(
        _closing_line(out, record, rows, "is complete" if stands else "")
    )


def _closing_line(
    out: Path, record: Mapping[str, Any], rows: Mapping[str, int], ending: str
) -> str:
    kind = "slices" if record["leaks"] else "patients"
    parts = ", ".join(f"{len(record['parts'][part])} {part}" for part in PARTS)
    line = f"{out}: {kind} {parts}; rows {', '.join(str(rows[p]) for p in PARTS)}"
    line = f"{line} {ending}" if ending else f"wrote {line}"
    if record["leaks"]:
        line += "; LEAKS: neighbouring slices lie in train and test"
    empty = [part for part in PARTS if not record["parts"][part]]
    if empty:
        line += f"; NOBODY in {' and '.join(empty)}"
    return line


@dataclass(frozen=True)
class Arguments:
    table: Path = Path("work/table.h5")
    """The table whose patients are split."""
    out: Path = Path("work/split.json")
    split: config.Split = field(default_factory=config.Split)
    overwrite: bool = False
    """Replace another split."""
    nnunet: Path | None = None
    """Also write all folds here, as nnU-Net's splits_final.json."""


def run_step(arguments: Arguments) -> steps.Report:
    """What the command line asks for."""
    other = arguments.nnunet
    if other and other.exists() and not arguments.overwrite:
        raise ValueError(f"{other} exists; add --overwrite to replace it")
    report = write_split(
        arguments.table, arguments.out, arguments.split, overwrite=arguments.overwrite
    )
    if other:
        with SliceTable(arguments.table) as table:
            folds = nnunet_splits(table, arguments.split)
        files.write_json(other, folds)
    return report


def main(argv: Sequence[str] | None = None) -> None:
    steps.run(run_step, Arguments, argv=argv)


if __name__ == "__main__":
    main()
