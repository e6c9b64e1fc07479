import numpy as np
import pytest

import config
import lung_mask
from scan import LEFT, RIGHT

SPACING_MM = (2.5, 1.5, 1.5)


def chest(shape=(40, 200, 200)):
    """A body with two lungs, a trachea above them and a table below; and its parts.

    Returns:
        (z, y, x) int16 HU, and bool masks of the right lung, left lung and trachea.
    """
    z, y, x = np.ogrid[tuple(slice(n) for n in shape)]
    hu = np.full(shape, -1000, np.int16)
    hu[:, 175:180, 40:160] = 100  # table, with a gap to the body
    body = ((y - 95) / 75) ** 2 + ((x - 100) / 90) ** 2 + 0 * z <= 1
    hu[body] = 40
    right, left = (
        (((y - 95) / 45) ** 2 + ((x - middle) / 27) ** 2 <= 1) & (z >= 4) & (z < 30)
        for middle in (65, 135)
    )
    trachea = ((y - 95) ** 2 + (x - 100) ** 2 <= 6**2) & (z >= 15)
    hu[right | left] = -850
    hu[trachea] = -990
    return hu, right, left, trachea


def dice(a, b):
    return 2 * (a & b).sum() / (a.sum() + b.sum())


def test_kmeans_threshold_of_two_values_lies_between_them():
    values = np.array([-900] * 30 + [100] * 70, np.int16)
    assert lung_mask.kmeans_threshold(values) == -400


def test_kmeans_threshold_of_one_value_is_that_value():
    assert lung_mask.kmeans_threshold(np.full(9, 7, np.int16)) == 7


def test_kmeans_threshold_agrees_with_scikit_learn():
    from sklearn.cluster import KMeans

    rng = np.random.default_rng(0)
    values = np.concatenate(
        [rng.normal(-850, 60, 4000), rng.normal(40, 80, 6000)]
    ).astype(np.int16)
    fitted = KMeans(n_clusters=2, n_init=5, random_state=0).fit(values.reshape(-1, 1))
    assert lung_mask.kmeans_threshold(values) == pytest.approx(
        fitted.cluster_centers_.mean(), abs=1e-2
    )


def test_squares_of_even_side_lie_as_in_scikit_image():
    import cv2
    from skimage import morphology

    mask = np.random.default_rng(0).random((60, 60)) < 0.3
    for side in (3, 4, 10):
        ours = lung_mask.by_square(cv2.dilate, mask.astype(np.uint8), side)
        theirs = morphology.dilation(mask, np.ones((side, side)))
        assert np.array_equal(ours > 0, theirs)


def test_the_slice_rule_keeps_regions_by_place_and_size():
    image = np.full((512, 512), 40, np.int16)
    image[0, 0] = -2000  # extremes are set aside
    image[511, 511] = 3000
    image[150:300, 100:200] = -850
    image[10:60, 300:350] = -850  # begins above row 40
    mask = lung_mask.slice_rule(image)
    assert mask[150:300, 100:200].all()
    assert not mask[10:60, 300:350].any()


def test_lungs_are_found_whole_and_told_apart_without_trachea_and_table():
    hu, right, left, trachea = chest()
    labels = lung_mask.lung_labels(hu, SPACING_MM, config.LungMask())
    assert dice(labels == RIGHT, right) > 0.97
    assert dice(labels == LEFT, left) > 0.97
    assert not labels[trachea].any()
    assert not labels[:, 170:].any()


def test_a_mirrored_body_has_its_sides_exchanged():
    hu, *_ = chest()
    labels = lung_mask.lung_labels(hu, SPACING_MM, config.LungMask())
    mirrored = lung_mask.lung_labels(
        np.ascontiguousarray(hu[:, :, ::-1]), SPACING_MM, config.LungMask()
    )
    exchanged = np.array([0, LEFT, RIGHT], np.uint8)[mirrored[:, :, ::-1]]
    assert dice(exchanged == RIGHT, labels == RIGHT) > 0.98


def test_closing_takes_in_a_nodule_at_the_pleura():
    hu, right, *_ = chest()
    z, y, x = np.ogrid[tuple(slice(n) for n in hu.shape)]
    nodule = (
        ((z - 16) * 2.5) ** 2 + ((y - 95) * 1.5) ** 2 + ((x - 40) * 1.5) ** 2 <= 7**2
    ) & right
    hu[nodule] = 30
    with_closing = lung_mask.lung_labels(hu, SPACING_MM, config.LungMask())
    without = lung_mask.lung_labels(hu, SPACING_MM, config.LungMask(closing_mm=0.0))
    # A ball of 12 mm in the mouth of 14 mm reaches 2.3 mm in, so not all of it.
    assert (with_closing[nodule] == RIGHT).mean() > 0.65
    assert (without[nodule] == RIGHT).mean() < 0.35


def test_a_vessel_within_the_lung_is_filled():
    hu, *_ = chest()
    hu[5:28, 90:94, 60:64] = 50
    labels = lung_mask.lung_labels(hu, SPACING_MM, config.LungMask())
    assert (labels[8:26, 90:94, 60:64] == RIGHT).all()


def test_one_lung_is_named_by_its_side():
    hu, right, left, _ = chest()
    hu[left] = 40
    labels = lung_mask.lung_labels(hu, SPACING_MM, config.LungMask())
    assert dice(labels == RIGHT, right) > 0.97
    assert not (labels == LEFT).any()


def test_a_body_without_lungs_has_none():
    hu, right, left, trachea = chest()
    hu[right | left | trachea] = 40
    assert not lung_mask.lung_labels(hu, SPACING_MM, config.LungMask()).any()


def test_thesis_mode_is_the_slice_rule_alone():
    hu, *_ = chest()
    labels = lung_mask.lung_labels(hu, SPACING_MM, config.LungMask(cleaning=False))
    expected = np.stack([lung_mask.slice_rule(image) for image in hu])
    assert np.array_equal(labels > 0, expected)
