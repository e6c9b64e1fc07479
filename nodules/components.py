"""Connected components of a probability map or a mask."""

from typing import Literal

import cv2
import numpy as np

import config
from ct import boxes
from ct.geometry import Grid
from ct.nifti_io import PROBABILITY_STEPS

Connectivity = Literal[6, 18, 26]

WITHIN_SHARE = 0.5
"""Smallest share of a component in the lung mask for it to be in the lungs."""


def label_nodules(
    prob: np.ndarray,
    grid: Grid,
    settings: config.Postprocess,
    *,
    lung: np.ndarray | None = None,
    marked: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Finds nodules like `find_nodules`, without measuring them.

    Args:
        prob: See `find_nodules`.
        grid: See `find_nodules`.
        settings: See `find_nodules`.
        lung: See `find_nodules`.
        marked: (z, y, x) nonzero voxels to use instead of those that reach the
            threshold; bool, or integers, where neighbours with different values are
            never one nodule.

    Returns:
        The labels, and the (n, 2) float mean and largest probability of each label.
    """
    if settings.within_lung and lung is None:
        raise ValueError(
            "no lung mask; within_lung (--postprocess.within_lung) needs one"
        )
    within = lung > 0 if settings.within_lung and lung is not None else None
    if marked is None:
        inside = prob if within is None else prob[within]
        marked = prob >= threshold_of(inside, settings)
    box = boxes.bounding_box(marked)
    if box is None:
        return np.zeros(prob.shape, np.uint8), np.zeros((0, 2))
    parts = connected(marked[box], settings)
    if within is not None:
        parts[~within_lung(parts, within[box])[parts]] = 0
    if settings.one_nodule:
        parts = keep_likeliest(parts, prob[box])
    kept, scores, peaks = _kept_components(parts, prob[box], grid, settings)
    order = np.argsort(-scores[kept], kind="stable")
    renumber = np.zeros(len(scores), np.min_scalar_type(max(len(kept), 255)))
    renumber[kept[order]] = np.arange(1, len(kept) + 1)
    labels = np.zeros(prob.shape, renumber.dtype)
    labels[box] = renumber[parts]
    return labels, np.stack([scores, peaks], axis=1)[kept[order]]


def threshold_of(prob: np.ndarray, settings: config.Postprocess) -> np.float32:
    """Returns the smallest probability of a nodule voxel.

    It is float32 like the maps, so that a voxel of 0.3 reaches a threshold of 0.3.
    """
    if settings.method == "kmeans":
        return np.float32(kmeans_threshold(prob))
    return np.float32(settings.threshold)


def kmeans_threshold(prob: np.ndarray) -> float:
    """Computes the midpoint between the two K-means centres of probabilities (k = 2).

    Tries all splits of the histogram in steps of 1e-4, so it finds the optimum, which
    iterations may miss. The thesis clusters each slice, which yields clusters of noise
    in a slice without nodule; this clusters the whole scan.

    Args:
        prob: Probabilities, any shape.

    Returns:
        The threshold; infinity if all probabilities are equal.
    """
    steps_of = np.rint(prob.ravel() * np.float32(PROBABILITY_STEPS)).astype(np.int32)
    counts = np.bincount(steps_of)
    values = np.flatnonzero(counts)
    if len(values) < 2:
        return float("inf")
    number = counts[values].astype(np.float64)
    below = np.cumsum(number)[:-1]
    sum_below = np.cumsum(number * values)[:-1]
    above = number.sum() - below
    centre_low = sum_below / below
    centre_high = ((number * values).sum() - sum_below) / above
    # The smallest spread within the clusters is the largest spread between them.
    best = np.argmax(below * above * (centre_high - centre_low) ** 2)
    return float(centre_low[best] + centre_high[best]) / 2 / PROBABILITY_STEPS


def erode(mask: np.ndarray, side_px: int) -> np.ndarray:
    """Erodes each axial slice of a bool mask by a square; outside counts as empty."""
    if side_px < 2:
        return mask
    square = np.ones((side_px, side_px), np.uint8)
    eroded = [
        cv2.erode(
            image.astype(np.uint8),
            square,
            borderType=cv2.BORDER_CONSTANT,
            borderValue=(0, 0, 0, 0),
        )
        for image in mask
    ]
    return np.stack(eroded).astype(bool)


def connected(marked: np.ndarray, settings: config.Postprocess) -> np.ndarray:
    """Labels connected components after erosion and hole filling; (z, y, x) uint32.

    Args:
        marked: (z, y, x) bool, or integers, where only equal neighbours are connected.
            Integers are eroded as one mask, and only zeros in their holes are filled.
        settings: Postprocessing settings: erosion, hole filling and connectivity.
    """
    if settings.erosion_px > 1:
        marked = marked * erode(marked > 0, settings.erosion_px)
    if settings.fill_holes:
        marked = filled(marked)
    return components(marked, settings.connectivity)


def filled(marked: np.ndarray) -> np.ndarray:
    """Fills holes of a mask or labels: voxels with no path across faces to the border.

    A structure inside a hole of a bool mask becomes part of the surrounding one.
    """
    from scipy.ndimage import binary_fill_holes, find_objects

    if marked.dtype == bool:
        return np.asarray(binary_fill_holes(marked))
    result = marked.copy()
    for number, box in enumerate(find_objects(marked), start=1):
        if box is not None:
            holes = binary_fill_holes(marked[box] == number) & (result[box] == 0)
            result[box][holes] = number
    return result


def components(marked: np.ndarray, connectivity: Connectivity) -> np.ndarray:
    """Labels connected components of a mask, or of equal labels; (z, y, x) uint32."""
    import cc3d

    return cc3d.connected_components(
        marked, connectivity=connectivity, out_dtype=np.uint32
    )


def keep_likeliest(parts: np.ndarray, prob: np.ndarray) -> np.ndarray:
    """Returns the component with the largest probability sum and all above or below it.

    This keeps a nodule whole that was missed in one slice.

    Args:
        parts: (z, y, x) labels of components.
        prob: (z, y, x).

    Returns:
        (z, y, x) 0 and 1, of the type of `parts`.
    """
    sums = np.bincount(parts.ravel(), weights=prob.ravel())
    sums[0] = 0
    if not sums.any():
        return np.zeros_like(parts)
    shadow = (parts == sums.argmax()).any(axis=0)
    nodule = np.unique(parts[:, shadow])
    return np.isin(parts, nodule[nodule > 0]).astype(parts.dtype)


def within_lung(parts: np.ndarray, lung: np.ndarray) -> np.ndarray:
    """Tells which components have at least `WITHIN_SHARE` in the lungs; (labels,) bool.

    Args:
        parts: (z, y, x) labels of components; 0 is background and counts as outside.
        lung: (z, y, x) bool.
    """
    sizes = np.bincount(parts.ravel())
    inside = np.bincount(parts[lung], minlength=len(sizes))
    within = inside >= WITHIN_SHARE * sizes
    within[0] = False
    return within


def _kept_components(
    parts: np.ndarray, prob: np.ndarray, grid: Grid, settings: config.Postprocess
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns the labels to keep, and every label's mean and largest probability.

    K-means splits noise as well as nodules, so its components need one voxel that
    reaches the fixed threshold; with the other methods every voxel does.
    """
    inside = parts > 0
    owners, chances = parts[inside], prob[inside]
    sizes = np.bincount(owners, minlength=1)
    scores = np.bincount(owners, weights=chances, minlength=1) / np.maximum(sizes, 1)
    peaks = np.zeros(len(sizes), np.float32)
    np.maximum.at(peaks, owners, chances)
    stays = sizes * grid.voxel_mm3 >= settings.min_volume_mm3
    stays &= sizes >= settings.min_voxels
    stays &= scores >= settings.min_score
    stays &= (peaks >= np.float32(settings.threshold)) & (sizes > 0)
    return np.flatnonzero(stays), scores, peaks
