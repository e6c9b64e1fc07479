"""Recognises a scan by its voxels, whatever its file, name or orientation."""

import hashlib

import numpy as np

LOWEST_HU = -1023
"""Lower HU do not count: it is air and padding, which converters write differently."""

VALUES = 1 << 16
"""Number of int16 values."""


def hu_sha256(hu: np.ndarray) -> str:
    """Computes a checksum of a volume that does not depend on the order of its voxels.

    It covers the sorted shape and how often every HU from `LOWEST_HU` occurs. Another
    format, axis order, affine, patient name or a mirrored axis leave it unchanged, while a
    checksum of the array would change if the affine is wrong or missing. The noise of a CT
    makes the counts differ between scans. Cut, resampled, lossily compressed or otherwise
    changed volumes get another checksum.

    Args:
        hu: (z, y, x) int16 HU, in any axis order.

    Returns:
        SHA-256 in hexadecimal.
    """
    counts = np.zeros(VALUES, np.int64)
    for image in hu:  # one by one, as bincount needs eight bytes per voxel
        unsigned = np.ascontiguousarray(image, np.int16).view(np.uint16)
        counts += np.bincount(unsigned.ravel(), minlength=VALUES)
    rising = np.roll(counts, VALUES // 2)[VALUES // 2 + LOWEST_HU :]
    facts = np.concatenate([np.sort(hu.shape), rising])
    return hashlib.sha256(facts.astype("<i8").tobytes()).hexdigest()
