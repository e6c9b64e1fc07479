"""Simulated gas that is not lung: bowel, stomach and hernia, drawn into soft tissue.

A network that has seen little abdomen takes bowel gas for lung. These painters put gas, stool
and gas above fluid into the body outside the lungs; the lung labels do not change.
"""

import math
from collections.abc import Sequence

import cv2
import numpy as np

BODY_HU = (-200.0, 250.0)
"""HU of the tissue into which gas is drawn: fat, muscle, organs and blood."""

PIECES = (2, 12)
"""Fewest and most pieces of bowel in a sample."""

RADIUS_MM = (5.0, 40.0)
"""Radius of a piece: small bowel to a full stomach."""

LOOP_MM = 140.0
"""Longest chain of balls that makes up a piece."""

GAS_HU, FLUID_HU, WALL_HU = (-1015.0, -930.0), (-10.0, 60.0), (10.0, 70.0)
STOOL_HU = (-750.0, -50.0)

WALL_MM = 2.5
"""Thickness of the wall around gas."""

APART_MM = 3.0
"""Least distance between drawn gas and the lungs; the diaphragm is thinner than this at 3 mm
voxels only where the labels are uncertain anyway."""


def paint_gas(
    hu: np.ndarray,
    lung: np.ndarray,
    spacing_mm: Sequence[float],
    rng: np.random.Generator,
) -> np.ndarray:
    """Draws pieces of bowel with gas, stool or an air-fluid level outside the lungs.

    Args:
        hu: (z, y, x) HU of any real dtype; y increases to the back.
        lung: (z, y, x), above 0 in the lungs; these voxels never change.
        spacing_mm: (z, y, x).
        rng: Source of all random choices.

    Returns:
        A new array with the shape and dtype of `hu`; unchanged without soft tissue.
    """
    result = hu.copy()
    room = (hu > BODY_HU[0]) & (hu < BODY_HU[1]) & ~near_lung(lung, spacing_mm)
    places = np.flatnonzero(room)
    if not len(places):
        return result
    for _ in range(rng.integers(PIECES[0], PIECES[1] + 1)):
        start = np.unravel_index(places[rng.integers(len(places))], hu.shape)
        distance_mm = loop_distance_mm(hu.shape, start, spacing_mm, rng)
        if distance_mm is None:
            continue
        box, inside_mm = distance_mm
        fill_piece(result[box], room[box], inside_mm, rng)
    return result


def near_lung(lung: np.ndarray, spacing_mm: Sequence[float]) -> np.ndarray:
    """Returns the (z, y, x) bool mask of a box of `APART_MM` around each voxel of the lungs.

    A box takes a ninth of the time that exact distances take.
    """
    reach = [2 * math.ceil(APART_MM / step) + 1 for step in spacing_mm]
    mask = (lung > 0).view(np.uint8)
    kernel = np.ones((reach[1], reach[2]), np.uint8)
    wide = np.stack([cv2.dilate(plane, kernel) for plane in mask]) > 0
    near = wide.copy()
    for k in range(1, reach[0] // 2 + 1):
        near[k:] |= wide[:-k]
        near[:-k] |= wide[k:]
    return near


def loop_distance_mm(
    shape: tuple[int, ...],
    start: Sequence[int],
    spacing_mm: Sequence[float],
    rng: np.random.Generator,
) -> tuple[tuple[slice, ...], np.ndarray] | None:
    """Draws a chain of balls and returns its box and depth below its surface in mm.

    The depth is positive inside. The chain wanders from `start` in steps of one radius.
    """
    step_mm = np.asarray(spacing_mm, float)
    radius_mm = math.exp(rng.uniform(*np.log(RADIUS_MM)))
    count = int(rng.uniform(1, 1 + LOOP_MM / (2 * radius_mm)))
    direction = rng.normal(size=3)
    centres = [np.asarray(start, float) * step_mm]
    for _ in range(count - 1):
        direction = direction + rng.normal(scale=0.8, size=3)
        direction /= np.linalg.norm(direction)
        centres.append(centres[-1] + direction * radius_mm)
    radii_mm = radius_mm * rng.uniform(0.7, 1.2, len(centres))
    low = np.min(centres, axis=0) - radii_mm.max()
    high = np.max(centres, axis=0) + radii_mm.max()
    first = np.maximum(np.floor(low / step_mm).astype(int), 0)
    last = np.minimum(np.ceil(high / step_mm).astype(int) + 1, shape)
    if (last <= first).any():
        return None
    box = tuple(slice(a, b) for a, b in zip(first.tolist(), last.tolist(), strict=True))
    axes = np.meshgrid(
        *(
            np.arange(part.start, part.stop, dtype=np.float32) * step
            for part, step in zip(box, spacing_mm, strict=True)
        ),
        indexing="ij",
        sparse=True,
    )
    depth = np.full([part.stop - part.start for part in box], -np.inf, np.float32)
    for centre, radius in zip(centres, radii_mm, strict=True):
        apart = sum((axis - c) ** 2 for axis, c in zip(axes, centre, strict=True))
        np.maximum(depth, radius - np.sqrt(apart), out=depth)
    return box, depth


def fill_piece(
    hu: np.ndarray, room: np.ndarray, depth_mm: np.ndarray, rng: np.random.Generator
) -> None:
    """Fills one piece with wall and content, in place and only within `room`."""
    content = room & (depth_mm > 0)
    wall = room & (depth_mm > -WALL_MM) & ~content
    hu[wall] = rng.uniform(*WALL_HU)
    gas_hu = rng.uniform(*GAS_HU)
    kind = rng.random()
    if kind < 0.5:
        hu[content] = gas_hu
    elif kind < 0.75:
        rows = np.flatnonzero(content.any(axis=(0, 2)))
        level = rng.uniform(rows[0], rows[-1] + 1) if len(rows) else 0
        above = np.arange(hu.shape[1])[None, :, None] < level
        hu[content & above] = gas_hu
        hu[content & ~above] = rng.uniform(*FLUID_HU)
    else:
        mottled = rng.uniform(*STOOL_HU, size=hu.shape).astype(np.float32)
        mottled[rng.random(hu.shape) < rng.uniform(0.1, 0.6)] = gas_hu
        hu[content] = mottled[content]
