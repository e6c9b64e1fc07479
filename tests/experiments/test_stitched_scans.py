"""Chests over an abdomen."""

from dataclasses import replace

import numpy as np
import pytest

from ct.geometry import canonical_grid
from ct.scan import ScanError, read_provenance, read_scan, scan_path, write_scan
from experiments.stitched_scans import (
    Arguments,
    below_lungs,
    fitted,
    plan,
    read_abdomen,
    stitch,
    stitch_all,
)
from phantoms.abdomen import make_abdomen

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
    below, _ = body(30, 20, hu=100, at=(24, 36))
    hu, labels = stitch(chest, lung, below, MM)
    blend = round(12 / MM)
    assert hu.shape == labels.shape == (30 - blend + 20, 60, 60)
    assert np.array_equal(labels[-20:], lung)
    assert not labels[:-20].any()
    assert np.array_equal(hu[-20 + blend :], chest[blend:])
    ys, xs = np.nonzero(hu[0] > 0)
    assert (ys.min(), ys.max(), xs.min(), xs.max()) == pytest.approx(
        (10, 49, 10, 49), abs=2
    )
    assert hu[0, 30, 30] == 100
    assert 40 < hu[30 - blend + 1, 30, 30] < 100


def test_a_slice_without_body_is_refused():
    below, _ = body(30, 20)
    below[-1] = -1024
    with pytest.raises(ScanError, match="no body in the slice where the scans meet"):
        fitted(below, body(1, 40)[0][0])


def test_slices_near_the_lungs_of_the_abdomen_are_left_out():
    hu, lung = body(60, 20)
    assert len(below_lungs(hu, lung, MM)) == 60
    lung[40:, 30, 30] = 1
    assert len(below_lungs(hu, lung, MM)) == 40 - round(15 / MM)
    lung[10:, 30, 30] = 1
    with pytest.raises(
        ScanError, match="only 24 mm of the abdomen lie below its lungs"
    ):
        below_lungs(hu, lung, MM)


# --- scan files ---------------------------------------------------------------------


def write_abdomen(chest, folder, name, marker_x=None):
    """Writes an abdomen of 240 mm without lungs, perhaps with a bone on one side."""
    hu, lung = body(60, 30)
    if marker_x is not None:
        hu[:, 28:32, marker_x : marker_x + 4] = 900
    hu[:, 30, 30] = np.arange(60)
    grid = canonical_grid(hu.shape, (MM, MM, MM))
    abdomen = replace(
        chest.unread(),
        scan_id=name,
        patient_id=f"patient of {name}",
        hu=hu,
        lung=lung,
        grid=grid,
        source_grid=grid,
    )
    write_scan(abdomen, folder / f"{name}.h5", {})
    return folder / f"{name}.h5"


@pytest.fixture
def arguments(make_scan, tmp_path):
    """Folders with one chest, and with three abdomens of other patients."""
    chest = make_scan(0)
    write_scan(chest, scan_path(tmp_path / "chests", chest.scan_id), {})
    for name in "abc":
        write_abdomen(chest, tmp_path / "abdomens", name)
    return Arguments(
        tmp_path / "out", tmp_path / "chests", tmp_path / "abdomens", spacing_mm=MM
    )


def test_files_keep_the_patient_of_the_chest_and_name_the_abdomen(make_scan, arguments):
    chest = make_scan(0)
    assert "2 scans" in stitch_all(replace(arguments, each=2)).line
    drawn = []
    paths = sorted(arguments.out.glob("*.h5"))
    assert len(paths) == 2
    for path in paths:
        found, record = read_scan(path), read_provenance(path)
        assert found.patient_id == chest.patient_id
        assert found.spacing_mm == (MM, MM, MM)
        assert set(np.unique(found.lung)) == {0, 1, 2}
        assert record["chest"] == chest.scan_id
        assert record["abdomen_patient"] == f"patient of {record['abdomen']}"
        assert len(found.hu) == record["slices"] + 15 - 3  # 60 mm of chest, 12 blended
        assert path.stem == f"{chest.scan_id}-over-{record['abdomen']}"
        drawn.append(record["abdomen"])
    assert len(set(drawn)) == 2


def test_the_seed_draws_the_abdomens(arguments, make_scan):
    for index in range(1, 12):
        scan = make_scan(index)
        write_scan(scan, scan_path(arguments.chests, scan.scan_id), {})
    first, other = (
        [task.abdomen for task in plan(replace(arguments, seed=seed, synthetic=2))]
        for seed in (0, 5)
    )
    assert first == [
        task.abdomen for task in plan(replace(arguments, seed=0, synthetic=2))
    ]
    assert first != other
    assert {a for a in first if isinstance(a, int)} <= {0, 1}
    assert {a for a in other if isinstance(a, int)} <= {5, 6}
    assert len(set(first)) > 2


def test_more_abdomens_for_each_chest_than_there_are_is_refused(arguments):
    with pytest.raises(ValueError, match="--each is 4, expected 1 to 3"):
        plan(replace(arguments, each=4))
    with pytest.raises(ValueError, match="no abdomens; give --abdomens, --synthetic"):
        plan(replace(arguments, abdomens=None))


def test_an_abdomen_keeps_its_top_and_may_be_mirrored(make_scan, tmp_path):
    path = write_abdomen(make_scan(0), tmp_path, "marked", marker_x=18)
    lengths, sides = set(), set()
    for seed in range(20):
        hu, record = read_abdomen(path, MM, np.random.default_rng(seed))
        assert len(hu) == record["slices"] >= 80 / MM
        middle = hu[-1, 30, 29 if record["mirrored"] else 30]
        assert middle == 59  # the highest slice
        marked = np.nonzero(hu[0] == 900)[1].mean()
        assert (marked > 29.5) == record["mirrored"]
        lengths.add(len(hu))
        sides.add(record["mirrored"])
    assert len(lengths) > 5
    assert sides == {True, False}


def test_a_simulated_abdomen_is_shortened_but_not_mirrored():
    whole = make_abdomen(3, MM)
    for seed in range(2):
        hu, record = read_abdomen(3, MM, np.random.default_rng(seed))
        assert np.array_equal(hu, whole[-len(hu) :])
        assert record["abdomen"] == "simulated, seed 3"
        assert not record["mirrored"]


def test_unusable_chests_are_listed_and_the_others_go_on(arguments, make_scan):
    (arguments.chests / "broken.h5").write_bytes(b"no scan")
    bare = replace(make_scan(1), lung=None)
    write_scan(bare, scan_path(arguments.chests, bare.scan_id), {})
    cut = make_scan(2)
    cut.lung[0, 10:50, 10:50] = 1  # 1600 pixels of 1.5 x 1.5 mm are 36 cm2
    write_scan(cut, scan_path(arguments.chests, cut.scan_id), {})
    report = stitch_all(arguments)
    reasons = {
        failure.scan_id.partition("-over-")[0]: failure.reason
        for failure in report.failures
    }
    assert "not a readable scan file" in reasons["broken"]
    assert "has no lung labels" in reasons[bare.scan_id]
    assert "holds 36 cm2 of lung, expected 10" in reasons[cut.scan_id]
    assert len(reasons) == 3
    assert report.line.endswith(": 1 scan")
