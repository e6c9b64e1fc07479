"""FROC: each rule of LUNA16 on a case made by hand, and the curve against scikit-learn."""

import numpy as np
import pytest
from sklearn.metrics import roc_curve

from metrics.froc import RATES, Events, froc, mark


def rows(*values):
    return np.array(values, float).reshape(-1, 4)


NODULE = {"a": rows((0, 0, 0, 10))}
"""Radius 5 mm."""


def counts(marks):
    return (
        int(np.isfinite(marks.nodule_score).sum()),
        len(marks.false_score),
    )


@pytest.mark.parametrize(
    ("x_mm", "hit"), [(0, True), (4.999, True), (5.0, False), (5.001, False)]
)
def test_a_hit_lies_nearer_than_the_radius(x_mm, hit):
    marks = mark(["a"], {"a": rows((x_mm, 0, 0, 0.5))}, NODULE)
    assert counts(marks) == ((1, 0) if hit else (0, 1))


def test_of_two_hits_the_better_counts_and_the_other_is_ignored():
    marks = mark(["a"], {"a": rows((1, 0, 0, 0.3), (0, 1, 0, 0.8))}, NODULE)
    assert counts(marks) == (1, 0)
    assert marks.nodule_score.tolist() == [0.8]


def test_a_candidate_on_an_irrelevant_finding_is_ignored():
    irrelevant = {"a": rows((50, 0, 0, 6))}
    found = {"a": rows((51, 0, 0, 0.9), (54, 0, 0, 0.7))}
    assert counts(mark(["a"], found, NODULE, irrelevant)) == (0, 1)


def test_a_candidate_on_a_nodule_and_an_irrelevant_finding_is_a_hit():
    irrelevant = {"a": rows((2, 0, 0, 6))}
    marks = mark(["a"], {"a": rows((1, 0, 0, 0.9))}, NODULE, irrelevant)
    assert counts(marks) == (1, 0)


def test_one_candidate_may_hit_two_nodules():
    nodules = {"a": rows((0, 0, 0, 10), (4, 0, 0, 10))}
    marks = mark(["a"], {"a": rows((2, 0, 0, 0.6))}, nodules)
    assert counts(marks) == (2, 0)
    assert marks.nodule_score.tolist() == [0.6, 0.6]


def test_scans_without_candidates_count():
    found = {"a": rows((0, 0, 0, 0.9), (90, 0, 0, 0.4))}
    curve = froc(mark(["a", "b"], found, {**NODULE, "b": rows((0, 0, 0, 4))}), draws=0)
    # Above 0.4: one of two nodules; from 0.4 on half a false positive per scan.
    assert curve.fp_per_scan.tolist() == [0, 0, 0.5]
    assert curve.sensitivity.tolist() == [0, 0.5, 0.5]
    assert [i.value for i in curve.at_rates] == [0.5] * 7
    assert curve.cpm.value == 0.5 and np.isnan(curve.cpm.low)


def test_sensitivities_between_two_points_are_interpolated():
    found = {
        "a": rows((0, 0, 0, 0.9), (80, 0, 0, 0.8), (90, 0, 0, 0.3), (0, 30, 0, 0.3))
    }
    nodules = {"a": rows((0, 0, 0, 10), (0, 30, 0, 10))}
    curve = froc(mark(["a"], found, nodules), draws=0)
    # Points (0, 0), (0, 1/2), (1, 1/2), and, of equal score, (2, 1).
    assert curve.fp_per_scan.tolist() == [0, 0, 1, 2]
    assert curve.sensitivity.tolist() == [0, 0.5, 0.5, 1]
    values = dict(zip(RATES, (i.value for i in curve.at_rates), strict=True))
    assert (values[1 / 8], values[1], values[2], values[8]) == (0.5, 0.5, 1, 1)


def random_marks(seed, scans=40):
    rng = np.random.default_rng(seed)
    ids = [f"s{number}" for number in range(scans)]
    nodules = {
        scan_id: np.column_stack(
            (rng.uniform(0, 200, (2, 3)), rng.uniform(4, 20, (2, 1)))
        )
        for scan_id in ids[::2]
    }
    found = {}
    for scan_id in ids:
        false = np.column_stack((rng.uniform(300, 500, (9, 3)), rng.random(9)))
        hits = nodules.get(scan_id, np.zeros((0, 4)))[:1].copy()
        hits[:, 3] = rng.random(len(hits)) ** 0.5
        found[scan_id] = np.concatenate((false, hits))
    return mark(ids, found, nodules)


def test_the_curve_is_that_of_an_independent_roc():
    marks = random_marks(1)
    hit = np.isfinite(marks.nodule_score)
    truth = np.concatenate((np.ones(hit.sum()), np.zeros(len(marks.false_score))))
    scores = np.concatenate((marks.nodule_score[hit], marks.false_score))
    fpr, tpr, _ = roc_curve(truth, scores, drop_intermediate=False)
    curve = froc(marks, draws=0)
    assert np.allclose(curve.fp_per_scan, fpr * len(marks.false_score) / 40)
    assert np.allclose(curve.sensitivity, tpr * hit.sum() / len(hit))


def test_a_draw_is_the_curve_of_the_scans_that_were_drawn():
    marks = random_marks(2, scans=4)
    times = np.array([2, 0, 1, 1])
    fp_per_scan, sensitivity = Events.of(marks).curve(times)
    scans = np.repeat(np.arange(4), times)
    nodules = np.concatenate(
        [marks.nodule_score[marks.nodule_scan == s] for s in scans]
    )
    false = np.concatenate([marks.false_score[marks.false_scan == s] for s in scans])
    for threshold in (0.2, 0.5, 0.9):
        known = (
            np.count_nonzero(false >= threshold) / 4,
            np.count_nonzero(nodules >= threshold) / len(nodules),
        )
        points = np.column_stack((fp_per_scan, sensitivity))
        assert np.isclose(points, known).all(axis=1).any()


def test_intervals_hold_the_value_and_follow_the_seed():
    marks = random_marks(3)
    one, same, other = (froc(marks, draws=200, seed=seed) for seed in (0, 0, 1))
    assert one.cpm.low < one.cpm.value < one.cpm.high
    assert one.cpm == same.cpm and one.cpm != other.cpm
    patients = [f"p{number // 2}" for number in range(40)]
    assert froc(marks, patients, draws=200).cpm != one.cpm


@pytest.mark.parametrize(
    ("candidates", "nodules", "message"),
    [
        ({"x": rows((0, 0, 0, 1))}, NODULE, "candidates of 1 scans.* first x"),
        ({"a": rows((0, 0, 0, np.nan))}, NODULE, "candidates of a hold NaN"),
        ({"a": rows((0, 0, 0, 1), (0, 0, 0, 1))}, NODULE, "one candidate twice"),
        ({"a": np.zeros((1, 3))}, NODULE, r"shape \(1, 3\)"),
        ({}, {"a": rows((0, 0, 0, 0))}, "nodules of a have a diameter of 0"),
        ({}, {"b": rows((0, 0, 0, 5))}, "nodules of 1 scans"),
    ],
)
def test_findings_that_cannot_be_used_are_named(candidates, nodules, message):
    with pytest.raises(ValueError, match=message):
        mark(["a"], candidates, nodules)


def test_a_scan_that_stands_twice_and_no_nodule_at_all_are_refused():
    with pytest.raises(ValueError, match="1 scan ids are listed twice"):
        mark(["a", "a"], {}, NODULE)
    with pytest.raises(ValueError, match="no nodule"):
        froc(mark(["a"], {}, {}))


def test_one_patient_with_nodules_has_no_interval():
    found = {"a": rows((0, 0, 0, 0.9)), "b": rows((90, 0, 0, 0.4))}
    marks = mark(["a", "b"], found, NODULE)
    curve = froc(marks, ["p", "q"], draws=50)
    assert curve.cpm.value == 1
    assert np.isnan([curve.cpm.low, *(rate.high for rate in curve.at_rates)]).all()
    both = mark(["a", "b"], found, {**NODULE, "b": rows((0, 0, 0, 4))})
    assert np.isnan(froc(both, ["p", "p"], draws=50).cpm.low)
    assert froc(both, ["p", "q"], draws=50).cpm.low < 1
