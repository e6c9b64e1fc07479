"""Painters of simulated findings, such as ground glass, fibrosis and masses."""

import math
from collections.abc import Callable, Sequence, Set
from dataclasses import dataclass

import cv2
import numpy as np

import config
from augment.nodule_shapes import SHAPE_MM, SHAPES, drawn_shape
from augment.textures import (
    CELLS_PX,
    CELLS_UNIT,
    GRAIN_UNIT,
    Grain,
    draw_grain,
    stored_cells,
)
from ct import boxes
from ct.boxes import Box
from nodules import shapes

RIM_MM = 2.0
RIM_HU = (-750.0, -50.0)
"""Distance by which findings extend beyond the lung labels, and HU range of the voxels
they may cover there. Without this rim, voxels shared by lung and chest wall would leave
a dark seam between wall and lesion. Voxels below the range are airways."""

TRIES = 12
"""Random points tried for a place in the lung before all its voxels are listed."""

COARSE_MM = 2.0
"""Largest distance between the points at which smooth fields are computed."""


@dataclass(frozen=True, eq=False)
class Lung:
    """One lung as its painters see it; arrays are (z, y, x) and cover its box.

    Attributes:
        hu: float32 HU; the painters change it everywhere, but only the voxels in `open`
            are used.
        mask: uint8, 1 in the lung.
        open: uint8, 1 where painted HU are used: in the lung and its rim.
        noise: int8 noise like that of the scan, added to painted HU.
        noise_hu: HU of one unit of `noise`.
        spacing_mm: (z, y, x) spacing.
        held_out: Patients whose nodule outlines must not be used as shapes.
    """

    hu: np.ndarray
    mask: np.ndarray
    open: np.ndarray
    noise: np.ndarray
    noise_hu: float
    spacing_mm: tuple[float, float, float]
    held_out: Set[str]

    @property
    def bounds(self) -> Box:
        return boxes.full_box(self.mask.shape)


@dataclass(frozen=True, eq=False)
class Field:
    """A box of a lung with a grid of coarser points, on which a painter computes.

    Smooth fields are computed at points about `COARSE_MM` apart within a slice and
    interpolated before thresholding, which keeps borders sharp.

    Attributes:
        box: Voxels, as a part of the lung's box.
        shape: Number of points along z, y and x.
        offsets_mm: float32 z, y and x offsets of the points from a centre,
            broadcastable.
        pitch_mm: Distance between points along z, y and x.
    """

    box: Box
    shape: tuple[int, int, int]
    offsets_mm: tuple[np.ndarray, np.ndarray, np.ndarray]
    pitch_mm: tuple[float, float, float]

    def enlarged(self, values: np.ndarray) -> np.ndarray:
        """Interpolates values from the points to the voxels of the box."""
        size_xy = span(self.box[2]), span(self.box[1])
        if size_xy == (self.shape[2], self.shape[1]):
            return values
        return apply_by_slice(lambda plane: cv2.resize(plane, size_xy), values)


Painter = Callable[[Lung, np.random.Generator], None]


def apply_by_slice(
    function: Callable[[np.ndarray], np.ndarray], volume: np.ndarray
) -> np.ndarray:
    """Applies a function of (y, x) images to every slice of a volume."""
    if len(volume) == 1:
        return function(volume[0])[None]
    return np.stack([function(plane) for plane in volume])


def span(part: slice) -> int:
    return part.stop - part.start


def write_rounded(part: np.ndarray, values: np.ndarray, where: np.ndarray) -> None:
    """Writes values into a part of the HU, rounded if the HU are integers."""
    if np.issubdtype(part.dtype, np.integer):
        np.rint(values, out=values)
    np.copyto(part, values, where=where, casting="unsafe")


def build_lung(hu, mask, rim, grain: Grain, spacing_mm, rng, held_out) -> Lung:
    """Builds a lung from (z, y, x) HU and mask that include `rim` voxels around it."""
    square = np.ones((2 * rim[1] + 1, 2 * rim[2] + 1), np.uint8)
    near = apply_by_slice(lambda plane: cv2.dilate(plane, square), mask)
    near &= ((hu > RIM_HU[0]) & (hu < RIM_HU[1])).view(np.uint8)
    near |= mask
    noise = draw_grain(hu.shape, grain, rng)
    noise_hu = grain.sd_hu / GRAIN_UNIT
    hu = hu.astype(np.float32)
    return Lung(hu, mask, near, noise, noise_hu, spacing_mm, held_out)


def paint(
    lung: Lung,
    box: Box,
    opacity: np.ndarray | float,
    hu: np.ndarray | float,
    *,
    hides: bool = True,
) -> None:
    """Blends a density into a box of a lung, in place.

    Args:
        lung: Lung that is painted on.
        box: Part of the lung's box.
        opacity: (z, y, x) float32, 0 to 1.
        hu: Density at full opacity; noise like that of the scan is added.
        hides: Cover denser voxels as well; False keeps them visible, such as vessels in
            haze.
    """
    part = lung.hu[box]
    change = lung.noise[box] * np.float32(lung.noise_hu)
    change += hu
    change -= part
    if not hides:
        np.maximum(change, 0, out=change)
    change *= opacity
    part += change


def field_in(lung: Lung, box: Box, centre_zyx=(0.0, 0.0, 0.0)) -> Field:
    """Returns the field of a box of a lung, with offsets from a centre."""
    counts, pitches, offsets = [], [], []
    for axis, (part, centre, step) in enumerate(
        zip(box, centre_zyx, lung.spacing_mm, strict=True)
    ):
        coarse = max(int(COARSE_MM / step), 1) if axis else 1
        count = -(-span(part) // coarse)
        pitch = span(part) / max(count, 1)
        first = part.start - centre + 0.5 * pitch - 0.5
        at_mm = np.arange(count, dtype=np.float32)
        at_mm *= pitch * step
        at_mm += first * step
        counts.append(count)
        pitches.append(pitch * step)
        offsets.append(at_mm)
    z, y, x = offsets
    return Field(
        box,
        (counts[0], counts[1], counts[2]),
        (z[:, None, None], y[:, None], x),
        (pitches[0], pitches[1], pitches[2]),
    )


def field_around(lung: Lung, centre_zyx, half_mm) -> Field:
    """Returns the field that extends `half_mm` to each side of a voxel."""
    box = boxes.near(centre_zyx, half_mm, lung.spacing_mm, lung.bounds)
    return field_in(lung, box, centre_zyx)


def point_in(lung: Lung, rng: np.random.Generator) -> tuple[int, int, int]:
    """Draws a voxel of the lung."""
    depth, height, width = lung.mask.shape
    for z, y, x in rng.random((TRIES, 3)).tolist():
        point = int(z * depth), int(y * height), int(x * width)
        if lung.mask[point]:
            return point
    found = np.flatnonzero(lung.mask)
    at = found[rng.integers(len(found))]
    z, y, x = (int(i) for i in np.unravel_index(at, lung.mask.shape))
    return z, y, x


def place_at_pleura(
    lung: Lung, rng: np.random.Generator, inwards_mm: float
) -> tuple[float, float, float]:
    """Draws a point `inwards_mm` inside the lung's border.

    The border is where a ray in a random direction from a random voxel leaves the lung
    within its slice.
    """
    z, y, x = point_in(lung, rng)
    angle = rng.uniform(0, 2 * math.pi)
    across = math.sin(angle), math.cos(angle)
    _, height, width = lung.mask.shape
    steps = np.arange(height + width)
    rows = np.rint(y + across[0] * steps).astype(int)
    columns = np.rint(x + across[1] * steps).astype(int)
    within = (rows >= 0) & (rows < height) & (columns >= 0) & (columns < width)
    count = int(within.argmin())
    inside = lung.mask[z, rows[:count], columns[:count]]
    border = count if inside.all() else int(inside.argmin())
    _, y_mm, x_mm = lung.spacing_mm
    back = border - inwards_mm / math.hypot(across[0] * y_mm, across[1] * x_mm)
    return float(z), y + across[0] * back, x + across[1] * back


def smooth_noise(field: Field, blob_mm: float, rng: np.random.Generator) -> np.ndarray:
    """Draws smooth (z, y, x) float32 noise of mean 0 at the points of a field.

    Normal values on a grid of pitch `blob_mm` are interpolated, cubically within slices
    and linearly between them; the standard deviation is about 0.8.
    """
    _, height, width = field.shape
    knots = [
        int(count * step / blob_mm) + 2
        for count, step in zip(field.shape, field.pitch_mm, strict=True)
    ]
    if field.shape[0] == 1:
        knots[0] = 1
    values = rng.standard_normal(knots, np.float32)
    size_xy = (width, height)
    planes = apply_by_slice(
        lambda plane: cv2.resize(plane, size_xy, interpolation=cv2.INTER_CUBIC), values
    )
    if len(planes) == 1:
        return planes
    lower, share = np.divmod(np.arange(field.shape[0]) * field.pitch_mm[0] / blob_mm, 1)
    lower = lower.astype(int)
    share = share.astype(np.float32)[:, None, None]
    return planes[lower] * (1 - share) + planes[lower + 1] * share


def level_of(field: Field, radii_mm) -> np.ndarray:
    """Computes (z, y, x) float32 ellipsoid levels: 0 at the centre, 1 at the surface."""
    z, y, x = (
        (offset * np.float32(1 / radius)) ** 2
        for offset, radius in zip(field.offsets_mm, radii_mm, strict=True)
    )
    return np.sqrt(z + (y + x))


def cut_off(field: Field, level: np.ndarray, soft: float) -> np.ndarray:
    """Computes voxel opacity: 1/2 at level 1, with a linear ramp of width `soft`."""
    opacity = field.enlarged((1 - level) * np.float32(1 / soft) + np.float32(0.5))
    return np.clip(opacity, 0, 1, out=opacity)


def drawn_radii(low: float, high: float, rng: np.random.Generator) -> list[float]:
    """Draws three radii in mm, each 0.6 to 1.4 times one drawn from `low` to `high`."""
    radius = rng.uniform(low, high)
    return (radius * rng.uniform(0.6, 1.4, 3)).tolist()


def ground_glass(lung: Lung, rng: np.random.Generator) -> None:
    """Paints haze of -650 to -300 HU with soft borders; vessels stay visible."""
    for _ in range(rng.integers(1, 3)):
        radii = drawn_radii(10, 50, rng)
        field = field_around(lung, point_in(lung, rng), [1.8 * r for r in radii])
        level = level_of(field, radii)
        level += np.float32(0.35) * smooth_noise(field, 12, rng)
        opacity = cut_off(field, level, rng.uniform(0.6, 1.2))
        opacity *= np.float32(rng.uniform(0.6, 1))
        paint(lung, field.box, opacity, rng.uniform(-650, -300), hides=False)


def consolidation(lung: Lung, rng: np.random.Generator) -> None:
    """Paints rough consolidation of 10 to 70 HU, half the time with open bronchi."""
    radii = drawn_radii(15, 50, rng)
    field = field_around(lung, point_in(lung, rng), [1.6 * r for r in radii])
    level = level_of(field, radii)
    level += np.float32(0.3) * smooth_noise(field, 14, rng)
    level += np.float32(0.1) * smooth_noise(field, 4, rng)
    opacity = cut_off(field, level, rng.uniform(0.08, 0.3))
    hu = rng.uniform(10, 70)
    if rng.random() < 0.5:
        hu = np.float32(hu) - np.float32(900) * open_bronchi(field, rng)
    paint(lung, field.box, opacity, hu)


def open_bronchi(field: Field, rng: np.random.Generator) -> np.ndarray:
    """Draws (z, y, x) air fractions: thin lines along sign changes of smooth noise."""
    course = np.abs(field.enlarged(smooth_noise(field, 16, rng)))
    where = 2 * smooth_noise(field, 14, rng) - 1
    lumen = np.clip(np.float32(1.3) - course * np.float32(20), 0, 1)
    lumen *= np.clip(field.enlarged(where), 0, 1)
    return lumen


def fibrosis(lung: Lung, rng: np.random.Generator) -> None:
    """Paints a subpleural network of -250 to 0 HU in haze, half the time with honeycombing."""
    field = field_in(lung, lung.bounds)
    inwards = pleural_distance_mm(lung, field)
    zone = np.float32(0.5) * smooth_noise(field, 20, rng)
    zone += np.linspace(0.5, 1.3, field.shape[1], dtype=np.float32)[:, None]
    zone -= inwards * np.float32(1 / rng.uniform(6, 25))
    zone = np.clip(field.enlarged(zone), 0, 1)
    honeycomb = rng.random() < 0.5
    haze_hu, air_hu, wall_hu = (
        rng.uniform(low, high) for low, high in ((-750, -550), (-960, -880), (-250, 0))
    )
    paint(lung, field.box, zone * np.float32(0.7), haze_hu, hides=False)
    if honeycomb:
        air = np.clip(4 * zone - 2, 0, 1)
        air *= lung.mask  # none in the rim
        paint(lung, field.box, air, air_hu)
    wall = cell_walls(lung, rng.uniform(4, 8), rng.uniform(0.6, 1.4), rng)
    wall *= np.minimum(2 * zone, 1)
    paint(lung, field.box, wall, wall_hu, hides=False)


def pleural_distance_mm(lung: Lung, field: Field) -> np.ndarray:
    """Computes (z, y, x) float32 in-slice distances from points to the lung border."""
    size_xy = (field.shape[2], field.shape[1])
    distances = []
    for plane in lung.mask:
        small = cv2.resize(plane, size_xy, interpolation=cv2.INTER_NEAREST)
        room = cv2.copyMakeBorder(small, 1, 1, 1, 1, cv2.BORDER_CONSTANT)
        distances.append(cv2.distanceTransform(room, cv2.DIST_L2, 3)[1:-1, 1:-1])
    return np.stack(distances) * np.float32(field.pitch_mm[2])


def cell_walls(lung: Lung, cell_mm: float, wall_mm: float, rng) -> np.ndarray:
    """Returns (z, y, x) float32 opacity, 1 on the walls between honeycomb cells.

    Cells are `cell_mm` wide; wider if the lung exceeds the stored honeycomb.
    """
    stored = stored_cells()
    depth, *size = lung.mask.shape
    steps = [step * CELLS_PX / cell_mm for step in lung.spacing_mm]
    lengths = [
        min(math.ceil(count * step), full)
        for count, step, full in zip(size, steps[1:], stored.shape[1:], strict=True)
    ]
    y, x = (
        slice(start := int(rng.random() * (full - length + 1)), start + length)
        for length, full in zip(lengths, stored.shape[1:], strict=True)
    )
    first = rng.uniform(0, len(stored))
    planes = [
        cv2.resize(
            stored[reflected(int(first + z * steps[0]), len(stored)), y, x], size[::-1]
        )
        for z in range(depth)
    ]
    blur_mm = max(lung.spacing_mm[2], 0.7)
    to_wall_mm = np.arange(256) * (cell_mm / CELLS_UNIT)
    opacity = np.clip((wall_mm / 2 - to_wall_mm) / blur_mm + 0.5, 0, 1)
    return cv2.LUT(np.stack(planes), opacity.astype(np.float32))


def reflected(index: int, length: int) -> int:
    """Maps any index into a row of `length` elements that is mirrored at its ends."""
    index %= 2 * length
    return min(index, 2 * length - 1 - index)


def mass(lung: Lung, rng: np.random.Generator) -> None:
    """Paints a spiculated mass of 30 to 80 mm and 10 to 60 HU, half the time at the pleura."""
    radius = rng.uniform(15, 40)
    if rng.random() < 0.5:
        centre = place_at_pleura(lung, rng, radius * rng.uniform(0.4, 1))
    else:
        centre = point_in(lung, rng)
    longest = rng.uniform(0.15, 0.6)
    field = field_around(lung, centre, [radius * (1.2 + longest)] * 3)
    distance = level_of(field, [radius] * 3) + np.float32(1e-3)
    lobes = smooth_noise(field, radius * 0.7, rng)
    reach = 1 + np.float32(0.12) * lobes
    reach += spicules(field, distance * np.float32(radius), longest, rng)
    level = distance / reach
    hu = rng.uniform(10, 60)
    if rng.random() < 0.3:  # necrotic core
        core = cut_off(field, level + np.float32(0.1) * lobes + np.float32(0.5), 0.3)
        hu = np.float32(hu) - np.float32(rng.uniform(15, 35)) * core
    paint(lung, field.box, cut_off(field, level, border_mm(lung) / radius), hu)


def spicules(field: Field, distance_mm, longest: float, rng) -> np.ndarray:
    """Computes (z, y, x) float32 lengths of tapering spikes, in radii of the mass."""
    count = int(rng.integers(8, 21))
    directions = rng.standard_normal((count, 3))
    if field.shape[0] == 1:
        directions[:, 0] = 0  # otherwise most spikes would leave the slice
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    lengths = longest * rng.uniform(0.2, 1, count)
    widths = rng.uniform(0.05, 0.18, count)
    units = np.stack([offset / distance_mm for offset in field.offsets_mm])
    result = np.zeros(field.shape, np.float32)
    for direction, length, width in zip(directions, lengths, widths, strict=True):
        along = units[0] * np.float32(direction[0])
        along += units[1] * np.float32(direction[1])
        along += units[2] * np.float32(direction[2])
        # A small angle to the spike is about the square root of 2 (1 - cosine).
        angle = np.sqrt(np.maximum(2 - 2 * along, 0, out=along), out=along)
        angle *= np.float32(-length / width)
        angle += np.float32(length)
        np.maximum(result, angle, out=result)
    return result


def border_mm(lung: Lung) -> float:
    """Returns the width in mm over which the scan blurs a sharp border."""
    return max(1.5 * lung.spacing_mm[2], 1.2)


def nodule(lung: Lung, rng: np.random.Generator) -> None:
    """Paints one to four LIDC-shaped nodules of 6 to 30 mm at the pleura."""
    for _ in range(rng.integers(1, 5)):
        shape = drawn_shape(SHAPES, SHAPE_MM, lung.held_out, rng)
        diameter = shape.diameter_mm * rng.uniform(0.85, 1.15)
        centre = place_at_pleura(lung, rng, diameter * rng.uniform(0.1, 0.35))
        paint_nodule_lesion(lung, shape, diameter, centre, rng.uniform(-20, 80))


def paint_nodule_lesion(
    lung: Lung,
    shape: shapes.Shape,
    diameter_mm: float,
    centre_zyx: Sequence[float],
    hu: float,
    *,
    hides: bool = True,
) -> tuple[Box, np.ndarray]:
    """Paints a nodule of one density, unless it contains no voxel centre.

    Returns:
        The nodule's box, empty if it lies outside the lung's box, and the (z, y, x)
        bool mask of the nodule in it.
    """
    half_mm = [0.8 * diameter_mm] * 3
    box = boxes.near(centre_zyx, half_mm, lung.spacing_mm, lung.bounds)
    if not all(map(span, box)):
        return box, np.zeros([span(part) for part in box], bool)
    distance_mm = distances_to(shape, lung, box, centre_zyx, diameter_mm)
    inside = distance_mm < 0
    if not inside.any():
        return box, inside
    distance_mm *= np.float32(-1 / border_mm(lung))
    distance_mm += np.float32(0.5)
    paint(lung, box, np.clip(distance_mm, 0, 1), hu, hides=hides)
    return box, inside


def distances_to(
    shape: shapes.Shape, lung: Lung, box: Box, centre_zyx, diameter_mm: float
) -> np.ndarray:
    """Computes (z, y, x) float32 mm to a nodule's surface, negative inside."""
    scale = diameter_mm / shape.diameter_mm
    pitch_mm = scale * shape.pitch_mm
    depth, height, width = shape.field.shape
    step_z, step_y, step_x = (step / pitch_mm for step in lung.spacing_mm)
    matrix = np.array(
        [
            [step_x, 0, (box[2].start - centre_zyx[2]) * step_x + (width - 1) / 2],
            [0, step_y, (box[1].start - centre_zyx[1]) * step_y + (height - 1) / 2],
        ]
    )
    planes = []
    for z in range(box[0].start, box[0].stop):
        at = round((z - centre_zyx[0]) * step_z + (depth - 1) / 2)
        planes.append(
            cv2.warpAffine(
                shape.field[min(max(at, 0), depth - 1)],
                matrix,
                (span(box[2]), span(box[1])),
                flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP,
                borderMode=cv2.BORDER_REPLICATE,
            )
        )
    return np.stack(planes) * np.float32(scale)


def atelectasis(lung: Lung, rng: np.random.Generator) -> None:
    """Paints a wavy band of collapsed lung, 30 to 90 HU, along the back."""
    collapse(lung, rng.uniform(0.05, 0.25), rng)


def collapse(lung: Lung, share: float, rng: np.random.Generator) -> None:
    """Collapses about the fraction `share` of the lung, from the back."""
    z, y, x = lung.bounds
    level = fluid_level(lung.mask, share)
    top = max(level - math.ceil(25 / lung.spacing_mm[1]), 0)
    field = field_in(lung, (z, slice(top, y.stop), x), (0, level, 0))
    depth_mm = field.offsets_mm[1] + 8 * smooth_noise(field, 30, rng)
    depth_mm += np.float32(1.5) * smooth_noise(field, 5, rng)
    opacity = cut_off(field, 1 - depth_mm, rng.uniform(2, 8))
    paint(lung, field.box, opacity, rng.uniform(30, 90))


def effusion(lung: Lung, rng: np.random.Generator) -> None:
    """Paints fluid of 0 to 20 HU at the back, in 70 % of cases below collapsed lung."""
    share = rng.uniform(0.04, 0.5)
    z, y, x = lung.bounds
    box = (z, slice(fluid_level(lung.mask, share), y.stop), x)
    if rng.random() < 0.7:
        collapse(lung, min(share + rng.uniform(0.03, 0.2), 0.8), rng)
    paint(lung, box, 1.0, rng.uniform(0, 20))


def fluid_level(mask: np.ndarray, share: float) -> int:
    """Returns the row behind which at least `share` of the lung's voxels lie."""
    from_back = np.cumsum(mask.sum((0, 2), np.int64)[::-1])
    rows = int(np.searchsorted(from_back, share * from_back[-1])) + 1
    return mask.shape[1] - rows


PAINTERS: dict[config.LesionKind, Painter] = {
    "ground-glass": ground_glass,
    "fibrosis": fibrosis,
    "consolidation": consolidation,
    "mass": mass,
    "nodule": nodule,
    "atelectasis": atelectasis,
    "effusion": effusion,
}
"""Painter of each finding, in the order of painting; later ones cover earlier ones."""

BOTH_LUNGS: dict[config.LesionKind, float] = {
    "ground-glass": 0.5,
    "fibrosis": 0.8,
    "consolidation": 0.2,
    "mass": 0.0,
    "nodule": 0.3,
    "atelectasis": 0.4,
    "effusion": 0.4,
}
"""Probability that a finding affects both lungs."""
