"""Calibration of probability maps against the readers' votes, and temperature scaling.

In a calibrated map, 70 % of the readers, on average, drew a voxel with probability 0.7. Each
scan is reduced to a histogram: for every fine bin of probability the number of voxels, their
summed probability and their summed votes. Histograms of several scans can be added.
"""

from pathlib import Path
from typing import NamedTuple

import numpy as np

from ct import files
from ct.nifti_io import check_same_grid, read_nifti
from ct.scan import Scan, ScanError, reader_votes, readers_of_label
from metrics import intervals, overlap
from metrics.overlap import ratio

LEAST_PROBABILITY = 0.01
"""Calibration counts voxels above this probability, and voxels that a reader drew."""

BINS = 20
"""Number of bins of the reliability curve and of the ECE."""

FINE_BINS = 50 * BINS
"""Number of bins of the histograms, so that they can be temperature-scaled and rebinned."""

TEMPERATURES = (0.1, 10.0)
"""Bounds of the search for the temperature."""


def histogram(path: Path, scan: Scan) -> np.ndarray:
    """Returns (fine bins, 3) `reliability_counts` against the share of readers.

    Args:
        path: Probability map of the scan.
        scan: Scan with readers' marks.

    Raises:
        ScanError: If the map is on another grid or its values are not probabilities.
    """
    prob, grid = read_nifti(path)
    check_same_grid(grid, scan.grid, path)
    check_probabilities(prob, path)
    counts = readers_of_label(scan.nodules)[scan.nodule_labels]
    votes = reader_votes(np.asarray(scan.reader_bits)) / np.maximum(counts, 1)
    return reliability_counts(prob, votes, bins=FINE_BINS, least=LEAST_PROBABILITY)


def check_probabilities(prob: np.ndarray, path: Path) -> None:
    """Raises ScanError if a voxel is NaN or outside 0..1."""
    undefined = int(np.isnan(prob).sum())
    if undefined:
        voxels = files.count_text(undefined, "voxel")
        raise ScanError(f"{path}: NaN in {voxels}; expected probabilities from 0 to 1")
    low, high = float(prob.min()), float(prob.max())
    # Integers scaled by a float32 slope may exceed 1 by a rounding error.
    if low < 0 or high > 1 + 1e-6:
        raise ScanError(
            f"{path}: values from {low:.4g} to {high:.4g}; expected probabilities from 0 to 1"
        )


def fit_temperature(counts: np.ndarray) -> float | None:
    """Fits the temperature that minimises the cross-entropy of probabilities and votes.

    Uses all voxels above `LEAST_PROBABILITY`, drawn by a reader or not. Voxels below it are
    left out, because the histogram holds only those of them that a reader drew.

    Args:
        counts: (fine bins, 3), summed over the scans to fit on.

    Returns:
        The temperature, above 1 if the network is overconfident; None if there are no
        voxels or the minimum lies at a bound of `TEMPERATURES`.

    Reference: Guo et al. 2017, On calibration of modern neural networks, section 4.2.
    """
    from scipy.optimize import minimize_scalar

    above = counts[round(LEAST_PROBABILITY * FINE_BINS) :]
    voxels, summed, votes = above[above[:, 0] > 0].T
    if not len(voxels):
        return None
    probability = summed / voxels

    def cross_entropy(log_temperature: float) -> float:
        scaled = scale_probabilities(probability, np.exp(log_temperature))
        found = votes * np.log(scaled) + (voxels - votes) * np.log1p(-scaled)
        return -float(found.sum())

    bounds = np.log(TEMPERATURES)
    found = minimize_scalar(cross_entropy, bounds=bounds, method="bounded")
    inside = bounds[0] + 0.01 < found.x < bounds[1] - 0.01
    return float(np.exp(found.x)) if inside else None


def scale_probabilities(probability: np.ndarray, temperature: float) -> np.ndarray:
    """Divides the logits of probabilities by a temperature; results lie inside (0, 1)."""
    least = 0.5 / FINE_BINS
    inner = np.clip(probability, least, 1 - least)
    logit = np.log(inner) - np.log1p(-inner)
    return np.clip(1 / (1 + np.exp(-logit / temperature)), 1e-12, 1 - 1e-12)


def scale_histogram(counts: np.ndarray, temperature: float) -> np.ndarray:
    """Returns the histogram after temperature scaling; 1 changes nothing."""
    if temperature == 1:
        return counts
    voxels, summed, votes = counts.T
    probability = scale_probabilities(overlap.ratio(summed, voxels), temperature)
    place = np.minimum(np.nan_to_num(probability) * FINE_BINS, FINE_BINS - 1).astype(
        int
    )
    result = np.zeros_like(counts)
    np.add.at(result[:, 0], place, voxels)
    np.add.at(result[:, 1], place, np.nan_to_num(probability) * voxels)
    np.add.at(result[:, 2], place, votes)
    return result


def merge_bins(counts: np.ndarray) -> np.ndarray:
    """Sums a (..., fine bins, 3) histogram into (..., bins, 3)."""
    return counts.reshape(*counts.shape[:-2], BINS, -1, 3).sum(axis=-2)


def ece(counts: np.ndarray, patients: np.ndarray, *, draws: int) -> intervals.Interval:
    """Computes the expected calibration error with its interval by patient.

    Args:
        counts: (scans, fine bins, 3).
        patients: (scans,) patient of each scan.
        draws: Number of bootstrap draws.
    """
    cells = merge_bins(counts)

    def error(sums: np.ndarray) -> np.ndarray:
        voxels, summed, votes = np.moveaxis(
            sums.reshape(*sums.shape[:-1], *cells.shape[1:]), -1, 0
        )
        return overlap.ratio(np.abs(summed - votes).sum(axis=-1), voxels.sum(axis=-1))

    return intervals.bootstrap(cells.reshape(len(cells), -1), patients, error, n=draws)


class Reliability(NamedTuple):
    """Reliability curve: observed frequency against predicted probability, in bins.

    Attributes:
        probability: (bins,) mean predicted probability; NaN in an empty bin.
        observed: (bins,) share of foreground voxels; NaN in an empty bin.
        voxels: (bins,) number of voxels.
        ece: Expected calibration error: mean |probability - observed| over the voxels.
    """

    probability: np.ndarray
    observed: np.ndarray
    voxels: np.ndarray
    ece: float


def reliability_counts(
    prob: np.ndarray, mask_ref: np.ndarray, *, bins: int = 20, least: float = 0.0
) -> np.ndarray:
    """Returns (bins, 3): voxels, summed probability and foreground voxels.

    Counts of several cases can be added. Voxels with probability 0 outside the reference are
    left out: their number grows with the field of view, and all of them would look well
    calibrated.

    Args:
        prob: Probabilities 0..1, any shape; not checked.
        mask_ref: bool, or the share of readers who drew each voxel; same shape.
        bins: Number of bins of equal width.
        least: Voxels outside the reference whose probability is at most this are left out too.
    """
    counted = (mask_ref > 0) | (prob > least)
    values, inside = prob[counted], mask_ref[counted].astype(np.float64)
    place = np.minimum((values * bins).astype(np.int64), bins - 1)
    return np.stack(
        [
            np.bincount(place, minlength=bins).astype(np.float64),
            np.bincount(place, weights=values, minlength=bins),
            np.bincount(place, weights=inside, minlength=bins),
        ],
        axis=1,
    )


def reliability(counts: np.ndarray) -> Reliability:
    """Computes the reliability curve from `reliability_counts`.

    Reference: Guo et al. 2017, On calibration of modern neural networks, equation 3.
    """
    voxels, summed, inside = np.moveaxis(counts, -1, 0)
    ece = float(np.abs(summed - inside).sum() / voxels.sum())
    return Reliability(ratio(summed, voxels), ratio(inside, voxels), voxels, ece)
