"""The thesis' slice rule: K-means on the middle of a slice, then morphology."""

from collections.abc import Callable

import cv2
import numpy as np

SLICE_RULE_PX = 512
"""Slice size for which the thesis gives the pixel constants of its rule."""

MIDDLE = slice(100, 400)
"""Rows and columns that K-means uses."""

ERODE_PX, DILATE_PX = 4, 10
"""Sides of the square structuring elements."""

REGION_SIDE_PX, REGION_TOP_PX, REGION_BOTTOM_PX = 475, 40, 472
"""Limits of a lung region's box: largest side, first top row and last bottom row."""


def kmeans_threshold_hu(values_hu: np.ndarray) -> float:
    """Computes the threshold halfway between the two centres of K-means (k = 2).

    In one dimension the best two clusters are split at one value, so all splits of the
    histogram are tried and the optimum is exact; Lloyd's iterations, which scikit-learn
    runs, may end in a local optimum.

    Args:
        values_hu: Integer HU, any shape.

    Returns:
        The threshold in HU; if all values are equal, that value.
    """
    low = int(values_hu.min())
    counts = np.bincount(values_hu.ravel().astype(np.int32) - low).astype(np.float64)
    sums = counts * np.arange(len(counts))
    below, sum_below = np.cumsum(counts)[:-1], np.cumsum(sums)[:-1]
    above, sum_above = counts.sum() - below, sums.sum() - sum_below
    if not len(below):
        return float(low)
    between = below * above * (sum_below / below - sum_above / above) ** 2
    cut = int(np.argmax(between))
    return low + (sum_below[cut] / below[cut] + sum_above[cut] / above[cut]) / 2


def without_extremes(image_hu: np.ndarray) -> np.ndarray:
    """Replaces minimum and maximum of a (y, x) slice by the mean of its middle.

    Otherwise padding or metal would attract a cluster. Padding becomes tissue.
    """
    extreme = (image_hu == image_hu.min()) | (image_hu == image_hu.max())
    return np.where(extreme, np.int16(middle_of(image_hu).mean()), image_hu)


def middle_of(image: np.ndarray) -> np.ndarray:
    """Returns the part of a (y, x) slice that K-means uses."""
    rows, columns = (
        slice(
            round(MIDDLE.start * length / SLICE_RULE_PX),
            round(MIDDLE.stop * length / SLICE_RULE_PX),
        )
        for length in image.shape
    )
    return image[rows, columns]


def slice_threshold(image_hu: np.ndarray) -> float:
    """Computes the slice rule's threshold: K-means on the middle of an int16 slice."""
    return kmeans_threshold_hu(middle_of(without_extremes(image_hu)))


def slice_rule(image_hu: np.ndarray) -> np.ndarray:
    """Computes the thesis' lung mask of one slice.

    Steps: K-means threshold, erosion 4x4, dilation 10x10, region rules, dilation 10x10.
    The constants are those of the thesis for 512x512 pixels and scale with the slice.

    Args:
        image_hu: (y, x) int16.

    Returns:
        (y, x) bool.
    """
    scale = image_hu.shape[0] / SLICE_RULE_PX
    image_hu = without_extremes(image_hu)
    threshold = kmeans_threshold_hu(middle_of(image_hu))
    air = (image_hu < threshold).astype(np.uint8)
    opened = by_square(cv2.erode, air, ERODE_PX * scale)
    opened = by_square(cv2.dilate, opened, DILATE_PX * scale)
    _, labels, stats, _ = cv2.connectedComponentsWithStats(opened, connectivity=8)
    top, width, height = (
        stats[:, column]
        for column in (cv2.CC_STAT_TOP, cv2.CC_STAT_WIDTH, cv2.CC_STAT_HEIGHT)
    )
    keep = (
        (np.maximum(width, height) < REGION_SIDE_PX * scale)
        & (top > REGION_TOP_PX * scale)
        & (top + height < REGION_BOTTOM_PX * scale)
    )
    keep[0] = False
    kept = keep[labels].astype(np.uint8)
    return by_square(cv2.dilate, kept, DILATE_PX * scale).astype(bool)


def by_square(
    operation: Callable[..., np.ndarray], image: np.ndarray, side_px: float
) -> np.ndarray:
    """Erodes or dilates by a square of at least one pixel.

    A square of even side has no middle pixel. Its anchor is that of scikit-image, which
    the thesis used, one pixel before OpenCV's default.
    """
    side = max(round(side_px), 1)
    anchor = (side - 1) // 2
    return operation(image, np.ones((side, side), np.uint8), anchor=(anchor, anchor))
