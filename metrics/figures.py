"""Figures of FROC and reliability curves."""

from pathlib import Path

import numpy as np

from ct.files import write_rows
from ct.provenance import DISCLAIMER
from metrics import calibration, froc
from metrics.calibration import merge_bins
from metrics.tables import number


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
