"""Patches with random HU per tissue, so that a network learns shapes before densities.

Reference: Billot et al. 2023 (SynthSeg). Ours differs in that tissues come from the HU of
the patch itself and the lung labels, not from a label map of all organs, and in that HU
stay in the ranges that CT, contrast agent, scanners out of calibration and diseased lungs
can show; the noise of the scanner is added afterwards, with that of real patches.
"""

import numpy as np

from augment import augment3d

AIR, LUNG, DENSE, FAT, SOFT, BONE = range(6)
"""Tissues: dense are vessels, airway walls and whatever else is dense within the lungs."""

RANGES_HU = {
    AIR: (-1024.0, -920.0),
    LUNG: (-950.0, -450.0),
    DENSE: (-350.0, 250.0),
    FAT: (-180.0, -20.0),
    SOFT: (-40.0, 180.0),
    BONE: (120.0, 900.0),
}
"""Range of the mean HU of a tissue. Air and normal lungs overlap on purpose."""

DENSE_HU, FAT_HU, SOFT_HU, BONE_HU = -500.0, -300.0, -20.0, 150.0
"""Least HU of what is dense in the lungs, and of fat, soft tissue and bone elsewhere."""

TEXTURE_HU = 60.0
"""Largest standard deviation of a tissue's own texture."""

UNEVEN_HU = 120.0
"""Largest standard deviation of the slow changes of the density of the lungs."""

UNEVEN_PX = 24.0
"""Distance between the knots of those changes."""


def tissues(hu: np.ndarray, lung: np.ndarray) -> np.ndarray:
    """(z, y, x) uint8 tissue of each voxel, by its HU and whether it lies in the lungs.

    Args:
        hu: (z, y, x).
        lung: (z, y, x), above 0 in the lungs.
    """
    passed = sum((hu >= least).view(np.uint8) for least in (FAT_HU, SOFT_HU, BONE_HU))
    of_body = np.array([AIR, FAT, SOFT, BONE], np.uint8)[passed]
    of_lung = np.where(hu >= DENSE_HU, np.uint8(DENSE), np.uint8(LUNG))
    return np.where(lung > 0, of_lung, of_body)


def synthetic(hu: np.ndarray, lung: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The patch with other HU: a random mean and texture per tissue, softened borders.

    Args:
        hu: (z, y, x) HU, from which only tissues are taken.
        lung: (z, y, x), above 0 in the lungs.
        rng: Draws means, textures and how soft borders are.

    Returns:
        (z, y, x) float32 HU.
    """
    tissue = tissues(hu, lung)
    means = np.array([rng.uniform(*RANGES_HU[key]) for key in sorted(RANGES_HU)])
    textures = rng.uniform(0, TEXTURE_HU, len(means))
    texture = augment3d.noise(hu.shape, rng.uniform(0.5, 2.0), rng)
    texture *= textures.astype(np.float32)[tissue]
    texture += means.astype(np.float32)[tissue]
    uneven = augment3d.smooth_field(hu.shape, rng.uniform(0, UNEVEN_HU), UNEVEN_PX, rng)
    np.add(texture, uneven, out=texture, where=tissue == LUNG)
    return augment3d.blurred(texture, rng.uniform(0.4, 1.0))
