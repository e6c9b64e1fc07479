"""Chests over an abdomen."""

from dataclasses import replace

import numpy as np
import pytest

from ct.geometry import canonical_grid
from ct.scan import ScanError, read_scan, scan_path, write_scan
from experiments import stitched_scans
from experiments.stitched_scans import Arguments, stitch, stitch_all

MM = 4.0


def body(slices, side, hu=40, at=(30, 30)):
    """A square body of some side in (slices, 60, 60) air, and no lung."""
    volume = np.full((slices, 60, 60), -1024, np.int16)
    y, x = at
    volume[:, y - side // 2 : y + side // 2, x - side // 2 : x + side // 2] = hu
    return volume, np.zeros(volume.shape, np.uint8)


def test_the_abdomen_comes_below_scaled_and_shifted_to_the_chest():
    chest, lung = body(20, 40)
    lung[5:15, 20:30, 20:30] = 1
    below = body(30, 20, hu=100, at=(24, 36))
    hu, labels = stitch((chest, lung), below, MM)
    blend, top = round(12 / MM), 30 - round(15 / MM)
    assert hu.shape == labels.shape == (top - blend + 20, 60, 60)
    assert np.array_equal(labels[-20:], lung)
    assert not labels[:-20].any()
    assert np.array_equal(hu[-20 + blend :], chest[blend:])
    ys, xs = np.nonzero(hu[0] > 0)
    assert (ys.min(), ys.max(), xs.min(), xs.max()) == pytest.approx(
        (10, 49, 10, 49), abs=2
    )
    assert hu[0, 30, 30] == 100
    middle = hu[top - blend + 1, 30, 30]
    assert 40 < middle < 100


def test_slices_with_lung_of_the_abdomen_are_left_out():
    below, lung_below = body(30, 20, hu=100)
    lung_below[25:, 30, 30] = 1
    hu, _ = stitch(body(20, 40), (below, lung_below), MM)
    assert len(hu) == 25 - round(15 / MM) - round(12 / MM) + 20
    lung_below[:] = 1
    with pytest.raises(ScanError, match="only -4 slices lie below the lungs"):
        stitch(body(20, 40), (below, lung_below), MM)


@pytest.fixture
def arguments(make_scan, tmp_path):
    """A folder with one chest, and an abdomen of another patient."""
    chest = make_scan(0)
    write_scan(chest, scan_path(tmp_path / "chests", chest.scan_id), {})
    hu, lung = body(40, 30)
    grid = canonical_grid(hu.shape, (MM, MM, MM))
    abdomen = replace(
        chest.unread(),
        scan_id="abdomen",
        patient_id="other",
        hu=hu,
        lung=lung,
        grid=grid,
        source_grid=grid,
    )
    write_scan(abdomen, tmp_path / "abdomen.h5", {})
    return Arguments(
        tmp_path / "abdomen.h5", tmp_path / "out", tmp_path / "chests", spacing_mm=MM
    )


def test_files_keep_the_patient_of_the_chest(make_scan, arguments):
    chest = make_scan(0)
    assert "1 scan" in stitch_all(arguments).line
    found = read_scan(arguments.out / f"{chest.scan_id}-abdomen.h5")
    assert found.patient_id == chest.patient_id
    assert found.spacing_mm == (MM, MM, MM)
    assert set(np.unique(found.lung)) == {0, 1, 2}
    assert stitched_scans.BODY_HU < 0


def test_a_chest_that_cannot_be_read_is_listed_and_the_others_go_on(arguments):
    (arguments.chests / "broken.h5").write_bytes(b"no scan")
    report = stitch_all(arguments)
    (failure,) = report.failures
    assert failure.scan_id == "broken"
    assert "not a readable scan file" in failure.reason
    assert report.line.endswith(": 1 scan")
