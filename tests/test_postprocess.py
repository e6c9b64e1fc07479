import csv
import json
from dataclasses import replace

import numpy as np
import pytest

import config
import postprocess
from config import Experiment, Postprocess
from configs.rules import RULES, Rule
from ct.nifti_io import read_nifti, write_nifti
from ct.scan import read_scan, reference_mask, write_scan
from metrics import tuning
from metrics.tuning import best_of_grid, tuning_counts
from nodules.components import components, erode, kmeans_threshold
from nodules.measures import axes_mm, find_nodules
from postprocess import Arguments, postprocess_predictions
from results.predictions import Predictions, read_predictions
from tests.conftest import SHAPE, SPACING_MM, ball, canonical_grid, tiny_scan

FIXED = Postprocess(method="fixed", within_lung=False, min_volume_mm3=0.0)
VOXEL_MM3 = 2.5 * 1.5 * 1.5


def prob_of(*blobs):
    """A map of 0 with (mask, probability) blobs."""
    prob = np.zeros(SHAPE, np.float32)
    for mask, value in blobs:
        prob[mask] = value
    return prob


def test_two_blobs_are_two_nodules_by_falling_score():
    first, second = ball((8, 20, 20), 4.0), ball((16, 40, 40), 6.0)
    labels, nodules = find_nodules(
        prob_of((first, 0.7), (second, 0.9)), canonical_grid(), FIXED
    )
    assert np.array_equal(labels == 1, second)
    assert np.array_equal(labels == 2, first)
    assert labels.dtype == np.uint8
    assert [n.score for n in nodules] == pytest.approx([0.9, 0.7])
    assert nodules[0].centre_zyx == pytest.approx((16, 40, 40))
    assert nodules[0].volume_mm3 == pytest.approx(second.sum() * VOXEL_MM3)
    assert nodules[0].equivalent_diameter_mm == pytest.approx(12, rel=0.1)
    assert nodules[0].long_axis_mm == pytest.approx(12, abs=1.5)


def test_a_probability_at_the_threshold_is_nodule():
    blob = ball((8, 20, 20), 4.0)
    settings = replace(FIXED, threshold=0.3)
    labels, _ = find_nodules(prob_of((blob, 0.3)), canonical_grid(), settings)
    assert np.array_equal(labels > 0, blob)


def test_small_components_are_removed_by_volume():
    blob = ball((8, 20, 20), 4.0)
    volume_mm3 = blob.sum() * VOXEL_MM3
    for least, expected in ((volume_mm3, 1), (volume_mm3 + 1, 0)):
        settings = replace(FIXED, min_volume_mm3=least)
        _, nodules = find_nodules(prob_of((blob, 0.9)), canonical_grid(), settings)
        assert len(nodules) == expected


@pytest.mark.parametrize(("connectivity", "expected"), [(6, 2), (18, 1), (26, 1)])
def test_voxels_that_share_an_edge_are_one_from_connectivity_18(connectivity, expected):
    prob = prob_of()
    prob[5, 5, 5] = prob[5, 6, 6] = 0.9
    settings = replace(FIXED, connectivity=connectivity)
    assert len(find_nodules(prob, canonical_grid(), settings)[1]) == expected


@pytest.mark.parametrize(("connectivity", "expected"), [(6, 2), (18, 2), (26, 1)])
def test_voxels_that_share_a_corner_are_one_only_with_26(connectivity, expected):
    prob = prob_of()
    prob[5, 5, 5] = prob[6, 6, 6] = 0.9
    settings = replace(FIXED, connectivity=connectivity)
    assert len(find_nodules(prob, canonical_grid(), settings)[1]) == expected


def test_small_components_are_removed_by_their_voxels():
    prob = prob_of()
    prob[5, 5, :10] = prob[9, 5, :9] = 0.9
    labels, nodules = find_nodules(
        prob, canonical_grid(), replace(FIXED, min_voxels=10)
    )
    assert len(nodules) == 1
    assert np.count_nonzero(labels) == 10


def test_holes_are_filled_and_count_but_not_what_is_open():
    prob = prob_of()
    prob[5:10, 5:10, 5:10] = prob[15:20, 5:10, 5:10] = 0.9
    prob[6:9, 6:9, 6:9] = prob[16:20, 6:9, 6:9] = 0.3
    plain, _ = find_nodules(prob, canonical_grid(), FIXED)
    settings = replace(FIXED, fill_holes=True, min_voxels=100)
    labels, (nodule,) = find_nodules(prob, canonical_grid(), settings)
    assert labels[5:10, 5:10, 5:10].all()
    assert not labels[15:].any()  # 89 voxels, open to the head
    assert nodule.volume_mm3 == pytest.approx(125 * VOXEL_MM3)
    assert nodule.score == pytest.approx((98 * 0.9 + 27 * 0.3) / 125)
    assert np.count_nonzero(plain) == 98 + 89


def test_a_component_in_the_hole_of_another_becomes_part_of_it():
    prob = prob_of()
    prob[5:12, 5:12, 5:12] = 0.9
    prob[6:11, 6:11, 6:11] = 0.0
    prob[8, 8, 8] = 0.9
    assert len(find_nodules(prob, canonical_grid(), FIXED)[1]) == 2
    settings = replace(FIXED, fill_holes=True)
    assert len(find_nodules(prob, canonical_grid(), settings)[1]) == 1


def test_the_rules_that_can_be_named_are_those_there_are():
    assert set(config.choices(Rule)) == set(RULES)


def test_components_that_lie_half_in_the_lung_are_kept_whole():
    prob = prob_of()
    prob[5, 10, 10:20] = prob[5, 30, 10:20] = 0.9
    lung = np.zeros(SHAPE, np.uint8)
    lung[:, 10, :15], lung[:, 30, :14] = 1, 1  # 5 of 10 voxels, and 4 of 10
    settings = replace(FIXED, within_lung=True)
    labels, (nodule,) = find_nodules(prob, canonical_grid(), settings, lung=lung)
    assert labels[5, 10, 10:20].all()
    assert not labels[5, 30].any()
    assert nodule.side == "right"


def test_only_what_lies_in_the_lung_is_kept_and_its_side_is_told():
    scan = tiny_scan()
    inside, outside = ball((12, 32, 18), 4.0), ball((12, 4, 32), 4.0)
    prob = prob_of((inside, 0.9), (outside, 0.9))
    settings = replace(FIXED, within_lung=True)
    labels, nodules = find_nodules(
        prob, scan.grid, settings, lung=scan.lung, hu=scan.hu
    )
    assert np.array_equal(labels > 0, inside)
    assert [n.side for n in nodules] == ["right"]
    assert nodules[0].mean_hu == pytest.approx(scan.hu[inside].mean())


def test_a_missing_lung_mask_is_refused():
    with pytest.raises(ValueError, match="no lung mask"):
        find_nodules(prob_of(), canonical_grid(), Postprocess())


def test_an_empty_map_has_no_nodule():
    labels, nodules = find_nodules(prob_of(), canonical_grid(), FIXED)
    assert not labels.any()
    assert nodules == []


def test_more_than_255_components_keep_their_own_labels():
    prob = prob_of()
    prob[::2, ::4, ::4] = 0.9
    labels, nodules = find_nodules(prob, canonical_grid(), FIXED)
    assert labels.dtype == np.uint16
    assert len(nodules) == len(np.unique(labels)) - 1 == 12 * 16 * 16


def test_erosion_takes_a_border_off_each_slice_and_not_off_its_neighbours():
    mask = np.zeros((3, 11, 11), bool)
    mask[1, 2:9, 2:9] = True
    expected = np.zeros_like(mask)
    expected[1, 4:7, 4:7] = True
    assert np.array_equal(erode(mask, 5), expected)
    assert np.array_equal(erode(mask, 0), mask)


def test_erosion_at_the_border_of_the_box_is_that_of_the_whole_slice():
    """Nodules are eroded in their bounding box; what is outside must count as empty."""
    from scipy.ndimage import binary_erosion

    blob = ball((8, 20, 20), 9.0)
    labels, _ = find_nodules(
        prob_of((blob, 0.9)), canonical_grid(), replace(FIXED, erosion_px=5)
    )
    assert np.array_equal(labels > 0, binary_erosion(blob, np.ones((1, 5, 5))))


def test_kmeans_threshold_lies_midway_between_two_clusters():
    values = np.array([0.1, 0.1, 0.1, 0.9], np.float32)
    assert kmeans_threshold(values) == pytest.approx(0.5)
    values = np.array([0.0, 0.2, 0.8], np.float32)  # clusters {0, 0.2} and {0.8}
    assert kmeans_threshold(values) == pytest.approx((0.1 + 0.8) / 2)


def test_kmeans_threshold_agrees_with_scikit_learn():
    from sklearn.cluster import KMeans

    rng = np.random.default_rng(0)
    values = np.concatenate([rng.beta(1, 20, 5000), rng.beta(8, 2, 300)])
    centres = KMeans(2, n_init=5, random_state=0).fit(values[:, None]).cluster_centers_
    assert kmeans_threshold(values) == pytest.approx(centres.mean(), abs=2e-3)


def test_probabilities_that_are_all_alike_have_no_nodule():
    settings = replace(FIXED, method="kmeans")
    labels, _ = find_nodules(
        np.full(SHAPE, 0.7, np.float32), canonical_grid(), settings
    )
    assert not labels.any()


def test_kmeans_makes_no_nodule_of_noise():
    """K-means always finds two clusters; a component must reach the fixed threshold."""
    noise = np.random.default_rng(0).random(SHAPE).astype(np.float32) * 0.1
    settings = replace(FIXED, method="kmeans")
    assert not find_nodules(noise, canonical_grid(), settings)[0].any()
    blob = ball((8, 20, 20), 6.0)
    noise[blob] = 0.8
    labels, nodules = find_nodules(noise, canonical_grid(), settings)
    assert len(nodules) == 1
    assert np.array_equal(labels > 0, blob)


def test_axes_of_a_rectangle_are_its_diagonal_and_not_pixel_centres():
    mask = np.zeros((2, 20, 20), bool)
    mask[0, 3, 3:13] = True  # a row of 10 pixels
    assert axes_mm(mask, (2.0, 0.5)) == pytest.approx((5.0, 2.0))


def test_axes_of_an_ellipse_are_its_own():
    y, x = np.ogrid[:80, :80]
    mask = (((y - 40) / 15) ** 2 + ((x - 40) / 30) ** 2 <= 1)[None]
    long_mm, short_mm = axes_mm(mask, (0.7, 0.7))
    assert long_mm == pytest.approx(60 * 0.7, abs=0.8)
    assert short_mm == pytest.approx(30 * 0.7, abs=0.8)


@pytest.mark.parametrize("others", [{}, {"min_voxels": 40, "fill_holes": True}])
@pytest.mark.parametrize("within_lung", [False, True])
def test_tuning_counts_are_those_of_the_settings_themselves(within_lung, others):
    rng = np.random.default_rng(0)
    from scipy.ndimage import gaussian_filter

    prob = gaussian_filter(rng.random(SHAPE), 1.5).astype(np.float32)
    prob = (prob - prob.min()) / np.ptp(prob)
    reference = ball((10, 30, 30), 10.0)
    lung = np.zeros(SHAPE, np.uint8)
    lung[:, 12:40] = 1
    within = lung > 0 if within_lung else None
    base = replace(FIXED, within_lung=within_lung, **others)
    counts = tuning_counts(prob, reference, canonical_grid(), base, within=within)
    for t, e, v, s in ((6, 0, 0, 0), (5, 1, 2, 0), (7, 0, 1, 1), (4, 2, 3, 0)):
        settings = replace(
            base,
            threshold=tuning.THRESHOLDS[t],
            erosion_px=tuning.EROSIONS_PX[e],
            min_volume_mm3=tuning.MIN_VOLUMES_MM3[v],
            min_score=tuning.MIN_SCORES[s],
        )
        labels, nodules = find_nodules(prob, canonical_grid(), settings, lung=lung)
        mask = labels > 0
        touching = len(np.unique(labels[mask & reference]))
        assert counts[t, e, v, s].tolist() == [
            (mask & reference).sum(),
            (mask & ~reference).sum(),
            (reference & ~mask).sum(),
            len(nodules) - touching,
        ]


def test_tuning_takes_the_best_mean_dice():
    counts = grid_counts(2, (0, 0, 10, 0))  # nothing is found anywhere
    counts[:, 3, 1, 2] = (10, 0, 0, 0)
    settings, reached = best_of_grid(counts, Postprocess())
    assert settings.threshold == tuning.THRESHOLDS[3]
    assert settings.erosion_px == tuning.EROSIONS_PX[1]
    assert settings.min_volume_mm3 == tuning.MIN_VOLUMES_MM3[2]
    assert settings.method == "tuned"
    assert reached["mean_dice"] == 1


def grid_counts(scans, counts):
    """The same (tp, fp, fn, false) for every setting of `scans` scans."""
    shape = (
        len(tuning.THRESHOLDS),
        len(tuning.EROSIONS_PX),
        len(tuning.MIN_VOLUMES_MM3),
        len(tuning.MIN_SCORES),
    )
    return np.tile(np.array(counts), (scans, *shape, 1))


def test_of_equal_settings_the_plainest_is_taken_unless_others_find_less_falsely():
    counts = grid_counts(1, (1, 1, 1, 1))
    assert best_of_grid(counts, Postprocess())[0] == Postprocess(method="tuned")
    counts[0, 8, 2, 4, :, 3] = 0
    assert best_of_grid(counts, Postprocess())[0].threshold == tuning.THRESHOLDS[8]


def test_a_difference_that_chance_explains_does_not_move_the_setting():
    # Dice 0.8 everywhere; at one setting 0.9 in one scan and 0.75 in another: the mean
    # is larger by 0.0125, its standard error 0.03.
    counts = grid_counts(4, (80, 20, 20, 0))
    counts[0, 8, 0, 0] = (90, 10, 10, 0)
    counts[1, 8, 0, 0] = (75, 25, 25, 0)
    assert best_of_grid(counts, Postprocess())[0].threshold == 0.5
    counts[:, 8, 0, 0] = (90, 10, 10, 0)  # better in every scan
    assert best_of_grid(counts, Postprocess())[0].threshold == tuning.THRESHOLDS[8]


def test_scans_without_nodule_count_by_what_is_falsely_found_and_not_by_silence():
    """Silence in three healthy scans must not cost the nodule of the fourth."""
    counts = grid_counts(4, (0, 0, 0, 0))
    counts[0] = (0, 0, 100, 0)
    counts[0, :10] = (90, 10, 10, 0)  # found up to the threshold 0.9, not at 0.95
    counts[1:, :10, ..., 1] = 500
    counts[1:, :10, ..., 3] = 1
    settings, reached = best_of_grid(counts, Postprocess())
    assert settings.threshold == 0.5
    assert reached["mean_dice"] == 0.9
    assert reached["scans_with_nodule"] == 1


def test_a_validation_scan_without_nodule_asks_for_silence():
    prob = prob_of((ball((8, 20, 20), 4.0), 0.6))
    counts = tuning_counts(prob, np.zeros(SHAPE, bool), canonical_grid(), FIXED)
    settings, reached = best_of_grid(counts[None], Postprocess())
    assert reached["mean_dice"] is None
    assert not find_nodules(
        prob, canonical_grid(), replace(settings, within_lung=False)
    )[0].any()


def test_of_some_slices_components_keep_their_whole_volume():
    ball_mask = ball((8, 20, 20), 4.0)
    prob = prob_of((ball_mask, 0.9))
    counts = tuning_counts(prob, ball_mask, canonical_grid(), FIXED, slices=[8])
    largest = len(tuning.MIN_VOLUMES_MM3) - 1
    assert counts[5, 0, largest, 0].tolist() == [ball_mask[8].sum(), 0, 0, 0]


ALL = replace(RULES["voxels-150"], min_voxels=0)


def test_a_mask_becomes_instances_of_150_voxels_and_a_table():
    mask = np.zeros(SHAPE, bool)
    mask[2:8, 5:10, 5:10] = mask[12:16, 30:36, 30:36] = mask[20, 50:55, 50:55] = True
    labels, rows = postprocess.postprocess(mask, SPACING_MM)
    assert labels.dtype == np.uint8
    assert np.array_equal(np.unique(labels), [0, 1])
    assert (labels[2:8, 5:10, 5:10] == 1).all()  # 150 voxels; the second has 144
    (row,) = rows
    assert row["nodule_id"] == 1
    assert row["centre_zyx"] == (4.5, 7, 7)
    assert row["volume_mm3"] == pytest.approx(150 * VOXEL_MM3)
    assert row["side"] == ""
    assert row["pleura_distance_mm"] is None


def test_a_map_becomes_instances_by_falling_score():
    prob = prob_of((ball((8, 20, 20), 7.0), 0.7), (ball((16, 40, 40), 7.0), 0.9))
    labels, rows = postprocess.postprocess(prob, SPACING_MM)
    assert [row["score"] for row in rows] == pytest.approx([0.9, 0.7])
    assert labels[16, 40, 40] == 1


@pytest.mark.parametrize("kind", [bool, np.uint8, np.int64, np.float32, np.float64])
@pytest.mark.parametrize("shape", [SHAPE, (1, 4, 4)])
def test_nothing_marked_gives_no_row(kind, shape):
    labels, rows = postprocess.postprocess(np.zeros(shape, kind), SPACING_MM)
    assert labels.shape == shape
    assert not labels.any()
    assert rows == []


def test_one_voxel_at_a_corner_is_a_nodule_if_size_does_not_matter():
    mask = np.zeros(SHAPE, np.uint8)
    mask[-1, -1, -1] = 1
    assert postprocess.postprocess(mask, SPACING_MM)[1] == []
    labels, (row,) = postprocess.postprocess(mask, SPACING_MM, settings=ALL)
    assert np.array_equal(labels, mask)
    assert (row["long_axis_mm"], row["short_axis_mm"]) == pytest.approx((1.5, 1.5))


def test_what_is_all_marked_is_one_nodule():
    labels, rows = postprocess.postprocess(np.ones((6, 6, 6), bool), (1, 1, 1))
    assert (labels == 1).all()
    assert len(rows) == 1


@pytest.mark.parametrize("changes", [{}, {"fill_holes": True}])
def test_labels_that_touch_stay_apart_and_each_is_kept(changes):
    given = np.zeros(SHAPE, np.uint16)
    given[5:10, 5:10, 5:10] = 7
    given[5:10, 5:10, 10:15] = 300
    given[5:10, 5:10, 15] = 2
    settings = replace(ALL, **changes)
    labels, rows = postprocess.postprocess(given, SPACING_MM, settings=settings)
    assert len(rows) == 3
    for number in (2, 7, 300):
        (own,) = np.unique(labels[given == number])
        assert np.array_equal(labels == own, given == number)


def test_a_hole_of_a_label_is_filled_but_no_other_label():
    given = np.zeros(SHAPE, np.uint8)
    given[5:12, 5:12, 5:12] = 3
    given[6:8, 6:8, 6:8] = 0
    given[9:11, 9:11, 9:11] = 1
    settings = replace(ALL, fill_holes=True)
    labels, rows = postprocess.postprocess(given, SPACING_MM, settings=settings)
    assert len(rows) == 2
    assert np.count_nonzero(labels == labels[5, 5, 5]) == 7**3 - 8
    assert np.count_nonzero(labels == labels[9, 9, 9]) == 8
    # What is filled is as sure as the rest of a mask.
    assert [row["score"] for row in rows] == [1, 1]


def test_labels_are_eroded_as_one_mask():
    given = np.zeros(SHAPE, np.uint8)
    given[8, 10:20, 10:15], given[8, 10:20, 15:20] = 1, 2
    settings = replace(ALL, erosion_px=3)
    labels, rows = postprocess.postprocess(given, SPACING_MM, settings=settings)
    assert len(rows) == 2
    assert np.array_equal(labels > 0, erode(given > 0, 3))


def test_sides_and_hu_are_told_if_lungs_and_hu_are_given():
    scan = tiny_scan()
    labels, rows = postprocess.postprocess(
        scan.nodule_labels, SPACING_MM, settings=ALL, lung=scan.lung, hu=scan.hu
    )
    assert {row["side"] for row in rows} == {"right", "left"}
    assert rows[0]["mean_hu"] == pytest.approx(scan.hu[labels == 1].mean())


@pytest.mark.parametrize(
    ("marked", "spacing_mm", "message"),
    [
        (np.full((2, 2, 2), 2.0), (1, 1, 1), "values from 2 to 2; expected prob"),
        (np.full((2, 2, 2), np.nan), (1, 1, 1), "values from nan"),
        (np.full((2, 2, 2), -1), (1, 1, 1), "values from -1 to -1"),
        (np.zeros((2, 2, 2), bool), (1, 1), r"spacing_mm is \(1, 1\); expected"),
        (np.zeros((2, 2, 2), bool), (1, 0, 1), "expected .* above 0"),
        (np.zeros((2, 2), bool), (1, 1, 1), r"shape \(2, 2\); expected \(z, y, x\)"),
        (np.zeros((0, 2, 2), bool), (1, 1, 1), r"expected \(z, y, x\) above 0"),
    ],
)
def test_what_is_no_mask_is_refused(marked, spacing_mm, message):
    with pytest.raises(ValueError, match=message):
        postprocess.postprocess(marked, spacing_mm)


def test_lungs_of_another_shape_are_refused():
    lung = np.zeros((2, 2, 3), np.uint8)
    with pytest.raises(ValueError, match=r"shapes \(2, 2, 2\) and \(2, 2, 3\)"):
        postprocess.postprocess(np.zeros((2, 2, 2), bool), (1, 1, 1), lung=lung)


@pytest.fixture
def work(tmp_path):
    """Three scans, a run and its probability maps: 0.6 in the reference, 0.3 around."""
    scans = [tiny_scan(index) for index in range(3)]
    parts = ("validation", "test", "test")
    for scan in scans:
        write_scan(scan, tmp_path / "scans" / f"{scan.scan_id}.h5", {})
        prob = np.zeros(SHAPE, np.float32)
        prob[scan.nodule_labels > 0] = 0.3
        reference = reference_mask(scan, consensus_level=0.5, min_readers=1)
        prob[reference & (scan.lung > 0)] = 0.6
        path = tmp_path / "predictions" / scan.scan_id / "prob.nii.gz"
        write_nifti(path, prob, scan.grid, scan.source_grid)
    predictions = Predictions(
        run="smoke",
        weights_sha256="0" * 64,
        split_sha256="1" * 64,
        training_patients=("patient-009",),
        scans={
            scan.scan_id: {"part": part, "patient_id": scan.patient_id}
            for scan, part in zip(scans, parts, strict=True)
        },
    )
    predictions.write(tmp_path / "predictions")
    write_run(tmp_path, Experiment())
    return tmp_path


def write_run(work, experiment):
    (work / "run").mkdir(exist_ok=True)
    (work / "run/config.json").write_text(json.dumps(config.to_json(experiment)))


def arguments(work, **options):
    return Arguments(
        predictions=work / "predictions",
        run=work / "run",
        scans=work / "scans",
        workers=1,
        **options,
    )


def read_rows(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_predictions_json_comes_back(work):
    predictions = read_predictions(work / "predictions")
    assert predictions.training_patients == ("patient-009",)
    assert predictions.scans["scan-001"]["part"] == "test"
    assert predictions.run == "smoke"


def test_the_step_tunes_and_writes_masks_and_nodules(work):
    report = postprocess_predictions(arguments(work))
    assert report.failures == []
    tuned = json.loads((work / "run/postprocess.json").read_text())
    assert tuned["settings"]["threshold"] > 0.3  # 0.3 holds what few readers marked
    assert tuned["reached"]["mean_dice"] > 0.95
    scan = read_scan(work / "scans/scan-001.h5")
    labels, _ = read_nifti(work / "predictions/scan-001/mask.nii.gz")
    reference = reference_mask(scan, consensus_level=0.5, min_readers=1)
    assert np.array_equal(labels > 0, reference & (scan.lung > 0))
    rows = read_rows(work / "predictions/scan-001/nodules.csv")
    assert [row["side"] for row in rows] in (["right", "left"], ["left", "right"])


def test_the_centre_of_a_nodule_is_the_same_place_in_every_space(work):
    postprocess_predictions(arguments(work))
    scan = read_scan(work / "scans/scan-001.h5")
    row = next(
        row
        for row in read_rows(work / "predictions/scan-001/nodules.csv")
        if row["side"] == "left"
    )
    place_ras_mm = np.array(scan.nodules[1].centre_ras_mm)
    found = [float(row[f"{axis}_lps_mm"]) for axis in "xyz"]
    assert found == pytest.approx(place_ras_mm * (-1, -1, 1), abs=0.5)
    index = [float(row[f"{axis}_source"]) for axis in "ijk"]
    assert scan.source_grid.index_to_ras_mm(np.array(index)) == pytest.approx(
        np.array(found) * (-1, -1, 1), abs=1e-3
    )
    assert int(row["z_slice"]) == 14


def test_without_validation_scans_the_fixed_threshold_is_used_and_said(work):
    predictions = read_predictions(work / "predictions")
    scans = {
        name: {**facts, "part": "test"} for name, facts in predictions.scans.items()
    }
    replace(predictions, scans=scans).write(work / "predictions")
    report = postprocess_predictions(arguments(work))
    assert "threshold 0.5" in report.line
    assert "not tuned: no validation scans" in report.line
    assert not (work / "run/postprocess.json").exists()


def test_running_again_does_nothing_new(work):
    postprocess_predictions(arguments(work))
    path = work / "predictions/scan-001/nodules.csv"
    before = path.stat().st_mtime_ns
    report = postprocess_predictions(arguments(work))
    assert "0 nodules in 0 scans (3 were done before)" in report.line
    assert path.stat().st_mtime_ns == before


def test_an_interrupted_step_goes_on_to_the_same_files(work):
    postprocess_predictions(arguments(work))
    folder = work / "predictions/scan-002"
    expected = [(folder / n).read_bytes() for n in ("mask.nii.gz", "nodules.csv")]
    (folder / "nodules.csv").unlink()
    postprocess_predictions(arguments(work))
    assert [
        (folder / n).read_bytes() for n in ("mask.nii.gz", "nodules.csv")
    ] == expected


def test_masks_of_other_settings_are_not_mixed(work):
    postprocess_predictions(arguments(work))
    write_run(work, Experiment(postprocess=replace(FIXED, threshold=0.25)))
    with pytest.raises(
        ValueError, match=r"threshold was 0\.\d+, is 0\.25.*--overwrite"
    ):
        postprocess_predictions(arguments(work))
    postprocess_predictions(arguments(work, overwrite=True))
    labels, _ = read_nifti(work / "predictions/scan-001/mask.nii.gz")
    scan = read_scan(work / "scans/scan-001.h5")
    assert np.array_equal(labels > 0, scan.nodule_labels > 0)


def without_newer(path, *names):
    """Takes the settings that are newer than min_score out of a record."""
    record = json.loads(path.read_text())
    for name in names:
        for setting in ("min_voxels", "fill_holes"):
            del record[name][setting]
    path.write_text(json.dumps(record))


def test_records_without_the_newer_settings_still_count(work):
    postprocess_predictions(arguments(work))
    without_newer(work / "run/config.json", "postprocess")
    without_newer(work / "run/postprocess.json", "settings", "tuned_on")
    without_newer(work / "predictions/postprocess.json", "settings")
    before = (work / "run/postprocess.json").read_bytes()
    (work / "predictions/scan-002/nodules.csv").unlink()
    report = postprocess_predictions(arguments(work))
    assert "in 1 scan (2 were done before)" in report.line
    assert (work / "run/postprocess.json").read_bytes() == before  # not tuned again


def test_a_rule_is_used_instead_of_the_runs_settings(work):
    report = postprocess_predictions(arguments(work, rule="voxels-150"))
    assert "at least 0 mm3, 150 voxels" in report.line
    assert "rule voxels-150" in report.line
    assert not (work / "run/postprocess.json").exists()
    labels, _ = read_nifti(work / "predictions/scan-001/mask.nii.gz")
    sizes = np.bincount(labels.ravel())[1:]
    prob, _ = read_nifti(work / "predictions/scan-001/prob.nii.gz")
    every = components(prob >= np.float32(0.5), 26)
    every = np.bincount(every.ravel())[1:]
    assert sorted(sizes) == sorted(every[every >= 150])
    assert sizes.sum() < every.sum()


def test_a_rule_is_not_tuned(work):
    with pytest.raises(ValueError, match="--rule voxels-150 and --tune; expected one"):
        postprocess_predictions(arguments(work, rule="voxels-150", tune=True))


def test_values_tuned_for_other_weights_do_not_count(work):
    postprocess_predictions(arguments(work))
    path = work / "run/postprocess.json"
    record = json.loads(path.read_text())
    record["settings"]["threshold"] = 0.95
    path.write_text(json.dumps(record))
    assert (
        "threshold 0.95"
        in postprocess_predictions(arguments(work, overwrite=True)).line
    )
    predictions = read_predictions(work / "predictions")
    replace(predictions, weights_sha256="2" * 64).write(work / "predictions")
    report = postprocess_predictions(arguments(work, overwrite=True))
    assert "threshold 0.95" not in report.line


def test_a_scan_without_its_map_is_skipped_and_the_rest_goes_on(work):
    (work / "predictions/scan-001/prob.nii.gz").unlink()
    report = postprocess_predictions(arguments(work))
    assert [failure.scan_id for failure in report.failures] == ["scan-001"]
    assert (work / "predictions/scan-002/nodules.csv").exists()


def test_a_map_on_another_grid_is_skipped(work):
    grid = canonical_grid(SHAPE, (1.0, 1.0, 1.0))
    path = work / "predictions/scan-001/prob.nii.gz"
    write_nifti(path, np.zeros(SHAPE, np.float32), grid, grid)
    report = postprocess_predictions(arguments(work))
    assert "its grid" in report.failures[0].reason
    assert "2.5 x 1.5 x 1.5 mm" in report.failures[0].reason
    assert SPACING_MM == (2.5, 1.5, 1.5)


def test_a_run_for_lungs_is_refused(work):
    lungs = Experiment(batches=replace(Experiment().batches, target="lung"))
    write_run(work, lungs)
    with pytest.raises(ValueError, match="the run segments lung"):
        postprocess_predictions(arguments(work))


def test_missing_predictions_name_the_step_that_makes_them(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"run infer\.py first"):
        read_predictions(tmp_path)


def test_ids_that_leave_the_folder_are_refused(work):
    path = work / "predictions/predictions.json"
    path.write_text(path.read_text().replace("scan-001", "../scan-001"))
    with pytest.raises(ValueError, match="cannot name a file"):
        read_predictions(work / "predictions")
