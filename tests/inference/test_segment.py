"""predict, presets, and the runs for nodules that are missing or would not be used."""

import functools
from dataclasses import replace

import numpy as np
import pytest

import config
import infer
import postprocess
from inference import segment as segment_module
from inference.passes import Passes
from inference.segment import (
    CANDIDATES2D,
    NO_RUNS,
    OUTLINES,
    NoduleRuns,
    scan_networks,
    with_preset,
)
from lungs.labels import LungMap
from tests.infer_calls import WITHOUT_SKIN, alone, nodules_of, read, rows_of, save


def test_predict_finds_in_a_file_and_in_an_array_what_the_command_does(
    lung_run, nodule_run, ill_volume, tmp_path
):
    source = save(tmp_path / "ill.nii.gz", ill_volume)
    out = tmp_path / "OUT"
    infer.infer(
        lung_run, out, input=source, lungs=WITHOUT_SKIN, nodules=alone(nodule_run)
    )
    expected = read(out / "ill/nodules.nii.gz").transpose(2, 1, 0)  # rises to S, P, L
    assert expected.any()
    options = {"exp_dir": lung_run, "nodules": alone(nodule_run)}
    predict = functools.partial(segment_module.predict, lungs=WITHOUT_SKIN, **options)
    assert np.array_equal(predict(source), expected)
    array = np.ascontiguousarray(ill_volume.transpose(2, 1, 0))
    labels = predict(array, (5, 3, 3))
    assert np.array_equal(labels, expected)
    every = config.Postprocess(min_volume_mm3=0, within_lung=False)
    instances, rows = postprocess.postprocess(labels, (5, 3, 3), settings=every)
    assert np.array_equal(instances, expected)
    assert len(rows) == len(nodules_of(out))
    assert float(nodules_of(out)[0]["long_axis_mm"]) == pytest.approx(
        rows[0]["long_axis_mm"], abs=1e-3
    )
    scan_networks.cache_clear()


def test_predict_names_a_patient_that_was_trained_on(
    lung_run, nodule_run, volume, tmp_path, caplog
):
    source = save(tmp_path / "trained-on.nii.gz", volume)
    options = {"exp_dir": lung_run, "nodules": alone(nodule_run)}
    assert not segment_module.predict(source, lungs=WITHOUT_SKIN, **options).any()
    assert "patient trained-on was trained on (by hand, nodules)" in caplog.text
    scan_networks.cache_clear()


def test_predict_refuses_what_is_not_one_ct(lung_run, nodule_run, volume, tmp_path):
    with pytest.raises(ValueError, match="spacing_mm is missing"):
        segment_module.predict(volume)
    with pytest.raises(ValueError, match=r"array: .* expected \(z, y, x\) HU"):
        segment_module.predict(volume[0], (1, 1, 1))
    with pytest.raises(ValueError, match="not Hounsfield units"):
        segment_module.predict(np.zeros((9, 9, 9), np.int16), (1, 1, 1))
    for name in ("a", "b"):
        save(tmp_path / f"{name}.nii.gz", volume)
    with pytest.raises(ValueError, match="has its own"):
        segment_module.predict(tmp_path / "a.nii.gz", (1, 1, 1))
    with pytest.raises(ValueError, match="2 scans; expected one"):
        segment_module.predict(tmp_path)
    with pytest.raises(ValueError, match="segments nodule; expected one for lungs"):
        segment_module.predict(tmp_path / "a.nii.gz", exp_dir=nodule_run)


def test_nodules_of_a_folder_without_a_run_are_refused(lung_run, volume, tmp_path):
    source = save(tmp_path / "chest.nii.gz", volume)
    with pytest.raises(FileNotFoundError, match="--nodules None"):
        infer.infer(
            lung_run, tmp_path / "OUT", input=source, nodules=alone(tmp_path / "absent")
        )


def test_a_false_positive_network_that_is_missing_or_useless_is_refused(
    lung_run, nodule_run, reduction_run, volume, tmp_path
):
    source, out = save(tmp_path / "chest.nii.gz", volume), tmp_path / "OUT"
    with pytest.raises(FileNotFoundError, match="--reduction None"):
        runs_of = NoduleRuns(nodule_run, None, tmp_path / "absent")
        infer.infer(lung_run, out, input=source, nodules=runs_of)
    with pytest.raises(ValueError, match="no run finds nodules"):
        infer.infer(
            lung_run, out, input=source, nodules=NoduleRuns(None, None, reduction_run)
        )
    with pytest.raises(ValueError, match="judges candidates, not volumes"):
        infer.infer(lung_run, out, input=source, nodules=alone(reduction_run))


def test_runs_of_slices_that_are_missing_or_useless_are_refused(
    lung_run, nodule_run, slices_run, reduction_run, volume, tmp_path
):
    source, out = save(tmp_path / "chest.nii.gz", volume), tmp_path / "OUT"

    def find(*runs_of):
        infer.infer(lung_run, out, input=source, nodules=NoduleRuns(*runs_of))

    with pytest.raises(FileNotFoundError, match="--slices None"):
        find(nodule_run, tmp_path / "absent", reduction_run)
    with pytest.raises(
        ValueError, match="--reduction None; expected a run that judges"
    ):
        find(nodule_run, slices_run, None)
    with pytest.raises(ValueError, match="no run finds nodules"):
        find(None, slices_run, None)
    with pytest.raises(ValueError, match="expected a run for nodules in slices"):
        find(nodule_run, nodule_run, reduction_run)
    with pytest.raises(ValueError, match="expected a run for nodules in slices"):
        find(nodule_run, OUTLINES, reduction_run)
    # The runs that ship are left out without a word.
    find(nodule_run, CANDIDATES2D, None)
    assert rows_of(out).keys() == {"chest"}


def test_what_would_not_be_used_is_refused(lung_run, nodule_run, volume, tmp_path):
    source, out = save(tmp_path / "chest.nii.gz", volume), tmp_path / "OUT"
    unused = NoduleRuns(None, min_score=0.5)
    with pytest.raises(ValueError, match="--min_score 0.5, but no run finds"):
        infer.infer(lung_run, out, input=source, nodules=unused)
    unused = NoduleRuns(nodule_run, None, None, min_score=0.5)
    with pytest.raises(ValueError, match="no run finds nodules in lungs"):
        infer.infer(nodule_run, out, input=source, nodules=unused)
    with pytest.raises(ValueError, match="expected 0 to below 1"):
        replace(unused, min_score=1.0)
    with pytest.raises(ValueError, match="expected a run that finds nodules"):
        segment_module.predict(source, exp_dir=lung_run, nodules=NO_RUNS)
    with pytest.raises(ValueError, match="--reduction None"):
        segment_module.predict(
            source, exp_dir=lung_run, nodules=NoduleRuns(nodule_run, lung_run, None)
        )
    assert not out.exists()


def test_a_preset_fills_in_what_is_not_given():
    w1 = with_preset(infer.Lungs(), "w1")
    assert (w1.passes.n, w1.passes.mask_fraction, w1.labels.snap) == (100, 0.7, 0)
    given = infer.Lungs(Passes(n=3), LungMap(thresh=0.4), save_as="numpy")
    mixed = with_preset(given, "w1")
    assert (mixed.passes.n, mixed.labels.thresh, mixed.save_as) == (3, 0.4, "numpy")
    assert mixed.passes.mask_fraction == 0.7
    assert with_preset(given, "default") == given
