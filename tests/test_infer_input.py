"""infer.py on lists, volumes and DICOM series: which scans it reads, and which it refuses."""

import json

import nibabel
import numpy as np
import pytest
from scipy import ndimage

import infer
from inference.segment import NO_RUNS
from tests.cohorts.conftest import ct_series, save_series
from tests.infer_calls import rows_of, run_main, save, write_list


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda volume: (volume + 1000).clip(0) // 4, "not Hounsfield units"),  # as MR
        (lambda volume: volume / np.float32(1000), "not Hounsfield units"),
        (
            lambda volume: volume[..., :1],
            "expected one 3-D volume of two or more slices",
        ),
        (lambda volume: (volume + 1024).astype(np.int16), "not Hounsfield units"),
    ],
)
def test_what_is_no_ct_is_refused(lung_run, volume, tmp_path, spoil, message):
    path = save(tmp_path / "bad.nii.gz", np.ascontiguousarray(spoil(volume)))
    report = infer.infer(lung_run, tmp_path / "out", input=path, nodules=NO_RUNS)
    assert message in report.failures[0].reason
    assert str(tmp_path) not in report.failures[0].reason


def test_without_weights_that_ship_a_run_must_be_named(tmp_path, monkeypatch):
    monkeypatch.setattr(infer, "SHIPPED", tmp_path / "weights/lung3d")
    with pytest.raises(FileNotFoundError, match="weights/lung3d.*--exp_dir"):
        infer.infer(infer.SHIPPED, tmp_path / "out", input=tmp_path, nodules=NO_RUNS)


def test_a_list_and_an_input_are_one_too_many(lung_run, tmp_path):
    with pytest.raises(ValueError, match="expected one"):
        infer.infer(
            lung_run,
            tmp_path,
            input=tmp_path / "a",
            csv_file=tmp_path / "b",
            nodules=NO_RUNS,
        )


def test_a_list_without_a_usable_row_fails(lung_run, tmp_path):
    path = write_list(tmp_path / "scans.csv", [("..", "ct.nii.gz")])
    assert (
        run_main("--csv_file", path, "--result_dir", tmp_path, "--exp_dir", lung_run)
        == 1
    )
    with pytest.raises(ValueError, match="no row is usable"):
        infer.infer(lung_run, tmp_path / "out", csv_file=path, nodules=NO_RUNS)


@pytest.mark.parametrize("pid", ["lungs.csv", "Lungs.json", "predictions.json"])
def test_an_id_that_is_a_file_of_the_directory_is_refused(
    lung_run, volume, tmp_path, pid
):
    save(tmp_path / "chest.nii.gz", volume)
    rows = [(pid, "chest.nii.gz"), ("good", "chest.nii.gz")]
    listed = write_list(tmp_path / "scans.csv", rows)
    command = ("--csv_file", listed, "--result_dir", tmp_path / "OUT", "--n", 1)
    assert run_main(*command, "--exp_dir", lung_run) == 3
    assert set(rows_of(tmp_path / "OUT")) == {"good"}
    assert "give the scan another id" in (tmp_path / "OUT/skipped.csv").read_text()


@pytest.fixture
def dicom_images(volume):
    """`volume` as a DICOM series, one of whose headers has another frame of reference."""
    # Slices of a chest resemble their neighbours.
    hu = ndimage.uniform_filter1d(volume.transpose(2, 1, 0), 3, axis=0)
    hu[:, 0, 0] += np.arange(len(hu), dtype=hu.dtype)  # equal slices are refused
    images = ct_series(hu, step=(0, 0, 5.0))
    for image in images:
        image.PixelSpacing = ["3", "3"]
    images[3].FrameOfReferenceUID = "1.2.3"
    return images


def test_warnings_of_a_series_stay_with_its_results(
    lung_run, dicom_images, tmp_path, caplog
):
    save_series(dicom_images, tmp_path / "Secret Name")
    listed = write_list(tmp_path / "scans.csv", [("P1", "Secret Name")])
    out = tmp_path / "OUT"
    options = ("--exp_dir", lung_run, "--n", 1)
    command = ("--csv_file", listed, "--result_dir", out, *options)
    assert run_main(*command) == 0
    record = json.loads((out / "predictions.json").read_text())
    warnings = record["scans"]["P1"]["warnings"]
    assert "have another FrameOfReferenceUID" in warnings[0]
    assert rows_of(out)["P1"]["warnings"] == "; ".join(warnings)
    assert all(f"P1: {text}" in caplog.text for text in warnings)
    assert "repair" not in record
    lungs = json.loads((out / "lungs.json").read_text())
    assert not {"repair", "series"} & set(lungs)
    assert run_main(*command) == 0  # nothing is read again, and nothing is lost
    assert (
        json.loads((out / "predictions.json").read_text())["scans"] == record["scans"]
    )
    written = caplog.text + "".join(p.read_text() for p in out.glob("*.[cj]s*"))
    assert "Secret" not in written


def test_repair_reads_a_series_with_a_gap_and_is_recorded(
    lung_run, dicom_images, tmp_path
):
    dicom_images[3].FrameOfReferenceUID = dicom_images[0].FrameOfReferenceUID
    save_series([im for k, im in enumerate(dicom_images) if k != 5], tmp_path / "ct")
    command = ("--input", tmp_path / "ct", "--exp_dir", lung_run, "--n", 1)
    assert run_main(*command, "--result_dir", tmp_path / "refused") == 3
    assert "--repair gaps" in (tmp_path / "refused/skipped.csv").read_text()
    out = tmp_path / "OUT"
    command = (*command, "--result_dir", out)
    assert run_main(*command, "--repair", "gaps", "tilt") == 0
    (pid,) = rows_of(out)
    assert json.loads((out / "lungs.json").read_text())["repair"] == ["gaps", "tilt"]
    mask = nibabel.load(out / pid / "mask.nii.gz")
    assert mask.shape[2] == len(dicom_images)
    assert run_main(*command) == 1  # results of other settings
    assert run_main(*command, "--repair", "gaps", "tilt") == 0


def test_a_series_is_chosen_by_its_uid(lung_run, dicom_images, tmp_path):
    save_series(dicom_images, tmp_path / "ct/a")
    for image in dicom_images:
        image.SeriesInstanceUID = "1.2.3"
    save_series(dicom_images[1:], tmp_path / "ct/b")
    options = ("--exp_dir", lung_run, "--n", 1)
    chosen = ("--input", tmp_path / "ct", "--series", "1.2.3")
    assert run_main(*chosen, *options, "--result_dir", tmp_path / "one") == 0
    assert set(rows_of(tmp_path / "one")) == {"1.2.3"}
    assert json.loads((tmp_path / "one/lungs.json").read_text())["series"] == "1.2.3"
    every = ("--input", tmp_path / "ct", "--result_dir", tmp_path / "all")
    assert run_main(*every, *options) == 0
    assert len(rows_of(tmp_path / "all")) == 2
    absent = ("--series", "9.9", "--result_dir", tmp_path / "none")
    assert run_main(*chosen[:2], *options, *absent) == 1
    listed = write_list(tmp_path / "scans.csv", [("P1", "ct")])
    command = ("--csv_file", listed, "--result_dir", tmp_path / "best", *options)
    assert run_main(*command) == 0
    best = rows_of(tmp_path / "best")["P1"]
    assert "2 CT series; read 1.2.826" in best["warnings"]


def test_repair_of_scan_files_is_refused(lung_run, tmp_path, capsys):
    command = (
        "--exp_dir",
        lung_run,
        "--result_dir",
        tmp_path / "OUT",
        "--repair",
        "gaps",
    )
    assert run_main(*command) == 1
    assert "scan files were read by preprocess.py" in capsys.readouterr().err
