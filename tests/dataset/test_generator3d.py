"""Batches and tiles of volumes through the real table."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import cv2
import numpy as np
import pytest
from scipy import ndimage

import config
import data_generator
import slice_idx
import steps
from augment import augment2d
from ct import boxes, inputs
from ct.geometry import Grid
from ct.scan import consensus, readers_of_label, write_scan
from dataset import batching, contact_sheet, generator3d
from dataset.generator3d import VolumeCache, VolumeGenerator, tiles_of_volumes
from dataset.slice_table import SliceTable
from dataset.split import PARTS, read_split, scans_of_part
from nodules import shapes
from table import write_table
from tests.conftest import tiny_scan

LUNGS = config.Batches(
    target="lung",
    input_px=(12, 20, 16),
    crop="lung",
    window_hu=(-1024.0, 276.0),
    normalisation="population",
    lung_mask=False,
    batch_size=2,
)
NODULES = config.Batches(
    target="nodule", input_px=(12, 16, 16), crop="nodule", batch_size=3
)
CHANGES = config.Augment(
    rotate_deg=20, tilt_deg=10, shift_px=2, elastic_px=1, elastic_grid_px=8, gamma=0.2,
    noise_hu=30, noise_width_px=1, curve_hu=20, blur_px=1, slice_px=3, field_cut=0.2,
    synthesis=0.3,
)  # fmt: skip
SPACING_MM = 2.0


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Scans, a table of their volumes alone, and a split."""
    folder = tmp_path_factory.mktemp("volumes")
    for index in range(5):
        scan = tiny_scan(index)
        write_scan(scan, folder / "scans" / f"{scan.scan_id}.h5", {})
    settings = config.Table(slices="none", volume_spacing_mm=SPACING_MM)
    write_table(folder / "scans", folder / "table.h5", settings)
    split = config.Split(fractions=(0.6, 0.2, 0.2))
    slice_idx.write_split(folder / "table.h5", folder / "split.json", split)
    return folder


@pytest.fixture
def table(folder):
    with SliceTable(folder / "table.h5") as opened:
        yield opened


def training(table, batches=LUNGS, augmentation=CHANGES, **options):
    scans = np.arange(len(table.scans))
    return VolumeGenerator(
        table, scans, batches, augmentation, **{"seed": 7, **options}
    )


def test_a_table_of_volumes_alone_has_no_slices(table):
    assert len(table) == 0
    # 24 slices of 2.5 mm and 64 pixels of 1.5 mm, at 2 mm.
    assert table.volume(0, "hu").shape == (30, 48, 48)


def test_the_same_batch_from_any_thread_in_any_order(table):
    first, second = training(table), training(table)
    with ThreadPoolExecutor(3) as pool:
        backwards = list(pool.map(second.__getitem__, reversed(range(len(second)))))
    for index, (x, y) in enumerate(reversed(backwards)):
        wanted_x, wanted_y = first[index]
        np.testing.assert_array_equal(x, wanted_x)
        np.testing.assert_array_equal(y, wanted_y)


def test_epochs_differ_and_come_back(table):
    generator = training(table)
    before = generator[0][0]
    generator.on_epoch_end()
    assert not np.array_equal(generator[0][0], before)
    generator.epoch = 0
    np.testing.assert_array_equal(generator[0][0], before)


def test_an_epoch_holds_every_scan_once(table):
    generator = training(table)
    seen = np.concatenate([generator.rows_of_batch(i) for i in range(len(generator))])
    assert sorted(seen) == list(range(5))


def test_stated_steps_take_every_scan_as_often_or_once_more(table):
    generator = training(table, steps_per_epoch=6)
    seen = np.concatenate([generator.rows_of_batch(i) for i in range(6)])
    assert sorted(np.bincount(seen).tolist()) == [2, 2, 2, 3, 3]
    with pytest.raises(IndexError, match="batch 6; expected 0 to 5"):
        generator[6]


def test_a_batch_is_input_and_one_hot_reference(table):
    x, y = training(table)[0]
    assert (x.shape, x.dtype) == ((2, 12, 20, 16, 1), np.float32)
    assert (y.shape, y.dtype) == ((2, 12, 20, 16, 2), np.uint8)
    assert (y.sum(axis=-1) == 1).all()
    low, high = ((hu + 370.00039) / 436.59987 for hu in (-1024, 276))
    assert x.min() >= low - 1e-5
    assert x.max() <= high + 1e-5


def test_a_plain_centre_crop_is_the_middle_of_the_volume(table):
    batches = replace(LUNGS, crop="centre", batch_size=1, normalisation="window")
    x, y = training(table, batches, None, shuffle=False)[2]
    part = np.s_[9:21, 14:34, 16:32]
    hu, lung = table.volume(2, "hu")[part], table.volume(2, "lung")[part]
    np.testing.assert_allclose(
        x[0, ..., 0], np.clip((hu + 1024) / 1300, 0, 1), atol=1e-6
    )
    np.testing.assert_array_equal(y[0, ..., 1], lung > 0)


def test_input_larger_than_the_volume_is_padded_with_air(table):
    batches = replace(LUNGS, input_px=(40, 64, 64), batch_size=1)
    x, y = training(table, batches, None)[0]
    assert np.allclose(x[0, :5], (-1024 + 370.00039) / 436.59987)
    assert y[0, 5:35, 8:56, 8:56, 1].sum() == y[..., 1].sum() > 0


def test_the_middle_of_a_lung_crop_lies_in_the_box_around_the_lungs(table):
    batches = replace(LUNGS, input_px=(2, 2, 2))
    generator = training(table, batches, None)
    volume = generator.cache.read(0)
    rng = np.random.default_rng(0)
    middles = np.array(
        [np.array(generator.crop(volume, rng).start) + 0.5 for _ in range(300)]
    )
    box = np.array([(part.start, part.stop) for part in volume.lung_box])
    assert (middles >= box[:, 0] - 0.5).all()
    assert (middles <= box[:, 1] - 0.5).all()
    spread = np.ptp(middles, axis=0) / np.ptp(box, axis=1)
    assert (spread > 0.9).all()


def test_body_crops_also_lie_away_from_the_lungs(table):
    away = {}
    for crop in ("lung", "body"):
        batches = replace(LUNGS, crop=crop, input_px=(4, 4, 4))
        generator = training(table, batches, None, steps_per_epoch=100)
        volume = generator.cache.read(0)
        rng = np.random.default_rng(0)
        starts = np.array([generator.crop(volume, rng).start for _ in range(300)])
        low = [part.start - 5 for part in volume.lung_box]
        high = [part.stop for part in volume.lung_box]
        away[crop] = ((starts < low) | (starts > high)).any(axis=1).mean()
    assert away["lung"] == 0
    assert 0.05 < away["body"] < 0.5


def test_gas_changes_hu_outside_the_lungs_and_nothing_else(table):
    plain = config.Augment(flip=False, rotate_deg=0, zoom=0, shift_px=0)
    without = training(table, augmentation=plain)
    gassed = training(table, augmentation=replace(plain, gas=1.0))
    differ = []
    for index in range(len(without)):
        (x, y), (gx, gy) = without[index], gassed[index]
        assert np.array_equal(y, gy)
        assert np.array_equal(x[..., 0][y[..., 1] > 0], gx[..., 0][y[..., 1] > 0])
        differ.append((x != gx).any())
    assert any(differ)


def test_nodule_crops_hold_a_whole_nodule(table):
    generator = training(table, replace(NODULES, nodule_fraction=1.0), None)
    volume = generator.cache.read(1)
    assert len(volume.nodule_boxes) == 2
    rng, found = np.random.default_rng(0), set()
    for _ in range(50):
        crop = generator.crop(volume, rng)
        held = [
            all(
                first <= part.start and part.stop <= first + size
                for part, first, size in zip(
                    box, crop.start, NODULES.volume_px, strict=True
                )
            )
            for box in volume.nodule_boxes
        ]
        assert any(held)
        found.add(tuple(held))
    assert {(True, False), (False, True)} <= found


def test_the_nodule_reference_is_the_consensus_of_the_volume(table):
    batches = replace(
        NODULES, input_px=(30, 48, 48), crop="centre", batch_size=1, lung_mask=True
    )
    x, y = training(table, batches, None, shuffle=False)[1]
    expected = consensus(
        table.volume(1, "reader_bits"),
        table.volume(1, "nodule_labels"),
        readers_of_label(tiny_scan(1).nodules),
        level=0.5,
    )
    np.testing.assert_array_equal(y[0, ..., 1], expected)
    assert (x[0, table.volume(1, "lung") == 0] == 0).all()


def test_the_reference_follows_the_input(table):
    """After any warp, what is lung in the reference is air in the input."""
    warps = config.Augment(
        rotate_deg=30, tilt_deg=20, shift_px=3, elastic_px=1.5, elastic_grid_px=8
    )
    batches = replace(LUNGS, normalisation="window", input_px=(30, 48, 48))
    for x, y in (training(table, batches, warps)[i] for i in range(3)):
        inner = [ndimage.binary_erosion(part, iterations=2) for part in y[..., 1]]
        in_lungs = np.stack(inner)[..., None]
        # -850 HU in a window of 1300 from -1024 is 0.13; nodules are above 0.8.
        assert np.median(x[in_lungs]) == pytest.approx(0.13, abs=0.03)
        assert np.mean(x[in_lungs] > 0.5) < 0.1


def test_beyond_the_field_of_view_there_is_no_reference(table):
    cut = config.Augment(flip=False, rotate_deg=0, zoom=0, shift_px=0, field_cut=0.4)
    batches = replace(LUNGS, crop="centre", normalisation="window", batch_size=1)
    whole = training(table, batches, None)
    less = 0
    for index in range(5):
        (x, y), (_, plain_y) = training(table, batches, cut)[index], whole[index]
        gone = plain_y[..., 1] > y[..., 1]
        assert (x[gone] == 0).all()
        assert not (y[..., 1] > plain_y[..., 1]).any()
        less += gone.any()
    assert less > 0


def test_the_cache_keeps_what_was_used_last_and_no_more(table):
    one = generator3d.read_table_volume(table, 0, LUNGS).nbytes
    cache = VolumeCache(table, LUNGS, most_bytes=2 * one)
    first = cache.read(0)
    cache.read(1)
    assert cache.read(0) is first
    cache.read(2)  # 1 was used longest ago
    assert list(cache.kept) == [0, 2]
    assert cache.kept_bytes == 2 * one
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(cache.read, [3, 3, 4, 3, 4, 0] * 4))
    assert cache.kept_bytes == sum(v.nbytes for v in cache.kept.values()) <= 2 * one


def test_tiles_cover_the_lungs_and_their_margin(table):
    generator = tiles_of_volumes(table, np.arange(2), LUNGS)
    for scan in range(2):
        covered = np.zeros(table.volume(scan, "lung").shape, bool)
        for index, start in generator.tiles:
            if index == scan:
                inside, _ = boxes.overlap(start, LUNGS.volume_px, covered.shape)
                covered[inside] = True
        inner = table.volume(scan, "lung") > 0
        assert covered[ndimage.binary_dilation(inner, iterations=3)].all()


def test_tiles_are_cuts_and_the_most_are_spread_evenly(table):
    everything = tiles_of_volumes(table, np.arange(2), LUNGS)
    few = tiles_of_volumes(table, np.arange(2), LUNGS, most=4)
    assert len(few.tiles) == 4
    assert {scan for scan, _ in few.tiles} == {0, 1}
    assert len(everything) == -(-len(everything.tiles) // 2)
    (scan, start), (x, y) = few.tiles[3], few[1]
    wanted_x, wanted_y = batching.cut_sample(*few.read(scan), start, LUNGS)
    np.testing.assert_array_equal(x[1, ..., 0], wanted_x)
    np.testing.assert_array_equal(y[1, ..., 1], wanted_y)
    with pytest.raises(IndexError, match="batch 2; expected 0 to 1"):
        few[2]


def test_a_table_without_volumes_is_refused(folder, tmp_path):
    write_table(folder / "scans", tmp_path / "table.h5", config.Table(size_px=(64, 64)))
    with (
        SliceTable(tmp_path / "table.h5") as table,
        pytest.raises(ValueError, match="run table.py again with --table.volume"),
    ):
        training(table)


def test_the_answer_is_not_given_away(table):
    with pytest.raises(ValueError, match="shows the network the answer"):
        training(table, replace(LUNGS, lung_mask=True))


def test_scans_without_lungs_cannot_be_used(folder, tmp_path):
    for index, changes in ((0, {}), (1, {"lung": None})):
        scan = replace(tiny_scan(index), **changes)
        write_scan(scan, tmp_path / "scans" / f"{scan.scan_id}.h5", {})
    settings = config.Table(slices="none", volume_spacing_mm=4.0)
    write_table(tmp_path / "scans", tmp_path / "table.h5", settings)
    with SliceTable(tmp_path / "table.h5") as table:
        assert generator3d.usable_scans(table, np.arange(2), LUNGS).tolist() == [0]
        with pytest.raises(ValueError, match="none of the 1 scans can be used"):
            VolumeGenerator(table, np.array([1]), LUNGS, None, seed=0)


def test_scans_of_a_part_are_those_of_its_patients(table, folder):
    split = read_split(folder / "split.json")
    parts = {part: scans_of_part(split, table, part) for part in PARTS}
    assert sorted(np.concatenate(list(parts.values()))) == list(range(5))
    for part, scans in parts.items():
        patients = set(table.scans["patient_id"][scans].tolist())
        assert patients == set(split["parts"][part])


def test_a_split_by_slice_is_refused(table):
    split = {"settings": {"unit": "slice"}}
    with pytest.raises(ValueError, match="--split.unit patient"):
        scans_of_part(split, table, "train")


def test_the_sheet_shows_three_planes_of_every_crop(table):
    batches = replace(LUNGS, input_px=(12, 20, 16))
    sheet = contact_sheet.volume_sheet(training(table, batches), crops=3, columns=2)
    side = 20 * contact_sheet.SCALE
    height = side + contact_sheet.CAPTION_PX
    assert sheet.shape == (2 * height, 2 * 3 * side, 3)
    assert (sheet == contact_sheet.OUTLINE_BGR).all(-1).any()
    assert not sheet[height:, 3 * side :].any()  # three crops, the fourth is black


def test_planes_stand_head_up():
    volume = np.zeros((4, 6, 6), np.uint8)
    volume[3] = 1  # the head
    axial, coronal, sagittal = contact_sheet.middle_planes(volume)
    assert not axial.any()
    assert coronal[0].all() and not coronal[1:].any()
    assert sagittal[0].all() and not sagittal[1:].any()


def test_pictures_hold_three_planes_of_a_crop_and_its_scan(table):
    batches = replace(LUNGS, input_px=(12, 20, 16), normalisation="window")
    generator = training(table, batches)
    picture = data_generator.make_picture_function(generator)(1)
    x, y = generator[0]
    for found, volume in (
        (picture.image, x[1, ..., 0]),
        (picture.outlined["lung"], y[1, ..., 1]),
    ):
        assert np.array_equal(found[:, :20][:20, :16], volume[6])
        assert np.array_equal(found[:12, 20:36], volume[::-1, 10])
        assert np.array_equal(found[:12, 40:60], volume[::-1, :, 8])
    scan = generator.rows_of_batch(0)[1]
    assert picture.title == f"scan-{scan:03}\naugmented"


def test_run_alone_it_draws_volumes(folder, tmp_path, capsys):
    out = tmp_path / "sheet.png"
    arguments = ["lung3d-3mm", "--table", str(folder / "table.h5")]
    arguments += ["--split", str(folder / "split.json"), "--out", str(out)]
    arguments += ["--batches.input-px", "12", "20", "16"]
    with pytest.raises(SystemExit) as ended:
        data_generator.main([*arguments, "--slices", "2", "--seconds", "0.05"])
    assert ended.value.code == steps.DONE
    assert "3 train scans" in capsys.readouterr().out
    assert cv2.imread(str(out)) is not None


def test_a_mask_of_a_volume_sets_all_else_to_air():
    hu = np.full((3, 4, 5), 100)
    lung = np.zeros(hu.shape, np.uint8)
    lung[1, 2, 3] = 2
    batches = config.Batches(window_hu=(0.0, 200.0), lung_mask=True)
    image = inputs.to_input(hu, lung, batches)
    assert image[1, 2, 3] == pytest.approx(0.5)
    assert image.sum() == pytest.approx(0.5)


def test_changes_of_volumes_are_refused_for_slices():
    with pytest.raises(ValueError, match=r"augment.blur_px is 1.0; expected 0"):
        config.Experiment(augment=config.Augment(blur_px=1.0))


def test_a_network_of_the_other_kind_is_refused():
    with pytest.raises(ValueError, match="with unet3d"):
        config.Experiment(batches=LUNGS)


def test_every_change_of_volumes_is_off_by_default():
    changes = config.Augment()
    assert not any(getattr(changes, name) for name in config.VOLUME_CHANGES)


def test_lesions_change_hu_and_nothing_else(table):
    still = config.Augment(flip=False, rotate_deg=0, zoom=0, shift_px=0)
    whole = replace(LUNGS, input_px=(30, 48, 48), crop="centre", batch_size=5)
    plain, ill = (
        training(
            table, whole, still, pathology=config.Lesions(probability=p, kind="circles")
        )[0]
        for p in (0.0, 1.0)
    )
    assert np.array_equal(plain[1], ill[1])
    changed = (plain[0] != ill[0])[..., 0].any(axis=(1, 2, 3))
    assert changed.all()


def test_lesions_are_refused_where_nodules_are_the_target(table):
    with pytest.raises(ValueError, match=r"batches\.target=\s*nodule"):
        training(table, NODULES, pathology=config.Lesions(probability=1.0))


@pytest.mark.parametrize("target", ["lung", "nodule"])
def test_nodules_are_not_shaped_after_patients_who_are_not_trained_on(table, target):
    nodules = config.Lesions(probability=1.0, findings=("nodule",))
    batches = replace(NODULES if target == "nodule" else LUNGS, batch_size=5)
    some = VolumeGenerator(
        table, np.array([0, 2, 3]), batches, CHANGES, seed=7, pathology=nodules
    )
    names = table.scans["patient_id"]
    assert some.held_out == {names[1], names[4]}
    everyone = training(table, batches, pathology=nodules)
    assert everyone.held_out == frozenset()
    everyone.held_out = frozenset(shapes.shape_index()[1])
    with pytest.raises(ValueError, match="patients who are held out"):
        everyone[0]


def test_samples_into_which_no_nodule_is_drawn_are_as_without(table):
    # So what surrounds a crop stays, however far it is turned and mirrored.
    rare = config.Lesions(probability=1e-9, findings=("nodule",))
    changes = replace(CHANGES, rotate_deg=90)
    for index in range(4):
        plain, same = (
            training(table, NODULES, changes, pathology=settings, steps_per_epoch=4)[
                index
            ]
            for settings in (None, rare)
        )
        np.testing.assert_array_equal(plain[0], same[0])
        np.testing.assert_array_equal(plain[1], same[1])


def test_nodules_are_drawn_where_a_turned_and_mirrored_sample_looks(table):
    pathology = config.Lesions(probability=1.0, findings=("nodule",))
    changes = replace(CHANGES, rotate_deg=90, field_cut=0.0)
    wide = replace(NODULES, input_px=(24, 32, 32), batch_size=5)
    counts = [
        training(table, wide, changes, pathology=settings, steps_per_epoch=4)[index][1][
            ..., 1
        ].sum(axis=(1, 2, 3))
        for settings in (None, pathology)
        for index in range(4)
    ]
    before, after = np.concatenate(counts[:4]), np.concatenate(counts[4:])
    assert (after >= before).all()
    assert np.mean(after > before) > 0.8


def test_nodules_drawn_into_volumes_are_in_the_reference(table):
    still = config.Augment(flip=False, rotate_deg=0, zoom=0, shift_px=0)
    near = replace(NODULES, input_px=(24, 32, 32), batch_size=5, nodule_fraction=0.0)
    pathology = config.Lesions(probability=1.0, findings=("nodule",))
    plain, drawn = (
        training(table, near, still, pathology=settings)[0]
        for settings in (None, pathology)
    )
    added = drawn[1][..., 1] > plain[1][..., 1]
    assert added.any()
    # What was there stays, and where nodules were added the image is brighter.
    assert not (drawn[1][..., 1] < plain[1][..., 1]).any()
    change = drawn[0][..., 0] - plain[0][..., 0]
    assert change[added].mean() > 0.1
    near = ndimage.binary_dilation(drawn[1][..., 1], np.ones((1, 3, 5, 5)))
    # Their border is soft, so that a few voxels lie farther.
    assert np.count_nonzero(change[~near]) < 0.02 * np.count_nonzero(added)


CANDIDATES = replace(NODULES, input_px=(16, 16, 16), crop="candidate", batch_size=8)
STILL = config.Augment(flip=False, rotate_deg=0, zoom=0, shift_px=0)


def test_candidates_are_nodules_or_as_dense_and_lie_in_the_middle(table):
    generator = training(
        table, CANDIDATES, STILL, with_slice_label=True, steps_per_epoch=6
    )
    labels = []
    for index in range(6):
        _, y = generator[index]
        middle = y["mask"][:, 5:11, 5:11, 5:11, 1]
        np.testing.assert_array_equal(
            y["slice"][:, 0], middle.max(axis=(1, 2, 3)).astype(np.float32)
        )
        rows = generator.rows_of_batch(index)
        np.testing.assert_array_equal(rows, np.repeat(rows[::4], 4))
        labels += y["slice"][:, 0].tolist()
    assert 0.3 < np.mean(labels) < 0.9
    only = training(table, replace(CANDIDATES, nodule_fraction=1.0), STILL)
    assert only[0][1][..., 1].any(axis=(1, 2, 3)).all()


def test_other_candidates_are_dense_voxels_of_the_lungs(table):
    none = replace(CANDIDATES, nodule_fraction=0.0)
    generator = training(table, none, STILL)
    for seed, row in enumerate(generator.scans.tolist()):
        volume = generator.cache.read(row)
        assert all(len(kind) for kind in volume.others)
        crop = generator.crop(volume, np.random.default_rng(seed))
        place = tuple(s + round(p) for s, p in zip(crop.start, crop.pin, strict=True))
        near = boxes.near(place, [1] * 3, [1] * 3, boxes.full_box(volume.hu.shape))
        inside = (volume.marks[near] & augment2d.LUNG_BIT) > 0
        assert (inside & (volume.hu[near] >= generator3d.DENSE_HU)).any()


def test_voxels_at_places_are_the_nearest_and_places_beyond_are_refused():
    grid = Grid((2, 3, 4), np.eye(4)[[2, 1, 0, 3]])
    # Index (z, y, x) lies at RAS (x, y, z); LPS turns x and y over.
    places = np.array([[-3.0, -2.0, 1.0], [-0.6, 0.4, 0.4]])
    assert generator3d.voxels_at(places, grid).tolist() == [[1, 2, 3], [0, 0, 1]]
    with pytest.raises(ValueError, match=r"1 of 3 points .* the first at \(-4.0, 0.0"):
        generator3d.voxels_at(np.vstack([places, [-4.0, 0, 0]]), grid)


def test_candidates_with_a_nodule_in_their_middle_are_no_negatives():
    marks = np.zeros((9, 9, 30), np.uint8)
    marks[4, 4, 12] = augment2d.TARGET_BIT
    marks[4, 4, 4] = augment2d.LUNG_BIT
    places = np.array([[4, 4, x] for x in range(2, 30, 3)])
    found = np.unravel_index(generator3d.hard_negatives(places, marks), marks.shape)
    assert found[2].tolist() == [2, 5, 8, 17, 20, 23, 26, 29]
    assert generator3d.hard_negatives(np.zeros((0, 3), int), marks).shape == (0,)


def test_a_third_of_what_is_no_nodule_is_laid_around_candidates(table):
    none = replace(CANDIDATES, nodule_fraction=0.0)
    scan_id = str(table.scans["scan_id"][0])
    volume = VolumeCache(table, none).read(0)
    shape = volume.hu.shape
    grid = table.volume_grid(0)
    assert grid.shape == shape
    place = next(
        tuple(at)
        for at in np.argwhere((volume.marks & augment2d.LUNG_BIT) > 0).tolist()
        if len(generator3d.hard_negatives(np.array([at]), volume.marks))
    )
    x, y, z = grid.index_to_ras_mm(np.array(place))
    generator = training(
        table, none, STILL, candidates={scan_id: np.array([[-x, -y, z]])}
    )
    volume = generator.cache.read(0)
    assert volume.others[-1].tolist() == [np.ravel_multi_index(place, shape)]
    expected = boxes.crop_on(place, none.volume_px).start
    starts = [
        generator.crop(volume, np.random.default_rng(seed)).start for seed in range(300)
    ]
    assert 70 < starts.count(expected) < 130
    assert len(generator.cache.read(1).others) == 2  # nothing is known of the others


def test_nodules_drawn_for_candidates_lie_in_the_middle_where_none_is(table):
    pathology = config.Lesions(probability=1.0, findings=("nodule",))
    for fraction in (0.0, 1.0):
        batches = replace(CANDIDATES, nodule_fraction=fraction)
        plain, drawn = (
            training(table, batches, STILL, pathology=settings, with_slice_label=True)
            for settings in (None, pathology)
        )
        assert len(plain) == -(-len(plain.scans) * 4 // 8)
        for index in range(len(plain)):
            (x, before), (same, after) = plain[index], drawn[index]
            known = before["slice"][:, 0] > 0
            # What is a nodule stays as it is; of the others most become one.
            np.testing.assert_array_equal(x[known], same[known])
            assert (
                after["slice"][~known].mean() > 0.6 if (~known).any() else known.all()
            )


def test_candidates_validate_the_same_in_each_epoch_on_scans_spread_over_all(table):
    scans = np.arange(5)
    generator = generator3d.validation_of_volumes(
        table, scans, CANDIDATES, most=16, with_slice_label=True
    )
    assert len(generator) == 2
    first = generator[1]
    generator.on_epoch_end()
    np.testing.assert_array_equal(generator[1][0], first[0])
    assert generator.order_of_epoch(0)[::4].tolist() == [0, 1, 2, 3]
    every = generator3d.validation_of_volumes(table, scans, CANDIDATES)
    assert every.order_of_epoch(0).tolist() == np.repeat(scans, 4).tolist()
    few = generator3d.validation_of_volumes(
        table, scans, replace(CANDIDATES, batch_size=4), most=8
    )
    assert few.order_of_epoch(0).tolist() == [0] * 4 + [2] * 4


def test_candidates_of_slices_are_refused():
    with pytest.raises(ValueError, match="crop is candidate"):
        config.Batches(crop="candidate")


def test_crops_are_laid_around_parts_of_four_voxels_or_more():
    mask = np.zeros((6, 8, 8), bool)
    mask[1, 1, 1:4] = True  # three voxels
    mask[3, 4:6, 4:6] = True  # four
    mask[5, 7, 7] = True
    assert generator3d.nodule_boxes(mask) == ((slice(3, 4), slice(4, 6), slice(4, 6)),)


def test_scans_are_drawn_alike_or_by_the_share_of_real_ones():
    scans = np.array([4, 5, 6, 7, 9])
    phantoms = np.array([True, True, False, True, True])

    def counts(fraction, kinds=phantoms):
        drawn = generator3d.draw_scans(scans, kinds, 22, fraction, (0,))
        again = generator3d.draw_scans(scans, kinds, 22, fraction, (0,))
        assert drawn.tolist() == again.tolist()
        return dict(zip(*np.unique(drawn, return_counts=True), strict=True))

    assert sorted(counts(0.0).values()) == [4, 4, 4, 5, 5]
    assert counts(0.5)[6] == 11
    assert sorted(counts(0.5).values()) == [2, 3, 3, 3, 11]
    assert counts(0.5, np.ones(5, bool)) == counts(0.0)


def test_a_generator_tells_phantoms_from_patients(tmp_path):
    for index, patient in enumerate(("PHANTOM-0001", "PHANTOM-0002", "A")):
        scan = replace(tiny_scan(index), patient_id=patient)
        write_scan(scan, tmp_path / "scans" / f"{scan.scan_id}.h5", {})
    settings = config.Table(slices="none", volume_spacing_mm=SPACING_MM)
    write_table(tmp_path / "scans", tmp_path / "table.h5", settings)
    with SliceTable(tmp_path / "table.h5") as table:
        mixed = training(table, replace(LUNGS, real_fraction=0.75), steps_per_epoch=4)
        real = int(np.flatnonzero(table.scans["patient_id"] == "A")[0])
        assert mixed.order_of_epoch(0).tolist().count(real) == 6
        assert mixed.order_of_epoch(0).tolist() != mixed.order_of_epoch(1).tolist()


@pytest.mark.parametrize("size, share", [((8, 8, 8), 1.0), ((8, 8), 0.5)])
def test_the_share_of_real_scans_is_checked(size, share):
    with pytest.raises(ValueError, match="real_fraction"):
        config.Batches(input_px=size, real_fraction=share)
