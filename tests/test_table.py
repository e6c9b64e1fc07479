"""The table: what is in it, that it can be trusted, and that a kill does no harm."""

import hashlib
import json
import os
import pickle
import re
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tables
from numpy.lib.recfunctions import repack_fields

import config
import steps
import table
from ct import scan as scans_module
from ct.fingerprint import hu_sha256
from ct.scan import AIR_HU, VOLUMES, ScanError, write_scan
from dataset import exports, slice_table, table_part, table_writer
from dataset.slice_table import SliceTable, verify_table
from tests.conftest import tiny_scan

ROOT = Path(__file__).resolve().parent.parent
SETTINGS = config.Table(size_px=(64, 64))
ALL = replace(SETTINGS, slices="all")


def write_scans(scans, folder):
    for scan in scans:
        scans_module.write_scan(scan, scans_module.scan_path(folder, scan.scan_id), {})
    return folder


@pytest.fixture
def scans_dir(scans, tmp_path):
    return write_scans(scans[:4], tmp_path / "scans")


def contents(path):
    """Everything in a table but its provenance, as plain values and arrays."""
    with SliceTable(path) as opened:
        return {
            "rows": opened.rows.tolist(),
            "scans": repr(opened.scans.tolist()),
            "nodules": repr(opened.nodules.tolist()),
            "sha256": opened.sha256,
            "settings": opened.settings,
            "pixels": [
                hashlib.sha256(opened.read(name, row)).hexdigest()
                for name in VOLUMES
                for row in range(len(opened))
            ],
        }


def test_every_slice_reads_back_as_it_was_in_the_scan(scans, scans_dir, tmp_path):
    report = table.write_table(scans_dir, tmp_path / "table.h5", ALL)
    assert re.match(r"wrote .*table.h5: 96 slices, 4 scans, \d", report.line)
    with SliceTable(tmp_path / "table.h5") as opened:
        assert len(opened) == 4 * 24
        for row, record in enumerate(opened.rows):
            scan = scans[record["scan"]]
            assert record["z_mm"] == -30 + 2.5 * record["z"]
            assert opened.patient_ids[row] == scan.patient_id
            assert record["lung_px"] == np.count_nonzero(scan.lung[record["z"]])
            for name in VOLUMES:
                image = opened.read(name, row)
                assert image.dtype == getattr(scan, name).dtype
                assert np.array_equal(image, getattr(scan, name)[record["z"]])
        assert np.array_equal(opened.readers_of_label(2)[:4], [0, 4, 2, 0])
        assert opened.scans["affine"][1].tolist() == scans[1].grid.affine.tolist()


def test_plain_pytables_reads_the_same_pixels(scans_dir, tmp_path):
    path = tmp_path / "table.h5"
    table.write_table(scans_dir, path, ALL)
    with SliceTable(path) as opened, tables.open_file(path) as h5:
        for name in VOLUMES:
            stored = h5.get_node("/slices", name)
            assert stored.chunkshape == (1, 64, 64)
            assert stored.filters.complib == "blosc2:lz4"
            for row in range(0, len(opened), 7):
                assert np.array_equal(opened.read(name, row), stored[row])


def test_a_slice_is_decompressed_from_its_chunk_and_an_empty_mask_from_a_known_one(
    scans_dir, tmp_path
):
    table.write_table(scans_dir, tmp_path / "table.h5", ALL)
    with SliceTable(tmp_path / "table.h5") as opened:
        slice_table._only_chunk.cache_clear()
        for row in np.flatnonzero(opened.rows["lung_px"]):
            opened.read("hu", row)
        assert slice_table._only_chunk.cache_info().misses == 0
        empty = np.flatnonzero(opened.rows["nodule_px"] == 0)
        for row in empty:
            assert not opened.read("reader_bits", row).any()
        assert slice_table._only_chunk.cache_info().misses == 1
        assert slice_table._only_chunk.cache_info().hits == len(empty) - 1


def test_negatives_are_as_many_as_asked_and_have_lung_and_no_nodule(scan, tmp_path):
    # Nodule 1 is a ball of 6.5 mm around z=10: |dz| * 2.5 <= 6.5, so z = 8 to 12.
    # Nodule 2 is one of 4 mm around z=14: z = 13 to 15. Lung runs from z = 3 to 20.
    lung_px = np.count_nonzero(scan.lung, axis=(1, 2))
    nodule_px = np.count_nonzero(scan.reader_bits, axis=(1, 2))
    for ratio, negatives in ((0.0, 0), (0.5, 4), (1.0, 8), (9.0, 10)):
        settings = replace(SETTINGS, negatives_per_nodule_slice=ratio)
        z = table_part.choose_slices(scan, lung_px, nodule_px, settings)
        assert set(z) >= set(range(8, 16))
        assert len(z) == 8 + negatives
        assert set(z) <= set(range(3, 21))
        assert np.array_equal(z, np.unique(z))


def test_a_draw_depends_on_seed_and_scan_id_but_not_on_the_other_scans(scans, tmp_path):
    def slices_of(last, settings, folder):
        write_scans([scans[folder - 1], last], tmp_path / f"{folder}")
        table.write_table(tmp_path / f"{folder}", tmp_path / f"{folder}.h5", settings)
        with SliceTable(tmp_path / f"{folder}.h5") as opened:
            return opened.rows["z"][opened.rows_of_scan(1)].tolist()

    settings = replace(SETTINGS, negatives_per_nodule_slice=0.5)
    first = slices_of(scans[9], settings, 1)
    assert slices_of(scans[9], settings, 2) == first
    assert slices_of(scans[9], replace(settings, seed=1), 3) != first
    assert slices_of(replace(scans[9], scan_id="scan-xyz"), settings, 4) != first


def test_lung_takes_lung_slices_and_all_takes_all(scan):
    lung_px = np.count_nonzero(scan.lung, axis=(1, 2))
    for slices, expected in (("lung", range(3, 21)), ("all", range(24))):
        settings = replace(SETTINGS, slices=slices)
        chosen = table_part.choose_slices(scan, lung_px, 0 * lung_px, settings)
        assert chosen.tolist() == list(expected)


def test_a_healthy_scan_gives_negatives_and_a_scan_without_rows_keeps_its_place(
    scan, tmp_path
):
    nothing = np.zeros_like(scan.lung)
    healthy = replace(
        scan, scan_id="b", reader_bits=nothing, nodule_labels=nothing, nodules=()
    )
    lungless = replace(healthy, scan_id="a", patient_id="p", lung=nothing)
    write_scans([scan, healthy, lungless], tmp_path / "scans")
    table.write_table(tmp_path / "scans", tmp_path / "table.h5", SETTINGS)
    with SliceTable(tmp_path / "table.h5") as opened:
        assert opened.scans["scan_id"].tolist() == ["a", "b", "scan-000"]
        assert opened.scans["rows"].tolist() == [0, table_part.HEALTHY_SLICES, 16]
        assert opened.scans["first_row"].tolist() == [0, 0, table_part.HEALTHY_SLICES]
        assert opened.scans["patient_id"][0] == "p"
    assert verify_table(tmp_path / "table.h5") == []


def test_masks_that_are_unknown_are_zero_and_marked_so(scan, tmp_path):
    bare = replace(scan.unread(), lung=None)
    write_scans([bare], tmp_path / "scans")
    table.write_table(tmp_path / "scans", tmp_path / "table.h5", ALL)
    with SliceTable(tmp_path / "table.h5") as opened:
        assert opened.scans[["read", "has_lung"]].tolist() == [(0, 0)]
        assert not opened.read("lung", 10).any()
        assert not opened.read("reader_bits", 10).any()


@pytest.mark.parametrize(
    ("slices", "unknown", "message"),
    [
        ("nodule", {"lung": None}, "no lung mask.*preprocess.py"),
        ("nodule", {"reader_bits": None}, "no nodule masks.*--table.slices lung"),
        ("lung", {"lung": None}, "no lung mask.*--table.slices all"),
    ],
)
def test_a_scan_without_the_mask_that_decides_is_refused(
    scan, slices, unknown, message
):
    with pytest.raises(ScanError, match=message):
        table_part.make_part(
            replace(scan, **unknown), replace(SETTINGS, slices=slices), ""
        )


@pytest.mark.parametrize(
    ("full", "size", "expected"),
    [(512, 400, -56), (400, 512, 56), (5, 4, 0), (4, 5, 0), (5, 2, -1), (7, 7, 0)],
)
def test_offset_centres_and_an_odd_pixel_goes_last(full, size, expected):
    assert table_part.offset_px((full, 9), (size, 9)) == (expected, 0)


def test_other_sizes_are_padded_with_air_and_cut_around_the_centre(scan, tmp_path):
    write_scans([scan], tmp_path / "scans")
    settings = replace(ALL, size_px=(80, 40))
    table.write_table(tmp_path / "scans", tmp_path / "table.h5", settings)
    with SliceTable(tmp_path / "table.h5") as opened:
        hu, lung = opened.read("hu", 10), opened.read("lung", 10)
        assert opened.scans["offset_px"].tolist() == [[8, -12]]
        top, left = opened.scans["offset_px"][0]
        assert np.array_equal(hu[8:72], scan.hu[10, :, 12:52])
        assert hu[top + 30, left + 20] == scan.hu[10, 30, 20]
        assert (hu[:8] == AIR_HU).all()
        assert (hu[72:] == AIR_HU).all()
        assert not lung[:8].any()
        assert np.array_equal(lung[8:72], scan.lung[10, :, 12:52])


def test_nodule_pixels_that_the_size_cuts_away_are_counted(scan, tmp_path):
    write_scans([scan], tmp_path / "scans")
    settings = replace(SETTINGS, size_px=(64, 30))  # keeps x = 17 to 46
    report = table.write_table(tmp_path / "scans", tmp_path / "table.h5", settings)
    lost = np.count_nonzero(scan.reader_bits[..., :17]) + np.count_nonzero(
        scan.reader_bits[..., 47:]
    )
    with SliceTable(tmp_path / "table.h5") as opened:
        assert opened.scans["cut_px"].tolist() == [lost]
    assert report.line.endswith("nodule pixels cropped away in 1 scans")


def test_volumes_are_isotropic_and_lie_where_the_scan_lies(scans_dir, tmp_path):
    settings = replace(ALL, volume_spacing_mm=2.0)
    path = tmp_path / "table.h5"
    table.write_table(scans_dir, path, settings)
    with SliceTable(path) as opened:
        for index in range(4):
            labels = opened.volume(index, "nodule_labels")
            affine = opened.volume_affine(index)
            assert labels.shape == (30, 48, 48)  # 24 * 2.5 / 2, 64 * 1.5 / 2
            for nodule in opened.nodules[opened.nodules["scan"] == index]:
                zyx = np.argwhere(labels == nodule["label"]).mean(axis=0)
                ras_mm = affine[:3, :3] @ zyx + affine[:3, 3]
                assert np.allclose(ras_mm, nodule["centre_ras_mm"], atol=0.8)
        hu, lung = opened.volume(0, "hu"), opened.volume(0, "lung")
        assert hu.dtype == np.int16
        assert abs(np.median(hu[lung > 0]) + 850) < 10
    assert verify_table(path) == []
    table.write_table(scans_dir, path, SETTINGS, overwrite=True)
    with (
        SliceTable(path) as opened,
        pytest.raises(ValueError, match="holds no volumes"),
    ):
        opened.volume(0, "hu")


def test_many_threads_read_what_one_reads(scans_dir, tmp_path):
    path = tmp_path / "table.h5"
    table.write_table(scans_dir, path, ALL)
    with SliceTable(path) as opened:
        wanted = [(name, row) for row in range(len(opened)) for name in VOLUMES] * 5
        order = np.random.default_rng(0).permutation(len(wanted))
        expected = {key: opened.read(*key).tobytes() for key in set(wanted)}
        with ThreadPoolExecutor(16) as pool:
            found = pool.map(lambda i: (wanted[i], opened.read(*wanted[i])), order)
            assert all(image.tobytes() == expected[key] for key, image in found)


def test_a_pickled_table_opens_its_file_again(scans_dir, tmp_path):
    path = tmp_path / "table.h5"
    table.write_table(scans_dir, path, SETTINGS)
    with SliceTable(path) as opened, pickle.loads(pickle.dumps(opened)) as again:
        assert np.array_equal(opened.read("hu", 3), again.read("hu", 3))


def test_rows_beyond_the_table_are_refused(scans_dir, tmp_path):
    table.write_table(scans_dir, tmp_path / "table.h5", SETTINGS)
    with SliceTable(tmp_path / "table.h5") as opened:
        for row in (-1, len(opened)):
            with pytest.raises(IndexError, match=f"rows 0 to {len(opened) - 1}"):
                opened.read("hu", row)


def test_other_patients_are_known_by_their_series_too(tmp_path):
    uid = "1.3.6.1.4.1.14519.5.2.1.6279.6001.170706757615202213033480003264"
    for index, (patient, series) in enumerate([("a", ""), ("a", ""), ("b", uid)]):
        made = replace(tiny_scan(index), patient_id=patient, series_uid=series)
        write_scan(made, tmp_path / "scans" / f"{made.scan_id}.h5", {})
    table.write_table(tmp_path / "scans", tmp_path / "table.h5", ALL)
    with SliceTable(tmp_path / "table.h5") as opened:
        assert opened.other_patients(np.arange(3)) == frozenset()
        assert opened.other_patients(np.array([1])) == {"b", "LIDC-IDRI-0003"}
        assert opened.other_patients(np.array([2])) == {"a"}


def test_checksums_tell_which_scan_a_flipped_byte_is_in(scans_dir, tmp_path):
    path = tmp_path / "table.h5"
    table.write_table(scans_dir, path, SETTINGS)
    assert verify_table(path) == []
    with SliceTable(path) as opened:
        row = opened.rows_of_scan(2)[5]
        place = opened._slices["hu"].chunk_info((row, 0, 0))
    stored = bytearray(path.read_bytes())
    stored[place.offset + place.size // 2] ^= 0x10
    path.write_bytes(stored)
    assert verify_table(path) == ["scan-002"]


def test_a_destroyed_slice_is_an_error_that_names_it(scans_dir, tmp_path):
    path = tmp_path / "table.h5"
    table.write_table(scans_dir, path, SETTINGS)
    with SliceTable(path) as opened:
        place = opened._slices["hu"].chunk_info((5, 0, 0))
    stored = bytearray(path.read_bytes())
    stored[place.offset : place.offset + place.size] = bytes(place.size)
    path.write_bytes(stored)
    with (
        SliceTable(path) as opened,
        pytest.raises(OSError, match="slice 5 of /slices/hu"),
    ):
        opened.read("hu", 5)
    with pytest.raises(SystemExit) as ended:
        table.main(["smoke", "--out", str(path), "--verify"])
    assert ended.value.code == steps.FAILED


def test_the_checksum_changes_with_a_pixel_and_not_with_the_other_scans(
    scans, tmp_path
):
    write_scans(scans[:2], tmp_path / "a")
    changed = scans[1].hu.copy()
    changed[10, 30, 30] += 1
    write_scans([replace(scans[1], hu=changed), scans[2]], tmp_path / "b")
    sha256 = {}
    for folder in ("a", "b"):
        table.write_table(tmp_path / folder, tmp_path / f"{folder}.h5", ALL)
        with SliceTable(tmp_path / f"{folder}.h5") as opened:
            pairs = opened.scans[["scan_id", "sha256"]].tolist()
            sha256 |= {(folder, scan_id): value for scan_id, value in pairs}
    assert sha256["a", "scan-001"] != sha256["b", "scan-001"]
    write_scans([scans[1]], tmp_path / "c")
    table.write_table(tmp_path / "c", tmp_path / "c.h5", ALL)
    with SliceTable(tmp_path / "c.h5") as opened:
        assert opened.scans["sha256"].tolist() == [sha256["a", "scan-001"]]


def test_a_bad_scan_file_is_listed_and_the_others_go_on(scans_dir, tmp_path):
    (scans_dir / "scan-001.h5").write_bytes(b"not HDF5")
    damaged = scans_dir / "scan-003.h5"
    damaged.write_bytes(damaged.read_bytes()[:-3000])
    out = tmp_path / "table.h5"
    for _ in range(2):  # the second call finds the table complete, and says so again
        report = table.write_table(scans_dir, out, SETTINGS)
        assert [f.scan_id for f in report.failures] == ["scan-001", "scan-003"]
        assert "preprocess.py" in report.failures[0].reason
    assert "is complete" in report.line
    assert len((tmp_path / "table.skipped.csv").read_text().splitlines()) == 3
    with SliceTable(out) as opened:
        assert opened.scans["scan_id"].tolist() == ["scan-000", "scan-002"]
    with pytest.raises(SystemExit) as ended:
        table.main(
            ["smoke", "--scans", str(scans_dir), "--out", str(tmp_path / "b.h5")]
        )
    assert ended.value.code == steps.SOME_SKIPPED


def test_a_table_of_bad_scans_alone_is_an_error(tmp_path):
    (tmp_path / "scans").mkdir()
    with pytest.raises(FileNotFoundError, match="run preprocess.py first"):
        table.write_table(tmp_path / "scans", tmp_path / "table.h5", SETTINGS)
    (tmp_path / "scans/a.h5").write_bytes(b"")
    with pytest.raises(ValueError, match="none of the 1 scan files.*can be used"):
        table.write_table(tmp_path / "scans", tmp_path / "table.h5", SETTINGS)
    assert not (tmp_path / "table.h5").exists()


def test_a_table_made_otherwise_is_replaced_only_when_told(scans, scans_dir, tmp_path):
    out = tmp_path / "table.h5"
    table.write_table(scans_dir, out, SETTINGS)
    with pytest.raises(
        ValueError, match=r"table.slices=nodule, now all; add --overwrite"
    ):
        table.write_table(scans_dir, out, ALL)
    write_scans([scans[7]], scans_dir)
    with pytest.raises(
        ValueError, match="scan-007 is new, missing or changed, 1 in all"
    ):
        table.write_table(scans_dir, out, SETTINGS)
    table.write_table(scans_dir, out, ALL, overwrite=True)
    with SliceTable(out) as opened:
        assert len(opened.scans) == 5


def test_a_missing_foreign_or_older_table_is_one_clear_error(scans_dir, tmp_path):
    path = tmp_path / "table.h5"
    with pytest.raises(FileNotFoundError, match="run table.py first"):
        SliceTable(path)
    path.write_bytes(b"not HDF5")
    with pytest.raises(
        ValueError, match="not a readable table: .*; run table.py again"
    ):
        SliceTable(path)
    with pytest.raises(
        ValueError, match="not a table; expected a file made by table.py"
    ):
        SliceTable(scans_dir / "scan-000.h5")
    path.unlink()
    table.write_table(scans_dir, path, SETTINGS)
    with tables.open_file(path, "a") as h5:
        record = json.loads(h5.root._v_attrs.table) | {"format_version": 0}
        h5.root._v_attrs.table = json.dumps(record)
    with pytest.raises(
        ValueError, match="table format 0, expected 1; run table.py again"
    ):
        SliceTable(path)


def test_an_id_too_long_for_the_table_is_a_scan_error(scan):
    with pytest.raises(
        ScanError, match="patient_id has 129 bytes; the table holds 128"
    ):
        table_part.make_part(replace(scan, patient_id="p" * 129), SETTINGS, "")


def test_patient_ids_may_have_any_letters(scan, tmp_path):
    write_scans([replace(scan, patient_id="Пациент 7 ü")], tmp_path / "scans")
    table.write_table(tmp_path / "scans", tmp_path / "table.h5", SETTINGS)
    with SliceTable(tmp_path / "table.h5") as opened:
        assert set(opened.patient_ids.tolist()) == {"Пациент 7 ü"}


def test_several_processes_make_the_same_table(scans_dir, tmp_path):
    table.write_table(scans_dir, tmp_path / "one.h5", SETTINGS)
    ended = start_build(scans_dir, tmp_path / "two.h5", "--workers", "2").wait()
    assert ended == steps.DONE
    assert contents(tmp_path / "one.h5") == contents(tmp_path / "two.h5")


def start_build(scans_dir, out, *more):
    words = ["smoke", "--scans", scans_dir, "--out", out, "--table.size-px", "64", "64"]
    return subprocess.Popen(
        [sys.executable, "table.py", *map(str, words), *more],
        cwd=ROOT,
    )


@pytest.mark.slow
def test_a_build_killed_again_and_again_ends_as_an_unbroken_one(tmp_path):
    folder = write_scans(map(tiny_scan, range(24)), tmp_path / "scans")
    whole, broken = tmp_path / "whole.h5", tmp_path / "broken.h5"
    table.write_table(folder, whole, SETTINGS)
    parts = tmp_path / "broken.h5.parts"
    kept = {}
    for wanted in (3, 9, 15, 21):
        build = start_build(folder, broken)
        while build.poll() is None and len(list(parts.glob("[!.]*.h5"))) < wanted:
            time.sleep(0.002)
        os.kill(build.pid, signal.SIGKILL)
        assert build.wait() == -signal.SIGKILL
        assert not broken.exists()
        now = {path.name: path.stat().st_mtime_ns for path in parts.glob("[!.]*.h5")}
        assert len(now) >= wanted
        assert kept.items() <= now.items()  # no finished scan was done again
        kept = now
    table.write_table(folder, broken, SETTINGS)
    assert contents(broken) == contents(whole)
    assert verify_table(broken) == []
    assert not parts.exists()


def test_a_kill_while_parts_are_joined_leaves_no_table_and_the_next_call_ends_it(
    scans_dir, tmp_path
):
    out = tmp_path / "table.h5"
    code = (
        "import os, signal, table, config; from pathlib import Path\n"
        "from dataset import table_writer\n"
        "append, done = table_writer._append, []\n"
        "def kill_at_third(*args):\n"
        "    done.append(1)\n"
        "    if len(done) == 3: os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return append(*args)\n"
        "table_writer._append = kill_at_third\n"
        f"table.write_table(Path({str(scans_dir)!r}), Path({str(out)!r}),"
        " config.Table(size_px=(64, 64)))\n"
    )
    killed = subprocess.run([sys.executable, "-c", code], cwd=ROOT)
    assert killed.returncode == -signal.SIGKILL
    assert not out.exists()
    table.write_table(scans_dir, out, SETTINGS)
    table.write_table(scans_dir, tmp_path / "whole.h5", SETTINGS)
    assert contents(out) == contents(tmp_path / "whole.h5")


def test_a_damaged_or_outdated_part_is_made_again(scans, scans_dir, tmp_path):
    parts = tmp_path / "parts"
    items = [table.ScanFile(p.stem, p) for p in scans_module.scan_files(scans_dir)]
    made = [table.write_part(item, parts, SETTINGS) for item in items]
    times = [path.stat().st_mtime_ns for path in made]
    stored = bytearray(made[0].read_bytes())
    with SliceTable(made[0]) as opened:
        place = opened._slices["hu"].chunk_info((5, 0, 0))
    stored[place.offset + place.size // 2] ^= 1
    made[0].write_bytes(stored)
    made[1].write_bytes(made[1].read_bytes()[: len(stored) // 2])
    write_scans([replace(scans[2], acquisition={"kernel": "B30f"})], scans_dir)
    for item in items:
        table.write_part(item, parts, SETTINGS)
    again = [path.stat().st_mtime_ns for path in made]
    assert [new != old for new, old in zip(again, times, strict=True)] == [1, 1, 1, 0]
    table.write_part(items[3], parts, ALL)
    assert made[3].stat().st_mtime_ns != times[3]


def test_a_part_of_before_the_checksum_of_hu_is_made_again(scans_dir, tmp_path):
    path = scans_module.scan_files(scans_dir)[0]
    item = table.ScanFile(path.stem, path)
    part = table.write_part(item, tmp_path / "parts", SETTINGS)
    with tables.open_file(part, "a") as h5:
        records = h5.root.scans[:]
        names = [name for name in records.dtype.names if name != "hu_sha256"]
        h5.remove_node("/scans")
        h5.create_table("/", "scans", obj=repack_fields(records[names]))
    with SliceTable(part) as older:
        assert older.checksum(0) == older.scans["sha256"][0]
    table.write_part(item, tmp_path / "parts", SETTINGS)
    with SliceTable(part) as again:
        expected = hu_sha256(scans_module.read_scan(path).hu)
        assert again.scans["hu_sha256"].tolist() == [expected]


@pytest.mark.parametrize(
    ("limit", "reason"),
    [
        (30_000, "File too large"),  # within the slices
        (150_000, "it does not read back as it was written"),  # when it is closed
    ],
)
def test_a_full_disk_is_one_error_and_leaves_nothing_half_written(
    scans_dir, tmp_path, limit, reason
):
    out = tmp_path / "table.h5"
    code = (
        "import resource, table\n"
        f"resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))\n"
        f"table.main(['smoke', '--scans', {str(scans_dir)!r}, '--out', {str(out)!r},"
        " '--table.size-px', '64', '64'])\n"
    )
    ended = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True
    )
    assert ended.returncode == steps.FAILED
    assert re.fullmatch(
        rf"error: .*cannot write .*: {reason}; .* are free there. Nothing was left "
        r"half-written; free some space, then run the same command again\n",
        ended.stderr,
    )
    assert not out.exists()
    assert not list((tmp_path / "table.h5.parts").glob(".*"))
    table.write_table(scans_dir, out, SETTINGS)
    assert verify_table(out) == []


def test_a_disk_too_small_for_the_table_is_seen_before_it_is_written(
    scans_dir, tmp_path, monkeypatch
):
    usage = type("Usage", (), {"free": 1000})()
    monkeypatch.setattr(table_writer.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(
        OSError, match=r"table.h5 needs .*B, but only 1 kB are free"
    ) as error:
        table.write_table(scans_dir, tmp_path / "table.h5", SETTINGS)
    assert error.value.errno == 28
    assert not (tmp_path / "table.h5").exists()


def test_the_thesis_layout_holds_consensus_and_hu_within_the_lungs(
    scans, scans_dir, tmp_path
):
    path, out = tmp_path / "table.h5", tmp_path / "thesis.h5"
    table.write_table(scans_dir, path, SETTINGS)
    batches = config.Batches(input_px=(60, 60), lung_mask=True)
    exports.write_thesis_layout(path, out, batches)
    with SliceTable(path) as opened, tables.open_file(out) as h5:
        assert h5.root.data.shape == h5.root.truth.shape == (64, 60, 60)
        assert h5.root.data.dtype == np.float32
        assert h5.root.truth.dtype == np.uint8
        row = int(np.flatnonzero(opened.rows["z"] == 10)[0])
        scan = scans[0]
        votes = scans_module.reader_votes(scan.reader_bits[10])
        readers = np.array([0, 4, 2])[scan.nodule_labels[10]]
        expected = (votes * 2 >= readers) & (readers > 0)
        assert np.array_equal(h5.root.truth[row], expected[2:62, 2:62])
        inside = scan.lung[10, 2:62, 2:62] > 0
        data = h5.root.data[row]
        assert np.array_equal(data[inside], scan.hu[10, 2:62, 2:62][inside])
        assert (data[~inside] == AIR_HU).all()
        assert h5.root.subject_ids[row] == b"scan-000_10"


@pytest.mark.lidc
def test_real_slices_are_what_simpleitk_reads(tmp_path):
    data = Path(os.environ.get("LUNG_DATA", ROOT.parent / "shared/data"))
    folder = data / "LIDC-IDRI/LIDC-IDRI-0001"
    if not folder.is_dir():
        pytest.skip(f"no real scan in {folder}")
    import SimpleITK as sitk

    from cohorts import lidc

    source = lidc.find_scans(folder)[0]
    scan = lidc.load_scan(source)
    write_scans([replace(scan, lung=np.ones(scan.hu.shape, np.uint8))], tmp_path / "s")
    settings = config.Table(size_px=(400, 400), negatives_per_nodule_slice=0.5)
    table.write_table(tmp_path / "s", tmp_path / "table.h5", settings)
    reader = sitk.ImageSeriesReader()
    reader.SetFileNames(reader.GetGDCMSeriesFileNames(str(source.paths[0].parent)))
    volume_hu = sitk.GetArrayFromImage(reader.Execute())
    with SliceTable(tmp_path / "table.h5") as opened:
        marked = int((opened.rows["nodule_px"] > 0).sum())
        assert marked == np.count_nonzero(scan.reader_bits.any(axis=(1, 2)))
        assert len(opened) == marked + round(marked / 2)
        for row, z in enumerate(opened.rows["z"]):
            centre_hu = volume_hu[z, 56:456, 56:456]
            assert np.array_equal(opened.read("hu", row), np.maximum(centre_hu, AIR_HU))


def test_the_table_says_how_its_lung_masks_were_made(scans, tmp_path):
    for scan, closing_mm in zip(scans[:3], (5.0, 5.0, 7.0), strict=True):
        made_by = {"mask": config.to_json(config.LungMask(closing_mm=closing_mm))}
        folder = tmp_path / ("alike" if closing_mm == 5 else "mixed")
        scans_module.write_scan(scan, folder / f"{scan.scan_id}.h5", made_by)
    table.write_table(tmp_path / "alike", tmp_path / "table.h5", SETTINGS)
    with SliceTable(tmp_path / "table.h5") as opened:
        assert opened.provenance["mask"]["closing_mm"] == 5.0
    for path in (tmp_path / "alike").glob("*.h5"):
        (tmp_path / "mixed" / path.name).write_bytes(path.read_bytes())
    with pytest.raises(ValueError, match="made with different settings"):
        table.write_table(tmp_path / "mixed", tmp_path / "other.h5", SETTINGS)
