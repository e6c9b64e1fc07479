"""Abdomen phantoms: made by seed, with gas where it rises to and no lungs."""

from dataclasses import replace

import numpy as np
import pytest
from scipy import ndimage

from ct.geometry import mesh_from_axes
from phantoms import bowel
from phantoms.abdomen import draw_body, make_abdomen

MM = 4.0
SEEDS = range(6)


@pytest.fixture(scope="module")
def abdomens():
    return [make_abdomen(seed, MM) for seed in SEEDS]


def body_of(hu):
    """The largest component of tissue in each slice, with its holes."""
    tissue = ndimage.binary_opening(hu > -300, np.ones((1, 3, 3)))
    filled = np.stack([ndimage.binary_fill_holes(plane) for plane in tissue])
    parts, _ = ndimage.label(filled)
    return parts == np.bincount(parts.ravel())[1:].argmax() + 1


def test_a_seed_gives_one_abdomen(abdomens):
    assert np.array_equal(make_abdomen(0, MM), abdomens[0])


def test_seeds_differ_in_size_shape_and_contents(abdomens):
    assert len({hu.shape for hu in abdomens}) == len(SEEDS)
    litres = [body_of(hu).any(0).sum() * MM**2 / 100 for hu in abdomens]
    assert max(litres) > 1.2 * min(litres)
    gas = [((hu < -900) & body_of(hu)).sum() for hu in abdomens]
    assert max(gas) > 1.5 * min(gas)


def test_the_length_is_drawn_between_160_and_320_mm():
    lengths = [draw_body(np.random.default_rng(seed)).length for seed in range(200)]
    assert 160 <= min(lengths) < 180
    assert 300 < max(lengths) <= 320


@pytest.mark.parametrize("seed", SEEDS)
def test_hu_are_those_of_tissue_bone_and_gas(abdomens, seed):
    hu = abdomens[seed]
    assert hu.dtype == np.int16
    assert hu.min() >= -1024
    body = body_of(hu)
    shares = [
        ((low <= hu) & (hu < high) & body).sum() / body.sum()
        for low, high in ((-1024, -800), (-150, -50), (0, 140), (250, 1500))
    ]
    gas, fat, organs, bone = shares
    assert 0.0005 < gas < 0.12
    assert 0.05 < fat < 0.8
    assert organs > 0.15
    assert 0.005 < bone < 0.2


@pytest.mark.parametrize("seed", SEEDS)
def test_little_of_the_body_has_the_density_of_lung(abdomens, seed):
    """Lungs would fill litres with -900 to -600 HU; stool and borders of gas do not."""
    hu = abdomens[seed]
    inside = ndimage.binary_erosion(body_of(hu), iterations=2)
    like_lung = inside & (hu > -900) & (hu < -600)
    deep = ndimage.binary_erosion(like_lung, iterations=2)
    assert deep.sum() * MM**3 / 1000 < 30


def test_axes_rise_to_head_back_and_left(abdomens):
    """The liver is right and high, the spine at the back, the pelvis low."""
    for seed, hu in zip(SEEDS, abdomens, strict=True):
        body = body_of(hu)
        middle_y, middle_x = (np.nonzero(body)[axis].mean() for axis in (1, 2))
        bone = body & (hu > 250)
        vertebrae = bone[len(hu) // 2 :, :, round(middle_x) - 4 : round(middle_x) + 5]
        assert np.nonzero(vertebrae)[1].mean() > middle_y, seed
        top = hu[-4]
        half = round(middle_x)
        organs = (top > 0) & (top < 160) & body[-4]
        assert organs[:, :half].sum() > organs[:, half:].sum(), seed


@pytest.mark.parametrize("spacing_mm", [1.0, 8.0])
def test_voxels_of_unusable_size_are_refused(spacing_mm):
    with pytest.raises(ValueError, match="spacing_mm is .*, expected 1.5 to 5"):
        make_abdomen(0, spacing_mm)


# --- bowel --------------------------------------------------------------------------


def straight_gut(**changes):
    """A tube of radius 20 mm along z, half full of gas above fluid of 10 HU."""
    count = 61
    points = np.zeros((count, 3))
    points[:, 2] = np.arange(count) * bowel.STEP_MM
    columns = {
        "radius": 20.0,
        "wall": 2.0,
        "fold": 0.0,
        "level": 0.0,
        "below_hu": 10.0,
        "bubbles": 0.0,
        "stretch": 0,
    }
    columns = {name: np.full(count, value) for name, value in columns.items()}
    gut = bowel.Gut(
        points=points, fold_side=np.tile((0.0, 1.0, 0.0), (count, 1)), **columns
    )
    return replace(gut, **changes)


def painted(gut, gas_side=1):
    at = np.arange(-40, 41, 2.0)
    mesh = mesh_from_axes(np.arange(20, 100, 2.0), at, at)
    hu = np.full(mesh.shape, -100, np.float32)
    rng = np.random.default_rng(0)
    bowel.paint_gut(hu, mesh, gut, rng, wall_hu=40.0, gas_side=gas_side)
    return hu


def test_a_tube_has_the_area_of_its_lumen_and_a_flat_level():
    hu = painted(straight_gut())
    gas = hu < -480
    half_disc_mm2 = np.pi * 18**2 / 2
    assert gas.sum() * 8 / 80 == pytest.approx(half_disc_mm2, rel=0.12)
    assert not gas[:, 21:].any()
    assert (hu[:, 18, 15:26] < -900).all()
    assert (np.abs(hu[:, 22, 15:26] - 10) < 1).all()
    assert hu[20, 20, 40] == -100
    assert hu[20, 20, 30] == pytest.approx(40, abs=75)


def test_gas_rises_to_the_back_of_a_patient_on_the_belly():
    supine, prone = painted(straight_gut()), painted(straight_gut(), gas_side=-1)
    assert np.array_equal(supine < -500, (prone < -500)[:, ::-1])


def test_a_fold_narrows_the_lumen_from_its_side():
    fold = np.zeros(61)
    fold[30] = 0.7
    hu = painted(straight_gut(fold=fold, level=np.full(61, 1e3)))
    at_fold, elsewhere = hu[20] < -500, hu[5] < -500
    assert elsewhere.sum() > 1.2 * at_fold.sum() > 0
    assert np.nonzero(at_fold)[0].mean() < 20


def test_a_wall_separates_two_stretches():
    stretch = np.repeat([0, 1], [30, 31])
    hu = painted(straight_gut(stretch=stretch, level=np.full(61, 1e3)))
    column = hu[:, 20, 20]
    assert (column > -100).any()
    assert (column[:15] < -900).all()
    assert (column[-15:] < -900).all()


def test_stool_holds_the_stated_share_of_bubbles():
    found = []
    for share in (0.2, 0.5):
        gut = straight_gut(level=np.full(61, -1e3), bubbles=np.full(61, share))
        found.append((painted(gut)[:, 16:25, 16:25] < -450).mean())
    assert found == pytest.approx([0.2, 0.5], abs=0.14)
    assert (painted(straight_gut(level=np.full(61, -1e3)))[:, 16:25, 16:25] == 10).all()
