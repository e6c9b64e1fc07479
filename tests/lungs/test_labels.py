"""Lung labels from probabilities, and every reason not to trust them."""

from dataclasses import replace

import cc3d
import numpy as np
import pytest

import config
from ct.scan import LEFT, RIGHT, Scan
from lungs import labels as labels_module
from lungs.checks import expected_dice, judge
from lungs.classical import segment_lungs
from lungs.labels import LungMap, border, labels_from_map, side_of, snap_to_classical
from lungs.sides import body_middle_x, distance_mm

SPACING_MM = (4.0, 2.0, 2.0)
VOXEL_MM3 = 16


@pytest.fixture(scope="module")
def phantom():
    """(scan, labels): a phantom with ribs and spine, thinned to seconds."""
    from phantoms import chest, write

    full = write.to_scan(chest.make_phantom(4))
    thin = (slice(None), slice(None, None, 4), slice(None, None, 4))
    affine = full.grid.affine @ np.diag([1, 4, 4, 1])
    hu = np.ascontiguousarray(full.hu[thin])
    grid = replace(full.grid, shape=hu.shape, affine=affine)
    scan = Scan("phantom", "phantom", hu=hu, grid=grid, source_grid=grid)
    return scan, segment_lungs(hu, scan.spacing_mm, config.LungMask())


def boxes():
    """(40, 100, 100) probability: two lungs of 24 000 and 20 000 voxels."""
    prob = np.full((40, 100, 100), 0.1, np.float32)
    prob[5:35, 30:70, 20:40] = 0.9
    prob[5:30, 30:70, 60:80] = 0.9
    return prob


def judged(scan, labels, prob=None, std=None):
    prob = (labels > 0).astype(np.float32) if prob is None else prob
    std = np.zeros(labels.shape, np.float32) if std is None else std
    return judge(labels, prob, std, scan)


def test_the_right_lung_is_1_and_lies_at_low_x():
    labels = labels_from_map(boxes(), SPACING_MM, LungMap())
    assert (labels[5:35, 30:70, 20:40] == RIGHT).all()
    assert (labels[5:30, 30:70, 60:80] == LEFT).all()
    assert np.bincount(labels.ravel()).tolist() == [356_000, 24_000, 20_000]


def test_a_voxel_at_the_threshold_is_no_lung():
    prob = boxes()
    prob[prob > 0.5] = np.float32(0.55)
    assert not labels_from_map(prob, SPACING_MM, LungMap(thresh=0.55)).any()
    assert labels_from_map(prob, SPACING_MM, LungMap(thresh=0.54)).any()


def test_pieces_below_the_smallest_volume_are_removed():
    prob = boxes()
    prob[0:2, 0:10, 0:10] = 0.9  # 200 voxels
    at, above = (
        labels_from_map(
            prob,
            SPACING_MM,
            LungMap(min_volume_mm3=200 * VOXEL_MM3 + more, min_share=0),
        )
        for more in (0, 1)
    )
    assert (at[0:2, 0:10, 0:10] == RIGHT).all()
    assert not above[0:2, 0:10, 0:10].any()
    assert np.count_nonzero(above) == 44_000


def test_pieces_that_are_small_beside_the_largest_are_removed():
    prob = boxes()  # 24 000 and 20 000 voxels
    prob[36:39, 5:15, 45:60] = 0.9  # 450 voxels: 1.9 % of the largest
    for share, kept in ((0.02, False), (0.018, True)):
        settings = LungMap(min_volume_mm3=0, min_share=share)
        labels = labels_from_map(prob, SPACING_MM, settings)
        assert (labels[37, 10, 50] > 0) == kept
        assert labels[20, 50, 30] == RIGHT


def test_no_more_than_the_most_pieces_are_kept():
    prob = boxes()
    prob[36:39, 30:70, 20:40] = 0.9  # the third largest
    two = labels_from_map(prob, SPACING_MM, LungMap(max_pieces=2))
    three = labels_from_map(prob, SPACING_MM, LungMap(max_pieces=3))
    assert not two[36:].any()
    assert (three[36:39, 30:70, 20:40] == RIGHT).all()


def test_what_a_lung_encloses_is_filled_and_what_is_open_is_not():
    prob = boxes()
    prob[10:14, 40:45, 25:30] = 0.1
    prob[20:24, 40:45, 20:25] = 0.1  # open at the lung's side
    filled = labels_from_map(prob, SPACING_MM, LungMap())
    hollow = labels_from_map(prob, SPACING_MM, LungMap(fill_holes=False))
    assert (filled[10:14, 40:45, 25:30] == RIGHT).all()
    assert not filled[20:24, 40:45, 20:25].any()
    assert not hollow[10:14, 40:45, 25:30].any()


def test_touching_lungs_are_parted():
    prob = boxes()
    prob[15:18, 45:50, 40:60] = 0.9  # a bridge
    labels = labels_from_map(prob, SPACING_MM, LungMap())
    assert (labels[5:35, 30:70, 20:40] == RIGHT).all()
    assert (labels[5:30, 30:70, 60:80] == LEFT).all()
    assert (labels[15:18, 45:50, 40:60] > 0).all()


def test_sides_are_told_whatever_the_lungs_are_dilated_to(phantom):
    scan, labels = phantom
    outside_mm = distance_mm(labels == 0, scan.spacing_mm)
    touching = outside_mm <= 8
    assert cc3d.connected_components(touching, connectivity=6).max() == 1
    middle_x = body_middle_x(scan.hu)
    sides = side_of(touching, scan.spacing_mm, middle_x)
    for side in (RIGHT, LEFT):
        assert (sides[labels == side] == side).mean() > 0.99


@pytest.mark.parametrize(("middle_x", "side"), [(50.0, RIGHT), (10.0, LEFT)])
def test_a_single_lung_is_named_by_the_bodys_middle(middle_x, side):
    prob = boxes()
    prob[:, :, 50:] = 0.1
    labels = labels_from_map(prob, SPACING_MM, LungMap(), middle_x=middle_x)
    assert np.unique(labels).tolist() == [0, side]


def test_the_bodys_middle_is_where_half_of_its_tissue_is():
    hu = np.full((4, 40, 100), -1000, np.int16)
    hu[:, :, 60:90] = 40
    assert body_middle_x(hu) == pytest.approx(74.5, abs=1)
    assert body_middle_x(np.full((4, 40, 100), -1000)) == 49.5


def test_an_empty_map_gives_no_labels():
    prob = np.zeros((10, 20, 20), np.float32)
    assert not labels_from_map(prob, SPACING_MM, LungMap()).any()


def test_the_score_is_the_dice_that_the_probabilities_expect():
    labels = np.zeros((1, 1, 4), np.uint8)
    labels[..., :2] = RIGHT
    mean = np.array([[[1.0, 0.5, 0.5, 0.0]]], np.float32)
    # Twice 1.5 in the mask, over 2 voxels and 2 in all.
    assert expected_dice(labels, mean) == 0.75
    assert expected_dice(labels * 0, mean) == 0


def test_the_lungs_of_a_phantom_are_trusted(phantom):
    scan, labels = phantom
    verdict = judged(scan, labels)
    assert verdict.reasons == ()
    assert verdict.score == 1
    assert verdict.right_ml == pytest.approx(
        (labels == RIGHT).sum() * scan.grid.voxel_mm3 / 1000
    )


def test_a_mask_without_lung_is_not_trusted(phantom):
    scan, labels = phantom
    verdict = judged(scan, labels * 0)
    assert verdict.reasons == ("no lung was found",)
    assert verdict.score == 0


def test_one_lung_is_told(phantom):
    scan, labels = phantom
    (reason,) = judged(scan, np.where(labels == RIGHT, 1, 0).astype(np.uint8)).reasons
    assert reason == "the left lung was not found: only 0 ml were labelled"


def test_a_volume_that_no_lungs_have_is_told(phantom):
    scan, labels = phantom
    small = replace(scan.grid, affine=scan.grid.affine @ np.diag([0.5, 0.5, 0.5, 1]))
    reasons = judged(replace(scan, grid=small), labels).reasons
    assert "expected 0.5 to 12 l" in reasons[0]
    assert any("the field is" in reason for reason in reasons)


@pytest.mark.parametrize(("end", "part"), [("lowest", "bases"), ("highest", "apices")])
def test_lungs_cut_by_the_field_are_told(phantom, end, part):
    scan, labels = phantom
    with_lung = np.flatnonzero(labels.any(axis=(1, 2)))
    middle = (with_lung[0] + with_lung[-1]) // 2
    kept = slice(middle, None) if end == "lowest" else slice(0, middle)
    cut = replace(
        scan, hu=scan.hu[kept], grid=replace(scan.grid, shape=scan.hu[kept].shape)
    )
    reasons = judged(cut, labels[kept]).reasons
    assert reasons[0].startswith(f"the {part} are cut off: ")
    assert reasons[0].endswith(f"cm2 of lung in the {end} slice")


def test_head_and_feet_swapped_is_told(phantom):
    scan, labels = phantom
    upside_down = replace(scan, hu=scan.hu[::-1])
    (reason,) = judged(upside_down, labels[::-1]).reasons
    assert reason.startswith("head and feet look swapped")


def test_without_an_airway_head_and_feet_are_not_told(phantom):
    scan, labels = phantom
    upside_down = replace(scan, hu=scan.hu[::-1].copy())
    # Without an airway it stays open which end is which.
    upside_down.hu[(upside_down.hu < -800) & (labels[::-1] == 0)] = -700
    assert judged(upside_down, labels[::-1]).reasons == ()


def test_front_and_back_swapped_is_told(phantom):
    scan, labels = phantom
    swapped = replace(scan, hu=scan.hu[:, ::-1])
    (reason,) = judged(swapped, labels[:, ::-1]).reasons
    assert reason.startswith("front and back look swapped")


def test_lungs_that_are_not_of_lung_are_told(phantom):
    scan, labels = phantom
    filled = np.where(labels > 0, 30, scan.hu).astype(np.int16)
    right, left = judged(replace(scan, hu=filled), labels).reasons
    assert right == "the median within the right lung is 30 HU; expected -980 to -250"
    assert left == "the median within the left lung is 30 HU; expected -980 to -250"


@pytest.mark.parametrize(("label", "side"), [(RIGHT, "right"), (LEFT, "left")])
def test_a_filled_lung_is_told_whichever_of_the_two_is_larger(phantom, label, side):
    scan, labels = phantom
    filled = np.where(labels == label, 30, scan.hu).astype(np.int16)
    (reason,) = judged(replace(scan, hu=filled), labels).reasons
    assert reason.startswith(f"the median within the {side} lung is 30 HU")


def test_passes_that_disagree_on_the_border_are_told(phantom):
    scan, labels = phantom
    std = np.full(labels.shape, 0.4, np.float32)
    (reason,) = judged(scan, labels, std=std).reasons
    assert reason.startswith(
        "the passes disagree on the border: standard deviation 0.40"
    )


def test_doubtful_probabilities_are_told(phantom):
    scan, labels = phantom
    prob = np.where(labels > 0, np.float32(0.6), np.float32(0))
    (reason,) = judged(scan, labels, prob).reasons
    assert reason == "the probabilities predict a Dice of 0.75; expected 0.9 or more"


def test_slices_far_apart_are_told(phantom):
    scan, labels = phantom
    grid = replace(scan.grid, affine=scan.grid.affine @ np.diag([6, 1, 1, 1]))
    apart = grid.spacing_mm[0]
    thick = replace(scan, hu=scan.hu[::6], grid=replace(grid, shape=scan.hu[::6].shape))
    assert (
        f"the slices are {apart:.3g} mm apart; expected 10 or less"
        in judged(thick, labels[::6]).reasons
    )


def test_the_border_of_a_square_is_its_rim():
    mask = np.zeros((1, 10, 10), bool)
    mask[0, 2:8, 2:8] = True
    assert border(mask).sum() == 36 - 16


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"thresh": 1.0}, "thresh is 1.0; expected between 0 and 1"),
        ({"min_volume_mm3": -1.0}, "min_volume_mm3 is -1.0; expected 0 or more"),
        ({"max_pieces": 0}, "max_pieces is 0; expected 1 or more"),
    ],
)
def test_settings_that_mean_nothing_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        LungMap(**wrong)


def test_a_border_near_the_classical_one_follows_it_and_another_stays():
    shape = (20, 40, 60)
    labels, classical = np.zeros(shape, np.uint8), np.zeros(shape, np.uint8)
    labels[2:18, 5:35, 10:50] = RIGHT
    # To the left the classical border lies 2 voxels further out, to the front 2 further in;
    # to the right it ends 15 voxels before: disease that only the labels know.
    classical[2:18, 7:35, 8:35] = LEFT
    found = snap_to_classical(labels, classical, (1.0, 1.0, 1.0), 3.0)
    expected = labels.copy()
    expected[2:18, 7:35, 8:10] = RIGHT
    # The layer of 2 voxels in front is thin and goes, but the disease reaches a voxel into it.
    expected[2:18, 5:7, 10:33] = 0
    known = np.ones(shape, bool)
    known[:, 5:7, 31:35] = False
    assert np.array_equal(found[known], expected[known])


def test_a_nodule_at_the_pleura_stays_and_a_thin_layer_goes():
    shape = (24, 40, 40)
    z, y, x = np.ogrid[tuple(slice(n) for n in shape)]
    lung = np.zeros(shape, bool)
    lung[2:22, 5:25, 5:35] = True
    nodule = (z - 12) ** 2 + (y - 26) ** 2 + (x - 20) ** 2 <= 6**2
    layer = np.zeros(shape, bool)
    layer[2:22, 25:27, 5:10] = True
    labels = ((lung | nodule | layer) * RIGHT).astype(np.uint8)
    classical = ((lung & ~nodule) * RIGHT).astype(np.uint8)
    found = snap_to_classical(labels, classical, (1.0, 1.0, 1.0), 4.0)
    assert (found[nodule] == RIGHT).mean() > 0.98
    assert not found[layer].any()
    assert not found[~(lung | nodule)].any()


def test_parts_are_thick_if_a_ball_fits_into_them():
    mask = np.zeros((9, 20, 20), bool)
    mask[1:8, 2:9, 2:9] = True
    mask[1:8, 2:4, 9:18] = True
    thick = labels_module.thick_parts(mask, (1.0, 1.0, 1.0), 5.0)
    assert thick[1:8, 2:9, 2:9].mean() > 0.9
    assert not thick[:, :, 11:].any()
    assert not labels_module.thick_parts(mask, (1.0, 1.0, 1.0), 9.0).any()


def test_added_voxels_have_the_side_of_the_nearest_lung():
    labels = np.zeros((6, 12, 40), np.uint8)
    labels[1:5, 2:10, 2:15], labels[1:5, 2:10, 24:38] = RIGHT, LEFT
    classical = np.where(labels, 1, 0).astype(np.uint8)
    classical[1:5, 2:10, 2:17] = classical[1:5, 2:10, 22:38] = 1
    found = snap_to_classical(labels, classical, (1.0, 1.0, 1.0), 3.0)
    assert (found[2, 5, 15:17] == RIGHT).all() and (found[2, 5, 22:24] == LEFT).all()


def test_no_classical_mask_leaves_the_labels_as_they_are():
    labels = np.zeros((5, 9, 9), np.uint8)
    labels[1:4, 2:7, 2:7] = RIGHT
    empty = np.zeros_like(labels)
    found = snap_to_classical(labels, empty, (1.0, 1.0, 1.0), 3.0)
    assert np.array_equal(found, labels)
    assert not snap_to_classical(empty, labels, (1.0, 1.0, 1.0), 3.0).any()
