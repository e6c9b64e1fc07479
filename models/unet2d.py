"""Plain 2-D U-Net, the baseline."""

from typing import Literal

import keras
from keras import KerasTensor, layers

from models.layers import (
    BATCH_NORM_MOMENTUM,
    Nearness,
    mask_head,
    slice_head,
    upsample_to,
)


def build(
    input_shape: tuple[int, int, int],
    num_classes: int,
    *,
    filters: int = 32,
    depth: int = 4,
    norm: Literal["instance", "batch"] = "instance",
    residual: bool = False,
    seeded: bool = False,
    dropout: float = 0.0,
    slice_classifier: bool = False,
) -> keras.Model:
    """Builds a U-Net with two 3x3 convolutions per level.

    Unlike the network of the paper it has padded convolutions, normalisation and bilinear
    upsampling.

    Args:
        input_shape: (y, x, channels), static; any size works, odd sizes included.
        num_classes: Number of mask classes, background included.
        filters: Channels of the first level; each of the `depth` levels below doubles them.
        depth: Number of times y and x are halved.
        norm: "instance" normalises each image by itself in training and at inference, so
            small batches do no harm; "batch" is the classical choice.
        residual: Add a shortcut from the input to the output of each encoder level, through
            a 1x1 convolution, as He et al. 2016 do where widths differ.
        seeded: Add the channel of `layers.Nearness` to the input.
        dropout: Dropout rate at the deepest level and before the slice classifier's last
            layer.
        slice_classifier: Add a classifier of the whole slice.

    Returns:
        A network that maps images (batch, y, x, channels) to float32 probabilities (batch, y,
        x, classes); with the slice classifier, to {"mask": probabilities, "slice": (batch, 1)}.

    Raises:
        ValueError: If the input shape is not static.

    Reference: Ronneberger et al. 2015, figure 1.
    """
    if None in input_shape:
        raise ValueError(
            f"unet2d: input_shape is {input_shape}; expected a static size"
        )
    inputs = keras.Input(input_shape)
    x, skips = Nearness()(inputs) if seeded else inputs, []
    for level in range(depth):
        x = double_convolution(x, filters * 2**level, norm, residual=residual)
        skips.append(x)
        x = layers.MaxPooling2D(2, padding="same")(x)
    x = double_convolution(x, filters * 2**depth, norm, residual=residual)
    deepest = x = layers.Dropout(dropout)(x)
    for level in reversed(range(depth)):
        x = layers.Concatenate()([upsample_to(x, skips[level]), skips[level]])
        x = double_convolution(x, filters * 2**level, norm)
    mask = mask_head(x, num_classes)
    if not slice_classifier:
        return keras.Model(inputs, mask, name="unet2d")
    outputs = {"mask": mask, "slice": slice_head(deepest, dropout)}
    return keras.Model(inputs, outputs, name="unet2d")


def double_convolution(
    x: KerasTensor, filters: int, norm: str, *, residual: bool = False
) -> KerasTensor:
    """Applies convolution, normalisation and leaky ReLU twice, with an optional shortcut."""
    shortcut = x
    for last in (False, True):
        x = normalised_convolution(x, filters, 3, norm)
        if residual and last:
            x = layers.Add()([x, normalised_convolution(shortcut, filters, 1, norm)])
        x = layers.LeakyReLU(0.01)(x)
    return x


def normalised_convolution(
    x: KerasTensor, filters: int, size_px: int, norm: str
) -> KerasTensor:
    x = layers.Conv2D(filters, size_px, padding="same", use_bias=False)(x)
    if norm == "instance":
        return layers.GroupNormalization(groups=-1, epsilon=1e-5)(x)
    return layers.BatchNormalization(momentum=BATCH_NORM_MOMENTUM)(x)
