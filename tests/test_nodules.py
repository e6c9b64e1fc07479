"""Measures of nodules on shapes whose measures are known."""

import numpy as np
import pytest

from config import Postprocess
from geometry import Grid
from nodules import find_nodules, pleura_distance_mm

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
