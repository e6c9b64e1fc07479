"""Nodules of whole scans: outlines around what was found, and who is loaded for it."""

import json
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

import config
from ct import boxes, files
from ct.geometry import Grid
from ct.scan import ScanError
from inference.finder import PIXEL_MM, Component, NoduleFinder, merge_overlapping
from inference.outlining import PATCH_PX, merge_same_outlines, outline_nodules
from tests.conftest import tiny_scan


class Discs:
    """Outlines everything brighter than soft tissue's edge in a patch, as a network would."""

    postprocess = config.Postprocess(threshold=0.5)

    def __init__(self):
        self.patches = None

    def probability(self, patches):
        self.patches = patches
        return (patches > -300).astype(np.float32)


def lung_with(*balls, shape=(12, 150, 160)):
    """(z, y, x) HU of lung with balls of soft tissue: (centre, radius in voxels)."""
    hu = np.full(shape, -850, np.int16)
    axes = np.ogrid[tuple(slice(n) for n in shape)]
    for centre, radius in balls:
        apart = sum((a - c) ** 2 for a, c in zip(axes, centre, strict=True))
        hu[apart <= radius**2] = 40
    return hu


def found_in(hu, *places):
    """Labels of the soft tissue in some boxes, eroded to a cross-section's middle."""
    labels = np.zeros(hu.shape, np.uint8)
    for number, (centre, reach) in enumerate(places, start=1):
        box = boxes.near(centre, [reach] * 3, (1, 1, 1), boxes.full_box(hu.shape))
        labels[box][hu[box] > -300] = number
    return labels


def outlined_by_discs(hu, labels):
    result, became = outline_nodules(hu, labels, Discs())
    assert result.dtype == labels.dtype
    assert set(np.unique(result)) - {0} == set(became)
    return result, became


def test_outlines_grow_to_what_the_seeded_network_sees_in_the_slices_found():
    hu = lung_with(((6, 70, 80), 5))
    labels = found_in(hu, ((6, 70, 80), 1))
    seeded = Discs()
    result, became = outline_nodules(hu, labels, seeded)
    assert became == [1]
    assert seeded.patches.shape == (3, PATCH_PX, PATCH_PX)
    # The nodule lies in the middle of each patch.
    assert (seeded.patches[:, 64, 64] == 40).all()
    np.testing.assert_array_equal(result[5:8] > 0, hu[5:8] > -300)
    assert not result[:5].any()
    assert not result[8:].any()


def test_what_is_outlined_elsewhere_in_a_patch_does_not_count():
    hu = lung_with(((6, 70, 80), 5), ((6, 70, 105), 6))
    labels = found_in(hu, ((6, 70, 80), 5))
    result, _ = outlined_by_discs(hu, labels)
    alone = lung_with(((6, 70, 80), 5))
    np.testing.assert_array_equal(result > 0, (alone > -300) & (labels > 0))


def test_where_nothing_is_outlined_what_was_found_stays():
    hu = lung_with(((6, 70, 80), 5))
    labels = np.zeros(hu.shape, np.uint8)
    labels[2, 20:24, 30:36] = 1
    np.testing.assert_array_equal(outlined_by_discs(hu, labels)[0], labels)


def test_an_outline_of_a_few_pixels_does_not_replace_what_was_found():
    hu = lung_with(((6, 70, 80), 1))
    labels = np.zeros(hu.shape, np.uint8)
    labels[6, 66:75, 76:85] = 1
    np.testing.assert_array_equal(outlined_by_discs(hu, labels)[0], labels)


def test_parts_that_no_outline_comes_near_stay():
    hu = lung_with(((6, 70, 60), 5))
    labels = found_in(hu, ((6, 70, 60), 5))
    labels[6, 69:72, 90:94] = 1  # of the same nodule, joined in another slice
    result, _ = outlined_by_discs(hu, labels)
    assert (result[6, 69:72, 90:94] == 1).all()
    assert (result[6, 65:76, 60] == 1).all()


def test_a_nodule_wider_than_a_patch_keeps_its_ends():
    hu = np.full((3, 260, 260), -850, np.int16)
    hu[1, 120:140, 10:250] = 40
    labels = (hu > -300).astype(np.uint8)
    result, _ = outlined_by_discs(hu, labels)
    inner = np.zeros_like(labels)
    inner[1, 120:140, 66:194] = 1
    assert (result[inner > 0] == 1).all()


def test_two_finds_with_one_outline_are_one_nodule():
    hu = lung_with(((6, 70, 80), 8))
    labels = np.zeros(hu.shape, np.uint8)
    labels[6, 68:70, 78:80] = 1
    labels[6, 72:74, 82:84] = 2
    labels[6, 20:24, 20:24] = 3
    result, became = outlined_by_discs(hu, labels)
    assert became == [1, 1, 2]
    assert ((result == 1)[6] == (hu[6] > -300)).all()
    assert (result[6, 20:24, 20:24] == 2).all()


def test_a_find_whose_outline_others_share_among_them_is_not_lost():
    sizes = Counter({1: 100, 2: 100, 3: 40})
    shared = {1: Counter(), 2: Counter(), 3: Counter({1: 19, 2: 18})}
    labels = np.repeat(np.array([1, 2, 3], np.uint8), (100, 100, 3)).reshape(1, 1, -1)
    result, became = merge_same_outlines(labels, sizes, shared)
    assert became == [1, 2, 3]
    np.testing.assert_array_equal(result, labels)
    # With nothing left it belongs to the one that has most of it.
    result, became = merge_same_outlines(labels[..., :200], sizes, shared)
    assert became == [1, 2, 1]
    np.testing.assert_array_equal(result, labels[..., :200])


def test_neighbours_that_only_touch_stay_two():
    hu = lung_with(((6, 70, 60), 6), ((6, 70, 74), 6))
    labels = found_in(hu, ((6, 70, 60), 3), ((6, 70, 74), 3))
    result, became = outlined_by_discs(hu, labels)
    assert became == [1, 2]
    np.testing.assert_array_equal((result > 0)[6], hu[6] > -300)


@pytest.mark.parametrize("corner", [(0, 0, 0), (11, 149, 159)])
def test_nodules_at_the_border_of_the_field_are_outlined_too(corner):
    hu = lung_with((corner, 5))
    labels = found_in(hu, (corner, 2))
    result, _ = outlined_by_discs(hu, labels)
    slices = np.flatnonzero(labels.any((1, 2)))
    np.testing.assert_array_equal(result[slices] > 0, hu[slices] > -300)


def test_more_than_255_nodules_are_told_apart():
    hu = np.full((6, 200, 200), -850, np.int16)
    labels = np.zeros(hu.shape, np.uint16)
    number = 0
    for z in (1, 4):
        for y in range(5, 195, 14):
            for x in range(5, 195, 14):
                number += 1
                hu[z, y : y + 3, x : x + 3] = 40
                labels[z, y : y + 3, x : x + 3] = number
    assert number > 300
    result, became = outlined_by_discs(hu, labels)
    assert became == list(range(1, number + 1))
    np.testing.assert_array_equal(result, labels)


def component(start, stop, marked_by):
    """Voxels (0, 0, start) to (0, 0, stop)."""
    voxels = np.array([(0, 0, x) for x in range(start, stop)])
    return Component(voxels, 0.5, 0.75, 0.25, 0.125, marked_by)


def test_what_overlaps_a_candidate_is_one_with_it_and_what_overlaps_two_is_neither():
    found = [
        component(0, 4, "volumes"),
        component(10, 14, "volumes"),
        component(2, 6, "slices"),
        component(5, 12, "slices"),
        component(16, 18, "slices"),
    ]
    grid = Grid((1, 1, 20), np.diag([2.0, 1.0, 1.0, 1.0]))
    scores = [0.8, 0.6, 0.9, 0.5, 0.7]
    labels, candidates = merge_overlapping(found, scores, [None] * 5, grid)
    expected = [1] * 6 + [0] * 4 + [3] * 4 + [0] * 2 + [2] * 2 + [0] * 2
    np.testing.assert_array_equal(labels[0, 0], expected)
    assert [c.score for c in candidates] == [0.9, 0.7, 0.6]
    assert [c.marked_by for c in candidates] == ["both", "slices", "both"]
    # The place is that of the better one alone, the size that of both: 6 voxels of 2 mm3.
    assert candidates[0].centre_zyx == (0, 0, 3.5)
    assert candidates[0].equivalent_diameter_mm == pytest.approx(
        (6 * 12 / np.pi) ** (1 / 3)
    )
    labels, candidates = merge_overlapping([], [], [], grid)
    assert not labels.any()
    assert candidates == []


def test_a_run_for_lungs_finds_no_nodules(make_lung_run, tmp_path):
    run = make_lung_run(tmp_path / "lungs")
    with pytest.raises(ValueError, match="expected a unet3d for nodules"):
        NoduleFinder(run, None)


@pytest.fixture(scope="module")
def finder(make_nodule_run, tmp_path_factory):
    """A finder whose network takes for nodule what lies in a band of HU; no outlines."""
    folder = tmp_path_factory.mktemp("runs") / "nodules"
    return NoduleFinder(make_nodule_run(folder), None)


def test_nodules_are_numbered_measured_and_said_where_they_lie(finder):
    scan = tiny_scan()
    found = finder.find(scan)
    assert len(found.nodules) == 2
    assert {n.side for n in found.nodules} == {"right", "left"}
    for label in (1, 2):
        own = scan.nodule_labels == label
        overlap = [(own & (found.labels == n)).sum() for n in (1, 2)]
        assert max(overlap) > 0.1 * own.sum()
        assert min(overlap) == 0
    assert [n.nodule_id for n in found.nodules] == list(
        range(1, len(found.nodules) + 1)
    )
    assert found.labels.max() == len(found.nodules)
    assert found.labels.shape == scan.hu.shape


def test_without_lungs_nothing_is_found_and_without_a_mask_nothing_is_looked_for(
    finder,
):
    scan = tiny_scan()
    empty = finder.find(replace(scan, lung=np.zeros_like(scan.lung)))
    assert not empty.nodules
    assert not empty.labels.any()
    with pytest.raises(ScanError, match="no lung mask"):
        finder.find(replace(scan, lung=None))


def test_pixels_that_the_seeded_network_does_not_know_keep_the_3d_outline(
    make_nodule_run, tmp_path
):
    run, scan = make_nodule_run(tmp_path / "nodules"), tiny_scan()
    finder, alone = NoduleFinder(run, run), NoduleFinder(run, None)
    finder.seeded = Discs()
    assert scan.spacing_mm[1] > PIXEL_MM[1]
    np.testing.assert_array_equal(finder.find(scan).labels, alone.find(scan).labels)
    assert finder.seeded.patches is None
    affine = scan.grid.affine.copy()
    affine[:2, 1:3] *= 0.75
    fine = replace(scan, grid=replace(scan.grid, affine=affine))
    assert finder.find(fine).nodules
    assert finder.seeded.patches is not None


def test_passes_give_each_nodule_a_standard_deviation(make_nodule_run, tmp_path):
    experiment = make_nodule_run.keywords["experiment"]
    model = replace(experiment.model, dropout=0.5)
    run = make_nodule_run(
        tmp_path / "dropout", experiment=replace(experiment, model=model)
    )
    tune(run, n=3)
    scan = tiny_scan()
    finder = NoduleFinder(run, None)
    assert finder.made_by["passes"] == 3
    found, again = finder.find(scan), finder.find(scan)
    np.testing.assert_array_equal(found.labels, again.labels)
    # What is dropped counts for nothing in this network, so all passes are the same.
    assert [n.score_std for n in found.nodules] == pytest.approx([0, 0], abs=1e-4)


def tune(run, *, n=1, weights=None, **settings):
    """Leaves what postprocess.py does when it tunes."""
    settings = config.Postprocess(**{"threshold": 0.5, **settings})
    tuned_on = {
        "weights_sha256": weights or files.sha256(run / "best.weights.h5"),
        "passes": {"n": n} if n > 1 else {},
    }
    record = {
        "settings": config.to_json(settings), "origin": "by hand", "tuned_on": tuned_on
    }  # fmt: skip
    (run / "postprocess.json").write_text(json.dumps(record))
    return settings


def test_what_was_tuned_counts(make_nodule_run, tmp_path):
    run = make_nodule_run(tmp_path / "nodules")
    assert NoduleFinder(run, None).settings == config.Postprocess()
    settings = tune(run, threshold=0.3, min_volume_mm3=65.0)
    assert NoduleFinder(run, None).settings == settings
    tune(run, weights="of another run")
    with pytest.raises(ValueError, match="tuned on other weights"):
        NoduleFinder(run, None)
