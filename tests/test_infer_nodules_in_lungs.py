"""infer.py with runs that find nodules in the lungs, on a small chest with one nodule."""

import json
from dataclasses import replace

import cv2
import nibabel
import numpy as np
import pytest

import evaluate
import infer
from ct import files
from ct.scan import Annotation, Nodule, scan_path, write_scan
from inference.segment import NO_RUNS, NoduleRuns
from tests.infer_calls import (
    AFFINE,
    WITHOUT_SKIN,
    alone,
    nodules_of,
    read,
    rows_of,
    run_main,
    save,
    write_list,
)


def scores_of(folder):
    record = json.loads((folder / "scores.json").read_text())
    return {line["name"]: line["interval"]["value"] for line in record["scores"]}


def test_nodules_are_found_in_the_lungs_measured_and_drawn(
    lung_run, nodule_run, ill_volume, volume, tmp_path, capsys
):
    rows = [
        ("ill", save(tmp_path / "ill.nii.gz", ill_volume)),
        ("well", save(tmp_path / "well.nii.gz", volume)),
    ]
    listed = write_list(tmp_path / "scans.csv", rows)
    options = ("--exp_dir", lung_run, "--n", 1, "--min_volume_mm3", 60_000)
    out = tmp_path / "OUT"
    command = ("--csv_file", listed, "--result_dir", out, *options)
    assert run_main(*command, "--nodules", nodule_run) == 0
    (nodule,) = nodules_of(out)
    assert (nodule["case_id"], nodule["nodule_id"]) == ("ill", "1")
    assert nodule["side"] == "right"
    assert float(nodule["long_axis_mm"]) == pytest.approx(20, abs=5)
    place = [float(nodule[f"{axis}_source"]) for axis in "ijk"]
    assert place == pytest.approx([32, 47, 16], abs=0.7)
    image = nibabel.load(out / "ill/nodules.nii.gz")
    assert np.allclose(image.affine, AFFINE)
    labels = np.asarray(image.dataobj)
    assert labels[32, 47, 16] == 1
    assert np.count_nonzero(labels) == pytest.approx(
        float(nodule["volume_mm3"]) / 45, abs=0.5
    )
    assert not read(out / "well/nodules.nii.gz").any()
    for pid in ("ill", "well"):
        picture = cv2.imread(str(out / pid / "overview.png"))
        assert picture.std() > 20
    record = json.loads((out / "lungs.json").read_text())
    assert len(record["nodules"]["weights_sha256"]) == 2
    # Killed between the two tables: the scan is done again, and its nodules stand once.
    rows = (out / "lungs.csv").read_text().splitlines(keepends=True)
    (out / "lungs.csv").write_text("".join(rows[:1] + rows[2:]))
    assert run_main(*command, "--nodules", nodule_run) == 0
    assert nodules_of(out) == [nodule]
    assert rows_of(out).keys() == {"ill", "well"}
    # A record of before there were these settings; and what was lost is made again.
    for setting in ("min_voxels", "fill_holes"):
        del record["nodules"]["settings"][setting]
    (out / "lungs.json").write_text(json.dumps(record))
    (out / "ill/nodules.nii.gz").unlink()
    assert run_main(*command, "--nodules", nodule_run) == 0
    assert (out / "ill/nodules.nii.gz").exists()
    # Without nodules these are other results.
    assert run_main(*command, "--nodules", None) == 1
    assert "(None for no run)" in capsys.readouterr().err
    assert run_main(*command, "--nodules", None, "--overwrite") == 0
    assert not (out / "nodules.csv").exists()
    assert {file.name for file in (out / "ill").iterdir()} == {
        *("mask.nii.gz", "mean.nii.gz", "std.nii.gz", "uncertainty.nii.gz"),
    }


def test_what_the_false_positive_network_refuses_is_no_nodule(
    lung_run, nodule_run, reduction_run, ill_volume, tmp_path, capsys
):
    source, out = save(tmp_path / "ill.nii.gz", ill_volume), tmp_path / "OUT"
    command = (
        *("--input", source, "--result_dir", out, "--exp_dir", lung_run, "--n", 1),
        *("--min_volume_mm3", 60_000, "--nodules", nodule_run),
    )
    assert run_main(*command) == 0
    found = nodules_of(out)
    assert len(found) == 1
    assert run_main(*command, "--reduction", reduction_run) == 1
    assert "--reduction RUN" in capsys.readouterr().err
    assert run_main(*command, "--reduction", reduction_run, "--overwrite") == 0
    assert nodules_of(out) == []
    (candidate,) = nodules_of(out, "candidates.csv")
    assert (candidate["case_id"], candidate["nodule_id"]) == ("ill", "")
    assert 0 < float(candidate["score"]) < 0.99
    assert candidate["marked_by"] == "volumes"
    (before,) = found
    for name in ("i_source", "j_source", "k_source", "z_slice"):
        assert float(candidate[name]) == pytest.approx(float(before[name]), abs=1)
    record = json.loads((out / "lungs.json").read_text())
    assert record["nodules"]["reduction"]["min_score"] == 0.99
    command = (*command, "--reduction", reduction_run)
    assert run_main(*command, "--min_score", 0.01) == 1
    assert "with min_score 0.99, now 0.01; use the same" in capsys.readouterr().err
    assert run_main(*command, "--min_score", 1, "--overwrite") == 2
    assert "min_score is 1.0; expected 0 to below 1" in capsys.readouterr().err
    assert run_main(*command, "--min_score", 0.01, "--overwrite") == 0
    assert len(nodules_of(out)) == 1
    predictions = json.loads((out / "predictions.json").read_text())
    assert "trained-on" in predictions["training_patients"]


def test_a_nodule_that_slices_alone_mark_is_reported(
    lung_run, nodule_run, slices_run, reduction_run, ill_volume, tmp_path, capsys
):
    source = save(tmp_path / "ill.nii.gz", np.where(ill_volume == 20, -400, ill_volume))
    out = tmp_path / "OUT"
    command = (
        *("--input", source, "--result_dir", out, "--exp_dir", lung_run, "--n", 1),
        *("--min_volume_mm3", 60_000, "--nodules", nodule_run),
        *("--reduction", reduction_run, "--min_score", 0),
    )
    assert run_main(*command) == 0
    assert nodules_of(out) == []
    # Other runs, other results; those of before are asked for as then.
    assert run_main(*command, "--slices", slices_run) == 1
    shown = capsys.readouterr().err
    assert "by other runs; use the same" in shown
    assert "--slices RUN --reduction RUN" in shown
    assert run_main(*command) == 0
    assert run_main(*command, "--slices", slices_run, "--overwrite") == 0
    (nodule,) = nodules_of(out)
    place = [float(nodule[f"{axis}_source"]) for axis in "ijk"]
    assert place == pytest.approx([32, 47, 16], abs=0.7)
    first = nodules_of(out, "candidates.csv")[0]
    assert (first["nodule_id"], first["marked_by"]) == ("1", "slices")
    marked_mm = float(first["equivalent_diameter_mm"])
    assert marked_mm == pytest.approx(float(nodule["equivalent_diameter_mm"]), rel=0.2)
    record = json.loads((out / "lungs.json").read_text())
    assert record["nodules"]["slices"]["min_voxels"] == 4
    assert run_main(*command, "--slices", slices_run) == 0
    assert len(nodules_of(out)) == 1


def test_nodules_in_lungs_are_scored_as_those_of_a_run(
    lung_run, nodule_run, reduction_run, chest_scan, tmp_path
):
    z, y, x = np.ogrid[tuple(slice(n) for n in chest_scan.hu.shape)]
    apart_mm2 = ((z - 16) * 5) ** 2 + ((y - 95) * 1.5) ** 2 + ((x - 65) * 1.5) ** 2
    ball = apart_mm2 <= 10**2
    centre = tuple(chest_scan.grid.index_to_ras_mm(np.array([16, 95, 65])).tolist())
    readers = tuple(Annotation(r, 4000.0, 20.0, {}) for r in range(2))
    scan = replace(
        chest_scan,
        hu=np.where(ball, 20, chest_scan.hu).astype(np.int16),
        reader_bits=ball * np.uint8(3),
        nodule_labels=ball.astype(np.uint8),
        nodules=(Nodule(1, centre, readers),),
    )
    write_scan(scan, scan_path(tmp_path / "scans", "chest"), {})
    arguments = evaluate.Arguments(
        tmp_path / "OUT", tmp_path / "scores", scans=tmp_path / "scans"
    )
    options = {"scans": tmp_path / "scans", "parts": ("test",), "lungs": WITHOUT_SKIN}
    infer.infer(lung_run, arguments.predictions, nodules=NO_RUNS, **options)
    with pytest.raises(ValueError, match="holds lung masks without nodules"):
        evaluate.evaluate(arguments)
    infer.infer(
        lung_run,
        arguments.predictions,
        nodules=alone(nodule_run),
        overwrite=True,
        **options,
    )
    evaluate.evaluate(arguments)
    (nodule,) = nodules_of(arguments.out)
    assert nodule["hit"] == "1"
    assert float(nodule["dice"]) > 0.8
    record = json.loads((arguments.out / "scores.json").read_text())
    assert scores_of(arguments.out)["CPM (mean of these)"] == 1
    (made_by,) = (line for line in record["protocol"] if "found in the run's" in line)
    assert files.sha256(nodule_run / "best.weights.h5")[:12] in made_by
    # What is not reported is missed, and still a candidate of the FROC curve.
    infer.infer(
        lung_run,
        arguments.predictions,
        nodules=NoduleRuns(nodule_run, None, reduction_run),
        overwrite=True,
        **options,
    )
    evaluate.evaluate(arguments)
    scores = scores_of(arguments.out)
    assert scores["Nodule sensitivity, all"] == 0
    assert scores["CPM (mean of these)"] == 1
