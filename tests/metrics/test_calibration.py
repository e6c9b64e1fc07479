"""Histograms of probabilities and votes, and the temperature that brings them together."""

import numpy as np
import pytest

from metrics import calibration


def drawn(prob, votes):
    return calibration.reliability_counts(prob, votes, bins=calibration.FINE_BINS)


@pytest.fixture
def shares():
    return np.random.default_rng(0).uniform(0.02, 0.98, 20_000)


def sure(shares, temperature):
    """What a network that is too sure of itself says, by its logits."""
    odds = (shares / (1 - shares)) ** temperature
    return odds / (1 + odds)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_the_temperature_of_a_network_is_found(shares, temperature):
    counts = drawn(sure(shares, temperature), shares)
    found = calibration.fit_temperature(counts)
    assert found == pytest.approx(temperature, rel=0.02)
    before = calibration.reliability(calibration.merge_bins(counts)).ece
    after = calibration.reliability(
        calibration.merge_bins(calibration.scale_histogram(counts, found))
    ).ece
    assert after < 0.003
    assert before > 0.03 or temperature == 1


def test_a_temperature_by_hand():
    # The odds of 0.9 are 9; at temperature 2 they are 3.
    np.testing.assert_allclose(
        calibration.scale_probabilities(np.array([0.9, 0.5, 0.1]), 2.0),
        [0.75, 0.5, 0.25],
    )
    assert 0 < calibration.scale_probabilities(np.array([0.0]), 1.0)[0] < 0.001
    assert 0.999 < calibration.scale_probabilities(np.array([1.0]), 1.0)[0] < 1


def test_a_map_that_is_right_has_temperature_1_whatever_lies_below_the_least():
    rng = np.random.default_rng(1)
    logit = np.concatenate([rng.normal(-7, 1, 200_000), rng.normal(0, 2, 20_000)])
    prob = 1 / (1 + np.exp(-logit))
    drawn_by_one = (rng.uniform(size=prob.size) < prob).astype(float)
    counts = calibration.reliability_counts(
        prob, drawn_by_one, bins=calibration.FINE_BINS, least=0.01
    )
    assert calibration.fit_temperature(counts) == pytest.approx(1, abs=0.03)


def test_without_an_inner_optimum_there_is_no_temperature():
    nothing = np.zeros((calibration.FINE_BINS, 3))
    assert calibration.fit_temperature(nothing) is None
    certain = drawn(np.full(50, 0.9), np.ones(50))
    assert calibration.fit_temperature(certain) is None


def test_scaling_moves_voxels_and_keeps_them(shares):
    counts = drawn(sure(shares, 2.0), shares)
    np.testing.assert_array_equal(calibration.scale_histogram(counts, 1.0), counts)
    moved = calibration.scale_histogram(counts, 2.0)
    np.testing.assert_allclose(moved[:, ::2].sum(axis=0), counts[:, ::2].sum(axis=0))
    # Every bin's mean lies within the bin.
    used = moved[:, 0] > 0
    means = moved[used, 1] / moved[used, 0] * calibration.FINE_BINS
    np.testing.assert_allclose(means, np.flatnonzero(used) + 0.5, atol=0.501)


def test_fine_bins_hold_what_coarse_ones_do(shares):
    coarse = calibration.reliability_counts(shares, shares > 0.4, bins=calibration.BINS)
    fine = drawn(shares, shares > 0.4)
    np.testing.assert_allclose(calibration.merge_bins(fine), coarse)


def test_the_error_of_scans_by_hand():
    # One scan says 0.3 where half of the readers drew, the other 0.9 where all did.
    scans = np.stack(
        [
            drawn(np.full(10, 0.3), np.full(10, 0.5)),
            drawn(np.full(30, 0.9), np.ones(30)),
        ]
    )
    found = calibration.ece(scans, np.array(["a", "b"]), draws=200)
    assert found.value == pytest.approx((10 * 0.2 + 30 * 0.1) / 40)
    assert found.low == pytest.approx(0.1)
    assert found.high == pytest.approx(0.2)
