"""Boxes in arrays of any number of axes: around masks, crops anywhere, tiles that cover.

A `Box` lies within its array. Crops and tiles have a start and a size and may reach beyond
it. Everything follows the order of the array's own axes.
"""

import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil, floor

import numpy as np

Box = tuple[slice, ...]
"""A slice of each axis, from 0 to its length."""

TILE_OVERLAP = 0.25
"""Least share of a tile that its neighbour covers too."""


def whole(shape: Sequence[int]) -> Box:
    """The box that is all of an array."""
    return tuple(slice(0, length) for length in shape)


def around(mask: np.ndarray, margin: int | Sequence[int] = 0) -> Box | None:
    """The smallest box that holds what is not 0, and a margin; None if all is 0.

    Args:
        mask: Of any shape; bool or labels.
        margin: How much wider it is at each end, where there is room; one for all axes, or
            one for each.
    """
    box: list[slice] = []
    for axis in range(mask.ndim):
        # Each axis is searched in the box of those before it, so that a small object
        # in a large volume costs little more than one pass.
        rest = tuple(a for a in range(mask.ndim) if a != axis)
        found = np.flatnonzero(mask[tuple(box)].any(axis=rest))
        if not len(found):
            return None
        box.append(slice(int(found[0]), int(found[-1]) + 1))
    return widened(tuple(box), margin, mask.shape)


def widened(box: Box, margin: int | Sequence[int], shape: Sequence[int]) -> Box:
    """A box with more at each end, where an array of this shape has it."""
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
    """The box of all voxels within some mm of a place along each axis, cut to `bounds`.

    Args:
        centre: Index of the place, fractions allowed.
        reach_mm: Of each axis.
        spacing_mm: Of each axis.
        bounds: Box it stays in; where it would lie outside, it is empty.
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
    """Which part of an array becomes the output, whose size stands beside it.

    Attributes:
        start: Element of the array at the output's first; may lie outside.
        pin: Output point that random turns and zooms leave in place.
    """

    start: tuple[int, ...]
    pin: tuple[float, ...]


def crop_at_centre(shape: Sequence[int], size: Sequence[int]) -> Crop:
    """The central part of an array; an odd element is left at the end."""
    start = ((full - part) // 2 for full, part in zip(shape, size, strict=True))
    return Crop(tuple(start), centre(whole(size)))


def crop_around(focus, shape: Sequence[int], size: Sequence[int]) -> Crop:
    """The crop with a point in its middle, kept within the array where it fits there."""
    pin = centre(whole(size))
    return Crop(_start(focus, pin, shape, size), pin)


def crop_on(focus, size: Sequence[int]) -> Crop:
    """The crop with a point in its middle, wherever the array ends."""
    pin = centre(whole(size))
    start = (round(at - place) for at, place in zip(focus, pin, strict=True))
    return Crop(tuple(start), pin)


def crop_near(focus, half, shape: Sequence[int], size: Sequence[int], share) -> Crop:
    """A crop that holds something whole, or its middle if it is larger; pinned to it.

    Args:
        focus: Middle of what it holds.
        half: Half of its size along each axis, and what shall stay free around it.
        shape: Of the array, in which the crop is kept where it fits.
        size: Of the crop.
        share: Where in the crop it lies along each axis, 0 to 1 of what is free.
    """
    lies = []
    for reach, part, fraction in zip(half, size, share, strict=True):
        low = min(reach, (part - 1) / 2)
        high = max(part - 1 - reach, (part - 1) / 2)
        lies.append(low + (high - low) * fraction)
    start = _start(focus, lies, shape, size)
    return Crop(start, tuple(a - b for a, b in zip(focus, start, strict=True)))


def centre(box: Box) -> tuple[float, ...]:
    """The point in the middle of a box."""
    return point_in(box, [0.5] * len(box))


def point_in(box: Box, share: Sequence[float]) -> tuple[float, ...]:
    """The point at a share, 0 to 1, of the way along each axis of a box."""
    return tuple(
        part.start + (part.stop - part.start - 1) * fraction
        for part, fraction in zip(box, share, strict=True)
    )


def _start(focus, lies, shape: Sequence[int], size: Sequence[int]) -> tuple[int, ...]:
    """Where the crop begins for `focus` to lie at `lies`, kept within the array."""
    return tuple(
        min(max(round(point - place), 0), full - part)
        if full >= part
        else (full - part) // 2
        for point, place, full, part in zip(focus, lies, shape, size, strict=True)
    )


def overlap(
    start: Sequence[int], size: Sequence[int], shape: Sequence[int]
) -> tuple[Box, Box]:
    """Where a part of some start and size and an array overlap: in the array, in the part."""
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
    """A part of an array, `fill` where it reaches beyond; not interpolated."""
    part = np.full(size, fill, array.dtype)
    inside, covered = overlap(start, size, array.shape)
    part[covered] = array[inside]
    return part


def add(array: np.ndarray, part: np.ndarray, start: Sequence[int]) -> None:
    """Adds a part to the array it lies on, in place."""
    inside, covered = overlap(start, part.shape, array.shape)
    array[inside] += part[covered]


@dataclass(frozen=True, eq=False)
class Tile:
    """One of the overlapping parts that cover a box; it may reach beyond the array.

    Attributes:
        start: Its first element in the array.
        along: Weights along each axis; an element's weight is their product.
    """

    start: tuple[int, ...]
    along: tuple[np.ndarray, ...]

    @property
    def weights(self) -> np.ndarray:
        """float32, of the tile's size."""
        return functools.reduce(np.multiply.outer, self.along)


def tiles(box: Box, size: Sequence[int]) -> list[Tile]:
    """Overlapping tiles that cover a box; their weights sum to 1 everywhere in it.

    A network sees tiles of the size it was trained on: of another size, the means of
    squeeze-excite and the reach of its widest kernels would be others.
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
    """The tiles of the box around a mask that hold any of it; none where all is 0."""
    box = around(mask)
    return [
        tile
        for tile in (tiles(box, size) if box else ())
        if mask[overlap(tile.start, size, mask.shape)[0]].any()
    ]


def tiles_along(low: int, high: int, size: int) -> list[tuple[int, np.ndarray]]:
    """Starts of evenly spread tiles from `low` to `high`, each with its (size,) weights.

    A single tile lies in the middle. Weights fall linearly to the borders, where a
    network sees least, and are scaled so that they sum to 1 everywhere.
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
