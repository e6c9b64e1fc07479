"""Scores of single nodules, of one or few voxels, by hand."""

import numpy as np
import pytest

from ct.scan import Annotation, Nodule, Scan
from metrics import nodule_scores, overlap
from tests.conftest import canonical_grid

SHAPE = (12, 12, 12)
SPACING_MM = (2.0, 2.0, 2.0)
PLACE = (6, 6, 4)
BESIDE = (6, 6, 5)


def scan_of(drawn, *, ratings=(), lung=None, whole=True):
    """A scan with a nodule per list of drawings: (reader, voxels) pairs."""
    bits, labels = np.zeros(SHAPE, np.uint8), np.zeros(SHAPE, np.uint8)
    nodules = []
    for label, drawings in enumerate(drawn, start=1):
        for reader, voxels in drawings:
            for voxel in voxels:
                bits[voxel] |= 1 << reader
                labels[voxel] = label
        annotations = tuple(
            Annotation(reader, 8.0, 2.0, dict(ratings[n]) if ratings else {})
            for n, (reader, _) in enumerate(drawings)
        )
        nodules.append(Nodule(label, (0.0, 0.0, 0.0), annotations))
    grid = canonical_grid(SHAPE, SPACING_MM)
    return Scan(
        "s",
        "p",
        np.zeros(SHAPE, np.int16),
        grid,
        grid,
        lung=lung,
        reader_bits=bits,
        nodule_labels=labels,
        nodules=tuple(nodules),
        whole=whole,
    )


def rows_of(scan, predicted, *, level=0.5, min_readers=1):
    """The rows of a prediction given as voxels of each component."""
    from ct.scan import reference_mask

    labels = np.zeros(SHAPE, np.uint8)
    for component, voxels in enumerate(predicted, start=1):
        for voxel in voxels:
            labels[voxel] = component
    reference = reference_mask(scan, consensus_level=level, min_readers=min_readers)
    nodules = nodule_scores.nodules_that_count(scan, min_readers)
    labels_ref = nodule_scores.reference_labels(scan, reference, nodules)
    match = overlap.match_nodules(labels_ref, labels, scan.reader_bits > 0)
    return nodule_scores.nodule_rows(
        scan, nodules, labels_ref, labels, match, tolerance_mm=1.0
    )


ONE_VOXEL = [(0, [PLACE]), (1, [PLACE])]
"""Two readers drew the same voxel."""


def test_one_voxel_found_exactly():
    (row,) = rows_of(scan_of([ONE_VOXEL]), [[PLACE]])
    assert (row["hit"], row["readers"]) == (1, 2)
    names = [name for name in row if name.startswith(("dice", "iou", "surface"))]
    assert {"dice_others", "dice_reader_others", "dice_reader_reader"} < set(names)
    assert [row[name] for name in names] == [1] * len(names)


def test_one_voxel_outlined_as_two():
    (row,) = rows_of(scan_of([ONE_VOXEL]), [[PLACE, BESIDE]])
    assert row["iou"] == 1 / 2
    assert row["dice"] == row["dice_reader1"] == row["dice_reader2"] == 2 / 3
    # Corners of 2 mm voxels: a triangle of sqrt(3) / 2 mm2 where one voxel of eight is
    # inside, a strip of 2 sqrt(2) mm2 where two neighbours are. The voxel has 8 triangles;
    # the pair 8 and 4 strips, and 4 of its triangles are 2 mm away.
    triangle, strip = np.sqrt(3) / 2, 2 * np.sqrt(2)
    near = (8 + 4) * triangle + 4 * strip
    assert row["surface_dice"] == pytest.approx(near / (16 * triangle + 4 * strip))


def test_one_voxel_missed():
    (row,) = rows_of(scan_of([ONE_VOXEL]), [[(1, 1, 1)]])
    assert (row["hit"], row["iou"], row["dice"], row["surface_dice"]) == (0, 0, 0, 0)
    assert row["dice_reader1"] == row["dice_others"] == 0
    assert row["dice_reader_others"] == row["dice_reader_reader"] == 1


def test_each_reader_has_a_column_and_who_drew_nothing_has_none():
    drawn = [(0, [PLACE, BESIDE]), (3, [PLACE])]
    rows = rows_of(scan_of([drawn, [(1, [(2, 2, 2)])]]), [[PLACE]])
    assert (rows[0]["dice_reader1"], rows[0]["dice_reader4"]) == (2 / 3, 1)
    assert "dice_reader2" not in rows[0]
    columns = nodule_scores.columns_of(rows)
    assert columns[-3:] == ["dice_reader1", "dice_reader2", "dice_reader4"]


def test_a_component_far_away_is_of_no_nodule():
    (row,) = rows_of(scan_of([ONE_VOXEL]), [[PLACE], [(1, 1, 1), (1, 1, 2)]])
    assert row["dice"] == row["surface_dice"] == row["dice_consensus"] == 1


DISJOINT = [(0, [PLACE]), (1, [BESIDE]), (2, [(6, 6, 6)])]
"""Three readers; no voxel was drawn by two."""


def test_a_nodule_without_consensus_is_all_that_was_drawn():
    (row,) = rows_of(scan_of([DISJOINT]), [[PLACE, BESIDE, (6, 6, 6)]])
    assert (row["hit"], row["iou"], row["dice"], row["surface_dice"]) == (1, 1, 1, 1)
    assert row["dice_consensus"] == row["dice_reader_consensus"] == 0
    (row,) = rows_of(scan_of([DISJOINT]), [])
    assert (row["hit"], row["dice"]) == (0, 0)
    assert np.isnan(row["dice_consensus"])  # both are empty


def test_a_neighbours_consensus_does_not_change():
    scan = scan_of([DISJOINT, [(0, [(2, 2, 2), (2, 2, 3)]), (1, [(2, 2, 2)])]])
    first, second = rows_of(scan, [[(2, 2, 2)]], level=1.0)
    assert (first["hit"], second["hit"], second["dice"]) == (0, 1, 1)


def test_a_nodule_of_which_no_voxel_is_left_is_missed():
    rows = rows_of(scan_of([ONE_VOXEL, ONE_VOXEL]), [[PLACE]])
    assert [row["hit"] for row in rows] == [0, 1]
    assert np.isnan([rows[0]["dice"], rows[0]["surface_dice"], rows[0]["iou"]]).all()


def test_nodules_of_too_few_readers_have_no_row():
    scan = scan_of([ONE_VOXEL, [(1, [(2, 2, 2)])]])
    assert [row["label"] for row in rows_of(scan, [], min_readers=2)] == [1]


@pytest.mark.parametrize("hole", [False, True])
def test_the_pleura_is_two_voxels_of_lung_away(hole):
    lung = np.zeros(SHAPE, np.uint8)
    lung[2:10, 2:10, 2:10] = 1
    if hole:  # lung masks may leave a solid nodule out
        lung[PLACE] = 0
    (row,) = rows_of(scan_of([ONE_VOXEL], lung=lung), [])
    assert row["pleura_distance_mm"] == 2 * 2.0
    (row,) = rows_of(scan_of([[(0, [(6, 6, 2)])]], lung=lung), [])
    assert row["pleura_distance_mm"] == 0


def test_without_lungs_or_ratings_nothing_is_known_of_pleura_and_texture():
    (row,) = rows_of(scan_of([ONE_VOXEL], whole=False), [])
    unknown = [row[name] for name in ("pleura_distance_mm", "texture", "subtlety")]
    assert np.isnan(unknown).all()


def test_ratings_are_the_median_of_those_who_rated():
    drawn = [(reader, [PLACE]) for reader in range(4)]
    ratings = [{"texture": 5, "subtlety": 1}, {"texture": 2}, {"texture": 5}, {}]
    (row,) = rows_of(scan_of([drawn], ratings=ratings), [])
    assert (row["texture"], row["subtlety"]) == (5, 1)


def stratum(column, value):
    """The stratum of a nodule of which only one column is known."""
    nodule = dict.fromkeys(nodule_scores.STRATA, np.nan) | {column: value}
    return [name for name, _ in nodule_scores.strata([nodule])][1:]


@pytest.mark.parametrize(
    ("column", "value", "name"),
    [
        ("diameter_mm", 5.99, "0 to 6 mm"),
        ("diameter_mm", 6.0, "6 to 10 mm"),
        ("texture", 1.5, "ground glass"),
        ("texture", 3.5, "part-solid"),
        ("texture", 4.0, "solid"),
        ("pleura_distance_mm", 0.0, "0 to 3 mm from the pleura"),
        ("pleura_distance_mm", 3.0, "3 to 10 mm from the pleura"),
        ("subtlety", 4.5, "subtlety 4"),
        ("subtlety", 5.0, "subtlety 5 (obvious)"),
    ],
)
def test_the_lower_bound_of_a_stratum_is_in_it(column, value, name):
    assert stratum(column, value) == [name]


def test_what_is_unknown_is_in_no_stratum():
    assert stratum("texture", np.nan) == []
