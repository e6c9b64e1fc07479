"""Tables of scores in Markdown and LaTeX."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from metrics import calibration, froc, intervals, nodule_scores
from metrics.intervals import Interval

PER_SCAN = {
    "dice": "Dice per scan",
    "dice_nodule_slices": "Dice per scan, slices with a nodule only",
    "iou": "IoU per scan",
    "sensitivity": "Voxel sensitivity per scan",
    "precision": "Voxel precision per scan",
    "hd95_mm": "HD95 (mm)",
    "surface_dice": "Surface Dice",
    "lung_dice": "Lung mask Dice",
    "lung_inclusion": "Consensus nodule voxels inside the scan file's lung mask",
}
"""Columns of scores.csv that are averaged over scans -> their names in the tables."""

AGREEING_READERS = 3
"""Fewest readers of a nodule for which the readers are compared with the prediction."""

AGREEMENT = {
    "dice_consensus": "Dice with the 50 % consensus",
    "dice_reader_consensus": "One reader's Dice with the 50 % consensus, reader included",
    "dice_others": "Dice with the majority of all readers but one",
    "dice_reader_others": "One reader's Dice with the majority of the others",
    "dice_readers": "Dice with one reader",
    "dice_reader_reader": "One reader's Dice with another",
}
"""Columns of nodules.csv -> their names in the tables, in pairs of prediction and reader; see
agreement.py."""

HEADLINE = (
    "Dice per scan",
    "Dice, pooled",
    "Nodule sensitivity, all",
    "False positives per scan",
    "CPM (mean of these)",
)
"""Scores that are also reported without the patients that were trained on."""


@dataclass(frozen=True)
class Scored:
    """Scores of one scan.

    Attributes:
        row: Row of scores.csv.
        nodules: Rows of nodules.csv, one per reference nodule.
        reliability: (fine bins, 3) from `calibration.histogram`; None without a probability
            map.
        candidates, targets, irrelevant: Arguments of `froc.mark`; None for patches and for
            single slices.
    """

    row: dict[str, Any]
    nodules: list[dict[str, Any]]
    reliability: np.ndarray | None = None
    candidates: np.ndarray | None = None
    targets: np.ndarray | None = None
    irrelevant: np.ndarray | None = None


@dataclass(frozen=True)
class Line:
    """One line of the table of scores."""

    name: str
    interval: Interval
    defined: int
    total: int


def curve_of(scored: Sequence[Scored], *, draws: int) -> froc.Froc | None:
    """Computes the FROC curve of the whole scans; None if none of them has a nodule."""
    whole = [item for item in scored if item.candidates is not None]
    if not any(len(np.asarray(item.targets)) for item in whole):
        return None
    ids = [item.row["scan_id"] for item in whole]
    marks = froc.mark(
        ids,
        *(
            {item.row["scan_id"]: getattr(item, name) for item in whole}
            for name in ("candidates", "targets", "irrelevant")
        ),
    )
    return froc.froc(marks, [item.row["patient_id"] for item in whole], draws=draws)


def froc_lines(curve: froc.Froc | None, scored: Sequence[Scored]) -> list[Line]:
    """Returns the lines of the sensitivities at LUNA16's rates and of their mean."""
    if curve is None:
        return []
    scans = sum(item.candidates is not None for item in scored), len(scored)
    lines = [
        Line(f"Sensitivity at {rate:g} false positives per scan", found, *scans)
        for rate, found in zip(froc.RATES, curve.at_rates, strict=True)
    ]
    return [*lines, Line("CPM (mean of these)", curve.cpm, *scans)]


def summary(
    rows: Sequence[dict[str, Any]], nodules: Sequence[dict[str, Any]], *, draws: int
) -> list[Line]:
    """Returns the lines of the table: means over scans, pooled voxels, nodules, strata."""
    patients = column(rows, "patient_id")
    lines = []
    for name, text in PER_SCAN.items():
        values = column(rows, name)
        if np.isfinite(values).any():
            interval = intervals.bootstrap_mean(values, patients, n=draws)
            lines.append(
                Line(text, interval, int(np.isfinite(values).sum()), len(rows))
            )
    counts = np.stack([column(rows, name) for name in ("tp", "fp", "fn")], axis=1)
    for name in ("dice", "sensitivity", "precision"):
        interval = intervals.bootstrap_pooled(counts, patients, name, n=draws)
        text = f"Voxel {name}, pooled" if name != "dice" else "Dice, pooled"
        lines.append(Line(text, interval, len(rows), len(rows)))
    lines.append(
        Line(
            "False positives per scan",
            intervals.bootstrap_mean(
                column(rows, "false_positives"), patients, n=draws
            ),
            len(rows),
            len(rows),
        )
    )
    return lines + nodule_lines(nodules, draws=draws)


def nodule_lines(nodules: Sequence[dict[str, Any]], *, draws: int) -> list[Line]:
    """Returns the lines of sensitivity and Dice over all nodules and by stratum."""
    if not nodules:
        return []
    lines = []
    for name, some in nodule_scores.strata(nodules):
        patients = column(some, "patient_id")
        for key, text in (("hit", "Nodule sensitivity"), ("dice", "Dice per nodule")):
            values = column(some, key).astype(float)
            interval = intervals.bootstrap_mean(values, patients, n=draws)
            defined = int(np.isfinite(values).sum())
            lines.append(Line(f"{text}, {name}", interval, defined, len(nodules)))
    return lines + reader_lines(nodules, draws=draws)


def reader_lines(nodules: Sequence[dict[str, Any]], *, draws: int) -> list[Line]:
    """Returns the lines of prediction and readers on nodules that enough readers drew."""
    some = [nodule for nodule in nodules if nodule["readers"] >= AGREEING_READERS]
    if not some:
        return []
    patients = column(some, "patient_id")
    return [
        Line(
            f"{text}, nodules of {AGREEING_READERS} or more readers",
            intervals.bootstrap_mean(column(some, name), patients, n=draws),
            int(np.isfinite(column(some, name)).sum()),
            len(nodules),
        )
        for name, text in AGREEMENT.items()
    ]


def calibration_lines(
    scored: Sequence[Scored], temperature: float | None, *, draws: int
) -> list[Line]:
    """Returns the lines of the calibration error, without and with temperature scaling."""
    known = [item for item in scored if item.reliability is not None]
    if not known:
        return []
    counts = [np.asarray(item.reliability) for item in known]
    patients = np.array([item.row["patient_id"] for item in known])
    text = "Calibration error (ECE) against readers' votes"
    kinds = {text: counts}
    if temperature is not None:
        scaled = [calibration.scale_histogram(some, temperature) for some in counts]
        kinds[f"{text}, temperature scaled"] = scaled
    return [
        Line(
            name,
            calibration.ece(np.stack(some), patients, draws=draws),
            len(known),
            len(scored),
        )
        for name, some in kinds.items()
    ]


def column(rows: Sequence[dict[str, Any]], name: str) -> np.ndarray:
    return np.array([row[name] for row in rows])


def leak_text(scored: Sequence[Scored], *, draws: int) -> str:
    """Returns a sentence on patients that were trained on, with scores without them."""
    patients = {item.row["patient_id"] for item in scored}
    leaks = {item.row["patient_id"] for item in scored if item.row["leak"]}
    if not leaks:
        return "No scored patient was trained on."
    if leaks == patients:
        return (
            f"WARNING: every scored patient ({len(leaks)} of {len(patients)}) was trained "
            "on; these scores do not apply to new patients."
        )
    others = [item for item in scored if item.row["patient_id"] not in leaks]
    nodules = [nodule for item in others for nodule in item.nodules]
    lines = summary([item.row for item in others], nodules, draws=draws)
    lines += froc_lines(curve_of(others, draws=draws), others)
    figures = "; ".join(
        f"{line.name} {number(line.interval.value)} ({bounds(line.interval)})"
        for line in lines
        if line.name in HEADLINE
    )
    return (
        f"WARNING: {len(leaks)} of {len(patients)} patients were trained on. Without "
        f"them: {figures}."
    )


def markdown(lines: Sequence[Line], facts: Sequence[str], *, head: str) -> str:
    """Formats the table in Markdown, with `head` above it and the other facts below."""
    table = ["| score | value | 95 % interval | n |", "|---|---|---|---|"]
    table += [
        f"| {line.name} | {number(line.interval.value)} | {bounds(line.interval)} "
        f"| {line.defined} of {line.total} |"
        for line in lines
    ]
    below = [fact for fact in facts if fact != head]
    return "\n".join([head, "", *table, "", *below, ""])


def latex(lines: Sequence[Line], facts: Sequence[str]) -> str:
    """Formats the table in LaTeX for the package booktabs."""
    rows = [
        f"{line.name} & {number(line.interval.value)} & {bounds(line.interval)} "
        f"& {line.defined}/{line.total} \\\\"
        for line in lines
    ]
    comments = [f"% {fact}" for fact in facts]
    head = [
        "\\begin{tabular}{lrrr}",
        "\\toprule",
        "Score & Value & 95\\,\\% interval & n \\\\",
    ]
    return "\n".join(
        [*comments, *head, "\\midrule", *rows, "\\bottomrule", "\\end{tabular}", ""]
    )


def number(value: float) -> str:
    return "undefined" if np.isnan(value) else f"{value:.3f}"


def bounds(interval: Interval) -> str:
    if np.isnan(interval.value):
        return "-"
    if np.isnan(interval.low):
        return "one patient"
    return f"{interval.low:.3f} to {interval.high:.3f}"
