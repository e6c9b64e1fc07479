"""Checks of lung labels: volumes, expected Dice, and reasons not to trust them.

The checks look for what goes wrong in practice: part of the lungs outside the field of
view, a lung that was not found, a volume whose orientation its header misstates. They
do not detect a volume mirrored left to right: in most patients the heart lies to the
left, but in some too little to tell.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from math import ceil
from typing import Literal

import numpy as np

from ct.scan import LEFT, RIGHT, Scan
from lungs.classical import AIRWAY_HU
from lungs.labels import border
from lungs.sides import TISSUE_HU, body_middle_x

LUNGS_ML = (500.0, 12_000.0)
"""Volume of an adult's lungs: from deep expiration in a small patient to emphysema."""

LUNG_ML = 100.0
"""Smallest volume of a lung; a smaller one counts as not found."""

SMALLEST_SHARE = 0.1
"""Smallest volume of a lung, relative to the other; a smaller one counts as not found."""

END_CM2 = 10.0
"""Largest area of lung in the first or last slice; more means that part of the lung
lies outside the field of view. In real scans that hold whole lungs the classical mask
leaves up to 5 cm2 there."""

FIELD_MM = (150.0, 200.0, 200.0)
"""Smallest (z, y, x) field of view that can hold the lungs of an adult."""

END_MM = 3.0
"""Depth of lung at a cut end, at least one slice, in which no nodules are searched: a
vessel or diaphragm of which only a disk is seen looks like a nodule."""

SLICE_MM = 10.0
"""Largest slice spacing; beyond it apices and bases of the lungs are guesses."""

LUNG_HU = (-980.0, -250.0)
"""Range of the median HU in a lung: above gas without tissue, below a completely filled
lung. In real scans it is -920 to -670."""

BORDER_STD = 0.3
"""Largest mean standard deviation over the passes in the outermost voxels of the mask;
passes that agree on no border at all would give 0.5."""

LEAST_SCORE = 0.9
"""Lowest Dice of a trusted mask, as its own probability map predicts it."""

END_SHARE = 0.25
"""Share of the slices with lung, at each end, used to distinguish head from feet."""

AIRWAY_MM = (50.0, 25.0)
"""Largest distance of the airway from the lungs' middle in y and the body's in x."""

SWAPPED_MM2 = 40.0
"""Excess of airway area near the feet above which head and feet look swapped. In six
real scans and eight phantoms a slice near the head has 82 to 242 mm2 more airway than
one near the feet, and 44 to 126 cm2 less tissue."""

BONE_HU = 400.0
"""Lower limit of HU in bone; above blood with contrast medium."""

BONE_MM = -5.0
"""Smallest distance of the middle of bone behind that of the lungs; below it, front and
back look swapped. In six real scans the distance is 9 to 91 mm."""


Searched = Literal["yes", "partly", "no", ""]


@dataclass(frozen=True)
class Verdict:
    """Assessment of lung labels.

    Attributes:
        right_ml, left_ml: Volumes of the lungs.
        score: Dice that the probability map itself predicts for its mask, 0 to 1.
        reasons: Reasons not to trust the labels, in plain words; empty if there are
            none.
        mended: What was left out of the labels because it cannot be lung.
        unsearched_ml: Volume of the labels that is not to be searched for nodules.
        nodules_searched: Whether nodules are searched in all, part or none of the lungs;
            "" if no run searches them.
    """

    right_ml: float
    left_ml: float
    score: float
    reasons: tuple[str, ...]
    mended: tuple[str, ...] = ()
    unsearched_ml: float = 0.0
    nodules_searched: Searched = "yes"


def judge(labels: np.ndarray, mean: np.ndarray, std: np.ndarray, scan: Scan) -> Verdict:
    """Computes volumes and score of lung labels and lists reasons not to trust them.

    Args:
        labels: (z, y, x) uint8 from `labels_from_map`.
        mean: (z, y, x) mean probability.
        std: (z, y, x) standard deviation over the passes.
        scan: Scan of the labels; its grid and HU are used.
    """
    right_ml, left_ml = volumes_ml(labels, scan.grid.voxel_mm3)
    score = expected_dice(labels, mean)
    if not labels.any():
        reasons = ["no lung was found"]
    else:
        reasons = [
            *wrong_volumes(right_ml, left_ml),
            *missing_parts(labels, scan.spacing_mm),
            *low_confidence(labels, std, score),
            *wrong_values(labels, scan.hu),
            *wrong_orientation(labels, scan.hu, scan.spacing_mm),
        ]
    reasons += small_field(labels.shape, scan.spacing_mm)
    return Verdict(right_ml, left_ml, score, tuple(reasons))


def searched_labels(labels: np.ndarray, doubtful: np.ndarray, scan: Scan) -> np.ndarray:
    """Returns the labels in which a search for nodules makes sense.

    Doubtful parts and the slices at a cut end are left out. Labels that look like no
    lungs at all are all left out.

    Args:
        labels: (z, y, x) uint8.
        doubtful: (z, y, x) bool, from `lungs.anatomy.second_opinion`.
        scan: Scan of the labels.

    Returns:
        (z, y, x) uint8.
    """
    trusted = np.where(doubtful, np.uint8(0), labels)
    if implausible(trusted, scan):
        return np.zeros_like(labels)
    depth = max(ceil(END_MM / scan.spacing_mm[0]), 1)
    for z, end in ((0, slice(depth)), (-1, slice(-depth, None))):
        if end_cm2(labels, scan.spacing_mm, z) > END_CM2:
            trusted[end] = 0
    return trusted


def implausible(labels: np.ndarray, scan: Scan) -> bool:
    """Tells whether labels as a whole cannot be lungs in the stated orientation.

    Lungs that the scan cuts can be of any size.
    """
    by_side_ml = volumes_ml(labels, scan.grid.voxel_mm3)
    least, most = LUNGS_ML
    cut = any(end_cm2(labels, scan.spacing_mm, z) > END_CM2 for z in (0, -1))
    if sum(by_side_ml) > most or (sum(by_side_ml) < least and not cut):
        return True
    wrong = sum(1 for _ in wrong_values(labels, scan.hu))
    if wrong == np.count_nonzero(by_side_ml):
        return True
    return any(wrong_orientation(labels, scan.hu, scan.spacing_mm))


def extent(labels: np.ndarray, searched: np.ndarray) -> Searched:
    """Returns whether all, part or none of the labels are searched."""
    if not searched.any():
        return "no"
    return "yes" if np.count_nonzero(labels) == np.count_nonzero(searched) else "partly"


def volumes_ml(labels: np.ndarray, voxel_mm3: float) -> tuple[float, float]:
    """Returns the volumes of the right and of the left lung in ml."""
    voxels = np.bincount(labels.ravel(), minlength=3)
    return float(voxels[RIGHT] * voxel_mm3 / 1000), float(
        voxels[LEFT] * voxel_mm3 / 1000
    )


def expected_dice(labels: np.ndarray, mean: np.ndarray) -> float:
    """Computes the Dice with the reference, assuming that every probability is right.

    This is 2 * (sum of the probabilities in the mask) / (its voxels + sum of all
    probabilities), the ratio of the expected values; 0 for an empty mask.
    """
    mask = labels > 0
    in_mask = float(mean[mask].sum(dtype=np.float64))
    total = float(mask.sum()) + float(mean.sum(dtype=np.float64))
    return 2 * in_mask / total if total else 0.0


def wrong_volumes(right_ml: float, left_ml: float) -> Iterator[str]:
    least, most = LUNGS_ML
    both_ml = right_ml + left_ml
    if not least <= both_ml <= most:
        yield (
            f"the lungs hold {both_ml / 1000:.2g} l; expected {least / 1000:g} to "
            f"{most / 1000:g} l"
        )
    for side, own_ml, other_ml in (
        ("right", right_ml, left_ml),
        ("left", left_ml, right_ml),
    ):
        if own_ml < max(LUNG_ML, SMALLEST_SHARE * other_ml) and own_ml <= other_ml:
            yield f"the {side} lung was not found: only {own_ml:.0f} ml were labelled"


def missing_parts(
    labels: np.ndarray, spacing_mm: tuple[float, float, float]
) -> Iterator[str]:
    for place, part, z in (("lowest", "bases", 0), ("highest", "apices", -1)):
        area_cm2 = end_cm2(labels, spacing_mm, z)
        if area_cm2 > END_CM2:
            yield (
                f"the {part} are cut off: {area_cm2:.0f} cm2 of lung in the {place} slice"
            )


def end_cm2(
    labels: np.ndarray, spacing_mm: tuple[float, float, float], z: int
) -> float:
    """Returns the area of lung in slice `z`, in cm2."""
    return float(np.count_nonzero(labels[z]) * spacing_mm[1] * spacing_mm[2] / 100)


def small_field(
    shape: tuple[int, ...], spacing_mm: tuple[float, float, float]
) -> Iterator[str]:
    sizes_mm = [length * mm for length, mm in zip(shape, spacing_mm, strict=True)]
    if any(size < least for size, least in zip(sizes_mm, FIELD_MM, strict=True)):
        found, expected = (
            " x ".join(f"{mm:.0f}" for mm in sizes) for sizes in (sizes_mm, FIELD_MM)
        )
        yield f"the field is {found} mm (z, y, x); expected {expected} or more"
    if spacing_mm[0] > SLICE_MM:
        yield (
            f"the slices are {spacing_mm[0]:.3g} mm apart; expected {SLICE_MM:g} or less"
        )


def low_confidence(labels: np.ndarray, std: np.ndarray, score: float) -> Iterator[str]:
    if score < LEAST_SCORE:
        yield (
            f"the probabilities predict a Dice of {score:.2f}; expected {LEAST_SCORE} or "
            "more"
        )
    border_std = float(std[border(labels > 0)].mean())
    if border_std > BORDER_STD:
        yield (
            f"the passes disagree on the border: standard deviation {border_std:.2f}; "
            f"expected {BORDER_STD} or less"
        )


def wrong_values(labels: np.ndarray, hu: np.ndarray) -> Iterator[str]:
    """Yields a reason for each lung whose median HU is implausible.

    Each lung is checked separately, since the median of both hides the smaller one.
    """
    least, most = LUNG_HU
    thin = (slice(None, None, 2),) * 3
    for side, label in (("right", RIGHT), ("left", LEFT)):
        values_hu = hu[thin][labels[thin] == label]
        if len(values_hu) and not least <= np.median(values_hu) <= most:
            yield (
                f"the median within the {side} lung is {np.median(values_hu):.0f} HU; "
                f"expected {least:.0f} to {most:.0f}"
            )


def wrong_orientation(
    labels: np.ndarray, hu: np.ndarray, spacing_mm: tuple[float, float, float]
) -> Iterator[str]:
    whole = all(end_cm2(labels, spacing_mm, z) <= END_CM2 for z in (0, -1))
    if whole and upside_down(labels, hu, spacing_mm):
        yield (
            "head and feet look swapped: an airway runs at the lower end of the lungs, "
            "and the upper end has more tissue around it"
        )
    back_mm = bone_behind_mm(labels, hu, spacing_mm)
    if back_mm < BONE_MM:
        yield (
            "front and back look swapped: the middle of bone lies "
            f"{-back_mm:.0f} mm in front of that of the lungs"
        )


def upside_down(
    labels: np.ndarray, hu: np.ndarray, spacing_mm: tuple[float, float, float]
) -> bool:
    """Tells whether airway and belly both lie at the wrong end of the lungs.

    Returns False when in doubt: gas in the gut can look like an airway, and arms beside
    the head add tissue. Labels that include the airway give no answer, so False as
    well.
    """
    slices = np.flatnonzero(labels.any(axis=(1, 2)))
    rows = np.flatnonzero(labels.any(axis=(0, 2)))
    count = max(int(len(slices) * END_SHARE), 1)
    centre = (rows[0] + rows[-1]) / 2, body_middle_x(hu)
    y, x = (
        slice(max(round(c - reach / mm), 0), max(round(c + reach / mm), 0) + 1)
        for c, reach, mm in zip(centre, AIRWAY_MM, spacing_mm[1:], strict=True)
    )
    airway, tissue = [], []
    for end in (slices[:count], slices[-count:]):
        air = (hu[end, y, x] < AIRWAY_HU) & (labels[end, y, x] == 0)
        airway.append(np.median(air.sum(axis=(1, 2))) * spacing_mm[1] * spacing_mm[2])
        tissue.append(np.count_nonzero(hu[end] > TISSUE_HU))
    return airway[0] - airway[1] > SWAPPED_MM2 and tissue[0] < tissue[1]


def bone_behind_mm(
    labels: np.ndarray, hu: np.ndarray, spacing_mm: tuple[float, float, float]
) -> float:
    """Returns how far the middle of bone lies behind that of the lungs, in mm.

    Only slices with lung are used. Returns 0 if they contain no bone.
    """
    lungs_y = np.flatnonzero(labels.any(axis=(0, 2)))
    with_lung = labels.any(axis=(1, 2))
    bone = (hu[with_lung] > BONE_HU).sum(axis=(0, 2))
    if not bone.any():
        return 0.0
    bone_y = np.average(np.arange(len(bone)), weights=bone)
    return float((bone_y - (lungs_y[0] + lungs_y[-1]) / 2) * spacing_mm[1])
