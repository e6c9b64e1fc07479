"""Files written before the rooms were built (commit c41e65e) are read as before.

tests/data/before_rooms was made then, by the steps of `test_chain` on `tiny_scan`: two scan
files, their table and split, a run, its predictions, and a result folder of lungs.
"""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import evaluate
import infer
from ct import files
from ct.nifti_io import read_nifti
from ct.scan import read_scan
from dataset.slice_table import SliceTable, verify_table
from dataset.split import patients_of_part, read_split
from inference.segment import NO_RUNS
from lungs.labels import LungMap
from results.predictions import read_predictions
from results.result_folder import read_lungs_json
from results.rows import CANDIDATES_CSV, NODULES_CSV, read_lung_rows, read_rows
from tests.conftest import tiny_scan
from training import runs

PHANTOM = Path(__file__).parents[1] / "examples/phantom.nii.gz"
BEFORE = Path(__file__).parent / "data/before_rooms"


@pytest.mark.parametrize("index", [0, 1])
def test_scan_files_hold_what_was_written(index):
    scan, written = read_scan(BEFORE / f"scans/scan-00{index}.h5"), tiny_scan(index)
    assert np.array_equal(scan.hu, written.hu)
    assert np.array_equal(scan.nodule_labels, written.nodule_labels)
    assert scan.nodules == written.nodules
    assert np.allclose(scan.grid.affine, written.grid.affine)


def test_the_table_is_whole_and_its_split_fits():
    assert verify_table(BEFORE / "table.h5") == []
    split = read_split(BEFORE / "split.json")
    with SliceTable(BEFORE / "table.h5") as table:
        patients = set(table.scans["patient_id"].tolist())
        assert np.array_equal(table.read("hu", 0), tiny_scan(0).hu[table.rows["z"][0]])
    parts = ("train", "validation", "test")
    assert {p for part in parts for p in patients_of_part(split, part)} == patients


def test_a_run_gives_the_probabilities_it_gave(tmp_path):
    assert runs.training_patients_of(BEFORE / "run/best.weights.h5") == ["patient-002"]
    infer.infer(BEFORE / "run", tmp_path, scans=BEFORE / "scans", parts=("validation",))
    now, _ = read_nifti(tmp_path / "scan-000/prob.nii.gz")
    before, _ = read_nifti(BEFORE / "predictions/scan-000/prob.nii.gz")
    assert np.abs(now - before).max() < 1e-3


def test_predictions_are_scored(tmp_path):
    folder = tmp_path / "predictions"
    shutil.copytree(BEFORE / "predictions", folder)
    assert set(read_predictions(folder).scans) == {"scan-000", "scan-001"}
    report = evaluate.evaluate(
        evaluate.Arguments(
            folder,
            tmp_path / "scores",
            scans=BEFORE / "scans",
            part="validation",
            draws=20,
        )
    )
    assert "1 scan, 2 nodules" in report.line
    scores = json.loads((tmp_path / "scores/scores.json").read_text())
    assert scores["setting"]["part"] == "validation"


def test_a_result_folder_of_lungs_goes_on(tmp_path):
    folder = tmp_path / "lungs"
    shutil.copytree(BEFORE / "lungs", folder)
    record = read_lungs_json(folder / "lungs.json")
    assert record["mean_is_mask"] is False
    (row,) = read_lung_rows(folder / "lungs.csv")
    assert row.pid == "phantom" and row.right_ml > 1000
    assert len(read_rows(folder / NODULES_CSV)["phantom"]) == 3
    assert len(read_rows(folder / CANDIDATES_CSV)["phantom"]) > 3


def test_a_command_goes_on_in_an_older_result_folder(tmp_path, monkeypatch):
    """What decides lungs has the keys and values it had; weights may change."""
    folder = tmp_path / "lungs"
    shutil.copytree(BEFORE / "lungs", folder)
    weights = files.sha256(infer.SHIPPED / "best.weights.h5")
    for name, changes in {
        "lungs.json": {"nodules": None, "format_version": 1},
        "predictions.json": {},
    }.items():
        record = json.loads((folder / name).read_text())
        changes |= {"weights_sha256": weights}
        (folder / name).write_text(json.dumps(record | changes))
    monkeypatch.setattr(infer, "read_and_map", lambda *_: [])
    options = {"input": PHANTOM, "nodules": NO_RUNS}
    lungs = infer.Lungs(infer.Passes(n=1), save_as="nifti-labels")
    infer.infer(infer.SHIPPED, folder, lungs=lungs, **options)
    with pytest.raises(ValueError, match="other settings"):
        lungs = replace(lungs, labels=LungMap(thresh=0.4))
        infer.infer(infer.SHIPPED, folder, lungs=lungs, **options)
