"""Synthesis of patches with random HU per tissue, so that networks rely on shape first.

Reference: Billot et al. 2023 (SynthSeg). This version takes the tissues from the HU of
the patch and the lung labels, not from a label map of all organs. HU stay in the ranges
that occur in CT, with contrast agent, poorly calibrated scanners and diseased lungs
included. Scanner noise is added later, as for real patches.
"""

import numpy as np

from augment import augment3d

AIR, LUNG, DENSE, FAT, SOFT, BONE = range(6)
"""Tissues; DENSE is everything dense in the lungs, such as vessels and airway walls."""

RANGES_HU = {
    AIR: (-1024.0, -920.0),
    LUNG: (-950.0, -450.0),
    DENSE: (-350.0, 250.0),
    FAT: (-180.0, -20.0),
    SOFT: (-40.0, 180.0),
    BONE: (120.0, 900.0),
}
"""Range of the mean HU of each tissue. Air and normal lungs overlap on purpose."""

DENSE_HU, FAT_HU, SOFT_HU, BONE_HU = -500.0, -300.0, -20.0, 150.0
"""Lowest HU of dense tissue in the lungs, and of fat, soft tissue, bone elsewhere."""

TEXTURE_HU = 60.0
"""Largest standard deviation of the texture of a tissue."""

UNEVEN_HU = 120.0
"""Largest standard deviation of the slow density variation in the lungs."""

UNEVEN_PX = 24.0
"""Distance between the knots of that variation."""


def tissues(hu: np.ndarray, lung: np.ndarray) -> np.ndarray:
    """Classifies voxels by HU and lung labels; returns (z, y, x) uint8 tissues.

    Args:
        hu: (z, y, x) HU.
        lung: (z, y, x) labels, above 0 in the lungs.
    """
    passed = sum((hu >= least).view(np.uint8) for least in (FAT_HU, SOFT_HU, BONE_HU))
    of_body = np.array([AIR, FAT, SOFT, BONE], np.uint8)[passed]
    of_lung = np.where(hu >= DENSE_HU, np.uint8(DENSE), np.uint8(LUNG))
    return np.where(lung > 0, of_lung, of_body)


def synthesize_patch(
    hu: np.ndarray, lung: np.ndarray, rng: np.random.Generator
) -> np.ndarray:
    """Replaces HU by a random mean and texture per tissue, and blurs the patch.

    Args:
        hu: (z, y, x) HU, used only to classify tissues.
        lung: (z, y, x) labels, above 0 in the lungs.
        rng: Draws means, textures and the width of the blur.

    Returns:
        (z, y, x) float32 HU.
    """
    tissue = tissues(hu, lung)
    means = np.array([rng.uniform(*RANGES_HU[key]) for key in sorted(RANGES_HU)])
    textures = rng.uniform(0, TEXTURE_HU, len(means))
    texture = augment3d.draw_noise(hu.shape, rng.uniform(0.5, 2.0), rng)
    texture *= textures.astype(np.float32)[tissue]
    texture += means.astype(np.float32)[tissue]
    uneven = augment3d.smooth_field(hu.shape, rng.uniform(0, UNEVEN_HU), UNEVEN_PX, rng)
    np.add(texture, uneven, out=texture, where=tissue == LUNG)
    return augment3d.blur_volume(texture, rng.uniform(0.4, 1.0))
