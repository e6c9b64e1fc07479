"""experiments/ablation_table.py on scores small enough to count by hand."""

import csv
import json

import pytest

from experiments import ablation_table
from experiments.ablation_table import Arguments

FIELDS = (
    *("scan_id", "patient_id", "tp", "fp", "fn", "dice", "dice_nodule_slices"),
    *("nodules", "nodules_hit", "false_positives"),
)


def write_scores(folder, rows, *, by_slice=False):
    folder.mkdir()
    with (folder / "scores.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(FIELDS)
        writer.writerows(rows)
    record = {
        "protocol": ["Whole scans.", "Research code, not a medical device."],
        "setting": {"part": "test", "by_slice": by_slice},
    }
    (folder / "scores.json").write_text(json.dumps(record))
    return folder


def table_of(tmp_path, *folders):
    ablation_table.ablation_table(
        Arguments(scores=folders, out=tmp_path / "out", draws=200)
    )
    with (tmp_path / "out/ablations.csv").open(newline="") as file:
        return {(row["run"], row["score"]): row for row in csv.DictReader(file)}


@pytest.fixture
def base(tmp_path):
    # Pooled Dice 2 * 15 / (2 * 15 + 5 + 5) = 0.75; both patients alike, so no spread.
    rows = [
        ("b", "B", 10, 0, 0, 1.0, 1.0, 1, 1, 0),
        ("a", "A", 5, 5, 5, 0.5, 0.5, 2, 1, 3),
    ]
    return write_scores(tmp_path / "base", rows)


def test_scores_of_the_first_run_have_no_difference(tmp_path, base):
    cells = table_of(tmp_path, base)
    assert float(cells["base", "Dice, pooled"]["value"]) == 0.75
    assert float(cells["base", "Nodule sensitivity"]["value"]) == pytest.approx(2 / 3)
    assert float(cells["base", "False positives per scan"]["value"]) == 1.5
    assert cells["base", "Dice, pooled"]["difference"] == ""


def test_a_difference_is_taken_on_the_same_patients(tmp_path, base):
    # Every patient's Dice is 0.1 lower, so every draw gives -0.1 however they vary.
    rows = [
        ("a", "A", 4, 6, 6, 0.4, "nan", 2, 1, 3),
        ("b", "B", 8, 2, 2, 0.9, 0.8, 1, 1, 0),
    ]
    other = write_scores(tmp_path / "other", rows)
    cell = table_of(tmp_path, base, other)["other", "Dice per scan"]
    for name in ("difference", "diff_low", "diff_high"):
        assert float(cell[name]) == pytest.approx(-0.1)
    text = (tmp_path / "out/ablations.md").read_text()
    assert "-0.100 (-0.100 to -0.100) |" in text  # two patients prove nothing
    assert "too narrow with fewer than 10 patients" in text
    assert "not a medical device" in text


def test_a_run_scored_on_other_cases_is_not_paired(tmp_path, base):
    rows = [
        ("a", "A", 4, 0, 0, 1.0, 1.0, 1, 1, 0),
        ("b", "B", 8, 0, 0, 1.0, 1.0, 1, 1, 0),
    ]
    other = write_scores(tmp_path / "leaky", rows, by_slice=True)
    cells = table_of(tmp_path, base, other)
    assert cells["leaky", "Dice, pooled"]["value"] == "1.0"
    assert cells["leaky", "Dice, pooled"]["difference"] == ""
    text = (tmp_path / "out/ablations.md").read_text()
    assert "<br>unpaired" in text
    assert "leaky: split by slice, so tested patients were also TRAINED on" in text


def test_a_difference_that_excludes_zero_is_marked_with_enough_patients(tmp_path):
    rows = [(f"s{i}", f"P{i}", 5, 5, 5, 0.5, 0.5, 1, 1, 0) for i in range(12)]
    worse = [(f"s{i}", f"P{i}", 4, 6, 6, 0.4, 0.4, 1, 1, 0) for i in range(12)]
    table_of(
        tmp_path,
        write_scores(tmp_path / "a", rows),
        write_scores(tmp_path / "b", worse),
    )
    text = (tmp_path / "out/ablations.md").read_text()
    assert "-0.100 (-0.100 to -0.100) (!)" in text


def test_runs_that_were_scored_otherwise_are_refused(tmp_path, base):
    rows = [("a", "A", 1, 0, 0, 1, 1, 1, 1, 0)]
    other = write_scores(tmp_path / "other", rows)
    record = json.loads((other / "scores.json").read_text())
    record["setting"]["part"] = "validation"
    (other / "scores.json").write_text(json.dumps(record))
    with pytest.raises(ValueError, match="on both with the same options"):
        table_of(tmp_path, base, other)


def test_a_folder_without_scores_is_named(tmp_path, base):
    with pytest.raises(FileNotFoundError, match="scores.csv; run evaluate.py first"):
        table_of(tmp_path, base, tmp_path / "absent")


def test_two_runs_of_one_name_are_refused(tmp_path, base):
    (tmp_path / "b").mkdir()
    twin = write_scores(tmp_path / "b/base", [("a", "A", 1, 0, 0, 1, 1, 1, 1, 0)])
    with pytest.raises(ValueError, match="share a name: base, base"):
        table_of(tmp_path, base, twin)


def test_a_difference_is_of_scans_where_both_runs_have_the_score():
    from experiments import paired

    distances = {"a": 3.0, "b": 3.0, "c": 3.0, "d": 40.0}
    base = [{"patient_id": p, "hd95_mm": mm} for p, mm in distances.items()]
    rows = [dict(row) for row in base]
    rows[3]["hd95_mm"] = float("nan")
    measure = paired.mean_of("hd95_mm", "HD95")
    (cell,) = paired.compare("other", rows, base, [measure], draws=100)
    assert cell.interval.value == 3
    assert cell.difference is not None
    assert cell.difference.value == 0
