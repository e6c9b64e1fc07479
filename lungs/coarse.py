"""Processing of volumes slice by slice and on a coarser grid."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from math import ceil
from typing import Any

import cv2
import numpy as np

COARSE_MM = 2.0
"""Voxel size of the grid on which anatomy is found; it can be a little larger."""


def per_slice(function: Callable[..., Any], *volumes: np.ndarray) -> np.ndarray:
    """Applies `function` to every slice and stacks the results.

    Runs in threads, because OpenCV frees the GIL.
    """
    with ThreadPoolExecutor() as threads:
        return np.stack(list(threads.map(function, *volumes)))


def coarse_factors(spacing_mm: tuple[float, float, float]) -> tuple[int, int, int]:
    """Returns the number of voxels per coarse voxel along each axis."""
    z, y, x = (max(ceil(COARSE_MM / spacing - 0.1), 1) for spacing in spacing_mm)
    return z, y, x


def shrink(hu: np.ndarray, factors: tuple[int, int, int]) -> np.ndarray:
    """Averages blocks to float32 (z, y, x); the last block in z can be thinner."""
    size = (-(-hu.shape[2] // factors[2]), -(-hu.shape[1] // factors[1]))

    def smaller(image: np.ndarray) -> np.ndarray:
        return cv2.resize(image.astype(np.float32), size, interpolation=cv2.INTER_AREA)

    planes = per_slice(smaller, hu)
    starts = np.arange(0, len(planes), factors[0])
    sums = np.add.reduceat(planes, starts, axis=0)
    counts = np.diff(np.append(starts, len(planes)))
    return sums / counts[:, None, None].astype(np.float32)
