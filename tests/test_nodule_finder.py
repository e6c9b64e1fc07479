"""Nodules of whole scans: outlines around what was found, and who is loaded for it."""

import json
from dataclasses import replace

import numpy as np
import pytest

import boxes
import config
import nodule_finder
from nodule_finder import NoduleFinder, outlined
from scan import ScanError
from tests.conftest import tiny_scan


class Discs:
    """Outlines everything brighter than soft tissue's edge in a patch, as a network would."""

    threshold = 0.5

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
        box = boxes.near(centre, [reach] * 3, (1, 1, 1), boxes.whole(hu.shape))
        labels[box][hu[box] > -300] = number
    return labels


def test_outlines_grow_to_what_the_seeded_network_sees_in_the_slices_found():
    hu = lung_with(((6, 70, 80), 5))
    labels = found_in(hu, ((6, 70, 80), 1))
    seeded = Discs()
    result = outlined(hu, labels, seeded)
    assert seeded.patches.shape == (3, nodule_finder.PATCH_PX, nodule_finder.PATCH_PX)
    # The nodule lies in the middle of each patch.
    assert (seeded.patches[:, 64, 64] == 40).all()
    np.testing.assert_array_equal(result[5:8] > 0, hu[5:8] > -300)
    assert not result[:5].any()
    assert not result[8:].any()


def test_what_is_outlined_elsewhere_in_a_patch_does_not_count():
    hu = lung_with(((6, 70, 80), 5), ((6, 70, 105), 6))
    labels = found_in(hu, ((6, 70, 80), 5))
    result = outlined(hu, labels, Discs())
    alone = lung_with(((6, 70, 80), 5))
    np.testing.assert_array_equal(result > 0, (alone > -300) & (labels > 0))


def test_where_nothing_is_outlined_what_was_found_stays():
    hu = lung_with(((6, 70, 80), 5))
    labels = np.zeros(hu.shape, np.uint8)
    labels[2, 20:24, 30:36] = 1
    np.testing.assert_array_equal(outlined(hu, labels, Discs()), labels)


def test_of_two_nodules_that_share_an_outline_both_keep_voxels():
    hu = lung_with(((6, 70, 80), 8))
    labels = np.zeros(hu.shape, np.uint8)
    labels[6, 68:70, 78:80] = 1
    labels[6, 72:74, 82:84] = 2
    result = outlined(hu, labels, Discs())
    assert set(np.unique(result)) == {0, 1, 2}
    assert (result[labels == 2] == 2).all()
    assert ((result > 0)[6] == (hu[6] > -300)).all()


@pytest.mark.parametrize("corner", [(0, 0, 0), (11, 149, 159)])
def test_nodules_at_the_border_of_the_field_are_outlined_too(corner):
    hu = lung_with((corner, 5))
    labels = found_in(hu, (corner, 2))
    result = outlined(hu, labels, Discs())
    slices = np.flatnonzero(labels.any((1, 2)))
    np.testing.assert_array_equal(result[slices] > 0, hu[slices] > -300)


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


def test_what_was_tuned_counts(make_nodule_run, tmp_path):
    run = make_nodule_run(tmp_path / "nodules")
    settings = config.Postprocess(threshold=0.3, min_volume_mm3=65.0)
    record = {"settings": config.to_json(settings), "origin": "by hand"}
    (run / "postprocess.json").write_text(json.dumps(record))
    assert NoduleFinder(run, None).settings == settings
