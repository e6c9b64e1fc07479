"""Steps on the flat vector against Keras' own optimizers, and the schedules by hand."""

import math

import keras
import numpy as np
import pytest

import config
from training.optimizers import FlatOptimizer, build_optimizer, learning_rate

SHAPES = {"kernel": (3, 2), "bias": (2,), "gamma": (4,)}


def weights():
    rng = np.random.default_rng(0)
    return [
        keras.Variable(rng.normal(size=shape).astype(np.float32), name=name)
        for name, shape in SHAPES.items()
    ]


def gradients(step):
    rng = np.random.default_rng((1, step))
    return [rng.normal(size=s).astype(np.float32) for s in SHAPES.values()]


def trained(optimizer, steps=7):
    variables = weights()
    for step in range(steps):
        values = [keras.ops.convert_to_tensor(g) for g in gradients(step)]
        optimizer.apply(values, variables)
    return [keras.ops.convert_to_numpy(v) for v in variables]


OPTIMIZERS = {
    "adam": lambda: keras.optimizers.Adam(0.1),
    "adam, clipped": lambda: keras.optimizers.Adam(0.1, global_clipnorm=0.5),
    "adam, accumulated": lambda: keras.optimizers.Adam(
        0.1, global_clipnorm=0.5, gradient_accumulation_steps=3
    ),
    "sgd": lambda: keras.optimizers.SGD(0.1, momentum=0.9, nesterov=True),
}


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_flat_steps_are_those_of_the_optimizer_itself(make):
    flat = FlatOptimizer(make(), learning_rate=0.1)
    for found, expected in zip(trained(flat), trained(make()), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_weight_decay_spares_offsets_and_scales():
    def adamw():
        return keras.optimizers.AdamW(0.1, weight_decay=0.5)

    plain = adamw()
    plain.exclude_from_weight_decay(var_names=["bias", "gamma"])
    flat = FlatOptimizer(adamw(), learning_rate=0.1)
    for found, expected in zip(trained(flat), trained(plain), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_a_weight_without_gradient_stays():
    flat = FlatOptimizer(keras.optimizers.Adam(0.1), learning_rate=0.1)
    variables = weights()
    before = keras.ops.convert_to_numpy(variables[1]).copy()
    kernel, _, gamma = gradients(0)
    flat.apply([kernel, None, gamma], variables)
    np.testing.assert_array_equal(variables[1], before)


def test_statistics_are_averaged_with_the_weights():
    weight, mean = keras.Variable([0.0]), keras.Variable([0.0], trainable=False)
    flat = FlatOptimizer(
        keras.optimizers.SGD(1.0), learning_rate=1.0, ema=0.5, statistics=[mean]
    )
    for value in (4.0, 8.0):
        mean.assign([value])
        flat.apply([keras.ops.ones((1,))], [weight])
    flat.swap_averages()
    assert mean.numpy().tolist() == [6.0]  # (4 + 8) / 2
    assert weight.numpy().tolist() == [-1.5]  # (-1 - 2) / 2
    flat.swap_averages()
    assert mean.numpy().tolist() == [8.0]


def test_the_average_moves_once_per_step_of_several_batches():
    weight = keras.Variable([0.0])
    flat = FlatOptimizer(
        keras.optimizers.SGD(1.0, gradient_accumulation_steps=2),
        learning_rate=1.0,
        ema=0.5,
        accumulate=2,
    )
    for _ in range(4):
        flat.apply([keras.ops.ones((1,))], [weight])
    flat.swap_averages()
    assert weight.numpy().tolist() == [-1.5]  # weights -1 and -2 after the two steps


def test_the_average_follows_the_weights_and_can_be_swapped():
    # One weight, steps of -1 from 0: the weight is -1, -2, -3 after each.
    variable = keras.Variable(np.zeros(1, np.float32), name="kernel")
    flat = FlatOptimizer(keras.optimizers.SGD(1.0), learning_rate=1.0, ema=0.5)
    for _ in range(3):
        flat.apply([keras.ops.ones(1)], [variable])
    # The average starts at -1: then (-1 - 2) / 2 = -1.5 and (-1.5 - 3) / 2 = -2.25.
    flat.swap_averages()
    assert variable.numpy().item() == -2.25
    flat.swap_averages()
    assert variable.numpy().item() == -3


def test_a_config_makes_the_optimizer_again():
    flat = build_optimizer(config.Train(ema=0.5, clip_norm=0.7, accumulate=2), 10)
    again = FlatOptimizer.from_config(flat.get_config())
    assert again.ema == 0.5
    assert again.inner.global_clipnorm == pytest.approx(0.7)
    assert again.inner.gradient_accumulation_steps == 2


def rates(**settings):
    """Learning rate at each of the 10 batches of 2 epochs of 5."""
    train = config.Train(learning_rate=2.0, epochs=2, **settings)
    schedule = learning_rate(train, 5)
    return [float(schedule(step)) for step in range(11)]


def test_the_rate_warms_up_from_zero_in_equal_steps():
    # Half an epoch of 5 batches rounds to 2 batches: 1/2 and 2/2 of the peak.
    assert rates(schedule="constant", warmup_epochs=0.5)[:4] == [1, 2, 2, 2]


def test_the_cosine_goes_from_the_peak_over_half_to_zero():
    found = rates(schedule="cosine")
    assert found[0] == pytest.approx(2)
    assert found[5] == pytest.approx(1)
    assert found[10] == pytest.approx(0, abs=1e-6)
    assert found[2] == pytest.approx(1 + math.cos(0.2 * math.pi))


def test_the_polynomial_decays_with_exponent_nine_tenths():
    assert rates(schedule="polynomial")[5] == pytest.approx(2 * 0.5**0.9)
    assert rates(schedule="polynomial")[10] == 0


def test_warm_up_and_decay_join_at_the_peak():
    found = rates(schedule="cosine", warmup_epochs=1)
    assert found[4] == pytest.approx(2)
    assert found[5] == pytest.approx(2)
    assert found[10] == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize(
    "name", config.choices(config.Train.__annotations__["optimizer"])
)
def test_every_optimizer_of_the_settings_can_be_built(name):
    decay = 0.1 if name == "adamw" else 0.0
    found = build_optimizer(config.Train(optimizer=name, weight_decay=decay), 10)
    assert type(found.inner).__name__.lower() == name
