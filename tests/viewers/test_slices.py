from dataclasses import replace

import numpy as np
import pytest

import config
from ct.scan import LEFT, RIGHT, write_scan
from dataset.exports import write_npy_slices
from table import write_table
from viewers import slices


def test_a_slice_is_windowed_and_its_masks_outlined(scan):
    picture = slices.picture_of(scan, 10, (-1000, 400))
    expected = np.clip((scan.hu[10] + 1000.0) / 1400, 0, 1)
    assert np.allclose(picture.image, expected)
    outlined = picture.outlined
    assert np.array_equal(outlined["right lung"], scan.lung[10] == RIGHT)
    assert np.array_equal(outlined["left lung"], scan.lung[10] == LEFT)
    assert np.array_equal(outlined["nodule of any reader"], scan.reader_bits[10] > 0)
    assert picture.title == "scan-000\nz 10 of 0 to 23"


def test_what_is_unknown_is_not_outlined(scan):
    bare = replace(scan.unread(), lung=None)
    assert slices.picture_of(bare, 0, (-1000, 400)).outlined == {}
    assert slices.first_slice(bare) == 12


def test_the_first_slice_shown_has_most_nodule(scan):
    assert slices.first_slice(scan) == 10  # the centre of the larger of two nodules


def test_a_folder_of_npy_slices_is_read_if_it_holds_one_scan(scans, tmp_path):
    for scan in scans[:2]:
        write_scan(scan, tmp_path / "scans" / f"{scan.scan_id}.h5", {})
    settings = config.Table(size_px=(64, 64), slices="all")
    write_table(tmp_path / "scans", tmp_path / "table.h5", settings)
    batches = config.Batches(target="lung", lung_mask=False)
    write_npy_slices(tmp_path / "table.h5", tmp_path / "npy", batches)
    found = slices.read(tmp_path / "npy/patient-001")
    assert np.array_equal(found.hu, scans[1].hu)
    assert np.array_equal(found.hu, slices.read(tmp_path / "scans/scan-001.h5").hu)
    with pytest.raises(ValueError, match=r"2 scans \(scan-000, ...\); expected one"):
        slices.read(tmp_path / "npy")


def test_a_missing_scan_file_and_a_turned_window_are_errors(tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        slices.main([str(tmp_path / "none.h5")])
    assert ended.value.code == 1
    assert "none.h5" in capsys.readouterr().err
    with pytest.raises(ValueError, match=r"window_hu is .*; expected \(low, high\)"):
        slices.Arguments(tmp_path / "none.h5", (400, -1000))
