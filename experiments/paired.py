"""Comparison of runs scored on the same cases by paired bootstrap, and its tables.

A paired difference draws patients once and scores both runs on them.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from metrics import intervals, overlap
from metrics.intervals import Interval
from metrics.overlap import Counts
from metrics.tables import bounds, number

Row = Mapping[str, Any]
"""Scores of a scan by name, as numbers or as text."""

FEW_PATIENTS = 10
"""Fewest patients for which differences are marked: with fewer, a percentile interval
excludes 0 by chance far more often than its level says."""

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
"""Columns of the table as CSV."""


class Measure(NamedTuple):
    """Score that is a statistic of sums over scans.

    Attributes:
        name: Name in the table.
        columns: Maps rows of scans to (scans, k) numbers that are summed.
        statistic: Maps (..., k) sums to (...) scores.
        defined: Maps rows of scans to (scans,) bool; a difference counts only scans where
            the score is defined for both runs.
    """

    name: str
    columns: Callable[[Sequence[Row]], np.ndarray]
    statistic: Callable[[np.ndarray], np.ndarray]
    defined: Callable[[Sequence[Row]], np.ndarray] = lambda rows: np.full(
        len(rows), True
    )


@dataclass(frozen=True)
class Cell:
    """One score of one run; `difference` is None if it cannot be paired."""

    run: str
    score: str
    interval: Interval
    difference: Interval | None


def numbers(*names: str) -> Callable[[Sequence[Row]], np.ndarray]:
    """Returns a function that reads (scans, names) float64 from rows."""
    return lambda rows: np.array([[float(row[name]) for name in names] for row in rows])


def mean_of(name: str, text: str) -> Measure:
    """Returns the measure of a score's mean over the scans where it is defined."""
    return Measure(
        text,
        lambda rows: intervals.mean_columns(numbers(name)(rows)[:, 0]),
        intervals.mean_of_sums,
        lambda rows: np.isfinite(numbers(name)(rows)[:, 0]),
    )


def ratio_of(part: str, whole: str, text: str) -> Measure:
    """Returns the measure of the sum of `part` over scans, divided by that of `whole`."""
    return Measure(
        text,
        numbers(part, whole),
        lambda sums: overlap.ratio(sums[..., 0], sums[..., 1]),
    )


def pooled_dice(text: str) -> Measure:
    """Returns the measure of the Dice of tp, fp and fn voxels summed over scans."""
    return Measure(
        text,
        numbers("tp", "fp", "fn"),
        lambda sums: Counts(*np.moveaxis(sums, -1, 0)).dice,
    )


def compare(
    run: str,
    rows: Sequence[Row],
    base: Sequence[Row] | None,
    measures: Sequence[Measure],
    *,
    draws: int,
) -> list[Cell]:
    """Computes each score of a run with its interval and its difference from `base`.

    Args:
        run: Name of the run.
        rows: Scans of the run, each with a `patient_id`.
        base: The same scans in the same order, scored for the baseline run; None gives no
            differences.
        measures: Scores to compute.
        draws: Number of bootstrap draws.
    """
    patients = np.array([row["patient_id"] for row in rows])
    cells = []
    for measure in measures:
        values = measure.columns(rows)
        interval = intervals.bootstrap(values, patients, measure.statistic, n=draws)
        difference = None
        if base is not None:
            in_both = measure.defined(rows) & measure.defined(base)
            both = np.hstack([values, measure.columns(base)]) * in_both[:, None]
            difference = intervals.bootstrap(
                both, patients, difference_of(measure.statistic), n=draws
            )
        cells.append(Cell(run, measure.name, interval, difference))
    return cells


def difference_of(
    statistic: Callable[[np.ndarray], np.ndarray],
) -> Callable[[np.ndarray], np.ndarray]:
    """Returns a function: `statistic` of the first half of columns less that of the rest."""

    def difference(sums: np.ndarray) -> np.ndarray:
        first, second = np.split(sums, 2, axis=-1)
        return statistic(first) - statistic(second)

    return difference


def csv_row(cell: Cell) -> dict[str, Any]:
    """Returns a cell as a row of `COLUMNS`."""
    row: dict[str, Any] = {"run": cell.run, "score": cell.score}
    row |= dict(zip(COLUMNS[2:5], cell.interval, strict=True))
    if cell.difference:
        row |= dict(zip(COLUMNS[5:], cell.difference, strict=True))
    return row


def markdown(cells: Sequence[Cell], facts: Sequence[str], *, marked: bool) -> str:
    """Formats the table in Markdown: values, intervals and the differences below them.

    Args:
        cells: Cells of all runs; those of the first run show no difference.
        facts: Sentences below the table.
        marked: Marks differences whose interval excludes 0.
    """

    def entry(cell: Cell, first: bool) -> str:
        text = f"{number(cell.interval.value)} ({bounds(cell.interval)})"
        return (
            text
            if first
            else f"{text}<br>{difference_text(cell.difference, marked=marked)}"
        )

    head = ["run", *scores_of(cells)]
    lines = [
        f"| {' | '.join(head)} |",
        "|---" * len(head) + "|",
        *(f"| {' | '.join(row)} |" for row in grid(cells, entry)),
    ]
    return "\n".join([*lines, "", *facts, ""])


def latex(cells: Sequence[Cell], facts: Sequence[str], *, marked: bool) -> str:
    """Formats the table in LaTeX (booktabs): values, and differences in brackets."""

    def entry(cell: Cell, first: bool) -> str:
        difference = difference_text(cell.difference, marked=marked)
        return number(cell.interval.value) + ("" if first else f" [{difference}]")

    head = ["Run", *scores_of(cells)]
    rows = [" & ".join(row) + " \\\\" for row in [head, *grid(cells, entry)]]
    return "\n".join(
        [
            *(f"% {fact}" for fact in facts),
            f"\\begin{{tabular}}{{l{'r' * (len(head) - 1)}}}",
            "\\toprule",
            rows[0],
            "\\midrule",
            *rows[1:],
            "\\bottomrule",
            "\\end{tabular}",
            "",
        ]
    )


def scores_of(cells: Sequence[Cell]) -> list[str]:
    """Returns the names of the scores, in the order of the first run."""
    return [cell.score for cell in cells if cell.run == cells[0].run]


def grid(cells: Sequence[Cell], entry: Callable[[Cell, bool], str]) -> list[list[str]]:
    """Returns one row of the table per run: its name, then one entry per score."""
    runs = dict.fromkeys(cell.run for cell in cells)
    return [
        [run, *(entry(cell, run == cells[0].run) for cell in cells if cell.run == run)]
        for run in runs
    ]


def difference_text(difference: Interval | None, *, marked: bool) -> str:
    """Formats a difference with its interval; `marked` adds (!) if this excludes 0."""
    if difference is None:
        return "unpaired"
    excluded = difference.low > 0 or difference.high < 0
    mark = " (!)" if marked and excluded else ""
    return f"{difference.value:+.3f} ({bounds(difference)}){mark}"


def caution(patients: int) -> str:
    """Returns a sentence on the limits of the intervals."""
    few = f", and are too narrow with fewer than {FEW_PATIENTS} patients."
    many = "; (!): the difference's interval excludes 0."
    return "Intervals are not corrected for the number of comparisons" + (
        few if patients < FEW_PATIENTS else many
    )
