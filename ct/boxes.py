"""Boxes in arrays of any number of axes: bounding boxes, crops and covering tiles.

A `Box` lies within its array. Crops and tiles have a start and a size and may reach
beyond it. Axes are always in the order of the array itself.
"""

import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil, floor

import numpy as np

Box = tuple[slice, ...]
"""One slice per axis, within 0 and the length of the axis."""

TILE_OVERLAP = 0.25
"""Smallest share of a tile that overlaps its neighbour."""


def full_box(shape: Sequence[int]) -> Box:
    """Returns the box that covers an entire array."""
    return tuple(slice(0, length) for length in shape)


def bounding_box(mask: np.ndarray, margin: int | Sequence[int] = 0) -> Box | None:
    """Returns the bounding box of nonzero elements plus a margin; None if all are 0.

    Args:
        mask: bool mask or labels of any shape.
        margin: Elements added at each end, as far as the array has room; one number for
            all axes, or one per axis.
    """
    box: list[slice] = []
    for axis in range(mask.ndim):
        # Each axis is searched only within the box found so far, so that a small object
        # in a large volume costs little more than one pass.
        rest = tuple(a for a in range(mask.ndim) if a != axis)
        found = np.flatnonzero(mask[tuple(box)].any(axis=rest))
        if not len(found):
            return None
        box.append(slice(int(found[0]), int(found[-1]) + 1))
    return grow_box(tuple(box), margin, mask.shape)


def grow_box(box: Box, margin: int | Sequence[int], shape: Sequence[int]) -> Box:
    """Returns a box grown by a margin at each end, cut to an array of this shape."""
    margins = np.broadcast_to(margin, len(box)).tolist()
    return tuple(
        slice(max(part.start - more, 0), min(part.stop + more, length))
        for part, more, length in zip(box, margins, shape, strict=True)
    )


def near(
    centre: Sequence[float] | np.ndarray,
    reach_mm: Sequence[float],
    spacing_mm: Sequence[float],
    bounds: Box,
) -> Box:
    """Returns the box of all voxels within `reach_mm` of a point along each axis.

    Args:
        centre: Index of the point, fractions allowed.
        reach_mm: Distance along each axis.
        spacing_mm: Voxel spacing of each axis.
        bounds: Box that the result is cut to; the result is empty where it lies
            outside.
    """
    box = []
    for place, reach, step, bound in zip(
        centre, reach_mm, spacing_mm, bounds, strict=True
    ):
        low = max(floor(place - reach / step), bound.start)
        high = min(ceil(place + reach / step) + 1, bound.stop)
        box.append(slice(low, max(high, low)))
    return tuple(box)


@dataclass(frozen=True)
class Crop:
    """Part of an array that becomes the output, whose size is passed separately.

    Attributes:
        start: Array element that becomes the output's first; may lie outside the array.
        pin: Output point that random rotations and zooms leave in place.
    """

    start: tuple[int, ...]
    pin: tuple[float, ...]


def crop_at_centre(shape: Sequence[int], size: Sequence[int]) -> Crop:
    """Returns the central crop; an odd leftover element stays at the end."""
    start = ((full - part) // 2 for full, part in zip(shape, size, strict=True))
    return Crop(tuple(start), centre(full_box(size)))


def crop_around(focus, shape: Sequence[int], size: Sequence[int]) -> Crop:
    """Returns the crop centred on a point, shifted into the array where it fits."""
    pin = centre(full_box(size))
    return Crop(_start(focus, pin, shape, size), pin)


def crop_on(focus, size: Sequence[int]) -> Crop:
    """Returns the crop centred on a point, even if it reaches beyond the array."""
    pin = centre(full_box(size))
    start = (round(at - place) for at, place in zip(focus, pin, strict=True))
    return Crop(tuple(start), pin)


def crop_near(focus, half, shape: Sequence[int], size: Sequence[int], share) -> Crop:
    """Returns a crop that contains an object; its pin is the object's centre.

    An object larger than the crop is centred in it.

    Args:
        focus: Centre of the object.
        half: Half the object's size along each axis, plus the margin to keep free.
        shape: Shape of the array; the crop stays within it where it fits.
        size: Size of the crop.
        share: Position of the object along each axis, 0 to 1 of the free range.
    """
    lies = []
    for reach, part, fraction in zip(half, size, share, strict=True):
        low = min(reach, (part - 1) / 2)
        high = max(part - 1 - reach, (part - 1) / 2)
        lies.append(low + (high - low) * fraction)
    start = _start(focus, lies, shape, size)
    return Crop(start, tuple(a - b for a, b in zip(focus, start, strict=True)))


def centre(box: Box) -> tuple[float, ...]:
    """Returns the centre point of a box."""
    return point_in(box, [0.5] * len(box))


def point_in(box: Box, share: Sequence[float]) -> tuple[float, ...]:
    """Returns the point at a share (0 to 1) of the way along each axis of a box."""
    return tuple(
        part.start + (part.stop - part.start - 1) * fraction
        for part, fraction in zip(box, share, strict=True)
    )


def _start(focus, lies, shape: Sequence[int], size: Sequence[int]) -> tuple[int, ...]:
    """Returns the start of a crop with `focus` at `lies`, kept within the array."""
    return tuple(
        min(max(round(point - place), 0), full - part)
        if full >= part
        else (full - part) // 2
        for point, place, full, part in zip(focus, lies, shape, size, strict=True)
    )


def overlap(
    start: Sequence[int], size: Sequence[int], shape: Sequence[int]
) -> tuple[Box, Box]:
    """Returns the overlap of a part and an array: its box in the array, in the part."""
    inside, covered = [], []
    for first, length, full in zip(start, size, shape, strict=True):
        low = max(first, 0)
        high = max(min(first + length, full), low)
        inside.append(slice(low, high))
        covered.append(slice(low - first, high - first))
    return tuple(inside), tuple(covered)


def cut(
    array: np.ndarray, start: Sequence[int], size: Sequence[int], *, fill: float
) -> np.ndarray:
    """Cuts a part out of an array, with `fill` outside of it; does not interpolate."""
    part = np.full(size, fill, array.dtype)
    inside, covered = overlap(start, size, array.shape)
    part[covered] = array[inside]
    return part


def add(array: np.ndarray, part: np.ndarray, start: Sequence[int]) -> None:
    """Adds a part to an array in place and ignores what lies outside the array."""
    inside, covered = overlap(start, part.shape, array.shape)
    array[inside] += part[covered]


@dataclass(frozen=True, eq=False)
class Tile:
    """One of the overlapping parts that cover a box; it may reach beyond the array.

    Attributes:
        start: Array index of its first element.
        along: Weights along each axis; the weight of an element is their product.
    """

    start: tuple[int, ...]
    along: tuple[np.ndarray, ...]

    @property
    def weights(self) -> np.ndarray:
        """Weight of each element; float32, shape of the tile."""
        return functools.reduce(np.multiply.outer, self.along)


def tiles(box: Box, size: Sequence[int]) -> list[Tile]:
    """Returns overlapping tiles that cover a box; their weights sum to 1 within it.

    A network needs tiles of the size it was trained on: another size would change the
    means of squeeze-excite and the reach of its widest kernels.
    """
    axes = [
        tiles_along(part.start, part.stop, length)
        for part, length in zip(box, size, strict=True)
    ]
    found = []
    for parts in itertools.product(*axes):
        start, along = zip(*parts, strict=True)
        found.append(Tile(start, along))
    return found


def tiles_on(mask: np.ndarray, size: Sequence[int]) -> list[Tile]:
    """Returns the tiles of a mask's bounding box that contain part of the mask."""
    box = bounding_box(mask)
    return [
        tile
        for tile in (tiles(box, size) if box else ())
        if mask[overlap(tile.start, size, mask.shape)[0]].any()
    ]


def tiles_along(low: int, high: int, size: int) -> list[tuple[int, np.ndarray]]:
    """Returns start and (size,) weights of evenly spaced tiles from `low` to `high`.

    A single tile is centred. Weights fall linearly towards the borders, where a network
    sees the least context, and are scaled to sum to 1 everywhere.
    """
    length = high - low
    if length <= size:
        return [((low + high - size) // 2, np.ones(size, np.float32))]
    count = int(np.ceil((length - size) / (size * (1 - TILE_OVERLAP)))) + 1
    starts = low + np.rint(np.linspace(0, length - size, count)).astype(int)
    ramp = np.minimum(np.arange(size), np.arange(size)[::-1]) + 1.0
    total = np.zeros(length)
    for start in starts - low:
        total[start : start + size] += ramp
    return [
        (int(start), (ramp / total[start - low :][:size]).astype(np.float32))
        for start in starts
    ]
