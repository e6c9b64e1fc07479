"""Conversion of HU to network input: pixel size, window, normalisation and tiles."""

from collections.abc import Sequence

import cv2
import numpy as np

import config
from ct import boxes
from ct.boxes import Tile
from ct.scan import AIR_HU

EPSILON = 1e-6
"""Small number added to the divisor of the zscore and minmax normalisations."""

POPULATION_HU = (-370.00039, 436.59987)
"""Mean and standard deviation of HU for the population normalisation: the values of
Zhuang et al. 2025, so that inputs compare with theirs."""


def resized_px(
    size_px: Sequence[int], spacing_mm: Sequence[float], batches: config.Batches
) -> tuple[int, int]:
    """Returns a slice's (y, x) size at `batches.pixel_mm`; unchanged if that is 0."""
    y, x = size_px
    if not batches.pixel_mm:
        return y, x
    y_mm, x_mm = spacing_mm
    return (
        max(round(y * y_mm / batches.pixel_mm), 1),
        max(round(x * x_mm / batches.pixel_mm), 1),
    )


def resized(image: np.ndarray, size_px: tuple[int, int]) -> np.ndarray:
    """Resizes a (y, x) image; averages along axes that shrink, else interpolates."""
    y, x = image.shape
    if (size_px[0] - y) * (size_px[1] - x) < 0:  # OpenCV averages only if no axis grows
        image = resized(image, (size_px[0], x))
    shrinks = size_px[0] < image.shape[0] or size_px[1] < x
    how = cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR
    return cv2.resize(image, size_px[::-1], interpolation=how)


def resized_labels(labels: np.ndarray, size_px: tuple[int, int]) -> np.ndarray:
    """Resizes (y, x) uint8 labels; a label needs at least half of the new pixel."""
    result = np.zeros(size_px, np.uint8)
    for label in range(1, int(labels.max(initial=0)) + 1):
        share = resized((labels == label).view(np.uint8) * np.uint8(255), size_px)
        result[share >= 128] = label
    return result


def tiles(
    lung: np.ndarray | None, slice_px: tuple[int, ...], output_px: tuple[int, int]
) -> list[Tile]:
    """Returns the tiles that cover a slice, at validation and in infer.py.

    Args:
        lung: (y, x) lung labels; tiles without lung are left out. None covers the whole
            slice.
        slice_px: (y, x) size of the slice.
        output_px: (y, x) size of a tile.
    """
    if lung is None:
        return boxes.tiles(boxes.full_box(slice_px), output_px)
    return boxes.tiles_on(lung, output_px)


def padding_value(image_hu: np.ndarray, batches: config.Batches) -> float:
    """Returns the padding value: air, or the image's minimum where HU are unknown."""
    return float(image_hu.min()) if batches.normalisation == "relative" else AIR_HU


def to_input(
    image_hu: np.ndarray,
    lung: np.ndarray | None,
    batches: config.Batches,
    *,
    gamma: float = 1.0,
) -> np.ndarray:
    """Converts HU to network input, for training, inference and serving alike.

    Computes in float32, in this order:

    1. window: (hu - low) / (high - low), clipped to 0..1;
    2. gamma, if not 1: window ** gamma (augmentation only);
    3. with `lung_mask`, 0 outside the lungs;
    4. zscore: (v - mean) / (sd + EPSILON), where sd divides by n, or
       minmax: (v - min) / (max - min + EPSILON), over all pixels of this image, or
       population: back to HU, then (hu - mean) / sd of `POPULATION_HU`.

    With relative, low and high in step 1 are the minimum and maximum of this image and
    step 4 is zscore, so the result does not depend on the linear scale of the values.

    Args:
        image_hu: (y, x) or (z, y, x) HU of any real dtype.
        lung: Array of the same shape, above 0 in the lungs; ignored without
            `lung_mask`.
        batches: Window, mask and normalisation.
        gamma: Exponent of step 2.

    Returns:
        float32 of the same shape.

    Raises:
        ValueError: If `lung_mask` is set and there is no lung mask.
    """
    image = windowed(image_hu, lung, batches, gamma=gamma)
    return normalised(image, batches)


def windowed(
    image_hu: np.ndarray,
    lung: np.ndarray | None,
    batches: config.Batches,
    *,
    gamma: float = 1.0,
) -> np.ndarray:
    """Applies steps 1 to 3 of `to_input`, which treat each voxel separately."""
    low, high = batches.window_hu
    if batches.normalisation == "relative":
        low, high = float(image_hu.min()), float(image_hu.max())
    image = np.subtract(image_hu, np.float32(low), dtype=np.float32)
    image /= np.float32((high - low) or 1)
    np.clip(image, 0, 1, out=image)
    if gamma != 1:
        # Four times faster than np.power, which is not vectorised for float32.
        with np.errstate(divide="ignore"):
            np.log(image, out=image)
        image *= np.float32(gamma)
        np.exp(image, out=image)
    if not batches.lung_mask:
        return image
    if lung is None:
        raise ValueError(
            "batches.lung_mask is set but the scan has no lung mask; make one with "
            "preprocess.py or use --batches.no-lung-mask"
        )
    flat = image.reshape(-1, image.shape[-1])  # OpenCV masks only 2-D arrays
    inside = (lung > 0).view(np.uint8).reshape(flat.shape)
    return cv2.bitwise_and(flat, flat, mask=inside).reshape(image.shape)


def normalised(image: np.ndarray, batches: config.Batches) -> np.ndarray:
    """Applies the last step of `to_input`, in place."""
    if batches.normalisation in ("zscore", "relative"):
        mean, sd = image.mean(), image.std()
        image -= mean
        image /= sd + np.float32(EPSILON)
    elif batches.normalisation == "minmax":
        least, most = image.min(), image.max()
        image -= least
        image /= most - least + np.float32(EPSILON)
    elif batches.normalisation == "population":
        (low, high), (mean, sd) = batches.window_hu, POPULATION_HU
        image *= np.float32((high - low) / sd)
        image += np.float32((low - mean) / sd)
    return image


def one_hot(mask: np.ndarray) -> np.ndarray:
    """Splits a (...) uint8 mask of 0 and 1 into (..., 2): background, then target."""
    flat = mask.reshape(-1, mask.shape[-1])
    return cv2.merge((1 - flat, flat)).reshape(*mask.shape, 2)
