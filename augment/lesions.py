"""Pathology simulated in HU, so that a network learns lungs whatever is in them.

The lung labels stay as they are: what is drawn belongs to the lung. Circles are those of
the study that `circles` cites; the realistic findings have sizes in mm, the densities that
textbooks give, and the grain of the scan they are drawn into. Arrays are (z, y, x), z to
the head and y to the back of a patient who lies on it; a slice is a volume of one.
"""

import functools
import logging
import math
from collections.abc import Callable, Sequence, Set
from dataclasses import dataclass

import cv2
import numpy as np

import config
from ct import boxes
from ct.boxes import Box
from ct.scan import LEFT, RIGHT
from phantoms import drawn_nodules

log = logging.getLogger(__name__)

CIRCLES = (7, 9)
"""Fewest and most circles in a sample, as published."""
CIRCLE_RADIUS_MM = (4.0, 25.0)
CIRCLE_OPACITY = (0.2, 1.0)
CIRCLE_HU = 40.0
"""Ours, as the published text says "random" of radius and transparency, and names no
colour: from a nodule to a mass, from haze to solid, soft tissue."""

RIM_MM = 2.0
RIM_HU = (-750.0, -50.0)
"""How far beyond the lung labels findings go, and over what: pixels that lung and chest
wall share would stay dark between wall and lesion. Darker ones are airways."""

GRAIN_SD_HU = 25.0
GRAIN_SIGMA_PX = 0.7
"""Noise where the scan has too little soft tissue to measure its own."""
MIN_SD_HU = 2.0
BLOCK_PX, BLOCK_ROWS = 8, 7
TISSUE_HU = (-20, 140)
"""Noise is measured in blocks whose mean is in this range, in some seven rows of them."""
GRAIN_SIDE_PX = 512
GRAIN_UNIT = 30
"""Side of the stored noise, and its value at one standard deviation: bytes, as much of the
time goes into fetching it from memory."""

CELLS_PX = 8.0
"""Distance between the cells of the stored honeycomb."""
CELLS_SHAPE = (48, 144, 144)
CELLS_UNIT = 400
"""Value in the stored honeycomb at one cell's width from a wall."""

SHAPES = 64
"""Outlined nodules of LIDC-IDRI that the nodules are shaped after."""
SHAPE_MM = (6.0, 30.0)
SHAPES_SEED = 20110
FEWEST_SHAPES = 32
"""With fewer left by patients who are held out, a warning."""

NODULE_SHAPES = 256
NODULE_MM = (4.0, 30.0)
MOST_NODULES = 3
AT_PLEURA = 0.4
"""Of the nodules that a network learns to find: how many shapes, their sizes, how many in a
sample at most, and which share lies at the pleura."""
HAZY_HU, SOLID_HU = (-750.0, -300.0), (-60.0, 80.0)

TRIES = 12
"""Points drawn for a place in the lung before all its voxels are listed."""

COARSE_MM = 2.0
"""Largest distance between the points at which smooth things are computed."""


@dataclass(frozen=True)
class Circle:
    """A disc in a slice, a ball in a volume.

    Attributes:
        centre_zyx: Voxel of its middle.
        radius_mm: Its radius.
        opacity: 1 hides what was there.
    """

    centre_zyx: tuple[float, ...]
    radius_mm: float
    opacity: float


@dataclass(frozen=True)
class Grain:
    """Noise of a scan: standard deviation, and width of its reconstruction's kernel."""

    sd_hu: float
    sigma_px: float


@dataclass(frozen=True, eq=False)
class Lung:
    """One lung, and what its painters need; arrays are (z, y, x) of its box.

    Attributes:
        hu: float32, which the painters change, also where the result is not used.
        mask: uint8, 1 in the lung.
        open: uint8, 1 where their result is used: in the lung, and in its rim.
        noise: int8, like the scan's own, for what is painted.
        noise_hu: HU of 1 in `noise`.
        spacing_mm: (z, y, x).
        held_out: Patients whose outlines shape no nodule.
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
        return boxes.whole(self.mask.shape)


@dataclass(frozen=True, eq=False)
class Field:
    """Where a painter works: a box of a lung, and coarser points in it.

    What is smooth is computed at points about `COARSE_MM` apart in a slice, and
    interpolated before it is cut off, which keeps borders sharp.

    Attributes:
        box: Voxels of the lung's box.
        shape: Points along z, y and x.
        offsets_mm: float32 distances of the points from a centre, to be broadcast.
        pitch_mm: Distance between points.
    """

    box: Box
    shape: tuple[int, int, int]
    offsets_mm: tuple[np.ndarray, np.ndarray, np.ndarray]
    pitch_mm: tuple[float, float, float]

    def enlarged(self, values: np.ndarray) -> np.ndarray:
        """Values at the points as values at the voxels of the box."""
        size_xy = span(self.box[2]), span(self.box[1])
        if size_xy == (self.shape[2], self.shape[1]):
            return values
        return apply_by_slice(lambda plane: cv2.resize(plane, size_xy), values)


Painter = Callable[[Lung, np.random.Generator], None]


def simulate(
    hu: np.ndarray,
    lung: np.ndarray,
    spacing_mm: Sequence[float],
    settings: config.Lesions,
    rng: np.random.Generator,
    *,
    held_out: Set[str],
) -> np.ndarray:
    """HU with lesions, in a share of `settings.probability` of the calls.

    Nothing changes but in the lungs and `RIM_MM` around them; circles reach as far as
    their radius beyond the boxes of the lungs.

    Args:
        hu: (y, x) or (z, y, x) HU of any real dtype.
        lung: Labels of the same shape, 1 in the right lung and 2 in the left; or one label,
            which is taken apart as `lung_sides` says.
        spacing_mm: Of each axis.
        settings: How often, and what.
        rng: Decides everything.
        held_out: Patients of LIDC-IDRI whose outlines shape no nodule.

    Returns:
        A new array with the shape and dtype of `hu`.

    Raises:
        ValueError: If shapes do not match.
    """
    if hu.ndim not in (2, 3) or hu.shape != lung.shape or len(spacing_mm) != hu.ndim:
        raise ValueError(
            f"HU {hu.shape}, lung {lung.shape} and {len(spacing_mm)} spacings; expected "
            "(y, x) or (z, y, x) of one shape, and a spacing per axis"
        )
    result = hu.copy()
    if rng.random() >= settings.probability:
        return result
    volume = result.reshape((-1, *hu.shape[-2:]))
    labels = lung_sides(lung.reshape(volume.shape))
    z_mm, y_mm, x_mm = (float(step) for step in (spacing_mm[-1], *spacing_mm)[-3:])
    box_of = lung_boxes(labels)
    if settings.kind == "circles":
        paint_circles(volume, draw_circles(box_of, rng), (z_mm, y_mm, x_mm))
    elif box_of:
        paint_findings(
            volume, labels, box_of, (z_mm, y_mm, x_mm), settings, rng, held_out
        )
    return result


def simulate_nodules(
    hu: np.ndarray,
    lung: np.ndarray,
    spacing_mm: tuple[float, float, float],
    settings: config.Lesions,
    rng: np.random.Generator,
    *,
    held_out: Set[str],
    seen: Callable[[tuple[float, ...]], bool] = lambda _: True,
    places: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """HU with one to `MOST_NODULES` nodules in a share of the calls, and where they are.

    They have the shapes that LIDC-IDRI's readers drew.

    Args:
        hu: (z, y, x) int16.
        lung: (z, y, x) uint8, not 0 in the lungs; nothing is drawn without.
        spacing_mm: (z, y, x).
        settings: `probability` and `nodule_kinds` count.
        rng: Decides everything.
        held_out: Patients of LIDC-IDRI whose outlines shape no nodule.
        seen: Whether the middle of a nodule may lie at a place (z, y, x).
        places: (n, 3) places; one nodule is drawn, its middle at one of them.

    Returns:
        A new array like `hu`, and the (z, y, x) bool mask of what was drawn.
    """
    result, drawn = hu.copy(), np.zeros(hu.shape, bool)
    if rng.random() >= settings.probability or not lung.any():
        return result, drawn
    if places is not None and not len(places):
        return result, drawn
    mask = (lung > 0).view(np.uint8)
    rim = [0, *(math.ceil(RIM_MM / step) for step in spacing_mm[1:])]
    grain = measured_grain(result)
    own = lung_in(result, mask, rim, grain, spacing_mm, rng, held_out)
    most = MOST_NODULES if places is None else 1
    for _ in range(rng.integers(1, most + 1)):
        shape = drawn_shape(NODULE_SHAPES, NODULE_MM, held_out, rng)
        diameter_mm = shape.diameter_mm * rng.uniform(0.85, 1.15)
        if places is None:
            centre = nodule_centre(own, diameter_mm, rng, seen)
        else:
            centre = tuple(places[rng.integers(len(places))].tolist())
        kind = rng.choice(drawn_nodules.KINDS, p=settings.nodule_kinds)
        solid_hu, hazy_hu = rng.uniform(*SOLID_HU), rng.uniform(*HAZY_HU)
        core = 1.0 if kind == "solid" else rng.uniform(0.3, 0.7)
        if centre is None:
            continue
        parts = []
        if kind != "solid":
            parts.append((diameter_mm, hazy_hu, False))
        if kind != "ground-glass":
            parts.append((core * diameter_mm, solid_hu, True))
        for size_mm, density_hu, hides in parts:
            box, inside = paint_nodule_lesion(
                own, shape, size_mm, centre, density_hu, hides=hides
            )
            drawn[box] |= inside
    drawn &= own.open.view(bool)
    put(result, own.hu, own.open.view(bool))
    return result, drawn


def nodule_centre(
    lung: Lung,
    diameter_mm: float,
    rng: np.random.Generator,
    seen: Callable[[tuple[float, ...]], bool],
) -> tuple[float, ...] | None:
    """Where a nodule may be drawn, at the pleura or anywhere; None if none was found."""
    at_pleura = rng.random() < AT_PLEURA
    inwards_mm = diameter_mm * rng.uniform(0.1, 0.5)
    for _ in range(TRIES):
        centre: tuple[float, ...] = (
            place_at_pleura(lung, rng, inwards_mm) if at_pleura else point_in(lung, rng)
        )
        if seen(centre):
            return centre
    return None


def checked_lesions(
    settings: config.Lesions | None, batches: config.Batches, held_out: Set[str]
) -> config.Lesions | None:
    """The settings, or None where they ask for no lesions.

    Raises:
        ValueError: If nodules are the target, and the reference would lack what is drawn:
            only nodules drawn into volumes are added to it. If all outlines that nodules
            are shaped after are those of patients who are held out.
    """
    if settings is None or settings.probability == 0:
        return None
    nodules = settings.kind == "realistic" and settings.findings == ("nodule",)
    if batches.target == "nodule" and not (nodules and len(batches.input_px) == 3):
        raise ValueError(
            f"lesions.probability is {settings.probability} with batches.target=nodule, "
            "whose reference lacks them; use --lesions.probability 0, or of volumes "
            "--lesions.findings nodule"
        )
    if batches.target == "nodule":
        check_shapes(NODULE_SHAPES, NODULE_MM, held_out)
    elif settings.kind == "realistic" and "nodule" in settings.findings:
        check_shapes(SHAPES, SHAPE_MM, held_out)
    return settings


def check_shapes(count: int, size_mm: tuple[float, float], held_out: Set[str]) -> None:
    """Says if few shapes are left for nodules by patients who are held out.

    Raises:
        ValueError: If none is.
    """
    left = sum(patient_of_shape(i, size_mm) not in held_out for i in range(count))
    if not left:
        raise ValueError(
            f"all {count} outlines of LIDC-IDRI that drawn nodules are shaped after are "
            "those of patients of the table who are not trained on; train on more of "
            "them (slice_idx.py), or use --lesions.probability 0"
        )
    if left < FEWEST_SHAPES:
        log.warning(
            "drawn nodules have %d of %d shapes: the others are outlines of patients of "
            "the table who are not trained on",
            left,
            count,
        )


def lung_sides(lung: np.ndarray) -> np.ndarray:
    """(z, y, x) uint8 labels, 1 right and 2 left, of labels or of a plain mask.

    A mask is cut at the middle between the columns where it begins and ends if it has
    voxels in both outer thirds of the image; else it is one lung, named by its half.
    """
    labels = lung.astype(np.uint8, copy=False)
    if labels.max(initial=0) != 1:
        return labels
    columns = np.flatnonzero(labels.any((0, 1)))
    width = labels.shape[2]
    first, last = int(columns[0]), int(columns[-1])
    middle = (first + last + 1) // 2
    if first >= width / 3 or last < 2 * width / 3:
        middle = width if first + last < width else 0
    labels = labels.copy()
    labels[..., middle:] *= LEFT
    return labels


def lung_boxes(labels: np.ndarray) -> dict[int, Box]:
    """The box of each lung that there is.

    The labels 1 and 2 are bits, so one pass along each axis finds both.
    """
    planes = np.bitwise_or.reduce(labels, axis=2)
    lines = [
        np.bitwise_or.reduce(planes, axis=1),
        np.bitwise_or.reduce(planes, axis=0),
        np.bitwise_or.reduce(labels, axis=(0, 1)),
    ]
    box_of = {}
    for side in (RIGHT, LEFT):
        found = [np.flatnonzero(line & side) for line in lines]
        if len(found[0]):
            box_of[side] = tuple(slice(int(at[0]), int(at[-1]) + 1) for at in found)
    return box_of


def apply_by_slice(
    function: Callable[[np.ndarray], np.ndarray], volume: np.ndarray
) -> np.ndarray:
    """A function of (y, x) on every slice of a volume."""
    if len(volume) == 1:
        return function(volume[0])[None]
    return np.stack([function(plane) for plane in volume])


def span(part: slice) -> int:
    return part.stop - part.start


def draw_circles(box_of: dict[int, Box], rng: np.random.Generator) -> list[Circle]:
    """7 to 9 circles whose centres lie in the boxes of the lungs; none if one is missing.

    Each is in either lung with the same probability; place, radius and opacity are
    uniform.

    Args:
        box_of: The box of each lung.
        rng: Draws them.
    """
    if len(box_of) < 2:
        return []
    circles = []
    count = rng.integers(CIRCLES[0], CIRCLES[1] + 1)
    for which, z, y, x, radius, opacity in rng.random((count, 6)).tolist():
        box = box_of[RIGHT if which < 0.5 else LEFT]
        circles.append(
            Circle(
                boxes.point_in(box, (z, y, x)),
                between(CIRCLE_RADIUS_MM, radius),
                between(CIRCLE_OPACITY, opacity),
            )
        )
    return circles


def between(ends: tuple[float, float], share: float) -> float:
    return ends[0] + (ends[1] - ends[0]) * share


def paint_circles(hu: np.ndarray, circles: Sequence[Circle], spacing_mm) -> None:
    """Blends circles with (z, y, x) HU one after the other, in place."""
    radii = np.array([circle.radius_mm for circle in circles])
    centres = np.array([circle.centre_zyx for circle in circles]).reshape(-1, 3)
    squares, ends = [], []
    for centre, length, step in zip(centres.T, hu.shape, spacing_mm, strict=True):
        offsets_mm = (np.arange(length) - centre[:, None]) * step
        squares.append((offsets_mm**2).astype(np.float32))
        low = np.ceil(centre - radii / step).clip(0, length)
        high = np.floor(centre + radii / step).clip(-1, length - 1) + 1
        ends.append(np.stack((low, high), 1).astype(int).tolist())
    for i, circle in enumerate(circles):
        box = z, y, x = tuple(slice(*end[i]) for end in ends)
        across = squares[1][i, y, None] + squares[2][i, x]
        inside = across <= radii[i] ** 2 - squares[0][i, z, None, None]
        blended = hu[box] * np.float32(1 - circle.opacity)
        blended += np.float32(circle.opacity * CIRCLE_HU)
        put(hu[box], blended, inside)


def put(part: np.ndarray, values: np.ndarray, where: np.ndarray) -> None:
    """Writes values into a part of the HU, rounded where these are whole numbers."""
    if np.issubdtype(part.dtype, np.integer):
        np.rint(values, out=values)
    np.copyto(part, values, where=where, casting="unsafe")


def paint_findings(
    hu,
    labels,
    box_of,
    spacing_mm,
    settings: config.Lesions,
    rng: np.random.Generator,
    held_out: Set[str],
) -> None:
    """Draws one to `settings.most` findings into (z, y, x) HU, in place.

    Fluid comes last, as it covers the others.
    """
    count = int(rng.integers(1, min(settings.most, len(settings.findings)) + 1))
    chosen = {
        settings.findings[i] for i in rng.permutation(len(settings.findings))[:count]
    }
    sides = list(box_of)
    painters: dict[int, list[Painter]] = {side: [] for side in sides}
    for finding, painter in PAINTERS.items():
        if finding in chosen:
            both = rng.random() < BOTH_LUNGS[finding]
            first = sides[rng.integers(len(sides))]
            for side in sides if both else [first]:
                painters[side].append(painter)
    grain = measured_grain(hu)
    rim = [0, *(math.ceil(RIM_MM / step) for step in spacing_mm[1:])]
    for side in sides:
        if painters[side]:
            box = boxes.widened(box_of[side], rim, labels.shape)
            mask = (labels[box] == side).view(np.uint8)
            lung = lung_in(hu[box], mask, rim, grain, spacing_mm, rng, held_out)
            for painter in painters[side]:
                painter(lung, rng)
            put(hu[box], lung.hu, lung.open.view(bool))


def lung_in(hu, mask, rim, grain: Grain, spacing_mm, rng, held_out) -> Lung:
    """A lung, given (z, y, x) HU and mask with `rim` voxels around it on each axis."""
    square = np.ones((2 * rim[1] + 1, 2 * rim[2] + 1), np.uint8)
    near = apply_by_slice(lambda plane: cv2.dilate(plane, square), mask)
    near &= ((hu > RIM_HU[0]) & (hu < RIM_HU[1])).view(np.uint8)
    near |= mask
    noise = grain_of(hu.shape, grain, rng)
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
    """Lays something over a lung.

    Args:
        lung: What is painted on.
        box: Where in it.
        opacity: (z, y, x) float32, 0 to 1.
        hu: Density where it is opaque, to which noise like the scan's is added.
        hides: False leaves what is denser, as haze leaves vessels.
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
    """A field of points in a box of a lung, and their distances from a centre."""
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
    """A field of points some mm to each side of a voxel."""
    box = boxes.near(centre_zyx, half_mm, lung.spacing_mm, lung.bounds)
    return field_in(lung, box, centre_zyx)


def point_in(lung: Lung, rng: np.random.Generator) -> tuple[int, int, int]:
    """A random voxel of the lung."""
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
    """A point some mm within the lung's border, seen from a random voxel of its slice."""
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


def measured_grain(hu: np.ndarray) -> Grain:
    """The noise of (z, y, x) HU, from small blocks of soft tissue without structure.

    A tenth of the blocks varies less than the one that counts: tissue has structure, and
    the estimate is rather too low than too high. The noise of neighbours is alike by
    exp(-1 / 4 sigma^2) where a Gaussian of width sigma smoothed it.
    """
    depth, height, width = hu.shape
    columns = width // BLOCK_PX
    starts = range(0, height - BLOCK_PX + 1, max(height // BLOCK_ROWS, BLOCK_PX))
    some = hu[:: max(depth // 4, 1), :, : columns * BLOCK_PX]
    lines = [some[:, y : y + BLOCK_PX] for y in starts]
    if not columns or not lines:
        return Grain(GRAIN_SD_HU, GRAIN_SIGMA_PX)
    values = np.concatenate(lines).astype(np.float32).reshape(-1, columns * BLOCK_PX)
    size_xy = columns, len(values) // BLOCK_PX
    means, squares = (
        cv2.resize(image, size_xy, interpolation=cv2.INTER_AREA)
        for image in (values, values * values)
    )
    variances = squares - means * means
    tissue = (means > TISSUE_HU[0]) & (means < TISSUE_HU[1])
    found = np.flatnonzero(tissue)
    if len(found) < 10:
        return Grain(GRAIN_SD_HU, GRAIN_SIGMA_PX)
    count = -(-len(found) // 10)
    least = found[np.argpartition(variances.ravel()[found], count - 1)[:count]]
    variance = max(float(variances.ravel()[least].max()), MIN_SD_HU**2)
    rows, at = np.divmod(least, columns)
    blocks = values.reshape(-1, BLOCK_PX, columns, BLOCK_PX)[rows, :, at]
    steps = np.diff(blocks, axis=2)
    alike = min(max(1 - float(np.mean(steps**2)) / (2 * variance), 0.02), 0.97)
    sigma = min(max(0.5 / math.sqrt(-math.log(alike)), 0.3), 3.0)
    return Grain(math.sqrt(variance), sigma)


def grain_of(shape: tuple[int, ...], grain: Grain, rng: np.random.Generator):
    """(z, y, x) int8 noise, alike within a slice but not from slice to slice.

    See `GRAIN_UNIT`.
    """
    count, height, width = shape
    field = grain_field(round(4 * grain.sigma_px))
    turns = [-(-length // GRAIN_SIDE_PX) for length in (height, width)]
    if max(turns) > 1:
        field = np.tile(field, turns)
    room = field.shape[0] - height + 1, field.shape[1] - width + 1
    starts = rng.integers(room, size=(count, 2)).tolist()
    return np.stack([field[y : y + height, x : x + width] for y, x in starts])


@functools.lru_cache(maxsize=16)
def grain_field(quarters: int) -> np.ndarray:
    """Noise smoothed by a Gaussian of `quarters` / 4 pixels; see `GRAIN_UNIT`."""
    side = GRAIN_SIDE_PX
    white = np.random.default_rng(quarters).standard_normal((side, side), np.float32)
    field = cv2.GaussianBlur(white, (0, 0), max(quarters, 1) / 4)
    field *= GRAIN_UNIT / field.std()
    return np.clip(np.rint(field), -128, 127).astype(np.int8)


def smooth_noise(field: Field, blob_mm: float, rng: np.random.Generator) -> np.ndarray:
    """(z, y, x) float32 noise of mean 0 at a field's points, in blobs of some mm.

    Normal numbers on a coarse grid, by cubic interpolation within slices and linear
    between them; the standard deviation is about 0.8.
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
    """(z, y, x) float32 of an ellipsoid: 0 in its middle, 1 on its surface."""
    z, y, x = (
        (offset * np.float32(1 / radius)) ** 2
        for offset, radius in zip(field.offsets_mm, radii_mm, strict=True)
    )
    return np.sqrt(z + (y + x))


def cut_off(field: Field, level: np.ndarray, soft: float) -> np.ndarray:
    """Opacity at the voxels: one half where the level is 1, over a width of `soft`."""
    opacity = field.enlarged((1 - level) * np.float32(1 / soft) + np.float32(0.5))
    return np.clip(opacity, 0, 1, out=opacity)


def drawn_radii(low: float, high: float, rng: np.random.Generator) -> list[float]:
    """Three radii about one drawn between two, in mm."""
    radius = rng.uniform(low, high)
    return (radius * rng.uniform(0.6, 1.4, 3)).tolist()


def ground_glass(lung: Lung, rng: np.random.Generator) -> None:
    """Haze with soft borders through which vessels are seen, -650 to -300 HU."""
    for _ in range(rng.integers(1, 3)):
        radii = drawn_radii(10, 50, rng)
        field = field_around(lung, point_in(lung, rng), [1.8 * r for r in radii])
        level = level_of(field, radii)
        level += np.float32(0.35) * smooth_noise(field, 12, rng)
        opacity = cut_off(field, level, rng.uniform(0.6, 1.2))
        opacity *= np.float32(rng.uniform(0.6, 1))
        paint(lung, field.box, opacity, rng.uniform(-650, -300), hides=False)


def consolidation(lung: Lung, rng: np.random.Generator) -> None:
    """Airspace filled to 10 to 70 HU, with rough borders; half with open bronchi."""
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
    """(z, y, x) share of air: thin lines, where smooth noise changes its sign."""
    course = np.abs(field.enlarged(smooth_noise(field, 16, rng)))
    where = 2 * smooth_noise(field, 14, rng) - 1
    lumen = np.clip(np.float32(1.3) - course * np.float32(20), 0, 1)
    lumen *= np.clip(field.enlarged(where), 0, 1)
    return lumen


def fibrosis(lung: Lung, rng: np.random.Generator) -> None:
    """A network under the pleura, -250 to 0 HU, in haze; half with honeycombs of air."""
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
    """(z, y, x) float32 distance to the lung's border within its slice, at the points."""
    size_xy = (field.shape[2], field.shape[1])
    distances = []
    for plane in lung.mask:
        small = cv2.resize(plane, size_xy, interpolation=cv2.INTER_NEAREST)
        room = cv2.copyMakeBorder(small, 1, 1, 1, 1, cv2.BORDER_CONSTANT)
        distances.append(cv2.distanceTransform(room, cv2.DIST_L2, 3)[1:-1, 1:-1])
    return np.stack(distances) * np.float32(field.pitch_mm[2])


def cell_walls(lung: Lung, cell_mm: float, wall_mm: float, rng) -> np.ndarray:
    """(z, y, x) float32 opacity, 1 on the walls between cells of some mm or more."""
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
    """An index into a row of `length` that is mirrored at its ends."""
    index %= 2 * length
    return min(index, 2 * length - 1 - index)


@functools.cache
def stored_cells() -> np.ndarray:
    """(z, y, x) uint8 distance to the walls between random cells; see `CELLS_UNIT`.

    Cells are the regions nearest to the points of a jittered grid (Worley 1996); half the
    difference between the distances to the nearest two is 0 on their walls. Within slices
    they are mirrored to three times the size.
    """
    from scipy.spatial import cKDTree

    rng = np.random.default_rng(0)
    counts = [int(length / CELLS_PX) + 4 for length in CELLS_SHAPE]
    grid = np.stack(np.meshgrid(*map(np.arange, counts), indexing="ij"), -1) - 1.5
    points = (grid + rng.uniform(-0.45, 0.45, grid.shape)).reshape(-1, 3) * CELLS_PX
    voxels = np.stack(
        np.meshgrid(*map(np.arange, CELLS_SHAPE), indexing="ij"), -1
    ).reshape(-1, 3)
    nearest, _ = cKDTree(points).query(voxels, k=2)
    walls = (nearest[:, 1] - nearest[:, 0]) * (CELLS_UNIT / 2 / CELLS_PX)
    cells = np.minimum(walls, 255).reshape(CELLS_SHAPE).astype(np.uint8)
    room = [(0, 0), *((length, length) for length in CELLS_SHAPE[1:])]
    return np.pad(cells, room, "symmetric")


def mass(lung: Lung, rng: np.random.Generator) -> None:
    """A spiculated tumour of 30 to 80 mm and 10 to 60 HU; half lie at the pleura."""
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
    if rng.random() < 0.3:  # dead inside
        core = cut_off(field, level + np.float32(0.1) * lobes + np.float32(0.5), 0.3)
        hu = np.float32(hu) - np.float32(rng.uniform(15, 35)) * core
    paint(lung, field.box, cut_off(field, level, border_mm(lung) / radius), hu)


def spicules(field: Field, distance_mm, longest: float, rng) -> np.ndarray:
    """(z, y, x) float32 share of the radius by which tapering spikes reach farther."""
    count = int(rng.integers(8, 21))
    directions = rng.standard_normal((count, 3))
    if field.shape[0] == 1:
        directions[:, 0] = 0  # else most would leave the slice
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    lengths = longest * rng.uniform(0.2, 1, count)
    widths = rng.uniform(0.05, 0.18, count)
    units = np.stack([offset / distance_mm for offset in field.offsets_mm])
    result = np.zeros(field.shape, np.float32)
    for direction, length, width in zip(directions, lengths, widths, strict=True):
        along = units[0] * np.float32(direction[0])
        along += units[1] * np.float32(direction[1])
        along += units[2] * np.float32(direction[2])
        # The angle to the spike is the root of 2 (1 - cosine), when it is small.
        angle = np.sqrt(np.maximum(2 - 2 * along, 0, out=along), out=along)
        angle *= np.float32(-length / width)
        angle += np.float32(length)
        np.maximum(result, angle, out=result)
    return result


def border_mm(lung: Lung) -> float:
    """The width over which the scan shows a sharp border."""
    return max(1.5 * lung.spacing_mm[2], 1.2)


def nodule(lung: Lung, rng: np.random.Generator) -> None:
    """One to four nodules of 6 to 30 mm at the pleura, shaped as LIDC's readers drew."""
    for _ in range(rng.integers(1, 5)):
        shape = drawn_shape(SHAPES, SHAPE_MM, lung.held_out, rng)
        diameter = shape.diameter_mm * rng.uniform(0.85, 1.15)
        centre = place_at_pleura(lung, rng, diameter * rng.uniform(0.1, 0.35))
        paint_nodule_lesion(lung, shape, diameter, centre, rng.uniform(-20, 80))


def paint_nodule_lesion(
    lung: Lung,
    shape: drawn_nodules.Shape,
    diameter_mm: float,
    centre_zyx: Sequence[float],
    hu: float,
    *,
    hides: bool = True,
) -> tuple[Box, np.ndarray]:
    """Draws a nodule of one density, unless no voxel's middle lies in it.

    Returns:
        The box it lies in, empty where that is not in the lung's, and its (z, y, x) bool
        mask there.
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
    shape: drawn_nodules.Shape, lung: Lung, box: Box, centre_zyx, diameter_mm: float
) -> np.ndarray:
    """(z, y, x) float32 distance in mm to a nodule's surface, negative inside."""
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


def drawn_shape(
    count: int,
    size_mm: tuple[float, float],
    held_out: Set[str],
    rng: np.random.Generator,
) -> drawn_nodules.Shape:
    """One of `count` shapes; in place of one of a patient who is held out, the next.

    Raises:
        ValueError: If all are.
    """
    first = int(rng.integers(count))
    for number in (*range(first, count), *range(first)):
        if patient_of_shape(number, size_mm) not in held_out:
            return nodule_shape(number, size_mm)
    raise ValueError(f"all {count} shapes are those of patients who are held out")


@functools.cache
def nodule_shape(number: int, size_mm: tuple[float, float]) -> drawn_nodules.Shape:
    """A shape whose diameter lies in a range; it is the same in every process."""
    return drawn_nodules.draw_shape(*start_of_shape(number, size_mm))


@functools.cache
def patient_of_shape(number: int, size_mm: tuple[float, float]) -> str:
    """The patient of LIDC-IDRI who has the nodule of `nodule_shape`."""
    return drawn_nodules.draw_annotation(*start_of_shape(number, size_mm))[1]


def start_of_shape(
    number: int, size_mm: tuple[float, float]
) -> tuple[np.random.Generator, float]:
    """What a shape is drawn by, and its diameter in mm."""
    rng = np.random.default_rng((SHAPES_SEED, number))
    return rng, float(np.exp(rng.uniform(*np.log(size_mm))))


def atelectasis(lung: Lung, rng: np.random.Generator) -> None:
    """A collapsed band along the back of the lung, 30 to 90 HU, under a wavy border."""
    collapse(lung, rng.uniform(0.05, 0.25), rng)


def collapse(lung: Lung, share: float, rng: np.random.Generator) -> None:
    """Collapses about a `share` of the lung, from the back."""
    z, y, x = lung.bounds
    level = fluid_level(lung.mask, share)
    top = max(level - math.ceil(25 / lung.spacing_mm[1]), 0)
    field = field_in(lung, (z, slice(top, y.stop), x), (0, level, 0))
    depth_mm = field.offsets_mm[1] + 8 * smooth_noise(field, 30, rng)
    depth_mm += np.float32(1.5) * smooth_noise(field, 5, rng)
    opacity = cut_off(field, 1 - depth_mm, rng.uniform(2, 8))
    paint(lung, field.box, opacity, rng.uniform(30, 90))


def effusion(lung: Lung, rng: np.random.Generator) -> None:
    """Fluid of 0 to 20 HU up to a level, at the back; most with collapsed lung above."""
    share = rng.uniform(0.04, 0.5)
    z, y, x = lung.bounds
    box = (z, slice(fluid_level(lung.mask, share), y.stop), x)
    if rng.random() < 0.7:
        collapse(lung, min(share + rng.uniform(0.03, 0.2), 0.8), rng)
    paint(lung, box, 1.0, rng.uniform(0, 20))


def fluid_level(mask: np.ndarray, share: float) -> int:
    """The row from which on the back of a lung holds `share` of its voxels, or more."""
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
"""In the order in which they are drawn over each other."""

BOTH_LUNGS: dict[config.LesionKind, float] = {
    "ground-glass": 0.5,
    "fibrosis": 0.8,
    "consolidation": 0.2,
    "mass": 0.0,
    "nodule": 0.3,
    "atelectasis": 0.4,
    "effusion": 0.4,
}
"""How often a finding is in both lungs."""
