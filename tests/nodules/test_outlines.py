"""Outlines of known shape, and LIDC's rule against an independent polygon fill."""

import itertools

import numpy as np
import pytest
from matplotlib.path import Path as Polygon
from skimage import draw

from nodules import outlines
from nodules.outlines import Outline, PlacedMask


def ring(x0, y0, x1, y1):
    """The corners of a rectangle's outline, drawn clockwise and not closed."""
    return np.array([(x0, y0), (x1, y0), (x1, y1), (x0, y1)])


def wobbly_chain(rng, centre=32.0):
    """A closed 8-connected chain of pixels around an irregular blob, as LIDC stores it."""
    angles = np.linspace(0, 2 * np.pi, 400, endpoint=False)
    waves = rng.normal(0, 1.0, (3, 2)) @ np.stack([np.cos(angles), np.sin(angles)])
    radii = rng.uniform(2, 18) + (waves * np.cos(np.outer([2, 3, 5], angles))).sum(0)
    points = np.rint(
        centre + np.abs(radii) * np.stack([np.cos(angles), np.sin(angles)])
    ).T.astype(int)
    keep = np.any(points != np.roll(points, 1, axis=0), axis=1)
    return points[keep]


def strictly_inside(points_xy, shape):
    """matplotlib's even-odd test of every pixel centre, less the outline's own pixels."""
    y, x = np.mgrid[: shape[0], : shape[1]]
    closed = np.vstack([points_xy, points_xy[:1]])
    inside = Polygon(closed).contains_points(np.stack([x.ravel(), y.ravel()], 1))
    inside = inside.reshape(shape)
    inside[points_xy[:, 1], points_xy[:, 0]] = False
    return inside


def test_a_rectangle_is_filled_and_its_outline_is_outside():
    mask = outlines.fill_outline(ring(2, 3, 8, 6), (10, 12))
    expected = np.zeros((10, 12), bool)
    expected[4:6, 3:8] = True
    assert np.array_equal(mask, expected)


def test_filling_agrees_with_an_independent_polygon_fill():
    rng = np.random.default_rng(0)
    filled = 0
    for _ in range(200):
        chain = wobbly_chain(rng)
        assert np.abs(chain - np.roll(chain, 1, axis=0)).max() <= 1
        mask = outlines.fill_outline(chain, (64, 64))
        assert np.array_equal(mask, strictly_inside(chain, (64, 64)))
        filled += mask.sum()
    assert filled > 10_000


def test_filling_agrees_with_scikit_image_on_convex_outlines():
    y, x = draw.circle_perimeter(30, 31, 12)
    order = np.argsort(np.arctan2(y - 30, x - 31))
    chain = np.stack([x, y], 1)[order]
    expected = draw.polygon2mask((64, 64), chain[:, ::-1])
    expected[y, x] = False
    assert np.array_equal(outlines.fill_outline(chain, (64, 64)), expected)


def test_an_outline_of_few_points_is_the_polygon_through_them():
    rng = np.random.default_rng(5)
    compared = 0
    for _ in range(100):
        points = rng.integers(1, 31, (rng.integers(3, 7), 2))
        y, x = np.mgrid[:32, :32]
        pixels = np.stack([x.ravel(), y.ravel()], 1)
        edges = zip(points, np.roll(points, -1, axis=0), strict=True)
        on_edge = np.any([on_segment(pixels, a, b) for a, b in edges], axis=0)
        inside = Polygon(np.vstack([points, points[:1]])).contains_points(pixels)
        expected = (inside & ~on_edge).reshape(32, 32)
        assert np.array_equal(outlines.fill_outline(points, (32, 32)), expected)
        compared += expected.sum()
    assert compared > 5_000


def on_segment(pixels, a, b):
    """Bool per pixel: its centre lies exactly between or on the ends a and b."""
    d, to = b - a, pixels - a
    along = to @ d
    return (d[0] * to[:, 1] == d[1] * to[:, 0]) & (along >= 0) & (along <= d @ d)


def test_direction_start_and_closing_point_do_not_matter():
    chain = wobbly_chain(np.random.default_rng(3))
    mask = outlines.fill_outline(chain, (64, 64))
    for same in (
        chain[::-1],
        np.roll(chain, 17, axis=0),
        np.vstack([chain, chain[:1]]),
    ):
        assert np.array_equal(outlines.fill_outline(same, (64, 64)), mask)


@pytest.mark.parametrize(
    "points", [[(4, 4)], [(4, 4), (7, 5)], [(2, 2), (4, 4), (6, 6)]]
)
def test_points_that_enclose_nothing_fill_nothing(points):
    assert not outlines.fill_outline(np.array(points), (10, 10)).any()


def test_an_outline_that_touches_itself_fills_both_loops():
    # Two squares that share the corner (5, 5).
    points = [(1, 1), (5, 1), (5, 5), (9, 5), (9, 9), (5, 9), (5, 5), (1, 5)]
    mask = outlines.fill_outline(np.array(points), (12, 12))
    expected = np.zeros((12, 12), bool)
    expected[2:5, 2:5] = expected[6:9, 6:9] = True
    assert np.array_equal(mask, expected)


def test_an_outline_along_the_border_of_the_image_is_filled():
    mask = outlines.fill_outline(ring(0, 0, 7, 7), (8, 8))
    assert mask.sum() == 6 * 6


def test_an_exclusion_cuts_its_interior_and_its_own_pixels():
    mask, box = outlines.fill_outlines(
        [
            Outline(4, ring(12, 12, 16, 16), inclusion=False),
            Outline(4, ring(5, 5, 25, 25)),
        ]
    )
    assert box == (slice(4, 5), slice(5, 26), slice(5, 26))
    # 19 x 19 pixels, less the 3 x 3 interior of the hole and its four listed corners.
    assert mask.sum() == 19 * 19 - 3 * 3 - 4


def test_two_regions_on_a_slice_are_joined():
    mask, _ = outlines.fill_outlines(
        [Outline(0, ring(0, 0, 4, 4)), Outline(0, ring(10, 0, 14, 4))]
    )
    assert mask.sum() == 9 + 9


def min_distance_by_loop(a, b):
    return min(np.linalg.norm(p - q) for p, q in itertools.product(a, b))


def test_clusters_are_those_of_the_chained_distances():
    rng = np.random.default_rng(1)
    points = [rng.integers(0, 40, 3) + rng.integers(0, 4, (5, 3)) for _ in range(12)]
    points = [p.astype(float) for p in points]
    distances = outlines.nearest_distances(points, 6.0)
    for i, j in itertools.combinations(range(12), 2):
        expected = min_distance_by_loop(points[i], points[j])
        assert distances[i, j] == pytest.approx(expected if expected <= 6 else np.inf)


def test_a_distance_equal_to_the_tolerance_joins():
    points = [np.array([[0.0, 0, 0]]), np.array([[3.0, 0, 0]]), np.array([[6.1, 0, 0]])]
    assert outlines.cluster(points, 3.0) == [[0, 1], [2]]


def test_nodules_are_ordered_by_height():
    points = [
        np.array([[0.0, 0, 9]]),
        np.array([[50.0, 0, 2]]),
        np.array([[0.0, 1, 9]]),
    ]
    assert outlines.cluster(points, 2.0) == [[1], [0, 2]]


def test_more_than_four_annotations_shrink_the_tolerance():
    # Two groups of three, 2.0 apart; within a group 0.5. At 2.5 all six join.
    x = [0, 0.5, 1.0, 3.0, 3.5, 4.0]
    points = [np.array([[value, 0, 0]]) for value in x]
    assert outlines.cluster(points, 2.5) == [[0, 1, 2], [3, 4, 5]]


def test_a_cluster_that_cannot_be_split_stays_whole():
    points = [np.array([[0.0, 0, 0]])] * 6
    assert outlines.cluster(points, 2.5) == [[0, 1, 2, 3, 4, 5]]


def test_no_annotations_are_no_nodules():
    assert outlines.cluster([], 2.5) == []


def placed(z, y, x, size, label, reader):
    box = tuple(slice(start, start + size) for start in (z, y, x))
    return PlacedMask(np.ones((size, size, size), bool), box, label, reader)


def test_painting_sets_one_bit_per_reader():
    bits, labels = outlines.paint(
        [placed(1, 1, 1, 3, 1, 0), placed(1, 1, 1, 2, 1, 3), placed(5, 5, 5, 2, 2, 1)],
        (8, 8, 8),
    )
    assert bits[1, 1, 1] == 0b1001
    assert bits[3, 3, 3] == 0b0001
    assert bits[5, 5, 5] == 0b0010
    assert ((labels == 1).sum(), (labels == 2).sum()) == (27, 8)
    assert np.array_equal(labels > 0, bits > 0)


def test_a_voxel_of_two_nodules_goes_to_the_one_with_more_readers():
    masks = [
        placed(0, 0, 0, 2, 1, 0),
        placed(1, 1, 1, 2, 2, 0),
        placed(1, 1, 1, 2, 2, 1),
        placed(2, 2, 2, 2, 3, 2),
        placed(2, 2, 2, 2, 3, 3),
    ]
    bits, labels = outlines.paint(masks, (5, 5, 5))
    assert (labels[1, 1, 1], bits[1, 1, 1]) == (2, 0b0011)
    # Nodules 2 and 3 have two readers each: the lower label keeps the voxel.
    assert (labels[2, 2, 2], bits[2, 2, 2]) == (2, 0b0011)
    again = outlines.paint(masks[::-1], (5, 5, 5))
    assert np.array_equal(again[0], bits) and np.array_equal(again[1], labels)


def test_volume_and_diameter_of_a_box_of_voxels():
    mask = np.zeros((4, 10, 10), bool)
    mask[1:3, 2:6, 3:6] = True  # 2 x 4 x 3 voxels
    assert outlines.volume_mm3(mask, 2.5 * 0.7 * 0.7) == pytest.approx(24 * 1.225)
    # Centres of opposite corners are 3 and 2 pixels apart.
    expected = 0.7 * (np.hypot(3, 2) + 1)
    assert outlines.diameter_mm(mask, (2.5, 0.7, 0.7)) == pytest.approx(expected)


def test_one_voxel_measures_one_pixel_and_none_measures_zero():
    mask = np.zeros((3, 5, 5), bool)
    assert outlines.diameter_mm(mask, (2.0, 0.8, 0.8)) == 0
    mask[1, 2, 2] = True
    assert outlines.diameter_mm(mask, (2.0, 0.8, 0.8)) == pytest.approx(0.8)


@pytest.mark.parametrize("diameter_px", [3.0, 6.5, 11.0, 24.3, 40.0])
def test_a_disc_measures_its_diameter_within_a_pixel(diameter_px):
    y, x = np.ogrid[:64, :64]
    disc = (y - 31.3) ** 2 + (x - 30.8) ** 2 <= (diameter_px / 2) ** 2
    assert outlines.diameter_mm(disc[None], (1, 1, 1)) == pytest.approx(
        diameter_px, abs=1
    )


def test_pylidc_volume_of_a_stack_of_squares():
    # Area 10 x 10 pixels of 0.5 mm = 25 mm2; slices at 0, 2 and 5 mm: shares 2, 2.5, 3.
    stack = [Outline(z, ring(0, 0, 10, 10)) for z in (0, 1, 2)]
    slice_z_mm = np.array([0.0, 2.0, 5.0])
    assert outlines.outline_volume_mm3(stack, slice_z_mm, 0.5, 9.0) == pytest.approx(
        25 * (2 + 2.5 + 3)
    )
    # A lone slice is as thick as SliceThickness says.
    assert outlines.outline_volume_mm3(
        stack[:1], slice_z_mm, 0.5, 9.0
    ) == pytest.approx(25 * 9)
    hole = Outline(1, ring(2, 2, 6, 6), inclusion=False)  # 4 mm2 of the middle slice
    assert outlines.outline_volume_mm3(
        [*stack, hole], slice_z_mm, 0.5, 9.0
    ) == pytest.approx(25 * 7.5 - 4 * 2.5)


def test_pylidc_diameter_is_the_farthest_pair_of_outline_points():
    found = [Outline(0, ring(0, 0, 3, 4)), Outline(1, np.array([(90, 90)]))]
    assert outlines.outline_diameter_mm(found, 0.5) == pytest.approx(2.5)
    assert outlines.outline_diameter_mm(found[1:], 0.5) == 0
