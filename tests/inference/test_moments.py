"""Moments of passes against NumPy, and the rule that says when there are enough."""

import numpy as np
import pytest

from inference.moments import RunningMoments, entropy, expected_dice_error


def moments_of(passes):
    moments = RunningMoments(passes.shape[1:])
    for prob in passes:
        moments.add(prob)
    return moments


def test_mean_and_standard_deviation_are_numpys():
    passes = np.random.default_rng(0).random((50, 3, 4, 5), np.float32)
    moments = moments_of(passes)
    assert moments.n == 50
    assert np.allclose(moments.mean, passes.mean(axis=0), atol=1e-6)
    assert np.allclose(moments.std, passes.std(axis=0), atol=1e-6)


@pytest.mark.parametrize("n", [0, 1])
def test_before_the_second_pass_nothing_is_known_of_their_spread(n):
    moments = moments_of(np.full((n, 2, 3), 0.3, np.float32))
    assert (moments.mean == np.float32(0.3 if n else 0)).all()
    for values in (moments.std, moments.mutual_information):
        assert values.shape == (2, 3)
        assert not values.any()


def test_the_standard_deviation_is_right_for_values_that_hardly_differ():
    # Sums of squares would lose all digits here.
    passes = 0.9 + 1e-5 * np.random.default_rng(0).random((100, 20), np.float32)
    assert np.allclose(moments_of(passes).std, passes.std(axis=0), rtol=0.05)


def test_entropy_of_a_half_is_log_2_and_of_certainty_nearly_0():
    found = entropy(np.array([0, 0.25, 0.5, 1], np.float32))
    quarter = -(0.25 * np.log(0.25) + 0.75 * np.log(0.75))
    assert found == pytest.approx([0, quarter, np.log(2), 0], abs=1e-5)


def test_mutual_information_tells_disagreement_from_doubt():
    doubt = np.full((10, 1), 0.5, np.float32)  # every pass is unsure: nothing to learn
    disagreement = np.array([[0.0], [1.0]] * 5, np.float32)
    assert moments_of(doubt).mutual_information == pytest.approx(0, abs=1e-6)
    assert moments_of(disagreement).mutual_information == pytest.approx(
        np.log(2), abs=1e-4
    )


def test_the_expected_error_is_that_of_the_normal_distribution():
    # Two passes 0.6 and 0.8: mean 0.7, sd 0.1414, standard error 0.1. A threshold of 0.6
    # lies one standard error below: wrong with probability 0.1587, of 2 voxels.
    moments = moments_of(np.array([[0.6], [0.8]], np.float32))
    assert expected_dice_error(moments, 0.6) == pytest.approx(0.158655 / 2, abs=1e-5)


def test_passes_that_agree_leave_no_error_and_one_pass_says_nothing():
    passes = np.array([[0.9, 0.1]] * 3, np.float32)
    assert expected_dice_error(moments_of(passes[:1]), 0.5) == 1
    assert expected_dice_error(moments_of(passes), 0.5) == 0


def test_the_expected_error_foretells_the_true_one():
    """Of many noisy masks, the mean Dice against the endless mean's mask."""
    rng = np.random.default_rng(1)
    truth = rng.random(20_000).astype(np.float32)
    errors, expected = [], []
    for _ in range(20):
        noise = rng.normal(0, 0.2, (16, truth.size)).astype(np.float32)
        moments = moments_of(truth + noise)
        found, wanted = moments.mean > 0.5, truth > 0.5
        errors.append(1 - 2 * (found & wanted).sum() / (found.sum() + wanted.sum()))
        expected.append(expected_dice_error(moments, 0.5))
    assert np.mean(expected) == pytest.approx(np.mean(errors), rel=0.35)
