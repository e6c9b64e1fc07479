"""Simulation of pathology in HU, so that a network segments diseased lungs as well.

The lung labels do not change: drawn lesions belong to the lung. Circles follow a
published augmentation; the realistic findings have sizes in mm, textbook densities and
the noise of the scan they are drawn into. Arrays are (z, y, x), with z towards the head
and y towards the back of a supine patient; a single slice is treated as a volume of one
slice.
"""

import logging
import math
from collections.abc import Callable, Sequence, Set
from dataclasses import dataclass

import numpy as np

import config
from augment.lesion_paint import (
    BOTH_LUNGS,
    PAINTERS,
    RIM_MM,
    TRIES,
    Lung,
    Painter,
    build_lung,
    paint_nodule_lesion,
    place_at_pleura,
    point_in,
    write_rounded,
)
from augment.nodule_shapes import SHAPE_MM, SHAPES, check_shapes, drawn_shape
from augment.textures import measure_grain
from ct import boxes
from ct.boxes import Box
from ct.scan import LEFT, RIGHT
from nodules import shapes

log = logging.getLogger(__name__)

CIRCLES = (7, 9)
"""Minimum and maximum number of circles in a sample, as published."""

CIRCLE_RADIUS_MM = (4.0, 25.0)
CIRCLE_OPACITY = (0.2, 1.0)
CIRCLE_HU = 40.0
"""Own choices: the publication calls radius and transparency "random" and names no
colour. The radius spans nodule to mass, the opacity haze to solid; the HU are those of
soft tissue."""

NODULE_SHAPES = 256
NODULE_MM = (4.0, 30.0)
MOST_NODULES = 3
AT_PLEURA = 0.4
"""Number of shapes, diameter range, maximum number per sample and share at the pleura
of the nodules that a network learns to find."""

HAZY_HU, SOLID_HU = (-750.0, -300.0), (-60.0, 80.0)


@dataclass(frozen=True)
class Circle:
    """A disc in a slice, a ball in a volume.

    Attributes:
        centre_zyx: Voxel index of the centre.
        radius_mm: Radius.
        opacity: 0 to 1; 1 replaces the HU.
    """

    centre_zyx: tuple[float, ...]
    radius_mm: float
    opacity: float


def simulate_lesions(
    hu: np.ndarray,
    lung: np.ndarray,
    spacing_mm: Sequence[float],
    settings: config.Lesions,
    rng: np.random.Generator,
    *,
    held_out: Set[str],
) -> np.ndarray:
    """Draws lesions into HU with probability `settings.probability`.

    Realistic findings change only the lungs and a rim of `RIM_MM` around them; circles
    reach up to their radius beyond the boxes of the lungs.

    Args:
        hu: (y, x) or (z, y, x) HU of any real dtype.
        lung: Labels of the same shape, 1 in the right lung and 2 in the left; or a
            mask, which `split_lungs` turns into such labels.
        spacing_mm: Spacing of each axis.
        settings: Probability and kind of the lesions.
        rng: Source of all random choices.
        held_out: Patients of LIDC-IDRI whose outlines must not be used as nodule
            shapes.

    Returns:
        A new array with the shape and dtype of `hu`.

    Raises:
        ValueError: If the shapes do not match.
    """
    if hu.ndim not in (2, 3) or hu.shape != lung.shape or len(spacing_mm) != hu.ndim:
        raise ValueError(
            f"HU has shape {hu.shape}, lung {lung.shape}, spacings: {len(spacing_mm)}; "
            "expected equal (y, x) or (z, y, x) shapes and a spacing per axis"
        )
    result = hu.copy()
    if rng.random() >= settings.probability:
        return result
    volume = result.reshape((-1, *hu.shape[-2:]))
    labels = split_lungs(lung.reshape(volume.shape))
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
    """Draws up to `MOST_NODULES` nodules with probability `settings.probability`.

    Their shapes are outlines by LIDC-IDRI's readers.

    Args:
        hu: (z, y, x) int16.
        lung: (z, y, x) uint8, above 0 in the lungs; without lung voxels nothing is
            drawn.
        spacing_mm: (z, y, x) spacing.
        settings: Only `probability` and `nodule_kinds` are used.
        rng: Source of all random choices.
        held_out: Patients of LIDC-IDRI whose outlines must not be used as nodule
            shapes.
        seen: Returns True if a nodule may be centred at a voxel (z, y, x).
        places: (n, 3) candidate centres; one nodule is drawn at one of them.

    Returns:
        A new array like `hu`, and the (z, y, x) bool mask of the drawn nodules.
    """
    result, drawn = hu.copy(), np.zeros(hu.shape, bool)
    if rng.random() >= settings.probability or not lung.any():
        return result, drawn
    if places is not None and not len(places):
        return result, drawn
    mask = (lung > 0).view(np.uint8)
    rim = [0, *(math.ceil(RIM_MM / step) for step in spacing_mm[1:])]
    grain = measure_grain(result)
    own = build_lung(result, mask, rim, grain, spacing_mm, rng, held_out)
    most = MOST_NODULES if places is None else 1
    for _ in range(rng.integers(1, most + 1)):
        shape = drawn_shape(NODULE_SHAPES, NODULE_MM, held_out, rng)
        diameter_mm = shape.diameter_mm * rng.uniform(0.85, 1.15)
        if places is None:
            centre = nodule_centre(own, diameter_mm, rng, seen)
        else:
            centre = tuple(places[rng.integers(len(places))].tolist())
        kind = rng.choice(shapes.KINDS, p=settings.nodule_kinds)
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
    write_rounded(result, own.hu, own.open.view(bool))
    return result, drawn


def nodule_centre(
    lung: Lung,
    diameter_mm: float,
    rng: np.random.Generator,
    seen: Callable[[tuple[float, ...]], bool],
) -> tuple[float, ...] | None:
    """Draws the centre of a nodule, at the pleura or anywhere in the lung.

    Returns None if `TRIES` attempts give no centre that `seen` accepts.
    """
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
    """Returns the settings, or None if they ask for no lesions.

    Raises:
        ValueError: If nodules are the target and the reference would lack the lesions:
            only nodules drawn into volumes are added to it. Also if all outlines that
            give nodules their shape belong to held-out patients.
    """
    if settings is None or settings.probability == 0:
        return None
    nodules = settings.kind == "realistic" and settings.findings == ("nodule",)
    if batches.target == "nodule" and not (nodules and len(batches.input_px) == 3):
        raise ValueError(
            f"lesions.probability is {settings.probability} with batches.target=nodule, "
            "where lesions need 3-D input, lesions.kind=realistic and "
            "lesions.findings=nodule; use --lesions.probability 0 or, for volumes, "
            "--lesions.findings nodule"
        )
    if batches.target == "nodule":
        check_shapes(NODULE_SHAPES, NODULE_MM, held_out)
    elif settings.kind == "realistic" and "nodule" in settings.findings:
        check_shapes(SHAPES, SHAPE_MM, held_out)
    return settings


def split_lungs(lung: np.ndarray) -> np.ndarray:
    """Returns (z, y, x) uint8 labels, 1 right and 2 left, from labels or a plain mask.

    A mask with voxels in both outer thirds of the image is split midway between its
    first and last column. Any other mask is one lung, right or left by the half it lies
    in.
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
    """Returns the box of each lung that has voxels, by label.

    The labels 1 and 2 are distinct bits, so one pass along each axis finds both lungs.
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


def draw_circles(box_of: dict[int, Box], rng: np.random.Generator) -> list[Circle]:
    """Draws 7 to 9 circles centred in the lungs' boxes; none if a lung is missing.

    Each circle is in either lung with equal probability; centre, radius and opacity are
    uniform.

    Args:
        box_of: Box of each lung, by label.
        rng: Source of all random choices.
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
    """Blends circles into (z, y, x) HU one after the other, in place."""
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
        write_rounded(hu[box], blended, inside)


def paint_findings(
    hu,
    labels,
    box_of,
    spacing_mm,
    settings: config.Lesions,
    rng: np.random.Generator,
    held_out: Set[str],
) -> None:
    """Paints one to `settings.most` findings into (z, y, x) HU, in place.

    Effusion comes last, because fluid covers the other findings.
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
    grain = measure_grain(hu)
    rim = [0, *(math.ceil(RIM_MM / step) for step in spacing_mm[1:])]
    for side in sides:
        if painters[side]:
            box = boxes.grow_box(box_of[side], rim, labels.shape)
            mask = (labels[box] == side).view(np.uint8)
            lung = build_lung(hu[box], mask, rim, grain, spacing_mm, rng, held_out)
            for painter in painters[side]:
                painter(lung, rng)
            write_rounded(hu[box], lung.hu, lung.open.view(bool))
