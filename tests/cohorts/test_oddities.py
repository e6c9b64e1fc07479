"""One case per row of "What DICOM headers say, and what we do" in docs/data.md.

Each case is the small series of conftest.py with one oddity. What is accepted is compared
voxel by voxel with SimpleITK, and a few cases with dcm2niix.
"""

import logging
import os
import re
import shutil
import stat
import subprocess
import sys
import zipfile
from pathlib import Path

import nibabel
import numpy as np
import pydicom
import pytest
import SimpleITK
from pydicom.dataelem import DataElement
from pydicom.uid import (
    HTJ2K,
    CTImageStorage,
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    HTJ2KLossless,
    HTJ2KLosslessRPCL,
    ImplicitVRLittleEndian,
    JPEGExtended12Bit,
    JPEGLossless,
    JPEGLosslessSV1,
)

from cohorts import dicom, dicom_headers, dicom_read, dicom_slices, nifti, zipped
from ct.geometry import flip_xy
from ct.scan import ScanError
from tests.cohorts.test_dicom import enhanced

STEP_MM = 2.5
UUID = "7afb0d48-6c4e-4b0c-9d1c-2f1d8a5b7e33"

pytestmark = pytest.mark.filterwarnings(
    "ignore::UserWarning"  # pydicom's, when the odd values are written
)


def each(tag, value):
    """Sets an element of every image; `value` may be a function of its number."""

    def change(images):
        for k, image in enumerate(images):
            setattr(image, tag, value(k) if callable(value) else value)
        return images

    return change


def one(tag, value, k=3):
    def change(images):
        setattr(images[k], tag, value)
        return images

    return change


def drop(*tags):
    def change(images):
        for image in images:
            for tag in tags:
                del image[tag]
        return images

    return change


def without(*numbers):
    return lambda images: [im for k, im in enumerate(images) if k not in numbers]


def rescaled(images):
    for k, image in enumerate(images):
        stored = image.pixel_array + np.int16(10 * k)
        image.PixelData = stored.tobytes()
        image.RescaleIntercept = str(-1024 - 10 * k)
    return images


def halved(images):
    for image in images[::2]:
        image.PixelData = (image.pixel_array * 2).astype(np.int16).tobytes()
        image.RescaleSlope = "0.5"
    return images


def garbage(images):
    """Something in the four highest bits, as overlays of old scanners leave there."""
    for k, image in enumerate(images):
        stored = image.pixel_array.astype(np.uint16) | ((k % 15 + 1) << 12)
        image.PixelData = stored.astype(np.uint16).tobytes()
        image.BitsStored, image.HighBit, image.PixelRepresentation = 12, 11, 0
    return images


def high_bit_15(images):
    """The header says that pixels are in the highest bits; they are in the lowest."""
    for image in unsigned(images):
        image.BitsStored, image.HighBit = 12, 15
    return images


def in_the_highest_bits(images):
    for image in high_bit_15(images):
        image.PixelData = (image.pixel_array << 4).astype(np.uint16).tobytes()
    return images


def secondary(images):
    for image in images:
        image.SOPClassUID = dicom_headers.SECONDARY_CAPTURE
        image.file_meta.MediaStorageSOPClassUID = image.SOPClassUID
    return images


def blank_at_the_end(images):
    images[7].PixelData = bytes(len(images[7].PixelData))
    return images


def unsigned(images):
    for image in images:
        image.PixelRepresentation = 0
        image.PixelData = image.pixel_array.astype(np.uint16).tobytes()
    return images


def rounded(images):
    """Slices of 0.625 mm whose positions have one decimal."""
    for k, image in enumerate(images):
        image.ImagePositionPatient = ["-7.0", "-11.0", f"{-30 + 0.625 * k:.1f}"]
    return images


def place(k):
    return ["-7.0", "-11.0", f"{-30 + STEP_MM * k:.6f}"]


ACCEPTED = {
    # name -> (change, warning or "")
    "plain": (lambda images: images, ""),
    "frame of reference of one image": (
        one("FrameOfReferenceUID", "1.2.3"),
        r"1 of 8 images \(first 021-3.dcm\) have another FrameOfReferenceUID",
    ),
    "study of one image": (
        one("StudyInstanceUID", "1.2.3"),
        "have another StudyInstanceUID",
    ),
    "kernel of one image": (
        one("ConvolutionKernel", "LUNG"),
        "have another ConvolutionKernel",
    ),
    "series uid is a uuid": (each("SeriesInstanceUID", UUID), ""),
    "series uid is a word": (each("SeriesInstanceUID", "SERIES 2"), ""),
    "no series uid": (drop("SeriesInstanceUID"), "have no SeriesInstanceUID"),
    "no sop uid": (drop("SOPInstanceUID"), "have no SOPInstanceUID"),
    "no modality": (drop("Modality"), "have no Modality"),
    "no study or frame uid": (drop("StudyInstanceUID", "FrameOfReferenceUID"), ""),
    "several acquisitions in a row": (each("AcquisitionNumber", lambda k: k // 4), ""),
    "missing at the ends": (without(0, 7), ""),
    "feet first": (each("PatientPosition", "FFS"), ""),
    "prone": (each("PatientPosition", "HFP"), ""),
    "rounded positions": (
        rounded,
        "the positions are rounded: slices are 0.600 to 0.700",
    ),
    "rounded spacing": (
        each("PixelSpacing", lambda k: ["0.9", "0.7"] if k else ["0.90001", "0.70001"]),
        "",
    ),
    "rounded cosines": (
        each("ImageOrientationPatient", ["1", "0.0002", "0", "-0.0002", "1", "0"]),
        "",
    ),
    "spacing says otherwise": (each("SpacingBetweenSlices", "1.25"), ""),
    "unsigned": (unsigned, ""),
    "garbage in the high bits": (garbage, ""),
    "intercepts differ": (rescaled, r"RescaleIntercept differs .*-1094 to -1024"),
    "slopes differ": (halved, r"RescaleSlope differs .*\(0.5 to 1\)"),
    "modified HU": (each("RescaleType", "HU_MOD"), "RescaleType HU_MOD in 8 of 8"),
    "high bit 15": (high_bit_15, ""),
    "secondary captures": (secondary, "are secondary captures; read as CT"),
    "no image type": (drop("ImageType"), ""),
    "two studies": (
        each("StudyInstanceUID", lambda k: f"1.2.{k // 4}"),
        "another Study",
    ),
    "instance numbers in disorder": (each("InstanceNumber", lambda k: (k * 5) % 8), ""),
    "no instance numbers": (drop("InstanceNumber"), ""),
}


def itk_volume(paths):
    """(slice, row, column) values, sorted by position, and the image, of SimpleITK."""
    reader = SimpleITK.ImageSeriesReader()
    names = sorted(
        map(str, paths),
        key=lambda name: float(
            pydicom.dcmread(name, force=True).ImagePositionPatient[2]
        ),
    )
    reader.SetFileNames(names)
    image = reader.Execute()
    return SimpleITK.GetArrayFromImage(image), image


def assert_same_as_itk(read, paths):
    values, image = itk_volume(paths)
    assert np.array_equal(read.hu, values)
    for index in [(0, 0, 0), (35, 39, 5)]:
        at_ras_mm = flip_xy(image.TransformIndexToPhysicalPoint(index))
        assert np.allclose(read.grid.index_to_ras_mm(index[::-1]), at_ras_mm, atol=0.02)


@pytest.mark.parametrize("name", ACCEPTED)
def test_an_oddity_that_leaves_geometry_and_hu_right_is_accepted(
    name, series, saved, chest
):
    change, warning = ACCEPTED[name]
    paths = saved(change(series()))
    (source,) = dicom.find_scans(paths[0].parent)
    read = dicom_read.read_series(source.paths)
    assert len(read.warnings) == bool(warning)
    assert re.search(warning, "".join(read.warnings))
    assert str(paths[0].parent) not in "".join(read.warnings)
    assert "Secret" not in "".join(read.warnings)
    left_out = {0, 7} if name == "missing at the ends" else set()
    kept = [k for k in range(8) if k not in left_out]
    assert np.array_equal(read.hu, chest()[kept])
    assert_same_as_itk(read, paths)


def test_ids_of_series_without_dicom_uid_are_stable_and_safe(series, saved):
    ids = {}
    for name, uid in (("a", UUID), ("b", "SERIES 2"), ("c", None)):
        images = each("SeriesInstanceUID", uid)(series())
        for _ in range(2):
            (source,) = dicom.find_scans(saved(images, name)[0].parent)
            ids.setdefault(name, set()).add(source.scan_id)
    assert ids["a"] == {UUID}
    for name in "bc":
        (uid,) = ids[name]
        assert re.fullmatch(r"series-[0-9a-f]{16}", uid)


def test_images_without_uid_beside_a_series_are_refused_with_it(series, saved):
    images = series()
    del images[7].SeriesInstanceUID
    (source,) = dicom.find_scans(saved(images)[0].parent)
    with pytest.raises(ScanError, match=r"mixed with other series: no UID, 1\.2\.826"):
        dicom_read.read_series(source.paths)


def test_copies_of_images_are_left_out(series, saved, chest):
    paths = saved(series(), "two/a")
    twins = saved([*series()[2:4]], "two/b")
    read = dicom_read.read_series([*paths, *twins])
    assert read.warnings == (
        "2 of 10 images (first 000-0.dcm) are copies of others; left out",
    )
    assert np.array_equal(read.hu, chest())
    assert_same_as_itk(read, paths)


def test_scouts_and_reformats_within_a_series_are_left_out(series, saved, chest):
    coronal = series(orientation=(1, 0, 0, 0, 0, -1))[0]
    coronal.InstanceNumber, coronal.SOPInstanceUID = 99, "1.2.99"
    read = dicom_read.read_series(saved([*series(), coronal]))
    (warning,) = read.warnings
    assert warning.startswith("1 of 9 images (first 056-8.dcm) are scouts or reformats")
    assert np.array_equal(read.hu, chest())
    scout = series(orientation=(1, 0, 0, 0, 0, -1))[0]
    scout.ImageType = ["ORIGINAL", "PRIMARY", "LOCALIZER"]
    read = dicom_read.read_series(saved([*series(), scout]))
    assert len(read.warnings) == 1
    assert np.array_equal(read.hu, chest())


def test_a_blank_slice_at_an_end_is_kept_and_one_inside_is_not(series, saved):
    paths = saved(blank_at_the_end(series()))
    read = dicom_read.read_series(paths)
    assert read.warnings == (
        "1 of 8 images (first 049-7.dcm) are blank, at an end; kept",
    )
    assert_same_as_itk(read, paths)
    images = blank_at_the_end(series())
    images[6].PixelData = images[7].PixelData
    with pytest.raises(ScanError, match="2 of 8 slices .* are blank"):
        dicom_read.read_series(saved(images))


@pytest.mark.parametrize("suffix", ["", ".dcm"])
def test_files_without_preamble_are_read(suffix, series, saved, tmp_path, chest):
    paths = saved(series(), suffix=suffix)
    for k, path in enumerate(paths):
        image = pydicom.dcmread(path)
        if k % 3 == 0:
            path.write_bytes(path.read_bytes()[132:])
            continue
        # Without meta header, too, or without only that.
        image.file_meta = pydicom.dataset.FileMetaDataset()
        image.preamble = None if k % 3 == 1 else image.preamble
        image.save_as(path, implicit_vr=k % 2 == 0, enforce_file_format=False)
    (paths[0].parent / "notes").write_bytes(bytes((8, 0, 5, 0)) + b"no DICOM at all")
    (source,) = dicom.find_scans(paths[0].parent)
    assert len(source.paths) == 8
    read = dicom_read.read_series(source.paths)
    assert np.array_equal(read.hu, chest())
    # SimpleITK refuses files that have a meta header but no preamble.


def test_another_frame_of_reference_behind_a_gap_is_refused(series, saved):
    images = [im for k, im in enumerate(series()) if k != 4]
    for image in images[4:]:
        image.FrameOfReferenceUID = "1.2.3"
    paths = saved(images)
    with pytest.raises(ScanError, match="positions cannot be compared") as caught:
        dicom_read.read_series(paths, repair=["gaps"])
    assert "--repair" not in str(caught.value)


def test_two_kernels_in_one_series_are_refused(series, saved):
    images = each("ConvolutionKernel", lambda k: ("LUNG", "SOFT")[k % 2])(series())
    with pytest.raises(ScanError, match="mixed ConvolutionKernel: '(LUNG|SOFT)' in 4"):
        dicom_read.read_series(saved(images))


def raw(tag, vr, text):
    """Writes a value that pydicom would not encode, in all images."""

    def change(images):
        for image in images:
            image[tag] = DataElement(tag, vr, text, validation_mode=0)
        return images

    return change


def nested(images):
    for image in images:
        image.ProcedureCodeSequence = []  # replaced in the file by `bury`
    return images


REFUSED = {
    "spacing of a nanometre": (
        each("PixelSpacing", ["1e-9", "1e-9"]),
        r"PixelSpacing is \[1e-9, 1e-9\]; expected at least 0.01 mm",
    ),
    "three spacings": (
        each("PixelSpacing", ["1", "2", "3"]),
        r"PixelSpacing is \[1, 2, 3\]; expected 2 numbers",
    ),
    "spacing of nothing": (
        each("PixelSpacing", ["0", "0"]),
        "expected at least 0.01 mm",
    ),
    "one position": (
        each("ImagePositionPatient", "5"),
        "ImagePositionPatient is 5.*; expected 3 numbers",
    ),
    "far position": (
        each("ImagePositionPatient", ["0", "0", "1e30"]),
        r"ImagePositionPatient is \[0, 0, 1e30\]; expected a magnitude of at most 100000",
    ),
    "huge intercept": (
        each("RescaleIntercept", "1e18"),
        "RescaleIntercept is 1e18; expected a magnitude of at most 100000",
    ),
    "two intercepts": (
        each("RescaleIntercept", ["1", "2"]),
        r"RescaleIntercept is \[1, 2\]; expected 1 number;",
    ),
    "huge slope": (
        each("RescaleSlope", "1e9"),
        "RescaleSlope is 1e9; expected a magnitude of at most 1000",
    ),
    "slope 0": (
        each("RescaleSlope", "0"),
        "RescaleSlope is 0.*expected a number other",
    ),
    "long instance number": (
        raw("InstanceNumber", "IS", "9" * 400),
        r"InstanceNumber is 9{40}\.\.\. \(400 characters\); expected a magnitude",
    ),
    "rows -1": (raw("Rows", "SS", -1), "Rows is -1; expected at least 1"),
    "rows 0": (each("Rows", 0), "Rows is 0; expected at least 1"),
    "rows 65535": (
        each("Rows", 65535),
        "Rows is 65535; expected a magnitude of at most",
    ),
    "no direction": (
        each("ImageOrientationPatient", ["0"] * 6),
        "ImageOrientationPatient is .*; expected two perpendicular unit vectors",
    ),
    "parallel directions": (
        each("ImageOrientationPatient", ["1", "0", "0", "1", "0", "0"]),
        "ImageOrientationPatient is .*; expected two perpendicular unit vectors",
    ),
    "pixels in the highest bits": (
        in_the_highest_bits,
        "HighBit is 15 with 12 bits stored, and pixels exceed these bits; expected HighBit 11",
    ),
    "other modality": (each("Modality", "PT"), "modality 'PT' in 8 of 8 images"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_values_that_no_ct_has_are_refused_by_name(name, series, saved):
    change, pattern = REFUSED[name]
    (source,) = dicom.find_scans(saved(change(series()))[0].parent)
    with pytest.raises(ScanError, match=pattern) as caught:
        dicom_read.read_series(source.paths)
    message = str(caught.value)
    assert message.startswith("series 1.2.826.0.1.3680043.8.498.1: ")
    assert "expected" in message
    if "modality" not in name:
        assert re.search(r"000-0.dcm.*restore the file", message)


def buried(depth):
    """Bytes of an element that holds `depth` sequences of undefined length, in each other."""
    start = bytes.fromhex(
        "0800 3210 5351 0000 ffffffff feff00e0 ffffffff".replace(" ", "")
    )
    end = bytes.fromhex("feff0de0 00000000 feffdde0 00000000".replace(" ", ""))
    return start * depth + end * depth


def test_sequences_nested_without_end_are_refused(series, saved):
    paths = saved(series())
    content = paths[3].read_bytes()
    at = content.index(bytes.fromhex("0800 6000".replace(" ", "")))  # Modality
    paths[3].write_bytes(content[:at] + buried(3000) + content[at:])
    (source,) = dicom.find_scans(paths[0].parent)
    assert len(source.paths) == 8
    with pytest.raises(ScanError, match="021-3.dcm.*nested too deeply"):
        dicom_read.read_series(source.paths)


@pytest.mark.parametrize(
    ("syntax", "options"),
    [
        (ImplicitVRLittleEndian, {"implicit_vr": True}),
        (ExplicitVRBigEndian, {"little_endian": False}),
        (DeflatedExplicitVRLittleEndian, {}),
    ],
)
def test_uncompressed_syntaxes_are_read(syntax, options, series, tmp_path, chest):
    paths = []
    for k, image in enumerate(series()):
        if syntax == ExplicitVRBigEndian:
            image.PixelData = image.pixel_array.byteswap().tobytes()
        image.file_meta.TransferSyntaxUID = syntax
        paths.append(tmp_path / f"{k}.dcm")
        image.save_as(paths[-1], enforce_file_format=True, **options)
    read = dicom_read.read_series(paths)
    assert np.array_equal(read.hu, chest())
    assert_same_as_itk(read, paths)


def test_lossless_jpeg_as_another_encoder_writes_it_is_read(
    series, saved, tmp_path, chest
):
    paths = saved(unsigned(series()))
    compressed = []
    for path in paths:
        image = SimpleITK.ReadImage(str(path), SimpleITK.sitkInt16)
        whole = SimpleITK.Cast(image + 1024, SimpleITK.sitkUInt16)
        writer = SimpleITK.ImageFileWriter()
        writer.SetImageIO("GDCMImageIO")
        writer.SetFileName(str(tmp_path / "encoded.dcm"))
        writer.UseCompressionOn()
        writer.SetCompressor("JPEG")
        writer.Execute(whole)
        encoded = pydicom.dcmread(tmp_path / "encoded.dcm")
        header = pydicom.dcmread(path)
        assert encoded.file_meta.TransferSyntaxUID == JPEGLosslessSV1
        header.file_meta.TransferSyntaxUID = JPEGLosslessSV1
        header["PixelData"] = encoded["PixelData"]
        compressed.append(tmp_path / f"jpeg-{path.name}")
        header.save_as(compressed[-1], enforce_file_format=True)
    read = dicom_read.read_series(compressed)
    assert np.array_equal(read.hu, chest())
    assert_same_as_itk(read, compressed)


@pytest.mark.parametrize(
    "syntax",
    [JPEGLossless, JPEGExtended12Bit, HTJ2KLossless, HTJ2KLosslessRPCL, HTJ2K],
)
def test_rare_syntaxes_have_a_decoder(syntax):
    """No encoder for these is at hand; pydicom tests the decoders with its own files."""
    assert pydicom.pixels.get_decoder(syntax).is_available


@pytest.mark.parametrize("suffix", ["", ".IMA", ".dcm.bak", ".123"])
def test_files_are_known_by_their_content_not_their_name(suffix, series, saved, chest):
    paths = saved(series(), suffix=suffix)
    (source,) = dicom.find_scans(paths[0].parent)
    assert np.array_equal(dicom_read.read_series(source.paths).hu, chest())


def dicomdir(folder):
    """A media directory, of which nothing but its kind matters here."""
    index = pydicom.Dataset()
    index.file_meta = pydicom.dataset.FileMetaDataset()
    index.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    index.file_meta.MediaStorageSOPClassUID = pydicom.uid.MediaStorageDirectoryStorage
    index.file_meta.MediaStorageSOPInstanceUID = "1.2.3"
    index.FileSetID = "CD"
    index.save_as(folder / "DICOMDIR", enforce_file_format=True)
    return folder / "DICOMDIR"


def test_a_dicomdir_stands_for_its_folder(series, saved, chest):
    folder = saved(series(), "cd/images")[0].parents[1]
    path = dicomdir(folder)
    (source,) = nifti.find_scans(folder)
    assert len(source.paths) == 8
    (source,) = nifti.find_scans(path)
    assert np.array_equal(nifti.load_scan(source).hu, chest())


def test_a_file_of_several_frames_is_a_scan_of_its_own(series, saved, chest):
    (path,) = saved([enhanced(series())])
    (source,) = nifti.find_scans(path)
    assert source.scan_id == "1.2.826.0.1.3680043.8.498.1"
    scan = nifti.load_scan(source)
    assert np.array_equal(scan.hu, chest())
    image = SimpleITK.ReadImage(str(path))
    assert np.array_equal(scan.hu, SimpleITK.GetArrayFromImage(image))


def zip_of(paths, path, prefix="scan/"):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for item in paths:
            member = zipfile.ZipInfo(f"{prefix}{item.name}")
            archive.writestr(member, item.read_bytes(), zipfile.ZIP_DEFLATED)
    return path


def test_a_zip_of_series_is_read(series, saved, tmp_path, chest):
    others = each("SeriesInstanceUID", "1.2.3")(series(chest(seed=1)))
    path = zip_of(
        [*saved(series(), "a"), *saved(others, "b", suffix=".b")], tmp_path / "x.zip"
    )
    found = {source.scan_id: source for source in nifti.find_scans(path)}
    assert set(found) == {"1.2.3", "1.2.826.0.1.3680043.8.498.1"}
    assert np.array_equal(nifti.load_scan(found["1.2.3"]).hu, chest(seed=1))
    assert all(source.paths == (path,) for source in found.values())


@pytest.mark.parametrize(
    ("prefix", "match"),
    [
        ("../", "leaves the folder"),
        ("/etc/", "leaves the folder"),
        ("C:\\x\\", "leaves the folder"),
        ("a/../../", "leaves the folder"),
    ],
)
def test_a_zip_that_leaves_its_folder_is_refused(
    prefix, match, series, saved, tmp_path
):
    path = zip_of(saved(series()), tmp_path / "x.zip", prefix)
    with pytest.raises(ScanError, match=f"x.zip: member .*{match}"):
        nifti.find_scans(path)


def test_a_zip_with_links_bombs_doubles_or_damage_is_refused(
    series, saved, tmp_path, monkeypatch
):
    paths, path = saved(series()), tmp_path / "x.zip"
    link = zipfile.ZipInfo("link.dcm")
    link.external_attr = (stat.S_IFLNK | 0o777) << 16
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(link, "/etc/passwd")
    with pytest.raises(ScanError, match="is a link or leaves"):
        nifti.find_scans(path)
    zip_of(paths, path)
    monkeypatch.setattr(zipped, "MAX_BYTES", 10_000)
    with pytest.raises(ScanError, match=r"8 files of 3\d.* kB; expected at most"):
        nifti.find_scans(path)
    monkeypatch.undo()
    with (
        pytest.warns(UserWarning, match="Duplicate name"),
        zipfile.ZipFile(path, "a") as more,
    ):
        more.write(paths[0], f"scan/{paths[0].name}")
    with pytest.raises(ScanError, match="two members are named 000-0.dcm"):
        nifti.find_scans(path)
    path.write_bytes(b"PK\x03\x04 rubbish")
    with pytest.raises(ScanError, match="x.zip: not a readable zip"):
        nifti.find_scans(path)


def test_a_file_that_cannot_be_read_costs_its_series_not_the_folder(
    series, saved, monkeypatch, caplog
):
    paths = saved(series(), "all/a")
    others = each("SeriesInstanceUID", "1.2.3")(series())
    folder = saved(others, "all/b")[0].parents[1]
    (folder / "b/pipe.dcm").touch()
    (folder / "b/pipe.dcm").unlink()
    os.mkfifo(folder / "b/pipe.dcm")
    (folder / "b/zero.dcm").symlink_to("/dev/zero")
    (folder / "b/gone.dcm").symlink_to(folder / "nothing")
    opened = Path.open

    def damaged(self, *args, **options):
        if self == paths[3]:
            raise PermissionError(13, "Permission denied", str(self))
        return opened(self, *args, **options)

    monkeypatch.setattr(Path, "open", damaged)
    with caplog.at_level(logging.WARNING):
        found = {source.scan_id: source for source in dicom.find_scans(folder)}
    assert "021-3.dcm: cannot be read (Permission denied)" in caplog.text
    assert str(folder) not in caplog.text
    assert len(found["1.2.3"].paths) == 8
    assert dicom_read.read_series(found["1.2.3"].paths).hu.shape == (8, 40, 36)
    (other,) = (source for uid, source in found.items() if uid != "1.2.3")
    assert paths[3] in other.paths

    def failing(path, *_, **__):
        if Path(path) == paths[3]:
            raise OSError(5, "Input/output error", str(path))
        return read(path, stop_before_pixels=True)

    read = pydicom.dcmread
    monkeypatch.setattr(pydicom, "dcmread", failing)
    with pytest.raises(ScanError, match=r"021-3.dcm: .*\(Input/output error\)"):
        dicom_slices.read_slices(other.paths)


def test_a_pipe_named_by_a_list_is_refused_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe.dcm")
    (tmp_path / "scans.csv").write_text("pid,image_path\na,pipe.dcm\n")
    (source,) = nifti.find_scans(tmp_path / "scans.csv")
    with pytest.raises(ScanError, match="pipe.dcm: not a regular file"):
        nifti.load_scan(source)


def better(images, uid, **changes):
    for k, image in enumerate(images):
        image.SeriesInstanceUID, image.SOPInstanceUID = uid, f"{uid}.{k}"
        for tag, value in changes.items():
            setattr(image, tag, value)
    return images


def test_the_best_series_is_regular_axial_original_long_and_thin(series, saved, chest):
    hu = chest(slices=12)
    coronal = better(series(hu, orientation=(1, 0, 0, 0, 0, -1)), "1.2.1")
    derived = better(series(hu), "1.2.2", ImageType=["DERIVED", "SECONDARY", "AXIAL"])
    gapped = better(without(5)(series(hu)), "1.2.3")
    short = better(series(hu)[:9], "1.2.4")
    thick = better(series(hu[:10], step=(0, 0, 3.0)), "1.2.5")
    best = better(series(hu[:10]), "1.2.6")
    for k, images in enumerate((coronal, derived, gapped, short, thick, best)):
        folder = saved(images, f"all/{k}")[0].parents[1]
    found = {source.scan_id: source for source in dicom.find_scans(folder)}
    order = []
    while found:
        order.append(dicom.best_series(list(found.values())).scan_id)
        del found[order[-1]]
    assert order == ["1.2.6", "1.2.5", "1.2.4", "1.2.2", "1.2.1", "1.2.3"]


def test_the_inspector_gives_a_row_per_series(series, saved, tmp_path, capsys):
    saved(series(), "all/a")
    saved(better(one("FrameOfReferenceUID", "1.9")(series()), "1.2.1"), "all/b")
    saved(better(without(3)(series()), "1.2.2"), "all/c")
    saved(
        better(
            series()[:1],
            "1.2.3",
            Modality="MR",
            SOPClassUID="1.2.840.10008.5.1.4.1.1.4",
        ),
        "all/d",
    )
    scout = better(
        series()[:1], "1.2.4", ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"]
    )
    saved(scout, "all/e")
    saved(better(each("Rows", 0)(series()), "1.2.5"), "all/f")
    (tmp_path / "all/g").mkdir()
    (tmp_path / "all/g/damaged.dcm").write_bytes(b"rubbish")
    rows = {row.series: row for row in dicom.inspect(tmp_path / "all")}
    assert rows["1.2.826.0.1.3680043.8.498.1"] == dicom.Row(
        "1.2.826.0.1.3680043.8.498.1", "CT", 8, "2.5 x 0.9 x 0.7", "ok"
    )
    assert rows["1.2.1"].verdict == "ok with warnings"
    assert "FrameOfReferenceUID" in rows["1.2.1"].reason
    assert (rows["1.2.2"].verdict, rows["1.2.2"].repair) == ("refused", "gaps")
    assert (rows["1.2.3"].modality, rows["1.2.3"].verdict) == ("MR", "refused")
    assert rows["1.2.4"].modality == "CT localizer"
    assert (rows["1.2.5"].verdict, rows["1.2.5"].repair) == ("refused", "")
    assert rows[""].reason.startswith("damaged or unreadable")
    dicom.main([str(tmp_path / "all")])
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == 1 + len(rows)
    assert printed[0].split() == [
        "series",
        "modality",
        "slices",
        "spacing_mm",
        "verdict",
        "repair",
        "reason",
    ]
    assert not re.search("Secret|LIDC-IDRI-0042", "\n".join(printed))
    with pytest.raises(SystemExit, match="no such folder"):
        dicom.main([str(tmp_path / "absent")])


@pytest.mark.parametrize(
    "name", ["plain", "frame of reference of one image", "series uid is a uuid"]
)
def test_dcm2niix_reads_the_same(name, series, saved, tmp_path):
    program = shutil.which("dcm2niix", path=Path(sys.executable).parent)
    if program is None:
        pytest.skip("no dcm2niix; install requirements/dev.txt")
    paths = saved(ACCEPTED[name][0](series()))
    out = tmp_path / "nifti"
    out.mkdir()
    command = [program, "-b", "n", "-z", "n", "-f", "ct%s", "-o", out, paths[0].parent]
    subprocess.run(command, check=True, capture_output=True)
    (path,) = out.glob("*.nii")
    image = nibabel.as_closest_canonical(nibabel.load(path))
    read = dicom_read.read_series(paths)
    values = np.asarray(image.dataobj).transpose(2, 1, 0)[:, ::-1, ::-1]
    assert np.array_equal(read.hu, values)
    at_ras_mm = nibabel.affines.apply_affine(image.affine, (35, 39, 0))
    assert np.allclose(read.grid.index_to_ras_mm((0, 0, 0)), at_ras_mm, atol=1e-3)


def test_a_ct_whose_data_set_lacks_its_class_is_read(series, saved, chest):
    images = drop("SOPClassUID")(series())
    for image in images:
        image.file_meta.MediaStorageSOPClassUID = CTImageStorage
    (source,) = dicom.find_scans(saved(images)[0].parent)
    assert np.array_equal(dicom_read.read_series(source.paths).hu, chest())
