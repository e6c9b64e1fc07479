"""Simulated pathology: what it draws, where, and how often."""

import math
from dataclasses import replace

import cv2
import numpy as np
import pytest
from scipy import ndimage

import config
from augment import lesion_paint, lesions, nodule_shapes, textures
from ct.scan import LEFT, RIGHT
from nodules import shapes

SPACING_MM = (2.0, 1.0, 1.0)
FINDINGS = config.Lesions().findings


def chest(depth=6):
    """Two ellipses of noisy lung in soft tissue, and their labels; (z, y, x)."""
    shape = (depth, 160, 200)
    _, y, x = np.ogrid[tuple(slice(length) for length in shape)]
    lung = np.zeros(shape, np.uint8)
    for label, middle in ((RIGHT, 60), (LEFT, 140)):
        inside = ((y - 80) / 55) ** 2 + ((x - middle) / 32) ** 2 <= 1
        lung[np.broadcast_to(inside, shape)] = label
    hu = np.where(lung, -850, 40) + np.random.default_rng(0).normal(0, 12, shape)
    return hu.astype(np.int16), lung


def only(finding, **options):
    return config.Lesions(probability=1.0, findings=(finding,), **options)


def simulated(hu, lung, settings, seed=0):
    spacing = SPACING_MM[-hu.ndim :]
    return lesions.simulate_lesions(
        hu,
        lung,
        spacing,
        settings,
        np.random.default_rng(seed),
        held_out=frozenset(),
    )


def near_lung(lung, millimetres):
    """Bool (z, y, x) of voxels at most so far from the lung along y and x."""
    side = 2 * millimetres + 1
    square = np.ones((side, side), np.uint8)
    return np.stack([cv2.dilate(plane, square) for plane in lung]) > 0


CIRCLES = config.Lesions(probability=1.0, kind="circles")
REALISTIC = [only(finding) for finding in FINDINGS]


@pytest.mark.parametrize("settings", [CIRCLES, *REALISTIC])
@pytest.mark.parametrize("depth", [1, 6])
def test_a_seed_gives_the_same_bytes_and_inputs_stay_as_they_were(settings, depth):
    hu, lung = chest(depth)
    before = hu.copy(), lung.copy()
    first, again, other = (simulated(hu, lung, settings, seed) for seed in (3, 3, 4))
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()
    assert (first != hu).any()
    assert first.dtype == hu.dtype
    np.testing.assert_array_equal(hu, before[0])
    np.testing.assert_array_equal(lung, before[1])


@pytest.mark.parametrize("settings", [CIRCLES, *REALISTIC])
def test_a_slice_is_a_volume_of_one(settings):
    hu, lung = chest(1)
    for seed in range(3):
        flat = simulated(hu[0], lung[0], settings, seed)
        np.testing.assert_array_equal(flat, simulated(hu, lung, settings, seed)[0])


@pytest.mark.parametrize("finding", FINDINGS)
def test_nothing_changes_away_from_the_lungs(finding):
    hu, lung = chest()
    near = near_lung(lung, math.ceil(lesion_paint.RIM_MM))
    for seed in range(4):
        changed = simulated(hu, lung, only(finding), seed) != hu
        assert changed.any()
        assert not (changed & ~near).any()
        # The wall is soft tissue, so none of it is the rim that may be filled.
        assert not (changed & (lung == 0) & (hu > lesion_paint.RIM_HU[1])).any()


def test_the_rim_is_filled_and_airways_beside_the_lung_are_not():
    hu, lung = chest(1)
    shared, airway = (
        (0, 136, 60),
        (0, 80, 93),
    )  # one pixel below, and beside the right lung
    assert lung[0, 135, 60] == RIGHT and lung[shared] == 0
    assert lung[0, 80, 92] == RIGHT and lung[airway] == 0
    hu[shared], hu[airway] = -400, -980
    settings = config.Lesions(probability=1.0, findings=("effusion",))
    results = [simulated(hu, lung, settings, seed) for seed in range(10)]
    assert any(result[shared] > -100 for result in results)
    assert all(result[airway] == -980 for result in results)


@pytest.mark.parametrize(
    ("finding", "low", "high"),
    [
        ("consolidation", 10, 70),
        ("mass", -25, 60),
        ("nodule", -20, 80),
        ("atelectasis", 30, 90),
        ("effusion", 0, 90),  # with collapsed lung above
    ],
)
def test_what_is_solid_has_the_density_it_is_known_for(finding, low, high):
    hu, lung = chest(1)
    for seed in range(6):
        after = simulated(hu, lung, only(finding), seed)
        solid = after[(lung > 0) & (after > -300)]
        if solid.size > 100:
            assert low - 12 <= np.median(solid) <= high + 12


def test_ground_glass_is_haze_that_hides_no_vessel():
    hu, lung = chest(1)
    hu[0, 70:90, 58:62] = 30
    for seed in range(8):
        after = simulated(hu, lung, only("ground-glass"), seed)
        assert (after >= hu).all()
        hazy = (after > hu + 60) & (lung > 0)
        assert hazy.any()
        assert after[hazy].max() < -150
        np.testing.assert_array_equal(after[0, 70:90, 58:62], hu[0, 70:90, 58:62])


def test_fluid_fills_the_back_up_to_a_level():
    hu, lung = chest(4)
    seen = 0
    for seed in range(12):
        after = simulated(hu, lung, only("effusion"), seed)
        for side in (RIGHT, LEFT):
            own = lung == side
            wet = (after > -200) & own
            if not wet.any() or np.median(np.diff(np.nonzero(wet)[1])) < 0:
                continue
            filled = [wet[:, y].sum() == own[:, y].sum() for y in range(160)]
            rows = np.flatnonzero(own.any((0, 2)))
            first = next(y for y in rows if all(filled[r] for r in rows if r >= y))
            assert first < rows[-1]
            if not wet[:, :first].any():  # no collapsed lung above: a flat surface
                seen += 1
    assert seen >= 2


def test_the_level_holds_the_share_asked_for():
    mask = np.zeros((2, 10, 4), np.uint8)
    mask[:, 2:8] = 1  # six rows
    assert lesion_paint.fluid_level(mask, 0.5) == 5
    assert lesion_paint.fluid_level(mask, 1 / 6) == 7
    assert lesion_paint.fluid_level(mask, 1.0) == 2


def test_fibrosis_lies_under_the_pleura():
    hu, lung = chest(1)
    inwards = cv2.distanceTransform((lung[0] > 0).astype(np.uint8), cv2.DIST_L2, 5)
    shares = []
    for seed in range(10):
        after = simulated(hu, lung, only("fibrosis"), seed)
        changed = np.abs(after[0].astype(int) - hu[0]) > 60
        outer, inner = (inwards > 0) & (inwards < 6), inwards > 20
        shares.append((changed[outer].mean(), changed[inner].mean()))
    outer, inner = np.mean(shares, axis=0)
    assert outer > 3 * inner


def test_masses_are_30_to_80_mm_wide():
    hu, lung = chest(1)
    _, grid_y, grid_x = np.ogrid[:1, :300, :400]
    wide = (((grid_y - 150) / 140) ** 2 + ((grid_x - 200) / 190) ** 2 <= 1) * RIGHT
    lung = wide.astype(np.uint8)
    hu = np.where(lung, -850, 40).astype(np.int16)
    for seed in range(10):
        after = simulated(hu, lung, only("mass"), seed)
        area = np.count_nonzero((after > -300) & (lung > 0))
        assert area < math.pi * 40**2 * 1.8
        _, _, stats, _ = cv2.connectedComponentsWithStats(
            ((after > -300) & (lung > 0))[0].astype(np.uint8)
        )
        assert stats[1:, cv2.CC_STAT_AREA].max() > math.pi * 15**2 * 0.3


def test_nodules_lie_at_the_border_of_the_lung():
    hu, lung = chest(1)
    border = (lung > 0) & near_lung((lung == 0).astype(np.uint8), 3)
    touching = []
    for seed in range(15):
        solid = (simulated(hu, lung, only("nodule"), seed) > -300) & (lung > 0)
        count, parts = cv2.connectedComponents(solid[0].astype(np.uint8))
        masks = [parts == part for part in range(1, count)]
        touching += [(border[0] & mask).any() for mask in masks if mask.sum() > 9]
    assert len(touching) > 15
    assert np.mean(touching) > 0.9


USUAL_KINDS = config.Lesions().nodule_kinds


def nodules(hu, lung, seed, probability=1.0, kinds=USUAL_KINDS, held_out=frozenset()):
    settings = config.Lesions(
        probability=probability, findings=("nodule",), nodule_kinds=kinds
    )
    rng = np.random.default_rng(seed)
    return lesions.simulate_nodules(
        hu, lung, SPACING_MM, settings, rng, held_out=held_out
    )


def test_nodules_that_shall_be_found_are_where_their_mask_says():
    hu, lung = chest(12)
    before, raised, sizes = hu.copy(), [], []
    for seed in range(12):
        after, drawn = nodules(hu, lung, seed)
        np.testing.assert_array_equal(after, nodules(hu, lung, seed)[0])
        # Their border is soft.
        near = ndimage.binary_dilation(drawn, np.ones((3, 5, 5)))
        assert not ((after != hu) & ~near).any()
        assert not (drawn & ~near_lung((lung > 0).astype(np.uint8), 2)).any()
        inside = drawn & (lung > 0)
        if inside.sum() > 20:
            raised.append(float(np.mean(after[inside] - hu[inside].astype(float))))
            sizes.append(int(drawn.sum()))
    np.testing.assert_array_equal(hu, before)
    assert len(raised) > 8
    assert min(raised) > 100
    assert np.median(raised) > 500
    assert max(sizes) > 4 * min(sizes)


def test_nodules_that_shall_be_found_are_drawn_as_often_as_asked_and_in_lungs_only():
    hu, lung = chest()
    share = np.mean([nodules(hu, lung, seed, 0.3)[1].any() for seed in range(60)])
    assert 0.1 < share < 0.5
    after, drawn = nodules(hu, 0 * lung, 0)
    np.testing.assert_array_equal(after, hu)
    assert not drawn.any()


def test_the_middle_of_a_nodule_lies_where_it_may():
    hu, lung = chest(12)
    settings = config.Lesions(probability=1.0, findings=("nodule",))
    asked = []

    def seen(place):
        asked.append(place)
        return False

    rng = np.random.default_rng(0)
    after, drawn = lesions.simulate_nodules(
        hu, lung, SPACING_MM, settings, rng, held_out=frozenset(), seen=seen
    )
    assert len(asked) >= lesion_paint.TRIES
    assert not drawn.any()
    np.testing.assert_array_equal(after, hu)


def test_nodules_are_of_the_kinds_that_are_asked_for():
    hu, lung = chest(12)

    def densest(kinds):
        found = [nodules(hu, lung, seed, kinds=kinds) for seed in range(12)]
        inside = [hu[drawn & (lung > 0)] for hu, drawn in found if drawn.sum() > 100]
        assert len(inside) > 5
        return np.array([np.percentile(some, 90) for some in inside])

    assert densest((0.0, 0.0, 1.0)).max() < -200
    assert np.median(densest((1.0, 0.0, 0.0))) > -100
    assert np.median(densest((0.0, 1.0, 0.0))) > -200


def test_shapes_of_patients_held_out_are_not_drawn():
    count, size_mm = lesions.NODULE_SHAPES, lesions.NODULE_MM
    patients = [nodule_shapes.patient_of_shape(i, size_mm) for i in range(count)]
    assert len(set(patients)) > 150
    (one,) = np.flatnonzero(np.array(patients) == "LIDC-IDRI-0003").tolist()

    def number(seed, held_out):
        rng = np.random.default_rng(seed)
        shape = nodule_shapes.drawn_shape(count, size_mm, held_out, rng)
        after = rng.bit_generator.state
        (which,) = (
            i for i in range(count) if nodule_shapes.nodule_shape(i, size_mm) is shape
        )
        return which, after

    drawn = int(np.random.default_rng(5).integers(count))
    assert number(5, frozenset())[0] == drawn
    assert number(5, {"LIDC-IDRI-0003"}) == number(5, frozenset())
    half = set(patients[: count // 2])
    for seed in range(20):
        which, after = number(seed, half)
        assert patients[which] not in half
        assert after == number(seed, frozenset())[1]
    seed = next(i for i in range(9999) if number(i, frozenset())[0] == one)
    assert number(seed, {"LIDC-IDRI-0003"})[0] == (one + 1) % count
    with pytest.raises(ValueError, match="all 256 nodule shapes come from patients"):
        number(0, set(patients))


def test_the_patient_of_a_shape_is_who_has_it():
    for number in range(5):
        shape = nodule_shapes.nodule_shape(number, lesions.NODULE_MM)
        patient = nodule_shapes.patient_of_shape(number, lesions.NODULE_MM)
        index, patients = shapes.shape_index()
        own = index[np.array(patients) == patient, 0].astype(int).tolist()
        assert shape.ratings in [shapes.read_shape(i).ratings for i in own]
        assert shape.diameter_mm in [shapes.read_shape(i).diameter_mm for i in own]


def test_few_shapes_are_told_and_none_is_refused(caplog):
    pathology = config.Lesions(probability=1.0)
    batches = config.Batches(target="lung")
    everybody = {
        nodule_shapes.patient_of_shape(i, nodule_shapes.SHAPE_MM)
        for i in range(nodule_shapes.SHAPES)
    }
    assert lesions.checked_lesions(pathology, batches, frozenset()) == pathology
    assert not caplog.records
    some = everybody - {nodule_shapes.patient_of_shape(0, nodule_shapes.SHAPE_MM)}
    lesions.checked_lesions(pathology, batches, some)
    assert "simulated nodules use 1 of 64 shapes" in caplog.text
    with pytest.raises(
        ValueError, match=r"all 64 LIDC-IDRI .* --lesions.probability 0"
    ):
        lesions.checked_lesions(pathology, batches, everybody)
    circles = replace(pathology, kind="circles")
    others = replace(pathology, findings=("mass",))
    for settings in (circles, others):
        assert lesions.checked_lesions(settings, batches, everybody) == settings


def test_nodules_differ_where_their_shape_is_held_out_and_nowhere_else():
    hu, lung = chest(12)
    size_mm = lesions.NODULE_MM
    everybody = {
        nodule_shapes.patient_of_shape(i, size_mm) for i in range(lesions.NODULE_SHAPES)
    }
    seeds = range(6)
    usual = [nodules(hu, lung, seed)[0] for seed in seeds]
    same = [nodules(hu, lung, seed, held_out={"nobody"})[0] for seed in seeds]
    np.testing.assert_array_equal(usual, same)
    kept = nodule_shapes.patient_of_shape(0, size_mm)
    other = [nodules(hu, lung, seed, held_out=everybody - {kept})[0] for seed in seeds]
    assert not any(np.array_equal(a, b) for a, b in zip(usual, other, strict=True))


def test_ground_glass_nodules_hide_no_vessel():
    hu, lung = chest(12)
    hu[:, 70:74, 30:90] = 60
    hazed = 0
    for seed in range(20):
        after, drawn = nodules(hu, lung, seed, kinds=(0.0, 0.0, 1.0))
        vessel = drawn & (hu > 0) & (lung > 0)
        hazed += int(vessel.sum())
        assert (after[vessel] >= hu[vessel]).all()
    assert hazed > 30


def test_circles_are_seven_to_nine_with_centres_in_the_boxes_of_both_lungs():
    _, lung = chest()
    boxes = lesions.lung_boxes(lung)
    rng = np.random.default_rng(0)
    counts, sides = set(), set()
    for _ in range(60):
        circles = lesions.draw_circles(boxes, rng)
        counts.add(len(circles))
        for circle in circles:
            holding = [
                side
                for side, box in boxes.items()
                if all(
                    part.start <= centre <= part.stop - 1
                    for part, centre in zip(box, circle.centre_zyx, strict=True)
                )
            ]
            assert len(holding) == 1  # the boxes do not overlap
            sides.update(holding)
            low, high = lesions.CIRCLE_RADIUS_MM
            assert low <= circle.radius_mm <= high
            low, high = lesions.CIRCLE_OPACITY
            assert low <= circle.opacity <= high
    assert counts == {7, 8, 9}
    assert sides == {RIGHT, LEFT}


def test_circles_blend_with_soft_tissue_within_their_radius():
    hu = np.full((1, 40, 40), -1000, np.int16)
    circle = lesions.Circle((0.0, 20.0, 15.0), 5.0, 0.25)
    lesions.paint_circles(hu, [circle], (1.0, 1.0, 0.5))
    y, x = np.ogrid[:40, :40]
    inside = (y - 20) ** 2 + ((x - 15) * 0.5) ** 2 <= 25
    np.testing.assert_array_equal(hu[0][inside], -740)  # 0.75 * -1000 + 0.25 * 40
    np.testing.assert_array_equal(hu[0][~inside], -1000)


def test_a_ball_is_cut_by_every_slice_it_reaches():
    hu = np.full((9, 41, 41), -1000, np.float32)
    lesions.paint_circles(hu, [lesions.Circle((4.0, 20.0, 20.0), 6.0, 1.0)], (2, 1, 1))
    z, y, x = np.ogrid[:9, :41, :41]
    inside = ((z - 4) * 2) ** 2 + (y - 20) ** 2 + (x - 20) ** 2 <= 36
    np.testing.assert_array_equal(hu == 40, inside)


@pytest.mark.parametrize("side", [RIGHT, LEFT])
def test_circles_are_skipped_where_one_lung_shows(side):
    hu, lung = chest(1)
    for seed in range(5):
        one = np.where(lung == side, lung, 0)
        np.testing.assert_array_equal(simulated(hu, one, CIRCLES, seed), hu)


def test_a_plain_mask_is_taken_apart_into_the_lungs():
    _, lung = chest(2)
    mask = (lung > 0).astype(np.uint8)
    np.testing.assert_array_equal(lesions.split_lungs(mask), lung)
    for side in (RIGHT, LEFT):
        one = (lung == side).astype(np.uint8)
        np.testing.assert_array_equal(lesions.split_lungs(one), one * side)


@pytest.mark.parametrize("probability", [0.0, 0.6, 1.0])
def test_the_share_of_changed_samples_is_the_probability(probability):
    hu, lung = chest(1)
    settings = config.Lesions(probability=probability, kind="circles")
    draws = 400
    changed = sum(
        (simulated(hu, lung, settings, seed) != hu).any() for seed in range(draws)
    )
    # Four standard deviations of the binomial; none at 0 and 1.
    room = 4 * math.sqrt(draws * probability * (1 - probability))
    assert abs(changed - draws * probability) <= room


def test_without_lung_nothing_is_drawn():
    hu, lung = chest(1)
    settings = config.Lesions(probability=1.0)
    np.testing.assert_array_equal(simulated(hu, 0 * lung, settings), hu)


def test_noise_is_measured_as_it_was_made():
    rng = np.random.default_rng(5)
    white = rng.normal(0, 1, (1, 512, 512)).astype(np.float32)
    for sigma, sd in ((0.5, 30.0), (0.9, 15.0)):
        smooth = cv2.GaussianBlur(white[0], (0, 0), sigma)[None]
        found = textures.measure_grain(40 + sd * smooth / smooth.std())
        assert 0.65 * sd < found.sd_hu < 1.05 * sd
        assert found.sigma_px == pytest.approx(sigma, abs=0.25)


@pytest.mark.parametrize("shape", [(1, 5, 200), (1, 200, 5), (3, 24, 24), (2, 79, 90)])
def test_small_images_have_lesions_too(shape):
    lung = np.full(shape, RIGHT, np.uint8)
    lung[..., shape[2] // 2 :] = LEFT
    hu = np.full(shape, -850, np.int16)
    for finding in FINDINGS:
        after = simulated(hu, lung, only(finding), seed=1)
        assert after.shape == shape
        assert (after != hu).any()


def test_noise_is_a_default_where_there_is_no_tissue():
    nothing = np.full((1, 200, 200), -1000, np.int16)
    found = textures.measure_grain(nothing)
    assert found == textures.Grain(textures.GRAIN_SD_HU, textures.GRAIN_SIGMA_PX)


def test_sizes_that_do_not_fit_are_refused():
    hu, lung = chest(1)
    rng = np.random.default_rng(0)
    for bad in ((hu, lung[:, 1:], SPACING_MM), (hu[0], lung[0], SPACING_MM)):
        with pytest.raises(ValueError, match="a spacing per axis"):
            lesions.simulate_lesions(*bad, CIRCLES, rng, held_out=frozenset())


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("probability", 1.5),
        ("findings", ()),
        ("findings", ("mass", "mass")),
        ("most", 0),
    ],
)
def test_settings_out_of_range_are_refused(name, value):
    with pytest.raises(ValueError, match=name):
        config.Lesions(**{name: value})


def test_every_finding_has_a_painter():
    assert set(lesion_paint.PAINTERS) == set(lesion_paint.BOTH_LUNGS) == set(FINDINGS)
