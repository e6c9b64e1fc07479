"""Lung masks of many sources, the worst first."""

from dataclasses import replace

import cv2
import numpy as np
import pytest

from ct.files import write_rows
from ct.nifti_io import write_nifti
from ct.scan import scan_path, write_scan
from experiments.lung_sheet import AXIAL, CORONAL, scan_row
from experiments.lung_sources import Arguments, compare, compare_all
from results.rows import LUNGS_CSV, LungRow


def test_volumes_of_what_is_missed_and_added(make_scan):
    scan = make_scan(0)
    lung = np.zeros(scan.hu.shape, np.uint8)
    lung[5:15, 10:30, 10:30] = 1
    hu = np.full(scan.hu.shape, 40, np.int16)
    hu[5:15, 40:50, 40:50] = -1000
    mask = lung > 0
    mask[5:10, 10:30, 10:30] = False  # half is missed
    mask[5:15, 40:50, 40:50] = True  # gas
    mask[5:15, 40:50, 30:40] = True  # tissue
    nodule = np.zeros(scan.hu.shape, np.uint8)
    nodule[8:12, 20:25, 20:25] = 1  # half of it lies in the half that is missed
    marked = replace(scan, hu=hu, lung=lung, nodule_labels=nodule)
    row = compare(marked, mask)
    ml = scan.grid.voxel_mm3 / 1000
    assert row["reference_ml"] == pytest.approx(4000 * ml)
    assert row["missed_ml"] == pytest.approx(2000 * ml)
    assert row["extra_ml"] == pytest.approx(2000 * ml)
    assert row["extra_gas_ml"] == pytest.approx(1000 * ml)
    assert row["nodule_share"] == pytest.approx(0.5)
    assert row["dice"] == pytest.approx(2 * 2000 / (4000 + 4000))


def test_the_worst_scan_comes_first_with_its_flag(make_scan, tmp_path):
    rows = []
    for index, missed in ((0, 0), (1, 5), (2, 0)):
        scan = make_scan(index)
        write_scan(scan, scan_path(tmp_path / "references", scan.scan_id), {})
        if index == 2:
            continue
        mask = np.asarray(scan.lung).copy()
        mask[np.flatnonzero(mask.any(axis=(1, 2)))[:missed]] = 0
        folder = tmp_path / "masks" / scan.scan_id
        folder.mkdir(parents=True)
        write_nifti(folder / "mask.nii.gz", mask, scan.grid, scan.source_grid)
        rows.append(LungRow(scan.scan_id, 1, 1.0, 1.0, 0.9, index, "why" * index, 1.0))
    columns = list(LungRow.__dataclass_fields__)
    write_rows([vars(row) for row in rows], columns, tmp_path / "masks" / LUNGS_CSV)
    report = compare_all(
        Arguments(tmp_path / "masks", tmp_path / "references", tmp_path / "out")
    )
    table = (tmp_path / "out/lung_sources.md").read_text().splitlines()
    assert table[2].startswith("| scan-001 |") and "| 1 | why |" in table[2]
    assert table[3].startswith("| scan-000 |") and "| 1 |" in table[3]
    sheet = cv2.imread(str(tmp_path / "out/lung_sources.jpg"))
    assert sheet.shape[1] % (len(CORONAL) + len(AXIAL)) == 0
    assert sheet.shape[0] == 2 * scan_row(scan, np.asarray(scan.lung), "").shape[0]
    (failure,) = report.failures
    assert failure.scan_id == "scan-002" and "mask.nii.gz" in failure.reason


def test_masks_of_other_scans_are_refused(make_scan, tmp_path):
    scan = make_scan(0)
    write_scan(scan, scan_path(tmp_path / "references", scan.scan_id), {})
    with pytest.raises(ValueError, match="no mask of a scan"):
        compare_all(Arguments(tmp_path, tmp_path / "references", tmp_path / "out"))


def test_a_row_outlines_both_lungs_in_every_plane_that_shows_them(make_scan):
    scan = make_scan(0)
    lung = np.asarray(scan.lung)
    without, with_lungs = (scan_row(scan, m, "") for m in (np.zeros_like(lung), lung))
    side = without.shape[1] // (len(CORONAL) + len(AXIAL))
    shown = [lung[:, int(s * lung.shape[1])].any() for s in CORONAL]
    shown += [lung[int(s * len(lung))].any() for s in AXIAL]
    for number, expected in enumerate(shown):
        part = np.s_[:, number * side : (number + 1) * side]
        assert (without[part] != with_lungs[part]).any() == expected
