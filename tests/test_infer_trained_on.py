"""infer.py names the patients and scans that one of its networks was trained on."""

import json
import shutil

import infer
from ct.fingerprint import hu_sha256
from inference import segment as segment_module
from inference.passes import Passes
from inference.segment import NO_RUNS, Lungs, NoduleRuns
from tests.infer_calls import WITHOUT_SKIN, save, write_list
from training import runs


def test_a_patient_that_was_trained_on_is_named(lung_run, volume, tmp_path, caplog):
    path = save(tmp_path / "trained-on.nii.gz", volume)
    infer.infer(
        lung_run,
        tmp_path / "out",
        input=path,
        lungs=Lungs(Passes(n=1)),
        nodules=NO_RUNS,
    )
    assert "patient trained-on was trained on (by hand)" in caplog.text


def with_training_patients(run, folder, *patients):
    """A copy of a run with other patients in the training part of its split."""
    shutil.copytree(run, folder)
    record = json.loads((folder / "split.json").read_text())
    record["parts"]["train"] = list(patients)
    (folder / "split.json").write_text(json.dumps(record))
    return folder


def test_a_training_scan_under_another_name_is_named(
    lung_run, volume, tmp_path, caplog
):
    trained = with_training_patients(lung_run, tmp_path / "run", "someone")
    row = {"patient_id": "someone", "series_uid": "", "hu_sha256": hu_sha256(volume)}
    runs.write_training_scans(trained, [row])
    path = save(tmp_path / "new-name.nii.gz", volume)
    options = {"lungs": Lungs(Passes(n=1)), "nodules": NO_RUNS}
    infer.infer(trained, tmp_path / "out", input=path, **options)
    assert "scan new-name was trained on (by run), under another name" in caplog.text
    record = json.loads((tmp_path / "out/predictions.json").read_text())
    assert record["training_patients"] == sorted(["someone", row["hu_sha256"]])
    caplog.clear()
    other = volume.copy()
    other[0, 0, 0] += 1
    path = save(tmp_path / "other.nii.gz", other)
    infer.infer(trained, tmp_path / "out", input=path, **options)
    assert "trained on" not in caplog.text


def test_a_volume_of_luna16_is_known_by_its_patient(lung_run, volume, tmp_path, caplog):
    trained = with_training_patients(lung_run, tmp_path / "run", "LIDC-IDRI-0001")
    uid = "1.3.6.1.4.1.14519.5.2.1.6279.6001.179049373636438705059720603192"
    path = save(tmp_path / f"{uid}.nii.gz", volume)
    infer.infer(
        trained,
        tmp_path / "a",
        input=path,
        lungs=Lungs(Passes(n=1)),
        nodules=NO_RUNS,
    )
    assert "patient LIDC-IDRI-0001 was trained on (by run)" in caplog.text
    caplog.clear()
    scans = tmp_path / "scans.csv"
    scans.write_text(f"pid,image_path,patient_id\n{uid},{path.name},someone\n")
    infer.infer(
        trained,
        tmp_path / "b",
        csv_file=scans,
        lungs=Lungs(Passes(n=1)),
        nodules=NO_RUNS,
    )
    assert "patient someone was trained on (by run)" in caplog.text


def test_every_network_of_a_result_counts(
    lung_run,
    nodule_run,
    slices_run,
    reduction_run,
    volume,
    tmp_path,
    monkeypatch,
    caplog,
):
    runs_of = {"lungs": lung_run, "nodules": nodule_run}
    runs_of |= {"slices": slices_run, "reduction": reduction_run}
    trained = {
        name: with_training_patients(made, tmp_path / name, f"of-{name}")
        for name, made in runs_of.items()
    }
    monkeypatch.setattr(segment_module, "OUTLINES", tmp_path / "outlines")
    with_training_patients(nodule_run, tmp_path / "outlines", "of-outlines")
    provenance = {"init_training_patients": ["of-before"]}
    (trained["nodules"] / "provenance.json").write_text(json.dumps(provenance))
    for name in (*trained, "outlines", "before", "nobody"):
        save(tmp_path / f"of-{name}.nii.gz", volume)
    rows = [(f"{path.name[:-7]}", path.name) for path in tmp_path.glob("of-*.nii.gz")]
    infer.infer(
        trained["lungs"],
        tmp_path / "OUT",
        csv_file=write_list(tmp_path / "scans.csv", rows),
        lungs=WITHOUT_SKIN,
        nodules=NoduleRuns(*(trained[name] for name in list(trained)[1:])),
    )
    for name in (*trained, "outlines"):
        assert f"patient of-{name} was trained on (by {name})" in caplog.text
    assert "patient of-before was trained on (by nodules)" in caplog.text
    assert "of-nobody was trained on" not in caplog.text
    record = json.loads((tmp_path / "OUT/predictions.json").read_text())
    seen = {f"of-{name}" for name in (*trained, "outlines", "before")}
    assert set(record["training_patients"]) == seen
