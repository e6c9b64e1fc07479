"""Random changes of a slice and its masks, its crops, and what enters a network.

Everything that moves pixels (flips, rotation, zoom, shift, elastic displacement and the
crop) is one map from output pixels to slice pixels, so an image is interpolated once and
its masks follow it exactly. Points and displacements in arrays for OpenCV are (x, y);
everything else is (y, x).
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
"""A slice's masks travel as bits of one uint8 image, so that one warp moves both."""

NOISE_CORRELATION_PX = 0.8
"""Width (sigma) of the kernel that makes neighbouring pixels' noise alike, as
reconstruction does."""


@dataclass(frozen=True, eq=False)
class Warp:
    """Where each output pixel is taken from.

    Attributes:
        matrix: (2, 3) float64; output (x, y, 1) to slice (x, y).
        points: (2, y, x) float32 slice x and y of each output pixel, where `matrix` alone
            does not give them; else None.
    """

    matrix: np.ndarray
    points: np.ndarray | None = None

    def within(self, box: Box) -> "Warp":
        """The same warp, for a (y, x) box of the output alone."""
        matrix = self.matrix.copy()
        matrix[:, 2] += self.matrix[:, :2] @ (box[1].start, box[0].start)
        points = None if self.points is None else self.points[:, box[0], box[1]]
        return Warp(matrix, points)


def crop_at_lungs(lung: np.ndarray, output_px: tuple[int, int]) -> Crop:
    """The part centred on the lungs' bounding box; the slice's centre without lungs.

    Args:
        lung: (y, x) uint8 lung labels.
        output_px: (y, x) size of the crop.
    """
    box = boxes.around(lung)
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
    """A part with a nodule anywhere in it, drawn evenly among the slice's nodules.

    A slice without a nodule is treated as if a random point of its lungs' bounding box
    were one, so that negatives come from where nodules are. The crop stays within the
    slice where it can. Turns and zooms are pinned to the nodule, which stays inside.

    Args:
        target: (y, x) uint8, above 0 in nodules.
        lung: (y, x) uint8 lung labels.
        output_px: (y, x) size of the crop.
        rng: Draws which nodule, and where in the crop it lies.
        margin_px: Distance the nodule keeps from the crop's border, for a later shift.
    """
    which, *place = rng.random(5)
    box = _nodule_box(target, which)
    lungs = None if box else boxes.around(lung)
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
    """The box around one connected nodule; `which` in [0, 1) chooses. None without any."""
    whole = boxes.around(target)
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
    """A random warp around the crop's pin.

    Every number is drawn whatever the settings, so switching one change off leaves the
    others as they were.
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
    """The affine map from output (x, y, 1) to slice (x, y), in pixels.

    Args:
        crop: Its pin stays in place but for `shift_yx`.
        flip_x: Mirror left-right, before the turn.
        flip_y: Mirror front-back, before the turn.
        rotate_deg: Counter-clockwise turn of what is seen.
        zoom: Above 1 makes things larger.
        shift_yx: How far what is seen moves down and right, in output pixels.

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
    """Where each output pixel is taken from: the affine map, and the displacement added.

    Args:
        matrix: (2, 3) output (x, y, 1) to slice (x, y).
        displacement: (2, y, x) float32, in slice pixels.

    Returns:
        (2, y, x) float32: the slice's x and y.
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
    """A smooth random field: cubic B-splines with normal weights.

    Args:
        size_px: (y, x) size of the field.
        sd_px: Standard deviation at every pixel.
        distance_px: Between the knots of the splines.
        seed: Of the weights.

    Returns:
        (2, y, x) float32, in pixels.
    """
    rows, columns = (spline_basis(length, distance_px) for length in size_px)
    knots = np.random.default_rng(seed).normal(
        0, sd_px, (2, rows.shape[1], columns.shape[1])
    )
    return np.stack(
        [
            product(product(rows, part), columns, cv2.GEMM_2_T)
            for part in knots.astype(np.float32)
        ]
    )


def product(a: np.ndarray, b: np.ndarray, flags: int = 0) -> np.ndarray:
    """The matrix product, without BLAS.

    NumPy's wakes the threads of BLAS, which compete with those that make batches: 10 ms
    in place of 0.1 ms where all cores are busy.
    """
    nothing = np.empty((0, 0), np.float32)
    return cv2.gemm(a, b, 1, nothing, 0, flags=flags)


@functools.lru_cache(maxsize=8)
def spline_basis(length: int, distance_px: float) -> np.ndarray:
    """(length, knots) float32 cubic B-splines whose squares sum to 1 at every pixel."""
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
    """A (y, x) image seen through `warp`, interpolated linearly.

    OpenCV is slow on int16, so the image is made float32 first: 0.5 ms in place of 2 ms
    for 400 x 400 pixels.

    Returns:
        (y, x) float32; `fill` where the warp reaches beyond the image.
    """
    return _warped(image.astype(np.float32), warp, output_px, cv2.INTER_LINEAR, fill)


def warp_labels(
    labels: np.ndarray, warp: Warp, output_px: tuple[int, int]
) -> np.ndarray:
    """A (y, x) uint8 image of labels or bits seen through `warp`; nearest, 0 beyond."""
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
    """A random exponent for `to_input` and a standard deviation for `add_noise`.

    The logarithm of the exponent is uniform, so darker and brighter are as likely.
    """
    darker, noisier = rng.random(2)
    gamma = (1 + settings.gamma) ** (2 * darker - 1)
    return float(gamma), float(settings.noise_hu * noisier)


def noise_field(output_px: tuple[int, int], *, seed: int | Sequence[int]) -> np.ndarray:
    """Correlated normal noise of mean 0 and standard deviation 1, to cut crops from.

    Returns:
        (2 y, 2 x) float32.
    """
    size = (2 * output_px[0], 2 * output_px[1])
    white = np.random.default_rng(seed).standard_normal(size, dtype=np.float32)
    field = cv2.GaussianBlur(white, (0, 0), NOISE_CORRELATION_PX)
    return (field - field.mean()) / field.std()


def add_noise(
    image_hu: np.ndarray, field: np.ndarray, sd_hu: float, rng: np.random.Generator
) -> np.ndarray:
    """Adds a random, randomly mirrored cut of a noise field.

    Args:
        image_hu: (y, x) float32.
        field: From `noise_field`, of the same output size.
        sd_hu: Standard deviation of the noise.
        rng: Draws the cut.

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
    """The readers' consensus of one slice; `scan.consensus` where it need be computed.

    Args:
        reader_bits: (y, x) uint8 bits of the readers' masks.
        nodule_labels: (y, x) uint8 label of the nodule at each pixel.
        readers_of_label: (256,) number of readers of each label of this scan.
        batches: Level of consensus, least number of readers.

    Returns:
        (y, x) uint8, 0 or 1.
    """
    mask = np.zeros(nodule_labels.shape, np.uint8)
    box = boxes.around(nodule_labels)
    if box:
        mask[box] = scan.consensus(
            reader_bits[box],
            nodule_labels[box],
            readers_of_label,
            level=batches.consensus_level,
            min_readers=batches.min_readers,
        )
    return mask
