"""How well a mask fits a reference: overlap, surfaces in mm, nodules, intervals.

An undefined value is NaN, never 0 or 1. Masks are bool (z, y, x), spacings (z, y, x) mm.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from ct import boxes

MIN_IOU = 0.1
"""A reference nodule is hit by a component of at least this IoU, the criterion of
nnDetection (Baumgartner et al. 2021) and of PI-CAI for small objects in 3-D."""


class Counts(NamedTuple):
    """Voxels (or nodules) that agree and disagree; numbers, or arrays of equal shape."""

    tp: Any
    fp: Any
    fn: Any

    @property
    def dice(self) -> Any:
        """2 TP / (2 TP + FP + FN); NaN where reference and prediction are empty."""
        return ratio(2 * self.tp, 2 * self.tp + self.fp + self.fn)

    @property
    def iou(self) -> Any:
        """TP / (TP + FP + FN); NaN where reference and prediction are empty."""
        return ratio(self.tp, self.tp + self.fp + self.fn)

    @property
    def sensitivity(self) -> Any:
        """TP / (TP + FN); NaN where the reference is empty."""
        return ratio(self.tp, self.tp + self.fn)

    @property
    def precision(self) -> Any:
        """TP / (TP + FP); NaN where the prediction is empty."""
        return ratio(self.tp, self.tp + self.fp)


def ratio(numerator: Any, denominator: Any) -> Any:
    """`numerator / denominator`, NaN where the denominator is 0; float or array."""
    numerator = np.asarray(numerator, np.float64)
    denominator = np.asarray(denominator, np.float64)
    undefined = np.full(np.broadcast_shapes(numerator.shape, denominator.shape), np.nan)
    quotient = np.divide(numerator, denominator, out=undefined, where=denominator != 0)
    return float(quotient) if quotient.ndim == 0 else quotient


def count_voxels(mask_ref: np.ndarray, mask_pred: np.ndarray) -> Counts:
    """Counts of two bool masks of equal shape.

    Raises:
        ValueError: If the shapes differ; broadcasting would count silently.
    """
    if mask_ref.shape != mask_pred.shape:
        raise ValueError(
            f"reference has shape {mask_ref.shape}, prediction {mask_pred.shape}"
        )
    tp = int(np.count_nonzero(mask_ref & mask_pred))
    fp = int(np.count_nonzero(mask_pred)) - tp
    return Counts(tp, fp, int(np.count_nonzero(mask_ref)) - tp)


def dice(mask_ref: np.ndarray, mask_pred: np.ndarray) -> float:
    """Dice of two bool masks; NaN if both are empty."""
    return count_voxels(mask_ref, mask_pred).dice


@dataclass(frozen=True)
class SurfaceDistances:
    """Distances between two surfaces, each with the area it stands for.

    Attributes:
        ref_to_pred_mm: From each reference surface element to the predicted surface.
        pred_to_ref_mm: The other way.
        ref_mm2, pred_mm2: Areas of the elements, in the same order.
    """

    ref_to_pred_mm: np.ndarray
    pred_to_ref_mm: np.ndarray
    ref_mm2: np.ndarray
    pred_mm2: np.ndarray

    def hausdorff_mm(self, percent: float = 95.0) -> float:
        """Largest of both directions' percentiles by area; NaN if a mask is empty."""
        if not len(self.ref_mm2) or not len(self.pred_mm2):
            return float("nan")
        return max(
            _percentile_by_area(self.ref_to_pred_mm, self.ref_mm2, percent),
            _percentile_by_area(self.pred_to_ref_mm, self.pred_mm2, percent),
        )

    def dice(self, tolerance_mm: float) -> float:
        """Share of both surfaces' area within `tolerance_mm` of the other surface.

        0 if one mask is empty, NaN if both are.
        """
        # Distances are multiples of the spacing; one that equals the tolerance must not
        # exceed it by rounding.
        limit_mm = tolerance_mm + 1e-6
        near_mm2 = (
            self.ref_mm2[self.ref_to_pred_mm <= limit_mm].sum()
            + self.pred_mm2[self.pred_to_ref_mm <= limit_mm].sum()
        )
        return ratio(near_mm2, self.ref_mm2.sum() + self.pred_mm2.sum())


def _percentile_by_area(
    distances_mm: np.ndarray, areas_mm2: np.ndarray, percent: float
) -> float:
    """Distance that `percent` of the area does not exceed."""
    order = np.argsort(distances_mm)
    share = np.cumsum(areas_mm2[order])
    place = np.searchsorted(share, percent / 100 * share[-1])
    return float(distances_mm[order[min(place, len(order) - 1)]])


def surface_distances(
    mask_ref: np.ndarray, mask_pred: np.ndarray, spacing_mm: tuple[float, float, float]
) -> SurfaceDistances:
    """Distances in mm between the surfaces of two masks, exact for any spacing.

    The surface runs through the corners between voxels: a corner whose 2x2x2 voxels are
    not all alike is an element, and its area is that of the marching-cubes surface
    through the eight. Distances run from corner to corner, so they are multiples of the
    spacing along an axis.

    Args:
        mask_ref: (z, y, x) bool.
        mask_pred: (z, y, x) bool, the same shape.
        spacing_mm: (z, y, x).

    Reference: Nikolov et al. 2021, Clinically applicable segmentation of head and neck
        anatomy, with the areas of google-deepmind/surface-distance (tests compare both).
    """
    from scipy.spatial import cKDTree

    if mask_ref.shape != mask_pred.shape:
        raise ValueError(
            f"reference has shape {mask_ref.shape}, prediction {mask_pred.shape}"
        )
    points_ref, ref_mm2 = surface(mask_ref, spacing_mm)
    points_pred, pred_mm2 = surface(mask_pred, spacing_mm)
    if len(points_ref) and len(points_pred):
        ref_to_pred_mm, _ = cKDTree(points_pred).query(points_ref)
        pred_to_ref_mm, _ = cKDTree(points_ref).query(points_pred)
    else:
        ref_to_pred_mm = np.full(len(points_ref), np.inf)
        pred_to_ref_mm = np.full(len(points_pred), np.inf)
    return SurfaceDistances(ref_to_pred_mm, pred_to_ref_mm, ref_mm2, pred_mm2)


def surface(
    mask: np.ndarray, spacing_mm: tuple[float, float, float]
) -> tuple[np.ndarray, np.ndarray]:
    """The surface elements of a mask.

    Returns:
        (elements, 3) float64 place in mm of each corner along z, y, x from the corner
        before voxel (0, 0, 0), and (elements,) area in mm2.
    """
    box = boxes.around(mask)
    if box is None:
        return np.zeros((0, 3)), np.zeros(0)
    voxels = np.pad(mask[box], 1).astype(np.uint8)
    z, y, x = (size - 1 for size in voxels.shape)
    codes = np.zeros((z, y, x), np.uint8)
    for bit in range(8):
        dz, dy, dx = bit >> 2, bit >> 1 & 1, bit & 1
        codes |= voxels[dz : dz + z, dy : dy + y, dx : dx + x] << (7 - bit)
    corners = np.argwhere((codes > 0) & (codes < 255))
    areas_mm2 = element_areas_mm2(tuple(spacing_mm))[codes[tuple(corners.T)]]
    start = np.array([axis.start for axis in box])
    return (corners + start) * np.asarray(spacing_mm, np.float64), areas_mm2


@lru_cache(maxsize=16)
def element_areas_mm2(spacing_mm: tuple[float, float, float]) -> np.ndarray:
    """(256,) area of the surface through 2x2x2 voxels, by the bits of those inside.

    Bit 7 is voxel (0, 0, 0), bit 0 is (1, 1, 1). Where eight voxels leave a choice, the
    fewer voxels are the ones kept apart, so a mask and its complement have one surface.
    """
    from skimage.measure import marching_cubes, mesh_surface_area

    areas_mm2 = np.zeros(256)
    for code in range(1, 255):
        fewer = code if code.bit_count() <= 4 else 255 - code
        cube = np.array([fewer >> (7 - bit) & 1 for bit in range(8)], np.float32)
        vertices_mm, faces, _, _ = marching_cubes(
            cube.reshape(2, 2, 2), 0.5, spacing=spacing_mm, method="lorensen"
        )
        areas_mm2[code] = mesh_surface_area(vertices_mm, faces)
    return areas_mm2


@dataclass(frozen=True)
class NoduleMatch:
    """Which predicted components found which reference nodules.

    Attributes:
        labels_ref: (nodules,) labels of the reference nodules, rising.
        hit_by: (nodules,) label of the component that hit it; 0 for a miss.
        iou: (nodules,) IoU with that component, or with the best one for a miss.
        dice: (nodules,) Dice with the same component; 0 if none touches the nodule.
        component: (nodules,) label of that component; 0 if none touches the nodule.
        labels_pred: (components,) labels of the components, rising.
        hits: (components,) label of the nodule it hit; 0 for none.
        false_positive: (components,) bool; a component may be neither a hit nor this.
    """

    labels_ref: np.ndarray
    hit_by: np.ndarray
    iou: np.ndarray
    dice: np.ndarray
    component: np.ndarray
    labels_pred: np.ndarray
    hits: np.ndarray
    false_positive: np.ndarray


def match_nodules(
    labels_ref: np.ndarray,
    labels_pred: np.ndarray,
    marked: np.ndarray | None = None,
    *,
    min_iou: float = MIN_IOU,
) -> NoduleMatch:
    """Pairs predicted components with reference nodules, one to one.

    Pairs of the largest summed IoU are made among those of at least `min_iou`. A
    component left over is a false positive unless at least half of it lies in `marked`:
    a second piece of a nodule, or a finding that does not count (LUNA16's irrelevant
    findings), is neither a hit nor a false positive.

    Args:
        labels_ref: (z, y, x) integer labels of the nodules that count, 0 elsewhere.
        labels_pred: (z, y, x) integer labels of the components, 0 elsewhere.
        marked: (z, y, x) bool, what any reader marked; None for `labels_ref > 0`.
        min_iou: Smallest IoU of a hit.
    """
    inside = labels_pred > 0
    sizes_ref = np.bincount(labels_ref[labels_ref > 0], minlength=1)
    sizes_pred = np.bincount(labels_pred[inside], minlength=1)
    refs, preds = np.flatnonzero(sizes_ref), np.flatnonzero(sizes_pred)
    ref_in, pred_in = labels_ref[inside].astype(np.int64), labels_pred[inside]
    marks = ref_in > 0 if marked is None else marked[inside]
    marked_px = np.bincount(pred_in[marks], minlength=len(sizes_pred))
    shared = np.bincount(
        ref_in * len(sizes_pred) + pred_in, minlength=len(sizes_ref) * len(sizes_pred)
    ).reshape(len(sizes_ref), len(sizes_pred))[np.ix_(refs, preds)]
    total = sizes_ref[refs, None] + sizes_pred[preds]
    iou = shared / (total - shared)
    pairs = _pairs(iou, min_iou)
    hit_by, hits = np.zeros(len(refs), int), np.zeros(len(preds), int)
    hit_by[pairs[0]], hits[pairs[1]] = preds[pairs[1]], refs[pairs[0]]
    best = iou.argmax(axis=1) if len(preds) else np.zeros(len(refs), int)
    best[pairs[0]] = pairs[1]
    rows = np.arange(len(refs))
    nothing = np.zeros(len(refs))
    met = iou[rows, best] if len(preds) else nothing
    return NoduleMatch(
        labels_ref=refs,
        hit_by=hit_by,
        iou=met,
        dice=(2 * shared / total)[rows, best] if len(preds) else nothing,
        component=np.where(met > 0, preds[best], 0)
        if len(preds)
        else nothing.astype(int),
        labels_pred=preds,
        hits=hits,
        false_positive=(hits == 0) & (2 * marked_px[preds] < sizes_pred[preds]),
    )


def _pairs(iou: np.ndarray, min_iou: float) -> tuple[np.ndarray, np.ndarray]:
    """Row and column of each pair of the one-to-one assignment of largest summed IoU."""
    from scipy.optimize import linear_sum_assignment

    allowed = np.where(iou >= min_iou, iou, 0)
    rows, columns = linear_sum_assignment(allowed, maximize=True)
    made = allowed[rows, columns] > 0
    return rows[made], columns[made]


class Interval(NamedTuple):
    """A value and its bootstrap interval; NaN bounds if fewer than two patients give it."""

    value: float
    low: float
    high: float


def bootstrap(
    values: np.ndarray,
    patients: np.ndarray,
    statistic: Callable[[np.ndarray], np.ndarray],
    *,
    n: int = 2000,
    seed: int = 0,
    level: float = 0.95,
) -> Interval:
    """A statistic of summed cases with its percentile interval, resampling patients.

    Patients, not scans or nodules, are drawn with replacement: what one patient
    contributes is not independent. Draws whose statistic is undefined are left out.

    Args:
        values: (cases, columns) numbers that are summed over cases.
        patients: (cases,) patient of each case.
        statistic: Takes (..., columns) sums to (...) values, NaN if undefined.
        n: Number of draws.
        seed: Seed of the draws; equal seeds draw equal patients, so that two runs on
            the same cases can be compared draw by draw.
        level: Coverage of the interval.

    Reference: Efron and Tibshirani 1993, chapter 13 (percentile interval), by cluster.
    """
    values = np.asarray(values, np.float64)
    names, patient_of_case = np.unique(np.asarray(patients), return_inverse=True)
    sums = np.zeros((len(names), values.shape[1]))
    np.add.at(sums, patient_of_case, values)
    value = float(statistic(sums.sum(axis=0)))
    if np.count_nonzero(sums.any(axis=1)) < 2:
        return Interval(value, np.nan, np.nan)
    times = np.random.default_rng(seed).multinomial(
        len(names), np.full(len(names), 1 / len(names)), size=n
    )
    draws = statistic(times @ sums)  # (n,)
    draws = draws[np.isfinite(draws)]
    if not len(draws):
        return Interval(value, np.nan, np.nan)
    low, high = np.quantile(draws, [(1 - level) / 2, (1 + level) / 2])
    return Interval(value, float(low), float(high))


def mean_columns(values: np.ndarray) -> np.ndarray:
    """(cases, 2) columns for `bootstrap` with `mean_of_sums`; NaN cases do not count."""
    defined = np.isfinite(values)
    return np.stack([np.where(defined, values, 0), defined], axis=1)


def mean_of_sums(sums: np.ndarray) -> np.ndarray:
    """The mean of what `mean_columns` summed."""
    return ratio(sums[..., 0], sums[..., 1])


def bootstrap_mean(
    values: np.ndarray, patients: np.ndarray, **options: Any
) -> Interval:
    """Mean over the cases where `values` is defined, with its interval by patient."""
    return bootstrap(mean_columns(values), patients, mean_of_sums, **options)


def bootstrap_pooled(
    counts: np.ndarray, patients: np.ndarray, name: str, **options: Any
) -> Interval:
    """A ratio of `Counts` over the summed cases, with its interval by patient.

    Args:
        counts: (cases, 3) true positives, false positives, false negatives.
        patients: (cases,) patient of each case.
        name: "dice", "iou", "sensitivity" or "precision".
        **options: As of `bootstrap`.
    """
    return bootstrap(
        counts,
        patients,
        lambda sums: getattr(Counts(*np.moveaxis(sums, -1, 0)), name),
        **options,
    )


class Reliability(NamedTuple):
    """How often what is predicted with some probability holds, by bins of probability.

    Attributes:
        probability: (bins,) mean predicted probability; NaN in an empty bin.
        observed: (bins,) share of voxels that are foreground; NaN in an empty bin.
        voxels: (bins,) voxels.
        ece: Expected calibration error: mean |probability - observed| over the voxels.
    """

    probability: np.ndarray
    observed: np.ndarray
    voxels: np.ndarray
    ece: float


def reliability_counts(
    prob: np.ndarray, mask_ref: np.ndarray, *, bins: int = 20, least: float = 0.0
) -> np.ndarray:
    """(bins, 3) voxels, summed probability and foreground voxels; sums over cases add.

    Voxels of probability 0 outside of the reference are left out: there is more of them the
    larger the field of view is, and all would look well calibrated.

    Args:
        prob: Probabilities 0..1, any shape; not checked.
        mask_ref: bool, or the share of readers that drew each voxel; the same shape.
        bins: Bins of equal width.
        least: Voxels of at most this probability are left out too.
    """
    counted = (mask_ref > 0) | (prob > least)
    values, inside = prob[counted], mask_ref[counted].astype(np.float64)
    place = np.minimum((values * bins).astype(np.int64), bins - 1)
    return np.stack(
        [
            np.bincount(place, minlength=bins).astype(np.float64),
            np.bincount(place, weights=values, minlength=bins),
            np.bincount(place, weights=inside, minlength=bins),
        ],
        axis=1,
    )


def reliability(counts: np.ndarray) -> Reliability:
    """The reliability curve of `reliability_counts`.

    Reference: Guo et al. 2017, On calibration of modern neural networks, equation 3.
    """
    voxels, summed, inside = np.moveaxis(counts, -1, 0)
    ece = float(np.abs(summed - inside).sum() / voxels.sum())
    return Reliability(ratio(summed, voxels), ratio(inside, voxels), voxels, ece)
