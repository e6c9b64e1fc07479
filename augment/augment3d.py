"""Augmentation of volumes: spatial warps and simulated scanner properties.

As in `augment2d`, all spatial changes (flips, rotation, zoom, stretch, shift, elastic
displacement and the crop) are combined in one map from output to source, so HU are
interpolated once and the masks follow exactly. Points and displacements are (z, y, x).

The `draw_*` functions draw random parameters from the settings; the others apply them.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import cv2
import numpy as np

import config
from augment import augment2d
from ct import boxes, resample
from ct.boxes import Box, Crop
from ct.scan import AIR_HU

CHUNK_VOXELS = 150_000
"""Voxels warped at once; they fit the cache. OpenCV takes at most 32767 rows."""

CURVE_HU = (-1000.0, -850.0, -100.0, 0.0, 50.0, 500.0)
"""Knots of the random curve of HU: air, lung, fat, water, soft tissue, bone."""

SOFT_TISSUE = 4
"""Index of the first knot that contrast agent raises."""

LEAST_SLICES = 4
"""Minimum number of slices after averaging to thick slices."""


@dataclass(frozen=True, eq=False)
class VolumeWarp:
    """Map from output voxels to volume voxels.

    Attributes:
        matrix: (3, 4) float64; output (z, y, x, 1) to volume (z, y, x).
        displacement: (3, z, y, x) float32 in voxels of the volume, added to the affine
            position; None for no elastic displacement.
    """

    matrix: np.ndarray
    displacement: np.ndarray | None = None


class Scanner(NamedTuple):
    """Simulated scanner properties, drawn by `draw_scanner`.

    Attributes:
        curve_hu: New HU of the knots `CURVE_HU`; None leaves HU unchanged.
        blur_px: Sigma of the reconstruction kernel; 0 for no blur.
        noise_hu: Standard deviation of the noise before slices are averaged.
        noise_width_px: Sigma of the Gaussian that correlates noise within a slice.
        slice_px: Thickness of the averaged slices, in voxels; 1 or less for no
            averaging.
        first_slice_px: Centre of the first averaged slice.
        field: (z, y, x) box of the output inside the field of view.
        gamma: Exponent applied to the windowed volume.
    """

    curve_hu: np.ndarray | None
    blur_px: float
    noise_hu: float
    noise_width_px: float
    slice_px: float
    first_slice_px: float
    field: Box
    gamma: float


def draw_volume_warp(
    settings: config.Augment,
    crop: Crop,
    output_px: tuple[int, int, int],
    rng: np.random.Generator,
) -> VolumeWarp:
    """Draws a random warp around the crop's pin.

    `flip` mirrors left-right and front-back, each with probability 1/2. A left-right
    flip imitates a heart on the right or a series with a wrong orientation; both flips
    together imitate a patient in prone position. Head and feet are never exchanged.

    Every random number is drawn whatever the settings, so switching one change off does
    not alter the others.
    """
    share = rng.random(12)
    even = 2 * share - 1
    zoom = (1 + settings.zoom * even[2]) * (1 + settings.stretch * even[3:6])
    matrix = volume_warp_matrix(
        crop,
        flip_y=settings.flip and share[0] < 0.5,
        flip_x=settings.flip and share[1] < 0.5,
        turn_deg=(
            settings.rotate_deg * even[6],
            settings.tilt_deg * even[7],
            settings.tilt_deg * even[8],
        ),
        zoom_zyx=tuple(zoom),
        shift_zyx=tuple(settings.shift_px * even[9:]),
    )
    seed = int(rng.integers(2**32))
    if settings.elastic_px == 0:
        return VolumeWarp(matrix)
    return VolumeWarp(
        matrix,
        smooth_displacement(
            output_px, settings.elastic_px, settings.elastic_grid_px, seed=seed
        ),
    )


def volume_warp_matrix(
    crop: Crop,
    *,
    flip_y: bool = False,
    flip_x: bool = False,
    turn_deg: tuple[float, ...] = (0.0, 0.0, 0.0),
    zoom_zyx: tuple[float, ...] = (1.0, 1.0, 1.0),
    shift_zyx: tuple[float, ...] = (0.0, 0.0, 0.0),
) -> np.ndarray:
    """Returns the affine map from output (z, y, x, 1) to volume (z, y, x), in voxels.

    Args:
        crop: Crop whose pin stays in place, apart from `shift_zyx`.
        flip_y: Mirror front-back, before the rotations.
        flip_x: Mirror left-right, before the rotations.
        turn_deg: Rotations of the visible content about z, y and x, each in the
            direction of `np.rot90`.
        zoom_zyx: Magnification along the axes of the output; above 1 enlarges.
        shift_zyx: Shift of the visible content, in output voxels.

    Returns:
        (3, 4) float64.
    """
    mirror = np.diag([1.0, -1.0 if flip_y else 1.0, -1.0 if flip_x else 1.0])
    about_z, about_y, about_x = np.deg2rad(turn_deg)
    turn = plane_turn(1, 2, about_z) @ plane_turn(0, 2, about_y)
    turn = turn @ plane_turn(0, 1, about_x)
    linear = mirror @ turn / np.asarray(zoom_zyx)
    pin = np.array(crop.pin)
    offset = crop.start + pin - linear @ (pin + np.asarray(shift_zyx))
    return np.column_stack((linear, offset))


def plane_turn(first: int, second: int, angle: float) -> np.ndarray:
    """Returns the (3, 3) inverse of a rotation by `angle` in `np.rot90`'s direction."""
    turn = np.eye(3)
    turn[first, first] = turn[second, second] = np.cos(angle)
    turn[first, second], turn[second, first] = np.sin(angle), -np.sin(angle)
    return turn


def smooth_displacement(
    size_px: tuple[int, int, int], sd_px: float, distance_px: float, *, seed: int
) -> np.ndarray:
    """Draws a smooth displacement field of cubic B-splines with normal weights.

    Args:
        size_px: (z, y, x) size of the field.
        sd_px: Standard deviation at every voxel.
        distance_px: Distance between the knots of the splines.
        seed: Seed of the weights.

    Returns:
        (3, z, y, x) float32, in voxels.
    """
    rng = np.random.default_rng(seed)
    return np.stack([smooth_field(size_px, sd_px, distance_px, rng) for _ in range(3)])


def smooth_field(
    size_px: tuple[int, int, int],
    sd: float,
    distance_px: float,
    rng: np.random.Generator,
) -> np.ndarray:
    """Draws one component of `smooth_displacement`, (z, y, x) float32."""
    planes, rows, columns = (augment2d.spline_basis(n, distance_px) for n in size_px)
    shape = planes.shape[1], rows.shape[1], columns.shape[1]
    knots = rng.normal(0, sd, shape).astype(np.float32)
    wide = augment2d.multiply_matrices(
        knots.reshape(-1, shape[2]), columns, cv2.GEMM_2_T
    )
    slabs = augment2d.multiply_matrices(planes, wide.reshape(shape[0], -1))
    slabs = slabs.reshape(size_px[0], shape[1], size_px[2])
    return np.stack([augment2d.multiply_matrices(rows, slab) for slab in slabs])


def warp_volume(
    volume: np.ndarray,
    warp: VolumeWarp,
    output_px: tuple[int, int, int],
    *,
    fill: float = AIR_HU,
) -> np.ndarray:
    """Warps a (z, y, x) volume with linear interpolation.

    Returns:
        (z, y, x) float32; `fill` at voxels that map outside the volume.
    """
    output = np.full(output_px, fill, np.float32)
    box = sampled_box(warp, output_px, volume.shape)
    if box is None:
        return output
    # OpenCV interpolates images only: one mosaic holds the lower slice of each pair, a
    # second one the upper slice, and the two samples are blended by the fraction of z.
    padded = padded_part(volume, box, fill).astype(np.float32)
    here, columns = mosaic(padded[:-1])
    above, _ = mosaic(padded[1:])
    for part, points in chunks_of_points(warp, output_px, box):
        z, y, x = points
        plane = np.minimum(z, len(padded) - 2).astype(np.int32)
        z -= plane
        place_in_mosaic(plane, y, x, padded.shape, columns)
        low, high = (
            cv2.remap(picture, x, y, cv2.INTER_LINEAR) for picture in (here, above)
        )
        high -= low
        high *= z
        np.add(low, high, out=output[part].reshape(low.shape))
    return output


def warp_volume_labels(
    labels: np.ndarray, warp: VolumeWarp, output_px: tuple[int, int, int]
) -> np.ndarray:
    """Warps a (z, y, x) uint8 volume of labels or bits with nearest-neighbour sampling.

    Voxels that map outside the volume are 0.
    """
    output = np.zeros(output_px, np.uint8)
    box = sampled_box(warp, output_px, labels.shape)
    if box is None:
        return output
    padded = padded_part(labels, box, 0)
    picture, columns = mosaic(padded)
    for part, points in chunks_of_points(warp, output_px, box):
        z, y, x = points
        plane = np.rint(z).astype(np.int32)
        place_in_mosaic(plane, y, x, padded.shape, columns)
        found = cv2.remap(picture, x, y, cv2.INTER_NEAREST)
        output[part] = found.reshape(output[part].shape)
    return output


def sampled_box(
    warp: VolumeWarp, output_px: tuple[int, ...], volume_px: tuple[int, ...]
) -> Box | None:
    """Returns the (z, y, x) box of the volume that the warp samples.

    Returns None if the warp samples nothing inside the volume.
    """
    corners = np.stack(
        np.meshgrid(*[(0, size - 1) for size in output_px], indexing="ij"), axis=-1
    ).reshape(-1, 3)
    seen = corners @ warp.matrix[:, :3].T + warp.matrix[:, 3]
    margin = np.zeros(3)
    if warp.displacement is not None:
        margin = [max(-part.min(), part.max()) for part in warp.displacement]
    low = np.maximum(np.floor(seen.min(axis=0) - margin).astype(int) - 1, 0)
    high = np.minimum(np.ceil(seen.max(axis=0) + margin).astype(int) + 2, volume_px)
    if (low >= high).any():
        return None
    return tuple(slice(int(a), int(b)) for a, b in zip(low, high, strict=True))


def padded_part(volume: np.ndarray, box: Box, fill: float) -> np.ndarray:
    """Returns a box of the volume with a one-voxel border of `fill`."""
    part = volume[box]
    padded = np.full([size + 2 for size in part.shape], fill, volume.dtype)
    padded[1:-1, 1:-1, 1:-1] = part
    return padded


def mosaic(volume: np.ndarray) -> tuple[np.ndarray, int]:
    """Tiles the slices of a (z, y, x) volume; returns the image and its columns."""
    depth, height, width = volume.shape
    columns = int(np.ceil(np.sqrt(depth)))
    rows = -(-depth // columns)
    picture = np.zeros((rows, height, columns, width), volume.dtype)
    for z, image in enumerate(volume):
        picture[z // columns, :, z % columns] = image
    return picture.reshape(rows * height, columns * width), columns


def place_in_mosaic(plane, y, x, padded_px: tuple[int, ...], columns: int) -> None:
    """Shifts (y, x), in place, from each slice to its position in the mosaic."""
    slices = np.arange(padded_px[0])
    y += (slices // columns * padded_px[1]).astype(np.float32)[plane]
    x += (slices % columns * padded_px[2]).astype(np.float32)[plane]


def chunks_of_points(
    warp: VolumeWarp, output_px: tuple[int, int, int], box: Box
) -> Iterator[tuple[slice, list[np.ndarray]]]:
    """Yields slabs of the output with the points of the padded volume that they sample.

    Yields:
        The slab as a range of output slices, and the points' z, y and x, each
        (slices * y, x) float32, clipped to the padded part of the volume.
    """
    depth, height, width = output_px
    step = max(min(CHUNK_VOXELS // (height * width), 32_000 // height), 1)
    axes = [np.arange(size, dtype=np.float64) for size in output_px]
    for first in range(0, depth, step):
        part = slice(first, min(first + step, depth))
        points = []
        for axis, (per_z, per_y, per_x, start) in enumerate(warp.matrix):
            start = start + 1 - box[axis].start
            by_z = (per_z * axes[0][part] + start).astype(np.float32)
            by_yx = np.add.outer(per_y * axes[1], per_x * axes[2]).astype(np.float32)
            place = np.add.outer(by_z, by_yx)
            if warp.displacement is not None:
                place += warp.displacement[axis, part]
            last = box[axis].stop - box[axis].start + 1
            np.clip(place, 0, last, out=place)
            points.append(place.reshape(-1, width))
        yield part, points


def draw_scanner(
    settings: config.Augment,
    output_px: tuple[int, int, int],
    rng: np.random.Generator,
) -> Scanner:
    """Draws scanner properties; every random number is drawn whatever the settings.

    Kernel blur, thick slices and a field of view that ends inside the output each occur
    with probability 1/2; each of the six sides of such a field is cut with probability
    1/3.
    """
    share = rng.random(10)
    offsets = rng.normal(0, 1, len(CURVE_HU))
    ends = rng.random((3, 2, 2))
    curve_hu = None
    if settings.curve_hu or settings.contrast_hu:
        curve_hu = np.array(CURVE_HU) + settings.curve_hu * offsets
        curve_hu[SOFT_TISSUE:] += settings.contrast_hu * share[0]
        curve_hu = np.maximum.accumulate(curve_hu)
    thick = settings.slice_px > 1 and share[1] < 0.5
    slice_px = 1 + (settings.slice_px - 1) * share[2] if thick else 1.0
    field = boxes.full_box(output_px)
    if settings.field_cut and share[3] < 0.5:
        lost = np.where(ends[..., 0] < 1 / 3, settings.field_cut * ends[..., 1], 0)
        field = tuple(
            slice(int(low * size), size - int(high * size))
            for (low, high), size in zip(lost, output_px, strict=True)
        )
    return Scanner(
        curve_hu,
        blur_px=settings.blur_px * share[4] if share[5] < 0.5 else 0.0,
        noise_hu=settings.noise_hu * share[6],
        noise_width_px=settings.noise_width_px * share[7],
        slice_px=slice_px,
        first_slice_px=slice_px * (share[9] - 0.5),
        field=field,
        gamma=(1 + settings.gamma) ** (2 * share[8] - 1),
    )


def simulate_scanner(
    hu: np.ndarray, scanner: Scanner, rng: np.random.Generator
) -> np.ndarray:
    """Applies the scanner properties, except `gamma`, to a (z, y, x) float32 volume."""
    if scanner.curve_hu is not None:
        hu = apply_hu_curve(hu, scanner.curve_hu)
    if scanner.blur_px > 0:
        hu = blur_volume(hu, scanner.blur_px)
    if scanner.noise_hu > 0:
        hu = hu + draw_noise(hu.shape, scanner.noise_width_px, rng) * np.float32(
            scanner.noise_hu
        )
    if scanner.slice_px > 1:
        hu = thick_slices(hu, scanner.slice_px, scanner.first_slice_px)
    return cut_to_field(hu, scanner.field, AIR_HU)


def apply_hu_curve(hu: np.ndarray, curve_hu: np.ndarray) -> np.ndarray:
    """Maps HU by the piecewise linear curve from `CURVE_HU` to `curve_hu`.

    HU are rounded to index a table, which is eight times faster than `np.interp`.
    Outside the knots the first and last offsets continue.
    """
    least, most = -1200, 3100
    whole = np.arange(least, most)
    offset = np.interp(whole, CURVE_HU, curve_hu - np.array(CURVE_HU))
    index = np.clip(hu, least, most - 1)
    index -= least
    return (whole + offset).astype(np.float32)[np.rint(index).astype(np.int32)]


def blur_volume(volume: np.ndarray, sigma_px: float) -> np.ndarray:
    """Smooths a (z, y, x) float32 volume with a Gaussian and mirrored borders."""
    result = np.empty_like(volume)
    for image, smooth in zip(volume, result, strict=True):
        smooth[:] = cv2.GaussianBlur(image, (0, 0), sigma_px)
    along_z = cv2.getGaussianKernel(2 * int(np.ceil(3 * sigma_px)) + 1, sigma_px)
    flat = result.reshape(len(volume), -1)
    return cv2.sepFilter2D(flat, -1, np.ones((1, 1)), along_z).reshape(volume.shape)


def draw_noise(
    size_px: tuple[int, ...], width_px: float, rng: np.random.Generator
) -> np.ndarray:
    """Draws (z, y, x) float32 noise of standard deviation 1.

    A Gaussian of sigma `width_px` correlates it within each slice.
    """
    white = rng.standard_normal(size_px, dtype=np.float32)
    if width_px < 0.2:  # the kernel has one tap
        return white
    for image in white:
        image[:] = cv2.GaussianBlur(image, (0, 0), width_px)
    white /= white.std()
    return white


def thick_slices(volume: np.ndarray, slice_px: float, first_px: float) -> np.ndarray:
    """Averages a (z, y, x) volume over thick slices and interpolates it back.

    Args:
        volume: float32.
        slice_px: Thickness and spacing of the slices, in voxels; above 1.
        first_px: Centre of the first slice, in voxels.
    """
    depth = len(volume)
    count = max(int((depth - first_px) / slice_px) + 1, LEAST_SLICES)
    centres = first_px + slice_px * np.arange(count)
    down = resample.linear_weights(depth, centres, slice_px)
    up = resample.linear_weights(
        count, (np.arange(depth) - first_px) / slice_px, 1 / slice_px
    )
    return weighted_slices(up, weighted_slices(down, volume))


def weighted_slices(weights: np.ndarray, volume: np.ndarray) -> np.ndarray:
    """Multiplies sparse (new, old) weights with the slices of a float32 volume."""
    result = np.zeros((len(weights), *volume.shape[1:]), np.float32)
    for new, row in enumerate(weights):
        for z in np.flatnonzero(row):
            result[new] = cv2.scaleAdd(volume[z], float(row[z]), result[new])
    return result


def cut_to_field(volume: np.ndarray, field: Box, fill: float) -> np.ndarray:
    """Replaces the volume outside the field of view by `fill`.

    Returns the volume itself, not a copy, if the field of view covers all of it.
    """
    if volume[field].shape == volume.shape:
        return volume
    result = np.full_like(volume, fill)
    result[field] = volume[field]
    return result
