"""Lung masks from HU: the thesis' slice rule, and the same threshold cleaned in 3-D.

The slice rule separates air from tissue by K-means on the middle of each slice and keeps
regions by size and place. It takes in trachea and gut, and leaves nodules at the pleura
out. The cleaning keeps only its threshold, and finds body, airway, sides and pleural
concavities on a coarse grid, where a whole scan takes a second; borders are then drawn at
full resolution.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from math import ceil
from typing import Any

import cv2
import numpy as np

import config
from ct import boxes
from ct.boxes import Box
from ct.scan import LEFT, RIGHT

SLICE_RULE_PX = 512
"""Slice size for which the pixel constants of the thesis' rule were given."""
MIDDLE = slice(100, 400)
"""Rows and columns that K-means looks at."""
ERODE_PX, DILATE_PX = 4, 10
"""Sides of the square structuring elements."""
REGION_SIDE_PX, REGION_TOP_PX, REGION_BOTTOM_PX = 475, 40, 472
"""A region is lung if its box is smaller, begins lower and ends higher than these."""

COARSE_MM = 2.0
"""Voxel size of the grid on which anatomy is found, or a little more."""
THRESHOLD_HU = (-600.0, -300.0)
"""Range of thresholds between lung and tissue that is believed."""
LUNG_ML = 60.0
"""Smaller pockets of air are no lung."""
GAS_HU = -940.0
"""A pocket under a litre whose median is lower is gas in the gut, not lung."""
AIRWAY_HU = -900.0
"""The lumen of trachea and main bronchi is darker than this."""
AIRWAY_MM2 = (60.0, 900.0)
"""Area of the trachea in a slice; the widest is about 30 mm across."""
AIRWAY_LENGTH_MM = 30.0
"""A path that ends sooner was no trachea."""
AIRWAY_WALL_MM = 2.0
"""Thickness of the wall that is taken out with the lumen."""
TISSUE_HU = -300.0
"""Tissue is denser, where the body's middle is looked for."""
CLEAR_SHARE, CORE_SHARE = 0.9, 0.98
"""A connected part belongs to the side on which so much of it lies: where both lungs are
seen, and where one is missing or a core is looked for."""
PLANE_REACH_MM = 60.0
"""How far the mediastinum may be from the body's middle."""
PLANE_FAR_MM = 150.0
"""The plane goes 1.5 mm further from the middle to cut 1 % of a lung's width less."""
PLANE_TURNS = tuple(np.arange(-7, 8) / 10)
"""Tangents of the angles by which patients may be turned: up to 35 degrees."""
PLANE_WIDTH_MM = 10.0
"""Thickness of the slab in which the plane's cut through the lungs is measured."""
CORE_MM = 4.0
"""Voxel size, or a little more, on which the cores of touching lungs are found."""
PULL_MM = 15.0
"""How much nearer a voxel may be to the core of the other lung because of its own side."""
PIECE_SHARE = 0.95
"""Most of a piece of a slice that is not cut."""
WIDE_CUT = 1.5
"""Area of a cut over (volume of the lesser piece)^(2/3). Halves of a ball have 1.9; lungs
that were made to touch along the whole mediastinum have up to 1.0."""


def kmeans_threshold_hu(values_hu: np.ndarray) -> float:
    """Threshold halfway between the two centres of K-means (k = 2).

    In one dimension the best two clusters are cut at one value, so all cuts of the
    histogram are tried and the optimum is exact; Lloyd's iterations, which scikit-learn
    runs, can only reach it or a local optimum.

    Args:
        values_hu: Integer HU, any shape.

    Returns:
        HU; the only value if all are equal.
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
    """A (y, x) slice whose least and greatest values became the mean of its middle.

    So padding and metal draw no cluster to themselves; padding becomes tissue.
    """
    extreme = (image_hu == image_hu.min()) | (image_hu == image_hu.max())
    return np.where(extreme, np.int16(middle_of(image_hu).mean()), image_hu)


def middle_of(image: np.ndarray) -> np.ndarray:
    """The part of a (y, x) slice that K-means looks at."""
    rows, columns = (
        slice(
            round(MIDDLE.start * length / SLICE_RULE_PX),
            round(MIDDLE.stop * length / SLICE_RULE_PX),
        )
        for length in image.shape
    )
    return image[rows, columns]


def slice_threshold(image_hu: np.ndarray) -> float:
    """The slice rule's threshold: K-means on the middle of a (y, x) int16 slice."""
    return kmeans_threshold_hu(middle_of(without_extremes(image_hu)))


def slice_rule(image_hu: np.ndarray) -> np.ndarray:
    """The thesis' lung mask of one slice.

    K-means threshold, erosion 4x4, dilation 10x10, region rules, dilation 10x10. The
    constants are those of the thesis for 512x512 pixels and scale with the slice.

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

    A square of even side has no middle; its anchor is where scikit-image, which the thesis
    used, has it, one pixel before OpenCV's own.
    """
    side = max(round(side_px), 1)
    anchor = (side - 1) // 2
    return operation(image, np.ones((side, side), np.uint8), anchor=(anchor, anchor))


def segment_lungs(
    hu: np.ndarray,
    spacing_mm: tuple[float, float, float],
    settings: config.LungMask,
) -> np.ndarray:
    """Lung labels of a scan.

    Args:
        hu: (z, y, x) int16 in canonical orientation.
        spacing_mm: (z, y, x).
        settings: With `cleaning` off, the slice rule alone, labelled 1.

    Returns:
        (z, y, x) uint8: 0 outside, 1 right lung, 2 left lung; all 0 if none was found.
    """
    if not settings.cleaning:
        return per_slice(slice_rule, hu).astype(np.uint8)
    thresholds = per_slice(lambda image: np.float64(slice_threshold(image)), hu[::4])
    threshold = float(np.clip(np.median(thresholds), *THRESHOLD_HU))
    factors = coarse_factors(spacing_mm)
    coarse = shrink(hu, factors)
    coarse_mm = tuple(s * f for s, f in zip(spacing_mm, factors, strict=True))
    lungs = inner_air(coarse, threshold, coarse_mm)
    tubes = np.zeros(lungs.shape, bool)
    if settings.remove_airway:
        tubes = airway(coarse, lungs, coarse_mm)
        lungs = large_parts(lungs & ~tubes, coarse_mm)
    box = box_with_air(lungs, 2 * settings.closing_mm, coarse_mm)
    if box is None:
        return np.zeros(hu.shape, np.uint8)
    filled = np.zeros(lungs.shape, np.uint8)
    filled[box] = fill_lungs(
        sides(lungs[box], coarse_mm, body_middle_x(coarse) - box[2].start)
        if settings.split_sides
        else lungs[box].astype(np.uint8),
        coarse_mm,
        settings,
    )
    filled[tubes] = 0
    return refine(hu, filled, lungs, tubes, threshold, factors, settings)


def per_slice(function: Callable[..., Any], *volumes: np.ndarray) -> np.ndarray:
    """Stacks `function` of every slice; OpenCV and NumPy leave the threads free to run."""
    with ThreadPoolExecutor() as threads:
        return np.stack(list(threads.map(function, *volumes)))


def coarse_factors(spacing_mm: tuple[float, float, float]) -> tuple[int, int, int]:
    """How many voxels make one coarse voxel along each axis."""
    z, y, x = (max(ceil(COARSE_MM / spacing - 0.1), 1) for spacing in spacing_mm)
    return z, y, x


def shrink(hu: np.ndarray, factors: tuple[int, int, int]) -> np.ndarray:
    """(z, y, x) float32 means over blocks; the last slice of an odd depth stands alone."""
    size = (-(-hu.shape[2] // factors[2]), -(-hu.shape[1] // factors[1]))

    def smaller(image: np.ndarray) -> np.ndarray:
        return cv2.resize(image.astype(np.float32), size, interpolation=cv2.INTER_AREA)

    planes = per_slice(smaller, hu)
    starts = np.arange(0, len(planes), factors[0])
    sums = np.add.reduceat(planes, starts, axis=0)
    counts = np.diff(np.append(starts, len(planes)))
    return sums / counts[:, None, None].astype(np.float32)


def inner_air(
    coarse: np.ndarray, threshold: float, spacing_mm: tuple[float, ...]
) -> np.ndarray:
    """Large pockets of air inside the body, gut excepted; (z, y, x) bool."""
    import cc3d

    tissue = coarse >= threshold
    # Eroded, the body lets go of the table; what is then not body is air, also a hollow
    # table. A rim of air in each slice joins what the table cuts off from the outside;
    # the ends in z stay closed, since lungs may be cut there.
    cross = cv2.getStructuringElement(cv2.MORPH_CROSS, (3, 3))
    eroded = per_slice(lambda image: cv2.erode(image, cross), tissue.astype(np.uint8))
    body = largest(cc3d.connected_components(eroded, connectivity=6))
    body = per_slice(lambda image: cv2.dilate(image, cross), body.astype(np.uint8))
    air = np.pad(body & tissue, ((0, 0), (1, 1), (1, 1))) == 0
    labels = cc3d.connected_components(air, connectivity=6)
    labels = np.where(labels == labels[0, 0, 0], 0, labels)[:, 1:-1, 1:-1]
    labels = np.where(tissue, 0, labels)
    return lung_like(labels, coarse, spacing_mm)


def largest(labels: np.ndarray) -> np.ndarray:
    """The largest component of a label volume, as a mask; empty if there is none."""
    counts = np.bincount(labels.ravel())
    counts[0] = 0
    return (labels == counts.argmax()) & (labels > 0)


def lung_like(
    labels: np.ndarray, coarse: np.ndarray, spacing_mm: tuple[float, ...]
) -> np.ndarray:
    """Components that are large enough for a lung and not as empty as gas."""
    counts = np.bincount(labels.ravel())
    volumes_ml = counts * np.prod(spacing_mm) / 1000
    keep = volumes_ml >= LUNG_ML
    keep[0] = False
    for label in np.flatnonzero(keep & (volumes_ml < 1000)):
        keep[label] = np.median(coarse[labels == label]) > GAS_HU
    return keep[labels]


def large_parts(mask: np.ndarray, spacing_mm: tuple[float, ...]) -> np.ndarray:
    """The connected parts of a mask that are large enough for a lung."""
    import cc3d

    labels = cc3d.connected_components(mask, connectivity=6)
    keep = np.bincount(labels.ravel()) * np.prod(spacing_mm) / 1000 >= LUNG_ML
    keep[0] = False
    return keep[labels]


def airway(
    coarse: np.ndarray, inside: np.ndarray, spacing_mm: tuple[float, ...]
) -> np.ndarray:
    """Trachea and main bronchi with their walls, followed down slice by slice.

    The search starts at the highest slice with a dark, round, central region, and follows
    what overlaps it in the next slice until that grows as it would in a lung. A path too
    short for a trachea is dropped and the search begins again below.

    Returns:
        (z, y, x) bool.
    """
    lumen = ((coarse < AIRWAY_HU) & inside).astype(np.uint8)
    found = np.zeros(inside.shape, np.uint8)
    top = len(coarse) - 1
    while top >= 0:
        end = follow(lumen, found, top, spacing_mm)
        if (top - end) * spacing_mm[0] >= AIRWAY_LENGTH_MM:
            break
        found[:] = 0
        top = min(top, end) - 1
    reach = [2 * round(AIRWAY_WALL_MM / s) + 1 for s in spacing_mm[1:]]
    wall = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (reach[1], reach[0]))
    return per_slice(lambda image: cv2.dilate(image, wall), found).astype(bool)


def follow(
    lumen: np.ndarray, found: np.ndarray, top: int, spacing_mm: tuple[float, ...]
) -> int:
    """Marks in `found` the airway that begins in slice `top`; where it ends."""
    previous = None
    for z in range(top, -1, -1):
        _, labels, stats, centres = cv2.connectedComponentsWithStats(
            lumen[z], connectivity=4
        )
        areas_mm2 = stats[:, cv2.CC_STAT_AREA] * spacing_mm[1] * spacing_mm[2]
        if previous is None:
            chosen = tracheas(stats, centres, areas_mm2, lumen.shape[1:])
        else:
            touched = np.unique(labels[previous > 0])
            chosen = [k for k in touched if k and areas_mm2[k] <= AIRWAY_MM2[1]]
        if not len(chosen):
            return z
        previous = np.isin(labels, chosen).astype(np.uint8)
        found[z] = previous
    return 0


def tracheas(
    stats: np.ndarray,
    centres: np.ndarray,
    areas_mm2: np.ndarray,
    shape: tuple[int, ...],
) -> list[int]:
    """Labels of a slice that can be a trachea: right size, compact, near the middle."""
    chosen = []
    for label in range(1, len(stats)):
        width, height = stats[label, [cv2.CC_STAT_WIDTH, cv2.CC_STAT_HEIGHT]]
        compact = stats[label, cv2.CC_STAT_AREA] > 0.5 * width * height
        round_enough = max(width, height) <= 2.5 * min(width, height)
        right_size = AIRWAY_MM2[0] <= areas_mm2[label] <= AIRWAY_MM2[1]
        central = np.abs(centres[label] / (shape[1], shape[0]) - 0.5).max() < 0.17
        if compact and round_enough and right_size and central:
            chosen.append(label)
    return chosen[:1]


def sides(
    lungs: np.ndarray,
    spacing_mm: tuple[float, ...],
    middle_x: float | None = None,
) -> np.ndarray:
    """Right (1) and left (2) lung of a coarse mask, also where they touch.

    Connected parts that lie on one side of the middle plane are named by it. Of one that
    lies on both, the core of each lung is found by erosion; its other voxels go to the
    nearer core, in doubt to the side of the plane they lie on. A part that would be cut
    through the thick of a lung stays whole, and is of the side on which most of it lies.

    Args:
        lungs: (z, y, x) bool, not empty.
        spacing_mm: (z, y, x).
        middle_x: Column of the body's middle, which only has to be near; by default the
            volume's.

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
        # The lung that seems to be missing may hang on the other one.
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
    """How far columns of voxels lie to the right of the plane between the lungs, in mm.

    Of the upright planes near the body's middle, turned as patients are, it is the one
    that cuts the least lung; so it follows a mediastinum that is pushed or pulled aside.

    Returns:
        (y, x) float64, negative to the left.
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
    """The side on which at least `share` of a part lies, or 0, by label of the part.

    Args:
        parts: (z, y, x) labels of connected parts.
        right: (y, x) bool, the columns of voxels to the right.
        share: Above one half.
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
    """What erosion leaves of a mask when each of its pieces has come to lie on one side.

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
    """Labels of a (y, x) slice whose cut has moved to where the lungs hardly touch.

    Pieces that are not connected, or not once a voxel is taken off around them, are of the
    side that nearly all of them is on.
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
    """Labels in which no connected part is cut where it is as wide as what is cut off."""
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
    """Area of the faces between right and left voxels."""
    area_mm2 = 0.0
    for axis, spacing in enumerate(spacing_mm):
        along = np.moveaxis(labels, axis, 0)
        faces = np.count_nonzero(along[1:] * along[:-1] == RIGHT * LEFT)
        area_mm2 += faces * float(np.prod(spacing_mm)) / spacing
    return area_mm2


def body_middle_x(hu: np.ndarray) -> float:
    """The column with as much tissue to its right as to its left; the volume's without."""
    tissue = (hu[::4, ::4] > TISSUE_HU).sum(axis=(0, 1)).astype(np.float64)
    total = np.cumsum(tissue)
    if not total[-1]:
        return (hu.shape[2] - 1) / 2
    return float(np.interp(total[-1] / 2, total, np.arange(len(total)) + 0.5))


def distance_mm(mask: np.ndarray, spacing_mm: tuple[float, ...]) -> np.ndarray:
    """Distance of each voxel of a mask to the nearest one outside of it, in mm.

    The volume's ends do not count as outside.
    """
    import edt

    return edt.edt(
        np.ascontiguousarray(mask),
        anisotropy=spacing_mm,
        black_border=False,
        parallel=2,
    )


def fill_lungs(
    labels: np.ndarray,
    spacing_mm: tuple[float, ...],
    settings: config.LungMask,
) -> np.ndarray:
    """Coarse labels with holes filled and pleural concavities closed, side by side.

    Closing by a ball of `closing_mm` takes in nodules at the pleura and vessels at the
    hilum whose opening is narrower than the ball; the other side is never entered.
    """
    filled = labels.copy()
    for side in np.unique(labels[labels > 0]):
        box = box_with_air(labels == side, settings.closing_mm, spacing_mm)
        grown = labels[box] == side
        if settings.closing_mm:
            grown = closed(grown, settings.closing_mm, spacing_mm)
        if settings.fill_holes:
            grown = per_slice(without_holes, grown)
        view = filled[box]
        view[grown & (view == 0)] = side
    return filled


def box_with_air(
    mask: np.ndarray, margin_mm: float, spacing_mm: tuple[float, ...]
) -> Box | None:
    """The box around a mask and `margin_mm` more, within the volume; None if empty."""
    return boxes.around(mask, [int(margin_mm / spacing) + 2 for spacing in spacing_mm])


def closed(
    mask: np.ndarray, radius_mm: float, spacing_mm: tuple[float, ...]
) -> np.ndarray:
    """Morphological closing of a (z, y, x) mask by a ball, exact in mm."""
    # Air around the sides. Beyond the ends in z the last slice goes on, so that a lung cut
    # by the scan is not closed as if it ended there, and one that ends before does not
    # grow to the scan's end.
    deep, *wide = (int(radius_mm / s) + 2 for s in spacing_mm)
    padded = np.pad(mask, ((2 * deep,) * 2, (0, 0), (0, 0)), mode="edge")
    padded = np.pad(padded, ((0, 0), *((margin,) * 2 for margin in wide)))
    grown = distance_mm(~padded, spacing_mm) <= radius_mm
    shrunk = distance_mm(grown, spacing_mm) > radius_mm
    inner = tuple(
        slice(margin, margin + length)
        for margin, length in zip((2 * deep, *wide), mask.shape, strict=True)
    )
    return shrunk[inner] | mask


def without_holes(mask: np.ndarray) -> np.ndarray:
    """A (y, x) bool mask with its enclosed holes filled."""
    contours, _ = cv2.findContours(
        mask.astype(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE
    )
    filled = np.zeros(mask.shape, np.uint8)
    cv2.drawContours(filled, contours, -1, 1, cv2.FILLED)
    return filled.astype(bool)


def refine(
    hu: np.ndarray,
    filled: np.ndarray,
    lungs: np.ndarray,
    tubes: np.ndarray,
    threshold: float,
    factors: tuple[int, int, int],
    settings: config.LungMask,
) -> np.ndarray:
    """Full-resolution labels: air near a coarse lung, and what the filling added.

    Args:
        hu: (z, y, x) int16 at full resolution.
        filled: Coarse labels after `fill_lungs`.
        lungs: Coarse mask before it.
        tubes: Coarse mask of the airway, which is left out.
        threshold: HU between lung and tissue.
        factors: Voxels per coarse voxel.
        settings: Whether small holes are filled.

    Returns:
        (z, y, x) uint8.
    """
    size = (hu.shape[2], hu.shape[1])
    width = 2 * max(factors[1:]) + 1
    near = np.ones((width, width), np.uint8)

    def draw(z: int) -> np.ndarray:
        coarse_z = z // factors[0]
        result = np.zeros(hu.shape[1:], np.uint8)
        tube = enlarged(tubes[coarse_z], size) > 0
        air = (hu[z] < threshold) & ~tube
        added = filled[coarse_z] * ~lungs[coarse_z]
        for side in (RIGHT, LEFT):
            whole = enlarged(filled[coarse_z] == side, size)
            if not whole.any():
                continue
            lung = air & cv2.dilate(
                enlarged((filled[coarse_z] == side) & lungs[coarse_z], size), near
            ).astype(bool)
            mask = lung | enlarged(added == side, size).astype(bool)
            if settings.fill_holes:
                sealed = cv2.morphologyEx(mask.astype(np.uint8), cv2.MORPH_CLOSE, near)
                mask = without_holes(sealed > 0) & (mask | (whole > 0))
            result[mask & ~tube & (result == 0)] = side
        return result

    return per_slice(draw, np.arange(len(hu)))


def enlarged(mask: np.ndarray, size_xy: tuple[int, int]) -> np.ndarray:
    """A coarse (y, x) mask at full size, its border interpolated; uint8."""
    values = cv2.resize(
        mask.astype(np.float32), size_xy, interpolation=cv2.INTER_LINEAR
    )
    return (values >= 0.5).astype(np.uint8)
