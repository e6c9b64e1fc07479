import numpy as np
import pytest

import config
from ct.scan import LEFT, RIGHT
from lungs import classical, sides, slice_rule

SPACING_MM = (2.5, 1.5, 1.5)


def dice(a, b):
    return 2 * (a & b).sum() / (a.sum() + b.sum())


def test_kmeans_threshold_of_two_values_lies_between_them():
    values = np.array([-900] * 30 + [100] * 70, np.int16)
    assert slice_rule.kmeans_threshold_hu(values) == -400


def test_kmeans_threshold_of_one_value_is_that_value():
    assert slice_rule.kmeans_threshold_hu(np.full(9, 7, np.int16)) == 7


def test_kmeans_threshold_agrees_with_scikit_learn():
    from sklearn.cluster import KMeans

    rng = np.random.default_rng(0)
    values = np.concatenate(
        [rng.normal(-850, 60, 4000), rng.normal(40, 80, 6000)]
    ).astype(np.int16)
    fitted = KMeans(n_clusters=2, n_init=5, random_state=0).fit(values.reshape(-1, 1))
    assert slice_rule.kmeans_threshold_hu(values) == pytest.approx(
        fitted.cluster_centers_.mean(), abs=1e-2
    )


def test_squares_of_even_side_lie_as_in_scikit_image():
    import cv2
    from skimage import morphology

    mask = np.random.default_rng(0).random((60, 60)) < 0.3
    for side in (3, 4, 10):
        ours = slice_rule.by_square(cv2.dilate, mask.astype(np.uint8), side)
        theirs = morphology.dilation(mask, np.ones((side, side)))
        assert np.array_equal(ours > 0, theirs)


def test_the_slice_rule_keeps_regions_by_place_and_size():
    image = np.full((512, 512), 40, np.int16)
    image[0, 0] = -2000  # extremes are set aside
    image[511, 511] = 3000
    image[150:300, 100:200] = -850
    image[10:60, 300:350] = -850  # begins above row 40
    mask = slice_rule.slice_rule(image)
    assert mask[150:300, 100:200].all()
    assert not mask[10:60, 300:350].any()


def test_lungs_behind_a_thin_chest_wall_are_found(make_chest):
    """Erosion by a coarse voxel would open a wall of two voxels."""
    hu, right, left, _ = make_chest()
    lungs = right | left
    z, y, x = (
        np.flatnonzero(lungs.any(axis=axes)) for axes in ((1, 2), (0, 2), (0, 1))
    )
    thin = np.full_like(hu, -1000)
    box = np.s_[:, y[0] - 2 : y[-1] + 3, x[0] - 2 : x[-1] + 3]
    thin[box] = hu[box]
    found = classical.segment_lungs(thin, SPACING_MM, config.LungMask())
    assert dice(found > 0, lungs) > 0.9
    assert len(z) > 0


@pytest.mark.parametrize("both", [True, False])
def test_lungs_that_are_open_in_one_slice_are_found(make_chest, both):
    """Where scans are joined, or a patient moved, gas can connect lungs with the outside."""
    hu, right, left, _ = make_chest()
    lungs = right | left
    middle = len(hu) // 2
    for side in (right, left) if both else (right,):
        column = int(np.argwhere(side[middle])[:, 1].mean())
        hu[middle, :, column - 3 : column + 4] = -1000
    found = classical.segment_lungs(hu, SPACING_MM, config.LungMask())
    assert dice(found > 0, lungs) > 0.95


def test_lungs_are_found_whole_and_told_apart_without_trachea_and_table(make_chest):
    hu, right, left, trachea = make_chest()
    labels = classical.segment_lungs(hu, SPACING_MM, config.LungMask())
    assert dice(labels == RIGHT, right) > 0.97
    assert dice(labels == LEFT, left) > 0.97
    assert not labels[trachea].any()
    assert not labels[:, 170:].any()


def test_a_mirrored_body_has_its_sides_exchanged(make_chest):
    hu, *_ = make_chest()
    labels = classical.segment_lungs(hu, SPACING_MM, config.LungMask())
    mirrored = classical.segment_lungs(
        np.ascontiguousarray(hu[:, :, ::-1]), SPACING_MM, config.LungMask()
    )
    exchanged = np.array([0, LEFT, RIGHT], np.uint8)[mirrored[:, :, ::-1]]
    assert dice(exchanged == RIGHT, labels == RIGHT) > 0.98


def test_closing_takes_in_a_nodule_at_the_pleura(make_chest):
    hu, right, *_ = make_chest()
    z, y, x = np.ogrid[tuple(slice(n) for n in hu.shape)]
    nodule = (
        ((z - 16) * 2.5) ** 2 + ((y - 95) * 1.5) ** 2 + ((x - 40) * 1.5) ** 2 <= 7**2
    ) & right
    hu[nodule] = 30
    with_closing = classical.segment_lungs(hu, SPACING_MM, config.LungMask())
    without = classical.segment_lungs(hu, SPACING_MM, config.LungMask(closing_mm=0.0))
    # A ball of 12 mm in the mouth of 14 mm reaches 2.3 mm in, so not all of it.
    assert (with_closing[nodule] == RIGHT).mean() > 0.65
    assert (without[nodule] == RIGHT).mean() < 0.35


def test_a_vessel_within_the_lung_is_filled(make_chest):
    hu, *_ = make_chest()
    hu[5:28, 90:94, 60:64] = 50
    labels = classical.segment_lungs(hu, SPACING_MM, config.LungMask())
    assert (labels[8:26, 90:94, 60:64] == RIGHT).all()


def test_the_dome_of_the_diaphragm_is_not_lung(make_chest):
    """Slices show its top as a hole in the lung, which opens into the abdomen below."""
    hu, right, *_ = make_chest()
    z, y, x = np.ogrid[tuple(slice(n) for n in hu.shape)]
    radius_mm = (14 - z) * 3.0
    dome = np.hypot((y - 92) * 1.5, (x - 62) * 1.5) <= np.maximum(radius_mm, 0)
    dome &= right
    hu[dome] = 60
    labels = classical.segment_lungs(hu, SPACING_MM, config.LungMask())
    assert labels[dome].astype(bool).mean() < 0.2
    assert (labels[right & ~dome] == RIGHT).mean() > 0.95


def test_holes_with_a_wide_opening_are_not_closed():
    mask = np.zeros((6, 40, 40), bool)
    mask[1:5, 2:38, 2:38] = True
    mask[1:4, 4:14, 4:14] = False  # opens downwards: 100 mm2
    mask[2:4, 20:25, 20:25] = False  # enclosed on all sides
    mask[1:4, 30:34, 30:34] = False  # opens downwards: 16 mm2
    for area_mm2, wide in ((14.0, True), (16.0, False)):
        found = classical.closed_holes(mask, (1.0, area_mm2, 1.0))
        assert found[1:4, 4:14, 4:14].all() == wide
        assert found[1:4, 4:14, 4:14].any() == wide
        assert found[2:4, 20:25, 20:25].all()
        assert found[1:4, 30:34, 30:34].all()
        assert not (found & mask).any()


def test_one_lung_is_named_by_its_side(make_chest):
    hu, right, left, _ = make_chest()
    hu[left] = 40
    labels = classical.segment_lungs(hu, SPACING_MM, config.LungMask())
    assert dice(labels == RIGHT, right) > 0.97
    assert not (labels == LEFT).any()


def test_a_body_without_lungs_has_none(make_chest):
    hu, right, left, trachea = make_chest()
    hu[right | left | trachea] = 40
    assert not classical.segment_lungs(hu, SPACING_MM, config.LungMask()).any()


def test_thesis_mode_is_the_slice_rule_alone(make_chest):
    hu, *_ = make_chest()
    labels = classical.segment_lungs(hu, SPACING_MM, config.LungMask(cleaning=False))
    expected = np.stack([slice_rule.slice_rule(image) for image in hu])
    assert np.array_equal(labels > 0, expected)


def test_a_small_lung_keeps_its_side():
    lungs = np.zeros((40, 60, 80), bool)
    lungs[2:38, 10:50, 5:35] = True
    lungs[5:15, 20:40, 55:70] = True  # 7 % of the other
    labels = sides.sides(lungs, (2.5, 3.0, 3.0))
    assert (labels[:, :, :40][lungs[:, :, :40]] == RIGHT).all()
    assert (labels[:, :, 40:][lungs[:, :, 40:]] == LEFT).all()


def ellipsoids(turn_deg=0.0, *, left_radii_mm=(70, 60, 40), left_mm=(0, 0, 50)):
    """(mask of the right one, of the left one) on voxels of 3 mm, 100 mm apart.

    Both are turned about the axis along the body.
    """
    z, y, x = (np.ogrid[:60, :70, :90][axis] * 3.0 for axis in range(3))
    turn = np.deg2rad(turn_deg)
    z, y, x = z - 90, y - 105, x - 135
    y, x = y * np.cos(turn) + x * np.sin(turn), x * np.cos(turn) - y * np.sin(turn)
    found = []
    for centre, radii in (((0, 0, -50), (70, 60, 40)), (left_mm, left_radii_mm)):
        axes = zip((z, y, x), centre, radii, strict=True)
        found.append(sum(((v - c) / r) ** 2 for v, c, r in axes) <= 1)
    return found


@pytest.mark.parametrize("turn_deg", [-25, 0, 25])
@pytest.mark.parametrize("thick_mm", [6, 30])
def test_a_bridge_is_cut_in_its_middle(turn_deg, thick_mm):
    right, left = ellipsoids(turn_deg)
    y, x = (np.mgrid[:70, :90] - np.array([35, 45])[:, None, None]) * 3.0
    turn = np.deg2rad(turn_deg)
    across_mm = y * np.cos(turn) + x * np.sin(turn)
    along_mm = x * np.cos(turn) - y * np.sin(turn)
    bridge = np.zeros(right.shape, bool)
    bridge[20:40] = (np.abs(across_mm) < thick_mm / 2) & (np.abs(along_mm) < 50)
    labels = sides.sides(right | left | bridge, (3.0, 3.0, 3.0))
    assert (labels[right] == RIGHT).all()
    assert (labels[left] == LEFT).all()
    for side, own_mm in ((RIGHT, -along_mm), (LEFT, along_mm)):
        sure = bridge & (own_mm > 4.5)  # a voxel and a half from the middle
        assert (labels[sure] == side).all()


def test_a_collapsed_lung_is_told_from_the_one_it_touches():
    right, left = ellipsoids(left_radii_mm=(30, 25, 20), left_mm=(-10, 0, 10))
    labels = sides.sides(right | left, (3.0, 3.0, 3.0))
    assert left.sum() < 0.1 * right.sum()
    assert (labels[right] == RIGHT).all()
    wrong_x = np.nonzero(left & (labels != LEFT))[2]
    assert not wrong_x.size or np.ptp(wrong_x) <= 1  # two layers at the contact


@pytest.mark.parametrize("push_px", [-12, 12])
def test_lungs_pushed_aside_keep_their_sides(push_px):
    right, left = ellipsoids()
    bridged = right | left
    bridged[28:32, 30:40, 40:50] = True
    labels = sides.sides(np.roll(bridged, push_px, axis=2), (3.0, 3.0, 3.0))
    assert (labels[np.roll(right, push_px, axis=2)] == RIGHT).all()
    assert (labels[np.roll(left, push_px, axis=2)] == LEFT).all()


@pytest.mark.parametrize(("middle_x", "side"), [(45, RIGHT), (5, LEFT)])
def test_one_lung_is_not_taken_apart(middle_x, side):
    right, _ = ellipsoids()
    labels = sides.sides(right, (3.0, 3.0, 3.0), middle_x)
    assert (labels[right] == side).all()


def test_a_lung_astride_the_middle_is_not_taken_apart():
    right, _ = ellipsoids()
    astride = np.roll(right, 17, axis=2)
    assert len(np.unique(sides.sides(astride, (3.0, 3.0, 3.0))[astride])) == 1


@pytest.mark.parametrize("shape", [(20, 320, 36), (150, 60, 256), (1, 512, 512)])
def test_slices_of_any_shape_have_a_middle(shape):
    hu = np.random.default_rng(0).integers(-1000, 200, shape).astype(np.int16)
    middle = slice_rule.middle_of(hu[0])
    assert min(middle.shape) >= 1
    share = middle.size / hu[0].size
    full = slice_rule.middle_of(np.zeros((512, 512), np.int16)).size / 512**2
    assert share == pytest.approx(full, rel=0.15)
    classical.segment_lungs(hu, (2.5, 1.0, 1.0), config.LungMask())
