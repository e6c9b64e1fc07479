"""experiments/lung_labels.py: what is added to a mask, and what is not."""

import csv
from dataclasses import replace

import numpy as np
import pytest

from ct.scan import LEFT, RIGHT, ScanError, read_scan, scan_path, write_scan
from experiments import lung_labels
from experiments.lung_labels import Arguments, Ellipse
from tests.conftest import tiny_scan


def test_nodules_and_ellipses_take_the_side_of_the_nearest_lung():
    scan = tiny_scan()
    hole = scan.lung.copy()
    hole[scan.nodule_labels > 0] = 0  # nodule 1 lies in the right lung, 2 in the left
    lung = lung_labels.corrected_lung(replace(scan, lung=hole), ())
    assert np.array_equal(lung, np.where(scan.nodule_labels > 0, scan.lung, hole))
    # 3 pixels in front of the right lung's front end at (14, 18), radii 2 and 1.
    beyond = lung_labels.corrected_lung(scan, [Ellipse(10, 11, (11, 18), (2, 1))])
    added = np.argwhere(beyond != scan.lung).tolist()
    expected = [(9, 18), (10, 18), (11, 17), (11, 18), (11, 19), (12, 18), (13, 18)]
    assert added == [[z, y, x] for z in (10, 11) for y, x in expected]
    assert beyond[10, 11, 18] == RIGHT
    assert (beyond == LEFT).sum() == (scan.lung == LEFT).sum()


def test_bone_and_what_is_not_below_the_given_hu_are_not_added():
    scan = tiny_scan()
    hu = scan.hu.copy()
    hu[10, 11, 18] = 700
    lung = lung_labels.corrected_lung(
        replace(scan, hu=hu), [Ellipse(10, 10, (11, 18), (2, 1))]
    )
    assert lung[10, 11, 18] == 0
    assert lung[10, 10, 18] == RIGHT
    aerated = Ellipse(10, 10, (11, 18), (2, 1), below_hu=float(hu[10, 10, 18]))
    lung = lung_labels.corrected_lung(replace(scan, hu=hu), [aerated])
    assert lung[10, 10, 18] == 0


def test_an_ellipse_is_removed_except_where_a_reader_saw_a_nodule():
    scan = tiny_scan()
    z, y, x = np.argwhere(scan.reader_bits > 0)[0].tolist()
    rings = [Ellipse(z, z, (y, x), (1, 1), is_lung=False)]
    cross = {(y, x), (y - 1, x), (y + 1, x), (y, x - 1), (y, x + 1)}
    lung = lung_labels.corrected_lung(scan, rings)
    left_out = {(b, c) for a, b, c in np.argwhere(lung != scan.lung).tolist() if a == z}
    inside = {at for at in cross if scan.lung[z, *at] and not scan.reader_bits[z, *at]}
    assert left_out == inside
    assert inside
    assert lung[z, y, x] == scan.lung[z, y, x]


def test_a_scan_without_mask_and_an_ellipse_outside_are_refused():
    scan = tiny_scan()
    with pytest.raises(ScanError, match=r"no lung mask; run preprocess\.py"):
        lung_labels.corrected_lung(replace(scan, lung=None), ())
    outside = Ellipse(20, len(scan.hu), (11, 18), (2, 1))
    with pytest.raises(ScanError, match=r"slices 20 to 24; the scan has 0 to 23"):
        lung_labels.corrected_lung(scan, [outside])


@pytest.fixture
def work(tmp_path):
    scan = tiny_scan()
    write_scan(scan, scan_path(tmp_path / "scans", scan.scan_id), {})
    return tmp_path


def corrections(work, *rows, columns=lung_labels.COLUMNS):
    path = work / "corrections.csv"
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        writer.writerows(rows)
    return Arguments(out=work / "out", scans=work / "scans", corrections=path)


def test_the_command_writes_corrected_scan_files(work):
    row = ("scan-000", "yes", 10, 10, 11, 18, 2, 1, "", "tumour")
    report = lung_labels.correct_all(corrections(work, row))
    assert "1 scans" in report.line
    written = read_scan(scan_path(work / "out", "scan-000"))
    assert (written.lung != tiny_scan().lung).sum() == 7
    assert np.array_equal(written.hu, tiny_scan().hu)


def test_labels_of_other_corrections_are_not_taken_for_these(work):
    row = ["scan-000", "yes", 10, 10, 11, 18, 2, 1, "", "tumour"]
    lung_labels.correct_all(corrections(work, row))
    assert not lung_labels.correct_all(corrections(work, row)).failures
    row[4] = 12
    report = lung_labels.correct_all(corrections(work, row))
    assert "other corrections; remove it" in report.failures[0].reason


def test_a_wrong_list_is_refused(work):
    with pytest.raises(ValueError, match="corrects somebody, missing from"):
        lung_labels.correct_all(
            corrections(work, ("somebody", "yes", 1, 1, 1, 1, 1, 1, "", ""))
        )
    with pytest.raises(ValueError, match=r"line 2: .*'x'"):
        lung_labels.correct_all(
            corrections(work, ("scan-000", "yes", "x", 1, 1, 1, 1, 1, "", ""))
        )
    with pytest.raises(ValueError, match="columns why are missing"):
        lung_labels.correct_all(corrections(work, columns=lung_labels.COLUMNS[:-1]))
