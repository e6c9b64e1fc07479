"""Magic wand: a nodule's mask from its centre and diameter by a search for edges."""

import numpy as np

from ct import boxes
from ct.boxes import Box

RAYS = 96
"""Number of rays per slice in the edge search."""

STEP_MM = 0.25
"""Distance between samples along a ray."""

REACH = 1.9
"""Length of rays in radii; outlined nodules are longer than the equivalent sphere."""

MAX_SCALE = 1.25
"""Largest factor that scales the radii, up or down, to reach the sphere's volume."""

DARK = 0.25
"""Share of the way from lung HU to nodule HU that the middle of a slice must reach;
darker slices are left out, since thin ends of a nodule are blurred with lung."""

LEAN = 0.45
"""Standard deviation, in radii, of the preference for edges near the sphere."""

EDGE_MM = 0.75
"""Standard deviation of the smoothing along a ray before its slope is taken."""

RAY_SMOOTHING = 2.0
"""Standard deviation, in rays, of the smoothing of the radii around the nodule."""


def wand(
    hu: np.ndarray,
    centre_zyx: np.ndarray,
    diameter_mm: float,
    spacing_mm: tuple[float, float, float],
) -> tuple[np.ndarray, Box]:
    """Finds a nodule's mask from its centre and diameter by searching edges along rays.

    Rays leave the centre on every slice that the sphere of that diameter meets. The
    edge on a ray is the steepest fall of HU, weighted less the further it lies from the
    sphere; where HU never fall, at the pleura or a vessel, it is the surface of the
    sphere. The radii are smoothed around the nodule and scaled towards the volume of
    the sphere, since readers draw wider than the steepest edge: unscaled, the masks of
    four real nodules had 0.56 to 0.85 of the volume the readers agreed on. The area
    within the radii is filled. Slices whose middle is no brighter than lung are left
    out.

    Reference: the magic wand of the thesis this project rebuilds, which searches one
    slice.

    Args:
        hu: (z, y, x) int16.
        centre_zyx: (3,) fractional index of the centre.
        diameter_mm: Diameter of the sphere.
        spacing_mm: (z, y, x).

    Returns:
        A small (z, y, x) bool mask with at least the voxel at the centre, and its box.
    """
    radius_mm = diameter_mm / 2
    reach_mm = REACH * radius_mm * MAX_SCALE
    box = boxes.near(centre_zyx, [reach_mm] * 3, spacing_mm, boxes.full_box(hu.shape))
    local_zyx = centre_zyx - [axis.start for axis in box]
    region = hu[box].astype(np.float32)
    radii_mm = radii_by_slice_mm(region, local_zyx, radius_mm, spacing_mm)
    areas_mm2 = [np.square(radii).mean() * np.pi for radii in radii_mm.values()]
    sphere_mm3 = 4 / 3 * np.pi * radius_mm**3
    scale = np.sqrt(sphere_mm3 / (sum(areas_mm2) * spacing_mm[0]))
    scale = np.clip(scale, 1 / MAX_SCALE, MAX_SCALE)
    mask = np.zeros(region.shape, bool)
    for z, radii in radii_mm.items():
        mask[z] = within_radii(
            region.shape[1:], local_zyx[1:], scale * radii, spacing_mm
        )
    seed = nearest_voxel(local_zyx, region.shape)
    mask[seed] = True
    return connected_to(mask, seed), box


def radii_by_slice_mm(
    region: np.ndarray,
    centre_zyx: np.ndarray,
    radius_mm: float,
    spacing_mm: tuple[float, float, float],
) -> dict[int, np.ndarray]:
    """Finds the (RAYS,) radii of the edge on each slice of a nodule; see `wand`."""
    reach_mm = REACH * radius_mm
    middle = nearest_voxel(centre_zyx, region.shape)[0]
    polar = polar_image(region[middle], centre_zyx[1:], reach_mm, spacing_mm)
    core_hu, lung_hu = core_and_lung_hu(polar, radius_mm)
    dark_hu = lung_hu + DARK * (core_hu - lung_hu)
    found = {}
    for z, image in enumerate(region):
        above_mm = (z - centre_zyx[0]) * spacing_mm[0]
        if z != middle and abs(above_mm) > radius_mm:
            continue
        sphere_mm = max(np.sqrt(max(radius_mm**2 - above_mm**2, 0)), spacing_mm[1])
        polar = polar_image(image, centre_zyx[1:], reach_mm, spacing_mm)
        if z == middle or middle_hu(polar, sphere_mm) >= dark_hu:
            contrast_hu = core_hu - lung_hu
            found[z] = edge_radii_mm(polar, sphere_mm, radius_mm, contrast_hu)
    return found


def nearest_voxel(at_zyx: np.ndarray, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Returns the voxel of a volume nearest to a fractional index."""
    return tuple(np.clip(np.rint(at_zyx), 0, np.array(shape) - 1).astype(int).tolist())


def core_and_lung_hu(polar: np.ndarray, radius_mm: float) -> tuple[float, float]:
    """Returns HU of a nodule's core (median) and the lung around (10th percentile)."""
    inner = max(round(radius_mm / 2 / STEP_MM), 1)
    outer = min(round(radius_mm / STEP_MM), polar.shape[1] - 1)
    return float(np.median(polar[:, :inner])), float(
        np.percentile(polar[:, outer:], 10)
    )


def polar_image(
    image: np.ndarray,
    centre_yx: np.ndarray,
    reach_mm: float,
    spacing_mm: tuple[float, float, float],
) -> np.ndarray:
    """Samples float32 HU along rays from the centre, every STEP_MM; (RAYS, samples)."""
    import cv2

    angles = ray_angles()[:, None]
    along_mm = np.arange(0, max(reach_mm, 8 * STEP_MM), STEP_MM)
    x = centre_yx[1] + np.cos(angles) * along_mm / spacing_mm[2]
    y = centre_yx[0] + np.sin(angles) * along_mm / spacing_mm[1]
    return cv2.remap(
        image,
        x.astype(np.float32),
        y.astype(np.float32),
        cv2.INTER_LINEAR,
        borderMode=cv2.BORDER_REPLICATE,
    )


def ray_angles() -> np.ndarray:
    """Returns the (RAYS,) directions of the rays, in radians from +x to +y."""
    return np.linspace(0, 2 * np.pi, RAYS, endpoint=False)


def middle_hu(polar: np.ndarray, sphere_mm: float) -> float:
    """Returns the median HU within half the sphere's radius on a slice."""
    return float(np.median(polar[:, : max(round(sphere_mm / 2 / STEP_MM), 2)]))


def edge_radii_mm(
    polar: np.ndarray, sphere_mm: float, radius_mm: float, contrast_hu: float
) -> np.ndarray:
    """Finds the (RAYS,) radii of the edge on one slice; see `wand`.

    Args:
        polar: (RAYS, samples) HU.
        sphere_mm: Radius of the sphere on this slice.
        radius_mm: Radius of the sphere.
        contrast_hu: HU of the nodule minus HU of the lung.
    """
    from scipy import ndimage

    fall = -ndimage.gaussian_filter1d(polar, EDGE_MM / STEP_MM, axis=1, order=1)
    along_mm = np.arange(polar.shape[1]) * STEP_MM
    preferred = np.exp(-0.5 * ((along_mm - sphere_mm) / (LEAN * radius_mm)) ** 2)
    at = np.argmax(fall * preferred, axis=1)
    # At its steepest, a smoothed edge falls by 0.4 of the contrast per standard
    # deviation of the smoothing; less than a tenth of that counts as noise.
    full_fall = 0.4 * contrast_hu * STEP_MM / EDGE_MM
    weak = fall[np.arange(len(fall)), at] < full_fall / 10
    radii_mm = np.where(weak, sphere_mm, along_mm[at])
    radii_mm = ndimage.median_filter(radii_mm, size=9, mode="wrap")
    return ndimage.gaussian_filter1d(radii_mm, RAY_SMOOTHING, mode="wrap")


def within_radii(
    shape: tuple[int, ...],
    centre_yx: np.ndarray,
    radii_mm: np.ndarray,
    spacing_mm: tuple[float, float, float],
) -> np.ndarray:
    """Returns a mask of the pixels closer to the centre than the radius there."""
    y, x = np.ogrid[: shape[0], : shape[1]]
    dy_mm = (y - centre_yx[0]) * spacing_mm[1]
    dx_mm = (x - centre_yx[1]) * spacing_mm[2]
    angle = np.arctan2(dy_mm, dx_mm)
    limit_mm = np.interp(angle, ray_angles(), radii_mm, period=2 * np.pi)
    return np.hypot(dy_mm, dx_mm) <= limit_mm


def connected_to(mask: np.ndarray, seed: tuple[int, ...]) -> np.ndarray:
    """Returns the 26-connected component of a mask that contains `seed`."""
    from scipy import ndimage

    labels, _ = ndimage.label(mask, np.ones((3, 3, 3)))
    return labels == labels[seed]
