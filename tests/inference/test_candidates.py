"""Crops around candidates, and the network that judges them."""

import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

import config
from ct import boxes, resample
from ct.scan import AIR_HU
from inference import candidates
from inference.candidates import CandidateClassifier, candidate_map, crops
from inference.finder import NoduleFinder, std_of_product
from metrics import overlap
from tests.conftest import REDUCTION_RUN, ball, tiny_scan

SPACING_MM = REDUCTION_RUN.table.volume_spacing_mm
SIZE = REDUCTION_RUN.batches.volume_px


def test_crops_are_parts_of_the_volume_that_the_table_would_hold():
    scan = tiny_scan()
    weights, affine = resample.isotropic(scan.grid, SPACING_MM)
    whole = resample.volume(scan.hu, weights)
    middle = (np.array(scan.hu.shape) - 1) / 2
    places = [middle, (0, 0, 0), np.array(scan.hu.shape) - 1, (3, 20.4, 7.7)]
    found = list(crops(scan, places, SPACING_MM, SIZE))
    assert len(found) == len(places)
    from_ras = np.linalg.inv(affine)
    for place, crop in zip(places, found, strict=True):
        ras = scan.grid.index_to_ras_mm(np.asarray(place, float))
        at = from_ras[:3, :3] @ ras + from_ras[:3, 3]
        start = [round(a - (n - 1) / 2) for a, n in zip(at, SIZE, strict=True)]
        expected = boxes.cut(whole, start, SIZE, fill=AIR_HU)
        np.testing.assert_allclose(crop, expected, atol=0.01)
    assert (found[1][0] == AIR_HU).all()


def test_a_crop_wholly_beyond_the_scan_is_air():
    scan = tiny_scan()
    (crop,) = crops(scan, [(-500, 0, 0)], SPACING_MM, SIZE)
    assert (crop == AIR_HU).all()


def test_candidates_have_outlines_of_their_own_and_none_is_lost():
    prob = np.array(
        [[[0.9, 0.9, 0.6, 0.12, 0.12, 0.3, 0.4, 0.3, 0.0, 0.2, 0.11, 0.05]]], np.float32
    )
    settings = config.Postprocess(method="fixed", threshold=0.1)
    # From 0.5: the first. From 0.25: what 0.12 joins to it. From 0.125: the 0.2 alone.
    expected = prob * [1, 1, 1, 0, 0, 1, 1, 1, 0, 1, 0, 0]
    found = candidate_map(prob, settings)
    np.testing.assert_allclose(found, expected)
    nothing = candidate_map(np.zeros_like(prob), settings)
    np.testing.assert_array_equal(nothing, np.zeros_like(prob))
    # A threshold above the usual one for outlines is the only one.
    high = replace(settings, threshold=0.6)
    kept = candidate_map(prob, high)
    np.testing.assert_allclose(kept, prob * (prob >= 0.5))


def test_what_a_low_threshold_joins_is_judged_one_by_one(
    make_nodule_run, make_reduction_run, tmp_path
):
    run = make_nodule_run(tmp_path / "nodules")
    reduction = make_reduction_run(tmp_path / "reduction", threshold=0.1)
    finder = NoduleFinder(run, None, reduction_dir=reduction)
    scan = tiny_scan()
    scan = replace(scan, lung=np.ones_like(scan.lung))
    prob = np.zeros(scan.hu.shape, np.float32)
    line = prob[prob.shape[0] // 2, prob.shape[1] // 2]
    line[10:30] = 0.2
    line[10:14], line[25:30] = 0.9, 0.4
    labels, found = finder.candidates(scan, SimpleNamespace(mean=prob, n=1))
    assert len(found) == 2
    np.testing.assert_array_equal(labels > 0, prob > 0.3)
    assert sorted(c.max_prob for c in found) == pytest.approx([0.4, 0.9])


def test_each_mirror_image_is_judged(make_reduction_run, tmp_path):
    from ct import inputs

    scan = tiny_scan()
    classifier = CandidateClassifier(make_reduction_run(tmp_path / "run"))
    places = [(6, 20, 20), (8, 30, 12), (4, 11, 33), (5, 25, 25), (7, 17, 29)]
    found = classifier.probabilities(scan, places)
    assert found.shape == (5, 4)
    assert len(np.unique(found)) == 20
    # Whoever else is judged beside it.
    np.testing.assert_allclose(
        classifier.probabilities(scan, places[3:4]), found[3:4], atol=1e-6
    )
    (crop,) = crops(scan, places[:1], SPACING_MM, SIZE)
    image = inputs.to_input(crop, None, classifier.batches)
    mirrored = np.stack(
        [image, image[:, ::-1], image[:, :, ::-1], image[:, ::-1, ::-1]]
    )
    by_hand = classifier.network.predict(mirrored[..., None], verbose=0)["slice"]
    np.testing.assert_allclose(found[0], by_hand.ravel(), atol=1e-6)
    assert classifier.probabilities(scan, []).shape == (0, 4)


def test_other_runs_are_refused(make_nodule_run, tmp_path):
    with pytest.raises(ValueError, match="expected candidate and True"):
        CandidateClassifier(make_nodule_run(tmp_path / "nodules"))


def test_the_finder_keeps_what_the_classifier_takes_for_nodules(
    make_nodule_run, make_reduction_run, tmp_path
):
    scan = tiny_scan()
    run = make_nodule_run(tmp_path / "nodules")
    reduction = make_reduction_run(tmp_path / "reduction", threshold=0.4)
    alone = NoduleFinder(run, None).find(scan)
    finder = NoduleFinder(run, None, reduction_dir=reduction)
    every = finder.find(scan)
    assert len(every.nodules) == len(alone.nodules) == 2
    scores = [nodule.score for nodule in every.nodules]
    places = [nodule.centre_zyx for nodule in every.nodules]
    judged = finder.classifier.probabilities(scan, places)
    peaks = np.array([nodule.max_prob for nodule in every.nodules])
    expected = judged.mean(axis=1) * peaks
    assert scores == pytest.approx(expected.tolist(), abs=1e-6)
    # One pass: what varies is the classifier over the mirror images.
    spreads = [nodule.score_std for nodule in every.nodules]
    assert spreads == pytest.approx((judged.std(axis=1) * peaks).tolist(), abs=1e-6)
    assert min(spreads) > 0
    assert [(c.nodule_id, c.score) for c in every.candidates] == [
        (n.nodule_id, n.score) for n in every.nodules
    ]
    assert scores == sorted(scores, reverse=True)
    assert [n.max_prob for n in every.nodules] != scores
    assert finder.made_by["reduction"]["threshold"] == 0.4
    assert len(finder.made_by["weights_sha256"]) == 2
    assert "reduction" not in NoduleFinder(run, None).made_by
    # Between the two scores, the better one is left, with label 1.
    settings = json.loads((reduction / "config.json").read_text())
    settings["postprocess"]["min_score"] = sum(scores) / 2
    (reduction / "config.json").write_text(json.dumps(settings))
    better = NoduleFinder(run, None, reduction_dir=reduction).find(scan)
    assert [n.score for n in better.nodules] == pytest.approx(scores[:1])
    np.testing.assert_array_equal(better.labels, np.where(every.labels == 1, 1, 0))
    assert [c.nodule_id for c in better.candidates] == [1, 0]
    assert [c.score for c in better.candidates] == pytest.approx(scores)
    settings["postprocess"]["min_score"] = 0.999
    (reduction / "config.json").write_text(json.dumps(settings))
    usual = NoduleFinder(run, None, reduction_dir=reduction, min_score=0.0)
    assert [n.score for n in usual.find(scan).nodules] == pytest.approx(scores)
    assert usual.made_by["reduction"]["min_score"] == 0
    least = NoduleFinder(run, None, min_score=0.999).find(scan)
    assert len(least.candidates) == 2
    assert not least.nodules
    none = NoduleFinder(run, None, reduction_dir=reduction).find(scan)
    assert not none.nodules
    assert not none.labels.any()
    assert [c.nodule_id for c in none.candidates] == [0, 0]


@pytest.fixture
def faint_scan():
    """`tiny_scan` with a ball of -400 HU in the left lung, and where that is."""
    scan = tiny_scan()
    faint = ball((12, 22, 46), 4.0)
    return replace(scan, hu=np.where(faint, -400, scan.hu).astype(np.int16)), faint


def test_what_slices_mark_is_judged_and_measured_too(
    make_nodule_run, make_slices_run, make_reduction_run, faint_scan, tmp_path
):
    scan, faint = faint_scan
    run = make_nodule_run(tmp_path / "nodules")
    reduction = make_reduction_run(tmp_path / "reduction", threshold=0.4)
    without = NoduleFinder(run, None, reduction_dir=reduction).find(scan)
    assert len(without.candidates) == 2
    assert not without.labels[faint].any()
    slices = make_slices_run(tmp_path / "slices", hu=-400)
    finder = NoduleFinder(run, None, slices_dir=slices, reduction_dir=reduction)
    found = finder.find(scan)
    scores = [candidate.score for candidate in found.candidates]
    assert len(scores) == 3
    assert scores == sorted(scores, reverse=True)
    (added,) = set(np.unique(found.labels[faint])) - {0}
    assert overlap.dice(faint, found.labels == added) > 0.9
    (judged,) = finder.classifier.probabilities(
        scan, [found.candidates[added - 1].centre_zyx]
    )
    nodule = found.nodules[added - 1]
    assert nodule.score == pytest.approx(judged.mean() * nodule.max_prob, abs=1e-6)
    others = [score for n, score in enumerate(scores, start=1) if n != added]
    assert others == pytest.approx([c.score for c in without.candidates], abs=1e-6)
    assert finder.made_by["slices"]["min_voxels"] == 4
    assert len(finder.made_by["weights_sha256"]) == 3
    with pytest.raises(ValueError, match="no false-positive network"):
        NoduleFinder(run, None, slices_dir=slices)


@pytest.mark.parametrize("better", ["volumes", "slices"])
def test_two_candidates_that_overlap_are_one_with_the_higher_score(
    better, make_nodule_run, make_slices_run, make_reduction_run, tmp_path, monkeypatch
):
    scan = tiny_scan()
    finder = NoduleFinder(
        make_nodule_run(tmp_path / "nodules"),
        None,
        slices_dir=make_slices_run(tmp_path / "slices"),
        reduction_dir=make_reduction_run(tmp_path / "reduction", threshold=0.4),
    )
    maps = finder.predictor.maps(scan, 0.5)
    marked = {
        "volumes": candidate_map(maps.mean, finder.rule) > 0,
        "slices": finder.slices.probability(scan) >= 0.5,
    }
    near = ball((10, 30, 18), 8.0) | ball((14, 34, 46), 7.0)  # the nodules, no wall
    marked = {name: mask & near for name, mask in marked.items()}
    assert (marked["volumes"] != marked["slices"]).any()
    chances = {"volumes": 0.6, "slices": 0.6, better: 0.9}

    def judged(_, places):
        of_volumes = [chances["volumes"]] * 2
        return np.array([of_volumes + [chances["slices"]] * (len(places) - 2)]).T

    monkeypatch.setattr(finder.classifier, "probabilities", judged)
    labels, kept = finder.candidates(scan, maps)
    assert len(kept) == labels.max() == 2
    assert np.array_equal(labels > 0, marked["volumes"] | marked["slices"])
    for number, candidate in enumerate(kept, start=1):
        assert candidate.score == pytest.approx(0.9 * candidate.max_prob)
        own = marked[better] & (labels == number)
        centre = np.argwhere(own).mean(axis=0)
        np.testing.assert_allclose(candidate.centre_zyx, centre, atol=0.01)


def test_what_joins_two_better_candidates_is_neither(
    make_nodule_run, make_slices_run, make_reduction_run, tmp_path, monkeypatch
):
    scan = tiny_scan()
    scan = replace(scan, lung=np.ones_like(scan.lung))
    finder = NoduleFinder(
        make_nodule_run(tmp_path / "nodules"),
        None,
        slices_dir=make_slices_run(tmp_path / "slices"),
        reduction_dir=make_reduction_run(tmp_path / "reduction", threshold=0.4),
    )
    of_volumes = np.zeros(scan.hu.shape, np.float32)
    of_volumes[8:12, 20:24, 10:14] = of_volumes[8:12, 20:24, 20:24] = 0.9
    of_slices = np.zeros_like(of_volumes)
    of_slices[8:12, 20:24, 12:22] = 0.8
    in_slices = SimpleNamespace(mean=of_slices, n=1)
    monkeypatch.setattr(finder.slices, "maps", lambda *_: in_slices)
    monkeypatch.setattr(
        finder.classifier, "probabilities", lambda _, places: np.ones((len(places), 1))
    )
    labels, kept = finder.candidates(scan, SimpleNamespace(mean=of_volumes, n=1))
    assert [candidate.score for candidate in kept] == pytest.approx([0.9, 0.9])
    assert np.array_equal(labels > 0, of_volumes > 0)


def test_the_spread_of_a_product():
    assert std_of_product(0.5, 0.0, 0.8, 0.1) == pytest.approx(0.05)
    assert std_of_product(0.5, 0.2, 0.8, 0.0) == pytest.approx(0.16)
    rng = np.random.default_rng(0)
    a, b = rng.normal(0.7, 0.2, 200_000), rng.normal(0.4, 0.3, 200_000)
    assert std_of_product(0.7, 0.2, 0.4, 0.3) == pytest.approx(np.std(a * b), rel=0.02)


def test_padding_never_becomes_a_candidate(make_reduction_run, tmp_path):
    """As many as fill a call, and one more."""
    scan = tiny_scan()
    classifier = CandidateClassifier(make_reduction_run(tmp_path / "run"))
    count = candidates.CANDIDATES_AT_ONCE
    places = [(6, 15 + 2 * i, 20) for i in range(count + 1)]
    found = classifier.probabilities(scan, places)
    assert found.shape == (count + 1, 4)
    np.testing.assert_allclose(
        found[:count], classifier.probabilities(scan, places[:count]), atol=1e-6
    )


def test_it_is_no_network_for_whole_volumes(make_reduction_run, tmp_path):
    run = make_reduction_run(tmp_path / "run")
    with pytest.raises(ValueError, match="judges candidates, not volumes"):
        NoduleFinder(run, None)
