"""Warps and scanners of volumes, by hand and against SciPy."""

from dataclasses import replace

import numpy as np
import pytest
from scipy import ndimage

from augment import augment3d
from augment.augment3d import (
    CURVE_HU,
    VolumeWarp,
    draw_scanner,
    draw_volume_warp,
    simulate_scanner,
    volume_warp_matrix,
    warp_volume,
    warp_volume_labels,
)
from config import Augment
from ct.boxes import Crop, cut

SIZE = (20, 28, 24)
WHOLE = Crop((0, 0, 0), tuple((size - 1) / 2 for size in SIZE))
CUBE = Crop((0, 0, 0), (9.5, 9.5, 9.5))
CHANGES = Augment(
    rotate_deg=30,
    tilt_deg=20,
    zoom=0.2,
    stretch=0.1,
    shift_px=4,
    elastic_px=1.5,
    elastic_grid_px=8,
)
NEUTRAL = Augment(flip=False, rotate_deg=0, zoom=0, shift_px=0)


def rng(seed=0):
    return np.random.default_rng(seed)


def smooth_volume(size=SIZE):
    """Smooth, so that OpenCV's steps of 1/32 voxel cost little; HU."""
    z, y, x = np.ogrid[tuple(slice(n) for n in size)]
    return (-400 + 300 * np.sin(z / 5) * np.cos(y / 6) * np.sin(x / 7)).astype(np.int16)


def noisy_bits(size=SIZE):
    return rng(1).integers(0, 4, size).astype(np.uint8)


def scipy_points(warp, size):
    index = np.stack(np.meshgrid(*map(np.arange, size), indexing="ij"))
    points = np.tensordot(warp.matrix[:, :3], index, 1)
    points += warp.matrix[:, 3][:, None, None, None]
    return points if warp.displacement is None else points + warp.displacement


def test_no_change_is_the_volume_itself():
    warp = VolumeWarp(volume_warp_matrix(WHOLE))
    volume, bits = smooth_volume(), noisy_bits()
    assert np.array_equal(warp_volume(volume, warp, SIZE), volume)
    assert np.array_equal(warp_volume_labels(bits, warp, SIZE), bits)


@pytest.mark.parametrize("start", [(3, -2, 5), (-30, 0, 0)])
def test_a_crop_alone_is_a_cut(start):
    size = (12, 10, 14)
    crop = Crop(start, (5.5, 4.5, 6.5))
    warp = VolumeWarp(volume_warp_matrix(crop))
    expected = cut(smooth_volume(), start, size, fill=-1024)
    assert np.array_equal(warp_volume(smooth_volume(), warp, size), expected)
    expected = cut(noisy_bits(), start, size, fill=0)
    assert np.array_equal(warp_volume_labels(noisy_bits(), warp, size), expected)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"flip_x": True}, lambda v: v[:, :, ::-1]),
        ({"flip_y": True}, lambda v: v[:, ::-1]),
        ({"turn_deg": (90, 0, 0)}, lambda v: np.rot90(v, 1, (1, 2))),
        ({"turn_deg": (0, 90, 0)}, lambda v: np.rot90(v, 1, (0, 2))),
        ({"turn_deg": (0, 0, 90)}, lambda v: np.rot90(v, 1, (0, 1))),
    ],
)
def test_flips_and_quarter_turns_are_numpys(options, expected):
    size = (20, 20, 20)
    warp = VolumeWarp(volume_warp_matrix(CUBE, **options))
    bits = noisy_bits(size)
    assert np.array_equal(warp_volume_labels(bits, warp, size), expected(bits))


def test_shift_moves_what_is_seen_and_zoom_makes_it_larger():
    bits = np.zeros((20, 20, 20), np.uint8)
    bits[8:12, 8:12, 8:12] = 1
    moved = warp_volume_labels(
        bits, VolumeWarp(volume_warp_matrix(CUBE, shift_zyx=(3, 0, -2))), bits.shape
    )
    assert np.array_equal(moved, np.roll(bits, (3, 0, -2), (0, 1, 2)))
    zoomed = warp_volume_labels(
        bits, VolumeWarp(volume_warp_matrix(CUBE, zoom_zyx=(2, 1, 0.5))), bits.shape
    )
    assert zoomed.any((1, 2)).sum() == 8
    assert zoomed.any((0, 2)).sum() == 4
    assert zoomed.any((0, 1)).sum() == 2


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("elastic", [0.0, 1.5])
def test_warps_are_those_of_scipy(seed, elastic):
    size = (22, 18, 26)
    crop = Crop((-4, 3, 0), (10.5, 8.5, 12.5))
    warp = draw_volume_warp(replace(CHANGES, elastic_px=elastic), crop, size, rng(seed))
    points, volume = scipy_points(warp, size), smooth_volume()
    expected = ndimage.map_coordinates(
        volume.astype(np.float32), points, order=1, mode="grid-constant", cval=-1024
    )
    # The steepest edge is at the border, 900 HU in a voxel: 1/64 voxel along each axis.
    found = warp_volume(volume, warp, size)
    assert np.abs(found - expected).max() < 3 * 900 / 64
    assert np.abs(found - expected).mean() < 1
    bits = noisy_bits()
    nearest = ndimage.map_coordinates(
        bits, points, order=0, mode="grid-constant", cval=0
    )
    # Points within 1/32 voxel of the middle between two may go to either.
    assert np.mean(warp_volume_labels(bits, warp, size) != nearest) < 0.03


def test_large_outputs_are_warped_in_parts_without_a_seam(monkeypatch):
    warp = draw_volume_warp(CHANGES, WHOLE, SIZE, rng(3))
    whole = warp_volume(smooth_volume(), warp, SIZE)
    monkeypatch.setattr(augment3d, "CHUNK_VOXELS", 3 * SIZE[1] * SIZE[2])
    assert np.array_equal(warp_volume(smooth_volume(), warp, SIZE), whole)


def test_the_displacement_has_the_deviation_it_should():
    field = augment3d.smooth_displacement((40, 40, 40), 3.0, 4.0, seed=0)
    assert field.std() == pytest.approx(3.0, rel=0.1)
    steps = np.abs(np.diff(field, axis=1))
    assert steps.max() < field.max() / 2  # smooth: no jumps between neighbours


def test_switching_a_change_off_leaves_the_others():
    full = draw_volume_warp(CHANGES, WHOLE, SIZE, rng(5))
    flat = draw_volume_warp(replace(CHANGES, elastic_px=0), WHOLE, SIZE, rng(5))
    np.testing.assert_array_equal(full.matrix, flat.matrix)


def test_a_neutral_scanner_changes_nothing():
    scanner = draw_scanner(NEUTRAL, SIZE, rng())
    volume = smooth_volume().astype(np.float32)
    assert np.array_equal(simulate_scanner(volume, scanner, rng()), volume)
    assert scanner.gamma == 1


def neutral_but(**fields):
    return draw_scanner(NEUTRAL, SIZE, rng())._replace(**fields)


def test_the_curve_is_that_of_numpy():
    curve = np.add(CURVE_HU, (-30, 40, 0, 10, 100, 120))
    hu = np.array([[[-1000, -925, -850, 25, 500, 900]]], np.float32)
    found = augment3d.apply_hu_curve(hu, curve).ravel()
    inside = np.interp(hu.ravel()[:5], CURVE_HU, curve)
    np.testing.assert_allclose(found[:5], inside, atol=0.5)
    assert found[5] == 900 + 120  # the last offset goes on


def test_blur_is_that_of_scipy():
    volume = rng().normal(size=SIZE).astype(np.float32)
    expected = ndimage.gaussian_filter(volume, 1.1, mode="mirror", truncate=4)
    np.testing.assert_allclose(augment3d.blur_volume(volume, 1.1), expected, atol=0.02)


def test_noise_has_the_deviation_it_should_and_width_makes_neighbours_alike():
    size = (20, 40, 40)
    flat, field = np.zeros(size, np.float32), tuple(slice(0, n) for n in size)
    grains = {
        width: simulate_scanner(
            flat, neutral_but(noise_hu=50.0, noise_width_px=width, field=field), rng()
        )
        for width in (0.0, 1.5)
    }
    for grain in grains.values():
        assert grain.std() == pytest.approx(50, rel=0.03)
    across = {
        width: np.mean(grain[:, :, 1:] * grain[:, :, :-1]) / 2500
        for width, grain in grains.items()
    }
    assert abs(across[0.0]) < 0.05
    # White noise under a Gaussian correlates as exp(-d^2 / (4 sigma^2)).
    assert across[1.5] == pytest.approx(np.exp(-1 / 9), abs=0.03)
    between_slices = np.mean(grains[1.5][1:] * grains[1.5][:-1]) / 2500
    assert abs(between_slices) < 0.05


def test_thick_slices_keep_ramps_and_spread_what_is_thin():
    ramp = np.broadcast_to(np.arange(24, dtype=np.float32)[:, None, None], (24, 3, 3))
    thick = augment3d.thick_slices(ramp, 3.0, 1.0)
    np.testing.assert_allclose(thick[4:-4], ramp[4:-4], atol=1e-4)
    thin = np.zeros((24, 3, 3), np.float32)
    thin[10] = 1
    spread = augment3d.thick_slices(thin, 3.0, 1.0)
    assert spread.max() < 0.5
    assert spread[:, 0, 0].sum() == pytest.approx(1, abs=0.1)


def test_beyond_the_field_of_view_is_air():
    field = (slice(2, 20), slice(0, 28), slice(0, 21))
    found = simulate_scanner(
        np.zeros(SIZE, np.float32), neutral_but(field=field), rng()
    )
    assert (found[field] == 0).all()
    assert np.count_nonzero(found == -1024) == found.size - 18 * 28 * 21


def test_draws_stay_within_their_settings():
    settings = Augment(
        gamma=0.5, noise_hu=50, curve_hu=300, contrast_hu=100, blur_px=1, slice_px=4,
        noise_width_px=2, field_cut=0.25,
    )  # fmt: skip
    drawn = [draw_scanner(settings, SIZE, rng(seed)) for seed in range(200)]
    for scanner in drawn:
        assert 1 / 1.5 <= scanner.gamma <= 1.5
        assert 0 <= scanner.blur_px <= 1
        assert 0 <= scanner.noise_hu <= 50
        assert 0 <= scanner.noise_width_px <= 2
        assert 1 <= scanner.slice_px <= 4
        assert scanner.curve_hu is not None
        assert (np.diff(scanner.curve_hu) >= 0).all()  # denser is never made lighter
        kept = [part.stop - part.start for part in scanner.field]
        assert all(k >= size / 2 for k, size in zip(kept, SIZE, strict=True))
    cut_fields = sum(np.zeros(SIZE)[scanner.field].shape != SIZE for scanner in drawn)
    # One in two, but for the 9 % of them in which no side is cut: 91 of 200.
    assert 65 < cut_fields < 117
    assert 65 < sum(scanner.slice_px > 1 for scanner in drawn) < 135
