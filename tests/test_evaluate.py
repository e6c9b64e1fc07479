"""Step 8 through files: a bad prediction is one clear failure, the other scans are scored."""

import csv
import json
import re
from dataclasses import replace

import nibabel
import numpy as np
import pytest

import config
import evaluate
from ct.files import write_rows
from ct.nifti_io import write_nifti
from ct.scan import Annotation, Nodule, read_scan, reference_mask, scan_path, write_scan
from metrics import calibration
from results.predictions import Predictions
from results.rows import CANDIDATES_CSV, LUNGS_JSON
from tests.conftest import tiny_scan

COLUMNS = (
    "case_id",
    "series_uid",
    "nodule_id",
    "score",
    "x_lps_mm",
    "y_lps_mm",
    "z_lps_mm",
)


@pytest.fixture(autouse=True)
def without_figures(monkeypatch):
    """Leaves out dice.png and overlays.png, which take longest; test_chain draws them."""
    monkeypatch.setattr(evaluate, "draw_figures", lambda *_: None)


@pytest.fixture
def scan():
    return replace(tiny_scan(0), series_uid="1.2.3")


def found_in(scan):
    """A row of nodules.csv per nodule, at the readers' centre."""
    rows = []
    for nodule in scan.nodules:
        x, y, z = nodule.centre_ras_mm
        place = {"x_lps_mm": -x, "y_lps_mm": -y, "z_lps_mm": z}
        row = {"case_id": scan.scan_id, "series_uid": scan.series_uid}
        rows.append(row | {"nodule_id": nodule.label, "score": 0.9} | place)
    return rows


def labels_of(scan):
    """The readers' consensus, as a mask of nodules."""
    mask = reference_mask(scan, consensus_level=0.5, min_readers=1)
    return (scan.nodule_labels * mask).astype(np.uint8)


def write_predictions(folder, scans, *, labels=None):
    """The scans, and what a perfect prediction of them is in files."""
    for scan in scans:
        write_scan(scan, scan_path(folder / "scans", scan.scan_id), {})
        drawn = labels_of(scan) if labels is None else labels
        path = folder / "predictions" / scan.scan_id / "mask.nii.gz"
        write_nifti(path, drawn, scan.grid, scan.source_grid)
        write_found(path.with_name("nodules.csv"), found_in(scan))
    record = {s.scan_id: {"part": "test", "patient_id": s.patient_id} for s in scans}
    predictions = Predictions("run", "a" * 64, "b" * 64, (), record)
    predictions.write(folder / "predictions")


def write_found(path, rows):
    write_rows(rows, [n for n in COLUMNS if n in rows[0]], path)


def evaluated(folder):
    """The report, and the values of scores.json by name."""
    report = evaluate.evaluate(
        evaluate.Arguments(
            predictions=folder / "predictions",
            scans=folder / "scans",
            out=folder / "scores",
            draws=20,
        )
    )
    scores = json.loads((folder / "scores/scores.json").read_text())["scores"]
    return report, {line["name"]: line for line in scores}


def table(folder, name):
    with (folder / "scores" / name).open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"case_id": "scan-9"}, "line 3: case_id 'scan-9'; expected 'scan-000'"),
        ({"series_uid": "9.9"}, "line 3: series_uid '9.9'; expected '1.2.3'"),
        ({"score": "nan"}, "line 3: score is 'nan'; expected a finite number"),
        ({"score": ""}, "line 3: score is ''; expected a finite number"),
        ({"z_lps_mm": "inf"}, "line 3: z_lps_mm is 'inf'"),
        ({"x_lps_mm": 500.0}, "expected within (0, 0, 0) and (23, 63, 63) of scan"),
        (
            {"nodule_id": 1},
            "line 3: nodule_id 1 repeats line 2; expected each nodule once",
        ),
    ],
)
def test_a_bad_row_is_a_failure_of_its_scan_alone(scan, tmp_path, change, message):
    write_predictions(tmp_path, [scan, tiny_scan(1)])
    path = tmp_path / "predictions/scan-000/nodules.csv"
    first, second = found_in(scan)
    write_found(path, [first, second | change])
    report, _ = evaluated(tmp_path)
    (failure,) = report.failures
    assert failure.scan_id == "scan-000"
    assert str(path) in failure.reason and message in failure.reason
    assert [row["scan_id"] for row in table(tmp_path, "scores.csv")] == ["scan-001"]


def test_a_candidate_that_stands_twice_is_a_failure_of_its_scan(scan, tmp_path):
    write_predictions(tmp_path, [scan, tiny_scan(1)])
    path = tmp_path / "predictions/scan-000/nodules.csv"
    first, _ = found_in(scan)
    write_found(path, [first, first | {"nodule_id": 2}])
    (failure,) = evaluated(tmp_path)[0].failures
    assert f"{path}, line 3: place and score" in failure.reason


def test_a_table_without_scores_is_a_failure_of_its_scan(scan, tmp_path):
    write_predictions(tmp_path, [scan, tiny_scan(1)])
    path = tmp_path / "predictions/scan-000/nodules.csv"
    rows = [{k: v for k, v in row.items() if k != "score"} for row in found_in(scan)]
    write_found(path, rows)
    (failure,) = evaluated(tmp_path)[0].failures
    assert "lack score" in failure.reason


def test_a_nodule_of_luna16_without_a_place_is_a_failure_of_its_scan(scan, tmp_path):
    lists = {"annotated_lps_mm": [[1.0, 2.0, None, 6.5]], "excluded_lps_mm": []}
    bad = replace(scan, acquisition=lists)
    write_predictions(tmp_path, [bad, tiny_scan(1)])
    (failure,) = evaluated(tmp_path)[0].failures
    assert failure.reason == "scan scan-000: nodules of scan-000 hold NaN or infinity"


def write_shared(folder, rows, **more):
    """The predictions as infer.py writes them beside lungs: one table for all scans."""
    record = {"settings": config.to_json(config.Postprocess()), "passes": 1}
    record |= {"weights_sha256": ["c" * 64], **more}
    text = json.dumps({"save_as": "nifti", "nodules": record})
    (folder / LUNGS_JSON).write_text(text)
    write_found(folder / CANDIDATES_CSV, rows)
    for path in folder.glob("*/mask.nii.gz"):
        path.rename(path.with_name("nodules.nii.gz"))


def test_a_row_of_no_scan_is_warned_of_and_does_not_count(scan, tmp_path, caplog):
    other = tiny_scan(1)
    write_predictions(tmp_path, [scan, other])
    rows = found_in(scan) + found_in(other)
    stray = rows[0] | {"case_id": "scan-9"}
    write_shared(tmp_path / "predictions", [*rows, stray])
    report, scores = evaluated(tmp_path)
    assert not report.failures
    assert "line 6: case_id 'scan-9' is not a scan of the predictions" in caplog.text
    assert scores["CPM (mean of these)"]["interval"]["value"] == 1


def test_candidates_that_became_one_nodule_count_once(scan, tmp_path):
    write_predictions(tmp_path, [scan])
    first, second = found_in(scan)
    beside = {"z_lps_mm": second["z_lps_mm"] + 15.0, "score": 0.8}
    rows = [first, second, second | beside]
    rules = config.to_json(config.Postprocess(threshold=0.1, min_score=0.87))
    few = config.to_json(config.Postprocess(min_volume_mm3=0.0, min_voxels=4))
    write_shared(tmp_path / "predictions", rows, reduction=rules, slices=few)
    report, scores = evaluated(tmp_path)
    assert not report.failures
    assert scores["CPM (mean of these)"]["interval"]["value"] == 1
    text = (tmp_path / "scores/scores.md").read_text()
    assert (
        "candidates from volumes, threshold 0.1, at least 14 mm3, from slices, threshold"
        in text
    )
    assert "reported with a score of at least 0.87" in text
    # As a candidate of its own it is a false positive.
    table_path = tmp_path / "predictions" / CANDIDATES_CSV
    write_found(table_path, [first, second, second | beside | {"nodule_id": ""}])
    _, scores = evaluated(tmp_path)
    assert (
        scores["Sensitivity at 0.125 false positives per scan"]["interval"]["value"]
        == 1
    )


def test_predictions_of_before_candidates_have_no_froc(scan, tmp_path, caplog):
    write_predictions(tmp_path, [scan])
    write_shared(tmp_path / "predictions", found_in(scan))
    (tmp_path / "predictions" / CANDIDATES_CSV).unlink()
    _, scores = evaluated(tmp_path)
    assert "CPM (mean of these)" not in scores
    assert "candidates.csv is missing, so FROC is not computed" in caplog.text


def test_a_bad_row_of_a_shared_table_is_a_failure_of_its_scan_alone(scan, tmp_path):
    other = tiny_scan(1)
    write_predictions(tmp_path, [scan, other])
    first, second = found_in(scan)
    rows = [first, second | {"score": "nan"}, *found_in(other)]
    write_shared(tmp_path / "predictions", rows)
    (failure,) = evaluated(tmp_path)[0].failures
    assert failure.scan_id == "scan-000"
    assert "candidates.csv, line 3: score is 'nan'" in failure.reason


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (np.nan, "prob.nii.gz: NaN in 1 voxel; expected probabilities from 0 to 1"),
        (1.5, "prob.nii.gz: values from 0 to 1.5; expected probabilities from 0 to 1"),
        (-0.25, "prob.nii.gz: values from -0.25 to 0; expected probabilities from 0"),
    ],
)
def test_a_map_of_no_probabilities_is_a_failure_of_its_scan(
    scan, tmp_path, value, message
):
    write_predictions(tmp_path, [scan, tiny_scan(1)])
    prob = np.zeros(scan.hu.shape, np.float32)
    prob[3, 4, 5] = value
    path = tmp_path / "predictions/scan-000/prob.nii.gz"
    write_nifti(path, prob, scan.grid, scan.source_grid, exact=True)
    (failure,) = evaluated(tmp_path)[0].failures
    assert str(path) in failure.reason and message in failure.reason


def test_a_map_of_another_grid_is_a_failure_of_its_scan(scan, tmp_path):
    write_predictions(tmp_path, [scan, tiny_scan(1)])
    path = tmp_path / "predictions/scan-000/prob.nii.gz"
    nibabel.save(nibabel.Nifti1Image(np.zeros((4, 4, 4), np.float32), np.eye(4)), path)
    (failure,) = evaluated(tmp_path)[0].failures
    assert "is not the scan's" in failure.reason


def test_integers_scaled_to_one_are_probabilities(scan, tmp_path):
    write_predictions(tmp_path, [scan])
    prob = (255 * (scan.nodule_labels > 0)).astype(np.uint8)
    path = tmp_path / "predictions/scan-000/prob.nii.gz"
    write_nifti(path, prob, scan.grid, scan.source_grid)
    image = nibabel.load(path)
    image = nibabel.Nifti1Image(np.asarray(image.dataobj), image.affine)
    image.header.set_slope_inter(1 / 255, 0)
    nibabel.save(image, path)
    assert not evaluated(tmp_path)[0].failures


def test_the_reliability_table_holds_probabilities_beside_votes(scan, tmp_path):
    write_predictions(tmp_path, [scan])
    prob = np.zeros(scan.hu.shape, np.float32)
    prob[scan.nodule_labels == 2] = 0.72  # both of its readers drew every voxel
    alone = np.argwhere(scan.reader_bits == 0b1000)  # one of the four of nodule 1
    prob[tuple(alone.T)] = 0.22
    path = tmp_path / "predictions/scan-000/prob.nii.gz"
    write_nifti(path, prob, scan.grid, scan.source_grid)
    evaluated(tmp_path)
    rows = {row["low"]: row for row in table(tmp_path, "reliability.csv")}
    assert len(rows) == 20
    assert rows["0.2"]["voxels"] == str(len(alone))
    assert float(rows["0.2"]["mean_probability"]) == pytest.approx(0.22)
    assert float(rows["0.2"]["mean_vote"]) == 0.25
    assert float(rows["0.7"]["mean_vote"]) == 1
    assert rows["0.5"] == {
        "low": "0.5",
        "high": "0.55",
        "voxels": "0",
        "mean_probability": "nan",
        "mean_vote": "nan",
    }
    assert (tmp_path / "scores/reliability.png").stat().st_size > 0


def test_a_temperature_is_fitted_on_validation_and_told_on_test(scan, tmp_path):
    other = tiny_scan(1)
    write_predictions(tmp_path, [scan, other])
    for some in (scan, other):  # 0.9 where all four drew it, 0.1 elsewhere
        votes = np.bitwise_count(some.reader_bits)
        prob = np.select([votes == 4, votes > 0], [0.9, 0.1], 0.0).astype(np.float32)
        path = tmp_path / f"predictions/{some.scan_id}/prob.nii.gz"
        write_nifti(path, prob, some.grid, some.source_grid)
    path = tmp_path / "predictions/predictions.json"
    record = json.loads(path.read_text())
    record["scans"]["scan-001"]["part"] = "validation"
    path.write_text(json.dumps(record))
    report, scores = evaluated(tmp_path)
    assert not report.failures
    text = "Calibration error (ECE) against readers' votes"
    before, after = (
        scores[name]["interval"]["value"]
        for name in (text, f"{text}, temperature scaled")
    )
    facts = " ".join(
        json.loads((tmp_path / "scores/scores.json").read_text())["protocol"]
    )
    (temperature,) = re.findall(
        r"Temperature (\S+), fitted on 1 of 1 validation scan", facts
    )
    counts = calibration.histogram(
        tmp_path / "predictions/scan-000/prob.nii.gz",
        read_scan(scan_path(tmp_path / "scans", "scan-000")),
    )
    found = calibration.scale_histogram(counts, float(temperature))
    assert after == pytest.approx(
        calibration.reliability(calibration.merge_bins(found)).ece, abs=1e-3
    )
    assert after != before


def test_without_probabilities_there_is_no_reliability(scan, tmp_path):
    write_predictions(tmp_path, [scan])
    evaluated(tmp_path)
    assert not list((tmp_path / "scores").glob("reliability*"))


def rated(scan, texture):
    """The scan, both of its nodules rated alike by every reader."""
    nodules = tuple(
        replace(
            nodule,
            annotations=tuple(
                replace(a, characteristics={"texture": texture, "subtlety": 3})
                for a in nodule.annotations
            ),
        )
        for nodule in scan.nodules
    )
    return replace(scan, nodules=nodules)


def test_nodules_are_scored_by_stratum(scan, tmp_path):
    solid, hazy = rated(scan, 5), rated(tiny_scan(1), 1)
    write_predictions(tmp_path, [solid, hazy])
    empty = np.zeros(hazy.hu.shape, np.uint8)
    path = tmp_path / "predictions/scan-001/mask.nii.gz"
    write_nifti(path, empty, hazy.grid, hazy.source_grid)
    _, scores = evaluated(tmp_path)
    for name, value in (("solid", 1), ("ground glass", 0)):
        for score in ("Nodule sensitivity", "Dice per nodule"):
            line = scores[f"{score}, {name}"]
            assert line["interval"]["value"] == value
            assert (line["defined"], line["total"]) == (2, 4)
    assert scores["Nodule sensitivity, subtlety 3"]["interval"]["value"] == 0.5
    assert "Nodule sensitivity, part-solid" not in scores
    rows = table(tmp_path, "nodules.csv")
    assert [row["texture"] for row in rows] == ["5.0", "5.0", "1.0", "1.0"]
    assert [row["dice_reader4"] == "" for row in rows] == [False, True] * 2


def test_strata_of_what_nobody_rated_are_not_written(scan, tmp_path):
    write_predictions(tmp_path, [replace(scan, lung=None)])
    text = " ".join(evaluated(tmp_path)[1])
    assert "mm" in text
    assert not [w for w in ("solid", "subtlety", "pleura") if w in text]


def test_a_nodule_without_consensus_counts_in_table_and_froc(scan, tmp_path):
    places = [(10, 30, 18), (10, 30, 19), (10, 30, 20)]
    bits = np.zeros(scan.hu.shape, np.uint8)
    for reader, place in enumerate(places):
        bits[place] = 1 << reader
    centre = tuple(scan.grid.index_to_ras_mm(np.array(places[1])).tolist())
    annotations = tuple(Annotation(reader, 5.6, 5.0) for reader in range(3))
    apart = replace(
        scan,
        reader_bits=bits,
        nodule_labels=(bits > 0).astype(np.uint8),
        nodules=(Nodule(1, centre, annotations),),
    )
    labels = (bits > 0).astype(np.uint8)
    write_predictions(tmp_path, [apart], labels=labels)
    _, scores = evaluated(tmp_path)
    (row,) = table(tmp_path, "nodules.csv")
    assert (row["hit"], row["dice"], row["dice_consensus"]) == ("1", "1.0", "0.0")
    assert scores["CPM (mean of these)"]["interval"]["value"] == 1
    (row,) = table(tmp_path, "scores.csv")
    assert (row["nodules"], row["nodules_hit"], row["dice"]) == ("1", "1", "nan")


def test_sensitivities_of_one_patient_say_so(scan, tmp_path):
    write_predictions(tmp_path, [scan])
    evaluated(tmp_path)
    text = (tmp_path / "scores/scores.md").read_text()
    lines = [line for line in text.splitlines() if "false positives per scan |" in line]
    assert len(lines) == 7
    assert all("| one patient |" in line for line in lines)
    assert "| CPM (mean of these) | 1.000 | one patient | 1 of 1 |" in text
