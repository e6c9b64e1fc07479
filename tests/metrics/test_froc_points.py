"""Points of FROC: nodules and irrelevant findings of a scan, candidates of nodules.csv."""

from dataclasses import replace

import numpy as np
import pytest

from ct.scan import ScanError
from metrics import froc_points
from tests.conftest import tiny_scan


def test_nodules_of_too_few_readers_are_irrelevant():
    scan = tiny_scan()  # nodule 1 by four readers, nodule 2 by two
    counted, others = froc_points.spheres_of(scan, min_readers=3)
    assert (len(counted), len(others)) == (1, 1)
    x, y, z = scan.nodules[0].centre_ras_mm
    assert counted[0] == pytest.approx([-x, -y, z, scan.nodules[0].diameter_mm])
    counted, others = froc_points.spheres_of(scan, min_readers=1)
    assert (len(counted), len(others)) == (2, 0)
    assert others.shape == (0, 4)


def test_a_nodule_without_extent_is_no_target():
    scan = tiny_scan()
    flat = replace(
        scan.nodules[1],
        annotations=tuple(
            replace(a, diameter_mm=0.0) for a in scan.nodules[1].annotations
        ),
    )
    scan = replace(scan, nodules=(scan.nodules[0], flat))
    assert [len(spheres) for spheres in froc_points.spheres_of(scan, 1)] == [1, 0]


def test_points_of_lidc_are_irrelevant_and_10_mm_wide():
    points = {
        "small_nodules_lps_mm": [[1.0, 2.0, 3.0]],
        "non_nodules_lps_mm": [[4.0, 5.0, 6.0], [7.0, 8.0, 9.0]],
    }
    scan = replace(tiny_scan(), acquisition=points)
    counted, others = froc_points.spheres_of(scan, min_readers=1)
    assert len(counted) == 2
    assert others.tolist() == [[1, 2, 3, 10], [4, 5, 6, 10], [7, 8, 9, 10]]
    assert len(froc_points.spheres_of(scan, min_readers=3)[1]) == 4


def test_a_sphere_holds_the_voxels_nearer_than_its_radius():
    scan = tiny_scan()
    centre_zyx = np.array([0.3, 20.0, 62.5])  # at the border, which cuts it
    x, y, z = scan.grid.index_to_ras_mm(centre_zyx)
    inside = froc_points.within_spheres(scan, np.array([[-x, -y, z, 10.0]]))
    apart = (np.indices(scan.hu.shape).T - centre_zyx) * scan.spacing_mm
    expected = (np.linalg.norm(apart, axis=-1) < 5).T
    assert expected.any()
    assert np.array_equal(inside, expected)
    assert not froc_points.within_spheres(scan, np.zeros((0, 4))).any()


def test_places_of_candidates_are_read_by_scan_and_checked(tmp_path):
    path = tmp_path / "candidates.csv"
    head = "case_id,score,x_lps_mm,y_lps_mm,z_lps_mm,marked_by\n"
    rows = "a,0.9,1,2,3,both\nb,0.8,4,5,6,slices\na,0.1,-7,8,9.5,volumes\n"
    path.write_text(head + rows)
    found = froc_points.read_candidate_positions(path)
    assert {name: places.tolist() for name, places in found.items()} == {
        "a": [[1, 2, 3], [-7, 8, 9.5]],
        "b": [[4, 5, 6]],
    }
    path.write_text(head + "a,0.9,1,2,nan,both\n")
    with pytest.raises(ScanError, match="line 2: z_lps_mm is 'nan'"):
        froc_points.read_candidate_positions(path)
    path.write_text("case_id,x_lps_mm,y_lps_mm,z_lps_mm,nodule_id\n")  # nodules.csv
    with pytest.raises(ScanError, match="lack marked_by"):
        froc_points.read_candidate_positions(path)
    path.write_bytes(b"\x89PNG\r\n")
    with pytest.raises(ScanError, match="candidates.csv: not a CSV table"):
        froc_points.read_candidate_positions(path)


def test_lists_of_luna16_come_before_the_masks():
    lists = {
        "annotated_lps_mm": [[1.0, 2.0, 3.0, 6.5]],
        "excluded_lps_mm": [[4.0, 5.0, 6.0, -1.0], [7.0, 8.0, 9.0, 3.0]],
    }
    scan = replace(tiny_scan(), acquisition=lists)
    counted, others = froc_points.spheres_of(scan, min_readers=3)
    assert counted.tolist() == [[1, 2, 3, 6.5]]
    assert others[:, 3].tolist() == [10, 3]
    empty = replace(scan, acquisition={"annotated_lps_mm": [], "excluded_lps_mm": []})
    assert [s.shape for s in froc_points.spheres_of(empty, 1)] == [(0, 4), (0, 4)]
    assert np.isfinite(others).all()
