"""Passes over a volume with a network set by hand; see `set_by_hand` in conftest."""

import functools
from dataclasses import replace

import numpy as np
import pytest

from ct.inputs import to_input
from inference import predictor3d
from inference.moments import RunningMoments, expected_dice_error
from inference.passes import (
    CONVERGED_DICE,
    MAX_PASSES,
    MIN_PASSES,
    Maps,
    Passes,
    converge,
)
from inference.predictor3d import VolumePredictor
from training.runs import read_settings


@pytest.fixture(scope="module")
def run(make_lung_run, tmp_path_factory):
    return make_lung_run(tmp_path_factory.mktemp("runs") / "hand")


@pytest.fixture(scope="module")
def random_run(make_lung_run, tmp_path_factory):
    """Random weights, instance normalisation, deep supervision, dropout: what is real."""
    settings = read_settings(
        make_lung_run(tmp_path_factory.mktemp("runs") / "for settings")
    )
    model = replace(
        settings.model, depth=3, norm="instance", deep_supervision=True, filters=4
    )
    folder = tmp_path_factory.mktemp("runs") / "random"
    return make_lung_run(
        folder, experiment=replace(settings, model=model), by_hand=False
    )


def predictor_of(run, *, memory_gb=1.0, **passes):
    return VolumePredictor(
        run, read_settings(run), Passes(**passes), memory_gb=memory_gb
    )


def lung_cube():
    """(32, 32, 32) HU: a body of water with a cube of lung, 12 voxels wide."""
    hu = np.full((32, 32, 32), 40, np.float32)
    hu[10:22, 10:22, 10:22] = -850
    return hu


def kept_passes(predictor, hu):
    """Every pass, kept, of a volume that the network sees as it is."""
    network = predictor.network(hu.shape)
    values = to_input(hu, None, predictor.settings.batches)
    return np.stack(
        [predictor.probability(network, values, k) for k in range(predictor.passes.n)]
    )


def test_moments_are_numpys_over_passes_that_were_kept(random_run):
    predictor = predictor_of(random_run, n=5)
    hu = lung_cube()
    kept = kept_passes(predictor, hu)
    moments = predictor.moments(hu, 0.5)
    assert kept.std(axis=0).max() > 1e-3  # the masks do something
    assert np.allclose(moments.mean, kept.mean(axis=0), atol=1e-6)
    assert np.allclose(moments.std, kept.std(axis=0), atol=1e-6)


def test_a_masked_voxel_is_no_lung_and_others_are(run):
    moments = predictor_of(run, n=60).moments(lung_cube(), 0.5)
    lung = lung_cube() == -850
    # 30 % of the cubes are hidden: mean 0.7, standard deviation sqrt(0.3 * 0.7) = 0.46.
    assert moments.mean[lung].mean() == pytest.approx(0.7, abs=0.03)
    assert moments.std[lung].mean() == pytest.approx(0.46, abs=0.02)
    assert moments.mean[~lung].max() < 0.01


def test_the_share_that_is_hidden_can_be_chosen(run):
    lung = lung_cube() == -850
    found = predictor_of(run, n=60, mask_fraction=0.6).moments(lung_cube(), 0.5)
    assert found.mean[lung].mean() == pytest.approx(0.4, abs=0.03)
    with pytest.raises(
        ValueError, match=r"mask_fraction is 1.5; expected between 0 and 1"
    ):
        Passes(mask_fraction=1.5)


@pytest.mark.parametrize("n", [0, 1])
def test_a_single_look_hides_nothing_and_has_no_spread(run, n):
    moments = predictor_of(run, n=n).moments(lung_cube(), 0.5)
    assert moments.n == 1
    assert moments.mean[lung_cube() == -850].min() > 0.99
    assert not moments.std.any()


def test_same_seed_same_bytes_and_another_seed_others(random_run):
    first, again, other = (
        predictor_of(random_run, n=3, seed=seed).moments(lung_cube(), 0.5)
        for seed in (4, 4, 5)
    )
    assert first.mean.tobytes() == again.mean.tobytes()
    assert first.std.tobytes() == again.std.tobytes()
    assert first.mean.tobytes() != other.mean.tobytes()


def test_a_pass_does_not_depend_on_the_passes_before_it(random_run):
    from models.dropout import seed_dropout

    predictor = predictor_of(random_run, n=3, draw="both")
    hu = lung_cube()
    network = predictor.network(hu.shape)
    values = to_input(hu, None, predictor.settings.batches)

    def make(k):
        seed_dropout(network, predictor.passes.seed, k)
        return predictor.probability(network, values, k)

    in_order = [make(k) for k in (0, 1, 2)]
    backwards = [make(k) for k in (2, 1, 0)][::-1]
    for one, other in zip(in_order, backwards, strict=True):
        assert one.tobytes() == other.tobytes()
    assert in_order[0].tobytes() != in_order[1].tobytes()


def test_passes_in_one_call_are_those_made_one_by_one(random_run):
    predictor = predictor_of(random_run, n=4)
    hu = lung_cube()
    kept = kept_passes(predictor, hu)
    from models.masking import mask_noise

    values = to_input(hu, None, predictor.settings.batches)[None, ..., None]
    cube_px = predictor.settings.model.mask_cube_px
    inputs = {
        "volume": np.repeat(values, 4, axis=0),
        "noise": mask_noise(range(4), hu.shape, cube_px, seed=0),
    }
    finest, _ = predictor.network(hu.shape).predict_on_batch(inputs)
    # Not to the last bit, which is why passes are made one by one.
    assert np.allclose(finest[..., 1], kept, atol=1e-5)


def test_dropout_alone_is_seeded_and_leaves_batch_normalisation_alone(
    make_lung_run, tmp_path
):
    settings = read_settings(make_lung_run(tmp_path / "settings"))
    run = make_lung_run(tmp_path / "run", experiment=settings, by_hand=False)
    predictor = predictor_of(run, n=4, draw="dropout")
    assert (predictor.masks, predictor.dropout) == (False, True)
    hu = lung_cube()
    network = predictor.network(hu.shape)
    before = [w.copy() for w in network.get_weights()]
    moments = predictor.moments(hu, 0.5)
    assert moments.n == 4
    assert moments.std.max() > 1e-4
    again = predictor_of(run, n=4, draw="dropout").moments(hu, 0.5)
    assert moments.mean.tobytes() == again.mean.tobytes()
    for old, new in zip(before, network.get_weights(), strict=True):
        if old.dtype == np.float32:  # others are the state of the draws
            assert np.array_equal(old, new)


def test_auto_stops_when_the_mask_has_converged():
    rng = np.random.default_rng(0)
    sure = converged_passes(lambda k: np.full(100, 0.9, np.float32))
    assert sure.n == MIN_PASSES
    unsure = converged_passes(lambda k: rng.random(100, np.float32))
    assert unsure.n == MAX_PASSES
    # 100 000 voxels from 0 to 1, spread 0.015: the voxels expected to be wrong after n passes
    # are 100 000 * 2 * 0.4 * 0.015 / sqrt(n) of 2 * 45 000, below 0.003 from n = 20 on.
    base = np.linspace(0, 1, 100_000)
    some = converged_passes(
        lambda k: (base + 0.015 * rng.standard_normal(100_000)).astype(np.float32)
    )
    assert 16 <= some.n <= 24
    assert expected_dice_error(some, 0.55) < CONVERGED_DICE


def converged_passes(one_pass):
    return converge(one_pass, one_pass(0).shape, "auto", 0.55)


def test_tiles_give_what_the_whole_volume_gives(run):
    hu = np.full((40, 70, 50), 40, np.float32)
    hu[5:33, 8:60, 6:40] = -850
    whole = predictor_of(run, n=1).moments(hu, 0.5)
    few = predictor_of(run, n=1, memory_gb=0.002)
    assert few.tile_px(hu.shape) == (32, 32, 32)
    tiled = few.moments(hu, 0.5)
    # The network looks at a voxel alone, so tiles can only differ by their weights.
    assert np.allclose(tiled.mean, whole.mean, atol=1e-5)


def test_nodules_are_looked_for_in_tiles_of_the_size_trained_on(run):
    predictor = predictor_of(run, n=1)
    assert predictor.tile_px((40, 70, 50)) == (64, 96, 64)
    batches = replace(predictor.settings.batches, target="nodule")
    predictor.settings = replace(predictor.settings, batches=batches)
    assert predictor.tile_px((40, 70, 50)) == (32, 32, 32)
    assert predictor.tile_px((20, 70, 50)) == (32, 32, 32)


def test_scans_of_like_size_share_a_network(run):
    predictor = predictor_of(run, n=1)
    for shape in ((33, 40, 50), (60, 64, 34), (64, 64, 64)):
        predictor.moments(np.full(shape, 40, np.float32), 0.5)
    assert list(predictor.networks) == [(64, 64, 64)]


def test_the_body_is_boxed_without_what_lies_on_the_table():
    hu = np.full((20, 60, 60), -1000, np.float32)
    hu[:, 10:40, 12:50] = 40
    hu[:, 15:35, 18:45] = -850
    hu[3:5, 55:57, 5:7] = 100
    assert predictor3d.body_box(hu) == (slice(0, 20), slice(8, 42), slice(10, 52))
    assert predictor3d.body_box(hu - 2000) == tuple(slice(0, n) for n in hu.shape)


def test_a_body_is_continued_where_the_scan_cuts_it():
    hu = np.full((20, 60, 100), -1000, np.float32)
    hu[:, 10:40, 12:50] = 40
    box = predictor3d.body_box(hu)
    # Both ends in z cut the body: 20 + 2 * 6 = 32, and it ends in air elsewhere.
    assert predictor3d.cut_edges(hu, box) == ((6, 6), (0, 0), (0, 0))
    hu[:, 10:40, :50] = 40  # 50 + 2 + 6 voxels become 64
    box = predictor3d.body_box(hu)
    assert predictor3d.cut_edges(hu, box) == ((6, 6), (0, 0), (12, 0))
    hu[-1] = -1000  # air above the head
    assert predictor3d.cut_edges(hu, predictor3d.body_box(hu))[0] == (12, 0)


def test_the_whole_field_is_restored(run, chest_scan):
    maps = predictor_of(run, n=1).maps(chest_scan, 0.5)
    # Of 50 x 75 x 75 voxels of 4 mm; the body begins 15 mm from the field's side, and the
    # margin is 2.
    assert maps.moments.mean.shape[2] == pytest.approx(75 - 2 * (15 / 4 - 2), abs=2)
    mean = maps.mean
    assert mean.shape == chest_scan.hu.shape
    lung = chest_scan.hu == -850
    inner = np.zeros(lung.shape, bool)
    inner[6:28, 70:120, 50:80] = True
    inner &= lung
    assert inner.sum() == 22 * 50 * 30
    assert mean[inner].min() > 0.99
    assert mean[:, :10].max() == 0
    assert (mean[lung] > 0.5).mean() > 0.8


def test_a_map_goes_back_to_the_scans_grid_by_linear_interpolation(chest_scan):
    from scipy.ndimage import map_coordinates

    from ct import resample

    weights, affine = resample.isotropic(chest_scan.grid, 4.0)
    shape = tuple(len(w) for w in weights)
    values = np.random.default_rng(0).random(shape, np.float32)
    moments = RunningMoments(shape)
    moments.add(values)
    box = tuple(slice(0, n) for n in shape)
    to_scan = functools.partial(predictor3d.resample_to_grid, chest_scan.grid, 4.0, box)
    found = Maps(moments, to_scan).mean
    index = np.stack(np.meshgrid(*map(np.arange, (40, 200, 200)), indexing="ij"), -1)
    ras_mm = chest_scan.grid.index_to_ras_mm(index[::7, ::9, ::11])
    inverse = np.linalg.inv(affine)
    positions = ras_mm @ inverse[:3, :3].T + inverse[:3, 3]
    expected = map_coordinates(
        values, positions.transpose(3, 0, 1, 2), order=1, mode="nearest"
    )
    assert np.allclose(found[::7, ::9, ::11], expected, atol=1e-5)


def test_bfloat16_gives_nearly_what_float32_gives(random_run):
    settings = read_settings(random_run)
    half = VolumePredictor(
        random_run, settings, Passes(n=2), precision="mixed_bfloat16"
    )
    full = predictor_of(random_run, n=2)
    difference = (
        half.moments(lung_cube(), 0.5).mean - full.moments(lung_cube(), 0.5).mean
    )
    assert 0 < np.abs(difference).mean() < 0.02


def test_what_a_run_cannot_draw_is_refused(run):
    settings = read_settings(run)
    plain = replace(settings, model=replace(settings.model, mask_fraction=0, dropout=0))
    with pytest.raises(ValueError, match="draw is 'masks'.*use --draw auto"):
        VolumePredictor(run, plain, Passes(n=5, draw="masks"))
    assert Passes().drawn(plain.model) == (False, False)
    with pytest.raises(ValueError, match="neither masks nor dropout.*--n 1"):
        Passes(n=5).drawn(plain.model)
    assert Passes(n=5).drawn(settings.model) == (True, False)
    assert Passes(n=5, draw="both").drawn(settings.model) == (True, True)
    with pytest.raises(ValueError, match="n is -1; expected auto, or 0 or more"):
        Passes(n=-1)
    assert Passes(n=5, mask_fraction=0.4).drawn(settings.model) == (True, False)
    for hides_nothing in (Passes(n=1, mask_fraction=0.4), Passes(mask_fraction=0.4)):
        model = settings.model if hides_nothing.n == 1 else plain.model
        with pytest.raises(ValueError, match="mask_fraction is 0.4, but no cubes"):
            hides_nothing.drawn(model)


def test_a_run_that_needs_lung_masks_cannot_find_lungs(run):
    settings = read_settings(run)
    masked = replace(settings, batches=replace(settings.batches, lung_mask=True))
    with pytest.raises(ValueError, match="sees nothing outside lung masks"):
        VolumePredictor(run, masked, Passes())
    no_spacing = replace(settings, table=replace(settings.table, volume_spacing_mm=0))
    with pytest.raises(ValueError, match="volume_spacing_mm is 0"):
        VolumePredictor(run, no_spacing, Passes())
