"""The picture of a scan: what is outlined where, and that it says what it is."""

import itertools
from dataclasses import replace

import numpy as np
import pytest

from nodules.measures import measure_nodules
from results import overview
from tests.conftest import tiny_scan


def measured(scan, labels):
    chances = np.full((int(labels.max()), 2), 0.9)
    return measure_nodules(labels, chances, scan.grid, lung=scan.lung, hu=scan.hu)


def drawn(scan, labels):
    return overview.draw(scan, scan.lung, labels, measured(scan, labels))


def pixels_of(picture, colour):
    return int((picture == colour).all(-1).sum())


def test_lungs_and_nodules_are_outlined_each_in_its_colour():
    scan = tiny_scan()
    picture = drawn(scan, scan.nodule_labels)
    for colour in (overview.RIGHT_BGR, overview.LEFT_BGR, overview.NODULE_BGR):
        assert pixels_of(picture, colour) > 100
    tile = overview.SIDE_PX + overview.CAPTION_PX
    assert picture.shape == (2 * overview.CAPTION_PX + tile, 4 * overview.SIDE_PX, 3)
    # The right lung is on the left, as when one faces the patient.
    front = picture[: overview.SIDE_PX, : overview.SIDE_PX]
    right, left = (
        np.argwhere((front == colour).all(-1))[:, 1].mean()
        for colour in (overview.RIGHT_BGR, overview.LEFT_BGR)
    )
    assert right < left


def test_the_head_is_up():
    scan = tiny_scan()
    labels = np.zeros_like(scan.nodule_labels)
    labels[18:20, 30:34, 16:20] = 1
    front = drawn(scan, labels)[2 * overview.CAPTION_PX :, : overview.SIDE_PX]
    rows = np.argwhere((front == overview.NODULE_BGR).all(-1))[:, 0]
    assert rows.max() < overview.SIDE_PX / 2


def test_both_planes_show_nodules_that_lie_elsewhere():
    scan = tiny_scan()
    labels = np.zeros_like(scan.nodule_labels)
    labels[18:20, 30:34, 16:20] = 1
    assert not labels[(scan.lung > 0).sum(axis=(1, 2)).argmax()].any()
    for draw_plane in (overview.from_the_front, overview.from_below):
        assert pixels_of(draw_plane(scan, scan.lung, labels), overview.NODULE_BGR) > 20


def test_numbers_stand_beside_outlines_and_the_best_nodule_is_in_front(monkeypatch):
    scan = tiny_scan()
    labels = np.zeros_like(scan.nodule_labels)
    labels[6:8, 26:38, 12:24] = 2  # the same from below, and around it
    labels[14:16, 30:34, 16:20] = 1
    labels[10, 62:64, 62:64] = 3
    for axis, shape in ((0, labels.shape[1:]), (1, labels.shape[::2])):
        seen = overview.foremost(labels, axis)
        assert seen.shape == shape
        assert {*np.unique(seen)} == {0, 1, 2, 3}
    written = []

    def write_text(picture, text, place, colour):
        if colour == overview.NODULE_BGR:
            height, width = picture.shape[:2]
            assert 0 <= place[0] < width - 8
            assert 8 <= place[1] < height
            written.append(text)
        own(picture, text, place, colour)

    own = overview.write_text
    monkeypatch.setattr(overview, "write_text", write_text)
    overview.from_below(scan, scan.lung, labels)
    assert written == ["1", "2"]  # the third lies beyond what is shown
    everywhere = np.full_like(scan.lung, 1)
    before = overview.from_below(scan, everywhere, labels)
    assert written[2:] == ["1", "2", "3"]
    assert pixels_of(before, overview.NODULE_BGR) > 60


def test_numbers_of_nodules_that_lie_together_do_not_cover_each_other():
    width, height = overview.NUMBER_PX
    taken = []
    places = [(50, 80), (52, 82), (50, 71), (49, 90), (50 + width, 80), (9, 80)]
    for wanted in [*places, (9, 12), (9, 12), (9, 13)]:
        taken.append(overview.free_place(wanted, taken, 100))
        assert height <= taken[-1][1] < 100
    assert taken[0] == (50, 80)
    assert taken[4:7] == [(50 + width, 80), (9, 80), (9, 12)]
    for first, second in itertools.combinations(taken, 2):
        apart = np.abs(np.subtract(first, second))
        assert apart[0] >= width or apart[1] >= height


@pytest.mark.parametrize("lungs", [True, False])
def test_without_nodules_or_lungs_there_is_still_a_picture(lungs):
    scan = tiny_scan()
    if not lungs:
        scan = replace(scan, lung=np.zeros_like(scan.lung))
    picture = drawn(scan, np.zeros_like(scan.nodule_labels))
    assert picture.shape[1] == 2 * overview.SIDE_PX
    assert pixels_of(picture, overview.NODULE_BGR) == 0


def test_more_nodules_than_fit_are_counted_and_the_first_are_shown():
    scan = tiny_scan()
    labels = np.zeros_like(scan.nodule_labels)
    for number in range(1, 16):
        labels[10, 20 + 2 * number, 20] = number
    picture = drawn(scan, labels)
    tile = overview.SIDE_PX + overview.CAPTION_PX
    assert picture.shape[0] == 2 * overview.CAPTION_PX + 3 * tile
    first = overview.draw(
        scan, scan.lung, labels, measured(scan, labels)[: overview.MOST_NODULES]
    )
    np.testing.assert_array_equal(
        picture[2 * overview.CAPTION_PX :], first[2 * overview.CAPTION_PX :]
    )
    last = overview.draw(scan, scan.lung, labels, measured(scan, labels)[-10:])
    assert (picture != last)[2 * overview.CAPTION_PX :].any()


def test_a_warning_stands_on_the_picture_in_red():
    scan = tiny_scan()
    labels = np.zeros_like(scan.nodule_labels)
    plain = overview.draw(scan, scan.lung, labels, [])
    warned = overview.draw(scan, scan.lung, labels, [], warning="no left lung")
    assert len(warned) == len(plain) + overview.CAPTION_PX
    strip = warned[2 * overview.CAPTION_PX : 3 * overview.CAPTION_PX].astype(int)
    assert (strip[..., 2] > strip[..., 0] + 50).any()
