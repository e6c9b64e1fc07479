"""Separation of a mask into right and left lung, even where they touch."""

from math import ceil
from typing import Any

import cv2
import numpy as np

from ct.scan import LEFT, RIGHT
from lungs.coarse import per_slice

TISSUE_HU = -300.0
"""Lower limit of HU in tissue, for finding the body's middle."""

CLEAR_SHARE, CORE_SHARE = 0.9, 0.98
"""Share of a connected component that must lie on one side to give it that side: the
first if both lungs are seen, the second if one is missing or the cores are searched
for."""

PLANE_REACH_MM = 60.0
"""Largest distance of the mediastinum from the body's middle."""

PLANE_FAR_MM = 150.0
"""Cost of the plane's distance from the middle: 1.5 mm cost as much as cutting 1 % of
the largest sagittal section of lung."""

PLANE_TURNS = tuple(np.arange(-7, 8) / 10)
"""Tangents of the angles by which patients may be rotated: up to 35 degrees."""

PLANE_WIDTH_MM = 10.0
"""Thickness of the slab in which the plane's cut through the lungs is measured."""

CORE_MM = 4.0
"""Voxel size for finding the cores of touching lungs; it can be a little larger."""

PULL_MM = 15.0
"""Largest distance from the middle plane that counts. A voxel goes to the core on its
own side unless the other core is nearer by more than twice its distance from the
plane."""

PIECE_SHARE = 0.95
"""Share of a piece of a slice that must lie on one side to give all of it that side."""

WIDE_CUT = 1.5
"""Largest ratio of the area of a cut to (volume of the smaller piece)^(2/3). Halves of
a ball have 1.9; lungs that were made to touch along the whole mediastinum have up to
1.0."""


def sides(
    lungs: np.ndarray,
    spacing_mm: tuple[float, ...],
    middle_x: float | None = None,
) -> np.ndarray:
    """Labels the right (1) and left (2) lung of a coarse mask, even where they touch.

    A connected component on one side of the middle plane gets that side. In one that
    lies on both, erosion finds the core of each lung; the other voxels go to the nearer
    core, in doubt to their own side of the plane. A component that would be cut through
    the thick of a lung stays whole and gets the side on which most of it lies.

    Args:
        lungs: (z, y, x) bool, not empty.
        spacing_mm: (z, y, x).
        middle_x: Approximate column of the body's middle; by default the volume's.

    Returns:
        (z, y, x) uint8.
    """
    import cc3d

    default_x = (lungs.shape[2] - 1) / 2
    right_mm = middle_plane_mm(
        lungs, spacing_mm, default_x if middle_x is None else middle_x
    )
    parts = cc3d.connected_components(lungs, connectivity=6)
    labels = sides_of_parts(parts, right_mm >= 0, CLEAR_SHARE)[parts]
    in_right, in_left = np.bincount(labels.ravel(), minlength=3)[1:]
    if min(in_right, in_left) < (1 - CORE_SHARE) * max(in_right, in_left):
        # The lung that seems to be missing may be connected to the other one.
        labels = sides_of_parts(parts, right_mm >= 0, CORE_SHARE)[parts]
    open_parts = lungs & (labels == 0)
    if not open_parts.any():
        return labels
    cores = np.maximum(labels, lung_cores(open_parts, right_mm >= 0, spacing_mm))
    in_right, in_left = np.bincount(cores.ravel(), minlength=3)[1:]
    if not (in_right and in_left):
        if not (in_right or in_left):
            in_right, in_left = (
                lungs[:, s].sum() for s in (right_mm >= 0, right_mm < 0)
            )
        return lungs * np.uint8(RIGHT if in_right >= in_left else LEFT)
    to_right_mm, to_left_mm = (
        distance_mm(cores != side, spacing_mm) for side in (RIGHT, LEFT)
    )
    pull_mm = 2 * np.clip(right_mm, -PULL_MM, PULL_MM)
    nearer = np.where(to_right_mm <= to_left_mm + pull_mm, RIGHT, LEFT)
    labels[open_parts] = nearer[open_parts]
    return without_wide_cuts(per_slice(cut_at_necks, labels), parts, spacing_mm)


def middle_plane_mm(
    lungs: np.ndarray, spacing_mm: tuple[float, ...], middle_x: float
) -> np.ndarray:
    """Returns how far voxel columns lie to the right of the plane between the lungs.

    Among the upright planes near the body's middle, rotated as far as patients may be,
    it chooses the one that cuts the least lung, and so follows a mediastinum that is
    pushed or pulled aside.

    Returns:
        (y, x) float64 in mm, negative to the left.
    """
    thickness = lungs.sum(axis=0).astype(np.float64)
    rows = np.flatnonzero(thickness.any(axis=1))
    y, x = np.ogrid[: thickness.shape[0], : thickness.shape[1]]
    y_mm = (y - (rows[0] + rows[-1]) / 2) * spacing_mm[1]
    x_mm = (x - middle_x) * spacing_mm[2]
    reach = ceil(PLANE_REACH_MM / spacing_mm[2])
    offsets_mm = np.arange(-reach, reach + 1) * spacing_mm[2]
    width = 2 * round(PLANE_WIDTH_MM / spacing_mm[2] / 2) + 1
    least, best_mm = np.inf, -x_mm + 0 * y_mm
    for turn in PLANE_TURNS:
        left_mm = (x_mm - turn * y_mm) / np.hypot(1, turn)
        column = np.rint(left_mm / spacing_mm[2]).astype(int) + reach
        near = (column >= 0) & (column <= 2 * reach)
        cut = np.bincount(column[near], thickness[near], minlength=2 * reach + 1)
        cut = np.convolve(cut, np.full(width, 1 / width), mode="same")
        cost = cut / thickness.sum(axis=0).max()
        cost += np.abs(offsets_mm) / PLANE_FAR_MM + abs(turn) / 10
        if cost.min() < least:
            least = cost.min()
            best_mm = offsets_mm[cost.argmin()] - left_mm
    return best_mm


def sides_of_parts(parts: np.ndarray, right: np.ndarray, share: float) -> np.ndarray:
    """Returns the side on which at least `share` of each component lies, 0 for neither.

    Args:
        parts: (z, y, x) labels of connected components.
        right: (y, x) bool, the columns of voxels to the right.
        share: Share of the component's voxels, above one half.

    Returns:
        (labels,) uint8, indexed by label.
    """
    voxels = np.bincount(parts.ravel())
    in_right = np.bincount(parts[:, right].ravel(), minlength=len(voxels))
    named = np.zeros(len(voxels), np.uint8)
    named[in_right >= share * voxels] = RIGHT
    named[in_right <= (1 - share) * voxels] = LEFT
    named[0] = 0
    return named


def lung_cores(
    mask: np.ndarray, right: np.ndarray, spacing_mm: tuple[float, ...]
) -> np.ndarray:
    """Erodes a mask until each of its pieces lies on one side, and labels these cores.

    A piece that lies on one side is not eroded further.

    Args:
        mask: (z, y, x) bool.
        right: (y, x) bool, the columns of voxels to the right.
        spacing_mm: (z, y, x).

    Returns:
        (z, y, x) uint8: 0, 1 right or 2 left.
    """
    import cc3d

    factors = [max(ceil(CORE_MM / spacing - 0.1), 1) for spacing in spacing_mm]
    small = mask[tuple(slice(None, None, factor) for factor in factors)]
    small_right = right[:: factors[1], :: factors[2]]
    small_mm = tuple(s * f for s, f in zip(spacing_mm, factors, strict=True))
    inner_mm = distance_mm(small, small_mm)
    cores = np.zeros(small.shape, np.uint8)
    depth_mm = 0.0
    while small.any():
        pieces = cc3d.connected_components(small, connectivity=6)
        found = sides_of_parts(pieces, small_right, CORE_SHARE)[pieces]
        cores = np.maximum(cores, found)
        depth_mm += CORE_MM / 2
        small = small & (found == 0) & (inner_mm > depth_mm)
    for axis, factor in enumerate(factors):
        cores = np.repeat(cores, factor, axis=axis)
    z, y, x = mask.shape
    return cores[:z, :y, :x] * mask


def cut_at_necks(labels: np.ndarray) -> np.ndarray:
    """Moves the cut in the labels of a (y, x) slice to where the lungs hardly touch.

    Pieces that are separate, or separate once they are eroded by a voxel, get the side
    on which nearly all of each piece lies.
    """
    mask: Any = (labels > 0).astype(np.uint8)
    in_right = labels == RIGHT
    if not in_right.any() or not (labels == LEFT).any():
        return labels
    cross = cv2.getStructuringElement(cv2.MORPH_CROSS, (3, 3))
    result = labels.copy()
    for smaller in (cv2.erode(mask, cross), mask):
        found: Any = cv2.connectedComponents(smaller, connectivity=4)
        count, pieces = found
        rights = np.bincount(pieces[in_right], minlength=count)
        share = rights / np.bincount(pieces.ravel(), minlength=count)
        share[0] = 0.5
        for side, of_side in (
            (RIGHT, share >= PIECE_SHARE),
            (LEFT, share <= 1 - PIECE_SHARE),
        ):
            piece = of_side[pieces].astype(np.uint8)
            if smaller is not mask:
                piece = cv2.dilate(piece, cross) & mask
            result[piece > 0] = side
    return result


def without_wide_cuts(
    labels: np.ndarray, parts: np.ndarray, spacing_mm: tuple[float, ...]
) -> np.ndarray:
    """Undoes cuts that are about as wide as the piece they cut off; see `WIDE_CUT`."""
    in_right, in_left = (
        np.bincount(parts[labels == side], minlength=int(parts.max()) + 1)
        for side in (RIGHT, LEFT)
    )
    for part in np.flatnonzero(np.minimum(in_right, in_left)):
        within = parts == part
        less_mm3 = min(in_right[part], in_left[part]) * np.prod(spacing_mm)
        if cut_mm2(labels * within, spacing_mm) > WIDE_CUT * less_mm3 ** (2 / 3):
            labels[within] = RIGHT if in_right[part] >= in_left[part] else LEFT
    return labels


def cut_mm2(labels: np.ndarray, spacing_mm: tuple[float, ...]) -> float:
    """Returns the area of the faces between right and left voxels."""
    area_mm2 = 0.0
    for axis, spacing in enumerate(spacing_mm):
        along = np.moveaxis(labels, axis, 0)
        faces = np.count_nonzero(along[1:] * along[:-1] == RIGHT * LEFT)
        area_mm2 += faces * float(np.prod(spacing_mm)) / spacing
    return area_mm2


def body_middle_x(hu: np.ndarray) -> float:
    """Finds the column with equal tissue on both sides; without tissue, the middle."""
    tissue = (hu[::4, ::4] > TISSUE_HU).sum(axis=(0, 1)).astype(np.float64)
    total = np.cumsum(tissue)
    if not total[-1]:
        return (hu.shape[2] - 1) / 2
    return float(np.interp(total[-1] / 2, total, np.arange(len(total)) + 0.5))


def distance_mm(mask: np.ndarray, spacing_mm: tuple[float, ...]) -> np.ndarray:
    """Computes the distance in mm of each mask voxel to the nearest one outside.

    The ends of the volume do not count as outside.
    """
    import edt

    return edt.edt(
        np.ascontiguousarray(mask),
        anisotropy=spacing_mm,
        black_border=False,
        parallel=2,
    )
