from dataclasses import replace

import numpy as np
import pytest
from scipy import ndimage

from augment import augment2d
from augment.augment2d import Warp, warp_image, warp_labels, warp_matrix
from config import Augment, Batches
from ct import inputs
from ct.boxes import Crop, cut

SIZE = (96, 80)
WHOLE = Crop((0, 0), ((SIZE[0] - 1) / 2, (SIZE[1] - 1) / 2))
SQUARE = Crop((0, 0), (31.5, 31.5))
PLAIN = Batches(window_hu=(-1000.0, 400.0), normalisation="window", lung_mask=False)


def rng(seed=0):
    return np.random.default_rng(seed)


def smooth_image(size=SIZE):
    """An image without steps, so that interpolation errors stay small; HU."""
    y, x = np.ogrid[: size[0], : size[1]]
    return (-400 + 300 * np.sin(y / 9) * np.cos(x / 7)).astype(np.int16)


def disc(centre_yx, radius_px, size=SIZE):
    y, x = np.ogrid[: size[0], : size[1]]
    inside = (y - centre_yx[0]) ** 2 + (x - centre_yx[1]) ** 2 <= radius_px**2
    return inside.astype(np.uint8)


def dice(a, b):
    return 2 * np.count_nonzero(a & b) / (np.count_nonzero(a) + np.count_nonzero(b))


def test_no_change_is_the_image_itself():
    image = smooth_image()
    assert np.array_equal(warp_image(image, Warp(warp_matrix(WHOLE)), SIZE), image)


@pytest.mark.parametrize(
    ("flips", "expected"),
    [({"flip_x": True}, np.fliplr), ({"flip_y": True}, np.flipud)],
)
def test_a_flip_mirrors_and_twice_is_the_identity(flips, expected):
    image = smooth_image()
    warp = Warp(warp_matrix(WHOLE, **flips))
    once = warp_image(image, warp, SIZE)
    assert np.array_equal(once, expected(image))
    assert np.array_equal(warp_image(once, warp, SIZE), image)


def test_a_quarter_turn_is_counter_clockwise():
    image = smooth_image((64, 64))
    warp = Warp(warp_matrix(SQUARE, rotate_deg=90))
    turned = warp_image(image, warp, (64, 64))
    # The sine of 90 degrees leaves 1e-15, which may push the border outside.
    assert np.allclose(turned[1:-1, 1:-1], np.rot90(image)[1:-1, 1:-1], atol=0.01)
    labels = disc((20, 40), 6, (64, 64))
    assert np.array_equal(warp_labels(labels, warp, (64, 64)), np.rot90(labels))


def test_a_shift_moves_what_is_seen_down_and_right():
    labels = disc((40, 30), 5)
    moved = warp_labels(labels, Warp(warp_matrix(WHOLE, shift_yx=(7, -3))), SIZE)
    assert np.array_equal(moved, disc((47, 27), 5))


def test_a_shift_is_in_output_pixels_whatever_the_zoom():
    matrix = warp_matrix(WHOLE, zoom=2, rotate_deg=30, shift_yx=(8, 5))
    pin_xy = np.array(WHOLE.pin[::-1])
    assert np.allclose(matrix @ (*np.add(pin_xy, (5, 8)), 1), pin_xy)


@pytest.mark.parametrize("zoom", [0.8, 1.1, 1.5])
def test_zoom_changes_an_area_by_its_square(zoom):
    labels = disc((50, 40), 18)
    zoomed = warp_labels(labels, Warp(warp_matrix(WHOLE, zoom=zoom)), SIZE)
    assert zoomed.sum() == pytest.approx(labels.sum() * zoom**2, rel=0.02)


@pytest.mark.parametrize("seed", range(6))
def test_an_affine_warp_agrees_with_scipy(seed):
    draw = rng(seed)
    image = smooth_image()
    matrix = warp_matrix(
        Crop((5, -3), (30.0, 41.0)),
        flip_x=bool(seed % 2),
        flip_y=bool(seed // 2 % 2),
        rotate_deg=draw.uniform(-40, 40),
        zoom=draw.uniform(0.8, 1.2),
        shift_yx=draw.uniform(-6, 6, 2),
    )
    ours = warp_image(image, Warp(matrix), (70, 90), fill=-1024)
    by_yx = matrix[::-1][:, [1, 0, 2]]
    scipys = ndimage.affine_transform(
        image.astype(float),
        by_yx[:, :2],
        by_yx[:, 2],
        output_shape=(70, 90),
        order=1,
        mode="grid-constant",
        cval=-1024,
    )
    assert np.abs(ours - scipys).max() < 0.05


def test_a_displaced_warp_agrees_with_scipy():
    image = smooth_image()
    field = augment2d.smooth_displacement(SIZE, 3.0, 24.0, seed=1)
    matrix = warp_matrix(WHOLE, rotate_deg=12, zoom=1.1)
    x, y = augment2d.source_points(matrix, field)
    ours = warp_image(image, Warp(matrix, np.stack((x, y))), SIZE)
    scipys = ndimage.map_coordinates(
        image.astype(float),
        [y, x],
        order=1,
        mode="grid-constant",
        cval=-1024,
    )
    # Where fill meets image, the last bit of a coordinate decides; HU steps by 600 there.
    assert np.quantile(np.abs(ours - scipys), 0.999) < 0.05


@pytest.mark.parametrize("elastic_px", [0.0, 2.0])
def test_a_warp_within_a_box_gives_that_part_of_the_whole(elastic_px):
    image = smooth_image()
    warp = augment2d.draw_warp(Augment(elastic_px=elastic_px), WHOLE, SIZE, rng(2))
    box = slice(13, 50), slice(30, 71)
    part = warp_image(image, warp.within(box), (37, 41))
    assert np.allclose(part, warp_image(image, warp, SIZE)[box], atol=0.05)


def test_source_points_are_the_matrix_and_the_displacement():
    matrix = warp_matrix(WHOLE, rotate_deg=20, zoom=0.9, shift_yx=(2, 4))
    field = augment2d.smooth_displacement(SIZE, 2.0, 32.0, seed=3)
    points = augment2d.source_points(matrix, field)
    assert np.allclose(
        points[:, 11, 23], matrix @ (23, 11, 1) + field[:, 11, 23], atol=1e-4
    )


@pytest.mark.parametrize("elastic_px", [0.0, 2.0])
@pytest.mark.parametrize("seed", range(5))
def test_the_mask_stays_on_what_it_marks(seed, elastic_px):
    labels = disc((52, 35), 14)
    image = np.where(labels, 0, -800).astype(np.int16)
    settings = Augment(zoom=0.2, elastic_px=elastic_px, elastic_grid_px=32)
    warp = augment2d.draw_warp(settings, WHOLE, SIZE, rng(seed))
    seen = warp_image(image, warp, SIZE, fill=-800) > -400
    assert seen.any()
    assert dice(seen, warp_labels(labels, warp, SIZE) > 0) > 0.98


def test_masks_keep_their_labels():
    labels = 2 * disc((40, 30), 10) + disc((60, 50), 8)
    warp = augment2d.draw_warp(Augment(elastic_px=3), WHOLE, SIZE, rng(1))
    assert set(np.unique(warp_labels(labels, warp, SIZE))) == {0, 1, 2}


def test_beyond_the_slice_is_air():
    image = np.zeros(SIZE, np.int16)
    seen = warp_image(image, Warp(warp_matrix(WHOLE, shift_yx=(10, 0))), SIZE)
    assert (seen[:10] == -1024).all()
    assert (seen[10:] == 0).all()


def test_random_warps_stay_within_the_settings():
    settings = Augment(rotate_deg=20, zoom=0.1, shift_px=5)
    pin_xy = np.array(WHOLE.pin[::-1])
    angles, zooms, shifts, signs = [], [], [], []
    for seed in range(400):
        matrix = augment2d.draw_warp(settings, WHOLE, SIZE, rng(seed)).matrix
        linear = matrix[:, :2]
        zoom = 1 / np.sqrt(abs(np.linalg.det(linear)))
        mirror = np.sign(np.diag(linear))
        turn = linear * mirror[:, None] * zoom
        angles.append(np.rad2deg(np.arctan2(turn[1, 0], turn[0, 0])))
        zooms.append(zoom)
        signs.append(mirror)
        lies_xy = np.linalg.solve(linear, pin_xy - matrix[:, 2])
        shifts.extend(lies_xy - pin_xy)
    assert -20 <= min(angles) < -19
    assert 19 < max(angles) <= 20
    assert 0.9 <= min(zooms) < 0.905
    assert 1.095 < max(zooms) <= 1.1
    assert -5 <= min(shifts) < -4.9
    assert 4.9 < max(shifts) <= 5
    # 400 fair coins: 5 standard deviations of the mean are 0.25.
    assert np.abs(np.mean(signs, axis=0)).max() < 0.25


def test_switching_the_turn_off_leaves_the_other_draws():
    both = augment2d.draw_warp(Augment(), WHOLE, SIZE, rng(5)).matrix
    still = augment2d.draw_warp(Augment(rotate_deg=0), WHOLE, SIZE, rng(5)).matrix
    assert np.linalg.det(both[:, :2]) == pytest.approx(np.linalg.det(still[:, :2]))
    assert still[0, 1] == 0


def test_the_displacement_has_the_standard_deviation_that_is_set():
    fields = np.stack(
        [
            augment2d.smooth_displacement(SIZE, 4.0, 16.0, seed=seed)
            for seed in range(400)
        ]
    )
    # Over 400 fields a pixel's standard deviation is known to 3.5 %; 5 times that.
    assert np.abs(fields.std(axis=0) / 4.0 - 1).max() < 0.18
    assert fields.std() == pytest.approx(4.0, rel=0.02)


def test_the_displacement_is_smooth():
    field = augment2d.smooth_displacement((200, 200), 4.0, 64.0, seed=0)
    # 4 px per 64 px knot distance; neighbouring pixels differ by well under 1 px.
    assert np.abs(np.diff(field, axis=1)).max() < 0.5


def test_spline_weights_are_scipys_cubic_splines():
    from scipy.interpolate import BSpline

    basis = augment2d.spline_basis(50, 16.0)
    knots = 16.0 * np.arange(-3, 8)
    scipys = BSpline.design_matrix(np.arange(50.0), knots, 3).toarray()
    scipys /= np.linalg.norm(scipys, axis=1, keepdims=True)
    assert np.allclose(basis, scipys[:, : basis.shape[1]], atol=1e-6)


def test_noise_has_mean_zero_and_the_standard_deviation_that_is_set():
    field = augment2d.noise_field((128, 128), seed=0)
    noisy = augment2d.add_noise(
        np.full((128, 128), -700, np.float32), field, 25.0, rng()
    )
    assert noisy.mean() == pytest.approx(-700, abs=1.5)
    assert noisy.std() == pytest.approx(25, rel=0.05)


def test_neighbouring_noise_is_alike_and_distant_noise_is_not():
    field = augment2d.noise_field((128, 128), seed=0)
    # White noise blurred by a Gaussian: exp(-1 / (4 sigma^2)) one pixel apart.
    expected = np.exp(-1 / (4 * augment2d.NOISE_CORRELATION_PX**2))
    assert np.mean(field[1:] * field[:-1]) == pytest.approx(expected, abs=0.03)
    assert np.mean(field[9:] * field[:-9]) == pytest.approx(0, abs=0.03)


def test_a_window_maps_low_to_0_and_high_to_1():
    hu = np.array([[-2000, -1000, -300, 400, 3000]], np.int16)
    assert inputs.to_input(hu, None, PLAIN).tolist() == [[0, 0, 0.5, 1, 1]]


def test_gamma_is_an_exponent_of_the_windowed_image():
    hu = np.array([[-1000, -650, -300, 400]], np.int16)
    got = inputs.to_input(hu, None, PLAIN, gamma=2.0)
    assert got == pytest.approx(np.array([[0, 0.0625, 0.25, 1]]), abs=1e-6)


def test_outside_the_lungs_is_the_low_end_of_the_window():
    hu = np.full((2, 2), 400, np.int16)
    lung = np.array([[0, 1], [2, 0]], np.uint8)
    batches = replace(PLAIN, lung_mask=True)
    assert inputs.to_input(hu, lung, batches).tolist() == [[0, 1], [1, 0]]


def test_a_missing_lung_mask_is_refused():
    with pytest.raises(ValueError, match=r"no lung mask.*preprocess\.py"):
        inputs.to_input(np.zeros((2, 2), np.int16), None, Batches(lung_mask=True))


def test_zscore_and_minmax_by_hand():
    hu = np.array([[-650, -300], [-300, 50]], np.int16)  # windowed: 1/4, 1/2, 1/2, 3/4
    zscore = inputs.to_input(hu, None, replace(PLAIN, normalisation="zscore"))
    assert zscore.ravel() == pytest.approx([-(2**0.5), 0, 0, 2**0.5], abs=1e-4)
    minmax = inputs.to_input(hu, None, replace(PLAIN, normalisation="minmax"))
    assert minmax.ravel() == pytest.approx([0, 0.5, 0.5, 1], abs=1e-4)


def test_population_normalisation_takes_the_published_numbers():
    # Zhuang et al. 2025: (HU + 370.00039) / 436.59987 after a clip to -1024..276, so 66.6
    # HU, with which they hide cubes, is 1.
    batches = replace(PLAIN, normalisation="population", window_hu=(-1024.0, 276.0))
    hu = np.array([[-2000, -1024, -370, 66.6, 276, 3000]])
    expected = [-1.49794, -1.49794, 0, 1, 1.47962, 1.47962]
    assert inputs.to_input(hu, None, batches).ravel() == pytest.approx(
        expected, abs=2e-5
    )


def test_an_even_image_stays_finite():
    hu = np.zeros((4, 4), np.int16)
    for normalisation in ("zscore", "minmax"):
        image = inputs.to_input(hu, None, replace(PLAIN, normalisation=normalisation))
        assert not image.any()


def test_the_target_is_the_consensus_of_the_nodules_readers():
    bits = np.zeros((3, 4), np.uint8)
    labels = np.zeros((3, 4), np.uint8)
    bits[1] = [0b0001, 0b0011, 0b0111, 0b0001]
    labels[1] = [1, 1, 1, 2]  # nodule 1 has 4 readers, nodule 2 one
    readers = np.zeros(256, np.uint8)
    readers[[1, 2]] = 4, 1
    at_half = augment2d.nodule_target(bits, labels, readers, PLAIN)
    assert at_half[1].tolist() == [0, 1, 1, 1]
    assert at_half[[0, 2]].sum() == 0
    strict = replace(PLAIN, min_readers=2, consensus_level=0.75)
    by_strict = augment2d.nodule_target(bits, labels, readers, strict)
    assert by_strict[1].tolist() == [0, 0, 1, 0]


def test_one_hot_puts_the_background_first():
    assert inputs.one_hot(np.array([[0, 1]], np.uint8)).tolist() == [[[1, 0], [0, 1]]]


def test_a_crop_at_the_lungs_is_centred_on_them():
    lung = np.zeros((64, 64), np.uint8)
    lung[10:21, 30:41] = 1
    crop = augment2d.crop_at_lungs(lung, (21, 21))
    assert crop.start == (5, 25)


def test_a_crop_at_lungs_by_the_border_stays_in_the_slice():
    lung = np.zeros((64, 64), np.uint8)
    lung[0:4, 60:64] = 1
    assert augment2d.crop_at_lungs(lung, (20, 20)).start == (0, 44)


def test_a_slice_without_lungs_is_cropped_at_its_centre():
    empty = np.zeros((64, 64), np.uint8)
    for crop in (
        augment2d.crop_at_lungs(empty, (20, 20)),
        augment2d.crop_near_nodule(empty, empty, (20, 20), rng()),
    ):
        assert crop.start == (22, 22)


def test_a_nodule_lies_anywhere_in_its_crop_and_whole():
    mask = disc((45, 40), 4)
    places = []
    for seed in range(300):
        crop = augment2d.crop_near_nodule(mask, mask, (32, 32), rng(seed))
        got = cut(mask, crop.start, (32, 32), fill=0)
        assert got.sum() == mask.sum()
        places.append(ndimage.center_of_mass(got))
    assert np.min(places, axis=0) == pytest.approx([4, 4], abs=1)
    assert np.max(places, axis=0) == pytest.approx([27, 27], abs=1)


def test_random_turns_keep_the_nodule_in_the_crop():
    mask = disc((45, 40), 4)
    settings = Augment(rotate_deg=180, zoom=0.1, shift_px=0)
    for seed in range(100):
        draw = rng(seed)
        crop = augment2d.crop_near_nodule(mask, mask, (32, 32), draw)
        warp = augment2d.draw_warp(settings, crop, (32, 32), draw)
        seen = warp_labels(mask, warp, (32, 32))
        assert ndimage.center_of_mass(seen) == pytest.approx(crop.pin, abs=1)


def test_every_nodule_of_a_slice_is_chosen():
    mask = disc((20, 20), 9) | disc((70, 60), 2)
    pins = {
        tuple(np.add(crop.start, crop.pin))
        for crop in (
            augment2d.crop_near_nodule(mask, mask, (24, 24), rng(seed))
            for seed in range(40)
        )
    }
    assert pins == {(20, 20), (70, 60)}


def test_crops_without_a_nodule_come_from_the_lungs():
    lung = np.zeros((96, 96), np.uint8)
    lung[60:80, 10:30] = 1
    empty = np.zeros_like(lung)
    for seed in range(50):
        crop = augment2d.crop_near_nodule(empty, lung, (16, 16), rng(seed))
        assert cut(lung, crop.start, (16, 16), fill=0).any()


def test_opencv_keeps_a_half_pixel_shift_exact():
    image = np.zeros((8, 8), np.int16)
    image[:, 4:] = 100
    half = Warp(np.array([[1.0, 0.0, 0.5], [0.0, 1.0, 0.0]]))
    assert warp_image(image, half, (8, 7))[0].tolist() == [0, 0, 0, 50, 100, 100, 100]


def test_larger_pixels_hold_the_mean_of_the_smaller():
    image = np.arange(24, dtype=np.int16).reshape(4, 6) * 10
    means = image.reshape(2, 2, 2, 3).mean((1, 3))
    batches = Batches(target="lung", lung_mask=False, pixel_mm=3.0)
    size = inputs.resized_px((4, 6), (1.5, 1.0), batches)
    assert size == (2, 2)
    assert np.allclose(inputs.resized(image, size), means, atol=0.5)
    assert inputs.resized_px((4, 6), (1.5, 1.0), PLAIN) == (4, 6)


def test_pixels_that_grow_along_one_axis_alone_are_means_there():
    stripes = np.zeros((8, 4), np.float32)
    stripes[::2] = 200
    assert np.allclose(inputs.resized(stripes, (4, 4)), 100)
    assert np.allclose(inputs.resized(stripes, (4, 8)), 100)


def test_a_larger_pixel_has_the_label_that_holds_at_least_half_of_it():
    labels = np.zeros((4, 4), np.uint8)
    labels[:2, 0] = 1
    labels[2:, 1:] = 2
    labels[0, 2] = 2
    assert inputs.resized_labels(labels, (2, 2)).tolist() == [[1, 0], [2, 2]]
