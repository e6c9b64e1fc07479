import itertools

import numpy as np
import pytest

from ct.geometry import Grid, flip_xy, to_canonical, to_source

ORDERS = list(itertools.permutations(range(3)))
SIGNS = list(itertools.product((1, -1), repeat=3))


def signed_permutation(order, signs, tilt_deg=0.0):
    """(4, 4) affine of a volume with axes permuted, mirrored and tilted around x."""
    matrix = np.zeros((3, 3))
    for axis, (world, sign) in enumerate(zip(order, signs, strict=True)):
        matrix[world, axis] = sign * (0.7, 0.8, 2.5)[world]
    angle = np.deg2rad(tilt_deg)
    tilt = np.array(
        [
            [1, 0, 0],
            [0, np.cos(angle), -np.sin(angle)],
            [0, np.sin(angle), np.cos(angle)],
        ]
    )
    affine = np.eye(4)
    affine[:3, :3] = tilt @ matrix
    affine[:3, 3] = (11.0, -7.0, 3.0)
    return affine


@pytest.mark.parametrize("tilt_deg", [0.0, 12.0])
@pytest.mark.parametrize("signs", SIGNS)
@pytest.mark.parametrize("order", ORDERS)
def test_all_48_orientations_come_back_exactly(order, signs, tilt_deg):
    affine = signed_permutation(order, signs, tilt_deg)
    array = np.arange(3 * 4 * 5).reshape(3, 4, 5)
    turned, grid = to_canonical(array, affine)
    assert np.array_equal(to_source(turned, grid, Grid(array.shape, affine)), array)


@pytest.mark.parametrize("signs", SIGNS)
@pytest.mark.parametrize("order", ORDERS)
def test_a_voxel_keeps_its_place_in_the_world(order, signs):
    affine = signed_permutation(order, signs, 12.0)
    array = np.zeros((3, 4, 5))
    array[2, 1, 3] = 1
    turned, grid = to_canonical(array, affine)
    index = np.argwhere(turned)[0]
    world = affine @ (2, 1, 3, 1)
    assert np.allclose(grid.index_to_ras_mm(index), world[:3])
    assert np.allclose(grid.ras_mm_to_index(world[:3]), index)


def test_canonical_axes_rise_to_head_back_and_left():
    _, grid = to_canonical(
        np.zeros((3, 4, 5)), signed_permutation((0, 1, 2), (1, 1, 1))
    )
    assert np.array_equal(
        np.sign(grid.affine[:3, :3]), [[0, 0, -1], [0, -1, 0], [1, 0, 0]]
    )
    assert np.allclose(grid.spacing_mm, (2.5, 0.8, 0.7))


def test_volume_of_a_sheared_voxel_is_the_determinant():
    affine = np.diag([1.0, 2.0, 3.0, 1.0])
    affine[0, 1] = 0.5
    assert Grid((1, 1, 1), affine).voxel_mm3 == pytest.approx(6.0)


def test_lps_and_ras_differ_in_the_signs_of_x_and_y():
    assert np.array_equal(flip_xy(np.array([1.0, 2.0, 3.0])), [-1, -2, 3])


def test_a_grid_of_another_volume_is_refused():
    array, grid = to_canonical(np.zeros((3, 4, 5)), np.eye(4))
    with pytest.raises(ValueError, match="not a reoriented copy"):
        to_source(array, grid, Grid((3, 4, 5), np.diag([2.0, 1.0, 1.0, 1.0])))
