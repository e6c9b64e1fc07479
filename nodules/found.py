"""Records of the nodules and candidates found in a scan."""

from dataclasses import dataclass, field
from typing import Literal

import numpy as np


@dataclass(frozen=True)
class FoundNodule:
    """One connected component of the mask.

    Attributes:
        nodule_id: Value in the mask; 1 has the highest score.
        score: Mean probability of its voxels; for a `NoduleFinder` see `Found`.
        score_std: Standard deviation over the passes, averaged over its voxels; None
            for one pass. For a `NoduleFinder` see `Candidate`.
        max_prob: Largest probability.
        centre_zyx: Centre of mass in voxels of the canonical array.
        volume_mm3: Number of voxels times the voxel volume.
        equivalent_diameter_mm: Diameter of the sphere of that volume.
        long_axis_mm: Longest diameter within an axial slice; see `axes_mm`.
        short_axis_mm: Longest diameter perpendicular to it in the same slice.
        mean_hu: Mean HU; None if HU were not given.
        side: "right" or "left", the lung in which most of it lies; "" if in none.
        pleura_distance_mm: Distance to the nearest voxel that is not lung, 0 if they
            touch; None if lungs were not given.
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
"""Networks that marked a candidate; `NoduleRuns` names them."""


@dataclass(frozen=True)
class Candidate:
    """A finding that a network marked, reported or not.

    Attributes:
        centre_zyx: Centre of its voxels in the canonical array, without the voxels of
            components that were merged into it.
        score: See `FoundNodule`.
        score_std: Standard deviation of the score; None for one pass without
            classifier.
        max_prob: Largest probability from the network that marked it; if two did, from
            the one with the higher score.
        equivalent_diameter_mm: Diameter of the sphere of its volume as marked, by both
            networks if two marked it.
        marked_by: Networks that marked it or a part of it.
        nodule_id: Id of the nodule that it became or became part of; 0 if its score was
            too low.
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
    """Nodules and candidates found in a scan.

    Attributes:
        labels: (z, y, x), 0 or the id of the nodule; 1 has the highest score.
        nodules: One per label, in this order. The score is the false-positive network's
            probability times the largest probability from the network that marked it;
            without a false-positive network, the mean probability of the voxels found.
            Sizes and positions are those of the outline.
        candidates: All candidates by falling score, including those not reported.
    """

    labels: np.ndarray
    nodules: list[FoundNodule]
    candidates: list[Candidate] = field(default_factory=list)
