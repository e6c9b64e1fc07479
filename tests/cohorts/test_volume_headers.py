"""What the headers of volume files leave open is refused or said; see docs/data.md.

One case per row of the table there. Accepted files lie where SimpleITK or nibabel puts them.
"""

import gzip
import re
import zlib

import nibabel
import numpy as np
import pytest
import SimpleITK

from cohorts import nifti, volume_file
from ct.geometry import flip_xy
from ct.scan import ScanError

AFFINE = np.array(
    [[-0.7, 0, 0, 20], [0, -0.9, 0, 30], [0, 0, 2.5, -40], [0, 0, 0, 1]], float
)
SHAPE = (36, 40, 8)
"""(i, j, k) of `chest`."""

LIST = "pid,image_path,spacing_z_mm,spacing_y_mm,spacing_x_mm\n"

METAIMAGE = {
    "ObjectType": "Image",
    "NDims": "3",
    "BinaryData": "True",
    "BinaryDataByteOrderMSB": "False",
    "CompressedData": "False",
    "TransformMatrix": "0 1 0 -1 0 0 0 0 1",
    "Offset": "1 2 3",
    "AnatomicalOrientation": "???",
    "ElementSpacing": "0.7 0.9 2.5",
    "DimSize": "36 40 8",
    "ElementType": "MET_SHORT",
    "ElementDataFile": "LOCAL",
}
NRRD = {
    "type": "short",
    "dimension": "3",
    "space": "left-posterior-superior",
    "sizes": "36 40 8",
    "space directions": "(0,0.7,0) (-0.9,0,0) (0,0,2.5)",
    "kinds": "domain domain domain",
    "endian": "little",
    "encoding": "raw",
    "space origin": "(1,2,3)",
}


def changed(fields, changes):
    """The fields with some replaced, or left out where the change is None."""
    return {k: v for k, v in {**fields, **changes}.items() if v is not None}


@pytest.fixture
def metaimage(chest, tmp_path):
    def write(content=None, **changes):
        # ElementDataFile must come last.
        fields = changed(METAIMAGE, {"ElementDataFile": None, **changes})
        fields["ElementDataFile"] = "LOCAL"
        head = "".join(f"{name} = {value}\n" for name, value in fields.items())
        path = tmp_path / "case.mha"
        path.write_bytes(
            head.encode() + (chest().tobytes() if content is None else content)
        )
        return path

    return write


@pytest.fixture
def nrrd(chest, tmp_path):
    def write(content=None, **changes):
        changes = {name.replace("_", " "): value for name, value in changes.items()}
        fields = changed(NRRD, changes)
        head = "".join(f"{name}: {value}\n" for name, value in fields.items())
        path = tmp_path / "case.nrrd"
        content = chest().tobytes() if content is None else content
        path.write_bytes(b"NRRD0004\n" + head.encode() + b"\n" + content)
        return path

    return write


@pytest.fixture
def nii(chest, tmp_path):
    """Writes a NIfTI whose header fields are stored as given; nibabel repairs none."""

    def write(*, sform=1, qform=1, pixdim=None, array=None, **fields):
        image = nibabel.Nifti1Image(chest().T if array is None else array, AFFINE)
        image.set_sform(AFFINE, sform)
        image.set_qform(AFFINE, qform)
        path = tmp_path / "case.nii"
        nibabel.save(image, path)
        content = bytearray(path.read_bytes())
        header = nibabel.Nifti1Header(bytes(content[:348]), check=False)
        for at, value in (pixdim or {}).items():
            header["pixdim"][at] = value
        for name, value in fields.items():
            header[name] = value
        content[:348] = header.binaryblock
        path.write_bytes(content)
        return path

    return write


def listed(path, spacing_zyx):
    """Loads the volume as the only row of a list that states its spacing."""
    table = path.with_name("list.csv")
    table.write_text(f"{LIST}a,{path.name},{','.join(map(str, spacing_zyx))}\n")
    (source,) = nifti.find_scans(table)
    return nifti.load_scan(source)


def check_as_simpleitk(path):
    """Compares values, and the places in mm of all corners, with SimpleITK."""
    array, affine = volume_file.read_volume_file(path)
    image = SimpleITK.ReadImage(str(path))
    assert np.array_equal(array, SimpleITK.GetArrayFromImage(image).T)
    for corner in np.ndindex(2, 2, 2):
        index = [int(c * (n - 1)) for c, n in zip(corner, array.shape, strict=True)]
        at_mm = flip_xy(image.TransformIndexToPhysicalPoint(index))
        assert np.allclose(affine[:3] @ [*index, 1], at_mm, atol=1e-3)


def check_as_nibabel(path):
    array, affine = volume_file.read_volume_file(path)
    image = nibabel.load(path)
    assert np.array_equal(array, np.asanyarray(image.dataobj).reshape(array.shape))
    assert np.allclose(affine, image.affine, atol=1e-5)


METAIMAGE_REFUSED = {
    "no spacing": ({"ElementSpacing": None}, "has no ElementSpacing.*spacing_z_mm"),
    "zero": ({"ElementSpacing": "0.7 0.9 0"}, "ElementSpacing is '0.7 0.9 0'.*above 0"),
    "negative": ({"ElementSpacing": "0.7 -0.9 2.5"}, "is '0.7 -0.9 2.5'.*above 0"),
    "nan": ({"ElementSpacing": "0.7 nan 2.5"}, "is '0.7 nan 2.5'.*above 0"),
    "two": ({"ElementSpacing": "0.7 0.9"}, "is '0.7 0.9'.*three numbers"),
    "words": ({"ElementSpacing": "a b c"}, "is 'a b c'.*three numbers"),
    "micrometres": ({"DistanceUnits": "um"}, "DistanceUnits is um; expected mm"),
    "centimetres": ({"DistanceUnits": "cm"}, "DistanceUnits is cm; expected mm"),
    "slope": (
        {"ElementToIntensityFunctionSlope": "2"},
        "ElementToIntensityFunctionSlope is '2'; expected 1 or none",
    ),
    "offset": (
        {"ElementToIntensityFunctionOffset": "-1024"},
        "FunctionOffset is '-1024'; expected 0 or none",
    ),
    "letters only": (
        {"TransformMatrix": None, "AnatomicalOrientation": "LPI"},
        "AnatomicalOrientation is 'LPI' and there is no TransformMatrix; expected RAI",
    ),
    "singular": ({"TransformMatrix": "1 0 0 1 0 0 0 0 1"}, "not a readable volume"),
    "matrix nan": ({"TransformMatrix": "nan 0 0 0 1 0 0 0 1"}, "not a readable volume"),
}


@pytest.mark.parametrize("case", METAIMAGE_REFUSED)
def test_a_metaimage_that_leaves_geometry_or_values_open_is_refused(case, metaimage):
    changes, pattern = METAIMAGE_REFUSED[case]
    path = metaimage(**changes)
    with pytest.raises(ScanError, match=pattern) as caught:
        volume_file.read_volume_file(path)
    assert str(path) in str(caught.value)


METAIMAGE_ACCEPTED = {
    "plain": ({}, ""),
    "ElementSize": (
        {"ElementSpacing": None, "ElementSize": "0.7 0.9 2.5"},
        "no ElementSpacing; using ElementSize, 0.7 0.9 2.5 mm",
    ),
    "other ElementSize": ({"ElementSize": "1 1 1"}, ""),
    "no matrix": (
        {"TransformMatrix": None},
        "no TransformMatrix; the axes are taken to run to the patient's left, back and",
    ),
    "no matrix, RAI": ({"TransformMatrix": None, "AnatomicalOrientation": "RAI"}, ""),
    "other letters": ({"AnatomicalOrientation": "RAI"}, ""),
    "Orientation": (
        {"TransformMatrix": None, "Orientation": "-1 0 0 0 -1 0 0 0 1"},
        "",
    ),
    "no offset": ({"Offset": None}, "no Offset; the first voxel is put at 0, 0, 0 mm"),
    "Position": ({"Offset": None, "Position": "4 5 6"}, ""),
    "centre": ({"CenterOfRotation": "10 20 30"}, ""),
    "unit mm": ({"DistanceUnits": "mm"}, ""),
    "unit unknown": ({"DistanceUnits": "?"}, ""),
    "identity function": ({"ElementToIntensityFunctionSlope": "1"}, ""),
    "no byte order": ({"BinaryDataByteOrderMSB": None}, ""),
}


@pytest.mark.parametrize("case", METAIMAGE_ACCEPTED)
def test_a_metaimage_lies_where_simpleitk_puts_it(case, metaimage, caplog):
    changes, warning = METAIMAGE_ACCEPTED[case]
    check_as_simpleitk(metaimage(**changes))
    assert warning in caplog.text
    assert bool(warning) == bool(caplog.text)


NRRD_REFUSED = {
    "no directions": (
        {"space_directions": None},
        "no space directions .spacings: none.*spacing_z_mm",
    ),
    "spacings only": (
        {"space_directions": None, "space": None, "space_origin": None}
        | {"spacings": "0.7 0.9 2.5"},
        "no space directions .spacings: 0.7 0.9 2.5.*left and right are unknown",
    ),
    "spacings nan": (
        {"space_directions": None, "space": None, "space_origin": None}
        | {"spacings": "0.7 nan 2.5"},
        "spacings is '0.7 nan 2.5'; expected three numbers above 0",
    ),
    "spacings negative": (
        {"space_directions": None, "space": None, "space_origin": None}
        | {"spacings": "0.7 -0.9 2.5"},
        "spacings is '0.7 -0.9 2.5'; expected three numbers above 0",
    ),
    "a zero vector": (
        {"space_directions": "(0.7,0,0) (0,0,0) (0,0,2.5)"},
        "space directions is .*expected three vectors",
    ),
    "nan": (
        {"space_directions": "(0.7,0,0) (0,nan,0) (0,0,2.5)"},
        "space directions is .*expected three vectors",
    ),
    "none": (
        {"space_directions": "(0.7,0,0) (0,0.9,0) none"},
        "space directions is .*expected three vectors",
    ),
    "parallel": (
        {"space_directions": "(0.7,0,0) (0.9,0,0) (0,0,2.5)"},
        "not a readable volume",
    ),
    "scanner": ({"space": "scanner-xyz"}, "space is scanner-xyz; expected left-post"),
    "right-handed": (
        {"space": "3D-right-handed"},
        "space is 3D-right-handed; expected",
    ),
    "no space": ({"space": None}, "space is not stated; expected left-posterior"),
    "micrometres": (
        {"space_units": '"um" "um" "um"'},
        "space units is um, um, um; expected mm",
    ),
}


@pytest.mark.parametrize("case", NRRD_REFUSED)
def test_an_nrrd_that_leaves_geometry_open_is_refused(case, nrrd):
    changes, pattern = NRRD_REFUSED[case]
    path = nrrd(**changes)
    with pytest.raises(ScanError, match=pattern) as caught:
        volume_file.read_volume_file(path)
    assert str(path) in str(caught.value)


NRRD_ACCEPTED = {
    "plain": ({}, ""),
    "RAS": ({"space": "RAS"}, ""),
    "LAS": ({"space": "left-anterior-superior"}, ""),
    "mm": ({"space_units": '"mm" "mm" "mm"'}, ""),
    "no origin": ({"space_origin": None}, "no space origin; the first voxel is put at"),
    "no kinds": ({"kinds": None}, ""),
    "nodes": ({"centers": "node node node"}, ""),
    "frame": ({"measurement_frame": "(1,0,0) (0,1,0) (0,0,-1)"}, ""),
    "one component": (
        {
            "dimension": "4",
            "sizes": "1 36 40 8",
            "kinds": "vector domain domain domain",
            "space_directions": "none (0.7,0,0) (0,0.9,0) (0,0,2.5)",
        },
        "",
    ),
}


@pytest.mark.parametrize("case", NRRD_ACCEPTED)
def test_an_nrrd_lies_where_simpleitk_puts_it(case, nrrd, caplog):
    changes, warning = NRRD_ACCEPTED[case]
    check_as_simpleitk(nrrd(**changes))
    assert warning in caplog.text
    assert bool(warning) == bool(caplog.text)


def test_field_names_of_an_nrrd_may_lack_capitals_and_spaces(nrrd):
    path = nrrd(space_directions=None, SpaceDirections="(0.7,0,0) (0,0.9,0) (0,0,2.5)")
    text = path.read_bytes().replace(b"SpaceDirections", b"spacedirections")
    path.write_bytes(text)
    check_as_simpleitk(path)


def test_a_vector_per_voxel_is_refused(nrrd, chest):
    path = nrrd(
        chest().tobytes() * 2,
        dimension="4",
        sizes="2 36 40 8",
        kinds="vector domain domain domain",
        space_directions="none (0.7,0,0) (0,0.9,0) (0,0,2.5)",
    )
    with pytest.raises(ScanError, match="2 values per voxel; expected one 3-D volume"):
        volume_file.read_volume_file(path)


def test_a_cut_compressed_volume_is_refused(nrrd, metaimage, chest):
    zipped = gzip.compress(chest().tobytes())
    check_as_simpleitk(nrrd(zipped, encoding="gzip"))
    for content in (zipped[: len(zipped) // 2], flipped(zipped)):
        with pytest.raises(ScanError, match="not a readable volume"):
            volume_file.read_volume_file(nrrd(content, encoding="gzip"))
    # Only the checksum at the end is cut off; every voxel is there.
    check_as_simpleitk(nrrd(zipped[:-4], encoding="gzip"))
    packed = zlib.compress(chest().tobytes())
    facts = {"CompressedData": "True", "CompressedDataSize": str(len(packed))}
    check_as_simpleitk(metaimage(packed, **facts))
    with pytest.raises(ScanError, match="not a readable volume"):
        volume_file.read_volume_file(metaimage(packed[: len(packed) // 2], **facts))


def flipped(zipped):
    """The content with a bit of its checksum flipped."""
    return zipped[:-8] + bytes([zipped[-8] ^ 1]) + zipped[-7:]


QFORM = {"sform": 0}
NIFTI_REFUSED = {
    **{
        f"pixdim {value}": (
            QFORM | {"pixdim": {2: value}},
            rf"pixdim is 0\.7 x {shown} x 2\.5, and only the qform.*spacing_z_mm",
        )
        for value, shown in [(0, "0"), (-0.9, "-0.9"), (np.nan, "nan"), (np.inf, "inf")]
    },
    "pixdim 1e-9": (
        QFORM | {"pixdim": {2: 1e-9}},
        r"spacing 0\.7 x 1e-09 x 2\.5 mm; expected at least 0\.01 mm",
    ),
    "two spacings": (
        {"qform": 0, "pixdim": {1: 1, 2: 1, 3: 1}},
        r"0\.7 x 0\.9 x 2\.5 mm by the sform and 1 x 1 x 1 mm by pixdim",
    ),
    "singular": (
        {"qform": 0, "srow_x": (0.7, 0, 0, 0), "srow_y": (0.9, 0, 0, 0)},
        "expected finite, independent axes|by the sform",
    ),
    "zero sform": (
        {f"srow_{axis}": (0, 0, 0, 0) for axis in "xyz"},
        "0 x 0 x 0 mm by the sform",
    ),
    "sform nan": ({"srow_x": (np.nan, 0, 0, 0)}, "expected finite, independent axes"),
    "quaternion": (QFORM | {"quatern_b": 2}, "not a readable NIfTI file"),
    "quaternion nan": (QFORM | {"quatern_b": np.nan}, "expected finite, independent"),
    "qoffset nan": (QFORM | {"qoffset_x": np.nan}, "expected finite, independent axes"),
    "neither": ({"sform": 0, "qform": 0}, "neither sform nor qform gives the orient"),
    "negative code": (
        {"sform": 0, "qform": 0, "sform_code": -1},
        "neither sform nor qform gives the orient",
    ),
    "metres": ({"xyzt_units": 1}, "xyzt_units is 1, spacing in metres; expected mm"),
    "micrometres": ({"xyzt_units": 3}, "xyzt_units is 3, spacing in micrometres"),
    "unit 5": ({"xyzt_units": 5}, "xyzt_units is 5, spacing in no known unit"),
    "slope 0": (
        {"scl_slope": 0, "scl_inter": -1024},
        "scl_slope is 0 and scl_inter -1024; expected a slope",
    ),
    "intercept nan": (
        {"scl_slope": 2, "scl_inter": np.nan},
        "not a readable NIfTI file .*Valid slope but invalid intercept nan",
    ),
}


@pytest.mark.parametrize("case", NIFTI_REFUSED)
def test_a_nifti_that_leaves_geometry_or_values_open_is_refused(case, nii):
    changes, pattern = NIFTI_REFUSED[case]
    path = nii(**changes)
    with pytest.raises(ScanError, match=pattern) as caught:
        volume_file.read_volume_file(path)
    assert str(path) in str(caught.value)


NIFTI_ACCEPTED = {
    "qform": QFORM,
    "sform": {"qform": 0},
    "qfac 0": QFORM | {"pixdim": {0: 0}},
    "qfac 5": QFORM | {"pixdim": {0: 5}},
    "no unit": {"xyzt_units": 0},
    "seconds": {"xyzt_units": 10},
    "vector intent": {"intent_code": 1007},
    "labels intent": {"intent_code": 1002},
    "slope nan": {"scl_slope": np.nan, "scl_inter": np.nan},
    "slope 0": {"scl_slope": 0, "scl_inter": 0},
    "rounded": {"qform": 0, "pixdim": {1: 0.701}},
    "unknown code": {"qform_code": 99},
}


@pytest.mark.parametrize("case", NIFTI_ACCEPTED)
def test_a_nifti_lies_where_nibabel_and_simpleitk_put_it(case, nii, caplog):
    path = nii(**NIFTI_ACCEPTED[case])
    check_as_nibabel(path)
    if case != "rounded":  # SimpleITK takes the spacing from pixdim
        check_as_simpleitk(path)
    assert "pixdim" not in caplog.text


@pytest.mark.parametrize("value", [0, -0.9, np.nan])
def test_the_sform_counts_where_pixdim_says_nothing(value, nii, caplog):
    path = nii(pixdim={2: value})
    check_as_nibabel(path)
    assert (
        f"pixdim is 0.7 x {value:g} x 2.5; using the spacing of the sf" in caplog.text
    )


def test_a_list_may_state_what_a_header_does_not(nii, nrrd, metaimage, chest, caplog):
    missing = {
        "possible pixdim": nii(**QFORM, pixdim={1: 0, 2: 0, 3: -1}),
        "space directions": nrrd(space_directions=None),
        "ElementSpacing": metaimage(ElementSpacing=None),
    }
    for field, path in missing.items():
        scan = listed(path, (2.5, 0.9, 0.7))
        order = (2.5, 0.9, 0.7) if field != "ElementSpacing" else (2.5, 0.7, 0.9)
        assert scan.spacing_mm == pytest.approx(order)  # its matrix swaps x and y
        text = (
            f"the header has no {field}; using the list's spacing, 2.5 x 0.9 x 0.7 mm"
        )
        assert text in caplog.text
    scan = listed(missing["space directions"], (2.5, 0.9, 0.7))
    assert np.array_equal(scan.hu, chest())  # axes to the left, the back and the head


def test_a_list_does_not_replace_what_a_header_states(nii, nrrd):
    for path in (nii(), nrrd()):
        assert sorted(listed(path, (9, 9, 9)).spacing_mm) == pytest.approx(
            [0.7, 0.9, 2.5]
        )
    path = nrrd(
        space_directions=None, space=None, space_origin=None, spacings="1 nan 1"
    )
    with pytest.raises(ScanError, match="spacings is '1 nan 1'"):
        listed(path, (2.5, 0.9, 0.7))


@pytest.mark.parametrize("spacing", [-5.0, 0.0, float("nan")])
def test_a_tiff_with_an_impossible_spacing_is_refused(spacing, chest, tmp_path):
    tifffile = pytest.importorskip("tifffile")
    path = tmp_path / "stack.tif"
    metadata = {"spacing": spacing, "unit": "mm"}
    options = {"imagej": True, "resolution": (1, 1), "metadata": metadata}
    tifffile.imwrite(path, chest().astype(np.float32), **options)
    shown = re.escape(f"{spacing:.4g} x 1 x 1 mm")
    with pytest.raises(ScanError, match=f"spacing of the TIFF is {shown}.*above 0"):
        volume_file.read_volume_file(path)
