"""Random changes of a volume and its masks: where voxels come from, and how it was scanned.

As in `augment`, everything that moves voxels (flips, turns, zoom, stretch, shift, elastic
displacement and the crop) is one map from output to source, so HU are interpolated once and
the masks follow exactly. Points and displacements are (z, y, x).

`draw_*` take the settings and a generator and say what is done; the others do it.
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
"""Voxels that are warped at once: what fits in the cache, and in OpenCV's 32767 rows."""

CURVE_HU = (-1000.0, -850.0, -100.0, 0.0, 50.0, 500.0)
"""Knots of the random curve of HU: air, lung, fat, water, soft tissue, bone."""

SOFT_TISSUE = 4
"""First knot that contrast agent lifts."""

LEAST_SLICES = 4
"""A volume is never averaged to fewer slices than this."""


@dataclass(frozen=True, eq=False)
class VolumeWarp:
    """Where each output voxel is taken from.

    Attributes:
        matrix: (3, 4) float64; output (z, y, x, 1) to volume (z, y, x).
        displacement: (3, z, y, x) float32, added to that, in voxels of the volume; or None.
    """

    matrix: np.ndarray
    displacement: np.ndarray | None = None


class Scanner(NamedTuple):
    """How a volume was scanned: the draws of `draw_scanner`.

    Attributes:
        curve_hu: HU that those of `CURVE_HU` become; None changes nothing.
        blur_px: Width (sigma) of the reconstruction kernel; 0 for none.
        noise_hu: Standard deviation of the noise before slices are averaged.
        noise_width_px: Width (sigma) of what makes noise alike within a slice.
        slice_px: Thickness of the slices; 1 or less for none.
        first_slice_px: Centre of the first of them.
        field: (z, y, x) part of the output within the field of view.
        gamma: Exponent on the windowed volume.
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
    """A random warp around the crop's pin.

    With `flip` volumes are mirrored left-right and front-back, each one time in two: the
    first are hearts on the right and series with a wrong orientation, both are a patient
    who lies on the belly. Head and feet are never exchanged.

    Every number is drawn whatever the settings, so switching one change off leaves the
    others as they were.
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
    """The affine map from output (z, y, x, 1) to volume (z, y, x), in voxels.

    Args:
        crop: Its pin stays in place but for `shift_zyx`.
        flip_y: Mirror front-back, before the turns.
        flip_x: Mirror left-right, before the turns.
        turn_deg: Turns of what is seen about z, y and x, each as `np.rot90` turns.
        zoom_zyx: Above 1 makes things larger along the axes of the output.
        shift_zyx: How far what is seen moves, in output voxels.

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
    """(3, 3) map to where things were before a turn by `angle`, as `np.rot90` turns."""
    turn = np.eye(3)
    turn[first, first] = turn[second, second] = np.cos(angle)
    turn[first, second], turn[second, first] = np.sin(angle), -np.sin(angle)
    return turn


def smooth_displacement(
    size_px: tuple[int, int, int], sd_px: float, distance_px: float, *, seed: int
) -> np.ndarray:
    """A smooth random field: cubic B-splines with normal weights.

    Args:
        size_px: (z, y, x) size of the field.
        sd_px: Standard deviation at every voxel.
        distance_px: Between the knots of the splines.
        seed: Of the weights.

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
    """One component of `smooth_displacement`: (z, y, x) float32 of standard deviation `sd`."""
    planes, rows, columns = (augment2d.spline_basis(n, distance_px) for n in size_px)
    shape = planes.shape[1], rows.shape[1], columns.shape[1]
    knots = rng.normal(0, sd, shape).astype(np.float32)
    wide = augment2d.product(knots.reshape(-1, shape[2]), columns, cv2.GEMM_2_T)
    slabs = augment2d.product(planes, wide.reshape(shape[0], -1))
    slabs = slabs.reshape(size_px[0], shape[1], size_px[2])
    return np.stack([augment2d.product(rows, slab) for slab in slabs])


def warp_volume(
    volume: np.ndarray,
    warp: VolumeWarp,
    output_px: tuple[int, int, int],
    *,
    fill: float = AIR_HU,
) -> np.ndarray:
    """A (z, y, x) volume seen through `warp`, interpolated linearly.

    Returns:
        (z, y, x) float32; `fill` where the warp reaches beyond the volume.
    """
    output = np.full(output_px, fill, np.float32)
    box = reach(warp, output_px, volume.shape)
    if box is None:
        return output
    # OpenCV interpolates images: slices lie side by side in one picture, the next slices
    # in another, and what is found in both is mixed by the share of z.
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
    """A (z, y, x) uint8 volume of labels or bits through `warp`; nearest, 0 beyond."""
    output = np.zeros(output_px, np.uint8)
    box = reach(warp, output_px, labels.shape)
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


def reach(
    warp: VolumeWarp, output_px: tuple[int, ...], volume_px: tuple[int, ...]
) -> Box | None:
    """The (z, y, x) part of the volume that the warp looks at; None if it looks beyond."""
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
    """A part of a volume with a border of one voxel of `fill`."""
    part = volume[box]
    padded = np.full([size + 2 for size in part.shape], fill, volume.dtype)
    padded[1:-1, 1:-1, 1:-1] = part
    return padded


def mosaic(volume: np.ndarray) -> tuple[np.ndarray, int]:
    """The slices of a (z, y, x) volume as one picture, and how many lie side by side."""
    depth, height, width = volume.shape
    columns = int(np.ceil(np.sqrt(depth)))
    rows = -(-depth // columns)
    picture = np.zeros((rows, height, columns, width), volume.dtype)
    for z, image in enumerate(volume):
        picture[z // columns, :, z % columns] = image
    return picture.reshape(rows * height, columns * width), columns


def place_in_mosaic(plane, y, x, padded_px: tuple[int, ...], columns: int) -> None:
    """Moves (y, x) of a slice, in place, to where that slice lies in the picture."""
    slices = np.arange(padded_px[0])
    y += (slices // columns * padded_px[1]).astype(np.float32)[plane]
    x += (slices % columns * padded_px[2]).astype(np.float32)[plane]


def chunks_of_points(
    warp: VolumeWarp, output_px: tuple[int, int, int], box: Box
) -> Iterator[tuple[slice, list[np.ndarray]]]:
    """Slabs of the output, and which points of the padded part of the volume they show.

    Yields:
        The slices of the output, and z, y, x, each (slices * y, x) float32, within 0 and
        the last voxel of the padded part.
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
    """Random properties of the scanner; each number is drawn whatever the settings.

    Kernel, thick slices and a field of view that ends within the output each come to one
    volume in two; of such a field each of its six sides is cut one time in three.
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
    field = boxes.whole(output_px)
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


def scanned(hu: np.ndarray, scanner: Scanner, rng: np.random.Generator) -> np.ndarray:
    """A (z, y, x) float32 volume as a scanner would show it, but for `gamma`."""
    if scanner.curve_hu is not None:
        hu = curved(hu, scanner.curve_hu)
    if scanner.blur_px > 0:
        hu = blurred(hu, scanner.blur_px)
    if scanner.noise_hu > 0:
        hu = hu + noise(hu.shape, scanner.noise_width_px, rng) * np.float32(
            scanner.noise_hu
        )
    if scanner.slice_px > 1:
        hu = thick_slices(hu, scanner.slice_px, scanner.first_slice_px)
    return within_field(hu, scanner.field, AIR_HU)


def curved(hu: np.ndarray, curve_hu: np.ndarray) -> np.ndarray:
    """HU through the line that joins `CURVE_HU` and `curve_hu`, to the nearest HU.

    A table of whole HU is eight times faster than `np.interp`. Beyond the knots the first
    and last offsets go on.
    """
    least, most = -1200, 3100
    whole = np.arange(least, most)
    offset = np.interp(whole, CURVE_HU, curve_hu - np.array(CURVE_HU))
    index = np.clip(hu, least, most - 1)
    index -= least
    return (whole + offset).astype(np.float32)[np.rint(index).astype(np.int32)]


def blurred(volume: np.ndarray, sigma_px: float) -> np.ndarray:
    """A (z, y, x) float32 volume under a Gaussian; at the ends the volume is mirrored."""
    result = np.empty_like(volume)
    for image, smooth in zip(volume, result, strict=True):
        smooth[:] = cv2.GaussianBlur(image, (0, 0), sigma_px)
    along_z = cv2.getGaussianKernel(2 * int(np.ceil(3 * sigma_px)) + 1, sigma_px)
    flat = result.reshape(len(volume), -1)
    return cv2.sepFilter2D(flat, -1, np.ones((1, 1)), along_z).reshape(volume.shape)


def noise(
    size_px: tuple[int, ...], width_px: float, rng: np.random.Generator
) -> np.ndarray:
    """(z, y, x) float32 of standard deviation 1, alike over `width_px` within a slice."""
    white = rng.standard_normal(size_px, dtype=np.float32)
    if width_px < 0.2:  # the kernel has one tap
        return white
    for image in white:
        image[:] = cv2.GaussianBlur(image, (0, 0), width_px)
    white /= white.std()
    return white


def thick_slices(volume: np.ndarray, slice_px: float, first_px: float) -> np.ndarray:
    """A (z, y, x) volume averaged over slices of some thickness, and interpolated back.

    Args:
        volume: float32.
        slice_px: Thickness and distance of the slices, in voxels; above 1.
        first_px: Centre of the first slice.
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
    """The product of (new, old) weights, most of them 0, and a float32 volume of slices."""
    result = np.zeros((len(weights), *volume.shape[1:]), np.float32)
    for new, row in enumerate(weights):
        for z in np.flatnonzero(row):
            result[new] = cv2.scaleAdd(volume[z], float(row[z]), result[new])
    return result


def within_field(volume: np.ndarray, field: Box, fill: float) -> np.ndarray:
    """The volume where the field of view is, `fill` beyond; itself if that is all of it."""
    if volume[field].shape == volume.shape:
        return volume
    result = np.full_like(volume, fill)
    result[field] = volume[field]
    return result
