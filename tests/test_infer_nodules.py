"""infer.py with a 3-D network that takes something for nodules, on a small chest."""

import csv
import json
from dataclasses import replace

import numpy as np
import pytest

import config
import infer
import postprocess
from ct.nifti_io import read_nifti
from ct.scan import scan_path, write_scan
from inference import segment
from inference.passes import Passes
from lungs.classical import segment_lungs
from tests.infer_calls import WITHOUT_SKIN, save
from training.runs import read_settings


@pytest.fixture(scope="module")
def run(make_lung_run, tmp_path_factory):
    """A network that finds voxels near -850 HU, and calls them nodules."""
    folder = tmp_path_factory.mktemp("runs") / "nodules"
    settings = read_settings(
        make_lung_run(tmp_path_factory.mktemp("runs") / "for settings")
    )
    experiment = replace(
        settings,
        batches=replace(settings.batches, target="nodule"),
        postprocess=replace(settings.postprocess, method="fixed"),
    )
    return make_lung_run(folder, experiment=experiment)


@pytest.fixture(scope="module")
def chest(chest_scan):
    """With lung labels, and what looks like a nodule far from them and one in them."""
    hu = chest_scan.hu.copy()
    lung = segment_lungs(hu, chest_scan.spacing_mm, config.LungMask())
    hu[lung > 0] = -600
    z, y, x = (int(np.median(found)) for found in np.nonzero(lung == 1))
    hu[z - 3 : z + 3, y - 8 : y + 8, x - 8 : x + 8] = -850
    hu[:, :10, :10] = -850
    return replace(chest_scan, hu=hu, lung=lung), (z, y, x)


def infer_chest(run, chest, tmp_path, **passes):
    write_scan(chest, scan_path(tmp_path / "scans", chest.scan_id), {})
    lungs = segment.Lungs(passes=Passes(**passes))
    infer.infer(run, tmp_path / "out", scans=tmp_path / "scans", lungs=lungs)
    return tmp_path / "out"


def test_nodules_are_looked_for_in_the_lungs_in_one_pass(run, chest, tmp_path):
    scan, (z, y, x) = chest
    out = infer_chest(run, scan, tmp_path)
    prob, _ = read_nifti(out / "chest/prob.nii.gz")
    assert prob[z, y, x] > 0.99
    assert not prob[:, :10, :10].any()
    assert not (out / "chest/std.nii.gz").exists()
    assert json.loads((out / "predictions.json").read_text())["scans"]["chest"]


def test_several_passes_say_how_sure_a_nodule_is(run, chest, tmp_path):
    scan, _ = chest
    out = infer_chest(run, scan, tmp_path, n=4)
    std, _ = read_nifti(out / "chest/std.nii.gz")
    postprocess.postprocess_predictions(
        postprocess.Arguments(predictions=out, scans=tmp_path / "scans", run=run)
    )
    with (out / "chest/nodules.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    labels, _ = read_nifti(out / "chest/mask.nii.gz")
    assert rows
    for row in rows:
        own = labels == int(row["nodule_id"])
        assert float(row["score_std"]) == pytest.approx(std[own].mean(), abs=1e-3)
        assert float(row["pleura_distance_mm"]) >= 0
    assert max(float(row["score_std"]) for row in rows) > 0.05


def test_probabilities_of_nodules_have_no_nnunet_form(nodule_run, volume, tmp_path):
    source = save(tmp_path / "chest.nii.gz", volume)
    lungs = replace(WITHOUT_SKIN, save_as="nnunet")
    with pytest.raises(ValueError, match="gives nodule probabilities; expected a run"):
        infer.infer(
            nodule_run,
            tmp_path / "OUT",
            input=source,
            lungs=lungs,
            nodules=segment.NO_RUNS,
        )
