"""What cannot be lung in a mask: gas, air outside the body, and tissue; and what stays."""

import os
from pathlib import Path

import numpy as np
import pytest

import config
from cohorts import nifti
from ct.scan import LEFT, RIGHT
from lungs.anatomy import outside_body, second_opinion
from lungs.checks import extent, searched_labels
from lungs.classical import segment_lungs

SPACING_MM = (2.0, 2.0, 2.0)
VOXEL_ML = 0.008
AIR, FAT, GAS, LUNG, WATER = -1000, -100, -990, -850, 40
NOISE_HU = 20.0

LUNGS = (slice(50, 110), slice(40, 80))
"""z and y of both lungs."""
SIDES = {RIGHT: slice(20, 55), LEFT: slice(65, 100)}
ABDOMEN_SPOT = (slice(24, 36), slice(50, 62), slice(70, 82))
"""A cube of 24 mm, 13.8 ml, well below the left lung."""

ROOT = Path(__file__).parents[2]
DATA = Path(os.environ.get("LUNG_DATA", ROOT.parent / "shared/data"))


@pytest.fixture
def chest():
    """(hu, labels): an oval body on a table, two lungs with vessels, (120, 120, 120)."""
    z, y, x = np.mgrid[:120, :120, :120]
    hu = np.full(z.shape, AIR, np.int16)
    hu[((y - 60) / 38) ** 2 + ((x - 60) / 52) ** 2 < 1] = WATER
    hu[:, 106:109] = FAT  # the table, 16 mm behind the back
    labels = np.zeros(hu.shape, np.uint8)
    for side, columns in SIDES.items():
        lung = (*LUNGS, columns)
        hu[lung] = LUNG
        labels[lung] = side
    vessels = (labels > 0) & (z % 12 < 2) & (y % 12 < 2)
    hu[vessels] = WATER
    noise = np.random.default_rng(0).normal(0, NOISE_HU, hu.shape)
    return (hu + noise).astype(np.int16), labels


def drawn(hu, labels, place, value, side=LEFT):
    """Draws a value into copies of HU and labels."""
    hu, labels = hu.copy(), labels.copy()
    hu[place] = value
    labels[place] = side
    return hu, labels


def ml(mask):
    return np.count_nonzero(mask) * VOXEL_ML


def test_two_lungs_with_vessels_are_left_alone(chest):
    hu, labels = chest
    opinion = second_opinion(labels, hu, SPACING_MM)
    assert np.array_equal(opinion.labels, labels)
    assert not opinion.doubtful.any() and opinion.parts == ()


def test_a_stomach_of_gas_and_contrast_is_doubted(chest):
    """Its gas lies in small pockets, so it is neither gas nor tissue; but it lies apart."""
    hu, labels = drawn(*chest, ABDOMEN_SPOT, GAS)
    z, y, x = ABDOMEN_SPOT
    hu[z, y, x.start : x.stop : 3] = 300
    hu[z, y.start : y.stop : 3, x] = 300
    opinion = second_opinion(labels, hu, SPACING_MM)
    assert np.array_equal(opinion.labels, labels)
    assert opinion.doubtful[ABDOMEN_SPOT].all()
    assert ml(opinion.doubtful) == pytest.approx(12**3 * VOXEL_ML)
    assert "mask below the lungs may be no lung" in opinion.parts[0].text


def test_a_small_lung_below_all_other_lung_is_doubted(chest):
    """125 ml like lung: large enough for a lung, but a sixth of the others and below them."""
    place = (slice(20, 45), slice(48, 73), slice(68, 93))
    hu, labels = drawn(*chest, place, LUNG)
    opinion = second_opinion(labels, hu, SPACING_MM)
    assert np.array_equal(opinion.labels, labels)
    assert np.array_equal(opinion.doubtful, labels != chest[1])


def test_thin_walls_and_narrow_fields_keep_their_lungs(chest):
    hu, labels = chest
    z, y, x = (slice(40, 116), slice(38, 82), slice(18, 102))
    thin = np.full_like(hu, AIR)
    thin[z, y, x] = hu[z, y, x]  # a wall of 4 mm, which erosion opens
    right = (slice(None), LUNGS[1], SIDES[RIGHT])  # nothing but the lung is in view
    for part_hu, part_labels in ((thin, labels), (hu[right], labels[right])):
        opinion = second_opinion(part_labels, part_hu, SPACING_MM)
        assert np.array_equal(opinion.labels, part_labels)
        assert not opinion.doubtful.any()


def test_gas_below_a_lung_is_left_out_to_the_voxel(chest):
    hu, labels = drawn(*chest, ABDOMEN_SPOT, GAS)
    opinion = second_opinion(labels, hu, SPACING_MM)
    assert np.array_equal(opinion.labels, chest[1])
    (part,) = opinion.parts
    assert part.removed and part.ml == pytest.approx(12**3 * VOXEL_ML)
    assert part.text == "14 ml of gas below the lungs were left out"


def test_nothing_is_left_out_unless_asked_but_it_is_doubted(chest):
    hu, labels = drawn(*chest, ABDOMEN_SPOT, GAS)
    opinion = second_opinion(labels, hu, SPACING_MM, remove=False)
    assert np.array_equal(opinion.labels, labels)
    assert ml(opinion.doubtful) == pytest.approx(12**3 * VOXEL_ML)
    assert opinion.parts[0].text == "14 ml of gas below the lungs may be no lung"


def test_gas_that_hangs_on_a_lung_stays(chest):
    """As a bulla does, whose wall is thinner than a voxel."""
    place = (slice(38, 50), slice(50, 62), slice(70, 82))
    hu, labels = drawn(*chest, place, GAS)
    opinion = second_opinion(labels, hu, SPACING_MM)
    assert np.array_equal(opinion.labels, labels) and not opinion.doubtful.any()


def test_gas_under_the_diaphragm_is_told_by_the_sheet_between(chest):
    place = (slice(36, 48), slice(50, 62), slice(70, 82))  # 4 mm below the lung
    hu, labels = drawn(*chest, place, GAS)
    opinion = second_opinion(labels, hu, SPACING_MM)
    assert np.array_equal(opinion.labels, chest[1])


def test_a_cavity_in_dense_lung_is_doubted_and_stays(chest):
    hu, labels = chest
    place = (slice(20, 50), slice(44, 68), slice(66, 96))
    hu, labels = drawn(hu, labels, place, WATER)
    hu, labels = drawn(hu, labels, ABDOMEN_SPOT, GAS)
    opinion = second_opinion(labels, hu, SPACING_MM)
    assert np.array_equal(opinion.labels, labels)
    assert opinion.doubtful[ABDOMEN_SPOT].all()


def test_an_island_of_lung_above_a_lung_stays(chest):
    hu, labels = chest
    hu[100:103] = WATER  # the lung is cut through near the apex
    opinion = second_opinion(labels, hu, SPACING_MM)
    assert np.array_equal(opinion.labels, labels)
    assert not opinion.doubtful[103:].any()


def test_aerated_tissue_below_the_lungs_is_doubted(chest):
    hu, labels = drawn(*chest, ABDOMEN_SPOT, -700)
    opinion = second_opinion(labels, hu, SPACING_MM)
    assert np.array_equal(opinion.labels, labels)
    assert opinion.doubtful[ABDOMEN_SPOT].all()
    assert [part.text for part in opinion.parts] == [
        "14 ml of mask below the lungs may be no lung"
    ]


def test_air_between_back_and_table_is_left_out(chest):
    place = (slice(50, 90), slice(99, 106), slice(40, 80))
    hu, labels = drawn(*chest, place, AIR)
    opinion = second_opinion(labels, hu, SPACING_MM)
    assert np.array_equal(opinion.labels, chest[1])
    (part,) = opinion.parts
    assert part.text == "90 ml of air outside the body were left out"


def test_an_organ_is_doubted_and_an_effusion_is_not(chest):
    organ = (slice(8, 40), slice(44, 76), slice(24, 56))
    hu, labels = drawn(*chest, organ, WATER, RIGHT)
    opinion = second_opinion(labels, hu, SPACING_MM)
    assert np.array_equal(opinion.labels, labels)
    assert ml(opinion.doubtful) == pytest.approx(32**3 * VOXEL_ML, rel=0.05)
    assert not (opinion.doubtful & (chest[1] > 0)).any()
    effusion = (slice(50, 80), slice(40, 80), SIDES[RIGHT])
    hu, labels = drawn(*chest, effusion, WATER, RIGHT)
    assert not second_opinion(labels, hu, SPACING_MM).doubtful.any()


def test_without_an_aerated_lung_gas_is_left_out_and_tissue_is_doubted(chest):
    hu, labels = chest
    hu = np.where(labels > 0, np.int16(WATER), hu)
    opinion = second_opinion(labels, hu, SPACING_MM)
    assert np.array_equal(opinion.doubtful, labels > 0)
    hu = np.where(labels == LEFT, np.int16(GAS), hu)
    opinion = second_opinion(labels, hu, SPACING_MM)
    assert np.array_equal(opinion.labels, np.where(labels == LEFT, 0, labels))
    assert not second_opinion(np.zeros_like(labels), hu, SPACING_MM).parts


def test_a_finer_grid_gives_the_same_volume(chest):
    hu, labels = drawn(*chest, ABDOMEN_SPOT, GAS)
    hu, labels = (np.repeat(volume, 2, axis=2) for volume in (hu, labels))
    opinion = second_opinion(labels, hu, (2.0, 2.0, 1.0))
    assert opinion.parts[0].ml == pytest.approx(12**3 * VOXEL_ML)
    assert not opinion.labels[24:36, 50:62, 140:164].any()


def test_outside_is_what_the_body_does_not_enclose(chest):
    outside = outside_body(chest[0].astype(np.float32))
    assert outside[:, 0].all() and outside[:, 101:106, 60].all()
    assert not outside[chest[1] > 0].any()


def test_slices_at_a_cut_end_and_doubtful_parts_are_not_searched(chest):
    hu, labels = chest
    scan = nifti.scan_of_array(hu, SPACING_MM)
    doubtful = np.zeros(labels.shape, bool)
    doubtful[70] = True
    searched = searched_labels(labels, doubtful, scan)
    assert not searched[70].any()
    assert np.array_equal(np.delete(searched, 70, 0), np.delete(labels, 70, 0))
    assert extent(labels, searched) == "partly"
    cut = searched_labels(
        labels[:100], doubtful[:100] & False, nifti.scan_of_array(hu[:100], SPACING_MM)
    )
    assert not cut[98:].any() and cut[97].any()  # 3 mm are two slices of 2 mm
    whole = searched_labels(labels, doubtful & False, scan)
    assert extent(labels, whole) == "yes"


@pytest.mark.parametrize("spoil", ["small", "filled", "upright"])
def test_what_is_no_pair_of_lungs_is_not_searched(chest, spoil):
    hu, labels = chest
    if spoil == "small":
        labels = np.where(np.arange(120)[:, None, None] < 70, labels, 0).astype(
            np.uint8
        )
    if spoil == "filled":
        hu = np.where(labels > 0, np.int16(WATER), hu)
    if spoil == "upright":
        hu[:, 26:30, 56:64] = 1000  # the spine in front of the lungs
    scan = nifti.scan_of_array(hu, SPACING_MM)
    searched = searched_labels(labels, np.zeros(labels.shape, bool), scan)
    assert extent(labels, searched) == "no"


@pytest.mark.parametrize(
    "name", ["Lung-PET-CT-Dx/Lung_Dx-A0002.nii.gz", "CIP/ct-64.nrrd"]
)
def test_lungs_of_real_scans_stay_whole(name):
    if not (DATA / name).exists():
        pytest.skip(f"{name} is not in ../shared/data")
    scan = nifti.load_scan(nifti.find_scans(DATA / name)[0])
    labels = segment_lungs(scan.hu, scan.spacing_mm, config.LungMask())
    opinion = second_opinion(labels, scan.hu, scan.spacing_mm)
    assert np.array_equal(opinion.labels, labels)
