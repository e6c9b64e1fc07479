from dataclasses import replace

import numpy as np
import pytest

import config
import preprocess
from scan import ScanError, read_scan, scan_path


def test_scan_files_keep_hu_and_place_and_gain_lungs(scan, tmp_path):
    lungs = replace(scan, lung=None)
    found = preprocess.with_lungs(replace(scan), config.LungMask())
    assert np.array_equal(found.lung, scan.lung)  # the source's own are kept
    with pytest.raises(ScanError, match="no lung found in 24 slices"):
        preprocess.with_lungs(
            replace(lungs, hu=np.full_like(scan.hu, 40)), config.LungMask()
        )


def test_a_bad_volume_does_not_stop_the_cohort(scan, tmp_path):
    source, scans = tmp_path / "ct", tmp_path / "scans"
    source.mkdir()
    (source / "broken.nii.gz").write_bytes(b"not a volume")
    report = preprocess.preprocess(source, scans, config.LungMask(), cohort="nifti")
    assert [failure.scan_id for failure in report.failures] == ["broken"]
    assert "broken" in (scans / "skipped.csv").read_text()
    assert not list(scans.glob("*.h5"))


def test_a_complete_scan_file_is_kept_and_one_of_other_settings_refused(scan, tmp_path):
    from scan import write_scan

    path = scan_path(tmp_path, scan.scan_id)
    write_scan(scan, path, {"settings": config.to_json(config.LungMask())})
    assert preprocess.complete(path, config.LungMask())
    with pytest.raises(ValueError, match="'closing_mm': \\(12.0, 5.0\\)"):
        preprocess.complete(path, config.LungMask(closing_mm=5.0))
    assert read_scan(path).scan_id == scan.scan_id
