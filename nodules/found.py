"""Records of what was found in a scan: nodules and candidates."""

from dataclasses import dataclass, field
from typing import Literal

import numpy as np


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


MarkedBy = Literal["volumes", "slices", "both"]
"""Which networks marked a candidate; `infer.NoduleRuns` names them."""


@dataclass(frozen=True)
class Candidate:
    """What a network marks, whether it is reported or not.

    Attributes:
        centre_zyx: Centre of its voxels in the canonical array, without those of another
            that is one with it.
        score: As of `FoundNodule`.
        score_std: Standard deviation of the score; None of one pass and no classifier.
        max_prob: Largest probability of the network that marked it; of two, of the one
            with the higher score.
        equivalent_diameter_mm: Of the sphere of its volume, as it was marked, by both if
            two did.
        marked_by: The networks that marked it, or a part of it.
        nodule_id: Of the nodule it became, or became a part of; 0 if its score was too
            low.
    """

    centre_zyx: tuple[float, float, float]
    score: float
    score_std: float | None
    max_prob: float
    equivalent_diameter_mm: float
    marked_by: MarkedBy
    nodule_id: int = 0


@dataclass(frozen=True, eq=False)
class Found:
    """What was found in a scan.

    Attributes:
        labels: (z, y, x), 0 or the number of the nodule; 1 has the highest score.
        nodules: One for each label, in this order. The score is the false-positive
            network's probability times the largest of the one that marked it, without it
            the mean probability of the voxels found; measures are those of the outline.
        candidates: By falling score, with those that are not reported.
    """

    labels: np.ndarray
    nodules: list[FoundNodule]
    candidates: list[Candidate] = field(default_factory=list)
