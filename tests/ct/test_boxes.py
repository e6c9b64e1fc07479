"""Boxes, crops and tiles, by hand and by what must hold for any size."""

import cv2
import numpy as np
import pytest

from ct import boxes, inputs
from ct.boxes import Crop, add, bounding_box, cut

SHAPES = [
    ((7,), (4,)),
    ((33, 20), (9, 9)),
    ((150, 171), (48, 65)),
    ((19, 75, 41), (33, 32, 17)),
    ((5, 4, 3), (8, 9, 11)),
    ((1, 50, 23), (2, 13, 64)),
]
"""Arrays and tiles of odd and even sizes, some arrays smaller than a tile."""


def noise(shape, seed=0):
    return np.random.default_rng(seed).random(shape, np.float32)


def blocks(shape, *parts):
    mask = np.zeros(shape, np.uint8)
    for label, part in enumerate(parts, 1):
        mask[part] = label
    return mask


@pytest.mark.parametrize("kind", [bool, np.uint8])
def test_a_box_is_tight_whatever_the_number_of_axes(kind):
    part = slice(3, 5), slice(0, 7), slice(9, 24)
    mask = blocks((6, 8, 24), part).astype(kind)
    assert bounding_box(mask) == part
    assert bounding_box(mask[4]) == part[1:]
    assert bounding_box(mask[4, 0]) == part[2:]
    assert bounding_box(mask[:3]) is None


def test_a_margin_ends_where_the_array_does():
    mask = blocks((6, 8, 24), (slice(3, 5), slice(0, 7), slice(9, 24)))
    assert bounding_box(mask, 2) == (slice(1, 6), slice(0, 8), slice(7, 24))
    assert bounding_box(mask, (0, 9, 1)) == (slice(3, 5), slice(0, 8), slice(8, 24))


def test_the_box_near_a_place_reaches_some_mm_and_stays_in_its_bounds():
    # 4 mm are two voxels of 2 mm before and after 10.5: from 8.5 to 12.5, so 8 to 13.
    bounds = slice(0, 20), slice(5, 8)
    found = boxes.near((10.5, 6.0), (4.0, 30.0), (2.0, 1.5), bounds)
    assert found == (slice(8, 14), slice(5, 8))
    (beyond,) = boxes.near((40.0,), (4.0,), (2.0,), (slice(0, 20),))
    assert beyond.start == beyond.stop


def test_a_cut_at_the_centre_by_hand():
    image = np.arange(30, dtype=np.int16).reshape(5, 6)
    crop = boxes.crop_at_centre(image.shape, (3, 2))
    assert np.array_equal(cut(image, crop.start, (3, 2), fill=0), image[1:4, 2:4])
    assert crop.pin == (1.0, 0.5)


def test_a_cut_larger_than_the_array_is_filled():
    image = np.ones((2, 3), np.int16)
    crop = boxes.crop_at_centre(image.shape, (4, 5))
    got = cut(image, crop.start, (4, 5), fill=-1024)
    assert np.array_equal(got[1:3, 1:4], image)
    assert (got == -1024).sum() == 20 - 6


@pytest.mark.parametrize("start", [(-9, 0), (-3, 2), (6, 6), (7, 1), (30, -30)])
def test_a_cut_beyond_the_array_has_nothing_of_it(start):
    image = np.ones((6, 6), np.uint8)
    got = cut(image, start, (5, 4), fill=9)
    rows, columns = (
        np.isin(np.arange(first, first + size), np.arange(6))
        for first, size in zip(start, (5, 4), strict=True)
    )
    assert np.array_equal(got == 1, np.outer(rows, columns))
    add(image, np.ones((5, 4), np.uint8), start)
    assert image.sum() == 36 + rows.sum() * columns.sum()


def test_a_cut_of_a_volume_by_hand():
    volume = np.arange(8).reshape(2, 2, 2)
    found = cut(volume, (1, -1, 0), (2, 2, 3), fill=9)
    assert found.tolist() == [[[9, 9, 9], [4, 5, 9]], [[9, 9, 9], [9, 9, 9]]]


def test_a_crop_stays_within_the_array_where_it_fits():
    crop = boxes.crop_around((1.0, 10.0, 19.0), (20, 20, 8), (10, 10, 10))
    assert crop == Crop((0, 6, -1), (4.5, 4.5, 4.5))


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_a_crop_near_a_box_holds_it_and_what_shall_be_free(share):
    box = slice(40, 45), slice(50, 58)
    half = [5 / 2 + 3, 8 / 2 + 3]
    centre = boxes.centre(box)
    assert centre == (42.0, 53.5)
    crop = boxes.crop_near(centre, half, (100, 100), (21, 32), [share, share])
    assert tuple(np.add(crop.start, crop.pin)) == centre
    for part, first, size in zip(box, crop.start, (21, 32), strict=True):
        assert first + 2 <= part.start and part.stop <= first + size - 2


@pytest.mark.parametrize(("shape", "size"), SHAPES)
def test_weights_of_tiles_sum_to_one_everywhere(shape, size):
    total = np.zeros(shape, np.float32)
    for tile in boxes.tiles(boxes.full_box(shape), size):
        assert tile.weights.shape == size
        add(total, tile.weights, tile.start)
    assert np.allclose(total, 1, atol=1e-6)


@pytest.mark.parametrize(("shape", "size"), SHAPES)
def test_tiles_cut_and_put_together_are_the_array(shape, size):
    array, again = noise(shape), np.zeros(shape, np.float32)
    for tile in boxes.tiles(boxes.full_box(shape), size):
        add(again, tile.weights * cut(array, tile.start, size, fill=7), tile.start)
    assert np.allclose(again, array, atol=1e-6)


@pytest.mark.parametrize(
    ("low", "high", "size"),
    [(0, 100, 100), (10, 60, 100), (0, 101, 100), (7, 300, 64), (0, 512, 128)],
)
def test_tiles_along_a_line_are_evenly_spread(low, high, size):
    starts = [start for start, _ in boxes.tiles_along(low, high, size)]
    if len(starts) == 1:
        assert abs((low + high - size) / 2 - starts[0]) <= 0.5
    else:
        assert (starts[0], starts[-1] + size) == (low, high)
        assert max(np.diff(starts)) <= round(0.75 * size)
        assert np.ptp(np.diff(starts)) <= 1


def test_tiles_on_a_mask_hold_some_of_it_and_give_all_of_it():
    image = noise((150, 170))
    lung = np.zeros(image.shape, np.uint8)
    cv2.ellipse(lung, (40, 70), (30, 60), 0, 0, 360, 1, -1)
    cv2.circle(lung, (150, 20), 15, 2, -1)
    size, again = (48, 64), np.zeros_like(image)
    tiles = inputs.tiles(lung, image.shape, size)
    assert len(tiles) < len(boxes.tiles(boxes.bounding_box(lung), size))
    for tile in tiles:
        assert cut(lung, tile.start, size, fill=0).any()
        add(again, tile.weights * cut(image, tile.start, size, fill=0), tile.start)
    assert np.allclose(again[lung > 0], image[lung > 0], atol=1e-6)


def test_an_empty_mask_has_no_tile_and_without_mask_all_is_covered():
    assert inputs.tiles(np.zeros((90, 90), np.uint8), (90, 90), (64, 64)) == []
    total = np.zeros((90, 70), np.float32)
    for tile in inputs.tiles(None, total.shape, (64, 96)):
        add(total, tile.weights, tile.start)
    assert np.allclose(total, 1, atol=1e-6)
