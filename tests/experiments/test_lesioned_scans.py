"""Scans made ill: lungs kept, disease marked, the same for the same seed."""

from dataclasses import replace

import numpy as np
import pytest

import config
import steps
from ct.scan import ScanError, read_scan, scan_files, write_scan
from experiments import lesioned_scans
from tests.conftest import tiny_scan

MASSES = config.Lesions(probability=1.0, findings=("mass",), most=1)


def healthy():
    """60 slices of 96 px with two lungs of 24 x 40 x 60 voxels of 3 mm."""
    scan = tiny_scan(0)
    hu = np.full((60, 96, 96), 40, np.int16)
    lung = np.zeros(hu.shape, np.uint8)
    lung[5:55, 25:70, 15:40], lung[5:55, 25:70, 56:81] = 1, 2
    hu[lung > 0] = -850
    affine = np.array([[0, 0, -3, 0], [0, -3, 0, 0], [3, 0, 0, 0], [0, 0, 0, 1.0]])
    grid = replace(scan.grid, shape=hu.shape, affine=affine)
    return replace(scan.unread(), hu=hu, lung=lung, grid=grid, source_grid=grid)


def test_what_became_denser_is_marked_and_the_lungs_stay():
    scan = healthy()
    ill = lesioned_scans.add_lesions(scan, MASSES, seed=1)
    lung, labels = np.asarray(scan.lung), np.asarray(ill.nodule_labels)
    assert np.array_equal(np.asarray(ill.lung), lung)
    denser = (ill.hu >= -700) & (lung > 0)
    assert denser.sum() > 200
    marked = labels > 0
    assert (denser >= marked).all()
    assert marked.sum() > 0.95 * denser.sum()  # but for grains
    assert np.array_equal(np.asarray(ill.reader_bits), marked)
    assert [n.label for n in ill.nodules] == list(range(1, labels.max() + 1))


def test_parts_are_numbered_by_size_and_measured():
    mask = np.zeros((10, 10, 10), bool)
    mask[1, 1, 1:3] = True
    mask[5:8, 5:8, 5:8] = True
    mask[9, 0, 0] = True  # below two voxels
    labels = lesioned_scans.label_components(mask, 2)
    assert labels[6, 6, 6] == 1
    assert labels[1, 1, 1] == 2
    assert labels[9, 0, 0] == 0
    grid = replace(healthy().grid, shape=mask.shape)
    nodule = lesioned_scans.nodule_of(labels == 1, 1, grid)
    assert nodule.centre_ras_mm == (-18, -18, 18)
    assert nodule.annotations[0].volume_mm3 == 27 * 27


def test_the_seed_decides_and_scans_differ():
    scan = healthy()
    ill = lesioned_scans.add_lesions(scan, MASSES, seed=1)
    again = lesioned_scans.add_lesions(scan, MASSES, seed=1)
    assert np.array_equal(ill.hu, again.hu)
    for other in (
        lesioned_scans.add_lesions(scan, MASSES, seed=2),
        lesioned_scans.add_lesions(replace(scan, scan_id="other"), MASSES, seed=1),
    ):
        assert not np.array_equal(ill.hu, other.hu)


def test_scans_without_known_lungs_are_refused():
    with pytest.raises(
        ScanError, match=r"scan-000 has no lung labels; .*phantoms.write"
    ):
        lesioned_scans.add_lesions(replace(healthy(), lung=None), MASSES, seed=0)


def test_the_folders_hold_truth_and_classical_masks(tmp_path):
    scan = healthy()
    write_scan(scan, tmp_path / f"known/{scan.scan_id}.h5", {})
    call = ["--truth", f"{tmp_path}/known", "--out", f"{tmp_path}/ill"]
    with pytest.raises(SystemExit) as ended:
        lesioned_scans.main([*call, "--disease.findings", "mass"])
    assert ended.value.code == 0
    (truth,), (masked,) = (scan_files(tmp_path / "ill" / n) for n in ("truth", "scans"))
    truth, masked = read_scan(truth), read_scan(masked)
    assert np.array_equal(truth.hu, masked.hu)
    lung = np.asarray(scan.lung)
    assert np.array_equal(np.asarray(truth.lung), lung)
    assert not np.array_equal(np.asarray(masked.lung), lung)
    with pytest.raises(SystemExit) as ended:
        lesioned_scans.main([*call, "--disease.findings", "nodule"])
    assert ended.value.code == steps.FAILED


def test_scans_made_of_other_lungs_are_named(tmp_path, capsys):
    scan = healthy()
    known = tmp_path / f"known/{scan.scan_id}.h5"
    write_scan(scan, known, {})
    call = ["--truth", str(known.parent), "--out", f"{tmp_path}/ill"]
    for lung, code in ((scan.lung, 0), (np.minimum(scan.lung, 1), steps.SOME_SKIPPED)):
        known.unlink()
        write_scan(replace(scan, lung=lung), known, {})
        with pytest.raises(SystemExit) as ended:
            lesioned_scans.main(call)
        assert ended.value.code == code
    assert f"was made from another {known.name}" in capsys.readouterr().err
