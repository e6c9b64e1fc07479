"""The harness that every network goes through, and pictures to feed it."""

import keras
import numpy as np
import pytest

from models import losses


@pytest.fixture(scope="session")
def batch():
    """batch(size_px): noise with a bright square per slice, and its one-hot mask."""

    def make(size_px, *, seed=0, slices=2):
        rng = np.random.default_rng(seed)
        images = rng.uniform(0, 0.3, (slices, *size_px, 1)).astype(np.float32)
        mask = np.zeros((slices, *size_px), np.uint8)
        mask[:, 8:20, 10:22] = 1
        images[mask > 0] += 0.6
        return images, np.eye(2, dtype=np.uint8)[mask]

    return make


@pytest.fixture
def restored_policy():
    """Puts the precision policy back, which is global to Keras."""
    before = keras.config.dtype_policy()
    yield
    keras.config.set_dtype_policy(before)


@pytest.fixture
def check_model(batch, tmp_path, restored_policy):
    """check_model(build, parameters=...): what holds of every network.

    Args of the check:
        build: Makes the network from an input shape and a number of classes.
        parameters: How many weights it shall have for one channel and two classes.
    """

    def check(build, *, parameters):
        model = build((64, 64, 1), 2)
        assert model.count_params() == parameters
        images, masks = batch((64, 64))
        prob = outputs(model, images)
        assert prob.shape == (2, 64, 64, 2)
        np.testing.assert_allclose(prob.sum(-1), 1, atol=1e-5)
        check_a_training_step_lowers_the_loss(model, images, masks)
        check_weights_fit_any_size(model, build, images, tmp_path)
        check_half_precision_runs(model, build, images)

    def check_weights_fit_any_size(model, build, images, tmp_path):
        path = tmp_path / "model.weights.h5"
        model.save_weights(path)
        odd = build((75, 50, 1), 2)
        odd.load_weights(path)
        for mine, theirs in zip(odd.weights, model.weights, strict=True):
            np.testing.assert_array_equal(mine, theirs)
        assert outputs(odd, batch((75, 50))[0]).shape == (2, 75, 50, 2)
        again = build((64, 64, 1), 2)
        again.load_weights(path)
        np.testing.assert_array_equal(outputs(again, images), outputs(model, images))

    return check


def outputs(model, images):
    """The network's probabilities in use; not compiled, which would take longer."""
    return keras.ops.convert_to_numpy(model(images, training=False))


def check_a_training_step_lowers_the_loss(model, images, masks):
    model.compile(
        keras.optimizers.SGD(1e-3), loss=losses.dice_cross_entropy, run_eagerly=True
    )
    before, after = (model.train_on_batch(images, masks) for _ in range(2))
    assert after < before


def check_half_precision_runs(model, build, images):
    """Same weights in bfloat16: float32 probabilities, near those of float32."""
    keras.config.set_dtype_policy("mixed_bfloat16")
    half = build((64, 64, 1), 2)
    half.set_weights(model.get_weights())
    prob = outputs(half, images)
    assert prob.dtype == np.float32
    # bfloat16 has 8 bits; over some hundred layers the errors add up to this at most.
    assert np.abs(prob - outputs(model, images)).mean() < 0.05
