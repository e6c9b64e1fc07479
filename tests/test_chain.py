"""The steps after preprocessing, as they are run, on scans small enough for seconds."""

import csv
import json
from dataclasses import replace

import nibabel
import numpy as np
import pytest

import config
import evaluate
import export
import infer
import postprocess
import slice_idx
import table
import train
from ct.geometry import flip_xy
from ct.nifti_io import read_nifti, write_nifti
from ct.scan import reference_mask, scan_marks, scan_path, write_scan
from dataset.slice_table import SliceTable
from dataset.split import read_split
from inference.predictor2d import Predictor
from results.predictions import Predictions
from tests.conftest import tiny_scan
from training import runs

EXPERIMENT = config.Experiment(
    table=config.Table(size_px=(64, 64), slices="lung"),
    split=config.Split(fractions=(0.6, 0.2, 0.2)),
    batches=config.Batches(input_px=(64, 64)),
    augment=config.Augment(rotate_deg=0, zoom=0, shift_px=0),
    model=config.Model(name="unet2d", filters=4),
    train=config.Train(epochs=1, steps_per_epoch=8, learning_rate=3e-3),
    postprocess=config.Postprocess(method="fixed"),
)


@pytest.fixture(scope="module")
def work(tmp_path_factory, make_scan):
    """A work directory after the steps 2, 3, 5, 6 and 7."""
    work = tmp_path_factory.mktemp("work")
    for index in range(10):
        scan = make_scan(index)
        write_scan(scan, scan_path(work / "scans", scan.scan_id), {})
    table.write_table(work / "scans", work / "table.h5", EXPERIMENT.table)
    slice_idx.write_split(work / "table.h5", work / "split.json", EXPERIMENT.split)
    train.train(work / "table.h5", work / "split.json", work / "runs/tiny", EXPERIMENT)
    infer.infer(work / "runs/tiny", work / "predictions", scans=work / "scans")
    postprocess.postprocess_predictions(
        postprocess.Arguments(
            predictions=work / "predictions",
            scans=work / "scans",
            run=work / "runs/tiny",
        )
    )
    return work


def manifest(work):
    return json.loads((work / "predictions/predictions.json").read_text())


def test_only_validation_and_test_patients_are_segmented(work):
    split = read_split(work / "split.json")
    segmented = {facts["patient_id"] for facts in manifest(work)["scans"].values()}
    assert segmented == {*split["parts"]["validation"], *split["parts"]["test"]}
    trained = set(split["parts"]["train"])
    with SliceTable(work / "table.h5") as table:
        scans = table.scans[np.isin(table.scans["patient_id"], list(trained))]
    marks = {*scans["hu_sha256"].tolist(), *scans["series_uid"].tolist()} - {""}
    assert len(scans) == len(trained) <= len(marks)
    assert set(manifest(work)["training_patients"]) == trained | marks


def test_probabilities_lie_on_the_scans_grid_and_within_slices_with_lung(
    work, make_scan
):
    scan = make_scan(0)
    for scan_id in manifest(work)["scans"]:
        prob, grid = read_nifti(work / "predictions" / scan_id / "prob.nii.gz")
        assert np.allclose(grid.affine, scan.grid.affine)
        assert prob.min() >= 0 and prob.max() <= 1
        assert not prob[~scan.lung.any(axis=(1, 2))].any()
        assert prob.any()


def test_a_prediction_does_not_depend_on_the_batch_size(work, make_scan):
    scan = make_scan(3)
    one, many = (
        Predictor(
            work / "runs/tiny", runs.read_settings(work / "runs/tiny"), batch_size=n
        ).probability(scan)
        for n in (1, 7)
    )
    assert np.allclose(one, many, atol=1e-5)


def test_tiles_that_are_sure_do_not_add_up_to_more_than_one(work, make_scan):
    scan = make_scan(3)
    settings = runs.read_settings(work / "runs/tiny")
    batches = replace(settings.batches, input_px=(16, 16))
    predictor = Predictor(
        work / "runs/tiny", replace(settings, batches=batches), batch_size=4
    )

    class Sure:
        def predict_on_batch(self, images):
            return np.ones((*images.shape[:3], 2), np.float32)

    predictor.network = Sure()
    prob = predictor.probability(scan)
    assert prob.max() == 1
    assert prob[scan.lung > 0].min() > 0.999


def test_predictions_of_other_weights_are_not_mixed(work, tmp_path):
    changed = manifest(work) | {"weights_sha256": "0" * 64}
    (tmp_path / "predictions.json").write_text(json.dumps(changed))
    with pytest.raises(ValueError, match="predictions made with weights 000000000000"):
        infer.infer(work / "runs/tiny", tmp_path, scans=work / "scans")


def test_an_unfinished_run_cannot_predict(tmp_path):
    with pytest.raises(FileNotFoundError, match="no finished run.*run train.py first"):
        infer.infer(tmp_path / "run", tmp_path / "out", scans=tmp_path)


def test_any_ct_is_segmented_without_scan_files(work, make_chest, tmp_path):
    volume = np.ascontiguousarray(make_chest()[0].transpose(2, 1, 0))
    affine = np.diag([-1.5, -1.5, 2.5, 1.0])
    nibabel.save(nibabel.Nifti1Image(volume, affine), tmp_path / "ct.nii.gz")
    report = infer.infer(
        work / "runs/tiny", tmp_path / "out", input=tmp_path / "ct.nii.gz"
    )
    assert report.failures == []
    prob = nibabel.load(tmp_path / "out/ct/prob.nii.gz")
    assert prob.shape == volume.shape
    assert np.allclose(prob.affine, affine)
    assert prob.get_fdata().max() > 0


def test_scores_are_written_with_their_protocol(work, capsys):
    out = work / "scores"
    report = evaluate.evaluate(
        evaluate.Arguments(
            predictions=work / "predictions", scans=work / "scans", out=out, draws=50
        )
    )
    assert report.failures == []
    for name in ("scores.csv", "scores.md", "scores.tex", "scores.json", "dice.png"):
        assert (out / name).stat().st_size > 0
    text = (out / "scores.md").read_text()
    assert "No scored patient was trained on." in text
    assert "not a medical device" in text
    assert "2 whole scans of 2 patients" in text


def test_a_perfect_prediction_scores_one(work, tmp_path, make_scan):
    from ct.nifti_io import write_nifti

    folder = tmp_path / "predictions"
    record = manifest(work)
    for scan_id in record["scans"]:
        scan = make_scan(int(scan_id.rpartition("-")[2]))
        mask = reference_mask(scan, consensus_level=0.5, min_readers=1)
        labels = (scan.nodule_labels * mask).astype(np.uint8)
        write_nifti(
            folder / scan_id / "mask.nii.gz", labels, scan.grid, scan.source_grid
        )
    (folder / "predictions.json").write_text(json.dumps(record))
    arguments = evaluate.Arguments(
        predictions=folder, scans=work / "scans", out=tmp_path / "scores", draws=50
    )
    evaluate.evaluate(arguments)
    scores = json.loads((tmp_path / "scores/scores.json").read_text())["scores"]
    values = {line["name"]: line["interval"]["value"] for line in scores}
    assert values["Dice per scan"] == 1
    assert values["HD95 (mm)"] == 0
    assert values["Nodule sensitivity, all"] == 1
    assert values["False positives per scan"] == 0


def test_of_a_split_by_slice_only_the_slices_of_the_part_are_scored(
    work, tmp_path, make_scan
):
    from ct.nifti_io import write_nifti

    folder = tmp_path / "predictions"
    record = manifest(work)
    scan_id = next(iter(record["scans"]))
    scan = make_scan(int(scan_id.rpartition("-")[2]))
    reference = reference_mask(scan, consensus_level=0.5, min_readers=1)
    slices = np.flatnonzero(reference.any(axis=(1, 2)))[:2].tolist()
    labels = np.ones(reference.shape, np.uint8)  # all wrong but in the slices
    labels[slices] = reference[slices]
    write_nifti(folder / scan_id / "mask.nii.gz", labels, scan.grid, scan.source_grid)
    facts = record["scans"][scan_id] | {"part": "validation"}
    facts["slices"] = {"validation": [0], "test": slices}
    record["scans"] = {scan_id: facts}
    (folder / "predictions.json").write_text(json.dumps(record))
    out = tmp_path / "scores"
    evaluate.evaluate(
        evaluate.Arguments(predictions=folder, scans=work / "scans", out=out, draws=50)
    )
    scores = json.loads((out / "scores.json").read_text())
    assert scores["scores"][0]["interval"]["value"] == 1
    assert "only their slices in the part" in scores["protocol"][0]


def read_leaks(path):
    """Patient -> the values of the column leak in a table of scores."""
    leaks = {}
    with path.open(newline="") as file:
        for row in csv.DictReader(file):
            leaks.setdefault(row["patient_id"], set()).add(row["leak"])
    return leaks


def scored(work, folder, record, *, scans=None):
    """The folder of scores of the test part of `record`, with the masks of `work`."""
    for scan_id in record["scans"]:
        (folder / "predictions").mkdir(parents=True, exist_ok=True)
        (folder / "predictions" / scan_id).symlink_to(work / "predictions" / scan_id)
    (folder / "predictions/predictions.json").write_text(json.dumps(record))
    evaluate.evaluate(
        evaluate.Arguments(
            predictions=folder / "predictions",
            scans=scans or work / "scans",
            out=folder / "scores",
            draws=50,
        )
    )
    return folder / "scores"


def test_a_patient_that_was_trained_on_is_marked(work, tmp_path, caplog):
    record = manifest(work)
    tested = sorted(
        facts["patient_id"]
        for facts in record["scans"].values()
        if facts["part"] == "test"
    )
    record["training_patients"].append(tested[0])
    out = scored(work, tmp_path / "one", record)
    assert f"patient {tested[0]} was trained on" in caplog.text
    expected = {tested[0]: {"1"}, tested[1]: {"0"}}
    assert read_leaks(out / "scores.csv") == expected
    assert read_leaks(out / "nodules.csv") == expected
    head = (out / "scores.md").read_text().splitlines()[0]
    assert head.startswith("WARNING: 1 of 2 patients were trained on. Without them: ")
    with (out / "scores.csv").open(newline="") as file:
        dice = {row["patient_id"]: row["dice"] for row in csv.DictReader(file)}
    assert f"Dice per scan {float(dice[tested[1]]):.3f} (one patient);" in head
    for text in ("Nodule sensitivity, all ", "False positives per scan ", "CPM "):
        assert text in head
    protocol = json.loads((out / "scores.json").read_text())["protocol"]
    assert head in protocol
    record["training_patients"] += tested
    out = scored(work, tmp_path / "all", record)
    head = (out / "scores.md").read_text().splitlines()[0]
    assert head.startswith("WARNING: every scored patient (2 of 2) was trained on;")


def test_the_patient_of_the_scan_file_counts_too(work, tmp_path, make_scan, caplog):
    """predictions.json may know a patient by the id of a list, or a series' uid."""
    record = manifest(work)
    scan_id = next(s for s, f in record["scans"].items() if f["part"] == "test")
    scan = make_scan(int(scan_id.rpartition("-")[2]))
    scan = replace(scan, patient_id="LIDC-IDRI-0001")
    write_scan(scan, scan_path(tmp_path / "scans", scan_id), {})
    listed = record["scans"][scan_id] | {"patient_id": "case-7"}
    record["scans"] = {scan_id: listed}
    record["training_patients"] = ["LIDC-IDRI-0001"]
    out = scored(work, tmp_path / "by file", record, scans=tmp_path / "scans")
    assert read_leaks(out / "scores.csv") == {"LIDC-IDRI-0001": {"1"}}
    assert read_leaks(out / "nodules.csv") == {"LIDC-IDRI-0001": {"1"}}
    assert "patient LIDC-IDRI-0001 was trained on" in caplog.text
    record["training_patients"] = ["case-7"]
    out = scored(work, tmp_path / "by record", record, scans=tmp_path / "scans")
    assert read_leaks(out / "scores.csv") == {"LIDC-IDRI-0001": {"1"}}
    record["training_patients"] = ["LIDC-IDRI-0002"]
    out = scored(work, tmp_path / "new", record, scans=tmp_path / "scans")
    assert read_leaks(out / "scores.csv") == {"LIDC-IDRI-0001": {"0"}}
    assert read_leaks(out / "nodules.csv") == {"LIDC-IDRI-0001": {"0"}}


def test_a_training_scan_under_another_name_is_marked(work, tmp_path, make_scan):
    record = manifest(work)
    scan_id = next(s for s, f in record["scans"].items() if f["part"] == "test")
    record["scans"] = {scan_id: record["scans"][scan_id]}
    scan = make_scan(int(scan_id.rpartition("-")[2]))
    renamed = replace(scan, patient_id="renamed", series_uid="1.2.3")
    path = scan_path(tmp_path / "scans", scan_id)
    write_scan(renamed, path, {})
    series_uid, checksum = scan_marks(path)
    for number, (trained, leak) in enumerate(
        [(checksum, "1"), (series_uid, "1"), ("0" * 64, "0")]
    ):
        record["training_patients"] = [trained]
        out = scored(work, tmp_path / str(number), record, scans=tmp_path / "scans")
        assert read_leaks(out / "scores.csv") == {"renamed": {leak}}


def test_a_volume_of_luna16_is_scored_as_its_patient(work, tmp_path, make_scan):
    uid = "1.3.6.1.4.1.14519.5.2.1.6279.6001.179049373636438705059720603192"
    record = manifest(work)
    scan_id = next(s for s, f in record["scans"].items() if f["part"] == "test")
    scan = make_scan(int(scan_id.rpartition("-")[2]))
    scan = replace(scan, scan_id=uid, patient_id=uid)
    write_scan(scan, scan_path(tmp_path / "scans", uid), {})
    (tmp_path / "work/predictions").mkdir(parents=True)
    source = work / "predictions" / scan_id
    (tmp_path / "work/predictions" / uid).symlink_to(source)
    record["scans"] = {uid: {"part": "test", "patient_id": uid}}
    record["training_patients"] = ["LIDC-IDRI-0001"]
    out = scored(tmp_path / "work", tmp_path, record, scans=tmp_path / "scans")
    assert read_leaks(out / "scores.csv") == {uid: {"1"}}
    assert read_leaks(out / "nodules.csv") == {uid: {"1"}}


@pytest.mark.parametrize(
    "name", ["small_nodules_lps_mm", "non_nodules_lps_mm", "excluded_lps_mm"]
)
def test_what_is_found_where_readers_left_a_point_is_not_false(tmp_path, name):
    """Two nodules and two vessels are found; at one of the vessels readers left a point."""
    scan = tiny_scan()
    centres = [[*flip_xy(np.array(n.centre_ras_mm)).tolist()] for n in scan.nodules]
    vessels = [(6, 20, 20), (18, 40, 40)]
    labels = (scan.nodule_labels > 0).astype(np.uint8)
    labels[scan.nodule_labels == 2] = 2
    for number, (z, y, x) in enumerate(vessels, start=3):
        labels[z, y - 1 : y + 2, x - 1 : x + 2] = number
        at_ras_mm = scan.grid.index_to_ras_mm(np.array([z, y, x]))
        centres.append(flip_xy(at_ras_mm).tolist())
    facts = {name: [centres[2]]}
    if name == "excluded_lps_mm":  # LUNA16's list, where -1 stands for 10 mm
        facts = {
            name: [[*centres[2], -1.0]],
            "annotated_lps_mm": [[*centre, 10.0] for centre in centres[:2]],
        }

    def scores_with(folder, acquisition):
        known = replace(scan, acquisition=acquisition)
        write_scan(known, scan_path(folder / "scans", scan.scan_id), {})
        predictions = folder / "predictions"
        path = predictions / scan.scan_id / "mask.nii.gz"
        write_nifti(path, labels, scan.grid, scan.source_grid)
        rows = [f"{x},{y},{z},{score}" for (x, y, z), score in found]
        text = "\n".join(["x_lps_mm,y_lps_mm,z_lps_mm,score", *rows])
        path.with_name("nodules.csv").write_text(text)
        facts = {scan.scan_id: {"part": "test", "patient_id": "someone"}}
        Predictions("run", "0" * 64, "", (), facts).write(predictions)
        evaluate.evaluate(
            evaluate.Arguments(
                predictions=predictions,
                scans=folder / "scans",
                out=folder / "scores",
                draws=50,
            )
        )
        record = json.loads((folder / "scores/scores.json").read_text())
        return {line["name"]: line["interval"]["value"] for line in record["scores"]}

    # The vessel with the point has the highest score, the other one the lowest.
    found = list(zip(centres, (0.6, 0.7, 0.9, 0.1), strict=True))
    plain = scores_with(tmp_path / "plain", {})
    assert plain["False positives per scan"] == 2
    # Nothing is hit before the first false positive: sensitivity is 0 at the rates 1/8,
    # 1/4 and 1/2, and 1 at the four from 1 on.
    assert plain["CPM (mean of these)"] == pytest.approx(4 / 7)
    pointed = scores_with(tmp_path / "pointed", facts)
    assert pointed["False positives per scan"] == 1
    assert pointed["CPM (mean of these)"] == 1


def test_a_missing_mask_is_a_skipped_scan_not_a_zero(work, tmp_path):
    folder = tmp_path / "predictions"
    folder.mkdir()
    record = manifest(work)
    scan_ids = [s for s, facts in record["scans"].items() if facts["part"] == "test"]
    (folder / scan_ids[0]).symlink_to(work / "predictions" / scan_ids[0])
    (folder / "predictions.json").write_text(json.dumps(record))
    report = evaluate.evaluate(
        evaluate.Arguments(
            predictions=folder, scans=work / "scans", out=tmp_path / "scores", draws=50
        )
    )
    assert [failure.scan_id for failure in report.failures] == scan_ids[1:]
    assert "run postprocess.py first" in report.failures[0].reason


@pytest.mark.parametrize("normalisation", ["window", "zscore", "minmax", "population"])
def test_the_saved_model_gives_what_python_gives(work, tmp_path, normalisation):
    run = tmp_path / "run"
    run.mkdir()
    for path in (work / "runs/tiny").glob("*.*"):
        if path.is_file():
            (run / path.name).write_bytes(path.read_bytes())
    batches = replace(EXPERIMENT.batches, normalisation=normalisation)
    settings = replace(runs.read_settings(run), batches=batches)
    (run / "config.json").write_text(json.dumps(config.to_json(settings)))
    report = export.export(run, tmp_path / "model")
    assert "equal to Python" in report.line
    assert (tmp_path / "model/1/saved_model.pb").is_file()


def test_other_folders_are_not_replaced_by_scores(work, tmp_path):
    arguments = evaluate.Arguments(
        predictions=work / "predictions",
        scans=work / "scans",
        out=work / "predictions",
        draws=50,
    )
    with pytest.raises(FileExistsError, match="would be replaced"):
        evaluate.evaluate(arguments)
    assert manifest(work)["scans"]


def test_predictions_of_another_run_are_not_postprocessed(work, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.json").write_bytes((work / "runs/tiny/config.json").read_bytes())
    (run / "best.weights.h5").write_bytes(b"other weights")
    with pytest.raises(ValueError, match="pass the run that predicted it"):
        postprocess.postprocess_predictions(
            postprocess.Arguments(
                predictions=work / "predictions", scans=work / "scans", run=run
            )
        )


def test_an_exported_version_is_not_replaced_unasked(work, tmp_path):
    (tmp_path / "1").mkdir()
    with pytest.raises(FileExistsError, match="choose another --version"):
        export.export(work / "runs/tiny", tmp_path)
