"""The plain U-Net."""

import itertools
from functools import partial

import keras
import numpy as np
import pytest

from models import unet2d
from models.layers import Nearness


def parameters_by_hand(filters, depth):
    """3x3 kernels without bias, two numbers per normalised channel, a 1x1 head."""
    widths = [filters * 2**level for level in range(depth + 1)]
    total = 2 * filters + 2  # head: two classes and their biases
    for level, width in enumerate(widths):
        into = widths[level - 1] if level else 1
        total += 9 * (into * width + width * width) + 2 * 2 * width
    for width, below in itertools.pairwise(widths):
        total += 9 * ((width + below) * width + width * width) + 2 * 2 * width
    return total


def test_the_unet_passes_the_harness(check_model):
    check_model(partial(unet2d.build, filters=4), parameters=parameters_by_hand(4, 4))


def test_the_residual_unet_passes_the_harness(check_model):
    widths = [
        4,
        8,
        16,
        32,
        64,
    ]  # of the encoder; each has a shortcut from the one above
    shortcuts = sum(
        into * width + 2 * width
        for into, width in zip([1, *widths], widths, strict=False)
    )
    check_model(
        partial(unet2d.build, filters=4, residual=True),
        parameters=parameters_by_hand(4, 4) + shortcuts,
    )


def test_a_residual_level_without_convolutions_passes_its_input_on(batch):
    model = unet2d.build((32, 32, 1), 2, filters=4, depth=1, residual=True)
    images, _ = batch((32, 32))
    kernels = [w for w in model.weights if w.shape[:2] == (3, 3) and "kernel" in w.name]
    first, second = kernels[:2]
    second.assign(np.zeros(second.shape))
    before = np.asarray(model(images, training=False))
    first.assign(np.ones(first.shape))
    np.testing.assert_array_equal(model(images, training=False), before)
    assert before.std() > 0


def test_instance_norm_sees_one_slice_at_a_time(batch):
    model = unet2d.build((64, 64, 1), 2, filters=4, depth=2)
    images, _ = batch((64, 64), slices=3)
    np.testing.assert_allclose(
        model(images)[:1], model(images[:1]), atol=1e-5, rtol=1e-4
    )


def test_batch_norm_has_moving_statistics():
    model = unet2d.build((64, 64, 1), 2, filters=4, depth=2, norm="batch")
    kinds = [layer for layer in model.layers if "batch_norm" in layer.name]
    assert len(kinds) == 2 * (2 + 1 + 2)  # two per level, down, bottom and up
    assert len(model.non_trainable_variables) == 2 * len(kinds)


def test_dropout_changes_outputs_in_training_only(batch):
    keras.utils.set_random_seed(0)
    model = unet2d.build((32, 32, 1), 2, filters=4, depth=2, dropout=0.5)
    images, _ = batch((32, 32))
    assert np.array_equal(model(images, training=False), model(images, training=False))
    assert not np.array_equal(
        model(images, training=True), model(images, training=True)
    )


def test_a_shape_without_a_size_is_refused():
    with pytest.raises(ValueError, match="expected a static size"):
        unet2d.build((None, None, 1), 2)


def test_a_seeded_network_is_told_how_near_the_middle_is():
    layer = Nearness()
    found = np.asarray(layer(np.zeros((2, 5, 4, 1), np.float32)))
    assert found.shape == layer.compute_output_shape((2, 5, 4, 1)) == (2, 5, 4, 2)
    # Pixel (2, 1) lies half a pixel, (0, 1) two down and a half aside from (2, 1.5).
    assert found[1, 2, 1, 1] == pytest.approx(16 / 16.5)
    assert found[0, 0, 1, 1] == pytest.approx(16 / (16 + np.hypot(2, 0.5)))
    assert not found[..., 0].any()


def test_nearness_does_not_depend_on_the_size_of_the_input():
    small, large = (
        np.asarray(Nearness()(np.zeros((1, size, size, 1), np.float32)))[0, ..., 1]
        for size in (8, 16)
    )
    assert np.allclose(small, large[4:12, 4:12])


def test_the_seeded_unet_passes_the_harness(check_model):
    check_model(
        partial(unet2d.build, filters=4, seeded=True),
        parameters=parameters_by_hand(4, 4) + 9 * 4,
    )
