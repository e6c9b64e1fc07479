r"""The table of an ablation: every run's scores, and its differences from the first run.

A difference is paired where both runs were scored on the same scans: patients are drawn
once and both runs are scored on them. A run scored on other scans or slices (the split
by slice) has no paired difference, and the table says so.

    python -m experiments.ablation_table --scores work/scores/smoke \
        work/scores/smoke-no-gcn --out work/scores/ablations-smoke
"""

import csv
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

import files
import metrics
import steps
from evaluate import DISCLAIMER, bounds, number, refuse_other_folder
from metrics import Counts, Interval
from postprocess import write_rows

FEW_PATIENTS = 10
"""With fewer, a percentile interval excludes 0 by chance far more often than it says."""

COLUMNS = (
    "run",
    "score",
    "value",
    "low",
    "high",
    "difference",
    "diff_low",
    "diff_high",
)


class Measure(NamedTuple):
    """A score as a statistic of sums over scans.

    Attributes:
        name: What the table calls it.
        columns: From rows of scores.csv to (scans, k) numbers that are summed.
        statistic: From (..., k) sums to (...) scores.
    """

    name: str
    columns: Callable[[Sequence[dict[str, str]]], np.ndarray]
    statistic: Callable[[np.ndarray], np.ndarray]


def mean_of(name: str, text: str) -> Measure:
    """The mean over scans of a column of scores.csv, undefined ones left out."""
    return Measure(
        text,
        lambda rows: metrics.mean_columns(np.array([float(row[name]) for row in rows])),
        metrics.mean_of_sums,
    )


def voxel_counts(rows: Sequence[dict[str, str]]) -> np.ndarray:
    return np.array([[float(row[name]) for name in ("tp", "fp", "fn")] for row in rows])


def nodule_counts(rows: Sequence[dict[str, str]]) -> np.ndarray:
    return np.array(
        [[float(row["nodules_hit"]), float(row["nodules"])] for row in rows]
    )


MEASURES = (
    Measure(
        "Dice, pooled",
        voxel_counts,
        lambda sums: Counts(*np.moveaxis(sums, -1, 0)).dice,
    ),
    mean_of("dice", "Dice per scan"),
    mean_of("dice_nodule_slices", "Dice per scan, nodule slices"),
    Measure(
        "Nodule sensitivity",
        nodule_counts,
        lambda sums: metrics.ratio(sums[..., 0], sums[..., 1]),
    ),
    mean_of("false_positives", "False positives per scan"),
)


@dataclass(frozen=True)
class Arguments:
    """Which runs are compared; the first is the one the others are compared with."""

    scores: tuple[Path, ...]
    """Folders that evaluate.py wrote."""
    out: Path
    """Folder for ablations.csv, ablations.md and ablations.tex."""
    draws: int = 2000
    """Bootstrap draws."""


@dataclass(frozen=True)
class Cell:
    """One score of one run; `difference` is None where it cannot be paired."""

    run: str
    score: str
    interval: Interval
    difference: Interval | None


def read_scores(folder: Path) -> tuple[list[dict[str, str]], dict[str, Any]]:
    """The rows of scores.csv in the order of their scans, and what scores.json says.

    Raises:
        FileNotFoundError: If the folder holds no scores.
    """
    for name in ("scores.csv", "scores.json"):
        if not (folder / name).exists():
            raise FileNotFoundError(f"no {folder / name}; run evaluate.py first")
    with (folder / "scores.csv").open(newline="") as file:
        rows = sorted(csv.DictReader(file), key=lambda row: row["scan_id"])
    return rows, json.loads((folder / "scores.json").read_text())


def same_cases(rows: Sequence[dict[str, str]], base: Sequence[dict[str, str]]) -> bool:
    """Whether two runs were scored on the same scans with the same reference voxels."""

    def cases(rows: Sequence[dict[str, str]]) -> list[tuple[str, float]]:
        return [(row["scan_id"], float(row["tp"]) + float(row["fn"])) for row in rows]

    return cases(rows) == cases(base)


def compare(
    run: str,
    rows: Sequence[dict[str, str]],
    base: Sequence[dict[str, str]],
    *,
    draws: int,
) -> list[Cell]:
    """Every score of a run with its interval, and its paired difference from `base`."""
    patients = np.array([row["patient_id"] for row in rows])
    paired = same_cases(rows, base) and rows is not base
    cells = []
    for measure in MEASURES:
        values = measure.columns(rows)
        interval = metrics.bootstrap(values, patients, measure.statistic, n=draws)
        difference = None
        if paired:
            both = np.hstack([values, measure.columns(base)])
            difference = metrics.bootstrap(
                both, patients, difference_of(measure.statistic), n=draws
            )
        cells.append(Cell(run, measure.name, interval, difference))
    return cells


def difference_of(
    statistic: Callable[[np.ndarray], np.ndarray],
) -> Callable[[np.ndarray], np.ndarray]:
    """The statistic of the first half of the columns less that of the second half."""

    def difference(sums: np.ndarray) -> np.ndarray:
        first, second = np.split(sums, 2, axis=-1)
        return statistic(first) - statistic(second)

    return difference


def ablation_table(arguments: Arguments) -> steps.Report:
    """Writes the table as CSV, Markdown and LaTeX.

    Raises:
        FileNotFoundError: If a run has no scores.
        ValueError: If two folders have one name.
    """
    names = [folder.name for folder in arguments.scores]
    if len(set(names)) < len(names):
        raise ValueError(f"two of the runs have one name: {', '.join(names)}")
    refuse_other_folder(arguments.out, "ablations.csv")
    base, base_record = read_scores(arguments.scores[0])
    patients = len({row["patient_id"] for row in base})
    cells = compare(names[0], base, base, draws=arguments.draws)
    facts = [
        f"Differences are from {names[0]}, on the same {patients} patients in every draw; "
        "unpaired: the run was scored on other cases.",
        "Intervals are not corrected for the number of comparisons"
        + (
            f", and are too narrow with fewer than {FEW_PATIENTS} patients."
            if patients < FEW_PATIENTS
            else "; (!): the difference's interval excludes 0."
        ),
        f"{names[0]}: {' '.join(base_record['protocol'][:-1])}",
    ]
    for name, folder in zip(names[1:], arguments.scores[1:], strict=True):
        rows, record = read_scores(folder)
        found, expected = record["setting"], base_record["setting"]
        if found | {"by_slice": False} != expected | {"by_slice": False}:
            raise ValueError(
                f"{folder} was scored with {found}, {names[0]} with {expected}; run "
                "evaluate.py on both alike"
            )
        if found["by_slice"]:
            facts.append(
                f"{name}: split by slice, so patients that are tested were TRAINED on."
            )
        cells += compare(name, rows, base, draws=arguments.draws)
    facts.append(DISCLAIMER)
    with files.written_whole(arguments.out) as out:
        out.mkdir()
        write_rows([csv_row(cell) for cell in cells], COLUMNS, out / "ablations.csv")
        text = markdown(names, cells, facts, marked=patients >= FEW_PATIENTS)
        (out / "ablations.md").write_text(text)
        (out / "ablations.tex").write_text(
            latex(names, cells, facts, marked=patients >= FEW_PATIENTS)
        )
    sys.stdout.write(text + "\n")
    return steps.Report(
        f"wrote {arguments.out}: {len(names)} runs, {patients} patients"
    )


def csv_row(cell: Cell) -> dict[str, Any]:
    row: dict[str, Any] = {"run": cell.run, "score": cell.score}
    row |= dict(zip(COLUMNS[2:5], cell.interval, strict=True))
    if cell.difference:
        row |= dict(zip(COLUMNS[5:], cell.difference, strict=True))
    return row


def grid(
    names: Sequence[str], cells: Sequence[Cell], entry: Callable[[Cell, bool], str]
) -> list[list[str]]:
    """One row of the table per run, one entry per measure."""
    return [
        [name, *(entry(cell, name == names[0]) for cell in cells if cell.run == name)]
        for name in names
    ]


def markdown(
    names: Sequence[str],
    cells: Sequence[Cell],
    facts: Sequence[str],
    *,
    marked: bool,
) -> str:
    """The table in Markdown."""

    def entry(cell: Cell, first: bool) -> str:
        text = f"{number(cell.interval.value)} ({bounds(cell.interval)})"
        return (
            text
            if first
            else f"{text}<br>{difference_text(cell.difference, marked=marked)}"
        )

    lines = [
        f"| run | {' | '.join(measure.name for measure in MEASURES)} |",
        "|---" * (len(MEASURES) + 1) + "|",
        *(f"| {' | '.join(row)} |" for row in grid(names, cells, entry)),
    ]
    return "\n".join([*lines, "", *facts, ""])


def difference_text(difference: Interval | None, *, marked: bool) -> str:
    """A difference with its interval; if `marked`, with (!) where that excludes 0."""
    if difference is None:
        return "unpaired"
    excluded = difference.low > 0 or difference.high < 0
    mark = " (!)" if marked and excluded else ""
    return f"{difference.value:+.3f} ({bounds(difference)}){mark}"


def latex(
    names: Sequence[str],
    cells: Sequence[Cell],
    facts: Sequence[str],
    *,
    marked: bool,
) -> str:
    """The table in LaTeX, for the package booktabs: values, and differences below them."""

    def entry(cell: Cell, first: bool) -> str:
        difference = (
            "" if first else f" [{difference_text(cell.difference, marked=marked)}]"
        )
        return f"{number(cell.interval.value)}{difference}"

    rows = [" & ".join(row) + " \\\\" for row in grid(names, cells, entry)]
    head = " & ".join(["Run", *(measure.name for measure in MEASURES)]) + " \\\\"
    return "\n".join(
        [
            *(f"% {fact}" for fact in facts),
            f"\\begin{{tabular}}{{l{'r' * len(MEASURES)}}}",
            "\\toprule",
            head,
            "\\midrule",
            *rows,
            "\\bottomrule",
            "\\end{tabular}",
            "",
        ]
    )


def main(argv: Sequence[str] | None = None) -> None:
    steps.run(ablation_table, Arguments, argv=argv)


if __name__ == "__main__":
    main()
