"""Bowel gas is drawn into soft tissue, apart from the lungs."""

import numpy as np
import pytest
from scipy import ndimage

from augment import gas

SPACING_MM = (3.0, 2.0, 2.0)


@pytest.fixture
def body():
    """HU and lung labels: a body of 40 HU with a lung of -850 HU in its upper half."""
    hu = np.full((40, 60, 60), -1000, np.int16)
    hu[:, 5:55, 5:55] = 40
    lung = np.zeros(hu.shape, np.uint8)
    lung[24:, 15:45, 15:30] = 1
    hu[lung > 0] = -850
    return hu, lung


def painted(body, seed):
    return gas.paint_gas(*body, SPACING_MM, np.random.default_rng(seed))


def test_only_soft_tissue_apart_from_the_lungs_changes(body):
    hu, lung = body
    apart_mm = ndimage.distance_transform_edt(lung == 0, sampling=SPACING_MM)
    for seed in range(10):
        changed = painted(body, seed) != hu
        assert changed.any()
        assert (hu[changed] == 40).all()
        assert apart_mm[changed].min() > gas.APART_MM


def test_there_is_gas_in_a_wall(body):
    found = [painted(body, seed) for seed in range(20)]
    assert min(image[image > -1020].min() for image in found) >= gas.GAS_HU[0] - 1
    gases = [image < -900 for image in found]
    # -1000 HU is also outside the body.
    outside = body[0] == -1000
    assert any((g & ~outside).sum() > 100 for g in gases)
    image = next(i for i in found if ((i < -900) & ~outside).sum() > 100)
    bubble = (image < -900) & ~outside
    ring = ndimage.binary_dilation(bubble) & ~bubble & (body[0] == 40)
    assert np.median(image[ring]) > -900


def test_an_air_fluid_level_has_its_gas_in_front():
    hu = np.full((20, 40, 40), 40, np.float32)
    depth = np.full(hu.shape, 5, np.float32)
    room = np.ones(hu.shape, bool)
    for seed in range(40):
        image = hu.copy()
        gas.fill_piece(image, room, depth, np.random.default_rng(seed))
        rows = image.mean(axis=(0, 2))
        if rows.min() < -900 and rows.max() > -50:
            assert np.flatnonzero(rows < -900).max() < np.flatnonzero(rows > -50).min()
            return
    pytest.fail("no seed drew a level")


def test_the_same_seed_draws_the_same(body):
    assert np.array_equal(painted(body, 3), painted(body, 3))
    assert not np.array_equal(painted(body, 3), painted(body, 4))


def test_air_alone_stays_as_it_is():
    hu = np.full((8, 16, 16), -1000, np.int16)
    assert np.array_equal(painted((hu, np.zeros(hu.shape, np.uint8)), 0), hu)
