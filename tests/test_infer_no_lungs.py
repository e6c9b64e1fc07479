"""infer.py on scans without lungs, or with parts of the mask that are none."""

import csv
import json

import numpy as np
import pytest

import infer
from tests.infer_calls import AFFINE, WITHOUT_SKIN, alone, read, run_main, save

SHAPE = (100, 100, 60)
"""(x, y, z) voxels of 3 x 3 x 5 mm, 300 mm along each axis."""


def ball(centre, radius_mm):
    index = np.ogrid[tuple(slice(n) for n in SHAPE)]
    steps_mm = zip(index, centre, (3, 3, 5), strict=True)
    return sum(((i - c) * mm) ** 2 for i, c, mm in steps_mm) <= radius_mm**2


def water():
    """A ball of water in air."""
    return np.where(ball((50, 50, 30), 100), np.int16(0), np.int16(-1000))


def head():
    """A ball of brain in a skull, with a sinus of gas."""
    hu = np.where(ball((50, 50, 30), 90), np.int16(1000), np.int16(-1000))
    hu[ball((50, 50, 30), 84)] = 35
    hu[ball((50, 32, 20), 18)] = -1000
    return hu


def abdomen():
    """Tissue with a bowel full of gas."""
    hu = np.where(ball((50, 50, 30), 130), np.int16(40), np.int16(-1000))
    for x in (30, 44, 58):
        hu[ball((x, 40, 28), 16)] = -990
    return hu


def table(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("scan", [water, head, abdomen])
def test_without_lungs_nothing_is_found_and_the_scan_is_flagged(
    lung_run,
    nodule_run,
    tmp_path,
    scan,
):
    source, out = save(tmp_path / "ct.nii.gz", scan()), tmp_path / "OUT"
    code = run_main(
        *("--input", source, "--result_dir", out, "--n", 1),
        *("--exp_dir", lung_run, "--nodules", nodule_run),
        *("--slices", "None", "--reduction", "None"),
    )
    assert code == 0
    assert not read(out / "ct/mask.nii.gz").any()
    assert not read(out / "ct/nodules.nii.gz").any()
    (row,) = table(out / "lungs.csv")
    assert row["flag"] == "1" and "no lung was found" in row["reason"]
    assert row["nodules_searched"] == "no"
    assert table(out / "nodules.csv") == table(out / "candidates.csv") == []
    facts = json.loads((out / "predictions.json").read_text())["scans"]["ct"]
    assert facts["nodules_searched"] == "no"


def infer_with(lung_run, nodule_run, source, out):
    return infer.infer(
        lung_run, out, input=source, lungs=WITHOUT_SKIN, nodules=alone(nodule_run)
    )


def test_lungs_that_the_scan_cuts_are_searched_in_part(
    lung_run,
    nodule_run,
    volume,
    tmp_path,
):
    source = save(tmp_path / "ct.nii.gz", np.ascontiguousarray(volume[..., :26]))
    report = infer_with(lung_run, nodule_run, source, tmp_path / "OUT")
    (row,) = table(tmp_path / "OUT/lungs.csv")
    assert row["nodules_searched"] == "partly"
    mask = read(tmp_path / "OUT/ct/mask.nii.gz")
    at_the_end_ml = (mask[..., -1] > 0).sum() * 45 / 1000
    assert float(row["unsearched_ml"]) == pytest.approx(at_the_end_ml, abs=1e-3)
    assert "not searched" not in report.line


def test_a_scan_upside_down_is_not_searched(
    lung_run,
    nodule_run,
    volume,
    tmp_path,
):
    turned = np.ascontiguousarray(volume[..., ::-1])
    source = save(tmp_path / "ct.nii.gz", turned, AFFINE)
    report = infer_with(lung_run, nodule_run, source, tmp_path / "OUT")
    assert report.line.endswith("0 nodules, 1 scan not searched")
    (row,) = table(tmp_path / "OUT/lungs.csv")
    assert row["nodules_searched"] == "no"
    both_ml = float(row["right_ml"]) + float(row["left_ml"])
    assert float(row["unsearched_ml"]) == pytest.approx(both_ml, abs=1e-3)


@pytest.fixture
def with_bowel(volume, tmp_path):
    """`volume` with 81 ml of gas in two slices below the lungs."""
    hu = volume.copy()
    hu[35:65, 17:47, :2] = -905
    return save(tmp_path / "ct.nii.gz", hu)


@pytest.mark.parametrize("anatomy", [True, False])
def test_gas_below_the_lungs_is_left_out_or_not_searched(
    lung_run, nodule_run, with_bowel, tmp_path, anatomy
):
    out = tmp_path / "OUT"
    code = run_main(
        *("--input", with_bowel, "--result_dir", out, "--n", 1, "--snap", 0),
        *("--exp_dir", lung_run, "--nodules", nodule_run, "--min_volume_mm3", 60_000),
        *("--slices", "None", "--reduction", "None"),
        *([] if anatomy else ["--no-anatomy"]),
    )
    assert code == 0
    (row,) = table(out / "lungs.csv")
    bowel_ml = (read(out / "ct/mask.nii.gz")[..., :2] > 0).sum() * 45 / 1000
    facts = json.loads((out / "predictions.json").read_text())["scans"]["ct"]
    if anatomy:
        assert bowel_ml == 0
        assert "gas below the lungs were left out" in row["warnings"]
        assert facts["warnings"] == row["warnings"].split("; ")
        assert (row["flag"], row["nodules_searched"]) == ("0", "yes")
        assert float(row["unsearched_ml"]) == 0
    else:
        assert bowel_ml == pytest.approx(81, rel=0.2)
        assert "gas below the lungs may be no lung" in row["reason"]
        assert (row["flag"], row["nodules_searched"]) == ("1", "partly")
        assert float(row["unsearched_ml"]) == pytest.approx(bowel_ml, abs=1e-3)
