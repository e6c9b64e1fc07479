import pickle
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tables

from ct.scan import ScanError, consensus, read_scan, readers_of_label, write_scan


def test_a_scan_file_holds_the_scan(scan, tmp_path):
    path = tmp_path / "scan.h5"
    write_scan(scan, path, {"seed": 1})
    again = read_scan(path)
    for name in ("hu", "lung", "reader_bits", "nodule_labels"):
        assert np.array_equal(getattr(again, name), getattr(scan, name))
        assert getattr(again, name).dtype == getattr(scan, name).dtype
    assert again.nodules == scan.nodules
    assert np.array_equal(again.grid.affine, scan.grid.affine)
    assert (again.scan_id, again.patient_id) == (scan.scan_id, scan.patient_id)


def test_what_is_unknown_stays_unknown(scan, tmp_path):
    write_scan(replace(scan, lung=None, reader_bits=None), tmp_path / "scan.h5", {})
    assert read_scan(tmp_path / "scan.h5").lung is None


def test_an_unread_scan_keeps_its_lungs_and_has_no_nodules(scan):
    unread = scan.unread()
    assert unread.reader_bits is None and unread.nodule_labels is None
    assert unread.nodules == ()
    assert unread.hu is scan.hu and unread.lung is scan.lung
    assert len(scan.nodules) == 2


def test_a_damaged_scan_file_is_named(tmp_path):
    (tmp_path / "scan.h5").write_bytes(b"not HDF5")
    with pytest.raises(ScanError, match=r"not a readable scan file: .*scan\.h5"):
        read_scan(tmp_path / "scan.h5")


def test_what_is_pickled_in_a_file_does_not_run(scan, tmp_path):
    class Attack:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "ran",))

    path = tmp_path / "scan.h5"
    write_scan(scan, path, {})
    with tables.open_file(path, "a") as h5:
        h5.root._v_attrs.title = np.bytes_(pickle.dumps(Attack(), 0))
        h5.remove_node("/record")
        record = h5.create_vlarray("/", "record", tables.ObjectAtom())
        record.append(Attack())
    with pytest.raises(ScanError):
        read_scan(path)
    assert not (tmp_path / "ran").exists()


def test_a_scan_file_of_another_version_is_refused(scan, tmp_path):
    path = tmp_path / "scan.h5"
    write_scan(scan, path, {})
    with tables.open_file(path, "a") as h5:
        text = h5.root.record[:].tobytes()
        text = text.replace(b'"format_version": 2', b'"format_version": 0')
        h5.root.record[:] = np.frombuffer(text, np.uint8)
    with pytest.raises(ScanError, match="scan format 0, expected 2; run preprocess.py"):
        read_scan(path)


def test_a_scan_file_may_have_very_many_nodules(scan, tmp_path):
    many = tuple(replace(scan.nodules[0], label=1) for _ in range(1000))
    write_scan(replace(scan, nodules=many), tmp_path / "scan.h5", {})
    assert len(read_scan(tmp_path / "scan.h5").nodules) == 1000


def test_a_full_disk_is_one_error_and_leaves_nothing(scan, tmp_path):
    # A limit on the size of files stops the writing as a full disk does.
    noise = np.random.default_rng(0).integers(-1000, 400, scan.hu.shape, np.int16)
    write_scan(replace(scan, hu=noise), tmp_path / "whole.h5", {})
    size = (tmp_path / "whole.h5").stat().st_size
    path = tmp_path / "scans/scan.h5"
    for limit in (size // 2, size - 100):
        code = (
            "import resource, signal\n"
            "from pathlib import Path\n"
            "from ct.scan import read_scan, write_scan\n"
            "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
            f"scan = read_scan(Path({str(tmp_path / 'whole.h5')!r}))\n"
            f"resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))\n"
            f"write_scan(scan, Path({str(path)!r}), {{}})\n"
        )
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=False
        )
        assert done.returncode != 0
        assert "Nothing was left half-written; free some space" in done.stderr
        assert list(path.parent.iterdir()) == []


@pytest.mark.parametrize(
    ("level", "expected"),
    # Four voxels of a nodule with four readers, marked by 1, 2, 3 and 4 of them.
    [
        (0.25, [1, 1, 1, 1]),
        (0.5, [0, 1, 1, 1]),
        (0.6, [0, 0, 1, 1]),
        (1.0, [0, 0, 0, 1]),
    ],
)
def test_consensus_counts_the_nodules_own_readers(level, expected):
    bits = np.array([0b0001, 0b1001, 0b1011, 0b1111], np.uint8)
    readers = np.zeros(256, np.uint8)
    readers[7] = 4
    labels = np.full(4, 7, np.uint8)
    assert consensus(bits, labels, readers, level=level).tolist() == expected


def test_nodules_of_too_few_readers_are_left_out(scan):
    mask = consensus(
        scan.reader_bits,
        scan.nodule_labels,
        readers_of_label(scan.nodules),
        level=0.5,
        min_readers=3,
    )
    assert mask[scan.nodule_labels == 1].any()
    assert not mask[scan.nodule_labels == 2].any()
