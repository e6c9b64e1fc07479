import csv
import zipfile
from dataclasses import replace

import numpy as np
import pytest

import config
import preprocess
import table
from cohorts import npy
from ct.scan import ScanError, consensus, read_scan, readers_of_label, write_scan
from dataset import exports
from dataset.slice_table import SliceTable
from tests.conftest import SPACING_MM, tiny_scan

LUNG = config.Batches(target="lung", lung_mask=False)
NODULE = config.Batches(target="nodule")


@pytest.fixture(scope="module")
def table_path(tmp_path_factory):
    """Two scans of one patient and one that no reader saw, with all 24 slices each."""
    folder = tmp_path_factory.mktemp("table")
    unread = {"reader_bits": None, "nodule_labels": None, "nodules": ()}
    for scan in (
        tiny_scan(0),
        replace(tiny_scan(1), patient_id="patient-000"),
        replace(tiny_scan(2), **unread),
    ):
        write_scan(scan, folder / "scans" / f"{scan.scan_id}.h5", {})
    settings = config.Table(size_px=(64, 64), slices="all")
    table.write_table(folder / "scans", folder / "table.h5", settings)
    return folder / "table.h5"


@pytest.fixture
def folder(table_path, tmp_path):
    exports.write_npy_slices(table_path, tmp_path / "npy", LUNG)
    return tmp_path / "npy"


def change(folder, number, **values):
    """Changes values of a line of a patient's list; None takes the line out."""
    path = folder / npy.LIST
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    if values:
        rows[number] |= values
    else:
        del rows[number]
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


def loaded(folder, scan_id="scan-000"):
    sources = {source.scan_id: source for source in npy.find_scans(folder)}
    return npy.load_scan(sources[scan_id])


def test_scans_come_back_as_they_were(folder):
    sources = npy.find_scans(folder)
    assert [(s.scan_id, s.patient_id) for s in sources] == [
        ("scan-000", "patient-000"),
        ("scan-001", "patient-000"),
        ("scan-002", "patient-002"),
    ]
    for index, source in enumerate(sources):
        found, expected = npy.load_scan(source), tiny_scan(index)
        assert np.array_equal(found.hu, expected.hu)
        assert found.hu.dtype == np.int16
        assert np.array_equal(found.lung, expected.lung)
        assert found.lung.dtype == np.uint8
        assert np.allclose(found.spacing_mm, SPACING_MM)
        assert found.reader_bits is None
        # The middle of the first slice, index 31.5 of 64, at x = y = z = 0.
        assert np.allclose(found.grid.index_to_ras_mm(np.array([0, 31.5, 31.5])), 0)
        direction = found.grid.affine[:3, :3] / SPACING_MM
        assert np.array_equal(direction, [[0, 0, -1], [0, -1, 0], [1, 0, 0]])


def test_nodules_are_written_as_the_consensus_of_readers(table_path, tmp_path):
    exports.write_npy_slices(table_path, tmp_path / "npy", NODULE)
    found, scan = loaded(tmp_path / "npy"), tiny_scan(0)
    expected = consensus(
        scan.reader_bits,
        scan.nodule_labels,
        readers_of_label(scan.nodules),
        level=NODULE.consensus_level,
    )
    assert expected.any()
    assert np.array_equal(found.reader_bits, expected)
    assert [nodule.readers for nodule in found.nodules] == [1, 1]
    assert found.lung is None
    assert loaded(tmp_path / "npy", "scan-002").reader_bits is None


@pytest.mark.parametrize(
    ("middle", "expected"),
    [(10, range(7, 17)), (5, range(9, 14)), (1, [11]), (30, range(24)), (0, range(24))],
)
def test_the_middle_slices_of_each_scan(table_path, tmp_path, middle, expected):
    # 24 slices: seven on either side of the middle ten.
    out = tmp_path / "npy"
    count = exports.write_npy_slices(table_path, out, LUNG, middle=middle)
    assert count == 3 * len(expected)
    rows = npy.read_slice_list(out / "patient-000" / npy.LIST)
    for scan_id in ("scan-000", "scan-001"):
        assert [row.z for row in rows if row.pid == scan_id] == list(expected)
    names = {path.name for path in (out / "patient-002").iterdir()}
    assert f"scan-002_z{expected[0]:04}.npy" in names
    assert len(names) == 2 * len(expected) + 1


def test_the_middle_slices_keep_their_height(table_path, tmp_path):
    exports.write_npy_slices(table_path, tmp_path / "npy", LUNG, middle=10)
    found = loaded(tmp_path / "npy")
    assert np.array_equal(found.hu, tiny_scan(0).hu[7:17])
    assert found.grid.affine[2, 3] == pytest.approx(7 * 2.5)


def test_the_command_line_writes_slices_that_the_chain_takes_in_again(
    table_path, tmp_path, capsys
):
    out = tmp_path / "npy"
    arguments = ["lung2d", "--scans", str(table_path.parent / "scans")]
    arguments += ["--table.size_px", "64", "64", "--table.slices", "all"]
    arguments += ["--out", str(table_path), "--npy_slices", str(out), "--middle", "12"]
    for code in (0, 1):
        with pytest.raises(SystemExit) as ended:
            table.main(arguments)
        assert ended.value.code == code
    said = capsys.readouterr()
    assert f"wrote {out}: 36 slices" in said.out
    assert "npy exists; add --overwrite" in said.err
    report = preprocess.preprocess(
        out, tmp_path / "scans", config.LungMask(), cohort="npy"
    )
    assert report.failures == []
    found = read_scan(tmp_path / "scans/scan-001.h5")
    assert found.patient_id == "patient-000"
    assert np.array_equal(found.hu, tiny_scan(1).hu[6:18])
    assert np.array_equal(found.lung, tiny_scan(1).lung[6:18])


def test_a_folder_with_something_else_in_it_is_never_replaced(table_path, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/work.txt").write_text("years")
    with pytest.raises(
        ValueError, match="holds work.txt, which is not a folder of slices"
    ):
        exports.write_npy_slices(table_path, tmp_path / "mine", LUNG)
    assert (tmp_path / "mine/work.txt").read_text() == "years"


def test_slices_written_again_leave_no_old_ones(table_path, folder):
    exports.write_npy_slices(table_path, folder, LUNG, middle=2)
    names = [path.name for path in (folder / "patient-002").glob("*.npy")]
    assert len(names) == 4


def test_a_patient_that_cannot_name_a_folder_is_refused(tmp_path):
    scan = replace(tiny_scan(0), patient_id="../else")
    write_scan(scan, tmp_path / "scans/scan.h5", {})
    settings = config.Table(size_px=(64, 64), slices="all")
    table.write_table(tmp_path / "scans", tmp_path / "table.h5", settings)
    with pytest.raises(ValueError, match=r"the id '../else' cannot name a file"):
        exports.write_npy_slices(tmp_path / "table.h5", tmp_path / "npy", LUNG)
    assert not (tmp_path / "npy").exists()


@pytest.mark.parametrize("name", ["../a.npy", "/etc/passwd", "a/b.npy", "..", ".a.npy"])
def test_a_list_cannot_name_files_elsewhere(folder, name):
    change(folder / "patient-002", 3, image_path=name)
    with pytest.raises(
        ValueError, match=r"line 5, column image_path: the id .* cannot"
    ):
        npy.find_scans(folder)


def test_nothing_is_unpickled(folder, tmp_path):
    class Trap:
        def __reduce__(self):
            return (exec, (f"open({str(tmp_path / 'sprung')!r}, 'w')",))

    path = folder / "patient-002/scan-002_z0003.npy"
    np.save(path, np.array([[Trap()]]), allow_pickle=True)
    with pytest.raises(
        ScanError, match=r"z0003.npy: not a readable .npy file .*object"
    ):
        loaded(folder, "scan-002")
    assert not (tmp_path / "sprung").exists()


def test_files_that_are_no_slice_are_named(folder):
    path = folder / "patient-002/scan-002_z0003.npy"
    whole = path.read_bytes()
    path.write_bytes(whole[:-1000])
    with pytest.raises(ScanError, match=r"z0003.npy: not a readable .npy file"):
        loaded(folder, "scan-002")
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("hu.npy", whole)
    with pytest.raises(ScanError, match=r"z0003.npy: not a readable .npy file"):
        loaded(folder, "scan-002")
    np.save(path, np.zeros((2, 64, 64), np.int16))
    with pytest.raises(
        ScanError, match=r"shape \(2, 64, 64\) of int16; expected a \(y"
    ):
        loaded(folder, "scan-002")
    np.save(path, np.zeros((60, 64), np.int16))
    with pytest.raises(ScanError, match=r"shape \(60, 64\), .* has \(64, 64\)"):
        loaded(folder, "scan-002")
    path.unlink()
    with pytest.raises(ScanError, match="no such file; expected a slice"):
        loaded(folder, "scan-002")


def test_gaps_doubles_and_other_spacing_are_refused(folder):
    change(folder / "patient-002", 5)
    with pytest.raises(
        ScanError, match="scan-002: slice z 6 follows 4; expected every"
    ):
        loaded(folder, "scan-002")
    change(folder / "patient-002", 5, z="4")
    with pytest.raises(ScanError, match="slice z 4 follows 4"):
        loaded(folder, "scan-002")
    change(folder / "patient-000", 1, spacing_y_mm="1.6")
    with pytest.raises(ScanError, match=r"spacing \(2.5, 1.6, 1.5\) mm at z 1"):
        loaded(folder)


@pytest.mark.parametrize("text", ["", "0", "-1", "nan", "inf", "thin"])
def test_spacing_is_required(folder, text):
    change(folder / "patient-002", 0, spacing_z_mm=text)
    with pytest.raises(
        ValueError, match=r"line 2: .*spacing_z_mm '.*spacing in mm above 0"
    ):
        npy.find_scans(folder)


def test_lists_that_cannot_be_used_are_named(folder, tmp_path):
    with pytest.raises(
        ValueError, match=r"no slices.csv in it .* expected one per patient"
    ):
        npy.find_scans(tmp_path / "none")
    (folder / "copy").mkdir()
    text = (folder / "patient-002" / npy.LIST).read_text()
    (folder / "copy" / npy.LIST).write_text(text)
    with pytest.raises(ValueError, match="two scans have the id scan-002"):
        npy.find_scans(folder)
    (folder / "copy" / npy.LIST).write_text(text.replace("spacing_z_mm", "thickness"))
    with pytest.raises(ValueError, match="line 1: no column spacing_z_mm"):
        npy.find_scans(folder)
    change(folder / "patient-002", 2, lung_path="")
    (folder / "copy" / npy.LIST).unlink()
    with pytest.raises(ScanError, match="lung_path: 1 of 24 slices have no mask"):
        loaded(folder, "scan-002")


def test_values_that_are_no_hu_are_refused(folder):
    for path in (folder / "patient-002").glob("*_z????.npy"):
        np.save(path, (np.load(path) + 1024) / 2000)
    with pytest.raises(
        ScanError, match="scan-002: the values are not Hounsfield units"
    ):
        loaded(folder, "scan-002")


def test_a_list_alone_is_a_source_and_floats_are_rounded(folder):
    folder = folder / "patient-002"
    path = folder / "scan-002_z0000.npy"
    np.save(path, np.load(path) + 0.25)
    (source,) = npy.find_scans(folder)
    assert np.array_equal(npy.load_scan(source).hu, tiny_scan(2).hu)


def test_the_table_is_the_reference_for_every_file(table_path, folder):
    with SliceTable(table_path) as opened:
        for row, entry in enumerate(opened.rows):
            scan = opened.scans[entry["scan"]]
            name = f"{scan['patient_id']}/{scan['scan_id']}_z{entry['z']:04}"
            image = np.load(folder / f"{name}.npy")
            mask = np.load(folder / f"{name}_lung.npy")
            assert image.dtype == np.int16 and mask.dtype == np.uint8
            assert np.array_equal(image, opened.read("hu", row))
            assert np.array_equal(mask, opened.read("lung", row))
