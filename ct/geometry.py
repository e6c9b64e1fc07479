"""Grids, orientation, and conversion back to the source's own grid.

Arrays are (z, y, x). In canonical orientation z increases towards the head (S), y
towards the back (P) and x towards the patient's left (L), the order in which axial CT
is stored and displayed. An affine maps an array index (z, y, x, 1) to (x, y, z, 1) in
RAS mm (NIfTI's world coordinates). DICOM, ITK and LUNA16 use LPS mm; names of such
values end in `_lps_mm`, and only `flip_xy` converts them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ct.boxes import Box

CANONICAL = ("S", "P", "L")
"""Direction in which each axis of a canonical (z, y, x) array increases."""


@dataclass(frozen=True, eq=False)
class Grid:
    """Shape and position of a volume.

    Attributes:
        shape: (z, y, x) number of voxels, or the file's own axis order for a source
            grid.
        affine: (4, 4) float64, array index -> RAS mm.
    """

    shape: tuple[int, int, int]
    affine: np.ndarray

    @property
    def spacing_mm(self) -> tuple[float, float, float]:
        """Distance between neighbouring voxels along each array axis."""
        z, y, x = np.linalg.norm(self.affine[:3, :3], axis=0).tolist()
        return z, y, x

    @property
    def voxel_mm3(self) -> float:
        """Volume of one voxel; exact for oblique and sheared axes."""
        return float(abs(np.linalg.det(self.affine[:3, :3])))

    def index_to_ras_mm(self, index: np.ndarray) -> np.ndarray:
        """Converts (..., 3) array indices, fractions allowed, to (..., 3) RAS mm."""
        return np.asarray(index) @ self.affine[:3, :3].T + self.affine[:3, 3]

    def ras_mm_to_index(self, points_ras_mm: np.ndarray) -> np.ndarray:
        """Converts (..., 3) points in RAS mm to (..., 3) fractional array indices."""
        offset = np.asarray(points_ras_mm) - self.affine[:3, 3]
        return offset @ np.linalg.inv(self.affine[:3, :3]).T

    def to_json(self) -> dict[str, Any]:
        return {"shape": list(self.shape), "affine": self.affine.tolist()}

    @classmethod
    def from_json(cls, record: dict[str, Any]) -> "Grid":
        return cls(tuple(record["shape"]), np.array(record["affine"], np.float64))


def canonical_grid(shape: Sequence[int], spacing_mm: Sequence[float]) -> Grid:
    """Returns a grid for an array in canonical orientation whose position is unknown.

    Args:
        shape: (z, y, x).
        spacing_mm: (z, y, x); the centre of the first voxel is at 0.

    Raises:
        ValueError: If the shape or the spacing is not three positive numbers.
    """
    spacings = np.asarray(spacing_mm, np.float64)
    if spacings.shape != (3,) or not (np.isfinite(spacings) & (spacings > 0)).all():
        raise ValueError(f"spacing_mm is {spacing_mm}; expected (z, y, x) mm above 0")
    if len(shape) != 3 or 0 in shape:
        raise ValueError(f"shape {tuple(shape)}; expected (z, y, x) above 0")
    affine = np.zeros((4, 4))
    affine[2, 0], affine[1, 1], affine[0, 2] = spacings * (1, -1, -1)
    affine[3, 3] = 1
    z, y, x = shape
    return Grid((z, y, x), affine)


def flip_xy(points_mm: np.ndarray) -> np.ndarray:
    """Converts (..., 3) points in mm between RAS and LPS: negates x and y."""
    return np.asarray(points_mm) * np.array([-1.0, -1.0, 1.0])


def to_canonical(array: np.ndarray, affine: np.ndarray) -> tuple[np.ndarray, Grid]:
    """Permutes and flips an array so that its axes increase towards S, P and L.

    Does not interpolate; an oblique volume gets the nearest orientation.

    Args:
        array: (i, j, k) voxels in any axis order.
        affine: (4, 4), index in `array` -> RAS mm.

    Returns:
        The (z, y, x) array, contiguous, and its grid.
    """
    from nibabel import orientations

    change = orientations.ornt_transform(
        orientations.io_orientation(affine), orientations.axcodes2ornt(CANONICAL)
    )
    turned = np.ascontiguousarray(orientations.apply_orientation(array, change))
    inverse = orientations.inv_ornt_aff(change, array.shape)
    return turned, Grid(turned.shape, np.asarray(affine, np.float64) @ inverse)


def to_source(array: np.ndarray, grid: Grid, source: Grid) -> np.ndarray:
    """Undoes `to_canonical`: returns voxels in the axis order of their source file.

    Args:
        array: (z, y, x) voxels on `grid`.
        grid: Canonical grid.
        source: Grid of the source file.

    Raises:
        ValueError: If `array` does not lie on `grid`, or the grids belong to two
            volumes.
    """
    from nibabel import orientations

    if array.shape != tuple(grid.shape):
        raise ValueError(
            f"array has shape {array.shape}; expected that of its grid, {grid.shape}"
        )
    change = orientations.ornt_transform(
        orientations.io_orientation(grid.affine),
        orientations.io_orientation(source.affine),
    )
    turned = np.ascontiguousarray(orientations.apply_orientation(array, change))
    back = grid.affine @ orientations.inv_ornt_aff(change, array.shape)
    if turned.shape != tuple(source.shape) or not np.allclose(
        back, source.affine, atol=1e-3
    ):
        raise ValueError(
            f"the canonical grid (shape {grid.shape}) is not a reoriented copy of the "
            f"source grid (shape {source.shape})"
        )
    return turned


@dataclass(frozen=True, eq=False)
class Mesh:
    """Voxel centres of a regular grid in mm: (z, 1, 1), (1, y, 1), (1, 1, x) arrays."""

    z: np.ndarray
    y: np.ndarray
    x: np.ndarray

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.z.size, self.y.size, self.x.size

    @property
    def spacing_mm(self) -> tuple[float, float, float]:
        steps = [
            float(a.flat[1] - a.flat[0]) if a.size > 1 else 1.0
            for a in (self.z, self.y, self.x)
        ]
        return steps[0], steps[1], steps[2]

    def part(self, box: Box) -> "Mesh":
        """Returns the mesh of a (z, y, x) box of voxels."""
        return Mesh(self.z[box[0]], self.y[:, box[1]], self.x[:, :, box[2]])

    def box_around(self, low_xyz, high_xyz) -> Box | None:
        """Returns the box of voxel centres between two corners in mm; None if empty."""
        spans = []
        for axis, low, high in zip(
            (self.z, self.y, self.x), low_xyz[::-1], high_xyz[::-1], strict=True
        ):
            first, last = np.searchsorted(axis.ravel(), (low, high))
            if first >= last:
                return None
            spans.append(slice(int(first), int(last)))
        return tuple(spans)


def mesh_from_axes(z_mm: np.ndarray, y_mm: np.ndarray, x_mm: np.ndarray) -> Mesh:
    axes = [np.asarray(axis, np.float32) for axis in (z_mm, y_mm, x_mm)]
    return Mesh(axes[0][:, None, None], axes[1][None, :, None], axes[2][None, None])
