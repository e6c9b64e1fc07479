"""Random cube masking: counts, cubes, offsets and seeds."""

import keras
import numpy as np
import pytest

from models import masking, unet3d
from models.masking import RandomCubeMasking, cube_mask, mask_noise

SHAPE = (15, 21, 28)


def masks_of(passes, *, cube_px=7, fraction=0.7, seed=0, shape=SHAPE):
    noise = mask_noise(passes, shape, cube_px, seed=seed)
    return np.asarray(cube_mask(noise, shape, cube_px, fraction))


def test_whole_cubes_are_hidden_an_exact_number_of_the_grids():
    # (15 + 12) // 7 = 3 cubes along each axis of 15: 27 with the margin that lets the grid
    # move. Without offset and at an edge of 1, cubes are voxels and all are seen.
    assert masking.grid_shape((15, 15, 15), 7) == (3, 3, 3)
    single = masks_of(range(3), cube_px=1, shape=(4, 5, 6))
    assert single.sum(axis=(1, 2, 3)).tolist() == [84, 84, 84]  # 0.7 * 120
    noise = mask_noise(range(1), (14, 14, 14), 7, seed=1)
    noise[:, :3] = 0  # no offset: 2 x 2 x 2 whole cubes are seen
    mask = np.asarray(cube_mask(noise, (14, 14, 14), 7, 0.5))[0]
    cubes = mask.reshape(2, 7, 2, 7, 2, 7).mean(axis=(1, 3, 5))
    assert set(np.unique(cubes)) == {0.0, 1.0}


def test_on_the_whole_the_stated_share_is_hidden():
    masks = masks_of(range(200))
    assert masks.mean() == pytest.approx(0.7, abs=0.01)
    # Every voxel is hidden as often as any other: the grid moves.
    assert masks.mean(axis=0).std() < 0.05


@pytest.mark.parametrize("fraction", [0.0, 1.0])
def test_nothing_and_everything_can_be_hidden(fraction):
    assert (masks_of(range(2), fraction=fraction) == bool(fraction)).all()


def test_a_pass_has_its_mask_whatever_it_is_grouped_with():
    together = masks_of(range(6))
    for k in range(6):
        assert np.array_equal(masks_of(range(k, k + 1))[0], together[k])
    assert not np.array_equal(together[0], together[1])
    assert not np.array_equal(together, masks_of(range(6), seed=1))


def test_the_layer_replaces_what_is_hidden_and_nothing_else():
    volume = np.random.default_rng(0).random((2, *SHAPE, 1), np.float32)
    noise = mask_noise(range(2), SHAPE, 7, seed=0)
    layer = RandomCubeMasking(cube_px=7, fraction=0.7, value=5.0)
    masked = np.asarray(layer(volume, noise=noise))
    hidden = masks_of(range(2))[..., None]
    assert (masked[hidden] == 5).all()
    assert np.array_equal(masked[~hidden], volume[~hidden])


def test_the_layer_masks_in_training_only_unless_it_is_told_how():
    volume = np.zeros((2, *SHAPE, 1), np.float32)
    layer = RandomCubeMasking(fraction=0.5, value=1.0, seed=3)
    assert np.array_equal(np.asarray(layer(volume)), volume)
    first, second = (np.asarray(layer(volume, training=True)) for _ in range(2))
    assert 0.3 < first.mean() < 0.7
    assert not np.array_equal(first, second)
    assert not np.array_equal(first[0], first[1])


def test_a_varied_share_is_hidden_from_each_volume_in_training():
    volumes = np.zeros((400, 9, 9, 9, 1), np.float32)
    layer = RandomCubeMasking(1, fraction=0.8, varied=True, seed=0)
    shares = np.asarray(layer(volumes, training=True)).mean(axis=(1, 2, 3, 4))
    # Uniform from 0 to 0.8: mean 0.4, standard deviation 0.8 / sqrt(12) = 0.231.
    assert shares.mean() == pytest.approx(0.4, abs=0.04)
    assert shares.std() == pytest.approx(0.231, abs=0.02)
    assert shares.min() < 0.02
    assert 0.78 < shares.max() <= 0.8
    noise = mask_noise(range(1), (9, 9, 9), 1, seed=0)  # passes hide all of the share
    passed = np.asarray(layer(volumes[:1], noise=noise))
    assert passed.mean() == pytest.approx(0.8, abs=1e-3)


def test_the_layer_comes_back_from_its_settings():
    layer = RandomCubeMasking(cube_px=5, fraction=0.3, value=-1.0, seed=2)
    again = keras.layers.deserialize(keras.layers.serialize(layer))
    assert again.get_config() == layer.get_config()


def test_settings_that_mean_nothing_are_refused():
    with pytest.raises(ValueError, match=r"cube_px is 0 and fraction 0.7"):
        RandomCubeMasking(cube_px=0)
    with pytest.raises(ValueError, match="fraction 1.5"):
        RandomCubeMasking(fraction=1.5)


def test_the_network_with_noise_masks_its_input_and_one_without_does_not():
    shape = (16, 16, 16)
    options = {"filters": 4, "depth": 2, "mask_fraction": 0.7}
    keras.utils.set_random_seed(0)
    plain = unet3d.build((*shape, 1), 2, **options)
    noisy = unet3d.build((*shape, 1), 2, noise_input=True, **options)
    noisy.set_weights(plain.get_weights())
    volume = np.random.default_rng(0).random((1, *shape, 1), np.float32)
    noise = mask_noise(range(1), shape, 7, seed=0)
    hidden = np.asarray(cube_mask(noise, shape, 7, 0.7))[..., None]
    expected = plain(np.where(hidden, np.float32(1), volume))
    assert np.allclose(noisy({"volume": volume, "noise": noise}), expected, atol=1e-5)
    assert not np.allclose(plain(volume), expected, atol=1e-3)
