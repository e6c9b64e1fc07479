"""Nodules in a probability map or a mask: connected components, each measured in mm."""

from dataclasses import dataclass
from typing import Any, Literal

import cv2
import numpy as np

import config
from ct import boxes
from ct.geometry import Grid, flip_xy
from ct.nifti_io import PROBABILITY_STEPS
from ct.scan import LEFT, RIGHT, Scan

Connectivity = Literal[6, 18, 26]

WITHIN_SHARE = 0.5
"""A component of which so much lies in the lung mask is in the lungs."""

NODULE_COLUMNS = (
    "case_id",
    "series_uid",
    "nodule_id",
    "score",
    "score_std",
    "max_prob",
    "x_lps_mm",
    "y_lps_mm",
    "z_lps_mm",
    "i_source",
    "j_source",
    "k_source",
    "z_slice",
    "long_axis_mm",
    "short_axis_mm",
    "equivalent_diameter_mm",
    "volume_mm3",
    "mean_hu",
    "side",
    "pleura_distance_mm",
)
"""Columns of nodules.csv; docs/layout.md says what each holds."""

PLEURA_MARGIN_MM = 20.0
"""How far around a nodule the pleura is looked for at first."""


@dataclass(frozen=True)
class FoundNodule:
    """One connected component of the mask.

    Attributes:
        nodule_id: Its value in the mask; 1 has the highest score.
        score: Mean probability of its voxels; of a `NoduleFinder` see `Found`.
        score_std: Mean standard deviation of its voxels over passes, None of one pass; of
            a `NoduleFinder` see `Candidate`.
        max_prob: Largest probability.
        centre_zyx: Centre of mass in voxels of the canonical array.
        volume_mm3: Voxels times voxel volume.
        equivalent_diameter_mm: Of the sphere of that volume.
        long_axis_mm: Longest diameter within an axial slice; see `axes_mm`.
        short_axis_mm: Longest diameter across it, in the same slice.
        mean_hu: Mean HU; None if HU were not given.
        side: "right" or "left" by the lung most of it lies in; "" if in none.
        pleura_distance_mm: Between the nodule and what is not lung, 0 if they touch; None
            if lungs were not given.
    """

    nodule_id: int
    score: float
    score_std: float | None
    max_prob: float
    centre_zyx: tuple[float, float, float]
    volume_mm3: float
    equivalent_diameter_mm: float
    long_axis_mm: float
    short_axis_mm: float
    mean_hu: float | None
    side: str
    pleura_distance_mm: float | None


def find_nodules(
    prob: np.ndarray,
    grid: Grid,
    settings: config.Postprocess,
    *,
    std: np.ndarray | None = None,
    lung: np.ndarray | None = None,
    hu: np.ndarray | None = None,
) -> tuple[np.ndarray, list[FoundNodule]]:
    """Thresholds, erodes, connects and measures.

    Args:
        prob: (z, y, x) float32 probability of nodule.
        grid: Where `prob` lies.
        settings: "tuned" works like "fixed": its values were tuned before.
        std: (z, y, x) standard deviation of `prob` over passes, for `score_std`.
        lung: (z, y, x) uint8 lung labels; needed with `settings.within_lung`.
        hu: (z, y, x) int16, for `mean_hu`.

    Returns:
        (z, y, x) labels, uint8 or the smallest unsigned type that holds them, and the
        nodules, by falling score.

    Raises:
        ValueError: If `settings.within_lung` and there is no `lung`.
    """
    labels, chances = label_nodules(prob, grid, settings, lung=lung)
    return labels, measure_nodules(labels, chances, grid, std=std, lung=lung, hu=hu)


def label_nodules(
    prob: np.ndarray,
    grid: Grid,
    settings: config.Postprocess,
    *,
    lung: np.ndarray | None = None,
    marked: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """`find_nodules` without the measuring.

    Args:
        prob: As there.
        grid: As there.
        settings: As there.
        lung: As there.
        marked: (z, y, x) bool, or integers of which neighbours that differ are never one
            nodule: what is not 0 is looked at, instead of what reaches the threshold.

    Returns:
        The labels, and the (n, 2) float mean and largest probability of each.
    """
    if settings.within_lung and lung is None:
        raise ValueError(
            "no lung mask; expected one with within_lung (--postprocess.within_lung)"
        )
    within = lung > 0 if settings.within_lung and lung is not None else None
    if marked is None:
        inside = prob if within is None else prob[within]
        marked = prob >= threshold_of(inside, settings)
    box = boxes.around(marked)
    if box is None:
        return np.zeros(prob.shape, np.uint8), np.zeros((0, 2))
    parts = connected(marked[box], settings)
    if within is not None:
        parts[~within_lung(parts, within[box])[parts]] = 0
    if settings.one_nodule:
        parts = likeliest(parts, prob[box])
    kept, scores, peaks = _kept_components(parts, prob[box], grid, settings)
    order = np.argsort(-scores[kept], kind="stable")
    renumber = np.zeros(len(scores), np.min_scalar_type(max(len(kept), 255)))
    renumber[kept[order]] = np.arange(1, len(kept) + 1)
    labels = np.zeros(prob.shape, renumber.dtype)
    labels[box] = renumber[parts]
    return labels, np.stack([scores, peaks], axis=1)[kept[order]]


def threshold_of(prob: np.ndarray, settings: config.Postprocess) -> np.float32:
    """The probability from which a voxel is nodule.

    float32, the type of the maps, so that 0.3 is not below 0.3.
    """
    if settings.method == "kmeans":
        return np.float32(kmeans_threshold(prob))
    return np.float32(settings.threshold)


def kmeans_threshold(prob: np.ndarray) -> float:
    """Midway between the two cluster centres of probabilities (K-means, k = 2).

    The best of all cuts of the histogram in steps of 1e-4: the optimum that iterations
    may miss. The thesis clusters each slice; a slice without nodule then gets clusters
    of noise, so here the scan is clustered.

    Args:
        prob: Probabilities, any shape.

    Returns:
        The threshold; infinity if all probabilities are alike.
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
    # Least spread within the clusters is largest spread between them.
    best = np.argmax(below * above * (centre_high - centre_low) ** 2)
    return float(centre_low[best] + centre_high[best]) / 2 / PROBABILITY_STEPS


def erode(mask: np.ndarray, side_px: int) -> np.ndarray:
    """Erodes each axial slice of a bool mask by a square; what is outside is empty."""
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
    """(z, y, x) uint32 components, once the mask is eroded and its holes are filled.

    Args:
        marked: (z, y, x) bool, or integers of which only equal neighbours are connected.
            They are eroded as one mask, and a hole of one of them is what is 0.
        settings: Erosion, holes and connectivity count.
    """
    if settings.erosion_px > 1:
        marked = marked * erode(marked > 0, settings.erosion_px)
    if settings.fill_holes:
        marked = filled(marked)
    return components(marked, settings.connectivity)


def filled(marked: np.ndarray) -> np.ndarray:
    """A mask or labels with their holes filled: what no path by faces joins to the border.

    What lies in a hole of a bool mask becomes part of what surrounds it.
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
    """(z, y, x) uint32 labels of the connected components of a mask, or of equal labels."""
    import cc3d

    return cc3d.connected_components(
        marked, connectivity=connectivity, out_dtype=np.uint32
    )


def likeliest(parts: np.ndarray, prob: np.ndarray) -> np.ndarray:
    """The component with the largest sum of probability, and what lies above or below it.

    So a nodule that was missed in one slice stays whole.

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
    """(labels,) bool: of which components at least `WITHIN_SHARE` lies in the lungs.

    Args:
        parts: (z, y, x) labels of components; 0 is none and counts as outside.
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
    """Labels of the components that stay, and every label's mean and largest probability.

    K-means splits noise as well as nodules, so its components need one voxel that
    reaches the fixed threshold; for the other methods each voxel does.
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


def measure_nodules(
    labels: np.ndarray,
    chances: np.ndarray,
    grid: Grid,
    *,
    std: np.ndarray | None = None,
    lung: np.ndarray | None = None,
    hu: np.ndarray | None = None,
) -> list[FoundNodule]:
    """Measures every label.

    Args:
        labels: (z, y, x) labels 1 to n.
        chances: (n, 2) mean and largest probability of each.
        grid: Where `labels` lies.
        std: (z, y, x) standard deviation over passes, for `score_std`.
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
    """The side of most of a nodule's voxels, by their lung labels; "" if in no lung."""
    right, left = np.count_nonzero(lung == RIGHT), np.count_nonzero(lung == LEFT)
    if not right and not left:
        return ""
    return "right" if right >= left else "left"


def pleura_distance_mm(
    mask: np.ndarray, box: boxes.Box, lung: np.ndarray, grid: Grid
) -> float:
    """Least distance between a nodule and what is not lung, 0 if they touch.

    Between the faces of voxels: a voxel of lung between them makes it as far as that voxel is
    wide. Mediastinum and diaphragm are not lung either. What is nearest is told by centres of
    voxels, so where slices are thick the distance can be up to a slice too large.

    Args:
        mask: bool of one nodule, within `box`.
        box: Where that is in the scan.
        lung: (z, y, x) lung labels of the scan.
        grid: Where `lung` lies.
    """
    from scipy.ndimage import binary_dilation, distance_transform_edt

    near = boxes.widened(box, 1, lung.shape)
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
        wide = boxes.widened(box, margin.tolist(), lung.shape)
        # What lies beyond the scan is not lung.
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
    """The longest diameter within a slice, and the longest one across it in that slice.

    As they are measured for RECIST: both are straight lines within the nodule. A line that
    leaves it does not count, so of a crescent neither is the distance of its tips, nor does
    either bridge two parts. pylidc's `diameter` has no such rule; of convex nodules it is
    the same. "Across" is perpendicular within half a pixel; the two need not cross.

    Lines run between the middles of the outer pixel edges, so that a row of n pixels is n
    pixels long, and one pixel as long and wide as it is; pixel centres would make it n - 1,
    corners more. Of slices with equal diameters the lowest counts.

    Args:
        mask: (z, y, x) bool of one nodule.
        spacing_yx_mm: (y, x).

    Returns:
        Long and short axis; 0, 0 of an empty mask.

    Reference: Eisenhauer et al. 2009 (RECIST 1.1); Bankier et al. 2017 (Fleischner Society).
    """
    half_mm = np.array(spacing_yx_mm) / 2
    outlines = [outline_points(image) for image in mask]
    # No line is longer than the hull is wide: most slices need no other look.
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
"""Of longer outlines, twice as wide as any nodule's or ragged, some points are looked at."""


def outline_points(image: np.ndarray) -> np.ndarray:
    """(n, 2) int32 (y, x) middles of a (y, x) bool mask's outer pixel edges.

    In half pixels from the centre of the first pixel, so that they are whole.
    """
    padded = np.pad(image, 1)
    sides = [
        2 * np.argwhere(padded & ~np.roll(padded, -step, axis)) + step * np.eye(2)[axis]
        for axis in (0, 1)
        for step in (-1, 1)
    ]
    return (np.concatenate(sides) - 2).astype(np.int32)


def hull_width_mm(points: np.ndarray, half_mm: np.ndarray) -> float:
    """Largest distance of two points that are given in half pixels; 0 of none."""
    if not len(points):
        return 0.0
    hull_mm = cv2.convexHull(points).reshape(-1, 2) * half_mm
    return float(np.linalg.norm(hull_mm[:, None] - hull_mm, axis=-1).max())


class LinesWithin:
    """Lines between points of a mask's outline, and which of them stay within the mask.

    A line is looked at every quarter of a pixel; there it may lie up to a quarter of a
    pixel outside, so that the steps of a slanting outline do not end it.

    Args:
        image: (y, x) bool, not empty.
        points: Its `outline_points`.

    Attributes:
        apart: (lines, 2) from end to end in half pixels.
    """

    def __init__(self, image: np.ndarray, points: np.ndarray) -> None:
        points = points[:: len(points) // MAX_OUTLINE_POINTS + 1]
        first, second = np.triu_indices(len(points), 1)
        self.starts = points[first]
        self.apart = points[second] - self.starts
        # Every second place is the centre of a pixel, those between are edges and corners.
        within = np.zeros([2 * length + 1 for length in image.shape], np.uint8)
        within[1::2, 1::2] = image
        self.within = cv2.dilate(within, np.ones((3, 3), np.uint8)) > 0

    def longest(self, lengths: np.ndarray) -> int:
        """Which line has the greatest of (lines,) lengths of those that stay within."""
        order = np.argsort(-lengths, kind="stable")
        start, number = 0, 16
        while start < len(order):
            some = order[start : start + number]
            some = some[self.stay(some, steps=8)]  # few looks end most lines
            if len(some):
                some = some[self.stay(some, steps=2 * int(np.abs(self.apart).max()))]
            if len(some):
                return int(some[0])
            start, number = start + number, min(2 * number, 4096)
        return int(order[-1])

    def stay(self, lines: np.ndarray, *, steps: int) -> np.ndarray:
        """(n,) bool: which of the lines, by their numbers, are within at every step."""
        shares = np.linspace(0, 1, steps + 1)[:, None, None]
        places = np.rint(self.starts[lines] + shares * self.apart[lines])
        y, x = np.moveaxis(places.astype(np.intp) + 1, -1, 0)
        return np.asarray(self.within[y, x].all(axis=0))


def sphere_diameter_mm(volume_mm3: float) -> float:
    """Diameter of the sphere of a volume."""
    return float(np.cbrt(6 * volume_mm3 / np.pi))


def shared_columns(found: Any, scan: Scan) -> dict[str, Any]:
    """Of a nodule or a candidate, the columns that both tables have."""
    centre_ras_mm = scan.grid.index_to_ras_mm(np.array(found.centre_zyx))
    x_mm, y_mm, z_mm = flip_xy(centre_ras_mm).tolist()
    i, j, k = scan.source_grid.ras_mm_to_index(centre_ras_mm).tolist()
    numbers = {
        "score": found.score,
        "score_std": found.score_std,
        "max_prob": found.max_prob,
        "x_lps_mm": x_mm,
        "y_lps_mm": y_mm,
        "z_lps_mm": z_mm,
        "i_source": i,
        "j_source": j,
        "k_source": k,
        "equivalent_diameter_mm": found.equivalent_diameter_mm,
    }
    return {
        "case_id": scan.scan_id,
        "series_uid": scan.series_uid,
        "nodule_id": found.nodule_id or "",
        "z_slice": round(found.centre_zyx[0]),
        **numbers_text(numbers),
    }


def numbers_text(numbers: dict[str, float | None]) -> dict[str, str]:
    """Numbers as tables hold them; "" for None."""
    return {name: "" if n is None else f"{n:.4f}" for name, n in numbers.items()}


def nodule_row(nodule: FoundNodule, scan: Scan) -> dict[str, Any]:
    """One row of nodules.csv."""
    numbers = {
        "long_axis_mm": nodule.long_axis_mm,
        "short_axis_mm": nodule.short_axis_mm,
        "volume_mm3": nodule.volume_mm3,
        "mean_hu": nodule.mean_hu,
        "pleura_distance_mm": nodule.pleura_distance_mm,
    }
    return {
        **shared_columns(nodule, scan),
        "side": nodule.side,
        **numbers_text(numbers),
    }
