"""Measures of nodules on shapes whose measures are known."""

import time
from dataclasses import replace

import numpy as np
import pytest
from scipy.ndimage import gaussian_filter

from config import Postprocess
from ct.geometry import Grid
from nodules.components import label_nodules
from nodules.measures import axes_mm, find_nodules, pleura_distance_mm

SETTINGS = Postprocess(method="fixed", within_lung=False, min_volume_mm3=0.0)


def grid_of(shape, spacing_mm):
    affine = np.zeros((4, 4))
    affine[2, 0], affine[1, 1], affine[0, 2] = spacing_mm * np.array([1, -1, -1])
    affine[3, 3] = 1
    return Grid(shape, affine)


def block(shape, *ranges):
    mask = np.zeros(shape, bool)
    mask[tuple(slice(*r) for r in ranges)] = True
    return mask


def distance(lung, mask, spacing_mm):
    found = np.argwhere(mask)
    box = tuple(
        slice(int(low), int(high) + 1)
        for low, high in zip(found.min(0), found.max(0), strict=True)
    )
    grid = grid_of(lung.shape, spacing_mm)
    return pleura_distance_mm(mask[box], box, lung.astype(np.uint8), grid)


@pytest.mark.parametrize(
    ("first", "voxels_between"), [(10, 0), (11, 1), (14, 4), (40, 30)]
)
def test_the_pleura_is_as_far_as_the_voxels_of_lung_between(first, voxels_between):
    shape = (100, 90, 95)
    lung = block(shape, (5, 95), (10, 85), (5, 90))
    mask = block(shape, (50, 52), (first, first + 3), (50, 52))
    between_mm = min(voxels_between * 0.7, 38 * 0.8)
    assert distance(lung, mask, (2.5, 0.7, 0.8)) == pytest.approx(between_mm)


def test_a_nodule_beyond_the_first_look_is_as_far_as_it_is():
    shape = (60, 120, 120)
    mask = block(shape, (30, 31), (60, 61), (60, 61))
    # Slices of 2.5 mm: 29 to the head, 30 to the feet. Pixels of 1 mm: 59 and 60 aside.
    assert distance(np.ones(shape), mask, (2.5, 1, 1)) == pytest.approx(59)


def test_a_nodule_that_reaches_out_of_the_lung_touches_the_pleura():
    shape = (20, 20, 20)
    lung = block(shape, (0, 20), (0, 20), (8, 20))
    assert distance(lung, block(shape, (5, 8), (5, 8), (6, 12)), (1, 1, 1)) == 0


def test_a_nodule_on_the_diaphragm_touches_it_however_thick_the_slices_are():
    shape = (20, 40, 40)
    lung = block(shape, (8, 20), (0, 40), (10, 40))
    # It touches in z, where centres are 5 mm apart; aside, two voxels of lung lie between.
    mask = block(shape, (8, 10), (20, 23), (12, 15))
    assert distance(lung, mask, (5.0, 0.7, 0.7)) == 0


def test_what_lies_beyond_the_scan_is_not_lung():
    shape = (20, 20, 20)
    mask = block(shape, (0, 2), (9, 11), (9, 11))
    assert distance(np.ones(shape), mask, (3, 3, 3)) == 0


def test_every_nodule_has_its_distance_and_without_lungs_none():
    shape = (30, 40, 40)
    prob = np.zeros(shape, np.float32)
    prob[block(shape, (10, 13), (10, 13), (4, 8))] = 0.9
    prob[block(shape, (10, 13), (30, 33), (20, 23))] = 0.8
    lung = block(shape, (0, 30), (0, 40), (2, 40)).astype(np.uint8)
    grid = grid_of(shape, (1.0, 1.0, 1.0))
    _, found = find_nodules(prob, grid, SETTINGS, lung=lung)
    assert [n.pleura_distance_mm for n in found] == [2.0, 7.0]
    _, found = find_nodules(prob, grid, SETTINGS)
    assert [n.pleura_distance_mm for n in found] == [None, None]


def axes_of(image, spacing_yx_mm=(1.0, 1.0)):
    return axes_mm(np.asarray(image)[None], spacing_yx_mm)


def test_axes_of_one_voxel_are_its_pixel():
    assert axes_of(np.ones((1, 1), bool), (0.6, 0.9)) == pytest.approx((0.9, 0.6))


def test_axes_of_a_row_are_its_length_and_the_height_of_its_pixels():
    image = block((9, 20), (4, 5), (3, 13))
    assert axes_of(image, (2.0, 0.5)) == pytest.approx((5.0, 2.0))
    assert axes_of(image.T, (0.5, 2.0)) == pytest.approx((5.0, 2.0))


def test_axes_of_an_empty_mask_are_zero():
    assert axes_of(np.zeros((3, 3), bool)) == (0, 0)


def test_axes_of_a_rectangle_are_its_diagonal_and_what_lies_across():
    long_mm, short_mm = axes_of(block((20, 40), (5, 8), (5, 35)))
    assert long_mm == pytest.approx(np.hypot(30, 2))
    assert short_mm == pytest.approx(3 * np.hypot(30, 2) / 30, abs=0.2)


@pytest.mark.parametrize("turned_deg", [0, 17, 30, 45, 71, 90])
def test_axes_of_a_turned_ellipse_are_its_own_within_a_pixel(turned_deg):
    y, x = np.ogrid[-30:31, -30:31]
    cos, sin = np.cos(np.radians(turned_deg)), np.sin(np.radians(turned_deg))
    image = ((x * cos + y * sin) / 25) ** 2 + ((y * cos - x * sin) / 11) ** 2 <= 1
    assert axes_of(image, (0.6, 0.6)) == pytest.approx((30.0, 13.2), abs=0.6)


def test_axes_of_an_ellipse_are_its_own_where_pixels_are_not_square():
    y, x = np.ogrid[-30:31, -30:31]
    image = (x * 0.5 / 6) ** 2 + (y * 1.0 / 12) ** 2 <= 1
    assert axes_of(image, (1.0, 0.5)) == pytest.approx((24.0, 12.0), abs=1.0)


def test_the_long_axis_of_an_l_does_not_cut_its_corner():
    image = block((30, 30), (0, 30), (0, 4)) | block((30, 30), (26, 30), (0, 30))
    long_mm, short_mm = axes_of(image)
    # Down the one arm from corner to corner; across it lies the other. Tip to tip is 41.
    assert long_mm == pytest.approx(np.hypot(30, 3), abs=0.5)
    assert short_mm == pytest.approx(30, abs=1)


def test_axes_of_a_crescent_lie_within_it():
    y, x = np.ogrid[-32:33, -32:33]
    image = (x**2 + y**2 <= 30**2) & ((x - 12) ** 2 + y**2 > 30**2)
    long_mm, short_mm = axes_of(image)
    # Tangent to the inner circle: 2 sqrt(30^2 - 18^2); the tips are 59 apart. Across a
    # line that is upright it is everywhere 12, more if it leans; the hull is 36 wide.
    assert long_mm == pytest.approx(48, abs=1)
    assert 12 <= short_mm < 26


def test_axes_of_a_c_are_its_back_and_an_arm():
    image = block((40, 40), (5, 35), (5, 25)) & ~block((40, 40), (9, 31), (9, 40))
    # Tip to tip is 30 too, but through the opening.
    assert axes_of(image) == pytest.approx((np.hypot(30, 3), 20), abs=0.6)


def test_the_slice_with_the_longest_diameter_counts():
    mask = np.zeros((3, 20, 20), bool)
    mask[0, :6, :6] = True
    mask[1, 2:4, 1:11] = True
    mask[2, 2:12, 2:5] = True
    long_mm, short_mm = axes_mm(mask, (1.0, 1.0))
    assert long_mm == pytest.approx(np.hypot(10, 2))
    assert short_mm == pytest.approx(3, abs=0.2)


def test_two_parts_in_a_slice_are_not_bridged():
    image = block((9, 30), (2, 5), (2, 6)) | block((9, 30), (2, 5), (9, 20))
    assert axes_of(image)[0] == pytest.approx(np.hypot(11, 2))


def test_the_short_axis_is_never_longer_and_both_turn_with_the_nodule():
    rng = np.random.default_rng(0)
    for _ in range(20):
        image = gaussian_filter(rng.random((24, 24)), 2) > 0.5
        long_mm, short_mm = axes_of(image, (0.7, 0.7))
        assert 0 < short_mm <= long_mm
        assert axes_of(image[::-1], (0.7, 0.7))[0] == pytest.approx(long_mm, abs=0.36)


def test_axes_of_many_candidates_take_seconds():
    large, small = (
        np.hypot(*np.ogrid[-n : n + 1, -n : n + 1])[None] ** 2
        + np.ogrid[-n : n + 1, 0:1, 0:1][0] ** 2
        <= n**2
        for n in (25, 6)
    )
    started = time.perf_counter()
    for _ in range(10):
        axes_mm(large, (0.6, 0.6))  # 30 mm
    for _ in range(100):
        axes_mm(small, (0.6, 0.6))
    assert time.perf_counter() - started < 6


def test_one_nodule_is_the_likeliest_and_what_lies_above_or_below_it():
    prob = np.zeros((5, 12, 12), np.float32)
    prob[[0, 1, 3, 4], 2:6, 2:6] = 0.8  # missed in slice 2
    prob[0, 8:11, 8:11] = 0.9
    grid = grid_of(prob.shape, (1.0, 1.0, 1.0))
    labels, _ = label_nodules(prob, grid, SETTINGS)
    assert labels.max() == 3
    one = replace(SETTINGS, one_nodule=True)
    labels, chances = label_nodules(prob, grid, one)
    assert np.array_equal(labels > 0, prob == np.float32(0.8))
    assert np.allclose(chances, [[0.8, 0.8]])


def test_one_nodule_cannot_be_tuned():
    with pytest.raises(ValueError, match="one_nodule"):
        Postprocess(method="tuned", one_nodule=True)
