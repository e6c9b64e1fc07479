"""Augmentation of slices: crops, spatial warps, intensity changes and nodule targets.

All spatial changes (flips, rotation, zoom, shift, elastic displacement and the crop)
are combined in one map from output pixels to slice pixels, so an image is interpolated
once and its masks follow exactly. Points and displacements in arrays for OpenCV are (x,
y); everything else is (y, x).
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np

import config
from ct import boxes, scan
from ct.boxes import Box, Crop
from ct.scan import AIR_HU

TARGET_BIT, LUNG_BIT = 1, 2
"""Bits of the target and lung masks in one uint8 image, so that one warp moves both."""

NOISE_CORRELATION_PX = 0.8
"""Sigma of the Gaussian that correlates the noise of neighbouring pixels, as CT
reconstruction does."""


@dataclass(frozen=True, eq=False)
class Warp:
    """Map from output pixels to slice pixels.

    Attributes:
        matrix: (2, 3) float64; output (x, y, 1) to slice (x, y).
        points: (2, y, x) float32 slice x and y of each output pixel, for a warp with
            elastic displacement; None if `matrix` alone describes the warp.
    """

    matrix: np.ndarray
    points: np.ndarray | None = None

    def within(self, box: Box) -> "Warp":
        """Returns the same warp restricted to a (y, x) box of the output."""
        matrix = self.matrix.copy()
        matrix[:, 2] += self.matrix[:, :2] @ (box[1].start, box[0].start)
        points = None if self.points is None else self.points[:, box[0], box[1]]
        return Warp(matrix, points)


def crop_at_lungs(lung: np.ndarray, output_px: tuple[int, int]) -> Crop:
    """Returns the crop centred on the lungs, or on the slice if it has no lungs.

    The centre of the lungs is the centre of their bounding box.

    Args:
        lung: (y, x) uint8 lung labels.
        output_px: (y, x) size of the crop.
    """
    box = boxes.bounding_box(lung)
    if box is None:
        return boxes.crop_at_centre(lung.shape, output_px)
    return boxes.crop_around(boxes.centre(box), lung.shape, output_px)


def crop_near_nodule(
    target: np.ndarray,
    lung: np.ndarray,
    output_px: tuple[int, int],
    rng: np.random.Generator,
    *,
    margin_px: float = 0.0,
) -> Crop:
    """Draws a crop with a nodule at a random place in it.

    Every nodule of the slice is equally likely. In a slice without nodules, a random
    point of the lungs' bounding box takes the nodule's place, so negative crops come
    from the region where nodules occur. The crop stays within the slice where possible.
    Rotation and zoom are pinned to the nodule, which therefore stays inside the crop.

    Args:
        target: (y, x) uint8, above 0 in nodules.
        lung: (y, x) uint8 lung labels.
        output_px: (y, x) size of the crop.
        rng: Chooses the nodule and its place in the crop.
        margin_px: Minimum distance of the nodule from the crop's border, which leaves
            room for a later shift.
    """
    which, *place = rng.random(5)
    box = _nodule_box(target, which)
    lungs = None if box else boxes.bounding_box(lung)
    if box:
        focus = boxes.centre(box)
        half = [(part.stop - part.start) / 2 + margin_px for part in box]
    elif lungs:
        focus = boxes.point_in(lungs, place[:2])
        half = [margin_px, margin_px]
    else:
        return boxes.crop_at_centre(target.shape, output_px)
    return boxes.crop_near(focus, half, target.shape, output_px, place[2:])


def _nodule_box(target: np.ndarray, which: float) -> Box | None:
    """Returns the box of the connected component that `which` in [0, 1) selects.

    Returns None if the target is empty.
    """
    whole = boxes.bounding_box(target)
    if whole is None:
        return None
    part = np.ascontiguousarray(target[whole])
    count, _, found, _ = cv2.connectedComponentsWithStats(part)
    x, y, width, height, _ = found[1 + int(which * (count - 1))].tolist()
    y, x = y + whole[0].start, x + whole[1].start
    return slice(y, y + height), slice(x, x + width)


def draw_warp(
    settings: config.Augment,
    crop: Crop,
    output_px: tuple[int, int],
    rng: np.random.Generator,
) -> Warp:
    """Draws a random warp around the crop's pin.

    Every random number is drawn whatever the settings, so switching one change off does
    not alter the others.
    """
    flip_x, flip_y, turn, scale, *shift = rng.random(6)
    matrix = warp_matrix(
        crop,
        flip_x=settings.flip and flip_x < 0.5,
        flip_y=settings.flip and flip_y < 0.5,
        rotate_deg=settings.rotate_deg * (2 * turn - 1),
        zoom=1 + settings.zoom * (2 * scale - 1),
        shift_yx=[settings.shift_px * (2 * share - 1) for share in shift],
    )
    seed = int(rng.integers(2**32))
    if settings.elastic_px == 0:
        return Warp(matrix)
    field = smooth_displacement(
        output_px, settings.elastic_px, settings.elastic_grid_px, seed=seed
    )
    return Warp(matrix, source_points(matrix, field))


def warp_matrix(
    crop: Crop,
    *,
    flip_x: bool = False,
    flip_y: bool = False,
    rotate_deg: float = 0.0,
    zoom: float = 1.0,
    shift_yx=(0.0, 0.0),
) -> np.ndarray:
    """Returns the affine map from output (x, y, 1) to slice (x, y), in pixels.

    Args:
        crop: Crop whose pin stays in place, apart from `shift_yx`.
        flip_x: Mirror left-right, before the rotation.
        flip_y: Mirror front-back, before the rotation.
        rotate_deg: Counter-clockwise rotation of the visible content.
        zoom: Magnification; above 1 enlarges.
        shift_yx: Shift of the visible content down and right, in output pixels.

    Returns:
        (2, 3) float64.
    """
    angle = np.deg2rad(rotate_deg)
    mirror = np.array([[-1.0 if flip_x else 1.0], [-1.0 if flip_y else 1.0]])
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    linear = mirror * turn / zoom
    pin_xy = np.array(crop.pin)[::-1]
    start_xy = np.array(crop.start)[::-1]
    offset = start_xy + pin_xy - linear @ (pin_xy + np.asarray(shift_yx)[::-1])
    return np.column_stack((linear, offset))


def source_points(matrix: np.ndarray, displacement: np.ndarray) -> np.ndarray:
    """Returns the slice position of each output pixel: affine map plus displacement.

    Args:
        matrix: (2, 3) output (x, y, 1) to slice (x, y).
        displacement: (2, y, x) float32, in slice pixels.

    Returns:
        (2, y, x) float32 x and y in the slice.
    """
    x, y = np.arange(displacement.shape[2]), np.arange(displacement.shape[1])
    points = np.empty_like(displacement)
    for plane, (per_x, per_y, start) in zip(points, matrix, strict=True):
        from_y, from_x = per_y * y + start, per_x * x
        np.add.outer(from_y.astype(np.float32), from_x.astype(np.float32), out=plane)
    points += displacement
    return points


def smooth_displacement(
    size_px: tuple[int, int], sd_px: float, distance_px: float, *, seed: int
) -> np.ndarray:
    """Draws a smooth displacement field of cubic B-splines with normal weights.

    Args:
        size_px: (y, x) size of the field.
        sd_px: Standard deviation at every pixel.
        distance_px: Distance between the knots of the splines.
        seed: Seed of the weights.

    Returns:
        (2, y, x) float32, in pixels.
    """
    rows, columns = (spline_basis(length, distance_px) for length in size_px)
    knots = np.random.default_rng(seed).normal(
        0, sd_px, (2, rows.shape[1], columns.shape[1])
    )
    return np.stack(
        [
            multiply_matrices(multiply_matrices(rows, part), columns, cv2.GEMM_2_T)
            for part in knots.astype(np.float32)
        ]
    )


def multiply_matrices(a: np.ndarray, b: np.ndarray, flags: int = 0) -> np.ndarray:
    """Multiplies two matrices without BLAS.

    NumPy's product wakes the BLAS threads, which compete with the threads that make
    batches: it takes 10 ms instead of 0.1 ms when all cores are busy.
    """
    nothing = np.empty((0, 0), np.float32)
    return cv2.gemm(a, b, 1, nothing, 0, flags=flags)


@functools.lru_cache(maxsize=8)
def spline_basis(length: int, distance_px: float) -> np.ndarray:
    """Returns (length, knots) float32 cubic B-splines, normalised at every pixel.

    The squared weights of each pixel sum to 1.
    """
    cell, t = np.divmod(np.arange(length) / distance_px, 1)
    weights = (
        np.stack(
            (
                (1 - t) ** 3,
                3 * t**3 - 6 * t**2 + 4,
                -3 * t**3 + 3 * t**2 + 3 * t + 1,
                t**3,
            ),
            axis=1,
        )
        / 6
    )
    basis = np.zeros((length, int(cell[-1]) + 4), np.float32)
    for knot in range(4):
        basis[np.arange(length), cell.astype(int) + knot] = weights[:, knot]
    return basis / np.linalg.norm(basis, axis=1, keepdims=True)


def warp_image(
    image: np.ndarray, warp: Warp, output_px: tuple[int, int], *, fill: float = AIR_HU
) -> np.ndarray:
    """Warps a (y, x) image with linear interpolation.

    OpenCV is slow on int16, so the image is converted to float32 first: 0.5 ms instead
    of 2 ms for 400 x 400 pixels.

    Returns:
        (y, x) float32; `fill` at pixels that map outside the image.
    """
    return _warped(image.astype(np.float32), warp, output_px, cv2.INTER_LINEAR, fill)


def warp_labels(
    labels: np.ndarray, warp: Warp, output_px: tuple[int, int]
) -> np.ndarray:
    """Warps a (y, x) uint8 image of labels or bits with nearest-neighbour sampling.

    Pixels that map outside the image are 0.
    """
    return _warped(labels, warp, output_px, cv2.INTER_NEAREST, 0)


def _warped(image, warp, output_px, interpolation, fill):
    size_xy = (output_px[1], output_px[0])
    if warp.points is None:
        return cv2.warpAffine(
            image,
            warp.matrix,
            size_xy,
            flags=interpolation | cv2.WARP_INVERSE_MAP,
            borderMode=cv2.BORDER_CONSTANT,
            borderValue=fill,
        )
    return cv2.remap(
        image,
        warp.points[0],
        warp.points[1],
        interpolation,
        borderMode=cv2.BORDER_CONSTANT,
        borderValue=fill,
    )


def draw_intensity(
    settings: config.Augment, rng: np.random.Generator
) -> tuple[float, float]:
    """Draws an exponent for `to_input` and a standard deviation for `add_noise`.

    The logarithm of the exponent is uniform, so darker and brighter are equally likely.
    """
    darker, noisier = rng.random(2)
    gamma = (1 + settings.gamma) ** (2 * darker - 1)
    return float(gamma), float(settings.noise_hu * noisier)


def noise_field(output_px: tuple[int, int], *, seed: int | Sequence[int]) -> np.ndarray:
    """Draws correlated normal noise of mean 0 and standard deviation 1.

    `add_noise` cuts random parts from it.

    Returns:
        (2 y, 2 x) float32, twice the output size along each axis.
    """
    size = (2 * output_px[0], 2 * output_px[1])
    white = np.random.default_rng(seed).standard_normal(size, dtype=np.float32)
    field = cv2.GaussianBlur(white, (0, 0), NOISE_CORRELATION_PX)
    return (field - field.mean()) / field.std()


def add_noise(
    image_hu: np.ndarray, field: np.ndarray, sd_hu: float, rng: np.random.Generator
) -> np.ndarray:
    """Adds a random cut of a noise field, with random sign.

    Args:
        image_hu: (y, x) float32.
        field: Noise from `noise_field` for the same output size.
        sd_hu: Standard deviation of the noise.
        rng: Draws the cut and its sign.

    Returns:
        (y, x) float32 noisy image.
    """
    height, width = image_hu.shape
    top, left = rng.integers((field.shape[0] - height + 1, field.shape[1] - width + 1))
    sign = rng.choice((-1.0, 1.0))
    part = field[top : top + height, left : left + width]
    return cv2.scaleAdd(part, float(sign * sd_hu), image_hu)


def nodule_target(
    reader_bits: np.ndarray,
    nodule_labels: np.ndarray,
    readers_of_label: np.ndarray,
    batches: config.Batches,
) -> np.ndarray:
    """Returns the readers' consensus of one slice.

    `scan.consensus` runs only on the bounding box of the nodules.

    Args:
        reader_bits: (y, x) uint8, one bit per reader's mask.
        nodule_labels: (y, x) uint8 label of the nodule at each pixel.
        readers_of_label: (256,) number of readers who outlined each label of this scan.
        batches: Gives the consensus level and the minimum number of readers.

    Returns:
        (y, x) uint8, 0 or 1.
    """
    mask = np.zeros(nodule_labels.shape, np.uint8)
    box = boxes.bounding_box(nodule_labels)
    if box:
        mask[box] = scan.consensus(
            reader_bits[box],
            nodule_labels[box],
            readers_of_label,
            level=batches.consensus_level,
            min_readers=batches.min_readers,
        )
    return mask
