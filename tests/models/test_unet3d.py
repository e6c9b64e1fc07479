"""The 3-D U-Net: shapes, probabilities, deep supervision, gradient, refusals."""

import keras
import numpy as np
import pytest

from models import unet3d
from models.layers import Nearness

SHAPE = (16, 32, 24)
SMALL = {"filters": 4, "depth": 3}


def volumes(n=2):
    return np.random.default_rng(0).normal(size=(n, *SHAPE, 1)).astype(np.float32)


@pytest.mark.parametrize("norm", ["instance", "batch"])
def test_every_voxel_has_probabilities_that_sum_to_one(norm):
    network = unet3d.build((*SHAPE, 1), 3, norm=norm, **SMALL)
    prob = np.asarray(network(volumes()))
    assert prob.shape == (2, *SHAPE, 3)
    assert prob.dtype == np.float32
    assert np.allclose(prob.sum(axis=-1), 1, atol=1e-5)


def test_deep_supervision_predicts_finest_first_and_not_at_the_two_lowest_levels():
    network = unet3d.build((*SHAPE, 1), 2, deep_supervision=True, **SMALL)
    assert [tuple(output.shape[1:4]) for output in network.outputs] == [
        SHAPE,
        tuple(size // 2 for size in SHAPE),
    ]


def test_the_widest_level_has_no_more_than_the_most_filters():
    network = unet3d.build((*SHAPE, 1), 2, filters=8, depth=3, max_filters=20)
    widths = {
        layer.filters
        for layer in network.layers
        if isinstance(layer, keras.layers.Conv3D)
        and not isinstance(layer, keras.layers.Conv3DTranspose)
    }
    assert widths == {8, 16, 20, 2}


def test_a_volume_does_not_depend_on_its_neighbours_in_the_batch():
    network = unet3d.build((*SHAPE, 1), 2, **SMALL)
    both = np.asarray(network(volumes()))
    one = np.asarray(network(volumes()[1:]))
    assert np.allclose(both[1:], one, atol=1e-5)


def test_it_learns_a_ball():
    keras.utils.set_random_seed(0)
    x = volumes()
    z, y, x_axis = np.ogrid[: SHAPE[0], : SHAPE[1], : SHAPE[2]]
    ball = (z - 8) ** 2 + (y - 16) ** 2 + (x_axis - 12) ** 2 <= 36
    x[:, ball] += 3
    y_true = np.stack([~ball, ball], axis=-1)[None].repeat(2, axis=0).astype(np.float32)
    network = unet3d.build((*SHAPE, 1), 2, **SMALL)
    network.compile(keras.optimizers.Adam(1e-2), "categorical_crossentropy")
    for _ in range(25):
        network.train_on_batch(x, y_true)
    found = np.asarray(network(x))[..., 1] > 0.5
    assert 2 * (found & ball).sum() / (found.sum() + 2 * ball.sum()) > 0.9


def test_a_size_it_cannot_halve_is_refused_with_the_stride():
    with pytest.raises(ValueError, match="multiples of 8"):
        unet3d.build((16, 20, 24, 1), 2, **SMALL)


def test_the_classifier_is_a_second_output_that_knows_the_middle():
    network = unet3d.build((*SHAPE, 1), 2, seeded=True, slice_classifier=True, **SMALL)
    assert network.output["slice"].shape == (None, 1)
    assert network.output["mask"].shape == (None, *SHAPE, 2)
    rng = np.random.default_rng(0)
    inputs = rng.normal(size=(1, *SHAPE, 1)).astype("float32")
    plain = network.predict(inputs, verbose=0)["slice"]
    assert 0 < plain[0, 0] < 1
    nearness = next(x for x in network.layers if isinstance(x, Nearness))
    near = np.asarray(nearness(inputs))[0, ..., 1]
    assert near.shape == SHAPE
    middle = np.unravel_index(near.argmax(), SHAPE)
    assert all(abs(a - (n - 1) / 2) <= 0.5 for a, n in zip(middle, SHAPE, strict=True))
    with pytest.raises(ValueError, match="expected one of them"):
        unet3d.build(
            (*SHAPE, 1), 2, deep_supervision=True, slice_classifier=True, **SMALL
        )
