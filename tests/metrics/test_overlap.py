import numpy as np
import pytest
import SimpleITK as sitk
from scipy.spatial.distance import cdist

from metrics.intervals import bootstrap, bootstrap_mean, bootstrap_pooled
from metrics.overlap import Counts, count_voxels, dice, match_nodules, ratio
from metrics.surfaces import element_areas_mm2, surface, surface_distances

SHAPE = (16, 20, 24)
SPACING_MM = (2.5, 0.7, 0.9)
EMPTY = np.zeros(SHAPE, bool)


def box(z, y, x):
    mask = np.zeros(SHAPE, bool)
    mask[slice(*z), slice(*y), slice(*x)] = True
    return mask


def blobs(seed, shape=SHAPE):
    """A random smooth mask."""
    from scipy.ndimage import gaussian_filter

    noise = np.random.default_rng(seed).normal(size=shape)
    return gaussian_filter(noise, 2.0) > 0.05


def test_dice_of_half_overlapping_boxes():
    reference = box(z=(0, 4), y=(0, 4), x=(0, 4))  # 64 voxels
    predicted = box(z=(2, 6), y=(0, 4), x=(0, 4))  # 64 voxels, 32 shared
    assert dice(reference, predicted) == 2 * 32 / (64 + 64)


def test_counts_give_every_ratio():
    reference = box(z=(0, 4), y=(0, 4), x=(0, 4))  # 64
    predicted = box(z=(2, 4), y=(0, 4), x=(0, 8))  # 64, of which 32 in the reference
    counts = count_voxels(reference, predicted)
    assert counts == (32, 32, 32)
    assert counts.iou == 32 / 96
    assert counts.sensitivity == 0.5
    assert counts.precision == 0.5


def test_undefined_ratios_are_nan():
    full = box((0, 2), (0, 2), (0, 2))
    assert np.isnan(dice(EMPTY, EMPTY))
    assert np.isnan(count_voxels(EMPTY, full).sensitivity)
    assert np.isnan(count_voxels(full, EMPTY).precision)
    assert dice(full, EMPTY) == 0


def test_ratio_of_arrays_is_nan_only_where_undefined():
    assert np.array_equal(
        ratio(np.array([1, 0, 3]), np.array([2, 0, 3])),
        [0.5, np.nan, 1],
        equal_nan=True,
    )


def test_masks_of_two_shapes_are_refused():
    with pytest.raises(ValueError, match=r"reference has shape \(2, 3\)"):
        count_voxels(np.zeros((2, 3), bool), np.zeros((2, 1), bool))


@pytest.mark.parametrize(
    ("shift_zyx", "expected_mm"),
    [((1, 0, 0), 2.5), ((0, 3, 0), 2.1), ((0, 0, 2), 1.8)],
)
def test_hausdorff_of_a_shifted_box_is_the_shift_in_mm(shift_zyx, expected_mm):
    reference = box((2, 8), (4, 14), (4, 14))
    predicted = np.roll(reference, shift_zyx, axis=(0, 1, 2))
    distances = surface_distances(reference, predicted, SPACING_MM)
    assert distances.hausdorff_mm(100) == pytest.approx(expected_mm)


def test_hd95_counts_area_not_voxels():
    """A far piece of 1 % of the area changes HD100 and not HD95."""
    reference = box((4, 12), (2, 18), (2, 18))
    predicted = reference.copy()
    predicted[8, 10, 22] = True
    distances = surface_distances(reference, predicted, (1, 1, 1))
    # From the far corner plane x=23 to the box' face at x=18.
    assert distances.hausdorff_mm(100) == pytest.approx(5.0)
    assert distances.hausdorff_mm(95) == 0


def test_surface_dice_of_a_plate_shifted_by_one_slice():
    """Two of a box' six faces move by 2.5 mm: within 2.5 mm all agree."""
    reference = box((2, 8), (2, 18), (2, 22))
    predicted = np.roll(reference, 1, axis=0)
    distances = surface_distances(reference, predicted, SPACING_MM)
    assert distances.dice(2.5) == 1
    assert 0.2 < distances.dice(2.4) < 0.8


def test_surfaces_of_empty_masks_are_undefined():
    full = box((2, 4), (2, 4), (2, 4))
    both = surface_distances(EMPTY, EMPTY, SPACING_MM)
    one = surface_distances(full, EMPTY, SPACING_MM)
    assert np.isnan(both.dice(1.0))
    assert np.isnan(both.hausdorff_mm())
    assert one.dice(1.0) == 0
    assert np.isnan(one.hausdorff_mm())


def test_area_of_a_plane_is_exact():
    """A flat face through 2x2x2 voxels is the face between them."""
    areas = element_areas_mm2(SPACING_MM)
    assert areas[0b00001111] == pytest.approx(0.7 * 0.9)  # inside is the next z
    assert areas[0b00110011] == pytest.approx(2.5 * 0.9)
    assert areas[0b01010101] == pytest.approx(2.5 * 0.7)


def test_a_mask_and_its_complement_have_one_surface():
    areas = element_areas_mm2(SPACING_MM)
    assert np.allclose(areas, areas[::-1])


def test_area_of_a_ball_is_that_of_the_sphere():
    z, y, x = np.ogrid[:60, :60, :60]
    ball = (z - 30) ** 2 + (y - 30) ** 2 + (x - 30) ** 2 <= 25**2
    _, areas_mm2 = surface(ball, (1.0, 1.0, 1.0))
    # Marching cubes on a binary ball overestimates by about a tenth.
    assert areas_mm2.sum() == pytest.approx(4 * np.pi * 25**2, rel=0.12)


@pytest.mark.parametrize("seed", range(3))
def test_distances_agree_with_a_slow_search(seed):
    mask_ref, mask_pred = blobs(seed), blobs(seed + 10)
    distances = surface_distances(mask_ref, mask_pred, SPACING_MM)

    def corners_mm(mask):
        padded = np.pad(mask, 1)
        found = [
            (z, y, x)
            for z in range(SHAPE[0] + 1)
            for y in range(SHAPE[1] + 1)
            for x in range(SHAPE[2] + 1)
            if 0 < padded[z : z + 2, y : y + 2, x : x + 2].sum() < 8
        ]
        return np.array(found) * SPACING_MM

    between = cdist(corners_mm(mask_ref), corners_mm(mask_pred))
    assert np.allclose(np.sort(distances.ref_to_pred_mm), np.sort(between.min(axis=1)))
    assert np.allclose(np.sort(distances.pred_to_ref_mm), np.sort(between.min(axis=0)))


def test_hausdorff_is_near_simpleitks_voxel_definition():
    """SimpleITK measures between voxel centres of the masks, ours between surfaces:
    they differ by less than a voxel's diagonal."""
    mask_ref, mask_pred = blobs(1), blobs(1) ^ blobs(2) & box((4, 12), (4, 16), (4, 20))
    images = []
    for mask in (mask_ref, mask_pred):
        image = sitk.GetImageFromArray(mask.astype(np.uint8))
        image.SetSpacing(SPACING_MM[::-1])
        images.append(image)
    filtered = sitk.HausdorffDistanceImageFilter()
    filtered.Execute(*images)
    ours_mm = surface_distances(mask_ref, mask_pred, SPACING_MM).hausdorff_mm(100)
    assert abs(ours_mm - filtered.GetHausdorffDistance()) < np.linalg.norm(SPACING_MM)


@pytest.mark.parametrize(
    # Computed by google-deepmind/surface-distance 0.1 (PyPI) on the same masks.
    ("seeds", "hd95_mm", "dice_1mm", "area_ref_mm2"),
    [
        ((3, 4), 4.712748667179271, 0.47090903811234447, 2737.568048371202),
        ((5, 6), 5.4, 0.5392174422248538, 3860.948770950283),
        ((7, 8), 5.500909015790026, 0.3727396500559516, 2510.6324941344),
    ],
)
def test_surface_scores_agree_with_surface_distance(
    seeds, hd95_mm, dice_1mm, area_ref_mm2
):
    distances = surface_distances(blobs(seeds[0]), blobs(seeds[1]), SPACING_MM)
    assert distances.hausdorff_mm(95) == pytest.approx(hd95_mm, abs=1e-9)
    assert distances.dice(1.0) == pytest.approx(dice_1mm, abs=1e-9)
    assert distances.ref_mm2.sum() == pytest.approx(area_ref_mm2, rel=1e-9)


def labels(**nodules):
    volume = np.zeros(SHAPE, np.uint8)
    for name, mask in nodules.items():
        volume[mask] = int(name[1:])
    return volume


def test_a_nodule_is_hit_from_an_iou_of_a_tenth():
    reference = labels(n3=box((0, 10), (0, 1), (0, 10)))  # 100 voxels
    just = labels(n1=box((0, 1), (0, 1), (0, 10)))  # 10 of 100: IoU 0.1
    below = labels(n1=box((0, 1), (0, 1), (0, 9)))  # 9 of 100
    assert match_nodules(reference, just).hit_by.tolist() == [1]
    missed = match_nodules(reference, below)
    assert missed.hit_by.tolist() == [0]
    assert missed.iou.tolist() == [0.09]
    assert missed.dice.tolist() == [2 * 9 / 109]


def test_every_component_hits_at_most_one_nodule():
    """One component over two nodules finds the one it fits better."""
    reference = labels(n1=box((0, 4), (0, 4), (0, 4)), n2=box((0, 4), (0, 4), (4, 10)))
    match = match_nodules(reference, labels(n7=box((0, 4), (0, 4), (0, 10))))
    assert match.hit_by.tolist() == [0, 7]
    assert match.hits.tolist() == [2]
    assert not match.false_positive.any()


def test_a_second_piece_of_a_nodule_is_no_false_positive():
    reference = labels(n1=box((0, 9), (0, 4), (0, 4)))
    match = match_nodules(
        reference,
        labels(n1=box((0, 5), (0, 4), (0, 4)), n2=box((6, 9), (0, 4), (0, 4))),
    )
    assert match.hits.tolist() == [1, 0]
    assert not match.false_positive.any()


def test_a_leak_that_touches_a_nodule_is_a_false_positive():
    reference = labels(n1=box((0, 2), (0, 2), (0, 2)))  # 8 of the leak's 16 * 20 * 24
    match = match_nodules(reference, labels(n1=~EMPTY))
    assert match.hit_by.tolist() == [0]
    assert match.false_positive.tolist() == [True]


def test_a_finding_that_does_not_count_is_not_a_false_positive():
    finding = box((8, 10), (8, 10), (8, 10))
    predicted = labels(n1=finding, n2=box((0, 2), (0, 2), (0, 2)))
    match = match_nodules(labels(), predicted, finding)
    assert match.false_positive.tolist() == [False, True]
    assert len(match.labels_ref) == 0


def test_the_component_of_a_miss_is_the_one_it_is_compared_with():
    reference = labels(n1=box((0, 4), (0, 4), (0, 4)), n2=box((8, 9), (8, 9), (8, 9)))
    match = match_nodules(reference, labels(n3=box((3, 10), (0, 10), (3, 10))))
    assert match.hit_by.tolist() == [0, 0]
    assert match.component.tolist() == [3, 3]
    match = match_nodules(reference, labels(n3=box((0, 4), (0, 4), (0, 4))))
    assert match.component.tolist() == [3, 0]


def test_nothing_predicted_misses_every_nodule():
    match = match_nodules(labels(n2=box((0, 2), (0, 2), (0, 2))), labels())
    assert (match.hit_by.tolist(), match.iou.tolist()) == ([0], [0.0])


def test_the_interval_of_a_constant_is_the_constant():
    interval = bootstrap_mean(np.full(12, 0.7), np.arange(12) // 2)
    assert interval == pytest.approx((0.7, 0.7, 0.7))


def test_undefined_cases_do_not_count_in_the_mean():
    interval = bootstrap_mean(np.array([0.2, np.nan, 0.6]), np.array(["a", "b", "c"]))
    assert interval.value == pytest.approx(0.4)


def test_one_patient_has_no_interval():
    interval = bootstrap_mean(np.array([0.2, 0.6]), np.array(["a", "a"]))
    assert interval.value == pytest.approx(0.4)
    assert np.isnan([interval.low, interval.high]).all()


def test_pooled_dice_weighs_voxels_and_the_mean_weighs_cases():
    counts = np.array([[100, 0, 0], [0, 10, 10]])  # Dice 1 and 0
    patients = np.array(["a", "b"])
    pooled = bootstrap_pooled(counts, patients, "dice")
    assert pooled.value == 200 / 220
    mean = bootstrap_mean(Counts(*counts.T).dice, patients)
    assert mean.value == 0.5
    # Either patient alone is drawn twice in half of the draws.
    assert (mean.low, mean.high) == (0, 1)


def test_the_interval_is_that_of_a_loop_over_resampled_patients():
    rng = np.random.default_rng(1)
    values, patients = rng.random(30), np.arange(30) // 3
    interval = bootstrap_mean(values, patients, n=4000)
    means = []
    for _ in range(4000):
        drawn = rng.integers(0, 10, 10)
        means.append(np.mean([values[patients == p] for p in drawn]))
    low, high = np.quantile(means, [0.025, 0.975])
    assert interval.low == pytest.approx(low, abs=0.01)
    assert interval.high == pytest.approx(high, abs=0.01)


def test_patients_not_cases_are_drawn():
    """Ten equal cases of each of two patients say no more than one of each."""
    values = np.repeat([0.0, 1.0], 10)
    by_case = bootstrap_mean(values, np.arange(20))
    by_patient = bootstrap_mean(values, np.repeat(["a", "b"], 10))
    assert (by_patient.low, by_patient.high) == (0, 1)
    assert by_case.high - by_case.low < 0.6


def test_a_run_against_itself_differs_by_nothing():
    values = np.random.default_rng(0).random((20, 2))
    both = np.concatenate([values, values], axis=1)
    interval = bootstrap(
        both,
        np.arange(20),
        lambda sums: ratio(sums[..., 0] - sums[..., 2], sums[..., 1] + 1),
    )
    assert interval == (0, 0, 0)


def test_equal_seeds_give_equal_intervals():
    values = np.random.default_rng(0).random(20)
    assert bootstrap_mean(values, np.arange(20), seed=3) == bootstrap_mean(
        values, np.arange(20), seed=3
    )
