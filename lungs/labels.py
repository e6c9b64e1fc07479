"""Lung labels from a map of probabilities, and whether to trust them.

Labels are 1 in the right lung and 2 in the left. The checks look for what goes wrong in
practice: a part of the lungs outside of the field, a lung not found, a volume that lies
otherwise than its header says. They do not find a volume that is mirrored left to right:
the heart lies to the left in most, but too little so in some to tell.
"""

from dataclasses import dataclass

import cv2
import numpy as np

import config
from ct import boxes
from ct.scan import LEFT, RIGHT
from lungs.coarse import coarse_factors, per_slice
from lungs.sides import distance_mm, sides


@dataclass(frozen=True)
class LungMap:
    """From probabilities to lung labels."""

    thresh: float = 0.55
    """Probability above which a voxel is lung; Zhuang et al. 2025 take 0.55."""
    min_volume_mm3: float = 10_000.0
    """Smaller pieces are removed; 10 ml holds no lobe, but most gas in the gut."""
    min_share: float = 0.02
    """Pieces with a smaller share of the largest one's volume are removed: air in the gut
    or in an armpit, which holds less than a collapsed lung does."""
    max_pieces: int = 4
    """Only so many pieces are kept, the largest: two lungs, and a part of each that
    disease has cut off."""
    fill_holes: bool = True
    """Fill what lungs enclose on all sides."""
    snap: float = 1.5
    """Of networks that see voxels or pixels of one size, in those: where the classical
    mask's border is this near to the network's, the classical one counts, which follows the
    HU of the scan's own voxels. 0 for the network's border everywhere."""

    def __post_init__(self) -> None:
        thresh, volume = self.thresh, self.min_volume_mm3
        config.require(0 < thresh < 1, "thresh", thresh, "between 0 and 1")
        config.require(volume >= 0, "min_volume_mm3", volume, "0 or more")
        share = self.min_share
        config.require(0 <= share <= 1, "min_share", share, "0 to 1")
        config.require(self.max_pieces >= 1, "max_pieces", self.max_pieces, "1 or more")
        config.require(self.snap >= 0, "snap", self.snap, "0 or more")


def labels_from_map(
    prob: np.ndarray,
    spacing_mm: tuple[float, float, float],
    settings: LungMap,
    *,
    middle_x: float | None = None,
) -> np.ndarray:
    """Lung labels from a map of probabilities.

    Args:
        prob: (z, y, x) float32 probability of lung, in canonical orientation.
        spacing_mm: (z, y, x).
        settings: Threshold, and which pieces are kept.
        middle_x: Column of the body's middle, see `lung_mask.body_middle_x`; by default
            that of the volume.

    Returns:
        (z, y, x) uint8: 0 outside, 1 right, 2 left; all 0 if nothing is large enough.
    """
    labels = np.zeros(prob.shape, np.uint8)
    mask = prob > np.float32(settings.thresh)
    box = boxes.around(mask, 2)
    if box is None:
        return labels
    least = settings.min_volume_mm3 / float(np.prod(spacing_mm))
    kept = largest_pieces(
        mask[box], least, settings.max_pieces, share=settings.min_share
    )
    if not kept.any():
        return labels
    if settings.fill_holes:
        kept |= holes(kept)
    if middle_x is None:
        middle_x = (prob.shape[2] - 1) / 2
    labels[box] = kept * side_of(kept, spacing_mm, middle_x - box[2].start)
    return labels


def snapped(
    labels: np.ndarray,
    classical: np.ndarray,
    spacing_mm: tuple[float, float, float],
    reach_mm: float,
) -> np.ndarray:
    """Lung labels whose border is that of others wherever it lies near.

    Where lung looks like lung both masks agree on it, and there the classical one follows
    the HU of single voxels. What only the first mask has (disease, of which the classical
    one knows nothing) keeps its own border where the classical mask is further away than
    `reach_mm`; so of a layer thinner than that nothing is kept, and of other disease a strip
    of its outer border is lost beside healthy lung.

    Args:
        labels: (z, y, x) uint8, 1 right and 2 left.
        classical: The same, with the better border; nothing changes if it is empty.
        spacing_mm: (z, y, x).
        reach_mm: A voxel within this of the mask's outside is its border, and follows the
            classical mask if that is as near.

    Returns:
        Labels of the same shape; voxels that were added have the side of the nearest lung.
    """
    margin = [int(reach_mm / step) + 2 for step in spacing_mm]
    box = boxes.around(labels, margin)
    if box is None or not classical.any():
        return labels
    mask, other = labels[box] > 0, classical[box] > 0
    border = distance_mm(mask, spacing_mm) <= reach_mm
    near_other = distance_mm(~other, spacing_mm) <= reach_mm
    to_right_mm, to_left_mm = (
        distance_mm(labels[box] != side, spacing_mm)
        if (labels[box] == side).any()
        else np.full(mask.shape, np.inf, np.float32)
        for side in (RIGHT, LEFT)
    )
    near_mask = np.minimum(to_right_mm, to_left_mm) <= reach_mm
    found = (mask & ~(border & near_other)) | (other & near_mask)
    result = np.zeros_like(labels)
    result[box] = found * np.where(to_right_mm <= to_left_mm, RIGHT, LEFT)
    return result


def largest_pieces(
    mask: np.ndarray, least: float, most: int, *, share: float = 0.0
) -> np.ndarray:
    """The largest connected pieces of a mask, at most `most`.

    Each has `least` voxels or more, and at least `share` of those of the largest.
    """
    import cc3d

    parts = cc3d.connected_components(mask, connectivity=6)
    counts = np.bincount(parts.ravel())
    counts[0] = 0
    order = np.argsort(-counts, kind="stable")[:most]
    keep = np.zeros(len(counts), bool)
    least = max(least, share * counts.max(), 1)
    keep[order] = counts[order] >= least
    return keep[parts]


def holes(mask: np.ndarray) -> np.ndarray:
    """What a mask encloses on all sides; what is open at an end of the volume is no hole."""
    import cc3d

    outside = np.pad(~mask, 1, constant_values=True)
    parts = cc3d.connected_components(outside, connectivity=6)
    enclosed = (parts > 0) & (parts != parts[0, 0, 0])
    return enclosed[1:-1, 1:-1, 1:-1]


def side_of(
    lungs: np.ndarray, spacing_mm: tuple[float, float, float], middle_x: float
) -> np.ndarray:
    """The side each voxel belongs to, inside the lungs and out: that of the nearer lung.

    Found on a coarse grid, where it takes a fraction of a second.

    Args:
        lungs: (z, y, x) bool, not empty.
        spacing_mm: (z, y, x).
        middle_x: Column of the body's middle.

    Returns:
        (z, y, x) uint8, 1 or 2.
    """
    factors = coarse_factors(spacing_mm)
    coarse = lungs[tuple(slice(None, None, f) for f in factors)]
    coarse_mm = tuple(s * f for s, f in zip(spacing_mm, factors, strict=True))
    if not coarse.any():  # lungs thinner than a coarse voxel
        coarse, coarse_mm, factors = lungs, spacing_mm, (1, 1, 1)
    named = sides(coarse, coarse_mm, middle_x / factors[2])
    to_right_mm, to_left_mm = (
        distance_mm(named != side, coarse_mm)
        if (named == side).any()
        else np.full(named.shape, np.inf, np.float32)
        for side in (RIGHT, LEFT)
    )
    side = np.where(to_right_mm <= to_left_mm, RIGHT, LEFT).astype(np.uint8)
    for axis, factor in enumerate(factors):
        side = np.repeat(side, factor, axis=axis)
    z, y, x = lungs.shape
    return side[:z, :y, :x]


def border(mask: np.ndarray) -> np.ndarray:
    """The voxels of a mask that have others beside them in their slice."""
    cross = cv2.getStructuringElement(cv2.MORPH_CROSS, (3, 3))
    inner = per_slice(lambda image: cv2.erode(image, cross), mask.view(np.uint8))
    return mask & (inner == 0)
