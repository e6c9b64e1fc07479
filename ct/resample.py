"""Resampling of HU and masks to cubic voxels.

Resampling is one linear map along each axis, so a volume, its masks and each reader's
outline move together, and the new affine gives the exact positions of the new voxels.
"""

from collections.abc import Sequence

import numpy as np

from ct import boxes
from ct.geometry import Grid

HALF = 0.5 - 1e-6
"""Share of a new voxel that a mask must fill, less a rounding error of float32."""


def isotropic(
    grid: Grid, spacing_mm: float
) -> tuple[tuple[np.ndarray, ...], np.ndarray]:
    """Computes the weights that resample a grid to cubic voxels around the same centre.

    Args:
        grid: Grid of the volume.
        spacing_mm: New distance between voxels along every axis.

    Returns:
        The weights for `volume`, and the (4, 4) affine of the result. The result covers
        all of `grid` and adds less than one new voxel along each axis.
    """
    weights, start = [], []
    for length, old_mm in zip(grid.shape, grid.spacing_mm, strict=True):
        step = spacing_mm / old_mm
        new_length, first = _placed(length, step)
        weights.append(
            linear_weights(length, first + step * np.arange(new_length), step)
        )
        start.append(first)
    affine = grid.affine.copy()
    affine[:3, :3] *= spacing_mm / np.array(grid.spacing_mm)
    affine[:3, 3] = grid.index_to_ras_mm(np.array(start))
    return tuple(weights), affine


def from_isotropic(grid: Grid, spacing_mm: float) -> tuple[np.ndarray, ...]:
    """Computes the weights that map the cubic voxels of `isotropic` back to `grid`.

    Every voxel gets the linear interpolant at its centre, even where voxels grow, so
    that the prediction for a thick slice is not mixed with those between the slices.
    """
    weights = []
    for length, old_mm in zip(grid.shape, grid.spacing_mm, strict=True):
        step = spacing_mm / old_mm
        new_length, first = _placed(length, step)
        weights.append(
            linear_weights(new_length, (np.arange(length) - first) / step, 0)
        )
    return tuple(weights)


def _placed(length: int, step: float) -> tuple[int, float]:
    """Returns the number of new voxels along an axis and the old index of the first."""
    new_length = max(int(np.ceil(length / step - 1e-6)), 1)
    return new_length, (length - 1) / 2 - (new_length - 1) / 2 * step


def linear_weights(length: int, positions: np.ndarray, step: float) -> np.ndarray:
    """Computes linear interpolation weights along one axis, averaged where voxels grow.

    A coarser voxel is the mean of the linear interpolant over sqrt(step^2 - 1) old
    voxels, which gives it the variance of a voxel of its own size; a finer one is the
    interpolant itself. Linear ramps keep their values. Beyond the ends the last value
    is repeated.

    Args:
        length: Number of old voxels.
        positions: (new,) old indices at which the new voxels lie.
        step: Distance between new voxels, in old voxels.

    Returns:
        (new, length) float32; each row sums to 1.
    """
    offset = positions[:, None] - np.arange(length)
    half = np.sqrt(max(step**2 - 1, 0)) / 2
    if half > 1e-3:
        weights = (_hat_area(offset + half) - _hat_area(offset - half)) / (2 * half)
    else:
        weights = np.maximum(1 - np.abs(offset), 0)
    ends = np.where(positions < (length - 1) / 2, 0, length - 1)
    weights[np.arange(len(positions)), ends] += 1 - weights.sum(axis=1)
    return weights.astype(np.float32)


def _hat_area(t: np.ndarray) -> np.ndarray:
    """Integrates the hat function max(1 - |t|, 0) up to t."""
    t = np.clip(t, -1, 1)
    return np.where(t < 0, (1 + t) ** 2 / 2, 1 - (1 - t) ** 2 / 2)


def volume(values: np.ndarray, weights: Sequence[np.ndarray]) -> np.ndarray:
    """Resamples a volume by weights along each axis.

    Args:
        values: (z, y, x) of any real dtype.
        weights: (new, old) matrix for each of z, y and x.

    Returns:
        (new z, new y, new x) float32.
    """
    z, y, x = weights
    planes = np.matmul(y, values.astype(np.float32) @ x.T)
    columns = z @ planes.reshape(len(planes), -1)
    return columns.reshape(len(z), *planes.shape[1:])


def mask(inside: np.ndarray, weights: Sequence[np.ndarray]) -> np.ndarray:
    """Resamples a mask: a voxel is set if at least half of its weight is in the mask.

    Args:
        inside: (z, y, x) bool.
        weights: Weights for `volume`.

    Returns:
        (new z, new y, new x) bool.
    """
    resampled = np.zeros([len(w) for w in weights], bool)
    box = boxes.bounding_box(inside)
    if box is None:
        return resampled
    reached, inner = [], []
    for old, axis_weights in zip(box, weights, strict=True):
        weighted = boxes.bounding_box(axis_weights[:, old])
        if weighted is None:
            return resampled
        reached.append(weighted[0])
        inner.append(axis_weights[weighted[0], old])
    resampled[tuple(reached)] = volume(inside[box], inner) >= HALF
    return resampled


def labels(values: np.ndarray, weights: Sequence[np.ndarray]) -> np.ndarray:
    """Resamples (z, y, x) uint8 labels, each as a mask; all other voxels are 0."""
    resampled = np.zeros([len(w) for w in weights], np.uint8)
    for label in _values(values):
        resampled[mask(values == label, weights)] = label
    return resampled


def nodules(
    reader_bits: np.ndarray, nodule_labels: np.ndarray, weights: Sequence[np.ndarray]
) -> tuple[np.ndarray, np.ndarray]:
    """Resamples each reader's mask of each nodule separately.

    Args:
        reader_bits: (z, y, x) uint8, see `scan`.
        nodule_labels: (z, y, x) uint8.
        weights: Weights for `volume`.

    Returns:
        Reader bits and labels on the new grid. A voxel has a label if and only if it
        has a bit.
    """
    new_bits = np.zeros([len(w) for w in weights], np.uint8)
    new_labels = np.zeros_like(new_bits)
    for label in _values(nodule_labels):
        box = (
            boxes.bounding_box(nodule_labels == label) or ()
        )  # never (): the label occurs
        inner = [w[:, old] for w, old in zip(weights, box, strict=True)]
        own_bits = np.where((nodule_labels == label)[box], reader_bits[box], 0)
        for reader in range(8):
            marked = mask((own_bits >> reader & 1).astype(bool), inner)
            new_bits[marked] |= np.uint8(1 << reader)
            new_labels[marked] = label
    return new_bits, new_labels


def _values(array: np.ndarray) -> np.ndarray:
    """Returns the nonzero values that occur in a uint8 array."""
    return np.flatnonzero(np.bincount(array.ravel())[1:]) + 1
