"""Lung masks from HU: the thesis' slice rule, and the same threshold cleaned in 3-D.

The slice rule separates air from tissue by K-means on the middle of each slice and keeps
regions by size and place. It takes in trachea and gut, and leaves nodules at the pleura
out. The cleaning keeps only its threshold, and finds body, airway, sides and pleural
concavities on a coarse grid, where a whole scan takes a second; borders are then drawn at
full resolution.
"""

from dataclasses import replace

import cv2
import numpy as np

import config
from ct import boxes
from ct.boxes import Box
from ct.scan import LEFT, RIGHT, Scan, ScanError
from lungs.coarse import coarse_factors, per_slice, shrink
from lungs.sides import body_middle_x, distance_mm, sides
from lungs.slice_rule import slice_rule, slice_threshold

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


def with_lungs(scan: Scan, mask: config.LungMask) -> Scan:
    """The scan with lung labels; those its source came with are kept, patches get none.

    Raises:
        ScanError: If no lung is found.
    """
    if scan.lung is not None or not scan.whole:
        return scan
    labels = segment_lungs(scan.hu, scan.spacing_mm, mask)
    if not labels.any():
        raise ScanError(
            f"scan {scan.scan_id}: no lung found in {len(scan.hu)} slices; expected a "
            "chest CT in HU; give lung masks with the cohort if it is one"
        )
    return replace(scan, lung=labels)
