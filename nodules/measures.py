"""Nodules in a probability map or a mask: connected components, each measured in mm."""

import cv2
import numpy as np

import config
from ct import boxes
from ct.geometry import Grid
from ct.scan import LEFT, RIGHT
from nodules.components import label_nodules
from nodules.found import FoundNodule

PLEURA_MARGIN_MM = 20.0
"""Margin around a nodule in which the pleura is searched for first."""


def find_nodules(
    prob: np.ndarray,
    grid: Grid,
    settings: config.Postprocess,
    *,
    std: np.ndarray | None = None,
    lung: np.ndarray | None = None,
    hu: np.ndarray | None = None,
) -> tuple[np.ndarray, list[FoundNodule]]:
    """Finds and measures the nodules of a probability map.

    Args:
        prob: (z, y, x) float32 probability of nodule.
        grid: Grid of `prob`.
        settings: Postprocessing settings. The method "tuned" works like "fixed", with
            values that were tuned before.
        std: (z, y, x) standard deviation of `prob` over the passes, for `score_std`.
        lung: (z, y, x) uint8 lung labels; needed with `settings.within_lung`.
        hu: (z, y, x) int16, for `mean_hu`.

    Returns:
        (z, y, x) labels, uint8 or the smallest unsigned type that holds them, and the
        nodules by falling score.

    Raises:
        ValueError: If `settings.within_lung` is set and `lung` is None.
    """
    labels, chances = label_nodules(prob, grid, settings, lung=lung)
    return labels, measure_nodules(labels, chances, grid, std=std, lung=lung, hu=hu)


def measure_nodules(
    labels: np.ndarray,
    chances: np.ndarray,
    grid: Grid,
    *,
    std: np.ndarray | None = None,
    lung: np.ndarray | None = None,
    hu: np.ndarray | None = None,
) -> list[FoundNodule]:
    """Measures the nodule of every label.

    Args:
        labels: (z, y, x) labels 1 to n.
        chances: (n, 2) mean and largest probability of each label.
        grid: Grid of `labels`.
        std: (z, y, x) standard deviation over the passes, for `score_std`.
        lung: (z, y, x) lung labels, for the side.
        hu: (z, y, x) HU, for the mean.
    """
    from scipy.ndimage import find_objects

    nodules = []
    boxes = find_objects(labels, max_label=len(chances))
    for nodule_id, box in enumerate(boxes, start=1):
        mask = labels[box] == nodule_id
        places = np.argwhere(mask) + [axis.start for axis in box]
        volume_mm3 = len(places) * grid.voxel_mm3
        long_axis_mm, short_axis_mm = axes_mm(mask, grid.spacing_mm[1:])
        score, max_prob = chances[nodule_id - 1].tolist()
        nodules.append(
            FoundNodule(
                nodule_id=nodule_id,
                score=score,
                score_std=None if std is None else float(std[box][mask].mean()),
                max_prob=max_prob,
                centre_zyx=tuple(places.mean(axis=0).tolist()),
                volume_mm3=volume_mm3,
                equivalent_diameter_mm=sphere_diameter_mm(volume_mm3),
                long_axis_mm=long_axis_mm,
                short_axis_mm=short_axis_mm,
                mean_hu=None if hu is None else float(hu[box][mask].mean()),
                side="" if lung is None else lung_side(lung[box][mask]),
                pleura_distance_mm=(
                    None if lung is None else pleura_distance_mm(mask, box, lung, grid)
                ),
            )
        )
    return nodules


def lung_side(lung: np.ndarray) -> str:
    """Returns the side on which most of a nodule's voxels lie; "" if in no lung."""
    right, left = np.count_nonzero(lung == RIGHT), np.count_nonzero(lung == LEFT)
    if not right and not left:
        return ""
    return "right" if right >= left else "left"


def pleura_distance_mm(
    mask: np.ndarray, box: boxes.Box, lung: np.ndarray, grid: Grid
) -> float:
    """Returns the distance of a nodule to the nearest non-lung voxel, 0 if they touch.

    The distance is measured between voxel faces: one voxel of lung in between makes it
    the width of that voxel. Mediastinum and diaphragm are not lung either. The nearest
    voxel is chosen by voxel centres, so with thick slices the distance can be up to a
    slice too large.

    Args:
        mask: bool mask of one nodule, within `box`.
        box: Position of `mask` in the scan.
        lung: (z, y, x) lung labels of the scan.
        grid: Grid of `lung`.
    """
    from scipy.ndimage import binary_dilation, distance_transform_edt

    near = boxes.grow_box(box, 1, lung.shape)
    own = np.zeros([part.stop - part.start + 2 for part in box], bool)
    own[1:-1, 1:-1, 1:-1] = mask
    around = np.zeros(own.shape, bool)
    around[
        tuple(
            slice(part.start - full.start + 1, part.stop - full.start + 1)
            for part, full in zip(near, box, strict=True)
        )
    ] = lung[near] > 0
    if (binary_dilation(own, np.ones((3, 3, 3))) & ~around).any():
        return 0.0
    spacing_mm = np.array(grid.spacing_mm)
    margin_mm, reach = PLEURA_MARGIN_MM, float("inf")
    while True:
        margin = np.ceil(margin_mm / spacing_mm).astype(int)
        wide = boxes.grow_box(box, margin.tolist(), lung.shape)
        # Voxels beyond the scan are not lung.
        inside = np.pad(lung[wide] > 0, 1)
        apart_mm, nearest = distance_transform_edt(
            inside, sampling=spacing_mm, return_indices=True
        )
        start = [
            part.start - full.start + 1 for part, full in zip(box, wide, strict=True)
        ]
        places = np.argwhere(mask) + start
        distances = apart_mm[tuple(places.T)]
        first = int(distances.argmin())
        reach = float(distances[first])
        whole = all(
            part.start == 0 and part.stop == length
            for part, length in zip(wide, lung.shape, strict=True)
        )
        if reach <= margin_mm or whole:
            break
        margin_mm *= 2
    place = places[first]
    steps = np.abs(nearest[(slice(None), *place)] - place)
    return float(np.linalg.norm(np.maximum(steps - 1, 0) * spacing_mm))


def axes_mm(
    mask: np.ndarray, spacing_yx_mm: tuple[float, float]
) -> tuple[float, float]:
    """Measures a nodule's long and short axis in an axial slice, as for RECIST.

    The long axis is the longest diameter within any slice, the short axis the longest
    diameter perpendicular to it in the same slice. Both are straight lines within the
    nodule. A line that leaves it does not count, so neither axis joins the tips of a
    crescent or bridges two parts. pylidc's `diameter` has no such rule; for convex
    nodules it is the same. The right angle is exact to half a pixel, and the axes
    need not cross.

    Lines run between the middles of outer pixel edges, so that a row of n pixels is n
    pixels long, and one pixel as long and wide as it is; lines between pixel centres
    would give n - 1, lines between corners more. Of slices with equal diameters the
    lowest counts.

    Args:
        mask: (z, y, x) bool of one nodule.
        spacing_yx_mm: (y, x).

    Returns:
        Long and short axis; 0, 0 for an empty mask.

    Reference: Eisenhauer et al. 2009 (RECIST 1.1); Bankier et al. 2017 (Fleischner
    Society).
    """
    half_mm = np.array(spacing_yx_mm) / 2
    outlines = [outline_points(image) for image in mask]
    # No line is longer than the hull is wide, so most slices need no search.
    widths_mm = np.array([hull_width_mm(points, half_mm) for points in outlines])
    best = (0.0, 0.0)
    for z in np.argsort(-widths_mm, kind="stable"):
        if widths_mm[z] <= best[0]:
            break
        lines = LinesWithin(mask[z], outlines[z])
        apart_mm = lines.apart * half_mm
        lengths_mm = np.linalg.norm(apart_mm, axis=1)
        longest = lines.longest(lengths_mm)
        long_mm = float(lengths_mm[longest])
        if long_mm <= best[0]:
            continue
        along = apart_mm[longest] / long_mm
        across_mm = np.abs(apart_mm @ np.array([-along[1], along[0]]))
        across_mm[np.abs(apart_mm @ along) > half_mm.max() + 1e-9] = 0
        best = (long_mm, float(across_mm[lines.longest(across_mm)]))
    return best


MAX_OUTLINE_POINTS = 800
"""Number of points above which an outline is subsampled; such outlines are ragged or
twice as wide as any nodule's."""


def outline_points(image: np.ndarray) -> np.ndarray:
    """Returns (n, 2) int32 (y, x) middles of the outer pixel edges of a (y, x) mask.

    They are in half pixels from the centre of the first pixel, and so are integers.
    """
    padded = np.pad(image, 1)
    sides = [
        2 * np.argwhere(padded & ~np.roll(padded, -step, axis)) + step * np.eye(2)[axis]
        for axis in (0, 1)
        for step in (-1, 1)
    ]
    return (np.concatenate(sides) - 2).astype(np.int32)


def hull_width_mm(points: np.ndarray, half_mm: np.ndarray) -> float:
    """Returns the largest distance of two points given in half pixels; 0 for none."""
    if not len(points):
        return 0.0
    hull_mm = cv2.convexHull(points).reshape(-1, 2) * half_mm
    return float(np.linalg.norm(hull_mm[:, None] - hull_mm, axis=-1).max())


class LinesWithin:
    """Lines between the outline points of a mask, tested for staying within the mask.

    A line is sampled every quarter of a pixel. A sample may lie up to a quarter of a
    pixel outside, so that the steps of a slanting outline do not exclude the line.

    Args:
        image: (y, x) bool, not empty.
        points: Its `outline_points`.

    Attributes:
        apart: (lines, 2) vectors from end to end in half pixels.
    """

    def __init__(self, image: np.ndarray, points: np.ndarray) -> None:
        points = points[:: len(points) // MAX_OUTLINE_POINTS + 1]
        first, second = np.triu_indices(len(points), 1)
        self.starts = points[first]
        self.apart = points[second] - self.starts
        # Odd positions are pixel centres; those between are edges and corners.
        within = np.zeros([2 * length + 1 for length in image.shape], np.uint8)
        within[1::2, 1::2] = image
        self.within = cv2.dilate(within, np.ones((3, 3), np.uint8)) > 0

    def longest(self, lengths: np.ndarray) -> int:
        """Returns the index of the line with the greatest length that stays within.

        Args:
            lengths: (lines,) lengths to compare.

        Returns:
            The index; that of the shortest line if no line stays within.
        """
        order = np.argsort(-lengths, kind="stable")
        start, number = 0, 16
        while start < len(order):
            some = order[start : start + number]
            some = some[self.stay(some, steps=8)]  # a few samples exclude most
            if len(some):
                some = some[self.stay(some, steps=2 * int(np.abs(self.apart).max()))]
            if len(some):
                return int(some[0])
            start, number = start + number, min(2 * number, 4096)
        return int(order[-1])

    def stay(self, lines: np.ndarray, *, steps: int) -> np.ndarray:
        """Tells which lines, given by index, stay within at every step; (n,) bool."""
        shares = np.linspace(0, 1, steps + 1)[:, None, None]
        places = np.rint(self.starts[lines] + shares * self.apart[lines])
        y, x = np.moveaxis(places.astype(np.intp) + 1, -1, 0)
        return np.asarray(self.within[y, x].all(axis=0))


def sphere_diameter_mm(volume_mm3: float) -> float:
    """Returns the diameter of the sphere of a volume."""
    return float(np.cbrt(6 * volume_mm3 / np.pi))
