"""experiments/lung_comparison.py on scans whose masks are made by hand."""

import csv
import json
from dataclasses import replace

import numpy as np
import pytest

from ct.nifti_io import write_nifti
from ct.scan import reference_mask, scan_path, write_scan
from experiments import lung_comparison
from experiments.lung_comparison import Arguments
from metrics import calibration
from tests.conftest import SPACING_MM, tiny_scan


@pytest.fixture
def work(tmp_path):
    """Two scans; `whole` predicts the reference, `holed` lacks nodule 1 of the first."""
    for index in range(2):
        scan = tiny_scan(index)
        for folder in ("scans", "truth"):
            write_scan(scan, scan_path(tmp_path / folder, scan.scan_id), {})
        holed = scan.lung.copy()
        if index == 0:
            holed[scan.nodule_labels == 1] = 0
        for name, mask in (("whole", scan.lung), ("holed", holed)):
            folder = tmp_path / name / scan.scan_id
            for file, values in (
                ("mask", mask),
                ("mean", 0.9 * (mask > 0).astype(np.float32)),
            ):
                write_nifti(
                    folder / f"{file}.nii.gz", values, scan.grid, scan.source_grid
                )
    return tmp_path


def rows_of(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def compared(work, *methods, truth=True):
    arguments = Arguments(
        methods=tuple(f"{name}={work / name}" for name in methods),
        out=work / "out",
        scans=work / "scans",
        truth=work / "truth" if truth else None,
        draws=100,
    )
    report = lung_comparison.compare_lungs(arguments)
    return report, {
        name: rows_of(work / f"out/{name}.csv")
        for name in ("lungs", "nodules", "comparison")
    }


def cell(tables, run, score):
    return next(
        row
        for row in tables["comparison"]
        if (row["run"], row["score"]) == (run, score)
    )


def test_what_a_mask_lacks_is_counted(work):
    _, tables = compared(work, "whole", "holed")
    scan = tiny_scan(0)
    nodule = reference_mask(scan, consensus_level=0.5, min_readers=1)
    nodule &= scan.nodule_labels == 1
    lacks = {
        (row["method"], row["scan_id"], row["label"]): int(row["voxels"])
        - int(row["kept"])
        for row in tables["nodules"]
    }
    assert lacks["holed", "scan-000", "1"] == nodule.sum()
    assert sum(lacks.values()) == nodule.sum()
    every = sum(int(r["voxels"]) for r in tables["nodules"] if r["method"] == "whole")
    share = 1 - nodule.sum() / every
    inclusion = cell(tables, "holed", "Inclusion, all nodules")
    assert float(inclusion["value"]) == pytest.approx(share)
    assert float(inclusion["difference"]) == pytest.approx(share - 1)
    assert float(cell(tables, "whole", "Dice per scan")["value"]) == 1
    lung = (scan.lung > 0).sum()
    lost = ((scan.nodule_labels == 1) & (scan.lung > 0)).sum()
    dice = [float(r["dice"]) for r in tables["lungs"] if r["method"] == "holed"]
    assert dice == pytest.approx([2 * (lung - lost) / (2 * lung - lost), 1])


def test_the_distance_to_the_pleura_is_that_of_the_nearest_voxel(work):
    # Nodule 2 is a ball of 4 mm at (14, 34, 46) in an ellipse of 18 by 11 pixels around
    # (32, 46); slices 3 to 20 are lung, so slice 21 is the first outside.
    scan = tiny_scan(0)
    outside = np.argwhere(scan.lung == 0) * SPACING_MM
    voxels = np.argwhere(
        (scan.nodule_labels == 2)
        & reference_mask(scan, consensus_level=0.5, min_readers=1)
    )
    nearest = min(
        np.sqrt(((outside - v * SPACING_MM) ** 2).sum(1)).min() for v in voxels
    )
    _, tables = compared(work, "whole")
    row = next(
        r for r in tables["nodules"] if (r["scan_id"], r["label"]) == ("scan-000", "2")
    )
    assert float(row["pleura_mm"]) == pytest.approx(nearest, abs=1e-4)


def test_calibration_is_that_of_the_probabilities(work):
    # 0.9 is predicted in the mask and 0 elsewhere; the mask is right: 10 % too cautious,
    # however much air there is around it.
    compared(work, "whole")
    rows = rows_of(work / "out/calibration.csv")
    assert float(rows[0]["ece"]) == pytest.approx(0.1, rel=1e-4)
    assert (work / "out/calibration.png").stat().st_size > 1000


def test_without_a_reference_only_nodules_are_scored(work):
    _, tables = compared(work, "holed", truth=False)
    assert {row["dice"] for row in tables["lungs"]} == {"nan"}
    assert float(cell(tables, "holed", "Inclusion, all nodules")["value"]) < 1


def test_scan_files_are_a_method_and_a_missing_mask_is_listed(work):
    scan = tiny_scan(2)
    write_scan(scan, scan_path(work / "scans", scan.scan_id), {})
    report, tables = compared(work, "scans", "whole")
    assert [failure.scan_id for failure in report.failures] == ["scan-002"]
    assert "neither scan-002/mask.nii.gz nor scan-002.h5" in report.failures[0].reason
    assert len(tables["lungs"]) == 4
    other = replace(scan, lung=None)
    write_scan(other, scan_path(work / "scans", scan.scan_id), {})
    report, _ = compared(work, "scans")
    assert "no lung mask" in report.failures[0].reason


def test_a_part_of_a_split_is_scored_alone(work):
    parts = {"train": ["patient-000"], "validation": [], "test": ["patient-001"]}
    split = {"format_version": 1, "settings": {"unit": "patient"}, "parts": parts}
    (work / "split.json").write_text(json.dumps(split))
    arguments = Arguments(
        methods=(f"whole={work / 'whole'}",),
        out=work / "out",
        scans=work / "scans",
        split=work / "split.json",
    )
    lung_comparison.compare_lungs(arguments)
    assert [row["scan_id"] for row in rows_of(work / "out/lungs.csv")] == ["scan-001"]
    with pytest.raises(ValueError, match="no scan of the validation patients"):
        lung_comparison.compare_lungs(replace(arguments, part="validation"))


@pytest.mark.parametrize("methods", [("whole",), ("a=x", "a=y"), ("=x",)])
def test_a_method_without_name_or_folder_is_refused(methods, tmp_path):
    with pytest.raises(ValueError, match=r"expected NAME=FOLDER"):
        lung_comparison.compare_lungs(Arguments(methods=methods, out=tmp_path / "out"))


def test_reliability_by_hand():
    prob = np.array([0.1, 0.1, 0.1, 0.1, 0.8, 0.8, 1.0, 0.0])
    truth = np.array([0, 0, 0, 1, 1, 1, 1, 0], bool)
    counts = calibration.reliability_counts(prob, truth, bins=2)
    assert counts == pytest.approx(np.array([[4, 0.4, 1], [3, 2.6, 3]]))
    curve = calibration.reliability(counts + counts)  # cases add
    assert curve.probability == pytest.approx([0.1, 2.6 / 3])
    assert curve.observed == pytest.approx([0.25, 1])
    assert curve.ece == pytest.approx((0.6 + 0.4) / 7)
