"""Textures of simulated findings: noise like that of the scan, and honeycomb."""

import functools
import math
from dataclasses import dataclass

import cv2
import numpy as np

GRAIN_SD_HU = 25.0
GRAIN_SIGMA_PX = 0.7
"""Noise assumed for a scan with too little soft tissue to measure it."""

MIN_SD_HU = 2.0
BLOCK_PX, BLOCK_ROWS = 8, 7
TISSUE_HU = (-20, 140)
"""Noise is measured in blocks of `BLOCK_PX` pixels squared whose mean HU lies in
`TISSUE_HU`, in about `BLOCK_ROWS` rows of blocks per slice."""

GRAIN_SIDE_PX = 512
GRAIN_UNIT = 30
"""Side of the stored noise field, and its value at one standard deviation. The field is
stored as bytes because reading it from memory takes much of the time."""

CELLS_PX = 8.0
"""Distance between neighbouring cells of the stored honeycomb."""

CELLS_SHAPE = (48, 144, 144)
CELLS_UNIT = 400
"""Units of the stored honeycomb per cell width; larger distances than 255 units are
clipped."""


@dataclass(frozen=True)
class Grain:
    """Noise of a scan: standard deviation, and sigma of the correlating kernel."""

    sd_hu: float
    sigma_px: float


def measure_grain(hu: np.ndarray) -> Grain:
    """Measures the noise of (z, y, x) HU in small blocks of homogeneous soft tissue.

    The variance is the 10th percentile over the blocks: structure raises the variance
    of most blocks, and an estimate that is too low does less harm than one that is too
    high. A Gaussian of width sigma gives neighbouring pixels a correlation of exp(-1 /
    (4 sigma^2)), from which sigma is computed.
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


def draw_grain(shape: tuple[int, ...], grain: Grain, rng: np.random.Generator):
    """Draws (z, y, x) int8 noise, correlated within a slice but not between slices.

    See `GRAIN_UNIT` for its unit.
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
    """Returns int8 noise (see `GRAIN_UNIT`) of sigma `quarters` / 4 pixels."""
    side = GRAIN_SIDE_PX
    white = np.random.default_rng(quarters).standard_normal((side, side), np.float32)
    field = cv2.GaussianBlur(white, (0, 0), max(quarters, 1) / 4)
    field *= GRAIN_UNIT / field.std()
    return np.clip(np.rint(field), -128, 127).astype(np.int8)


@functools.cache
def stored_cells() -> np.ndarray:
    """Computes (z, y, x) uint8 distances to the walls of random cells.

    `CELLS_UNIT` gives the unit. A cell is the region nearest to one point of a jittered
    grid (Worley 1996). Half the difference between the distances to the two nearest
    points is 0 on the walls. Slices are extended by mirroring to three times their
    width and height.
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
