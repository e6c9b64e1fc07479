"""Overlap of a mask with a reference, and matching of components with nodules.

An undefined value is NaN, never 0 or 1. Masks are bool (z, y, x).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

MIN_IOU = 0.1
"""A component hits a reference nodule if their IoU is at least this value, the criterion of
nnDetection (Baumgartner et al. 2021) and of PI-CAI for small objects in 3-D."""


class Counts(NamedTuple):
    """True positives, false positives and false negatives, of voxels or nodules.

    The fields are numbers, or arrays of equal shape.
    """

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
    """Returns `numerator / denominator`, NaN where the denominator is 0; float or array."""
    numerator = np.asarray(numerator, np.float64)
    denominator = np.asarray(denominator, np.float64)
    undefined = np.full(np.broadcast_shapes(numerator.shape, denominator.shape), np.nan)
    quotient = np.divide(numerator, denominator, out=undefined, where=denominator != 0)
    return float(quotient) if quotient.ndim == 0 else quotient


def count_voxels(mask_ref: np.ndarray, mask_pred: np.ndarray) -> Counts:
    """Counts agreeing and disagreeing voxels of two bool masks of equal shape.

    Raises:
        ValueError: If the shapes differ; broadcasting would give wrong counts silently.
    """
    if mask_ref.shape != mask_pred.shape:
        raise ValueError(
            f"reference has shape {mask_ref.shape}, prediction {mask_pred.shape}; expected "
            "equal shapes"
        )
    tp = int(np.count_nonzero(mask_ref & mask_pred))
    fp = int(np.count_nonzero(mask_pred)) - tp
    return Counts(tp, fp, int(np.count_nonzero(mask_ref)) - tp)


def dice(mask_ref: np.ndarray, mask_pred: np.ndarray) -> float:
    """Computes the Dice of two bool masks; NaN if both are empty."""
    return count_voxels(mask_ref, mask_pred).dice


@dataclass(frozen=True)
class NoduleMatch:
    """Match of reference nodules with predicted components.

    Attributes:
        labels_ref: (nodules,) labels of the reference nodules, ascending.
        hit_by: (nodules,) label of the component that hit the nodule; 0 for a miss.
        iou: (nodules,) IoU with that component; for a miss, the largest IoU with any.
        dice: (nodules,) Dice with the same component; 0 if none touches the nodule.
        component: (nodules,) label of the same component; 0 if none touches the nodule.
        labels_pred: (components,) labels of the components, ascending.
        hits: (components,) label of the nodule that the component hit; 0 for none.
        false_positive: (components,) bool; a component may be neither a hit nor a false
            positive.
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
    """Matches predicted components with reference nodules, one to one.

    The matching maximises the summed IoU over pairs whose IoU is at least `min_iou`. A
    component without a partner is a false positive unless at least half of it lies in
    `marked`: a second piece of a nodule, or a finding that does not count (LUNA16's
    irrelevant findings), is neither a hit nor a false positive.

    Args:
        labels_ref: (z, y, x) integer labels of the nodules that count, 0 elsewhere.
        labels_pred: (z, y, x) integer labels of the components, 0 elsewhere.
        marked: (z, y, x) bool, voxels that any reader marked; None means
            `labels_ref > 0`.
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
    """Returns rows and columns of the one-to-one pairs with the largest summed IoU."""
    from scipy.optimize import linear_sum_assignment

    allowed = np.where(iou >= min_iou, iou, 0)
    rows, columns = linear_sum_assignment(allowed, maximize=True)
    made = allowed[rows, columns] > 0
    return rows[made], columns[made]


def only_slices(volume: np.ndarray, slices: Sequence[int] | None) -> np.ndarray:
    """Returns a (z, y, x) volume set to 0 outside the given slices; None keeps all."""
    if slices is None:
        return volume
    kept = np.zeros_like(volume)
    kept[list(slices)] = volume[list(slices)]
    return kept
