from dataclasses import replace

import nibabel
import numpy as np
import pytest
from scipy import ndimage

import config
import preprocess
from ct.scan import AIR_HU, ScanError, read_provenance, read_scan
from lungs import classical
from tests.cohorts.conftest import ct_series, save_series

MASK = config.LungMask()


def write_ct(path, hu):
    """A volume as NIfTI, whose axes are x, y, z and whose x rises to the left."""
    path.parent.mkdir(parents=True, exist_ok=True)
    affine = np.diag([-1.5, -1.5, 2.5, 1.0])
    affine[:3, 3] = (150, 140, -60)
    volume = np.ascontiguousarray(hu.transpose(2, 1, 0))
    nibabel.save(nibabel.Nifti1Image(volume, affine), path)


def test_scan_files_keep_hu_and_place_and_gain_lungs(make_chest, tmp_path):
    hu, right, left, _ = make_chest()
    write_ct(tmp_path / "ct/a.nii.gz", hu)
    report = preprocess.preprocess(
        tmp_path / "ct", tmp_path / "scans", MASK, cohort="nifti"
    )
    assert report.failures == []
    scan = read_scan(tmp_path / "scans/a.h5")
    assert np.array_equal(scan.hu, hu)
    assert scan.spacing_mm == (2.5, 1.5, 1.5)
    # Voxel (0, 0, 0) of the file lies at x 150, y 140, z -60 mm.
    assert np.allclose(scan.grid.index_to_ras_mm(np.zeros(3)), (150, 140, -60))
    for label, truth in ((1, right), (2, left)):
        found = scan.lung == label
        assert 2 * (found & truth).sum() > 0.95 * (found.sum() + truth.sum())


def test_lungs_that_a_source_has_are_kept_and_none_is_an_error(scan):
    assert np.array_equal(classical.with_lungs(scan, MASK).lung, scan.lung)
    water = replace(scan, lung=None, hu=np.full_like(scan.hu, 40))
    with pytest.raises(ScanError, match="no lung found in 24 slices"):
        classical.with_lungs(water, MASK)


def test_bad_volumes_do_not_stop_the_cohort(make_chest, tmp_path):
    source, scans = tmp_path / "Doe^Jane 1950", tmp_path / "scans"
    write_ct(source / "b.nii.gz", make_chest()[0])
    write_ct(source / "c.nii.gz", np.full((4, 30, 20), AIR_HU, np.int16))
    (source / "a.nii.gz").write_bytes(b"not a volume")
    report = preprocess.preprocess(source, scans, MASK, cohort="nifti")
    assert [failure.scan_id for failure in report.failures] == ["a", "c"]
    assert [path.name for path in scans.glob("*.h5")] == ["b.h5"]
    listed = (scans / "skipped.csv").read_text()
    assert "a.nii.gz" in listed
    assert "Doe" not in listed  # folders of hospitals are named after patients


def test_what_was_made_alike_is_kept_and_what_was_made_otherwise_refused(
    make_chest, tmp_path
):
    source, scans = tmp_path / "ct", tmp_path / "scans"
    write_ct(source / "a.nii.gz", make_chest()[0])
    preprocess.preprocess(source, scans, MASK, cohort="nifti")
    made = read_provenance(scans / "a.h5")["made"]
    again = preprocess.preprocess(source, scans, MASK, cohort="nifti")
    assert "0 scans, 1 already there" in again.line
    assert read_provenance(scans / "a.h5")["made"] == made
    with pytest.raises(ValueError, match=r"'closing_mm': \(12.0, 5.0\)"):
        preprocess.preprocess(
            source, scans, replace(MASK, closing_mm=5.0), cohort="nifti"
        )
    write_ct(source / "a.nii.gz", make_chest()[0] + 1)
    with pytest.raises(ValueError, match="'source_sha256'"):
        preprocess.preprocess(source, scans, MASK, cohort="nifti")
    preprocess.preprocess(source, scans, MASK, cohort="nifti", overwrite=True)
    assert np.array_equal(read_scan(scans / "a.h5").hu, make_chest()[0] + 1)


def test_scan_files_keep_what_was_odd_about_their_source(make_chest, tmp_path, caplog):
    # Slices of a chest resemble their neighbours.
    hu = ndimage.uniform_filter1d(make_chest()[0], 3, axis=0)
    hu[:, 0, 0] += np.arange(len(hu), dtype=hu.dtype)  # equal slices are refused
    images = ct_series(hu)
    for image in images:
        image.PixelSpacing = ["1.5", "1.5"]
    images[3].FrameOfReferenceUID = "1.2.3"
    save_series(images, tmp_path / "ct")
    preprocess.preprocess(tmp_path / "ct", tmp_path / "scans", MASK, cohort="nifti")
    (path,) = (tmp_path / "scans").glob("*.h5")
    (warning,) = read_scan(path).warnings
    assert "have another FrameOfReferenceUID" in warning
    assert warning in caplog.text
