"""Distances between the surfaces of two masks."""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from ct import boxes
from metrics.overlap import ratio


@dataclass(frozen=True)
class SurfaceDistances:
    """Distances between two surfaces, each with the area of its surface element.

    Attributes:
        ref_to_pred_mm: Distance of each reference element from the predicted surface.
        pred_to_ref_mm: Distance of each predicted element from the reference surface.
        ref_mm2, pred_mm2: Areas of the elements, in the same order.
    """

    ref_to_pred_mm: np.ndarray
    pred_to_ref_mm: np.ndarray
    ref_mm2: np.ndarray
    pred_mm2: np.ndarray

    def hausdorff_mm(self, percent: float = 95.0) -> float:
        """Computes the larger directed percentile by area; NaN if a mask is empty."""
        if not len(self.ref_mm2) or not len(self.pred_mm2):
            return float("nan")
        return max(
            _percentile_by_area(self.ref_to_pred_mm, self.ref_mm2, percent),
            _percentile_by_area(self.pred_to_ref_mm, self.pred_mm2, percent),
        )

    def dice(self, tolerance_mm: float) -> float:
        """Computes the share of both surfaces' area within `tolerance_mm` of the other.

        The result is 0 if one mask is empty and NaN if both are.
        """
        # Along an axis, distances are multiples of the spacing; one that equals the
        # tolerance must not exceed it because of rounding.
        limit_mm = tolerance_mm + 1e-6
        near_mm2 = (
            self.ref_mm2[self.ref_to_pred_mm <= limit_mm].sum()
            + self.pred_mm2[self.pred_to_ref_mm <= limit_mm].sum()
        )
        return ratio(near_mm2, self.ref_mm2.sum() + self.pred_mm2.sum())


def _percentile_by_area(
    distances_mm: np.ndarray, areas_mm2: np.ndarray, percent: float
) -> float:
    """Returns the distance that `percent` of the area does not exceed."""
    order = np.argsort(distances_mm)
    share = np.cumsum(areas_mm2[order])
    place = np.searchsorted(share, percent / 100 * share[-1])
    return float(distances_mm[order[min(place, len(order) - 1)]])


def surface_distances(
    mask_ref: np.ndarray, mask_pred: np.ndarray, spacing_mm: tuple[float, float, float]
) -> SurfaceDistances:
    """Computes the distances in mm between the surfaces of two masks.

    Distances are exact for any spacing. The surface runs through the corners between
    voxels: a corner whose 2x2x2 voxels are not all equal is a surface element, with the area
    of the marching-cubes surface through these eight voxels. Distances are measured from
    corner to corner, so along an axis they are multiples of the spacing.

    Args:
        mask_ref: (z, y, x) bool.
        mask_pred: (z, y, x) bool, same shape.
        spacing_mm: (z, y, x).

    Reference: Nikolov et al. 2021, Clinically applicable segmentation of head and neck
        anatomy, with the areas of google-deepmind/surface-distance (tests compare both).
    """
    from scipy.spatial import cKDTree

    if mask_ref.shape != mask_pred.shape:
        raise ValueError(
            f"reference has shape {mask_ref.shape}, prediction {mask_pred.shape}; expected "
            "equal shapes"
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
    """Finds the surface elements of a mask.

    Returns:
        (elements, 3) float64 position of each corner in mm along z, y, x, measured from the
        corner before voxel (0, 0, 0), and (elements,) area in mm2.
    """
    box = boxes.bounding_box(mask)
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
    """Returns (256,) areas of the surface through 2x2x2 voxels, by the bits of the mask.

    Bit 7 is voxel (0, 0, 0), bit 0 is (1, 1, 1). If the surface is ambiguous, the voxels of
    the minority are separated, so that a mask and its complement have the same surface.
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
