import hashlib
import os
import re
from pathlib import Path

import numpy as np
import pydicom
import pytest
import SimpleITK
from pydicom.uid import (
    JPEG2000,
    EnhancedCTImageStorage,
    JPEG2000Lossless,
    JPEGLSLossless,
    JPEGLSNearLossless,
    RLELossless,
    RTStructureSetStorage,
)

from cohorts import (
    dicom,
    dicom_checks,
    dicom_headers,
    dicom_read,
    dicom_slices,
    dicom_volume,
    plausible,
    pseudonyms,
)
from ct import files
from ct.geometry import flip_xy, to_source
from ct.scan import AIR_HU, ScanError

ROOT = Path(__file__).parents[2]
DATA = Path(os.environ.get("LUNG_DATA", ROOT.parent / "shared/data"))

PYDICOM_FILES = Path(pydicom.__file__).parent / "data/test_files"
"""Installed with pydicom."""

STEP_MM = 2.5
"""Between the slices that `ct_series` makes."""

OBLIQUE = np.linalg.qr([[0.9, 0.2, 0.1], [-0.1, 0.95, 0.3], [0.1, -0.3, 0.9]])[0]


def read_with_itk(paths):
    """(slice, row, column) HU and image, by GDCM, which sorts along the normal too."""
    reader = SimpleITK.ImageSeriesReader()
    names = reader.GetGDCMSeriesFileNames(str(Path(paths[0]).parent))
    reader.SetFileNames(names)
    image = reader.Execute()
    return SimpleITK.GetArrayFromImage(image), image


def without_padding(hu):
    return np.where(hu < dicom_volume.PADDING_HU, AIR_HU, hu)


def refused(images, saved, **options):
    with pytest.raises(ScanError) as caught:
        dicom_read.read_series(saved(images), **options)
    return str(caught.value)


def test_hu_and_place_are_those_of_the_headers(series, saved, chest):
    read = dicom_read.read_series(saved(series()))
    assert read.hu.dtype == np.int16
    assert np.array_equal(read.hu, chest())
    assert np.allclose(read.grid.spacing_mm, (2.5, 0.9, 0.7))
    # The first pixel's LPS position is (-7, -11, -30); RAS flips x and y.
    assert np.allclose(read.grid.index_to_ras_mm((0, 0, 0)), (7, 11, -30))
    # Next column: 0.7 mm to the left; next row: 0.9 mm to the back.
    assert np.allclose(read.grid.index_to_ras_mm((0, 1, 1)), (7 - 0.7, 11 - 0.9, -30))


@pytest.mark.parametrize(
    "orientation",
    [
        (1, 0, 0, 0, 1, 0),
        (-1, 0, 0, 0, 1, 0),
        (1, 0, 0, 0, -1, 0),
        (0, 1, 0, 0, 0, -1),
        (1, 0, 0, 0, 0, -1),
        tuple(OBLIQUE[:2].ravel()),
    ],
)
def test_simpleitk_reads_the_same_values_at_the_same_places(orientation, series, saved):
    paths = saved(series(orientation=orientation))
    read = dicom_read.read_series(paths)
    values, image = read_with_itk(paths)
    back = to_source(read.hu, read.grid, read.source_grid)
    assert np.array_equal(back, values.T)
    for index in [(0, 0, 0), (3, 5, 7), (29, 12, 6)]:
        at_ras_mm = flip_xy(image.TransformIndexToPhysicalPoint(index))
        z, y, x = np.rint(read.grid.ras_mm_to_index(at_ras_mm)).astype(int)
        assert np.allclose(read.grid.index_to_ras_mm((z, y, x)), at_ras_mm, atol=1e-4)
        assert read.hu[z, y, x] == image[index]


@pytest.mark.parametrize(
    ("syntax", "tolerance_hu"),
    [
        (RLELossless, 0),
        (JPEGLSLossless, 0),
        (JPEGLSNearLossless, 2),
        (JPEG2000Lossless, 0),
        (JPEG2000, 40),
    ],
)
@pytest.mark.parametrize("kind", [np.int16, np.uint16])
def test_compressed_series_give_the_same_hu(
    syntax, tolerance_hu, kind, series, saved, chest
):
    images = series()
    options = {JPEGLSNearLossless: {"jls_error": 2}, JPEG2000: {"j2k_cr": [4]}}
    for image in images:
        stored = image.pixel_array.astype(kind)
        image.PixelRepresentation = int(kind is np.int16)
        image.compress(syntax, arr=stored, **options.get(syntax, {}))
    read = dicom_read.read_series(saved(images))
    assert read.acquisition["TransferSyntax"] == syntax.name
    assert np.abs(read.hu.astype(int) - chest()).max() <= tolerance_hu


def test_jpeg_2000_with_a_wrong_sign_in_its_header_is_read():
    # The codestream says unsigned, the DICOM header signed; from pydicom's own tests.
    path = PYDICOM_FILES / "J2K_pixelrep_mismatch.dcm"
    (item,) = dicom_slices.read_slices([path])
    (stored,) = dicom_volume._stored_pixels(path, [item])
    assert stored.min() == -2000
    assert dicom_volume.to_hu(stored, item)[0, 0] == AIR_HU


def test_jpeg_extended_is_decoded_as_another_decoder_does():
    path = PYDICOM_FILES / "JPGExtended.dcm"
    header = pydicom.dcmread(path)
    assert header.file_meta.TransferSyntaxUID.name.startswith("JPEG Extended")
    stored = pydicom.pixels.pixel_array(path, raw=True)
    other = SimpleITK.GetArrayFromImage(SimpleITK.ReadImage(str(path)))[0]
    # Decoders of lossy JPEG may round differently.
    assert np.abs(stored.astype(int) - other).max() <= 1
    assert stored.max() > 100


def test_rescale_is_taken_from_each_slice(series, saved, chest):
    images = series()
    stored = np.rint((chest()[2] + 1000) / 0.5).astype(np.int16)
    images[2].PixelData = stored.tobytes()
    images[2].RescaleSlope, images[2].RescaleIntercept = "0.5", "-1000"
    assert np.array_equal(dicom_read.read_series(saved(images)).hu, chest())


def test_twelve_bits_with_rubbish_in_the_unused_bits_are_cleaned(series, saved, chest):
    images = series()
    for image in images:
        stored = image.pixel_array.astype(np.uint16) | 0x8000
        image.PixelData = stored.tobytes()
        image.BitsStored, image.HighBit, image.PixelRepresentation = 12, 11, 0
    assert np.array_equal(dicom_read.read_series(saved(images)).hu, chest())


def test_padding_becomes_air_whichever_way_it_is_written(series, saved):
    images = series()
    for image in images:
        stored = image.pixel_array.copy()
        stored[0, 0] = -2000
        stored[0, 1] = 3072
        stored[0, 2] = 4000
        stored[
            0, 3
        ] = -1024  # -2048 HU: no padding value says so, but no density either
        image.PixelData = stored.tobytes()
    for image in images[:4]:
        # Many files have the padding of signed pixels as an unsigned number.
        image.add_new("PixelPaddingValue", "US", 63536)
    for image in images[4:]:
        image.add_new("PixelPaddingValue", "SS", 4500)
        image.add_new("PixelPaddingRangeLimit", "SS", 4000)
        image.RescaleIntercept = "-1024"
    hu = dicom_read.read_series(saved(images)).hu
    assert (hu[:4, 0, :4] == [AIR_HU, 2048, 2976, AIR_HU]).all()
    # 4000 stored is 2976 HU, which metal can have: it stays.
    assert (hu[4:, 0, :4] == [AIR_HU, 2048, 2976, AIR_HU]).all()


def test_padding_above_every_density_becomes_air(series, saved):
    images = series()
    for image in images:
        stored = image.pixel_array.copy()
        stored[0, :2] = 4096, 5000
        image.PixelData = stored.tobytes()
        image.add_new("PixelPaddingValue", "SS", 5000)
        image.add_new("PixelPaddingRangeLimit", "SS", 4096)
    assert (dicom_read.read_series(saved(images)).hu[:, 0, :2] == AIR_HU).all()


def test_water_declared_as_padding_stays_water(series, saved, chest):
    images = series()
    for image in images:
        image.add_new("PixelPaddingValue", "SS", 1024)
    assert np.array_equal(dicom_read.read_series(saved(images)).hu, chest())


def test_values_beyond_int16_are_clipped(series, saved):
    images = series()
    for image in images:
        stored = image.pixel_array.astype(np.uint16)
        stored[0, 0] = 65535
        image.PixelData = stored.tobytes()
        image.PixelRepresentation = 0
    assert (dicom_read.read_series(saved(images)).hu[:, 0, 0] == 32767).all()


def test_small_jitter_of_positions_is_accepted(series, saved):
    images = series()
    images[3].ImagePositionPatient = [-7.0, -11.0, -30 + 3 * STEP_MM + 0.02]
    assert dicom_read.read_series(saved(images)).grid.spacing_mm[0] == pytest.approx(
        2.5
    )


def test_slices_are_found_by_their_sop_instance_uid(series, saved, chest):
    images = series(orientation=(1, 0, 0, 0, -1, 0))
    read = dicom_read.read_series(saved(images))
    for k, image in enumerate(images):
        z = read.z_of_sop[image.SOPInstanceUID]
        assert np.array_equal(read.hu[z], chest()[k][::-1])


def test_an_enhanced_ct_file_gives_the_volume_of_its_slices(series, saved, chest):
    (path,) = saved([enhanced(series())])
    read = dicom_read.read_series([path])
    assert np.array_equal(read.hu, chest())
    image = SimpleITK.ReadImage(str(path))
    at_ras_mm = flip_xy(image.TransformIndexToPhysicalPoint((3, 5, 7)))
    z, y, x = np.rint(read.grid.ras_mm_to_index(at_ras_mm)).astype(int)
    assert np.allclose(read.grid.index_to_ras_mm((z, y, x)), at_ras_mm, atol=1e-4)
    assert read.hu[z, y, x] == image[3, 5, 7]


def enhanced(images):
    """A multi-frame file of single images."""
    whole = images[0]
    whole.SOPClassUID = EnhancedCTImageStorage
    whole.file_meta.MediaStorageSOPClassUID = EnhancedCTImageStorage
    whole.NumberOfFrames = len(images)
    whole.PixelData = b"".join(image.PixelData for image in images)
    groups = []
    for image in images:
        group = pydicom.Dataset()
        group.PlanePositionSequence = [picked(image, "ImagePositionPatient")]
        groups.append(group)
    shared = pydicom.Dataset()
    shared.PlaneOrientationSequence = [picked(whole, "ImageOrientationPatient")]
    shared.PixelMeasuresSequence = [picked(whole, "PixelSpacing", "SliceThickness")]
    shared.PixelValueTransformationSequence = [
        picked(whole, "RescaleSlope", "RescaleIntercept")
    ]
    whole.PerFrameFunctionalGroupsSequence = groups
    whole.SharedFunctionalGroupsSequence = [shared]
    for tag in (
        "ImagePositionPatient",
        "ImageOrientationPatient",
        "PixelSpacing",
        "RescaleSlope",
        "RescaleIntercept",
    ):
        del whole[tag]
    return whole


def picked(image, *tags):
    item = pydicom.Dataset()
    for tag in tags:
        setattr(item, tag, image[tag].value)
    return item


def test_a_missing_slice_is_refused_and_interpolated(series, saved, chest):
    images = series()
    del images[3]
    message = refused(images, saved)
    assert "about 1 slices missing; the widest is 5.000 mm between" in message
    assert (
        "at -25.00 mm; expected 2.500 mm throughout (fix with --repair gaps" in message
    )
    hu = dicom_read.read_series(saved(images), repair=["gaps"]).hu
    expected = chest()
    between = np.rint((expected[2].astype(float) + expected[4]) / 2)
    assert np.array_equal(hu[3], between)
    others = [0, 1, 2, 4, 5, 6, 7]
    assert np.array_equal(hu[others], expected[others])


def test_a_wide_gap_is_not_interpolated(series, saved):
    images = series()
    message = refused(images[:2] + images[6:], saved, repair=["gaps"])
    assert "the widest is 12.500 mm" in message
    assert "gaps above 10 mm are not interpolated" in message


def test_uneven_spacing_is_refused_and_resampled(series, saved):
    images = series()
    for k, image in enumerate(images):
        # 40, 45, ... HU: linear in the position, so interpolation is exact.
        z = -30 + 2.5 * k + (1.0 if k == 4 else 0)
        image.ImagePositionPatient = [-7, -11, z]
        stored = image.pixel_array.copy()
        stored[10, 10] = 1064 + 2 * (z + 30)
        image.PixelData = stored.tobytes()
    assert "2 uneven gaps" in refused(images, saved)
    read = dicom_read.read_series(saved(images), repair=["gaps"])
    assert read.hu[:, 10, 10].tolist() == [40, 45, 50, 55, 60, 65, 70, 75]


def test_doubled_slices_are_refused_and_the_lower_instance_kept(series, saved, chest):
    images = series()
    twin = series()[5]
    twin.InstanceNumber, twin.SOPInstanceUID = 99, "1.2.3.99"
    twin.PixelData = bytes(len(twin.PixelData))
    message = refused([twin, *images], saved)
    assert "1 duplicate slices, first 042-6.dcm and 000-0.dcm at -17.50 mm" in message
    assert "--repair duplicates" in message
    read = dicom_read.read_series(saved([twin, *images]), repair=["duplicates"])
    assert np.array_equal(read.hu, chest())


def second_set(series, **changes):
    """The images of the same positions again, of another noise, numbered from 101."""
    images = series()
    for k, image in enumerate(images):
        image.InstanceNumber, image.SOPInstanceUID = 101 + k, f"1.2.3.{k + 1}"
        image.PixelData = (image.pixel_array + 1).astype(np.int16).tobytes()
        for tag, value in changes.items():
            setattr(image, tag, value)
    return images


@pytest.mark.parametrize(
    ("tag", "value"),
    [
        ("ConvolutionKernel", "LUNG"),
        ("SliceThickness", "5"),
        ("AcquisitionNumber", 2),
        ("ImageType", ["DERIVED", "PRIMARY", "AXIAL"]),
    ],
)
def test_two_reconstructions_at_the_same_positions_are_not_mended(
    tag, value, series, saved
):
    images = series() + second_set(series, **{tag: value})
    message = refused(images, saved, repair=["duplicates"])
    assert tag in message
    assert "--repair" not in message


def test_of_two_sets_at_the_same_positions_one_stays_throughout(series, saved, chest):
    paths = saved(series() + second_set(series))
    read = dicom_read.read_series(paths, repair=["duplicates"])
    assert np.array_equal(read.hu, chest())


def test_two_sets_numbered_against_each_other_are_not_mixed(series, saved, chest):
    others = second_set(series)
    for k, image in enumerate(others):
        image.InstanceNumber = 8 - k
    both = series() + others
    message = refused(both, saved, repair=["duplicates"])
    assert "neither InstanceNumber nor folder shows which images belong" in message
    for k, image in enumerate(others):
        image.InstanceNumber = k + 1
    assert "neither InstanceNumber" in refused(both, saved, repair=["duplicates"])
    # A folder each: the first of the folders is taken.
    paths = saved(series(), "two/a") + saved(others, "two/b")
    assert np.array_equal(
        dicom_read.read_series(paths, repair=["duplicates"]).hu, chest()
    )


def test_files_that_lie_there_twice_are_mended_whatever_their_numbers(
    series, saved, chest
):
    images = series()
    for image in images:
        image.InstanceNumber = 0
    paths = saved(images, "two/a") + saved(images[3:], "two/b")
    read = dicom_read.read_series(paths, repair=["duplicates"])
    assert np.array_equal(read.hu, chest())


def tilted(series, degrees):
    angle = np.radians(degrees)
    orientation = (1, 0, 0, 0, np.cos(angle), np.sin(angle))
    images = series(orientation=orientation, step=(0, 0, STEP_MM))
    for image in images:
        image.GantryDetectorTilt = str(degrees)
    return images


def test_gantry_tilt_is_refused_with_its_angle(series, saved):
    message = refused(tilted(series, 12), saved)
    assert "leans 12.0 deg from the slice normal (gantry tilt)" in message
    assert "--repair tilt" in message


def test_a_straightened_stack_keeps_every_voxel_in_its_place(series, saved):
    images = tilted(series, 12)
    read = dicom_read.read_series(saved(images), repair=["tilt"])
    axes = read.grid.affine[:3, :3] / read.grid.spacing_mm
    assert np.allclose(axes.T @ axes, np.eye(3), atol=1e-6)
    assert read.grid.spacing_mm[0] == pytest.approx(2.5 * np.cos(np.radians(12)))
    # A bright voxel of the middle slice is found where the header says it is.
    images = tilted(series, 12)
    stored = images[4].pixel_array.copy()
    stored[9:12, 9:12] = 4000
    images[4].PixelData = stored.tobytes()
    read = dicom_read.read_series(saved(images), repair=["tilt"])
    row_mm = 10 * 0.9 * np.array([0, np.cos(np.radians(12)), np.sin(np.radians(12))])
    expected = np.array([-7 + 10 * 0.7, -11, -30 + 4 * 2.5]) + row_mm
    bright = np.argwhere(read.hu > 1000)
    weights = read.hu[tuple(bright.T)].astype(float) + 1024
    found = np.average(read.grid.index_to_ras_mm(bright), axis=0, weights=weights)
    assert np.allclose(found, flip_xy(expected), atol=0.25)


def test_a_tilt_that_the_positions_do_not_show_is_refused(series, saved, chest):
    images = series()
    for image in images:
        image.GantryDetectorTilt = "15"
    assert "GantryDetectorTilt is 15 deg in 000-0.dcm" in refused(images, saved)
    read = dicom_read.read_series(saved(images), repair=["tilt"])
    assert np.array_equal(read.hu, chest())


def changed(tag, value):
    def change(images):
        setattr(images[3], tag, value)

    return change


def drop(tag):
    def change(images):
        del images[3][tag]

    return change


REFUSALS = {
    "sideways": (
        changed("ImagePositionPatient", [-2.0, -11.0, -22.5]),
        r"021-3.dcm lies [34]\.\d+ mm off the line",
    ),
    "modality": (changed("Modality", "MR"), "modality 'MR' in 1 of 8 images"),
    "monochrome1": (
        changed("PhotometricInterpretation", "MONOCHROME1"),
        "PhotometricInterpretation 'MONOCHROME1'.*expected MONOCHROME2",
    ),
    "rescale type": (
        changed("RescaleType", "MGML"),
        "RescaleType 'MGML'.*expected HU or US",
    ),
    "localizer": (
        changed("ImageType", ["ORIGINAL", "PRIMARY", "LOCALIZER"]),
        "about 1 slices missing",  # it is left out
    ),
    "series": (
        changed("SeriesInstanceUID", "1.2.3"),
        "mixed with other series: 1.2.3, 1.2.826.*expected one SeriesInstanceUID",
    ),
    "patient": (
        changed("PatientID", "Secret"),
        "mixed PatientIDs: 1 of 8 images .first 021-3.dcm. differ from 000-0.dcm",
    ),
    "orientation": (
        changed("ImageOrientationPatient", [1, 0, 0, 0, 0.99, 0.141]),
        "mixed orientation",
    ),
    "spacing": (changed("PixelSpacing", [0.8, 0.7]), "mixed pixel spacing in mm: .0.8"),
    "matrix": (
        changed("Rows", 12),
        r"mixed matrix size: \[12, 36\] in 1 of 8 images .first 021-3.dcm.",
    ),
    **{
        tag: (drop(tag), rf"021-3.dcm has no {tag}")
        for tag in dicom_headers.REQUIRED_TAGS
    },
    "short tag": (
        changed("ImageOrientationPatient", [1, 0, 0, 0, 1]),
        "021-3.dcm: ImageOrientationPatient is .*; expected 6 numbers",
    ),
    **{
        f"{tag} {value}": (
            changed(tag, [value, *rest]),
            f"021-3.dcm: {tag} is .*{value}.*; expected finite numbers",
        )
        for tag, rest in (
            ("ImagePositionPatient", ["0", "0"]),
            ("ImageOrientationPatient", ["0", "0", "0", "1", "0"]),
            ("PixelSpacing", ["1"]),
            ("RescaleSlope", []),
            ("RescaleIntercept", []),
        )
        for value in ("nan", "inf")
    },
    "empty tag": (changed("RescaleSlope", None), "021-3.dcm has no RescaleSlope"),
}


@pytest.mark.filterwarnings("ignore::UserWarning")  # pydicom's, of values it doubts
@pytest.mark.parametrize("name", REFUSALS)
def test_a_defect_is_named_with_file_value_and_expectation(name, series, saved):
    change, pattern = REFUSALS[name]
    images = series()
    change(images)
    with pytest.raises(ScanError, match=pattern) as caught:
        dicom_read.read_series(saved(images))
    assert "Secret" not in str(caught.value)
    assert "LIDC-IDRI-0042" not in str(caught.value)


def test_axes_that_are_not_perpendicular_are_refused(series, saved):
    images = series()
    for image in images:
        image.ImageOrientationPatient = [1, 0, 0, 0.2, 0.98, 0]
    assert "expected two perpendicular unit vectors" in refused(images, saved)


def test_a_single_image_is_refused(series, saved):
    assert "only one image (000-0.dcm)" in refused(series()[:1], saved)


def test_a_truncated_file_is_named(series, saved):
    paths = saved(series())
    paths[3].write_bytes(paths[3].read_bytes()[:-100])
    with pytest.raises(
        ScanError, match=r"cannot read the pixels of 021-3.dcm .*1390.*40,36"
    ):
        dicom_read.read_series(paths)


@pytest.mark.parametrize("size", [0, 60, 250, 700])
def test_a_file_cut_in_its_header_is_refused_with_its_series(size, series, saved):
    paths = saved(series())
    paths[7].write_bytes(paths[7].read_bytes()[:size])
    (source,) = dicom.find_scans(paths[0].parent)
    assert len(source.paths) == 8
    with pytest.raises(ScanError, match=paths[7].name):
        dicom_read.read_series(source.paths)


@pytest.mark.parametrize("syntax", [RLELossless, JPEGLSLossless, JPEG2000Lossless])
def test_a_damaged_compressed_slice_is_named(syntax, series, saved):
    images = series()
    for image in images:
        image.compress(syntax)
    images[3].PixelData = pydicom.encaps.encapsulate([b"\x00\x01 rubbish " * 8])
    with pytest.raises(ScanError, match="021-3.dcm"):
        dicom_read.read_series(saved(images))


@pytest.mark.filterwarnings("ignore::UserWarning")  # pydicom's, of values it doubts
@pytest.mark.parametrize("seed", range(40))
def test_random_damage_is_refused_or_harmless_but_never_a_crash(seed, series, saved):
    paths = saved(series())
    rng = np.random.default_rng(seed)
    damaged = bytearray(paths[3].read_bytes())
    for at in rng.integers(128, 1100, 4):
        damaged[at] = rng.integers(0, 256)
    paths[3].write_bytes(damaged)
    try:
        found = dicom.find_scans(paths[0].parent)
        hu = [dicom_read.read_series(source.paths).hu for source in found]
    except ScanError as error:
        assert "021-3.dcm" in str(error) or "series 1." in str(error)
    else:
        assert hu[0].shape == (8, 40, 36)


def test_a_slice_of_another_scan_is_named(series, saved):
    images = series()
    stored = images[3].pixel_array
    images[3].PixelData = stored.byteswap().tobytes()
    message = refused(images, saved)
    assert re.search(r"by \d+ HU from 014-2.dcm to 021-3.dcm", message)
    assert re.search(r"by \d+ HU from 021-3.dcm to 028-4.dcm", message)


def test_a_block_of_blank_slices_is_refused(series, saved):
    images = series()
    for image in images[2:5]:
        image.PixelData = bytes(len(image.PixelData))
    message = refused(images, saved)
    assert "3 of 8 slices (014-2.dcm, 021-3.dcm, 028-4.dcm) are blank" in message
    assert "-1024 HU throughout" in message


def test_a_block_of_slices_half_blank_is_refused(series, saved):
    images = series()
    for image in images[2:5]:
        stored = image.pixel_array.copy()
        stored[20:] = 0
        image.PixelData = stored.tobytes()
    assert re.search(
        r": 2 pairs of .* from 007-1.dcm to 014-2.dcm, and by \d+ HU from 028-4.dcm",
        refused(images, saved),
    )


def test_half_a_series_of_another_intercept_is_refused(series, saved):
    images = series()
    for image in images[4:]:
        image.RescaleIntercept = "0"
    message = refused(images, saved)
    assert re.search(r"by 1\d\d\d HU from 021-3.dcm to 028-4.dcm", message)
    assert "from another scan, or rescaled differently" in message


def test_a_copy_of_the_slice_before_is_refused(series, saved):
    images = series()
    images[4].PixelData = images[3].PixelData
    message = refused(images, saved)
    assert "1 of 8 slices (028-4.dcm) are identical to the previous slice" in message
    assert "(first 021-3.dcm)" in message


@pytest.mark.parametrize(
    ("intercept", "hint"),
    [
        ("0", "they would be after subtracting 1024"),
        ("-2048", "99th percentile -1024, -1024, -9"),
    ],
)
def test_a_wrong_intercept_is_named(intercept, hint, series, saved):
    images = series()
    for image in images:
        image.RescaleIntercept = intercept
    message = refused(images, saved)
    assert "the values are not Hounsfield units" in message
    assert hint in message


def test_values_of_another_modality_are_refused():
    rng = np.random.default_rng(0)
    mr = rng.integers(0, 700, (4, 30, 30)).astype(np.int16)
    with pytest.raises(ScanError, match="scan: .*expected air near -1000"):
        plausible.check_hu(mr, "scan")


def test_a_field_wider_than_any_scanner_is_refused(series, saved):
    images = series()
    for image in images:
        image.PixelSpacing = ["90", "70"]
    expected = r"the field is 20 x 3600 x 2520 mm .*at most 3000 x 1000 x 1000"
    with pytest.raises(ScanError, match=expected):
        dicom_read.read_series(saved(images))


def test_an_unknown_repair_is_refused(series, saved):
    with pytest.raises(ValueError, match=r"repair \['gap'\]: expected any of gaps"):
        dicom_read.read_series(saved(series()), repair=["gap"])


def other_object(images, sop_class, modality):
    image = images[0]
    image.SOPClassUID = image.file_meta.MediaStorageSOPClassUID = sop_class
    image.SeriesInstanceUID, image.Modality = "1.2.3.4", modality
    return image


def test_series_are_found_whatever_else_lies_in_the_folder(series, saved, tmp_path):
    saved(series(), "patient/study/series", suffix="")
    saved([other_object(series(), RTStructureSetStorage, "RTSTRUCT")], "patient/rt")
    scout = series()[0]
    scout.ImageType, scout.SeriesInstanceUID = (
        ["ORIGINAL", "PRIMARY", "LOCALIZER"],
        "9.9",
    )
    saved([scout], "patient/study/series/scout")
    folder = tmp_path / "patient"
    (folder / "notes.txt").write_text("no DICOM")
    (folder / "study/series/._000-0.dcm").write_bytes(b"left by another system")
    (source,) = dicom.find_scans(folder)
    assert source.patient_id == "LIDC-IDRI-0042"
    assert len(source.paths) == 8


def test_links_to_folders_are_followed_and_no_folder_is_read_twice(
    series, saved, tmp_path
):
    (tmp_path / "linked/again").mkdir(parents=True)
    saved(series(), "stored/series")
    for name in ("linked/one", "linked/two"):
        (tmp_path / name).symlink_to(tmp_path / "stored")
    (tmp_path / "linked/again/loop").symlink_to(tmp_path / "linked")
    (tmp_path / "stored/readers.XML").write_text("<x>")
    (source,) = dicom.find_scans(tmp_path / "linked")
    assert len(source.paths) == 8
    names = [
        path.relative_to(tmp_path) for path in files.files_below(tmp_path / "linked")
    ]
    assert len(names) == 9
    assert Path("linked/one/readers.XML") in names


def test_files_of_several_series_in_one_folder_are_told_apart(series, saved):
    images, others = series(), series()
    for k, image in enumerate(others):
        image.SeriesInstanceUID = "1.2.3"
        image.SOPInstanceUID = f"1.2.3.{k}"
    paths = saved(images) + saved(others, suffix=".img")
    found = dicom.find_scans(paths[0].parent)
    assert [(s.scan_id, len(s.paths)) for s in found] == [
        ("1.2.3", 8),
        (images[0].SeriesInstanceUID, 8),
    ]


def test_a_folder_without_ct_says_what_it_holds(series, saved, tmp_path):
    paths = saved([other_object(series(), RTStructureSetStorage, "RTSTRUCT")])
    with pytest.raises(ScanError, match=r"no CT series; found 1 .*\(1 RTSTRUCT\)"):
        dicom.find_scans(paths[0].parent)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ScanError, match="found no DICOM file"):
        dicom.find_scans(tmp_path / "empty")
    with pytest.raises(ScanError, match="no such folder"):
        dicom.find_scans(tmp_path / "absent")
    with pytest.raises(
        ScanError, match="RT Structure Set Storage of modality RTSTRUCT"
    ):
        dicom_read.read_series(paths)


@pytest.mark.parametrize("uid", ["../../escaped", "..", "/tmp/x", "1" * 65, "A B"])
@pytest.mark.filterwarnings("ignore::UserWarning")  # pydicom's, of a UID it doubts
def test_a_uid_that_could_name_another_folder_is_hashed(uid, series, saved, chest):
    images = series()
    for image in images:
        image.SeriesInstanceUID = uid
    (source,) = dicom.find_scans(saved(images)[0].parent)
    assert re.fullmatch(r"series-[0-9a-f]{16}", source.scan_id)
    read = dicom_read.read_series(source.paths)
    assert read.series_uid == source.scan_id
    assert np.array_equal(read.hu, chest())


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_one_slice_with_another_uid_is_missed(series, saved):
    images = series()
    images[3].SeriesInstanceUID = "../../escaped"
    _, source = sorted(
        dicom.find_scans(saved(images)[0].parent), key=lambda s: len(s.paths)
    )
    with pytest.raises(ScanError, match="about 1 slices missing"):
        dicom_read.read_series(source.paths)


def patients_of(saved, *ids):
    """The patients that `find_scans` gives for series of these PatientIDs."""
    folder = None
    for k, (images, patient_id) in enumerate(ids, start=1):
        for image in images:
            image.PatientID = patient_id
            image.SeriesInstanceUID, image.StudyInstanceUID = f"1.2.{k}", f"1.3.{k}"
        folder = saved(images, f"found/{k}")[0].parents[1]
    return [source.patient_id for source in dicom.find_scans(folder)]


def test_patient_ids_that_are_not_public_become_pseudonyms_of_a_secret_key(
    series, saved, key_file
):
    def found():
        return patients_of(
            saved,
            (series(), "4711007"),
            (series(), "4711008"),
            (series(), "4711007"),
            (series(), "LIDC-IDRI-0042"),
        )

    first = found()
    assert first[0] == first[2] != first[1]
    assert first[3] == "LIDC-IDRI-0042"
    assert all(re.fullmatch(r"p-[0-9a-f]{12}", p) for p in first[:3])
    assert first[0] != "p-" + hashlib.sha256(b"4711007").hexdigest()[:12]
    assert key_file.stat().st_mode & 0o777 == 0o600
    assert len(key_file.read_bytes()) == 32
    assert list(key_file.parent.iterdir()) == [key_file]
    pseudonyms.read_key.cache_clear()  # as a later run of the same user
    assert found() == first
    key_file.write_bytes(bytes(32))
    pseudonyms.read_key.cache_clear()
    assert found()[0] not in first


def test_the_key_lies_in_the_users_settings(monkeypatch, tmp_path):
    monkeypatch.delenv("LUNG_PATIENT_KEY_FILE")
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    assert pseudonyms.key_path() == tmp_path / "lung-nodules/patient_key"
    monkeypatch.delenv("XDG_CONFIG_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert pseudonyms.key_path() == tmp_path / "home/.config/lung-nodules/patient_key"


def test_a_damaged_key_is_refused_not_replaced(series, saved, key_file):
    key_file.parent.mkdir()
    key_file.write_bytes(b"short")
    with pytest.raises(ValueError, match="patient_key: 5 bytes; expected a key of 32"):
        patients_of(saved, (series(), "4711007"))
    assert key_file.read_bytes() == b"short"


def test_public_ids_need_no_key(series, saved, key_file):
    patients_of(saved, (series(), "LIDC-IDRI-0042"))
    assert not key_file.exists()


@pytest.mark.parametrize(
    "name",
    ["", "ANONYMOUS", "Anon^Anon", "anonymized000", "UNKNOWN", "0", "N/A", "---"],
)
def test_an_id_that_means_nobody_makes_each_study_a_patient(
    name, series, saved, caplog
):
    ids = patients_of(saved, (series(), name), (series(), name), (series(), "Anna"))
    assert len(set(ids)) == 3
    assert len(caplog.records) == 1
    assert "2 of 3 series have no PatientID of their own" in caplog.text


def test_two_series_of_a_study_without_patient_are_one_patient(series, saved):
    images, others = series(), series()
    for image in others:
        image.SeriesInstanceUID = "1.2.3"
    for image in images + others:
        image.PatientID = ""
    saved(images, "both/a")
    folder = saved(others, "both/b")[0].parents[1]
    assert len({source.patient_id for source in dicom.find_scans(folder)}) == 1


def test_nothing_personal_leaves_the_reader(series, saved):
    read = dicom_read.read_series(saved(series()))
    assert read.acquisition == {
        "Manufacturer": "Maker",
        "ConvolutionKernel": "STANDARD",
        "KVP": 120.0,
        "SliceThickness": 2.5,
        "TransferSyntax": "Explicit VR Little Endian",
    }


@pytest.mark.lidc
@pytest.mark.parametrize(
    "folder",
    [
        "LIDC-IDRI/LIDC-IDRI-0001",
        "LIDC-IDRI/LIDC-IDRI-0003",
        "Lung-PET-CT-Dx",
        "COVID-CT-MD/normal001",
        "COVID-CT-MD/P001",
        "COVID-CT-MD/cap001",
    ],
)
def test_real_series_agree_with_simpleitk_voxel_for_voxel(folder):
    if not (DATA / folder).is_dir():
        pytest.skip(f"no {folder} in {DATA}; set LUNG_DATA")
    (source,) = dicom.find_scans(DATA / folder)
    read = dicom_read.read_series(source.paths)
    values, image = read_with_itk(source.paths)
    assert np.array_equal(read.hu, without_padding(values))
    corner = [n - 1 for n in image.GetSize()]
    at_ras_mm = flip_xy(image.TransformIndexToPhysicalPoint(corner))
    assert np.allclose(read.grid.index_to_ras_mm(corner[::-1]), at_ras_mm, atol=1e-3)
    assert read.warnings == ()
    assert source.patient_id.startswith(("LIDC-IDRI-000", "p-"))


@pytest.mark.lidc
@pytest.mark.parametrize("folder", ["LIDC-IDRI/LIDC-IDRI-0001", "Lung-PET-CT-Dx"])
def test_damage_to_some_slices_of_a_real_series_is_refused(folder):
    if not (DATA / folder).is_dir():
        pytest.skip(f"no {folder} in {DATA}; set LUNG_DATA")
    (source,) = dicom.find_scans(DATA / folder)
    slices = dicom_slices.sorted_slices(dicom_slices.read_slices(source.paths))
    volume, _ = dicom_volume.stack_slices(slices)
    blank, half_blank, offset, copied = (volume.copy() for _ in range(4))
    blank[20:23] = AIR_HU
    half_blank[20:23, 256:] = AIR_HU
    offset[len(offset) // 2 :] += 1024
    copied[30] = copied[29]
    dicom_checks.check_neighbours(volume, slices)
    for damaged, message in (
        (blank, "3 of .* are blank"),
        (half_blank, f": 2 pairs of .* from {slices[19].name} to {slices[20].name}"),
        (offset, ": 1 pairs of .* by 10\\d\\d HU"),
        (copied, f"1 of .*{slices[30].name}.* identical to the previous slice"),
    ):
        with pytest.raises(ScanError, match=message):
            dicom_checks.check_neighbours(damaged, slices)
