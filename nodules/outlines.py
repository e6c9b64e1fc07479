"""Readers' outlines: masks, clusters of outlines of one nodule, and sizes in mm.

A LIDC outline is a closed chain of pixels just outside the nodule: its interior is
nodule, its own pixels are not (Armato et al., Med. Phys. 38:915, 2011; pylidc follows
the same rule). An outline with inclusion FALSE cuts a hole: its interior and its own
pixels are not nodule. This module works on arrays and pixel coordinates; `cohorts/`
reads the files.
"""

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from ct.boxes import Box

PYLIDC_SHRINK = 0.9
"""Factor that shrinks the tolerance while a cluster is too large (pylidc's default)."""

PYLIDC_MIN_TOLERANCE = 0.1
"""Smallest tolerance that is tried to split a large cluster (pylidc's default)."""

READERS = 4
"""Readers per scan in LIDC; a larger cluster holds more than one nodule."""


@dataclass(frozen=True, eq=False)
class Outline:
    """One reader's outline on one slice.

    Attributes:
        z: Index of the slice.
        points_xy: (points, 2) pixel columns and rows, in drawing order; need not be
            closed.
        inclusion: False if the outline cuts a hole.
    """

    z: int
    points_xy: np.ndarray
    inclusion: bool = True


@dataclass(frozen=True, eq=False)
class PlacedMask:
    """One reader's mask of one nodule.

    Attributes:
        mask: Small (z, y, x) bool mask.
        box: Position of `mask` in the volume.
        label: Label of the nodule, 1 to 255.
        reader: Number of the reader, 0 to 7.
    """

    mask: np.ndarray
    box: Box
    label: int
    reader: int


def fill_outline(points_xy: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """Returns the pixels inside an outline; the outline's own pixels are outside.

    The outline is closed from its last point to its first. A pixel is inside if its
    centre lies strictly within the polygon through the points and is not one of them;
    where the outline crosses itself, within means enclosed an odd number of times. A
    single point, or points on one line, enclose nothing. pylidc fills the same pixels
    on all but 3 of the 41,406 outlines of LIDC-IDRI; on those, a pixel centre lies
    exactly on a long edge.

    Args:
        points_xy: (points, 2) integer pixel columns and rows within `shape`.
        shape: (y, x) size of the result.

    Returns:
        (y, x) bool mask.
    """
    import cv2

    outline = np.ascontiguousarray(points_xy, np.int32)
    image = np.zeros(shape, np.uint8)
    cv2.fillPoly(image, [outline], 1)
    edge = np.zeros(shape, np.uint8)
    cv2.polylines(edge, [outline], isClosed=True, color=1)
    image[edge > 0] = 0
    # If consecutive points are not neighbouring pixels, the line between them covers
    # pixels on either side of the polygon's true edge.
    edge[outline[:, 1], outline[:, 0]] = 0
    for y, x in np.argwhere(edge).tolist():
        image[y, x] = cv2.pointPolygonTest(outline, (x, y), measureDist=False) > 0
    return image.astype(bool)


def fill_outlines(outlines: Sequence[Outline]) -> tuple[np.ndarray, Box]:
    """Builds one reader's mask of one nodule from the outlines on all slices.

    On each slice the interiors of inclusions are joined, then the exclusions are cut
    out.

    Args:
        outlines: At least one outline.

    Returns:
        The (z, y, x) bool mask within the outlines' bounding box, and the box. The mask
        is empty if no outline encloses a pixel.
    """
    points = np.vstack([outline.points_xy for outline in outlines])
    zs = [outline.z for outline in outlines]
    low = np.array([min(zs), *points.min(0)[::-1]])
    high = np.array([max(zs), *points.max(0)[::-1]])
    mask = np.zeros(high - low + 1, bool)
    for outline in sorted(outlines, key=lambda outline: not outline.inclusion):
        points_xy = outline.points_xy - low[:0:-1]
        image = mask[outline.z - low[0]]
        inside = fill_outline(points_xy, image.shape)
        if outline.inclusion:
            image |= inside
        else:
            image &= ~inside
            image[points_xy[:, 1], points_xy[:, 0]] = False
    z, y, x = (slice(int(a), int(b) + 1) for a, b in zip(low, high, strict=True))
    return mask, (z, y, x)


def join_masks(masks: Sequence[tuple[np.ndarray, Box]]) -> tuple[np.ndarray, Box]:
    """Joins masks from `fill_outlines` into one mask in the box around them all."""
    starts = np.array([[axis.start for axis in box] for _, box in masks])
    stops = np.array([[axis.stop for axis in box] for _, box in masks])
    low, high = starts.min(0), stops.max(0)
    joined = np.zeros(high - low, bool)
    for (mask, _), start in zip(masks, starts - low, strict=True):
        joined[tuple(map(slice, start, start + mask.shape))] |= mask
    z, y, x = (slice(int(a), int(b)) for a, b in zip(low, high, strict=True))
    return joined, (z, y, x)


def cluster(points: Sequence[np.ndarray], tolerance: float) -> list[list[int]]:
    """Groups annotations of the same nodule by pylidc's rule.

    Two annotations belong to one nodule if a chain of annotations connects them in
    which each has an outline point within `tolerance` of one of the next. While a
    cluster has more than four annotations, all are clustered again with a tolerance
    smaller by a tenth, until it would fall below 0.1; clusters that are still too large
    stay so.

    Args:
        points: For each annotation, the (points, 3) coordinates of its outlines, z
            last.
        tolerance: Largest distance between points, in the unit of `points`.

    Returns:
        For each nodule, the indices of its annotations in `points`, ascending; nodules
        are sorted by the mean z of their annotations.
    """
    from scipy.sparse import csgraph

    if not points:
        return []
    distances = nearest_distances(points, tolerance)
    while True:
        _, labels = csgraph.connected_components(distances <= tolerance, directed=False)
        shrunk = tolerance * PYLIDC_SHRINK
        if np.bincount(labels).max() <= READERS or shrunk < PYLIDC_MIN_TOLERANCE:
            break
        tolerance = shrunk
    clusters = [np.flatnonzero(labels == k).tolist() for k in range(labels.max() + 1)]
    heights = [float(np.mean(p[:, 2])) for p in points]
    return sorted(clusters, key=lambda members: np.mean([heights[m] for m in members]))


def nearest_distances(points: Sequence[np.ndarray], tolerance: float) -> np.ndarray:
    """Returns (n, n) smallest distances of point sets; inf if above `tolerance`."""
    from scipy.spatial import cKDTree

    trees = [cKDTree(p) for p in points]
    low = np.array([p.min(0) for p in points])
    high = np.array([p.max(0) for p in points])
    distances = np.full((len(points), len(points)), np.inf)
    for i, j in itertools.combinations(range(len(points)), 2):
        apart = np.maximum(low[i] - high[j], low[j] - high[i]).max() > tolerance
        if not apart:
            nearest = trees[i].query(points[j])[0].min()
            distances[i, j] = distances[j, i] = nearest
    distances[distances > tolerance] = np.inf
    np.fill_diagonal(distances, 0)
    return distances


def paint(
    masks: Iterable[PlacedMask], shape: tuple[int, int, int]
) -> tuple[np.ndarray, np.ndarray]:
    """Draws readers' masks into the two volumes of a scan file.

    A voxel that two nodules claim goes to the one that more readers drew there; on a
    tie, to the lower label. It keeps only the bits of that nodule's readers, so that
    its votes are always those of its own nodule.

    Args:
        masks: Readers' masks; several masks of one reader and nodule are joined.
        shape: (z, y, x) of the volumes.

    Returns:
        (z, y, x) uint8 reader bits and (z, y, x) uint8 nodule labels.
    """
    of_label: dict[int, list[PlacedMask]] = {}
    for placed in masks:
        of_label.setdefault(placed.label, []).append(placed)
    reader_bits = np.zeros(shape, np.uint8)
    nodule_labels = np.zeros(shape, np.uint8)
    for label in sorted(of_label):
        union, box = join_masks([(p.mask, p.box) for p in of_label[label]])
        bits = np.zeros(union.shape, np.uint8)
        for placed in of_label[label]:
            within = tuple(
                slice(inner.start - outer.start, inner.stop - outer.start)
                for inner, outer in zip(placed.box, box, strict=True)
            )
            bits[within][placed.mask] |= np.uint8(1 << placed.reader)
        won = np.bitwise_count(bits) > np.bitwise_count(reader_bits[box])
        reader_bits[box][won] = bits[won]
        nodule_labels[box][won] = label
    return reader_bits, nodule_labels


def volume_mm3(mask: np.ndarray, voxel_mm3: float) -> float:
    """Returns the volume of a mask: its voxels times the volume of one."""
    return float(np.count_nonzero(mask) * voxel_mm3)


def diameter_mm(mask: np.ndarray, spacing_mm: tuple[float, float, float]) -> float:
    """Measures the largest extent of a mask within one axial slice.

    This is the largest distance between two pixel centres of a slice, plus one pixel,
    since a pixel reaches half its width beyond its centre on either side. A disc of
    diameter D measures D within one pixel.

    Args:
        mask: (z, y, x) bool.
        spacing_mm: (z, y, x).

    Returns:
        The extent; 0 for an empty mask.
    """
    import cv2

    pixel_mm = np.array(spacing_mm[1:])
    largest = 0.0
    for image in mask[mask.any(axis=(1, 2))]:
        centres_mm = (np.argwhere(image) * pixel_mm).astype(np.float32)
        hull_mm = cv2.convexHull(centres_mm)[:, 0].astype(np.float64)
        largest = max(largest, largest_distance(hull_mm) + float(pixel_mm.mean()))
    return largest


def outline_diameter_mm(outlines: Iterable[Outline], pixel_mm: float) -> float:
    """Returns pylidc's diameter: the largest distance of two points of one outline.

    The points lie outside the nodule, so this is about a pixel more than `diameter_mm`
    of the mask. Outlines of a single point are skipped; the result is 0 if there is no
    other.
    Reference: pylidc 0.2.3, Annotation.diameter.
    """
    return max(
        (largest_distance(np.unique(o.points_xy, axis=0) * pixel_mm) for o in outlines),
        default=0.0,
    )


def outline_volume_mm3(
    outlines: Sequence[Outline], slice_z_mm: np.ndarray, pixel_mm: float, lone_mm: float
) -> float:
    """Returns pylidc's volume: the area of each outline times the height of its slice.

    The area is that of the polygon through the outline's points, so it includes half of
    the outline's own pixels, which the mask leaves out. The volume is larger than
    `volume_mm3`, the more so for small nodules. A slice reaches halfway to the outlined
    slices above and below, and the end slices reach as far outwards as inwards.
    Exclusions count as negative.
    Reference: pylidc 0.2.3, Annotation.volume.

    Args:
        outlines: One reader's outlines of one nodule.
        slice_z_mm: (slices,) z position of every slice of the scan.
        pixel_mm: In-plane spacing.
        lone_mm: Height of a nodule outlined on one slice: pylidc uses SliceThickness.
    """
    z_mm = np.unique([slice_z_mm[outline.z] for outline in outlines])
    height_mm = np.array([lone_mm])
    if len(z_mm) > 1:
        padded = np.concatenate(
            [[2 * z_mm[0] - z_mm[1]], z_mm, [2 * z_mm[-1] - z_mm[-2]]]
        )
        height_mm = (padded[2:] - padded[:-2]) / 2
    volume = 0.0
    for outline in outlines:
        x, y = outline.points_xy.T * float(pixel_mm)
        area_mm2 = abs(np.dot(x, np.roll(y, 1)) - np.dot(y, np.roll(x, 1))) / 2
        height = height_mm[np.searchsorted(z_mm, slice_z_mm[outline.z])]
        volume += (1 if outline.inclusion else -1) * float(area_mm2 * height)
    return volume


def largest_distance(points: np.ndarray) -> float:
    """Returns the largest distance between any two of (points, 2) points; 0 for one."""
    from scipy.spatial.distance import pdist

    return float(pdist(points).max()) if len(points) > 1 else 0.0
