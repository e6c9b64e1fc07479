"""Resampling to cubic voxels: places, values and masks."""

import numpy as np
from scipy import ndimage

from ct import resample
from ct.geometry import Grid
from tests.conftest import canonical_grid


def test_a_linear_ramp_keeps_its_values_at_their_place_in_the_world():
    grid = canonical_grid((12, 20, 16), (2.5, 1.5, 1.0))
    index = np.stack(np.meshgrid(*map(np.arange, grid.shape), indexing="ij"), axis=-1)
    ramp = grid.index_to_ras_mm(index) @ np.array([3.0, -2.0, 5.0])
    for spacing_mm, border in ((0.8, 4), (1.7, 3), (4.0, 1)):
        weights, affine = resample.isotropic(grid, spacing_mm)
        resampled = resample.volume(ramp, weights)
        new = Grid(resampled.shape, affine)
        new_index = np.stack(
            np.meshgrid(*map(np.arange, new.shape), indexing="ij"), axis=-1
        )
        expected = new.index_to_ras_mm(new_index) @ np.array([3.0, -2.0, 5.0])
        inner = (slice(border, -border),) * 3
        assert resampled[inner].size > 0
        assert np.allclose(resampled[inner], expected[inner], atol=1e-3)


def test_a_coarser_voxel_is_as_wide_as_it_says():
    positions = np.arange(20, 80, 3.0)
    weights = resample.linear_weights(100, positions, 3.0)
    assert np.allclose(weights.sum(axis=1), 1)
    moments = weights @ np.arange(100.0), weights @ np.arange(100.0) ** 2
    assert np.allclose(moments[0], positions)
    # Old samples carry the hat's variance 1/6 and gain (3^2 - 1) / 12 of the mean's box.
    assert np.allclose(moments[1] - moments[0] ** 2, 1 / 6 + 8 / 12, atol=0.02)


def test_new_voxels_are_cubes_around_the_same_centre_and_cover_the_grid():
    oblique = canonical_grid((9, 30, 21), (3.0, 0.7, 0.7))
    turn = np.eye(4)
    turn[:2, :2] = [[np.cos(0.3), -np.sin(0.3)], [np.sin(0.3), np.cos(0.3)]]
    grid = Grid(oblique.shape, turn @ oblique.affine)
    weights, affine = resample.isotropic(grid, 1.1)
    new = Grid(tuple(len(w) for w in weights), affine)
    assert np.allclose(new.spacing_mm, 1.1)
    assert np.allclose(
        grid.index_to_ras_mm((np.array(grid.shape) - 1) / 2),
        new.index_to_ras_mm((np.array(new.shape) - 1) / 2),
    )
    for length, old_mm, new_length in zip(
        grid.shape, grid.spacing_mm, new.shape, strict=True
    ):
        assert length * old_mm <= new_length * 1.1 + 1e-6 < length * old_mm + 1.1


def test_finer_voxels_equal_linear_interpolation_of_scipy():
    rng = np.random.default_rng(0)
    grid = canonical_grid((6, 8, 7), (2.0, 1.5, 1.0))
    values = rng.normal(size=grid.shape)
    weights, affine = resample.isotropic(grid, 0.7)
    resampled = resample.volume(values, weights)
    index = np.stack(
        np.meshgrid(*map(np.arange, resampled.shape), indexing="ij"), axis=-1
    )
    old_index = grid.ras_mm_to_index(
        Grid(resampled.shape, affine).index_to_ras_mm(index)
    )
    expected = ndimage.map_coordinates(
        values, np.moveaxis(old_index, -1, 0), order=1, mode="nearest"
    )
    assert np.allclose(resampled, expected, atol=1e-5)


def test_coarser_voxels_average_a_checkerboard_instead_of_picking_from_it():
    checkerboard = np.indices((16, 16, 16)).sum(axis=0) % 2 * 1000.0
    weights, _ = resample.isotropic(canonical_grid((16, 16, 16), (1, 1, 1)), 4.0)
    resampled = resample.volume(checkerboard, weights)
    assert np.abs(resampled - 500).max() < 30


def test_the_same_spacing_changes_nothing(scan):
    grid = canonical_grid(scan.hu.shape, (1.5, 1.5, 1.5))
    weights, affine = resample.isotropic(grid, 1.5)
    assert np.allclose(affine, grid.affine)
    assert np.array_equal(resample.volume(scan.hu, weights), scan.hu)
    bits, labels = resample.nodules(scan.reader_bits, scan.nodule_labels, weights)
    assert np.array_equal(bits, scan.reader_bits)
    assert np.array_equal(labels, scan.nodule_labels)
    assert np.array_equal(resample.labels(scan.lung, weights), scan.lung)


def test_a_mask_is_its_linear_volume_cut_at_one_half(scan):
    weights, _ = resample.isotropic(scan.grid, 2.0)
    inside = scan.nodule_labels == 2
    expected = resample.volume(inside, weights) >= resample.HALF
    assert expected.any()
    assert np.array_equal(resample.mask(inside, weights), expected)
    assert not resample.mask(np.zeros_like(inside), weights).any()


def test_nodules_keep_volume_place_readers_and_labels(scan):
    weights, affine = resample.isotropic(scan.grid, 1.0)
    bits, labels = resample.nodules(scan.reader_bits, scan.nodule_labels, weights)
    new = Grid(bits.shape, affine)
    assert np.array_equal(bits > 0, labels > 0)
    for nodule in scan.nodules:
        centre = new.index_to_ras_mm(np.argwhere(labels == nodule.label).mean(axis=0))
        assert np.allclose(centre, nodule.centre_ras_mm, atol=0.3)
        for annotation in nodule.annotations:
            own = bits[labels == nodule.label] >> annotation.reader & 1
            assert abs(own.sum() / annotation.volume_mm3 - 1) < 0.1
    assert not (bits[labels == 2] & 0b1100).any()  # readers 2 and 3 left nodule 2 out
