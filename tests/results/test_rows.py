"""Rows of lungs.csv."""

from dataclasses import replace

from results.rows import read_lung_rows, write_lung_rows


def test_rows_of_lungs_without_warnings_are_read_as_before(tmp_path):
    path = tmp_path / "lungs.csv"
    path.write_text(
        "pid,n,right_ml,left_ml,score,flag,reason,seconds\nP1,1,2.0,3.0,0.9,0,,1.0\n"
    )
    (row,) = read_lung_rows(path)
    assert (row.pid, row.warnings) == ("P1", "")
    write_lung_rows(path, [replace(row, warnings="odd; indeed")])
    (row,) = read_lung_rows(path)
    assert row.warnings == "odd; indeed"
