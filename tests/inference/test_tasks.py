"""A scan that a run was trained on is recognised under any name, format and orientation."""

import shutil
from pathlib import Path

import nibabel
import numpy as np
import pytest
import SimpleITK

from cohorts import nifti
from ct.fingerprint import hu_sha256
from inference.tasks import read_ct, tasks_of_input, tasks_of_list, warn_of_leaks
from tests.cohorts.conftest import SERIES_UID, chest_hu, ct_series, save_series
from training import runs

BEFORE = Path(__file__).parents[1] / "data/before_rooms/run"


@pytest.fixture
def dicom(tmp_path):
    """The training scan as it was read: a series of DICOM images."""
    save_series(ct_series(), tmp_path / "dicom")
    return tmp_path / "dicom"


@pytest.fixture
def run(dicom, tmp_path):
    """A run that was trained on it under the name of a list."""
    folder = tmp_path / "run"
    shutil.copytree(BEFORE, folder)
    (source,) = nifti.find_scans(dicom)
    scan = nifti.load_scan(source)
    row = {"patient_id": "dx-1", "series_uid": SERIES_UID}
    runs.write_training_scans(folder, [row | {"hu_sha256": hu_sha256(scan.hu)}])
    return folder


def warnings_of(tasks, run, caplog):
    """What is logged until every task is read."""
    caplog.clear()
    warn_of_leaks(tasks, {str(run): runs.training_patients_of(run / "best.weights.h5")})
    for task in tasks:
        read_ct(task)
    return [message for message in caplog.messages if "trained on" in message]


def test_a_run_names_the_marks_of_its_scans(run, dicom):
    seen = runs.training_patients_of(run / "best.weights.h5")
    (source,) = nifti.find_scans(dicom)
    checksum = hu_sha256(nifti.load_scan(source).hu)
    assert set(seen) == {"patient-002", SERIES_UID, checksum}


def test_a_series_of_another_patient_id_is_known_by_its_uid(run, dicom, caplog):
    (message,) = warnings_of(tasks_of_input(dicom), run, caplog)
    assert "was trained on (by run)" in message
    (dicom.parent / "list.csv").write_text("pid,image_path,patient_id\na,dicom,b\n")
    tasks, _ = tasks_of_list(dicom.parent / "list.csv")
    (message,) = warnings_of(tasks, run, caplog)
    assert message.startswith("scan a was trained on (by run), under another name")


def test_a_series_with_other_uids_is_known_by_its_voxels(run, tmp_path, caplog):
    images = ct_series()
    for image in images:
        image.SeriesInstanceUID, image.PatientID = "1.2.3", "someone"
    save_series(images, tmp_path / "renamed")
    (message,) = warnings_of(tasks_of_input(tmp_path / "renamed"), run, caplog)
    assert message.startswith("scan 1.2.3 was trained on (by run)")


@pytest.mark.parametrize("suffix", [".nii.gz", ".mha", ".nrrd"])
def test_a_conversion_of_the_series_is_known_by_its_voxels(
    suffix, run, dicom, tmp_path, caplog
):
    reader = SimpleITK.ImageSeriesReader()
    reader.SetFileNames(reader.GetGDCMSeriesFileNames(str(dicom)))
    path = tmp_path / f"converted{suffix}"
    SimpleITK.WriteImage(reader.Execute(), str(path))
    (message,) = warnings_of(tasks_of_input(path), run, caplog)
    assert message.startswith("scan converted was trained on (by run)")


@pytest.mark.parametrize("right", [True, False], ids=["affine", "wrong affine"])
def test_turned_and_mirrored_axes_are_no_disguise(right, run, tmp_path, caplog):
    hu = chest_hu().T  # x to the left, y to the back, z to the head
    affine = np.diag([-0.7, -0.9, 2.5, 1])
    turned = np.ascontiguousarray(hu[::-1].transpose(2, 0, 1))
    if right:
        affine = affine[:, [2, 0, 1, 3]]
        affine[:, 1] *= -1
    nibabel.save(nibabel.Nifti1Image(turned, affine), tmp_path / "turned.nii")
    (message,) = warnings_of(tasks_of_input(tmp_path / "turned.nii"), run, caplog)
    assert "scan turned was trained on" in message


def test_another_scan_is_not_matched(run, tmp_path, caplog):
    images = ct_series(chest_hu(seed=1))
    for image in images:
        image.SeriesInstanceUID = "1.2.3"
    save_series(images, tmp_path / "other")
    assert warnings_of(tasks_of_input(tmp_path / "other"), run, caplog) == []


def test_an_older_run_without_marks_warns_by_patient_alone(dicom, tmp_path, caplog):
    assert warnings_of(tasks_of_input(dicom), BEFORE, caplog) == []
    dicom.rename(tmp_path / "again")
    rows = "pid,image_path,patient_id\na,again,patient-002\n"
    (tmp_path / "list.csv").write_text(rows)
    tasks, _ = tasks_of_list(tmp_path / "list.csv")
    (message,) = warnings_of(tasks, BEFORE, caplog)
    assert message.startswith("patient patient-002 was trained on (by run)")
