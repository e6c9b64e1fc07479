"""Step 3 of 9: split the table's patients into train, validation and test.

Example:
    python slice_idx.py thesis --table work/table.h5 --out work/split.json

The split is by patient, not by slice: neighbouring slices look alike, so a network tested on
the neighbours of its training slices scores too high. Every part gets its share of patients
with small, large and no nodules.
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

STRATA_LIMITS_MM = (6.0, 10.0, 20.0)
STRATA = ("none", "below 6 mm", "6 to 10 mm", "10 to 20 mm", "20 mm or more")
"""Groups of patients by the diameter of their largest nodule."""


def split_patients(strata: Mapping[str, str], settings: config.Split) -> Parts:
    """Assigns every patient to one part, by fractions or folds.

    Args:
        strata: Group (stratum) of each patient; every part gets its share of each group.
            The order of the patients does not matter.
        settings: Split settings with `method` "ratios" or "folds".

    Returns:
        The patients of each part. With enough patients, no part with a fraction above 0 is
        empty; with two patients, the validation part is.

    Raises:
        ValueError: If there are too few patients.
    """
    if settings.method == "folds":
        return _parts_of_folds(split_folds(strata, settings), settings.fold)
    if settings.held_out:
        return _parts_without(settings.held_out, strata, settings)
    counts = part_counts(len(strata), settings.fractions)
    groups = _deal(strata, counts, settings.seed)
    return dict(zip(PARTS, groups, strict=True))


def _parts_without(
    held_out: Sequence[str], strata: Mapping[str, str], settings: config.Split
) -> Parts:
    """Returns the parts with the patients `held_out` as the test part."""
    unknown = sorted(set(held_out) - set(strata))
    if unknown:
        raise ValueError(
            f"split.held_out names {', '.join(unknown)}; the table has {len(strata)} patients: "
            f"{', '.join(sorted(strata)[:5])} ..."
        )
    rest = {item: group for item, group in strata.items() if item not in held_out}
    train, validation, _ = settings.fractions
    if not train or not rest:
        raise ValueError(
            "split.held_out leaves no patient for training; expected others in the table, and "
            f"a fraction of train above 0, found {train}"
        )
    shares = [share / (train + validation) for share in (train, validation)]
    groups = _deal(rest, part_counts(len(rest), shares), settings.seed)
    return dict(zip(PARTS, [*groups, sorted(set(held_out))], strict=True))


def split_folds(strata: Mapping[str, str], settings: config.Split) -> list[list[str]]:
    """Returns all folds, each a list of patients; ignores `settings.fold`.

    Raises:
        ValueError: If a fold would be empty, or no patient would be left for training.
    """
    if settings.folds < 3:
        raise ValueError(
            f"split.folds is {settings.folds}: one fold tests and the next validates, so no "
            "patient is left for training; expected 3 or more"
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
    """Splits by LUNA16 subset: `fold` tests, the next validates, the others train.

    Args:
        subset_of_scan: (patient, subset) of every scan.
        settings: Split settings; `fold` is the index of the subset, sorted by name.

    Raises:
        ValueError: If a scan has no subset, a patient is in two subsets, or there are
            fewer than three subsets or no such fold.
    """
    subset_of: dict[str, str] = {}
    for patient_id, subset in subset_of_scan:
        if not subset:
            raise ValueError(
                f"patient {patient_id} has a scan in no subset; split.method=subsets "
                "needs the LUNA16 subsets; use --split.method folds"
            )
        if subset_of.setdefault(patient_id, subset) != subset:
            raise ValueError(
                f"patient {patient_id} has scans in {subset_of[patient_id]} and {subset}: "
                "training on one and testing on the other would leak; remove one scan, or "
                "use --split.method folds"
            )
    names = sorted(set(subset_of.values()), key=lambda name: (len(name), name))
    if len(names) < 3 or settings.fold >= len(names):
        raise ValueError(
            f"the table has {len(names)} subsets ({', '.join(names)}); split.fold="
            f"{settings.fold} needs at least {max(3, settings.fold + 1)}"
        )
    folds = [sorted(p for p, s in subset_of.items() if s == name) for name in names]
    return _parts_of_folds(folds, settings.fold)


def part_counts(total: int, fractions: Sequence[float]) -> list[int]:
    """Divides `total` among the parts by the largest-remainder method.

    Every part with a fraction above 0 gets at least one, taken from the largest part. If
    `total` is too small for that, only the first and the last such part get any: training
    and test.

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
    """Distributes items in the proportion of `counts`, stratum after stratum.

    Each item goes to the part that is furthest behind its share so far. Any consecutive
    items, and so every stratum, are therefore divided in the same proportion as the whole.
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
    """Returns the stratum of every patient in the table, one of `STRATA`."""
    largest_mm = dict.fromkeys(table.scans["patient_id"].tolist(), 0.0)
    patient_of_nodule = table.scans["patient_id"][table.nodules["scan"]].tolist()
    for patient_id, diameter_mm in zip(
        patient_of_nodule, table.nodules["diameter_mm"].tolist(), strict=True
    ):
        largest_mm[patient_id] = max(largest_mm[patient_id], diameter_mm)
    return {
        patient_id: STRATA[1 + np.digitize(size_mm, STRATA_LIMITS_MM) if size_mm else 0]
        for patient_id, size_mm in largest_mm.items()
    }


def split_table(table: SliceTable, settings: config.Split) -> dict[str, Any]:
    """Splits the table and returns the content of split.json.

    Raises:
        ValueError: If the split would leak or cannot be made.
    """
    _refuse_shared_series(table)
    if settings.unit == "slice":
        if settings.method == "subsets":
            raise ValueError("split.unit=slice does not work with split.method=subsets")
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
                f"{patient_of[series_uid]}, which would leak; give both scans the same "
                "patient id, or remove one scan file and run table.py again"
            )


def nnunet_splits(table: SliceTable, settings: config.Split) -> list[dict[str, Any]]:
    """Returns all folds in the format of nnU-Net's splits_final.json, with scan ids.

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
    """Splits the patients of a table and writes `out`, unless it holds the same split.

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
                f"{out} exists and holds another split, which existing runs may depend on; "
                "add --overwrite to replace it"
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
        line += "; LEAKS: neighbouring slices are in train and test"
    empty = [part for part in PARTS if not record["parts"][part]]
    if empty:
        line += f"; EMPTY: {' and '.join(empty)}"
    return line


@dataclass(frozen=True)
class Arguments:
    """Input, output and settings of the split."""

    table: Path = Path("work/table.h5")
    """Table to split."""
    out: Path = Path("work/split.json")
    """The split to write."""
    split: config.Split = field(default_factory=config.Split)
    overwrite: bool = False
    """Replace an existing file that differs."""
    nnunet: Path | None = None
    """Also write all folds to this file, in the format of nnU-Net's splits_final.json."""


def run_step(arguments: Arguments) -> steps.Report:
    """Writes the split and, if asked for, the folds for nnU-Net."""
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
