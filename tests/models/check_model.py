"""The harness that every network goes through."""

import keras
import numpy as np
import pytest

from models import losses


def batch(size_px, *, seed=0, slices=2):
    """Noise with a bright square in each slice, and the square as one-hot mask."""
    rng = np.random.default_rng(seed)
    images = rng.uniform(0, 0.3, (slices, *size_px, 1)).astype(np.float32)
    mask = np.zeros((slices, *size_px), np.uint8)
    mask[:, 8:20, 10:22] = 1
    images[mask > 0] += 0.6
    return images, np.eye(2, dtype=np.uint8)[mask]


def check_model(model, build, tmp_path, *, parameters):
    """Checks a network of one-channel 64x64 images and two classes.

    Args:
        model: A fresh `build((64, 64, 1), 2)`; trained here.
        build: Makes the same network for an input shape and a number of classes.
        tmp_path: Folder for its weights.
        parameters: How many it shall have, derived by the caller or stored.
    """
    images, masks = batch((64, 64))
    assert model.count_params() == parameters
    prob = model.predict_on_batch(images)
    assert prob.shape == (2, 64, 64, 2)
    assert prob.dtype == np.float32
    np.testing.assert_allclose(prob.sum(-1), 1, atol=1e-5)
    check_training_lowers_the_loss(model, images, masks)
    check_weights_fit_another_size(model, build, tmp_path)


def check_training_lowers_the_loss(model, images, masks):
    model.compile(
        keras.optimizers.SGD(1e-3), loss=losses.dice_cross_entropy, jit_compile=False
    )
    before, after = (model.train_on_batch(images, masks) for _ in range(2))
    assert after < before


def check_weights_fit_another_size(model, build, tmp_path):
    """Saved weights give equal outputs in a network of an odd size, where both can see.

    The larger network sees the same picture as its upper left corner would be too
    different at the border, so it is compared on equal input of equal size.
    """
    path = tmp_path / "model.weights.h5"
    model.save_weights(path)
    same, other = build((64, 64, 1), 2), build((75, 50, 1), 2)
    for network in (same, other):
        network.load_weights(path)
    images, _ = batch((64, 64), seed=1)
    np.testing.assert_array_equal(
        same.predict_on_batch(images), model.predict_on_batch(images)
    )
    for mine, theirs in zip(other.weights, model.weights, strict=True):
        np.testing.assert_array_equal(mine, theirs)
    assert other.predict_on_batch(batch((75, 50))[0]).shape == (2, 75, 50, 2)


@pytest.fixture
def restored_policy():
    """Puts the precision policy back, which is global to Keras."""
    before = keras.config.dtype_policy()
    yield
    keras.config.set_dtype_policy(before)
