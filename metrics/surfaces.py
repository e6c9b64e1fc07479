"""Distances between the surfaces of two masks."""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from ct import boxes
from metrics.overlap import ratio


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
