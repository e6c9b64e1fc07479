"""Do voxels with a probability of 0.7 have 0.7 of the readers? Reliability, and temperature.

What is known of a scan is a histogram: fine bins of probability, each with its voxels, their
summed probability and their summed votes. Histograms of scans add.
"""

from pathlib import Path

import numpy as np

from ct import files
from ct.nifti_io import check_same_grid, read_nifti
from ct.provenance import DISCLAIMER
from ct.scan import Scan, ScanError, reader_votes, readers_of_label
from metrics import overlap
from results.predictions import write_rows

LEAST_PROBABILITY = 0.01
"""Calibration looks at voxels above it, and at those that a reader drew."""

BINS = 20
"""Of the reliability curve and of ECE."""

FINE_BINS = 50 * BINS
"""Of the histograms, so that they can be scaled and binned again."""

TEMPERATURES = (0.1, 10.0)
"""Within these the temperature is looked for."""


def histogram(path: Path, scan: Scan) -> np.ndarray:
    """(fine bins, 3) of `metrics.reliability_counts` against the share of readers.

    Args:
        path: The probability map of the scan.
        scan: With readers' marks.

    Raises:
        ScanError: If the map lies on another grid or holds no probabilities.
    """
    prob, grid = read_nifti(path)
    check_same_grid(grid, scan.grid, path)
    check_probabilities(prob, path)
    counts = readers_of_label(scan.nodules)[scan.nodule_labels]
    votes = reader_votes(np.asarray(scan.reader_bits)) / np.maximum(counts, 1)
    return overlap.reliability_counts(
        prob, votes, bins=FINE_BINS, least=LEAST_PROBABILITY
    )


def check_probabilities(prob: np.ndarray, path: Path) -> None:
    """Raises ScanError if a voxel is NaN or out of 0..1."""
    undefined = int(np.isnan(prob).sum())
    if undefined:
        voxels = files.count_text(undefined, "voxel")
        raise ScanError(f"{path}: NaN in {voxels}; expected 0 to 1")
    low, high = float(prob.min()), float(prob.max())
    # Integers scaled by a float32 slope may exceed 1 by rounding.
    if low < 0 or high > 1 + 1e-6:
        raise ScanError(
            f"{path}: probabilities run from {low:.4g} to {high:.4g}; expected 0 to 1"
        )


def fit_temperature(counts: np.ndarray) -> float | None:
    """The temperature with the least cross-entropy between probabilities and votes.

    Of voxels above `LEAST_PROBABILITY`, whoever drew them: below, only those are known that
    a reader drew.

    Args:
        counts: (fine bins, 3), summed over the scans it is fitted on.

    Returns:
        Above 1 if the network is too sure of itself; None if there is none within
        `TEMPERATURES`.

    Reference: Guo et al. 2017, On calibration of modern neural networks, section 4.2.
    """
    from scipy.optimize import minimize_scalar

    above = counts[round(LEAST_PROBABILITY * FINE_BINS) :]
    voxels, summed, votes = above[above[:, 0] > 0].T
    if not len(voxels):
        return None
    probability = summed / voxels

    def cross_entropy(log_temperature: float) -> float:
        scaled = with_temperature(probability, np.exp(log_temperature))
        found = votes * np.log(scaled) + (voxels - votes) * np.log1p(-scaled)
        return -float(found.sum())

    bounds = np.log(TEMPERATURES)
    found = minimize_scalar(cross_entropy, bounds=bounds, method="bounded")
    inside = bounds[0] + 0.01 < found.x < bounds[1] - 0.01
    return float(np.exp(found.x)) if inside else None


def with_temperature(probability: np.ndarray, temperature: float) -> np.ndarray:
    """Probabilities whose logits are divided by a temperature; never quite 0 or 1."""
    least = 0.5 / FINE_BINS
    inner = np.clip(probability, least, 1 - least)
    logit = np.log(inner) - np.log1p(-inner)
    return np.clip(1 / (1 + np.exp(-logit / temperature)), 1e-12, 1 - 1e-12)


def scaled(counts: np.ndarray, temperature: float) -> np.ndarray:
    """The histogram of probabilities with a temperature; 1 changes nothing."""
    if temperature == 1:
        return counts
    voxels, summed, votes = counts.T
    probability = with_temperature(overlap.ratio(summed, voxels), temperature)
    place = np.minimum(np.nan_to_num(probability) * FINE_BINS, FINE_BINS - 1).astype(
        int
    )
    result = np.zeros_like(counts)
    np.add.at(result[:, 0], place, voxels)
    np.add.at(result[:, 1], place, np.nan_to_num(probability) * voxels)
    np.add.at(result[:, 2], place, votes)
    return result


def coarse(counts: np.ndarray) -> np.ndarray:
    """(..., bins, 3) of (..., fine bins, 3)."""
    return counts.reshape(*counts.shape[:-2], BINS, -1, 3).sum(axis=-2)


def ece(counts: np.ndarray, patients: np.ndarray, *, draws: int) -> overlap.Interval:
    """Expected calibration error with its interval by patient.

    Args:
        counts: (scans, fine bins, 3).
        patients: (scans,) patient of each.
        draws: Of the bootstrap.
    """
    cells = coarse(counts)

    def error(sums: np.ndarray) -> np.ndarray:
        voxels, summed, votes = np.moveaxis(
            sums.reshape(*sums.shape[:-1], *cells.shape[1:]), -1, 0
        )
        return overlap.ratio(np.abs(summed - votes).sum(axis=-1), voxels.sum(axis=-1))

    return overlap.bootstrap(cells.reshape(len(cells), -1), patients, error, n=draws)


def write_reliability(counts: np.ndarray, out: Path) -> None:
    """Writes reliability.csv, one row per bin of probability, and reliability.png.

    Args:
        counts: (fine bins, 3) of all scans.
        out: The folder.
    """
    curve = overlap.reliability(coarse(counts))
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


def draw_reliability(curve: overlap.Reliability, path: Path) -> None:
    """Share of readers against predicted probability, over the voxels of each bin."""
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
    lower.set_ylim(bottom=0.5)  # or a bin of one voxel has no height
    figure.text(0.5, -0.03, DISCLAIMER, ha="center", fontsize=8)
    figure.savefig(path, dpi=120, bbox_inches="tight")
