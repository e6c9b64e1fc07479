"""Lung labels from a probability map: 1 in the right lung, 2 in the left."""

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
    """Settings that turn a probability map into lung labels."""

    thresh: float = 0.55
    """Probability above which a voxel is lung; 0.55 as in Zhuang et al. 2025."""
    min_volume_mm3: float = 10_000.0
    """Smallest connected component that is kept; 10 ml is less than a lobe, but more
    than most gas in the gut."""
    min_share: float = 0.02
    """Smallest component that is kept, as a share of the largest one's volume. This
    removes air in the gut or in an armpit, which holds less than a collapsed lung."""
    max_pieces: int = 4
    """Number of components that are kept, the largest first: two lungs, and a part of
    each that disease has cut off."""
    fill_holes: bool = True
    """Fill holes that the lungs enclose on all sides."""
    anatomy: bool = True
    """Leave out gas of the gut and air outside the body, see lungs/anatomy.py. If False,
    they stay in the mask, which is flagged, and no nodules are searched in them."""
    snap: float = 1.5
    """Distance within which the border of the classical mask replaces the network's,
    since it follows the HU of the scan's own voxels; in voxels or pixels of the
    network. No effect on networks without a fixed voxel size; 0 keeps the network's
    border everywhere."""

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
    """Computes lung labels from a probability map.

    Args:
        prob: (z, y, x) float32 probability of lung, in canonical orientation.
        spacing_mm: (z, y, x).
        settings: Threshold, and rules for the components that are kept.
        middle_x: Column of the body's middle, see `sides.body_middle_x`; by default
            that of the volume.

    Returns:
        (z, y, x) uint8: 0 outside, 1 right, 2 left; all 0 if nothing is large enough.
    """
    labels = np.zeros(prob.shape, np.uint8)
    mask = prob > np.float32(settings.thresh)
    box = boxes.bounding_box(mask, 2)
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


def snap_to_classical(
    labels: np.ndarray,
    classical: np.ndarray,
    spacing_mm: tuple[float, float, float],
    reach_mm: float,
) -> np.ndarray:
    """Moves the border of lung labels to that of the classical mask where it is near.

    Both masks agree on healthy lung, and there the classical one follows the HU of single
    voxels. A part that only the network finds, such as a nodule or consolidation at the
    pleura, which the classical mask misses, stays if it is thicker than `reach_mm`; thinner
    layers follow the classical mask.

    Args:
        labels: (z, y, x) uint8, 1 right and 2 left.
        classical: Classical labels of the same shape; if empty, nothing changes.
        spacing_mm: (z, y, x).
        reach_mm: Voxels this close to the outside of the mask are its border; they
            follow the classical mask if its outside is that near too, unless they belong to
            a thicker part that only the network finds.

    Returns:
        Labels of the same shape; added voxels get the side of the nearest lung.
    """
    margin = [int(reach_mm / step) + 2 for step in spacing_mm]
    box = boxes.bounding_box(labels, margin)
    if box is None or not classical.any():
        return labels
    mask, other = labels[box] > 0, classical[box] > 0
    border = distance_mm(mask, spacing_mm) <= reach_mm
    near_other = distance_mm(~other, spacing_mm) <= reach_mm
    to_mask_mm = distance_mm(~mask, spacing_mm)
    right = labels[box] == RIGHT
    to_right_mm = distance_mm(~right, spacing_mm) if right.any() else np.inf
    near_mask = to_mask_mm <= reach_mm
    thin = border & near_other & ~thick_parts(mask & ~other, spacing_mm, reach_mm)
    found = (mask & ~thin) | (other & near_mask)
    result = np.zeros_like(labels)
    result[box] = found * np.where(to_right_mm <= to_mask_mm, RIGHT, LEFT)
    return result


def thick_parts(
    mask: np.ndarray, spacing_mm: tuple[float, float, float], thickness_mm: float
) -> np.ndarray:
    """Returns the parts of a (z, y, x) mask that hold a ball of diameter `thickness_mm`.

    This is the morphological opening of the mask, with corners kept up to a voxel.
    """
    radius_mm = thickness_mm / 2
    cores = distance_mm(mask, spacing_mm) > radius_mm
    if not cores.any():
        return cores
    return mask & (distance_mm(~cores, spacing_mm) <= radius_mm + min(spacing_mm))


def largest_pieces(
    mask: np.ndarray, least: float, most: int, *, share: float = 0.0
) -> np.ndarray:
    """Returns the largest connected components of a mask, at most `most`.

    Each has at least `least` voxels, and at least `share` of the largest one's voxels.
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
    """Returns the holes of a mask; one open at an end of the volume does not count."""
    import cc3d

    outside = np.pad(~mask, 1, constant_values=True)
    parts = cc3d.connected_components(outside, connectivity=6)
    enclosed = (parts > 0) & (parts != parts[0, 0, 0])
    return enclosed[1:-1, 1:-1, 1:-1]


def side_of(
    lungs: np.ndarray, spacing_mm: tuple[float, float, float], middle_x: float
) -> np.ndarray:
    """Returns the side of the nearer lung for each voxel, inside and outside the lungs.

    Works on a coarse grid, where this takes a fraction of a second.

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
    """Returns the voxels of a mask with a neighbour outside it in the same slice."""
    cross = cv2.getStructuringElement(cv2.MORPH_CROSS, (3, 3))
    inner = per_slice(lambda image: cv2.erode(image, cross), mask.view(np.uint8))
    return mask & (inner == 0)
