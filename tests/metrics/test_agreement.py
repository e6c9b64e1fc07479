"""Dice between outlines of readers and a prediction, by hand."""

import numpy as np
import pytest

from metrics import agreement


def bits_of(*masks):
    """The bits of readers given as lists of 0 and 1."""
    return sum(
        np.array(mask, np.uint8) << reader for reader, mask in enumerate(masks)
    ).astype(np.uint8)


FOUR = bits_of(
    [1, 1, 1, 1, 0, 0],
    [1, 1, 1, 0, 0, 0],
    [1, 1, 0, 0, 0, 0],
    [1, 1, 1, 1, 1, 0],
)
"""Votes: 4 4 3 2 1 0."""


def test_four_readers_by_hand():
    predicted = np.array([1, 1, 1, 0, 0, 0], bool)
    found = agreement.agreement(FOUR, predicted)
    # Consensus: 2 or more votes, the first four pixels.
    assert found.consensus == pytest.approx(2 * 3 / (4 + 3))
    assert found.reader_consensus == pytest.approx(
        np.mean([1, 2 * 3 / 7, 2 * 2 / 6, 2 * 4 / 9])
    )
    # Majority of three others: 2 or more votes. Without the first, votes are 3 3 2 1 1 0,
    # so three pixels; without the second 3 3 2 2 1 0, four; the third 3 3 3 2 1 0, four;
    # the fourth 3 3 2 1 0 0, three.
    assert found.others == pytest.approx(np.mean([1, 6 / 7, 6 / 7, 1]))
    assert found.reader_others == pytest.approx(
        np.mean([2 * 3 / 7, 2 * 3 / 7, 2 * 2 / 6, 2 * 3 / 8])
    )
    assert found.readers == pytest.approx(np.mean([6 / 7, 1, 4 / 5, 6 / 8]))
    pairs = [6 / 7, 4 / 6, 8 / 9, 4 / 5, 6 / 8, 4 / 7]
    assert found.reader_reader == pytest.approx(np.mean(pairs))


def test_of_three_readers_one_other_is_a_majority_of_two():
    bits = bits_of([1, 0, 0], [0, 1, 0], [0, 0, 1])
    found = agreement.agreement(bits, np.array([1, 1, 1], bool))
    # Two of three make a consensus: nowhere. One of two others: the other two pixels.
    assert found.consensus == 0
    assert found.others == pytest.approx(2 * 2 / (2 + 3))


def test_one_reader_has_nobody_to_agree_with():
    found = agreement.agreement(bits_of([0, 1, 1]), np.array([0, 1, 0], bool))
    assert found.consensus == found.readers == pytest.approx(2 / 3)
    assert found.reader_consensus == 1
    assert np.isnan([found.others, found.reader_others, found.reader_reader]).all()


def test_a_reader_who_drew_on_another_slice_only_is_a_reader():
    bits = np.stack([bits_of([1, 1], [0, 0]), bits_of([0, 0], [1, 0])])
    assert len(agreement.reader_masks(bits)) == 2
    # One of two is half: both slices count.
    predicted = np.array([[1, 1], [1, 0]], bool)
    assert agreement.agreement(bits, predicted).consensus == 1


@pytest.mark.parametrize(("readers", "votes"), [(4, 2), (3, 2), (2, 1), (1, 1), (0, 1)])
def test_votes_that_make_half(readers, votes):
    assert agreement.majority_votes(readers) == votes


def test_two_readers_by_hand():
    bits = bits_of([1, 1, 0, 0], [0, 1, 1, 0])
    found = agreement.agreement(bits, np.array([1, 1, 1, 0], bool))
    # One of two is half, so the consensus is all three pixels that anyone drew.
    assert found.consensus == 1
    assert found.reader_consensus == pytest.approx(2 * 2 / (3 + 2))
    # The only other reader is the majority of the others.
    assert found.others == found.readers == pytest.approx(2 * 2 / (2 + 3))
    assert found.reader_others == found.reader_reader == 2 * 1 / (2 + 2)


def test_two_readers_of_one_pixel():
    found = agreement.agreement(bits_of([1, 0], [1, 0]), np.array([1, 1], bool))
    assert found.consensus == found.others == found.readers == 2 / 3
    assert found.reader_consensus == found.reader_others == found.reader_reader == 1


def test_two_readers_who_drew_one_pixel_each_apart():
    found = agreement.agreement(bits_of([1, 0], [0, 1]), np.array([1, 0], bool))
    assert found.consensus == found.reader_consensus == 2 / 3
    assert found.others == found.readers == 1 / 2  # one reader's pixel, not the other's
    assert found.reader_others == found.reader_reader == 0
