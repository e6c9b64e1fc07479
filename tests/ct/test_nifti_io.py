import itertools

import nibabel
import numpy as np
import pytest
import SimpleITK as sitk

from ct.geometry import Grid, flip_xy, to_canonical
from ct.nifti_io import check_same_grid, read_nifti, write_nifti
from ct.scan import ScanError

ORDERS = list(itertools.permutations(range(3)))
SIGNS = [(1, 1, 1), (-1, 1, 1), (1, -1, 1), (-1, -1, -1)]


def source_affine(order, signs, tilt_deg):
    """(4, 4) affine of a file with axes permuted, mirrored and turned around x."""
    matrix = np.zeros((3, 3))
    for axis, (world, sign) in enumerate(zip(order, signs, strict=True)):
        matrix[world, axis] = sign * (0.7, 0.8, 2.5)[world]
    angle = np.deg2rad(tilt_deg)
    cos, sin = np.cos(angle), np.sin(angle)
    affine = np.eye(4)
    affine[:3, :3] = np.array([[1, 0, 0], [0, cos, -sin], [0, sin, cos]]) @ matrix
    affine[:3, 3] = (11.0, -7.0, 3.0)
    return affine


@pytest.fixture
def source():
    """A file's own array with one marked voxel, and its grid: oblique and mirrored."""
    array = np.zeros((5, 6, 7), np.float32)
    array[4, 1, 2] = 0.75
    return array, Grid(array.shape, source_affine((2, 0, 1), (-1, 1, -1), 10.0))


@pytest.mark.parametrize("tilt_deg", [0.0, 12.0])
@pytest.mark.parametrize("signs", SIGNS)
@pytest.mark.parametrize("order", ORDERS)
def test_simpleitk_finds_a_voxel_where_it_is_in_the_world(
    order, signs, tilt_deg, tmp_path
):
    affine = source_affine(order, signs, tilt_deg)
    array = np.zeros((5, 6, 7), np.float32)
    array[4, 1, 2] = 1
    canonical, grid = to_canonical(array, affine)
    write_nifti(tmp_path / "p.nii.gz", canonical, grid, Grid(array.shape, affine))
    image = sitk.ReadImage(tmp_path / "p.nii.gz")
    assert image.GetSize() == (5, 6, 7)
    place_lps_mm = flip_xy((affine @ (4, 1, 2, 1))[:3])
    index = image.TransformPhysicalPointToIndex(place_lps_mm.tolist())
    assert image.GetPixel(*index) == pytest.approx(1, abs=1e-6)
    assert sitk.GetArrayFromImage(image).sum() == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("order", ORDERS)
def test_a_volume_comes_back_on_the_same_grid(order, tmp_path):
    affine = source_affine(order, (-1, 1, 1), 12.0)
    array = np.random.default_rng(0).integers(0, 5, (5, 6, 7)).astype(np.uint8)
    canonical, grid = to_canonical(array, affine)
    write_nifti(tmp_path / "m.nii.gz", canonical, grid, Grid(array.shape, affine))
    again, again_grid = read_nifti(tmp_path / "m.nii.gz")
    assert np.array_equal(again, canonical)
    assert again.dtype == np.uint8
    assert np.allclose(again_grid.affine, grid.affine, atol=1e-4)


def test_probabilities_are_kept_to_half_a_ten_thousandth(tmp_path):
    grid = Grid((2, 50, 60), np.eye(4))
    prob = np.random.default_rng(0).random(grid.shape).astype(np.float32)
    canonical, canonical_grid = to_canonical(prob, grid.affine)
    write_nifti(tmp_path / "p.nii.gz", canonical, canonical_grid, grid)
    again, _ = read_nifti(tmp_path / "p.nii.gz")
    assert again.dtype == np.float32
    assert np.abs(again - canonical).max() <= 0.5e-4 + 1e-7
    assert nibabel.load(tmp_path / "p.nii.gz").get_data_dtype() == np.uint16


def test_a_stored_threshold_is_reached(tmp_path):
    """0.3 stays 0.3: a voxel at the threshold must not fall below it on disk."""
    values = np.linspace(0, 1, 101, dtype=np.float32)
    canonical, grid = to_canonical(values.reshape(1, 1, -1), np.eye(4))
    write_nifti(tmp_path / "p.nii", canonical, grid, Grid((1, 1, 101), np.eye(4)))
    again, _ = read_nifti(tmp_path / "p.nii")
    assert np.array_equal(np.sort(again.ravel()), (np.arange(101) / 100).astype("f4"))


def test_other_floats_are_kept_exactly(source, tmp_path):
    array, grid = source
    canonical, canonical_grid = to_canonical(array * -7.123, grid.affine)
    write_nifti(tmp_path / "f.nii.gz", canonical, canonical_grid, grid, exact=True)
    again, _ = read_nifti(tmp_path / "f.nii.gz")
    assert np.array_equal(again, canonical)


def test_sform_and_qform_say_scanner_coordinates(source, tmp_path):
    array, grid = source
    canonical, canonical_grid = to_canonical(array, grid.affine)
    write_nifti(tmp_path / "p.nii.gz", canonical, canonical_grid, grid)
    header = nibabel.load(tmp_path / "p.nii.gz").header
    assert (int(header["sform_code"]), int(header["qform_code"])) == (1, 1)
    assert np.allclose(header.get_qform(), header.get_sform(), atol=1e-4)


def test_a_tilted_gantry_keeps_its_shear_in_the_sform(tmp_path):
    affine = np.diag([0.7, 0.7, 2.5, 1.0])
    affine[1, 2] = 0.5
    canonical, grid = to_canonical(np.zeros((3, 4, 5), np.uint8), affine)
    write_nifti(tmp_path / "m.nii.gz", canonical, grid, Grid((3, 4, 5), affine))
    _, again = read_nifti(tmp_path / "m.nii.gz")
    assert np.allclose(again.affine, grid.affine, atol=1e-5)


@pytest.mark.parametrize("lean_deg", [0.01, 0.4, 3.0])
def test_a_sheared_volume_is_placed_right_or_not_at_all(lean_deg, tmp_path, caplog):
    """A qform would bring its last slice up to 1.3 mm beside its place, unsaid."""
    affine = np.diag([-0.7, -0.7, 2.5, 1.0])
    affine[1, 2] = 2.5 * np.tan(np.radians(lean_deg))
    shape = (5, 6, 150)
    canonical, grid = to_canonical(np.zeros(shape, np.uint8), affine)
    write_nifti(tmp_path / "m.nii.gz", canonical, grid, Grid(shape, affine))
    corners = np.array(list(itertools.product((0, 4), (0, 5), (0, 149))))
    expected = Grid(shape, affine).index_to_ras_mm(corners)
    by_nibabel = nibabel.affines.apply_affine(
        nibabel.load(tmp_path / "m.nii.gz").affine, corners
    )
    assert np.abs(by_nibabel - expected).max() < 0.05
    try:
        image = sitk.ReadImage(tmp_path / "m.nii.gz")
    except RuntimeError as error:
        # ITK has no shear; it says so where it cannot read the qform instead.
        assert "orthonormal" in str(error)
        assert lean_deg > 0.01
        assert "programs built on ITK refuse the file" in caplog.text
    else:
        by_itk = [image.TransformIndexToPhysicalPoint(c.tolist()) for c in corners]
        assert np.abs(flip_xy(np.array(by_itk)) - expected).max() < 0.05
        assert not caplog.text


def test_the_noise_floor_of_a_probability_map_compresses_away(tmp_path):
    rng = np.random.default_rng(0)
    noise = (rng.random((40, 64, 64)) * 4e-5).astype(np.float32)
    canonical, grid = to_canonical(noise, np.eye(4))
    write_nifti(tmp_path / "p.nii.gz", canonical, grid, Grid(noise.shape, np.eye(4)))
    assert (tmp_path / "p.nii.gz").stat().st_size < noise.nbytes / 100


def test_writing_twice_gives_the_same_bytes(source, tmp_path):
    array, grid = source
    canonical, canonical_grid = to_canonical(array, grid.affine)
    for name in ("a.nii.gz", "b.nii.gz"):
        write_nifti(tmp_path / name, canonical, canonical_grid, grid)
    assert (tmp_path / "a.nii.gz").read_bytes() == (tmp_path / "b.nii.gz").read_bytes()


@pytest.mark.parametrize("value", [-0.1, 1.1, np.nan])
def test_what_is_no_probability_is_refused(value, source, tmp_path):
    array, grid = source
    array[0, 0, 0] = value
    canonical, canonical_grid = to_canonical(array, grid.affine)
    with pytest.raises(ValueError, match="expected 0 to 1"):
        write_nifti(tmp_path / "p.nii.gz", canonical, canonical_grid, grid)
    assert not list(tmp_path.iterdir())


def test_a_missing_volume_names_the_step_that_makes_it(tmp_path):
    with pytest.raises(
        ScanError, match=r"prob\.nii\.gz: no such file; infer\.py writes"
    ):
        read_nifti(tmp_path / "prob.nii.gz")


@pytest.mark.parametrize("keep", [20, 400, 2000])
def test_a_truncated_volume_is_named(keep, tmp_path):
    noise = np.random.default_rng(0).random((10, 20, 20)).astype(np.float32)
    canonical, grid = to_canonical(noise, np.eye(4))
    path = tmp_path / "prob.nii.gz"
    write_nifti(path, canonical, grid, Grid(noise.shape, np.eye(4)))
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ScanError, match="not a readable NIfTI file"):
        read_nifti(path)


def test_a_flipped_bit_is_found_by_the_checksum(tmp_path):
    array = np.zeros((10, 20, 20), np.float32)
    canonical, grid = to_canonical(array, np.eye(4))
    path = tmp_path / "prob.nii.gz"
    write_nifti(path, canonical, grid, Grid(array.shape, np.eye(4)))
    content = bytearray(path.read_bytes())
    content[-8] ^= 1  # the checksum itself, behind the last voxel
    path.write_bytes(content)
    with pytest.raises(ScanError, match=r"CRC check failed.*; remove it and make it"):
        read_nifti(path)


def test_a_corrupt_volume_is_named(tmp_path):
    noise = np.random.default_rng(0).random((10, 20, 20)).astype(np.float32)
    canonical, grid = to_canonical(noise, np.eye(4))
    path = tmp_path / "prob.nii.gz"
    write_nifti(path, canonical, grid, Grid(noise.shape, np.eye(4)))
    content = bytearray(path.read_bytes())
    content[1000:1100] = bytes(100)
    path.write_bytes(content)
    with pytest.raises(ScanError, match="not a readable NIfTI file"):
        read_nifti(path)


def test_a_volume_on_another_grid_is_refused(tmp_path):
    here = Grid((3, 4, 5), np.eye(4))
    moved = np.eye(4)
    moved[0, 3] = 1.0
    with pytest.raises(ScanError, match="is not the scan's"):
        check_same_grid(Grid((3, 4, 5), moved), here, tmp_path / "mask.nii.gz")
