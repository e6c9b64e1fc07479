"""Lung masks from HU: the thesis' slice rule, or its threshold with cleaning in 3-D.

The slice rule separates air from tissue by K-means on the middle of each slice and
keeps regions by size and position. It includes trachea and gut and leaves out nodules
at the pleura. The cleaning keeps only its threshold. It finds body, airway, sides and
pleural concavities on a coarse grid, where a whole scan takes a second, and then draws
the borders at full resolution.
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
"""Plausible range of the threshold between lung and tissue, which is clipped to it."""

LUNG_ML = 60.0
"""Smallest volume of a lung; smaller pockets of air are not lung."""

HALF_ML = 250.0
"""Smallest volume of an adult's lung; with less in one half of the body, a lung may not have
been found."""

GAS_HU = -940.0
"""Lowest median HU of a lung below one litre; an emptier pocket is gas in the gut."""

AIRWAY_HU = -900.0
"""Upper limit of HU in the lumen of trachea and main bronchi."""

AIRWAY_MM2 = (60.0, 900.0)
"""Range of the trachea's area in a slice; the widest is about 30 mm across."""

AIRWAY_LENGTH_MM = 30.0
"""Smallest length of the trachea; a shorter path is not one."""

AIRWAY_WALL_MM = 2.0
"""Thickness of the wall that is removed together with the lumen."""

AIRWAY_PLACE = (0.35, 0.17)
"""Largest distance (y, x) of the trachea's highest slice from the middle of the image, as a
share of its size. The neck of a patient who looks up lies far in front."""

DOME_MM2 = 1500.0
"""Largest opening of a hole that is filled. Slices show the top of the diaphragm as a hole in
the lung, which opens into the abdomen further down. Vessels at the hilum and most masses on
the diaphragm open too, but are narrower: this is a circle of 44 mm."""


def segment_lungs(
    hu: np.ndarray,
    spacing_mm: tuple[float, float, float],
    settings: config.LungMask,
) -> np.ndarray:
    """Computes the lung labels of a scan.

    Args:
        hu: (z, y, x) int16 in canonical orientation.
        spacing_mm: (z, y, x).
        settings: With `cleaning` off, only the slice rule runs; its mask is labelled 1.

    Returns:
        (z, y, x) uint8: 0 outside, 1 right lung, 2 left lung; all 0 without lung.
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
    """Finds large pockets of air inside the body, except the gut; (z, y, x) bool."""
    import cc3d

    tissue = coarse >= threshold
    # Erosion separates the body from the table. Everything that is then not body is
    # air, even a hollow table. A rim of air around each slice connects air that the
    # table cuts off from the outside; the ends in z stay closed, since the scan may cut
    # the lungs there.
    cross = cv2.getStructuringElement(cv2.MORPH_CROSS, (3, 3))
    eroded = per_slice(lambda image: cv2.erode(image, cross), tissue.astype(np.uint8))
    body = largest(cc3d.connected_components(eroded, connectivity=6))
    body = per_slice(lambda image: cv2.dilate(image, cross), body.astype(np.uint8))
    body = body.astype(bool) & tissue
    # Vessels and thin walls inside count as air while pockets are told apart.
    air = np.pad(body, ((0, 0), (1, 1), (1, 1))) == 0
    labels = cc3d.connected_components(air, connectivity=6)
    labels = np.where(labels == labels[0, 0, 0], 0, labels)[:, 1:-1, 1:-1]
    found = lung_like(np.where(tissue, 0, labels), coarse, spacing_mm)
    middle = round(body_middle_x(coarse))
    halves = found[:, :, :middle], found[:, :, middle:]
    if min(half.sum() for half in halves) * np.prod(spacing_mm) / 1000 >= HALF_ML:
        return found
    # Erosion opened the thin chest wall of a slender person, or gas connects a lung with
    # the outside in another slice. Each slice by itself then tells what is enclosed.
    body = largest(cc3d.connected_components(tissue, connectivity=6))
    enclosed = per_slice(without_holes, body) & ~body
    labels = cc3d.connected_components(enclosed, connectivity=6)
    return found | lung_like(np.where(tissue, 0, labels), coarse, spacing_mm)


def largest(labels: np.ndarray) -> np.ndarray:
    """Returns the largest component of a label volume as a mask; empty if none."""
    counts = np.bincount(labels.ravel())
    counts[0] = 0
    return (labels == counts.argmax()) & (labels > 0)


def lung_like(
    labels: np.ndarray, coarse: np.ndarray, spacing_mm: tuple[float, ...]
) -> np.ndarray:
    """Returns the mask of components large enough for a lung and denser than gas."""
    counts = np.bincount(labels.ravel())
    volumes_ml = counts * np.prod(spacing_mm) / 1000
    keep = volumes_ml >= LUNG_ML
    keep[0] = False
    for label in np.flatnonzero(keep & (volumes_ml < 1000)):
        keep[label] = np.median(coarse[labels == label]) > GAS_HU
    return keep[labels]


def large_parts(mask: np.ndarray, spacing_mm: tuple[float, ...]) -> np.ndarray:
    """Returns the connected components of a mask that are large enough for a lung."""
    import cc3d

    labels = cc3d.connected_components(mask, connectivity=6)
    keep = np.bincount(labels.ravel()) * np.prod(spacing_mm) / 1000 >= LUNG_ML
    keep[0] = False
    return keep[labels]


def airway(
    coarse: np.ndarray, inside: np.ndarray, spacing_mm: tuple[float, ...]
) -> np.ndarray:
    """Finds trachea and main bronchi with their walls, slice by slice downwards.

    The search starts at the highest slice with a dark, round, central region and
    follows the regions that overlap it in the next slice, until they are too large
    for an airway. A path too short for a trachea is dropped and the search restarts
    below it.

    Returns:
        (z, y, x) bool.
    """
    lumen = ((coarse < AIRWAY_HU) & inside).astype(np.uint8)
    found = np.zeros(inside.shape, np.uint8)
    top = len(coarse) - 1
    while top >= 0:
        end = follow_airway(lumen, found, top, spacing_mm)
        if (top - end) * spacing_mm[0] >= AIRWAY_LENGTH_MM:
            break
        found[:] = 0
        top = min(top, end) - 1
    reach = [2 * round(AIRWAY_WALL_MM / s) + 1 for s in spacing_mm[1:]]
    wall = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (reach[1], reach[0]))
    return per_slice(lambda image: cv2.dilate(image, wall), found).astype(bool)


def follow_airway(
    lumen: np.ndarray, found: np.ndarray, top: int, spacing_mm: tuple[float, ...]
) -> int:
    """Marks the airway that begins in slice `top` in `found`; returns where it ends."""
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
    """Returns the first label of a slice that fits a trachea by size, shape and place.

    The list has one label, or none if no region fits.
    """
    chosen = []
    for label in range(1, len(stats)):
        width, height = stats[label, [cv2.CC_STAT_WIDTH, cv2.CC_STAT_HEIGHT]]
        compact = stats[label, cv2.CC_STAT_AREA] > 0.5 * width * height
        round_enough = max(width, height) <= 2.5 * min(width, height)
        right_size = AIRWAY_MM2[0] <= areas_mm2[label] <= AIRWAY_MM2[1]
        away = np.abs(centres[label][::-1] / shape - 0.5)
        central = (away < AIRWAY_PLACE).all()
        if compact and round_enough and right_size and central:
            chosen.append(label)
    return chosen[:1]


def fill_lungs(
    labels: np.ndarray,
    spacing_mm: tuple[float, ...],
    settings: config.LungMask,
) -> np.ndarray:
    """Fills holes and closes pleural concavities of coarse labels, one side at a time.

    Closing by a ball of radius `closing_mm` includes nodules at the pleura and vessels
    at the hilum whose opening is narrower than the ball; it never enters the other
    side.
    """
    filled = labels.copy()
    for side in np.unique(labels[labels > 0]):
        box = box_with_air(labels == side, settings.closing_mm, spacing_mm)
        grown = labels[box] == side
        if settings.closing_mm:
            grown = close_by_ball(grown, settings.closing_mm, spacing_mm)
        if settings.fill_holes:
            grown |= closed_holes(grown, spacing_mm)
        view = filled[box]
        view[grown & (view == 0)] = side
    return filled


def closed_holes(mask: np.ndarray, spacing_mm: tuple[float, ...]) -> np.ndarray:
    """Finds holes of the slices of a mask, except those that open downwards or upwards.

    Args:
        mask: (z, y, x) bool.
        spacing_mm: (z, y, x).

    Returns:
        (z, y, x) bool; a hole that has an opening larger than `DOME_MM2` is not in it.
    """
    import cc3d

    found = per_slice(without_holes, mask) & ~mask
    holes = cc3d.connected_components(found, connectivity=6)
    beyond = np.pad(~(mask | found), ((1, 1), (0, 0), (0, 0)), constant_values=True)
    closed = np.ones(int(holes.max()) + 1, bool)
    closed[0] = False
    for side in (beyond[:-2], beyond[2:]):
        openings = cc3d.connected_components(found & side, connectivity=6)
        areas_mm2 = np.bincount(openings.ravel()) * spacing_mm[1] * spacing_mm[2]
        areas_mm2[0] = 0
        closed[holes[(areas_mm2 > DOME_MM2)[openings]]] = False
    return closed[holes]


def box_with_air(
    mask: np.ndarray, margin_mm: float, spacing_mm: tuple[float, ...]
) -> Box | None:
    """Returns a mask's bounding box plus a margin, within the volume; None if empty."""
    return boxes.bounding_box(
        mask, [int(margin_mm / spacing) + 2 for spacing in spacing_mm]
    )


def close_by_ball(
    mask: np.ndarray, radius_mm: float, spacing_mm: tuple[float, ...]
) -> np.ndarray:
    """Closes a (z, y, x) mask morphologically by a ball that is exact in mm."""
    # Pad the sides with air. Beyond the ends in z, repeat the last slice, so that a
    # lung cut by the scan is not closed as if it ended there, and one that ends before
    # does not grow to the end of the scan.
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
    """Fills the enclosed holes of a (y, x) bool mask."""
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
    """Draws labels at full resolution: air near a coarse lung, and what filling added.

    Args:
        hu: (z, y, x) int16 at full resolution.
        filled: Coarse labels after `fill_lungs`.
        lungs: Coarse mask before `fill_lungs`.
        tubes: Coarse mask of the airway, which is left out.
        threshold: HU between lung and tissue.
        factors: (z, y, x) voxels per coarse voxel.
        settings: `fill_holes` also fills small holes here.

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
    """Enlarges a coarse (y, x) mask with an interpolated border; uint8."""
    values = cv2.resize(
        mask.astype(np.float32), size_xy, interpolation=cv2.INTER_LINEAR
    )
    return (values >= 0.5).astype(np.uint8)


def with_lungs(scan: Scan, mask: config.LungMask) -> Scan:
    """Adds lung labels to a scan; keeps those of its source, and gives patches none.

    Raises:
        ScanError: If no lung is found.
    """
    if scan.lung is not None or not scan.whole:
        return scan
    labels = segment_lungs(scan.hu, scan.spacing_mm, mask)
    if not labels.any():
        raise ScanError(
            f"scan {scan.scan_id}: no lung found in {len(scan.hu)} slices; expected a "
            "chest CT in HU; if it is one, supply a lung mask with the scan"
        )
    return replace(scan, lung=labels)
