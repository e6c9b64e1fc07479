"""Plain convolutional 3-D U-Net as configured by nnU-Net, with optional cube masking."""

from typing import Literal

import keras
from keras import KerasTensor, layers

from models.layers import BATCH_NORM_MOMENTUM, Nearness, slice_head
from models.masking import RandomCubeMasking, noise_size


def build(
    input_shape: tuple[int, int, int, int],
    num_classes: int,
    *,
    filters: int = 16,
    max_filters: int = 320,
    depth: int = 4,
    norm: Literal["instance", "batch"] = "instance",
    dropout: float = 0.0,
    deep_supervision: bool = False,
    cube_px: int = 7,
    mask_fraction: float = 0.0,
    mask_value: float = 1.0,
    mask_varied: bool = False,
    noise_input: bool = False,
    seeded: bool = False,
    slice_classifier: bool = False,
) -> keras.Model:
    """Builds a U-Net with two convolutions per level.

    Strided convolutions halve the size, transposed convolutions double it.

    Args:
        input_shape: (z, y, x, channels), static, each a multiple of 2^depth.
        num_classes: Number of mask classes, background included.
        filters: Channels of the first level; each level below doubles them.
        max_filters: Upper limit of the channels of a level.
        depth: Number of times z, y and x are halved.
        norm: "instance", or "batch", which costs no time at inference.
        dropout: Spatial dropout rate before the second convolution of each level in the
            lower half of the network; 0 for none.
        deep_supervision: Also predict at every level but the two lowest; the output is
            then a list, finest level first.
        cube_px: Edge length of the masked cubes in voxels.
        mask_fraction: Share of the cubes that is masked in training; 0 for none.
        mask_value: Value of masked voxels.
        mask_varied: In training, mask a share drawn from 0 to `mask_fraction`.
        noise_input: Take the mask noise as a second input, and mask at inference too.
        seeded: Add the channel of `layers.Nearness` to the input.
        slice_classifier: Add a classifier of the whole input.

    Returns:
        A network that maps volumes (batch, z, y, x, channels) to float32 probabilities (batch,
        z, y, x, classes); with the classifier, to {"mask": probabilities, "slice": (batch, 1)}.

    Raises:
        ValueError: If the shape is not static or not a multiple of 2^depth, or if deep
            supervision is combined with the classifier.

    Reference: Isensee et al. 2021 (nnU-Net), figure 2; Zhuang et al. 2025 (masking).
    """
    stride = 2**depth
    if None in input_shape or any(size % stride for size in input_shape[:3]):
        raise ValueError(
            f"unet3d: input_shape is {input_shape}; expected static z, y and x that are "
            f"multiples of {stride} (depth {depth})"
        )
    if deep_supervision and slice_classifier:
        raise ValueError(
            "unet3d: model.deep_supervision and model.slice_classifier are both set; "
            "expected one of them"
        )
    widths = [min(filters * 2**level, max_filters) for level in range(depth + 1)]
    inputs = {"volume": keras.Input(input_shape, name="volume")}
    x = inputs["volume"]
    if mask_fraction:
        masking = RandomCubeMasking(
            cube_px, mask_fraction, mask_value, mask_varied, name="masking"
        )
        if noise_input:
            size = noise_size(input_shape[:3], cube_px)
            inputs["noise"] = keras.Input((size,), name="noise")
            x = masking(x, noise=inputs["noise"])
        else:
            x = masking(x)
    if seeded:
        x = Nearness()(x)

    skips = []
    for level, width in enumerate(widths):
        rate = dropout if level >= depth / 2 else 0.0
        x = block(x, width, norm, strides=2 if level else 1, dropout=rate)
        skips.append(x)
    deepest, heads = x, []
    for level in reversed(range(depth)):
        x = layers.Conv3DTranspose(widths[level], 2, strides=2, use_bias=False)(x)
        x = layers.Concatenate()([x, skips[level]])
        rate = dropout if level >= depth / 2 else 0.0
        x = block(x, widths[level], norm, dropout=rate)
        if level == 0 or (deep_supervision and level < depth - 1):
            heads.append(probability(x, num_classes, name=f"mask{level or ''}"))
    outputs = heads[::-1] if deep_supervision else heads[-1]
    if slice_classifier:
        outputs = {"mask": heads[-1], "slice": slice_head(deepest, dropout)}
    return keras.Model(
        inputs if noise_input else inputs["volume"], outputs, name="unet3d"
    )


def block(
    x: KerasTensor, filters: int, norm: str, *, strides: int = 1, dropout: float = 0.0
) -> KerasTensor:
    """Applies two normalised 3x3x3 convolutions with leaky ReLU; the first may be strided."""
    for place in range(2):
        if place and dropout:
            x = layers.SpatialDropout3D(dropout)(x)
        x = layers.Conv3D(
            filters,
            3,
            strides=1 if place else strides,
            padding="same",
            use_bias=False,
        )(x)
        x = normalisation(norm)(x)
        x = layers.LeakyReLU(0.01)(x)
    return x


def normalisation(norm: str) -> layers.Layer:
    if norm == "instance":
        return layers.GroupNormalization(groups=-1, epsilon=1e-5)
    return layers.BatchNormalization(momentum=BATCH_NORM_MOMENTUM)


def probability(x: KerasTensor, num_classes: int, *, name: str) -> KerasTensor:
    """Returns class probabilities per voxel, in float32 under any precision policy."""
    x = layers.Conv3D(num_classes, 1, dtype="float32")(x)
    return layers.Softmax(dtype="float32", name=name)(x)
