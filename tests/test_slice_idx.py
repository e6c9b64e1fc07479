"""The split: who is in which part, and that no patient is in two."""

import json
import re
import shutil
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

import config
import slice_idx
import steps
import table
from ct import scan as scans_module
from dataset.slice_table import SliceTable
from dataset.split import (
    PARTS,
    patients_of_part,
    read_split,
    rows_of_part,
    slices_of_part,
    split_sha256,
)
from tests.conftest import tiny_scan

FOLDS = config.Split(method="folds", folds=5)
SUBSETS = config.Split(method="subsets", folds=10)


def cohort(sizes):
    """Patients by stratum: {"none": 30} gives none-000 to none-029."""
    return {f"{name}-{i:03}": name for name, n in sizes.items() for i in range(n)}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("made")
    for scan in map(tiny_scan, range(10)):
        scans_module.write_scan(scan, folder / f"scans/{scan.scan_id}.h5", {})
    settings = config.Table(size_px=(64, 64))
    table.write_table(folder / "scans", folder / "table.h5", settings)
    return folder


@pytest.fixture
def table_path(made, tmp_path):
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    return tmp_path / "table.h5"


def written(table_path, settings=None, name="split.json", **options):
    out = table_path.with_name(name)
    slice_idx.write_split(table_path, out, settings or config.Split(), **options)
    return out


@pytest.mark.parametrize("settings", [config.Split(), FOLDS])
@pytest.mark.parametrize("patients", [5, 7, 10, 99])
def test_every_patient_is_in_exactly_one_part_and_no_part_is_empty(settings, patients):
    strata = cohort({"none": patients // 3, "small": patients - patients // 3})
    parts = slice_idx.split_patients(strata, settings)
    assert sorted(p for members in parts.values() for p in members) == sorted(strata)
    assert all(parts[part] for part in PARTS)


def test_parts_have_their_shares_of_the_whole_and_of_every_stratum():
    sizes = {
        "none": 40,
        "below 6 mm": 100,
        "6 to 10 mm": 33,
        "10 to 20 mm": 20,
        "big": 7,
    }
    parts = slice_idx.split_patients(cohort(sizes), config.Split())
    assert [len(parts[part]) for part in PARTS] == [140, 20, 40]
    for stratum, size in sizes.items():
        for part, share in zip(PARTS, (0.7, 0.1, 0.2), strict=True):
            found = sum(patient.startswith(stratum) for patient in parts[part])
            assert abs(found - share * size) < 2


def test_the_order_of_the_patients_does_not_matter_and_the_seed_does():
    strata = cohort({"none": 20, "small": 20})
    turned = dict(reversed(strata.items()))
    for settings in (config.Split(), FOLDS):
        parts = slice_idx.split_patients(strata, settings)
        assert slice_idx.split_patients(turned, settings) == parts
        other = slice_idx.split_patients(strata, replace(settings, seed=1))
        assert other != parts


def test_held_out_patients_are_the_test_part_and_the_others_are_divided():
    strata = cohort({"none": 20, "small": 10})
    settings = config.Split(
        held_out=("small-003", "none-007"), fractions=(0.6, 0.2, 0.2)
    )
    parts = slice_idx.split_patients(strata, settings)
    assert parts["test"] == ["none-007", "small-003"]
    assert len(parts["train"]) == 21
    assert len(parts["validation"]) == 7
    assert sorted(parts["train"] + parts["validation"] + parts["test"]) == sorted(
        strata
    )
    with pytest.raises(ValueError, match=r"held_out names other; the table has 30"):
        slice_idx.split_patients(strata, replace(settings, held_out=("other",)))
    none = replace(settings, fractions=(0.0, 0.5, 0.5))
    with pytest.raises(ValueError, match=r"fraction of train above 0, found 0.0"):
        slice_idx.split_patients(strata, none)
    with pytest.raises(ValueError, match="leaves no patient for training"):
        slice_idx.split_patients({"one": "none"}, replace(settings, held_out=("one",)))
    with pytest.raises(ValueError, match="method ratios"):
        replace(FOLDS, held_out=("small-003",))


def test_over_all_folds_every_patient_is_tested_once_and_validates_once():
    strata = cohort({"none": 11, "small": 12})
    tested, validating = Counter(), Counter()
    for fold in range(5):
        parts = slice_idx.split_patients(strata, replace(FOLDS, fold=fold))
        tested.update(parts["test"])
        validating.update(parts["validation"])
        assert not set(parts["train"]) & {*parts["test"], *parts["validation"]}
        following = slice_idx.split_patients(
            strata, replace(FOLDS, fold=(fold + 1) % 5)
        )
        assert parts["validation"] == following["test"]
    assert tested == validating == Counter(list(strata))


@pytest.mark.parametrize(
    ("total", "fractions", "expected"),
    [
        (10, (0.7, 0.1, 0.2), [7, 1, 2]),
        (1010, (0.7, 0.1, 0.2), [707, 101, 202]),
        (4, (0.7, 0.1, 0.2), [2, 1, 1]),  # 2.8, 0.4, 0.8 round to 3, 0, 1
        (3, (0.7, 0.1, 0.2), [1, 1, 1]),
        (2, (0.7, 0.1, 0.2), [1, 0, 1]),
        (2, (0.8, 0.0, 0.2), [1, 0, 1]),
        (5, (0.8, 0.2, 0.0), [4, 1, 0]),
        (7, (1 / 3, 1 / 3, 1 / 3), [3, 2, 2]),
    ],
)
def test_counts_of_small_cohorts(total, fractions, expected):
    assert slice_idx.part_counts(total, fractions) == expected


def test_too_few_patients_are_refused():
    with pytest.raises(ValueError, match="1 patients; a split needs at least 2"):
        slice_idx.split_patients({"a": "none"}, config.Split())
    with pytest.raises(ValueError, match="folds is 5, but the table has 4 patients"):
        slice_idx.split_patients(cohort({"none": 4}), FOLDS)
    with pytest.raises(
        ValueError, match="patient is left for training; expected 3 or more"
    ):
        slice_idx.split_patients(cohort({"none": 4}), replace(FOLDS, folds=2))


def test_luna16_subsets_are_the_folds():
    pairs = [(f"p{i}", f"subset{i % 10}") for i in range(40)]
    parts = slice_idx.split_subsets(pairs, replace(SUBSETS, fold=9))
    assert parts["test"] == ["p19", "p29", "p39", "p9"]
    assert parts["validation"] == ["p0", "p10", "p20", "p30"]
    assert len(parts["train"]) == 32


@pytest.mark.parametrize(
    ("pairs", "message"),
    [
        ([("p1", "subset0"), ("p2", "")], "patient p2 has a scan in no subset"),
        ([("p1", "subset3"), ("p1", "subset7")], "p1 has scans in subset3 and subset7"),
        ([("p1", "Tr"), ("p2", "Ts")], r"2 subsets \(Tr, Ts\).*at least 3"),
    ],
)
def test_subsets_that_leak_or_are_not_there_are_refused(pairs, message):
    with pytest.raises(ValueError, match=message):
        slice_idx.split_subsets(pairs, SUBSETS)


def test_strata_go_by_the_largest_nodule(scans, tmp_path):
    # The largest nodule of a tiny scan has diameters of 10 to 13 mm: mean 11.5.
    small = replace(scans[1], nodules=scans[1].nodules[1:])  # 8 mm
    nothing = np.zeros_like(scans[2].lung)
    healthy = replace(scans[2], nodules=(), reader_bits=nothing, nodule_labels=nothing)
    second = replace(scans[3], patient_id=small.patient_id)  # the same patient again
    for scan in (scans[0], small, healthy, second):
        scans_module.write_scan(scan, tmp_path / f"scans/{scan.scan_id}.h5", {})
    settings = config.Table(size_px=(64, 64))
    table.write_table(tmp_path / "scans", tmp_path / "table.h5", settings)
    with SliceTable(tmp_path / "table.h5") as opened:
        assert slice_idx.strata_of_patients(opened) == {
            "patient-000": "10 to 20 mm",
            "patient-001": "10 to 20 mm",
            "patient-002": "none",
        }


def test_rows_of_the_parts_partition_the_table_by_patient(table_path):
    split = read_split(written(table_path))
    with SliceTable(table_path) as opened:
        rows = {part: rows_of_part(split, opened, part) for part in PARTS}
        assert np.array_equal(
            np.sort(np.concatenate(list(rows.values()))), np.arange(len(opened))
        )
        for part in PARTS:
            assert np.array_equal(rows[part], np.unique(rows[part]))
            assert set(opened.patient_ids[rows[part]]) == set(split["parts"][part])
            members = patients_of_part(split, part)
            assert members == sorted(split["parts"][part])
    assert split["nodules"]["train"] == {"10 to 20 mm": 7}
    assert not split["leaks"]


def test_the_split_by_slice_is_marked_as_leaking_and_does_leak(table_path):
    out = table_path.with_name("slices.json")
    settings = config.Split(unit="slice")
    report = slice_idx.write_split(table_path, out, settings)
    split = read_split(out)
    assert split["leaks"]
    assert "LEAKS" in report.line
    with SliceTable(table_path) as opened:
        rows = [rows_of_part(split, opened, part) for part in PARTS]
        assert sorted(np.concatenate(rows).tolist()) == list(range(len(opened)))
        assert [len(r) for r in rows] == [112, 16, 32]
        assert set(opened.patient_ids[rows[0]]) & set(opened.patient_ids[rows[2]])
        patients = set(opened.patient_ids[rows[2]].tolist())
    assert patients_of_part(split, "test") == sorted(patients)
    tested = slices_of_part(split, "test")
    assert sum(map(len, tested.values())) == 32
    assert all(z == sorted(set(z)) for z in tested.values())
    with pytest.raises(
        ValueError, match="unit=slice does not work with split.method=subsets"
    ):
        slice_idx.write_split(table_path, out, replace(SUBSETS, unit="slice"))


def test_a_split_of_other_patients_is_refused(table_path, scans, tmp_path):
    split = read_split(written(table_path))
    newcomer = replace(scans[0], scan_id="new", patient_id="zoe")
    scans_module.write_scan(newcomer, tmp_path / "scans/new.h5", {})
    (tmp_path / "scans/scan-000.h5").unlink()
    settings = config.Table(size_px=(64, 64))
    table.write_table(tmp_path / "scans", table_path, settings, overwrite=True)
    with (
        SliceTable(table_path) as opened,
        pytest.raises(
            ValueError, match="zoe only in the table, patient-000 only in the "
        ),
    ):
        rows_of_part(split, opened, "train")


def test_one_series_under_two_patients_is_refused(scans, tmp_path):
    for scan in scans[:3]:
        again = replace(scan, series_uid="1.2.3" if scan is not scans[1] else "1.2.4")
        scans_module.write_scan(again, tmp_path / f"scans/{scan.scan_id}.h5", {})
    settings = config.Table(size_px=(64, 64))
    table.write_table(tmp_path / "scans", tmp_path / "table.h5", settings)
    with pytest.raises(ValueError, match=r"1\.2\.3 .*patient-002 and as patient-000"):
        written(tmp_path / "table.h5")


def test_two_patients_are_split_without_a_leak_and_said_so(scans, tmp_path):
    for scan in scans[:2]:
        scans_module.write_scan(scan, tmp_path / f"scans/{scan.scan_id}.h5", {})
    settings = config.Table(size_px=(64, 64))
    table.write_table(tmp_path / "scans", tmp_path / "table.h5", settings)
    out = tmp_path / "split.json"
    report = slice_idx.write_split(tmp_path / "table.h5", out, config.Split())
    assert report.line.endswith("EMPTY: validation")
    split = read_split(out)
    assert [len(split["parts"][part]) for part in PARTS] == [1, 0, 1]
    with SliceTable(tmp_path / "table.h5") as opened:
        assert len(rows_of_part(split, opened, "validation")) == 0


def test_an_equal_split_stays_and_another_is_replaced_only_when_told(table_path):
    out = written(table_path)
    before = out.read_text()
    report = slice_idx.write_split(table_path, out, config.Split())
    assert report.line.endswith("is complete")
    assert out.read_text() == before
    with pytest.raises(ValueError, match="exists and holds another split.*--overwrite"):
        written(table_path, config.Split(seed=1))
    written(table_path, config.Split(seed=1), overwrite=True)
    assert out.read_text() != before


def edited(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_a_split_edited_by_hand_is_taken_only_without_its_checksum(table_path):
    out = written(table_path)
    record = json.loads(out.read_text())
    parts = record["parts"]
    parts["test"].append(parts["train"].pop())
    edited(out, parts=parts)
    with pytest.raises(ValueError, match="was edited. Remove its sha256 to accept"):
        read_split(out)
    bare = {key: record[key] for key in ("format_version", "settings")}
    out.write_text(json.dumps(bare | {"parts": parts}))
    split = read_split(out)
    assert split["sha256"] == split_sha256(parts)
    assert split["leaks"] is False


def test_a_patient_in_two_parts_is_refused(table_path):
    out = written(table_path)
    parts = json.loads(out.read_text())["parts"]
    leaked = parts["train"][0]
    parts["test"].append(leaked)
    edited(out, parts=parts)
    with pytest.raises(
        ValueError, match=f"{leaked} is listed twice, in train and test"
    ):
        read_split(out)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("not JSON", "is not a split; run slice_idx.py again"),
        ("[]", "is not a split; run slice_idx.py again"),
        ('{"format_version": 0, "parts": {}}', "split format 0 and parts .*expected 1"),
    ],
)
def test_what_is_no_split_is_refused(tmp_path, text, message):
    path = tmp_path / "split.json"
    with pytest.raises(FileNotFoundError, match="run slice_idx.py first"):
        read_split(path)
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        read_split(path)


def test_the_checksum_is_of_who_is_where(table_path):
    parts = {"train": ["a", "b"], "validation": [], "test": ["c"]}
    turned = parts | {"train": ["b", "a"]}
    moved = {"train": ["a"], "validation": ["b"], "test": ["c"]}
    assert split_sha256(parts) == split_sha256(turned)
    assert split_sha256(parts) != split_sha256(moved)


def test_nnunet_gets_every_fold_by_scan(table_path):
    with SliceTable(table_path) as opened:
        folds = slice_idx.nnunet_splits(opened, FOLDS)
        scan_ids = sorted(opened.scans["scan_id"].tolist())
    assert len(folds) == 5
    assert sorted(s for fold in folds for s in fold["val"]) == scan_ids
    for fold in folds:
        assert sorted(fold["train"] + fold["val"]) == scan_ids


def test_the_command_line_splits_and_refuses(table_path, capsys):
    out = table_path.with_name("split.json")
    words = ["thesis", "--table", str(table_path), "--out", str(out)]
    for seed, code in (("0", steps.DONE), ("0", steps.DONE), ("1", steps.FAILED)):
        with pytest.raises(SystemExit) as ended:
            slice_idx.main([*words, "--split.seed", seed])
        assert ended.value.code == code
    said = capsys.readouterr()
    assert re.search(r"split.json: patients 7 train, 1 validation, 2 test", said.out)
    assert said.err.startswith("error: ")
    with pytest.raises(SystemExit) as ended:
        slice_idx.main([*words, "--split.method", "luck"])
    assert ended.value.code == steps.USAGE
    nnunet = table_path.with_name("splits_final.json")
    for code in (steps.DONE, steps.FAILED):
        with pytest.raises(SystemExit) as ended:
            slice_idx.main([*words, "--nnunet", str(nnunet)])
        assert ended.value.code == code
    assert "splits_final.json exists; add --overwrite" in capsys.readouterr().err
    assert len(json.loads(nnunet.read_text())) == config.Split().folds
