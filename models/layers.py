"""Building blocks of the networks: functions on Keras tensors, channels last."""

import keras
import numpy as np
from keras import KerasTensor, layers, ops

BATCH_NORM_MOMENTUM = 0.95
"""Momentum of batch normalisation. Keras' NASNet uses 0.9997, meant for millions of steps:
after a few hundred steps its moving statistics are still near their initial values, so the
network fails at inference."""


SEED_PX = 16.0
"""Distance in pixels from the seed point at which nearness is one half."""


@keras.saving.register_keras_serializable("nodules")
class Nearness(layers.Layer):
    """Layer that adds a channel with the nearness of each pixel to the input's centre, 0..1.

    Nearness is s / (s + distance) with s = `SEED_PX`, independent of the input size.

    Input shape: (batch, y, x, channels) or (batch, z, y, x, channels), spatial sizes static.
    Output shape: the same with one channel more.
    """

    def call(self, inputs):
        size = inputs.shape[1:-1]
        axes = (np.arange(length) - (length - 1) / 2 for length in size)
        distance = np.sqrt(sum(axis**2 for axis in np.ix_(*axes)))
        near = (SEED_PX / (SEED_PX + distance))[None, ..., None]
        channel = ops.convert_to_tensor(near, dtype=inputs.dtype)
        channel = ops.broadcast_to(channel, (ops.shape(inputs)[0], *size, 1))
        return ops.concatenate([inputs, channel], axis=-1)

    def compute_output_shape(self, input_shape):
        return (*input_shape[:-1], input_shape[-1] + 1)


def conv_norm_relu(
    x: KerasTensor,
    filters: int,
    size_px: int,
    *,
    dilation: int = 1,
    separable: bool = False,
) -> KerasTensor:
    """Applies convolution, batch normalisation and ReLU; returns (batch, y, x, filters)."""
    kind = layers.SeparableConv2D if separable else layers.Conv2D
    x = kind(filters, size_px, padding="same", dilation_rate=dilation, use_bias=False)(
        x
    )
    return norm_relu(x)


def norm_relu(x: KerasTensor) -> KerasTensor:
    """Applies batch normalisation, then ReLU."""
    x = layers.BatchNormalization(momentum=BATCH_NORM_MOMENTUM)(x)
    return layers.Activation("relu")(x)


def squeeze_excite(x: KerasTensor, *, ratio: int = 8) -> KerasTensor:
    """Scales each channel by a gate in 0..1 computed from the means of all channels.

    Reference: Hu et al. 2018, section 3; no biases, as in the thesis.
    """
    channels = x.shape[-1]
    gate = layers.GlobalAveragePooling2D(keepdims=True)(x)
    gate = layers.Dense(max(channels // ratio, 1), activation="relu", use_bias=False)(
        gate
    )
    gate = layers.Dense(channels, activation="sigmoid", use_bias=False)(gate)
    return layers.Multiply()([x, gate])


def global_convolution(x: KerasTensor, filters: int, size_px: int) -> KerasTensor:
    """Applies a GCN block: a `size_px` x `size_px` receptive field from 1-D convolutions.

    The result is the sum of column-then-row and row-then-column convolutions, linear up to
    the normalisation at the end.

    Reference: Peng et al. 2017, section 3.2.
    """
    column, row = (size_px, 1), (1, size_px)
    paths = []
    for first, second in ((column, row), (row, column)):
        path = layers.Conv2D(filters, first, padding="same")(x)
        paths.append(layers.Conv2D(filters, second, padding="same")(path))
    return norm_relu(layers.Add()(paths))


def upsample_to(
    x: KerasTensor, like: KerasTensor, *, dtype: str | None = None
) -> KerasTensor:
    """Doubles y and x bilinearly, then crops surplus last lines to match the size of `like`.

    This inverts an encoder that rounds up: 25 -> 13 on the way down, 13 -> 26 -> 25 on the
    way up. The remaining pixels stay aligned with the pixels that they came from.
    """
    x = layers.UpSampling2D(2, interpolation="bilinear", dtype=dtype)(x)
    surplus = [
        have - want for have, want in zip(x.shape[1:3], like.shape[1:3], strict=True)
    ]
    # Crop even if there is nothing to cut: Keras stores weights in the order of the graph,
    # which must be the same for every input size.
    return layers.Cropping2D(tuple((0, lines) for lines in surplus), dtype=dtype)(x)


def mask_head(
    x: KerasTensor, num_classes: int, *, like: KerasTensor | None = None
) -> KerasTensor:
    """Returns class probabilities per pixel, in float32 under any precision policy.

    Args:
        x: (batch, y, x, channels).
        num_classes: Number of classes, background included.
        like: Tensor of twice the size of `x`; the probabilities are upsampled to its size.
            None keeps the size of `x`. The convolution comes first: it commutes with
            bilinear upsampling and then works on a quarter of the pixels.
    """
    x = layers.Conv2D(num_classes, 1, dtype="float32")(x)
    if like is not None:
        x = upsample_to(x, like, dtype="float32")
    return layers.Softmax(dtype="float32", name="mask")(x)


def slice_head(x: KerasTensor, dropout: float) -> KerasTensor:
    """Returns (batch, 1) nodule probabilities, one per image or volume, from the last stage."""
    volumes = len(x.shape) == 5
    x = (
        layers.GlobalAveragePooling3D() if volumes else layers.GlobalAveragePooling2D()
    )(x)
    x = layers.Dropout(dropout)(x)
    return layers.Dense(1, activation="sigmoid", dtype="float32", name="slice")(x)
