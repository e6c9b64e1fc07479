"""Parts of a lung mask that cannot be lung: gas of the gut, air outside the body, organs.

The network that draws the mask may take any dark or shaded region for lung. Anatomy is a
second opinion: lung holds vessels, hangs together with a lung, and lies inside the body.
The search runs on a coarse grid, where a scan takes less than a second.
"""

from dataclasses import dataclass

import cv2
import numpy as np

from ct import boxes
from lungs.checks import LUNG_HU
from lungs.classical import AIRWAY_HU, largest, lung_like
from lungs.coarse import coarse_factors, per_slice, shrink
from lungs.sides import distance_mm

AERATED_HU = -500.0
"""Upper limit of HU in normally aerated lung (Gattinoni et al. 2001). Diaphragm and wall
of the gut together are thicker than a coarse voxel, which therefore exceeds it."""

NECK_MM = 6.0
"""Width of a neck at which an aerated part ends: more than the spaces that noise and
partial volume leave in a sheet of tissue, less than a lobe."""

LEAST_ML = 2.0
"""Smallest aerated part that is examined: a ball of 16 mm."""

RIM_MM = 5.0
"""Depth of the mask that is removed with a part of gas: the wall of the gut, and a voxel
of the network."""

MAIN_SHARE = 0.25
"""Smallest main lung below all other lung, as a share of the largest one's volume; what is
smaller there is bowel or stomach with gas and contents."""

UNDER_SHARE = 0.1
"""Largest share of a part's columns with lung underneath, if the part is below the lungs.
The recess of the lung behind the dome of the diaphragm can lie below its rim."""

AROUND_SHARE = 0.5
"""Share of the surroundings of gas that lie in the mask; above it, the gas may be a
cavity in diseased lung, which belongs to the mask."""

TISSUE_ML = 100.0
"""Smallest part of tissue that is doubted; less than a kidney or a spleen."""

TISSUE_MM = 10.0
"""Smallest radius of a part of tissue; the vessels of the hilum are thinner."""

LUNG_SHARE = 0.1
"""Share of the surroundings of tissue that are aerated lung. A consolidation or an
effusion borders lung on one of its six sides at least, an organ of the belly hardly."""

NAMES = (
    "",
    "gas below the lungs",
    "air outside the body",
    "mask below the lungs",
    "tissue without aerated lung around it",
    "mask in a scan without a recognised lung",
    "gas in a scan without a recognised lung",
)
"""Names of the parts; `CLEAR` holds the indices of those that are removed."""

BELOW, OUTSIDE, APART, TISSUE, NO_LUNG, NO_LUNG_GAS = range(1, len(NAMES))
CLEAR = (BELOW, OUTSIDE, NO_LUNG_GAS)


@dataclass(frozen=True)
class Part:
    """A part of a mask that is not, or not surely, lung.

    Attributes:
        name: What it is.
        ml: Its volume within the mask.
        removed: True if the evidence is clear; else it stays and is not searched.
    """

    name: str
    ml: float
    removed: bool

    @property
    def text(self) -> str:
        """Says what was left out of the mask, or why not to trust it."""
        end = "were left out" if self.removed else "may be no lung"
        return f"{self.ml:.0f} ml of {self.name} {end}"


@dataclass(frozen=True, eq=False)
class Opinion:
    """Verdict of anatomy on lung labels.

    Attributes:
        labels: (z, y, x) uint8 labels without the removed parts.
        doubtful: (z, y, x) bool, the voxels of `labels` that may not be lung; all of them
            if no lung was found.
        parts: The removed and the doubtful parts, one for each name.
    """

    labels: np.ndarray
    doubtful: np.ndarray
    parts: tuple[Part, ...]


@dataclass(frozen=True, eq=False)
class Anatomy:
    """A mask and the body around it on the coarse grid; each array is (z, y, x).

    Attributes:
        mask: bool.
        hu: float32.
        outside: bool, see `outside_body`.
        inner: bool, aerated voxels of the mask at some depth, without partial volume.
        near: bool, the main lungs.
        spacing_mm: (z, y, x).
    """

    mask: np.ndarray
    hu: np.ndarray
    outside: np.ndarray
    inner: np.ndarray
    near: np.ndarray
    spacing_mm: tuple[float, ...]


def second_opinion(
    labels: np.ndarray,
    hu: np.ndarray,
    spacing_mm: tuple[float, float, float],
    *,
    remove: bool = True,
) -> Opinion:
    """Finds the parts of lung labels that cannot be lung, and removes those that are clear.

    Args:
        labels: (z, y, x) uint8, 1 right and 2 left.
        hu: (z, y, x) int16 in canonical orientation.
        spacing_mm: (z, y, x).
        remove: If False, what is clear stays in the labels and counts as doubtful.
    """
    factors = coarse_factors(spacing_mm)
    coarse_mm = tuple(s * f for s, f in zip(spacing_mm, factors, strict=True))
    coarse = shrink_labels(labels, factors) > 0
    box = boxes.bounding_box(coarse, [int(RIM_MM / step) + 2 for step in coarse_mm])
    if box is None:
        return Opinion(labels, labels > 0, ())
    coarse_hu = shrink(hu, factors)
    names = named_parts(
        coarse[box], coarse_hu[box], outside_body(coarse_hu)[box], coarse_mm
    )
    if not names.any():
        return Opinion(labels, np.zeros(labels.shape, bool), ())
    codes = np.zeros(coarse.shape, np.uint8)
    codes[box] = names
    codes = enlarged(codes, factors, labels.shape) * (labels > 0)
    voxels = [np.count_nonzero(codes == code) for code in range(len(NAMES))]
    clear = CLEAR if remove else ()
    parts = tuple(
        Part(
            NAMES[code], voxels[code] * float(np.prod(spacing_mm)) / 1000, code in clear
        )
        for code in range(1, len(NAMES))
        if voxels[code] * np.prod(spacing_mm) / 1000 >= 1
    )
    removed = np.isin(codes, clear)
    return Opinion(
        np.where(removed, np.uint8(0), labels), (codes > 0) & ~removed, parts
    )


def shrink_labels(labels: np.ndarray, factors: tuple[int, int, int]) -> np.ndarray:
    """Samples labels in the middle of each coarse voxel; (z, y, x) uint8."""
    middle = [
        np.minimum(np.arange(0, length, f) + f // 2, length - 1)
        for length, f in zip(labels.shape, factors, strict=True)
    ]
    return labels[np.ix_(*middle)]


def enlarged(
    coarse: np.ndarray, factors: tuple[int, int, int], shape: tuple[int, ...]
) -> np.ndarray:
    """Repeats coarse voxels to a (z, y, x) volume of the given shape."""
    for axis, factor in enumerate(factors):
        coarse = np.repeat(coarse, factor, axis=axis)
    z, y, x = shape
    return coarse[:z, :y, :x]


def outside_body(coarse_hu: np.ndarray) -> np.ndarray:
    """Finds air between the body and the border of each slice; (z, y, x) bool.

    Erosion separates the body from table and blankets, which count as outside.
    """
    import cc3d

    cross = cv2.getStructuringElement(cv2.MORPH_CROSS, (3, 3))
    tissue = (coarse_hu > AERATED_HU).astype(np.uint8)
    eroded = per_slice(lambda image: cv2.erode(image, cross), tissue)
    body = largest(cc3d.connected_components(eroded, connectivity=6))

    def outer(image: np.ndarray) -> np.ndarray:
        body = cv2.dilate(image, cross)
        air = np.pad(1 - body, 1, constant_values=1)
        _, parts = cv2.connectedComponents(air, connectivity=4)
        return (parts == parts[0, 0])[1:-1, 1:-1]

    return per_slice(outer, body.astype(np.uint8))


def named_parts(
    mask: np.ndarray,
    hu: np.ndarray,
    outside: np.ndarray,
    spacing_mm: tuple[float, ...],
) -> np.ndarray:
    """Finds what is no lung in a coarse mask.

    Args:
        mask: (z, y, x) bool.
        hu: (z, y, x) float32.
        outside: (z, y, x) bool, see `outside_body`.
        spacing_mm: (z, y, x).

    Returns:
        (z, y, x) uint8 index in `NAMES`, 0 in lung; it may reach beyond the mask.
    """
    import cc3d
    from scipy.ndimage import binary_dilation

    aerated = mask & (hu < AERATED_HU)
    inner = aerated & (distance_mm(aerated, spacing_mm) > NECK_MM / 2)
    lung = main_lungs(inner, hu, outside, spacing_mm)
    if not lung.any():
        # The wall of a slender chest is lost in erosion, and a narrow field has none.
        outside = np.zeros_like(outside)
        lung = main_lungs(inner, hu, outside, spacing_mm)
    if not lung.any():
        return parts_without_lung(mask, hu)
    near = distance_mm(~lung, spacing_mm) <= NECK_MM / 2 + max(spacing_mm)
    anatomy = Anatomy(mask, hu, outside, inner, near, spacing_mm)
    codes = np.zeros(mask.shape, np.uint8)
    codes[tissue_apart(mask & ~aerated, anatomy)] = TISSUE
    parts = cc3d.connected_components(aerated & ~near, connectivity=6)
    joined = np.unique(parts[binary_dilation(aerated & near, np.ones((3, 3, 3)))])
    large = np.bincount(parts.ravel()) * np.prod(spacing_mm) / 1000 >= LEAST_ML
    for number in np.setdiff1d(np.flatnonzero(large), [0, *joined]):
        part = parts == number
        code = kind_of(part, anatomy)
        if code:
            with_rim = part | around(part, spacing_mm)
            codes[with_rim & ~near] = code
    rest = cc3d.connected_components(mask & (codes == 0), connectivity=6)
    beside = np.unique(rest[binary_dilation(codes > 0)])
    large = np.bincount(rest.ravel()) * np.prod(spacing_mm) / 1000 >= LEAST_ML
    for number in np.setdiff1d(np.unique(rest), [0, *np.unique(rest[near])]):
        part = rest == number
        if number in beside:
            codes[part] = TISSUE
        elif large[number] and is_below(part, near):
            codes[part] = APART
    return codes


def parts_without_lung(mask: np.ndarray, hu: np.ndarray) -> np.ndarray:
    """Tells gas from tissue in a mask in which no part can be an aerated lung.

    Returns:
        (z, y, x) uint8 index in `NAMES`, 0 outside the mask.
    """
    import cc3d
    from scipy.ndimage import median

    pieces = cc3d.connected_components(mask, connectivity=6)
    medians_hu = median(hu, pieces, np.arange(int(pieces.max()) + 1))
    codes = np.where(medians_hu < LUNG_HU[0], NO_LUNG_GAS, NO_LUNG).astype(np.uint8)
    return codes[pieces] * mask


def main_lungs(
    inner: np.ndarray,
    hu: np.ndarray,
    outside: np.ndarray,
    spacing_mm: tuple[float, ...],
) -> np.ndarray:
    """Returns the cores in the body that are large and dense enough for a lung.

    Args:
        inner: (z, y, x) bool, aerated voxels at some depth.
        hu: (z, y, x) float32.
        outside: (z, y, x) bool.
        spacing_mm: (z, y, x).
    """
    import cc3d

    cores = cc3d.connected_components(inner, connectivity=6)
    # A narrow field of view cuts the chest wall, and part of a lung then seems outside.
    beyond = np.bincount(cores.ravel(), outside.ravel()) / np.bincount(cores.ravel())
    found = lung_like(cores * (beyond <= 0.5)[cores], hu, spacing_mm)
    voxels = np.bincount(cores[found], minlength=int(cores.max()) + 1)
    for number in np.flatnonzero((voxels > 0) & (voxels < MAIN_SHARE * voxels.max())):
        core = cores == number
        if is_below(core, found & ~core):
            found &= ~core
    return found


def tissue_apart(tissue: np.ndarray, anatomy: Anatomy) -> np.ndarray:
    """Returns the large parts of a mask without air that border hardly any lung.

    Args:
        tissue: (z, y, x) bool, voxels of the mask that are not aerated.
        anatomy: What is around them.
    """
    import cc3d

    spacing_mm = anatomy.spacing_mm
    deep = tissue & (distance_mm(tissue, spacing_mm) > TISSUE_MM)
    opened = (distance_mm(~deep, spacing_mm) <= TISSUE_MM) & anatomy.mask
    parts = cc3d.connected_components(opened & ~anatomy.near, connectivity=6)
    apart = np.bincount(parts.ravel()) * np.prod(spacing_mm) / 1000 >= TISSUE_ML
    apart[0] = False
    for number in np.flatnonzero(apart):
        apart[number] = (
            share_around(parts == number, anatomy.near, spacing_mm) < LUNG_SHARE
        )
    return apart[parts]


def kind_of(part: np.ndarray, anatomy: Anatomy) -> int:
    """Returns the index in `NAMES` of an aerated part that hangs on no lung; 0 for lung.

    Args:
        part: (z, y, x) bool.
        anatomy: What is around it.
    """
    core = part & anatomy.inner
    gas = np.median(anatomy.hu[core if core.any() else part]) < AIRWAY_HU
    if gas and anatomy.outside[part].mean() > 0.5:
        return OUTSIDE
    if not is_below(part, anatomy.near):
        return 0
    if gas and share_around(part, anatomy.mask, anatomy.spacing_mm) < AROUND_SHARE:
        return BELOW
    beside = share_around(part, anatomy.near, anatomy.spacing_mm) > 0
    return 0 if beside and not gas else APART


def is_below(part: np.ndarray, lung: np.ndarray) -> bool:
    """Tells whether a part lies in the lower half of the lungs with no lung underneath."""
    levels = np.flatnonzero(lung.any(axis=(1, 2)))
    z, y, x = np.nonzero(part)
    if z.max() > (levels[0] + levels[-1]) / 2:
        return False
    lowest = np.where(lung.any(axis=0), lung.argmax(axis=0), len(lung))
    return bool((lowest[y, x] < z).mean() <= UNDER_SHARE)


def share_around(
    part: np.ndarray, mask: np.ndarray, spacing_mm: tuple[float, ...]
) -> float:
    """Returns the share of the surroundings of a part that lie in a mask."""
    return float(mask[around(part, spacing_mm)].mean())


def around(part: np.ndarray, spacing_mm: tuple[float, ...]) -> np.ndarray:
    """Returns the voxels within `RIM_MM` of a part, at least its neighbours; bool."""
    reach_mm = max(RIM_MM, *spacing_mm)
    box = boxes.bounding_box(part, [int(reach_mm / step) + 1 for step in spacing_mm])
    found = np.zeros(part.shape, bool)
    if box is not None:
        found[box] = distance_mm(~part[box], spacing_mm) <= reach_mm
    return found & ~part
