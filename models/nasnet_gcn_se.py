"""The thesis network: a NASNetMobile encoder and a decoder of GCN and squeeze-excite blocks."""

import hashlib
import os
import urllib.request
from pathlib import Path

import keras
from keras import KerasTensor, layers

from ct import files
from models.layers import (
    BATCH_NORM_MOMENTUM,
    Nearness,
    conv_norm_relu,
    global_convolution,
    mask_head,
    slice_head,
    squeeze_excite,
    upsample_to,
)

TAPS = {
    32: "normal_concat_12",
    16: "normal_concat_8",
    8: "normal_concat_3",
    4: "reduction_concat_stem_1",
    2: "stem_bn1",
}
"""The encoder's last layer at each stride."""

WIDTHS = {32: 6, 16: 6, 8: 4, 4: 3, 2: 2}
"""Decoder channels at each stride, as multiples of `filters`; 32 filters give the thesis'
192 to 64 channels."""

GCN_STRIDES: tuple[int, ...] = (32, 16, 8, 4)
"""Strides of the stages that can have a global convolution, in the order of `gcn_kernels`."""

IMAGENET_URL = (
    "https://storage.googleapis.com/tensorflow/keras-applications/nasnet/"
    "NASNet-mobile-no-top.h5"
)
IMAGENET_MD5 = "1ed92395b5b598bdda52abe5c0dbfd63"


def build(
    input_shape: tuple[int, int, int],
    num_classes: int,
    *,
    weights: str = "none",
    filters: int = 32,
    gcn_kernels: tuple[int, ...] = (13, 19, 19, 19),
    squeeze_excite: bool = True,
    seeded: bool = False,
    dropout: float = 0.0,
    slice_classifier: bool = False,
) -> keras.Model:
    """Builds NASNet-GCN-SE.

    It differs from the thesis in three ways: it takes one output per stride from the encoder
    (after its ReLU), not the output both before and after the ReLU; the tap at stride 2 also
    joins the decoder (the thesis stops at 4), which sharpens small nodules; and it upsamples by
    two with aligned pixels, not to a given size with aligned corners. Keras has no NASNet on
    its torch backend.

    Args:
        input_shape: (y, x, channels), static, y and x at least 32, odd sizes included.
            Weights do not depend on the size: they load into a network built for another.
        num_classes: Number of mask classes, background included.
        weights: "imagenet" starts the encoder from ImageNet weights, "none" from scratch.
        filters: Unit of the decoder's channels; see `WIDTHS`.
        gcn_kernels: Kernel sizes of the global convolutions at stride 32, 16, 8 and 4; a
            shorter tuple leaves them out at the shallow stages.
        squeeze_excite: Use squeeze-excite blocks.
        seeded: Add the channel of `layers.Nearness` to the input.
        dropout: Dropout rate before the last layer of the mask and of the slice classifier.
        slice_classifier: Add a classifier of the whole slice, the false-positive network of the
            thesis.

    Returns:
        A network that maps images in 0..1 (batch, y, x, channels) to float32 probabilities
        (batch, y, x, classes); with the slice classifier, to {"mask": probabilities, "slice":
        (batch, 1)}.

    Raises:
        ValueError: If the shape is not static or too small, if there are more than four
            GCN kernels, or if `seeded` is combined with ImageNet weights.

    Reference: Zoph et al. 2018 (NASNet-A), Peng et al. 2017 (GCN), Hu et al. 2018 (SE).
    """
    check_arguments(input_shape, weights, gcn_kernels)
    if seeded and weights == "imagenet":
        raise ValueError(
            "model.seeded needs model.weights=none, as ImageNet weights have no seed "
            "channel; use --model.weights none"
        )
    kernels = dict(zip(GCN_STRIDES[: len(gcn_kernels)], gcn_kernels, strict=True))

    def context(tap: KerasTensor, stride: int, dilations: tuple[int, ...]):
        return context_block(
            tap,
            filters * WIDTHS[stride],
            dilations=dilations,
            gcn_kernel=kernels.get(stride, 0),
            squeeze_excite=squeeze_excite,
        )

    inputs = keras.Input(input_shape)
    taps = encode(Nearness()(inputs) if seeded else inputs, weights)

    x = context(taps[32], 32, dilations=(1, 2, 3, 4, 5))
    for stride, next_stride in ((16, 8), (8, 4), (4, 2)):
        skip = context(taps[stride], stride, dilations=(3, 6))
        x = layers.Concatenate()([upsample_to(x, skip), skip])
        x = gated(x, squeeze_excite)
        x = conv_norm_relu(x, filters * WIDTHS[next_stride], 3)
    x = layers.Concatenate()([upsample_to(x, taps[2]), taps[2]])
    x = conv_norm_relu(x, filters * WIDTHS[2], 3)
    x = layers.Dropout(dropout)(x)
    mask = mask_head(x, num_classes, like=inputs)
    if not slice_classifier:
        return keras.Model(inputs, mask, name="nasnet_gcn_se")
    outputs = {"mask": mask, "slice": slice_head(taps[32], dropout)}
    return keras.Model(inputs, outputs, name="nasnet_gcn_se")


def check_arguments(
    input_shape: tuple[int, int, int], weights: str, gcn_kernels: tuple[int, ...]
) -> None:
    if None in input_shape or min(input_shape[:2]) < 32:
        raise ValueError(
            f"nasnet_gcn_se: input_shape is {input_shape}; expected a static (y, x, "
            "channels) with y and x of at least 32: without a size Keras builds another "
            "NASNet, whose weights do not fit"
        )
    if weights not in ("none", "imagenet"):
        raise ValueError(f"weights is {weights!r}; expected 'none' or 'imagenet'")
    if len(gcn_kernels) > len(GCN_STRIDES):
        raise ValueError(
            f"gcn_kernels is {gcn_kernels}; expected at most one kernel for each of the "
            f"strides {GCN_STRIDES}"
        )


def encode(inputs: KerasTensor, weights: str) -> dict[int, KerasTensor]:
    """Returns the encoder outputs by stride, each of size ceil(input size / stride)."""
    encoder = nasnet(inputs)
    if weights == "imagenet":
        donor = keras.applications.NASNetMobile(
            input_shape=(224, 224, 3), include_top=False, weights=imagenet_file()
        )
        copy_encoder(donor, encoder)
    taps = {stride: encoder.get_layer(name).output for stride, name in TAPS.items()}
    return {
        stride: layers.Activation("relu", name=f"tap_{stride}")(tap)
        for stride, tap in taps.items()
    }


def nasnet(inputs: KerasTensor) -> keras.Model:
    """Builds an untrained NASNetMobile for images in 0..1 of any size and channels."""
    # The stem's 3x3 convolution of stride 2 does not pad, so 400 would become 199. Padding
    # with one line of air at the end (two if odd) gives 200; all later stages round up.
    padding = tuple((0, 1 + size % 2) for size in inputs.shape[1:3])
    x = layers.ZeroPadding2D(padding)(inputs)
    x = layers.Rescaling(2.0, offset=-1.0)(x)  # the range NASNet was trained with
    encoder = keras.applications.NASNetMobile(
        input_shape=x.shape[1:], include_top=False, weights=None, input_tensor=x
    )
    for layer in encoder.layers:
        if isinstance(layer, layers.BatchNormalization):
            layer.momentum = BATCH_NORM_MOMENTUM
    return encoder


def copy_encoder(donor: keras.Model, encoder: keras.Model) -> None:
    """Copies the weights of an RGB NASNetMobile to `encoder`, by layer name.

    The stem's kernel is summed over red, green and blue and divided among the encoder's
    channels, so an image with equal channels gives the same output as the grey RGB image.
    """
    channels = encoder.get_layer("stem_conv1").kernel.shape[2]
    for layer in donor.layers:
        values = layer.get_weights()
        if layer.name == "stem_conv1":
            summed = values[0].sum(axis=2, keepdims=True) / channels
            values = [summed.repeat(channels, axis=2)]
        if values:
            encoder.get_layer(layer.name).set_weights(values)


def imagenet_file() -> Path:
    """Returns the path of NASNetMobile's ImageNet weights in Keras' cache.

    Downloads the file if it is missing.

    Raises:
        OSError: If the download fails, or the file's MD5 is not that of the published file.
    """
    home = Path(os.environ.get("KERAS_HOME", Path.home() / ".keras"))
    path = home / "models" / "nasnet_mobile_no_top.h5"
    instead = f"put that file at {path}, or train with --model.weights none"
    if not path.exists():
        try:
            with files.write_atomically(path) as partial:
                urllib.request.urlretrieve(IMAGENET_URL, partial)
        except OSError as error:
            raise OSError(
                f"ImageNet weights: cannot download {IMAGENET_URL} ({error}); {instead}"
            ) from error
    found = hashlib.md5(path.read_bytes(), usedforsecurity=False).hexdigest()
    if found != IMAGENET_MD5:
        raise OSError(
            f"ImageNet weights: {path} has MD5 {found}; expected {IMAGENET_MD5}; "
            f"download {IMAGENET_URL} again and {instead}"
        )
    return path


def gated(x: KerasTensor, use: bool) -> KerasTensor:
    return squeeze_excite(x) if use else x


def context_block(
    x: KerasTensor,
    filters: int,
    *,
    dilations: tuple[int, ...],
    gcn_kernel: int,
    squeeze_excite: bool,
) -> KerasTensor:
    """Combines the features of one stage at several scales.

    Args:
        x: (batch, y, x, channels).
        filters: Channels of each branch and of the result.
        dilations: Dilation rates; each adds a 3x3 branch, separable if above 1.
        gcn_kernel: Kernel size of the global convolution; 0 for none.
        squeeze_excite: Apply squeeze-excite before and after the branches.

    Returns:
        (batch, y, x, filters).
    """
    x = gated(x, squeeze_excite)
    branches = [conv_norm_relu(x, filters, 1)]
    for dilation in dilations:
        branches.append(
            conv_norm_relu(x, filters, 3, dilation=dilation, separable=dilation > 1)
        )
    if gcn_kernel:
        branches.append(global_convolution(x, filters, gcn_kernel))
    x = gated(layers.Concatenate()(branches), squeeze_excite)
    return conv_norm_relu(x, filters, 1)
