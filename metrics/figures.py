"""Figures of scores: Dice, overlays, FROC and reliability."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ct.files import write_rows
from ct.provenance import DISCLAIMER
from metrics import calibration, froc
from metrics.calibration import merge_bins
from metrics.tables import column, number


@dataclass(frozen=True, eq=False)
class Overlay:
    """One slice with the outlines of reference and prediction.

    Attributes:
        title: Title of the picture.
        image: (y, x) HU or other values.
        reference: (y, x) bool mask, drawn in green.
        predicted: (y, x) bool mask, drawn in red.
        in_hu: Whether `image` is shown in a window of -1000 to 400 HU.
    """

    title: str
    image: np.ndarray
    reference: np.ndarray
    predicted: np.ndarray
    in_hu: bool


def draw_dice(
    rows: Sequence[dict[str, Any]], nodules: Sequence[dict[str, Any]], path: Path
) -> None:
    """Draws Dice per scan, sorted, and Dice of each nodule over its diameter."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    values = np.sort(column(rows, "dice"))
    left.plot(np.arange(1, len(values) + 1), values, "o-", color="0.2")
    left.set(xlabel="scan, by Dice", ylabel="Dice", ylim=(0, 1), title="Dice per scan")
    left.xaxis.get_major_locator().set_params(integer=True)
    for hit, colour, label in ((1, "tab:green", "found"), (0, "tab:red", "missed")):
        some = [nodule for nodule in nodules if nodule["hit"] == hit]
        right.scatter(
            [nodule["diameter_mm"] for nodule in some],
            [nodule["dice"] for nodule in some],
            color=colour,
            label=f"{label} ({len(some)})",
        )
    right.set(xlabel="diameter (mm)", ylabel="Dice", ylim=(0, 1), title="Nodules")
    right.legend(loc="lower right")
    figure.text(0.5, -0.03, DISCLAIMER, ha="center", fontsize=8)
    figure.savefig(path, dpi=120, bbox_inches="tight")


def draw_overlays(overlays: Sequence[Overlay], path: Path) -> None:
    """Draws slices side by side, each with the outlines of reference and prediction."""
    from matplotlib.figure import Figure

    width = max(4.2 * len(overlays), 6.4)  # a narrower figure would cut the title
    figure = Figure(figsize=(width, 4.8), layout="constrained")
    axes = np.atleast_1d(figure.subplots(1, len(overlays)))
    for axis, overlay in zip(axes, overlays, strict=True):
        window = {"vmin": -1000, "vmax": 400} if overlay.in_hu else {}
        axis.imshow(overlay.image, cmap="gray", **window)
        for mask, colour in ((overlay.reference, "lime"), (overlay.predicted, "red")):
            if mask.any():
                axis.contour(mask, levels=[0.5], colors=colour, linewidths=0.8)
        axis.set_title(overlay.title)
        axis.axis("off")
    figure.suptitle(
        f"green: readers' consensus, red: prediction. {DISCLAIMER}", fontsize=9
    )
    figure.savefig(path, dpi=120)


def draw_froc(curve: froc.Froc, path: Path) -> None:
    """Draws the FROC curve with its intervals at LUNA16's rates."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5, 4), layout="constrained")
    axes = figure.subplots()
    rates = np.geomspace(froc.RATES[0], froc.RATES[-1], 200)
    axes.plot(
        rates, np.interp(rates, curve.fp_per_scan, curve.sensitivity), color="0.2"
    )
    values, low, high = np.array(curve.at_rates).T
    axes.errorbar(
        froc.RATES, values, (values - low, high - values), fmt="o", color="0.2"
    )
    axes.set_xscale("log", base=2)
    axes.set_xticks(froc.RATES, ["1/8", "1/4", "1/2", "1", "2", "4", "8"])
    axes.set(
        xlabel="false positives per scan",
        ylabel="nodule sensitivity",
        ylim=(0, 1),
        title=f"FROC, CPM {number(curve.cpm.value)}",
    )
    figure.text(0.5, -0.03, DISCLAIMER, ha="center", fontsize=8)
    figure.savefig(path, dpi=120, bbox_inches="tight")


def write_reliability(counts: np.ndarray, out: Path) -> None:
    """Writes reliability.csv, one row per bin of probability, and reliability.png.

    Args:
        counts: (fine bins, 3) histogram, summed over all scans.
        out: Output folder.
    """
    curve = calibration.reliability(merge_bins(counts))
    bounds_of_bins = np.linspace(0, 1, len(curve.voxels) + 1)
    rows = [
        {
            "low": low,
            "high": high,
            "voxels": int(voxels),
            "mean_probability": probability,
            "mean_vote": vote,
        }
        for low, high, voxels, probability, vote in zip(
            bounds_of_bins[:-1].round(6),
            bounds_of_bins[1:].round(6),
            curve.voxels,
            curve.probability,
            curve.observed,
            strict=True,
        )
    ]
    write_rows(rows, list(rows[0]), out / "reliability.csv")
    draw_reliability(curve, out / "reliability.png")


def draw_reliability(curve: calibration.Reliability, path: Path) -> None:
    """Draws the share of readers against predicted probability, and voxels per bin."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5, 5.5), layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    upper.plot([0, 1], [0, 1], color="0.7", linewidth=1, label="perfect calibration")
    upper.plot(
        curve.probability,
        curve.observed,
        "o-",
        color="0.2",
        clip_on=False,
        zorder=3,
        label="predictions",
    )
    upper.set(
        ylabel="share of readers who drew the voxel",
        xlim=(0, 1),
        ylim=(0, 1),
        title=f"Reliability, ECE {curve.ece:.3f}",
    )
    upper.legend(loc="upper left")
    width = 1 / len(curve.voxels)
    middles = (np.arange(len(curve.voxels)) + 0.5) * width
    lower.bar(middles, curve.voxels, width, color="0.6", edgecolor="white")
    lower.set(xlabel="predicted probability", ylabel="voxels", yscale="log")
    lower.set_ylim(bottom=0.5)  # otherwise a bin of one voxel would have no height
    figure.text(0.5, -0.03, DISCLAIMER, ha="center", fontsize=8)
    figure.savefig(path, dpi=120, bbox_inches="tight")
