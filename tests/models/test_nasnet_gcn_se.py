"""NASNet-GCN-SE. One build takes seconds, so networks are shared where they can be."""

import hashlib
import re
from functools import partial

import h5py
import keras
import numpy as np
import pytest
from keras import layers
from keras.src.legacy.saving import legacy_h5_format

from models import nasnet_gcn_se

SMALL = partial(nasnet_gcn_se.build, filters=4)


@pytest.fixture(scope="module")
def model():
    return SMALL((64, 64, 1), 2)


def context_parameters(into, width, plain, separable, kernel):
    """Weights of one context block; each normalisation has four numbers per channel."""
    branches = 1 + plain + separable + 1
    gates = sum(2 * n * (n // 8) for n in (into, branches * width))
    convolutions = into * width + plain * 9 * into * width
    convolutions += separable * (9 * into + into * width)
    lines = 2 * (kernel * into * width + width + kernel * width * width + width)
    last = branches * width * width
    return gates + convolutions + lines + last + 4 * width * (branches + 1)


def decoder_parameters(filters):
    stages = ((32, 1056, 6, 1, 4, 13), (16, 528, 6, 0, 2, 19))
    stages += ((8, 264, 4, 0, 2, 19), (4, 44, 3, 0, 2, 19))
    total = sum(
        context_parameters(into, units * filters, plain, separable, kernel)
        for _, into, units, plain, separable, kernel in stages
    )
    for joined, units in ((6 + 6, 4), (4 + 4, 3), (3 + 3, 2)):
        joined, width = joined * filters, units * filters
        total += 2 * joined * (joined // 8) + 9 * joined * width + 4 * width
    joined, width = 2 * filters + 32, 2 * filters  # the stem's 32 channels
    return total + 9 * joined * width + 4 * width + 2 * width + 2


NASNET_MOBILE = 4_269_716
"""Weights of NASNetMobile without its top, for RGB images, by keras.applications."""


def test_the_network_passes_the_harness(check_model):
    stem = 2 * 9 * 32  # two of the three channels of the stem's 32 kernels
    check_model(SMALL, parameters=NASNET_MOBILE - stem + decoder_parameters(4))


def test_every_stage_is_half_the_last_rounded_up():
    network = SMALL((400, 400, 1), 2)
    sizes = [network.get_layer(f"tap_{s}").output.shape[1] for s in (2, 4, 8, 16, 32)]
    assert sizes == [200, 100, 50, 25, 13]
    assert network.output.shape == (None, 400, 400, 2)


def test_the_encoder_forgets_fast_enough_for_short_runs(model):
    momenta = {
        layer.momentum
        for layer in model.layers
        if isinstance(layer, layers.BatchNormalization)
    }
    assert momenta == {nasnet_gcn_se.BATCH_NORM_MOMENTUM}


def convolution_sizes(model):
    """Longest sides of the line-shaped kernels, which only GCN blocks have."""
    return sorted(
        max(layer.kernel_size)
        for layer in model.layers
        if isinstance(layer, layers.Conv2D) and len(set(layer.kernel_size)) == 2
    )


def test_each_stage_has_its_gcn_kernel(model):
    # Two paths of two convolutions: four per stage.
    assert convolution_sizes(model) == [13] * 4 + [19] * 12


def test_ablations_take_out_gcn_and_squeeze_excite():
    network = SMALL((64, 64, 1), 2, gcn_kernels=(), squeeze_excite=False)
    assert convolution_sizes(network) == []
    assert not [x for x in network.layers if isinstance(x, layers.Dense)]
    assert not [x for x in network.layers if isinstance(x, layers.Multiply)]


def test_the_slice_classifier_is_a_second_output(batch):
    network = SMALL((64, 64, 1), 2, slice_classifier=True, dropout=0.1)
    outputs = network(batch((64, 64))[0], training=False)
    assert outputs["mask"].shape == (2, 64, 64, 2)
    assert outputs["slice"].shape == (2, 1)
    assert np.all((np.array(outputs["slice"]) > 0) & (np.array(outputs["slice"]) < 1))


@pytest.fixture(scope="module")
def donor():
    """A NASNetMobile for RGB images with random weights, its batch statistics too."""
    network = keras.applications.NASNetMobile(
        input_shape=(65, 65, 3), include_top=False, weights=None
    )
    rng = np.random.default_rng(0)
    for layer in network.layers:
        if isinstance(layer, layers.BatchNormalization):
            shape = layer.gamma.shape
            layer.set_weights([rng.uniform(0.5, 1.5, shape) for _ in range(4)])
    return network


@pytest.mark.parametrize("channels", [1, 3])
def test_equal_channels_give_what_the_grey_rgb_image_gave(donor, channels):
    inputs = keras.Input((64, 64, channels))
    encoder = nasnet_gcn_se.nasnet(inputs)
    nasnet_gcn_se.copy_encoder(donor, encoder)
    image = np.random.default_rng(1).uniform(0, 1, (1, 64, 64, 1)).astype(np.float32)
    # What the network does to its input: a line of air at the end, then -1..1.
    padded = np.pad(image, ((0, 0), (0, 1), (0, 1), (0, 0))) * 2 - 1
    np.testing.assert_allclose(
        encoder([image.repeat(channels, axis=-1)], training=False),
        donor(padded.repeat(3, axis=-1), training=False),
        rtol=1e-3,
        atol=1e-4,
    )


def test_imagenet_weights_start_the_encoder(donor, tmp_path, monkeypatch):
    path = tmp_path / "models/nasnet_mobile_no_top.h5"
    path.parent.mkdir()
    with h5py.File(path, "w") as file:  # the published file has Keras 2's format
        legacy_h5_format.save_weights_to_hdf5_group(file, donor)
    monkeypatch.setenv("KERAS_HOME", str(tmp_path))
    checksum = hashlib.md5(path.read_bytes(), usedforsecurity=False).hexdigest()
    monkeypatch.setattr(nasnet_gcn_se, "IMAGENET_MD5", checksum)
    network = SMALL((64, 64, 1), 2, weights="imagenet")
    for name in ("normal_conv_1_12", "separable_conv_2_bn_reduction_left1_stem_1"):
        for mine, theirs in zip(
            network.get_layer(name).weights, donor.get_layer(name).weights, strict=True
        ):
            np.testing.assert_array_equal(mine, theirs)


def test_imagenet_weights_that_are_not_those_are_refused(tmp_path, monkeypatch):
    path = tmp_path / "models/nasnet_mobile_no_top.h5"
    path.parent.mkdir()
    path.write_bytes(b"something else")
    monkeypatch.setenv("KERAS_HOME", str(tmp_path))
    with pytest.raises(OSError, match="has MD5 .* expected 1ed92395"):
        nasnet_gcn_se.imagenet_file()


def test_imagenet_weights_that_cannot_be_had_say_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setenv("KERAS_HOME", str(tmp_path))
    monkeypatch.setattr(nasnet_gcn_se, "IMAGENET_URL", (tmp_path / "none.h5").as_uri())
    with pytest.raises(
        OSError, match="cannot download .* or train with --model.weights"
    ):
        nasnet_gcn_se.imagenet_file()
    assert not list((tmp_path / "models").iterdir())


@pytest.mark.parametrize(
    ("shape", "options", "message"),
    [
        ((None, None, 1), {}, "expected a static (y, x, channels)"),
        ((16, 64, 1), {}, "of at least 32"),
        ((64, 64, 1), {"weights": "coco"}, "expected 'none' or 'imagenet'"),
        (
            (64, 64, 1),
            {"gcn_kernels": (3,) * 5},
            "at most one kernel for each of the strides",
        ),
    ],
)
def test_arguments_that_make_no_network_are_refused(shape, options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        SMALL(shape, 2, **options)
