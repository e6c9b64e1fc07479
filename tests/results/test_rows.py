"""Rows of lungs.csv."""

from dataclasses import replace

from results.rows import read_lung_rows, write_lung_rows


def test_rows_of_lungs_without_later_columns_are_read_as_before(tmp_path):
    path = tmp_path / "lungs.csv"
    path.write_text(
        "pid,n,right_ml,left_ml,score,flag,reason,seconds\nP1,1,2.0,3.0,0.9,0,,1.0\n"
    )
    (row,) = read_lung_rows(path)
    assert (row.pid, row.warnings, row.nodules_searched) == ("P1", "", "")
    write_lung_rows(path, [replace(row, warnings="odd; indeed")])
    (row,) = read_lung_rows(path)
    assert row.warnings == "odd; indeed"
    path.write_text(
        "pid,n,right_ml,left_ml,score,flag,reason,seconds,warnings\n"
        "P1,1,2.0,3.0,0.9,0,,1.0,odd\n"
    )
    (row,) = read_lung_rows(path)
    assert (row.warnings, row.unsearched_ml) == ("odd", 0.0)
