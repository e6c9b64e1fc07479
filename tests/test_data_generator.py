import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
from matplotlib import pyplot
from matplotlib.backend_bases import KeyEvent

import config
import data_generator
import slice_idx
from ct import boxes, inputs
from ct.scan import consensus, readers_of_label, write_scan
from data_generator import as_pydataset
from dataset import contact_sheet, generator2d
from dataset.generator2d import SliceGenerator, draw_rows
from dataset.slice_table import SliceTable
from nodules import shapes
from table import write_table
from tests.conftest import tiny_scan
from viewers.slice_window import SliceWindow

ROOT = Path(__file__).resolve().parent.parent
BATCHES = config.Batches(input_px=(48, 48), batch_size=4)
CHANGES = config.Augment(elastic_px=1.5, elastic_grid_px=16, gamma=0.2, noise_hu=20)
SETTINGS = config.Table(size_px=(64, 64), slices="lung")


def made_scan(index):
    """The scans of the table; in the last, the lung mask leaves the nodules out."""
    scan = tiny_scan(index)
    if index < 4:
        return scan
    return replace(scan, lung=np.where(scan.nodule_labels, 0, scan.lung))


@pytest.fixture(scope="module")
def table_path(tmp_path_factory):
    """Five tiny scans; 18 slices of each have lung, some of them nodules."""
    folder = tmp_path_factory.mktemp("table")
    for index in range(5):
        scan = made_scan(index)
        write_scan(scan, folder / "scans" / f"{scan.scan_id}.h5", {})
    write_table(folder / "scans", folder / "table.h5", SETTINGS)
    return folder / "table.h5"


@pytest.fixture
def table(table_path):
    with SliceTable(table_path) as opened:
        yield opened


def all_rows(table):
    return np.arange(len(table))


def training(table, batches=BATCHES, augmentation=CHANGES, **options):
    return SliceGenerator(
        table, all_rows(table), batches, augmentation, **{"seed": 7, **options}
    )


def plain(table, batches=BATCHES, **options):
    options = {"shuffle": False, "balanced": False, **options}
    return training(table, batches, None, **options)


def consensus_of_row(table, row):
    """The consensus mask of a row, straight from the scan it was made of."""
    entry = table.rows[row]
    scan = made_scan(int(entry["scan"]))
    mask = consensus(
        scan.reader_bits,
        scan.nodule_labels,
        readers_of_label(scan.nodules),
        level=BATCHES.consensus_level,
    )
    return scan, int(entry["z"]), mask[entry["z"]]


def test_without_augmentation_a_batch_is_the_plain_crop(table):
    generator = plain(table, replace(BATCHES, batch_size=90))
    x, y = generator[0]
    assert (x.dtype, y.dtype) == (np.float32, np.uint8)
    for row, image, one_hot in zip(generator.rows_of_batch(0), x, y, strict=True):
        scan, z, mask = consensus_of_row(table, row)
        # 48 of 64 pixels about the centre; window -1000..400; 0 outside the lungs.
        hu, lung = (v[z, 8:56, 8:56] for v in (scan.hu, scan.lung))
        expected = np.clip((hu.astype(np.float32) + 1000) / 1400, 0, 1) * (lung > 0)
        assert np.allclose(image[..., 0], expected, atol=1e-6)
        assert np.array_equal(one_hot[..., 1], mask[8:56, 8:56])


def test_background_and_target_sum_to_one(table):
    _, y = training(table)[0]
    assert (y.sum(axis=-1) == 1).all()


def test_every_row_comes_once_in_an_unbalanced_epoch(table):
    generator = training(table, balanced=False)
    rows = np.concatenate([generator.rows_of_batch(i) for i in range(len(generator))])
    assert not np.array_equal(rows, all_rows(table))
    assert np.array_equal(np.sort(rows), all_rows(table))
    assert len(generator) == -(-len(table) // 4)
    assert len(generator[len(generator) - 1][0]) == len(table) - 4 * (
        len(generator) - 1
    )


def test_each_epoch_and_seed_has_its_own_order(table):
    generator, other = (
        training(table, balanced=False),
        training(table, balanced=False, seed=8),
    )
    orders = {tuple(generator.order_of_epoch(epoch)) for epoch in range(3)}
    orders.add(tuple(other.order_of_epoch(0)))
    assert len(orders) == 4


def test_iterating_ends_after_the_last_batch(table):
    generator = plain(table)
    assert sum(len(x) for x, _ in generator) == len(table)
    with pytest.raises(IndexError, match="batch -1; expected 0 to"):
        generator[-1]


@pytest.mark.parametrize(
    ("fraction", "expected"),
    [(0.01, 1), (0.5, 2), (0.75, 3), (1.0, 4)],
)
def test_batches_hold_the_share_of_nodule_slices_that_is_set(table, fraction, expected):
    generator = training(table, replace(BATCHES, nodule_fraction=fraction))
    for index in range(len(generator)):
        rows = generator.rows_of_batch(index)
        masks = [consensus_of_row(table, row)[2] for row in rows]
        assert sum(mask.any() for mask in masks) == expected


def test_every_balanced_batch_has_target_pixels(table):
    for crop in ("lung", "nodule"):
        generator = training(table, replace(BATCHES, crop=crop, nodule_fraction=0.01))
        assert all(y[..., 1].any() for _, y in generator)


def test_scarce_rows_are_repeated_evenly():
    rows = np.array([3, 5, 9])
    got = draw_rows(rows, 8, np.random.default_rng(0))
    assert sorted(np.unique(got, return_counts=True)[1]) == [2, 3, 3]
    assert draw_rows(rows, 5, None).tolist() == [3, 5, 9, 3, 5]
    assert draw_rows(np.arange(10), 5, None).tolist() == [0, 2, 4, 6, 8]


def test_slices_with_too_few_readers_are_negatives(table):
    batches = replace(BATCHES, min_readers=3)
    has_target = generator2d.rows_with_target(table, all_rows(table), batches)
    # Nodule 1 (four readers, slices 8 to 12) counts; nodule 2 (two, 13 to 15) does not.
    assert set(table.rows["z"][has_target]) == set(range(8, 13))
    assert has_target.sum() == 5 * 5
    assert np.count_nonzero(table.rows["nodule_px"]) == 5 * 8


@pytest.mark.parametrize("crop", ["centre", "lung", "nodule"])
def test_a_batch_depends_on_seed_epoch_and_index_alone(table, crop):
    batches = replace(BATCHES, crop=crop)
    one, other = training(table, batches), training(table, batches)
    one.epoch = other.epoch = 2
    in_order = [one[index] for index in range(len(one))]
    numbers = np.random.default_rng(0).permutation(len(other))
    with ThreadPoolExecutor(4) as pool:
        by_threads = dict(
            zip(numbers, pool.map(other.__getitem__, numbers), strict=True)
        )
    for index, (x, y) in enumerate(in_order):
        assert np.array_equal(by_threads[index][0], x)
        assert np.array_equal(by_threads[index][1], y)


@pytest.mark.parametrize("change", ["seed", "epoch", "index"])
def test_another_seed_epoch_or_index_gives_other_changes(table, change):
    batches = replace(BATCHES, nodule_fraction=0)
    rows = np.zeros(8, int)  # one row only, so that only the changes can differ
    first = SliceGenerator(table, rows, batches, CHANGES, seed=1)
    other = SliceGenerator(
        table, rows, batches, CHANGES, seed=2 if change == "seed" else 1
    )
    other.epoch = 1 if change == "epoch" else 0
    x, _ = other[1 if change == "index" else 0]
    assert not np.allclose(first[0][0], x)


def test_the_same_row_is_changed_otherwise_within_a_batch(table):
    batches = replace(BATCHES, nodule_fraction=0)
    x, _ = SliceGenerator(table, np.zeros(4, int), batches, CHANGES, seed=1)[0]
    assert len(np.unique(x.sum(axis=(1, 2, 3)))) == 4


def test_validation_is_the_same_in_every_epoch(table):
    generator = plain(table, replace(BATCHES, crop="nodule"))
    before = generator[2]
    generator.on_epoch_end()
    assert np.array_equal(generator[2][0], before[0])
    assert np.array_equal(generator.rows_of_batch(2), [8, 9, 10, 11])


def test_balanced_validation_has_a_fixed_order(table):
    generator = plain(table, balanced=True)
    rows = [generator.rows_of_batch(i).tolist() for i in range(len(generator))]
    generator.on_epoch_end()
    assert rows == [generator.rows_of_batch(i).tolist() for i in range(len(generator))]
    assert all(y[..., 1].any(axis=(1, 2)).sum() == 2 for _, y in generator)


def test_reference_and_image_are_changed_alike(table):
    # All readers together drew just the bright core: 20 HU (0.73 of the window) in lung of
    # -850 HU (0.11); five pixels further on there is still lung.
    batches = replace(
        BATCHES,
        crop="nodule",
        lung_mask=False,
        nodule_fraction=1.0,
        consensus_level=1.0,
    )
    changes = config.Augment(rotate_deg=90, zoom=0.2, elastic_px=2, elastic_grid_px=16)
    both = either = 0
    for x, y in training(table, batches, changes):
        for image, reference in zip(x[..., 0], y[..., 1], strict=True):
            near = cv2.dilate(reference, np.ones((7, 7), np.uint8)) > 0
            bright = (image > 0.42) & near
            both += 2 * np.count_nonzero(bright & (reference > 0))
            either += np.count_nonzero(bright) + np.count_nonzero(reference)
    assert both / either > 0.93


def test_the_slice_label_says_whether_the_crop_holds_target(table):
    generator = training(table, with_slice_label=True)
    for _, y in generator:
        assert y["slice"].shape == (4, 1)
        assert np.array_equal(y["slice"][:, 0], y["mask"][..., 1].max(axis=(1, 2)))


def test_lungs_can_be_the_target(table):
    batches = replace(BATCHES, target="lung", lung_mask=False)
    generator = plain(table, batches)
    _, y = generator[0]
    for row, one_hot in zip(generator.rows_of_batch(0), y, strict=True):
        lung = made_scan(int(table.rows["scan"][row])).lung[table.rows["z"][row]]
        assert np.array_equal(one_hot[..., 1], lung[8:56, 8:56] > 0)


def test_samples_have_pixels_of_the_size_that_is_set(table):
    batches = replace(
        BATCHES, target="lung", lung_mask=False, crop="centre", nodule_fraction=0.0
    )
    own_mm = float(table.scans["spacing_mm"][0][1])
    coarse = replace(batches, pixel_mm=2 * own_mm, input_px=(16, 16))
    size = table.settings.size_px
    hu, mask, lung = generator2d.read_row(table, 0, coarse)
    assert hu.shape == mask.shape == tuple(n // 2 for n in size)
    fine = table.read("hu", 0).astype(float)
    means = fine.reshape(size[0] // 2, 2, size[1] // 2, 2).mean((1, 3))
    assert np.abs(hu - means).max() <= 0.5
    share = (table.read("lung", 0) > 0).reshape(len(means), 2, -1, 2).mean((1, 3))
    assert np.array_equal(mask > 0, share >= 0.5)
    made = SliceGenerator(table, all_rows(table), coarse, None, seed=0, balanced=False)
    assert made.spacing_mm(0) == [2 * own_mm, 2 * own_mm]
    # Tiles that look for the lungs look for them in these pixels.
    sought = replace(coarse, crop="lung", input_px=(32, 32))
    tiles = generator2d.tiles_of_slices(table, all_rows(table)[:1], sought)
    ((_, start),) = tiles.tiles
    assert start == inputs.tiles(lung, hu.shape, (32, 32))[0].start


def test_pixels_of_another_size_are_for_lungs_in_slices():
    with pytest.raises(ValueError, match="pixel_mm is 2.0"):
        replace(BATCHES, target="nodule", pixel_mm=2.0)


def test_masking_the_input_by_the_target_is_refused(table):
    with pytest.raises(ValueError, match=r"shows the network the answer.*no-lung-mask"):
        training(table, replace(BATCHES, target="lung", lung_mask=True))


def test_scans_that_no_reader_saw_are_left_out(tmp_path, caplog):
    write_scan(tiny_scan(0), tmp_path / "scans/scan-000.h5", {})
    write_scan(tiny_scan(1).unread(), tmp_path / "scans/scan-001.h5", {})
    write_table(tmp_path / "scans", tmp_path / "table.h5", SETTINGS)
    with SliceTable(tmp_path / "table.h5") as table:
        generator = training(table)
        assert set(table.rows["scan"][generator.rows]) == {0}
        assert "18 rows left out: no readers' outlines" in caplog.text
        with pytest.raises(ValueError, match=r"none of the 18 rows.*readers' outlines"):
            SliceGenerator(
                table, np.flatnonzero(table.rows["scan"] == 1), BATCHES, None, seed=0
            )


@pytest.mark.parametrize("workers", [1, 3])
def test_keras_trains_on_the_batches_of_each_epoch(table, workers):
    import keras

    seen = []

    class Watched(keras.Model):
        def train_step(self, data):
            seen.append(np.array(data[0]))
            return super().train_step(data)

    image = keras.Input((48, 48, 1))
    model = Watched(image, keras.layers.Conv2D(2, 1, activation="softmax")(image))
    model.compile("sgd", "categorical_crossentropy", run_eagerly=True)
    generator = training(table, steps_per_epoch=5)
    model.fit(
        as_pydataset(generator, workers=workers, max_queue_size=4),
        validation_data=as_pydataset(plain(table), workers=workers),
        initial_epoch=1,
        epochs=1,
        shuffle=False,
        verbose=0,
    )
    assert not seen  # nothing to do; Keras still resets its iterator
    generator.epoch = 1
    model.fit(
        as_pydataset(generator, workers=workers, max_queue_size=4),
        validation_data=as_pydataset(plain(table), workers=workers),
        initial_epoch=1,
        epochs=4,
        shuffle=False,
        verbose=0,
    )
    assert generator.epoch == 4
    again = training(table, steps_per_epoch=5)
    expected = []
    for epoch in (1, 2, 3):
        again.epoch = epoch
        expected.extend(x for x, _ in again)
    assert len(seen) == len(expected)
    for got, wanted in zip(seen, expected, strict=True):
        assert np.array_equal(got, wanted)


def test_a_contact_sheet_outlines_the_reference(table):
    generator = plain(table, replace(BATCHES, batch_size=6))
    picture = contact_sheet.contact_sheet(generator, slices=12, columns=4)
    height, width = 2 * 48 + contact_sheet.CAPTION_PX, 2 * 48
    assert picture.shape == (3 * height, 4 * width, 3)
    green = (picture == contact_sheet.OUTLINE_BGR).all(axis=-1)
    for number in range(12):
        top, left = number // 4 * height, number % 4 * width
        _, y = generator[number // 6]
        mask = y[number % 6, ..., 1]
        outline = green[top : top + 96, left : left + 96]
        large = cv2.resize(mask, (96, 96), interpolation=cv2.INTER_NEAREST) > 0
        assert not (outline & large).any()
        grown = cv2.dilate(large.astype(np.uint8), np.ones((3, 3), np.uint8)) > 0
        assert np.array_equal(outline, grown & ~large)


def test_the_step_writes_a_sheet_and_says_its_speed(table_path, tmp_path):
    split = tmp_path / "split.json"
    slice_idx.write_split(table_path, split, config.Split())
    command = [sys.executable, "data_generator.py", "smoke", "--table", table_path]
    command += ["--split", split, "--out", tmp_path / "sheet.png", "--seconds", "0.2"]
    command += ["--batches.input_px", "48", "48", "--slices", "6"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "sheet.png: " in done.stdout
    assert "slices/s" in done.stdout
    assert cv2.imread(os.fspath(tmp_path / "sheet.png")).shape[1] == 6 * 96


def test_a_missing_table_is_named(tmp_path, table_path):
    split = tmp_path / "split.json"
    slice_idx.write_split(table_path, split, config.Split())
    command = [sys.executable, "data_generator.py", "smoke", "--split", split]
    command += ["--table", tmp_path / "none.h5"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    assert "none.h5" in done.stderr
    assert "run table.py first" in done.stderr


def test_intensity_changes_leave_the_outside_of_the_lungs_alone(table):
    changes = config.Augment(flip=False, rotate_deg=0, zoom=0, shift_px=0, noise_hu=80)
    generator = training(table, augmentation=changes, balanced=False)
    x, _ = generator[0]
    for row, image in zip(generator.rows_of_batch(0), x[..., 0], strict=True):
        lung = table.read("lung", int(row))[8:56, 8:56] > 0
        assert not image[~lung].any()
        inside = image[lung]
        hu = table.read("hu", int(row))[8:56, 8:56]
        difference = inside - np.clip((hu[lung] + 1000.0) / 1400, 0, 1)
        assert 0 < difference.std() < 80 / 1400


def test_tiles_show_all_lungs_of_the_rows_without_asking_for_nodules(table):
    rows = np.arange(len(table))
    batches = replace(BATCHES, input_px=(32, 32), batch_size=5)
    generator = generator2d.tiles_of_slices(table, rows, batches)
    seen = {
        int(row): np.zeros(table.settings.size_px, bool) for row, _ in generator.tiles
    }
    x_sum, count = 0.0, 0
    for index in range(len(generator)):
        x, y = generator[index]
        assert x.shape == (len(x), 32, 32, 1) and y.shape == (len(x), 32, 32, 2)
        assert (y.sum(axis=-1) == 1).all()
        x_sum, count = x_sum + x.sum(), count + len(x)
    assert count == len(generator.tiles)
    assert x_sum > 0
    for row, start in generator.tiles:
        inside, _ = boxes.overlap(start, (32, 32), table.settings.size_px)
        seen[row][inside] = True
    for row in rows:
        lung = table.read("lung", int(row)) > 0
        assert not lung.any() or seen[int(row)][lung].all()


def test_fewer_tiles_are_spread_over_all_rows(table):
    rows = np.arange(len(table))
    batches = replace(BATCHES, input_px=(32, 32))
    every = generator2d.tiles_of_slices(table, rows, batches).tiles
    some = generator2d.tiles_of_slices(table, rows, batches, most=7).tiles
    assert len(some) == 7
    assert some == [every[i * len(every) // 7] for i in range(7)]


LUNGS = replace(BATCHES, target="lung", lung_mask=False, nodule_fraction=0.0)


def test_lesions_change_images_and_neither_masks_nor_other_draws(table):
    sick = config.Lesions(probability=0.5)
    plain, lesioned = (
        training(table, LUNGS, pathology=pathology) for pathology in (None, sick)
    )
    changed = []
    for index in range(len(plain)):
        (x, y), (x_sick, y_sick) = plain[index], lesioned[index]
        np.testing.assert_array_equal(y, y_sick)
        changed += [not np.array_equal(a, b) for a, b in zip(x, x_sick, strict=True)]
    # 90 samples: 45 expected, and room for four standard deviations.
    assert 26 <= sum(changed) <= 64


def test_lesions_depend_on_seed_epoch_and_index_alone(table):
    sick = config.Lesions(probability=1.0)
    one, other = (training(table, LUNGS, pathology=sick) for _ in range(2))
    other[0]
    np.testing.assert_array_equal(one[3][0], other[3][0])
    before = one[3][0]
    one.on_epoch_end()
    assert not np.array_equal(before, one[3][0])


def test_nodules_are_not_shaped_after_patients_who_are_not_trained_on(table):
    nodules = config.Lesions(probability=1.0, findings=("nodule",))
    rows = np.flatnonzero(table.rows["scan"] != 1)
    some = SliceGenerator(table, rows, LUNGS, CHANGES, seed=7, pathology=nodules)
    assert some.held_out == {table.scans["patient_id"][1]}
    everyone = training(table, LUNGS, pathology=nodules)
    assert everyone.held_out == frozenset()
    everyone.held_out = frozenset(shapes.shape_index()[1])
    with pytest.raises(ValueError, match="patients who are held out"):
        everyone[0]


def test_samples_that_are_not_augmented_have_no_lesions(table):
    sick = config.Lesions(probability=1.0)
    healthy, same = (plain(table, LUNGS, pathology=p) for p in (None, sick))
    np.testing.assert_array_equal(healthy[0][0], same[0][0])


def test_lesions_are_refused_where_nodules_are_the_target(table):
    with pytest.raises(ValueError, match="--lesions.probability 0"):
        training(table, BATCHES, pathology=config.Lesions(probability=0.8))


def test_pictures_show_samples_their_reference_and_where_they_are_from(table):
    batches = replace(BATCHES, normalisation="zscore")
    generator = training(table, batches)
    picture = data_generator.make_picture_function(generator)(
        6
    )  # the third of the second batch of 4
    x, y = training(table, replace(BATCHES, normalisation="window"))[1]
    assert np.array_equal(picture.image, x[2, ..., 0])
    assert np.array_equal(picture.outlined["nodule"], y[2, ..., 1])
    row = table.rows[generator.rows_of_batch(1)[2]]
    assert picture.title == f"scan-{row['scan']:03}\nz {row['z']}, augmented"


def test_the_window_leads_through_an_epoch_with_and_without_changes(table):
    pyplot.switch_backend("Agg")
    generator = training(table, balanced=False)
    count, views = data_generator.make_views(generator)
    assert count == len(table)
    window = SliceWindow(count, views)
    canvas = window.figure.canvas
    for key, words in (("end", "augmented"), ("a", "plain"), ("a", "augmented")):
        canvas.callbacks.process("key_press_event", KeyEvent("key", canvas, key))
        entry = table.rows[generator.order_of_epoch(0)[-1]]
        title = f"scan-{entry['scan']:03}\nz {entry['z']}, {words}"
        assert window.axes.get_title() == title
    pyplot.close(window.figure)


def test_plain_samples_have_one_view(table):
    (view,) = data_generator.make_views(plain(table))[1]
    assert view(0).title == "scan-000\nz 3, plain"


def middle_crop(image):
    return image[8:56, 8:56]


STILL = config.Augment(flip=False, rotate_deg=0, zoom=0, shift_px=0)


def of_readers(table, reference, **options):
    """Training samples without any change but what readers drew."""
    batches = replace(BATCHES, reference=reference, lung_mask=False)
    return training(table, batches, STILL, balanced=False, **options)


def test_votes_are_the_share_of_a_nodules_own_readers(table):
    generator = of_readers(table, "votes")
    found = set()
    for index in range(len(generator)):
        _, y = generator[index]
        assert y.dtype == np.float32
        assert np.allclose(y.sum(axis=-1), 1)
        for row, shares in zip(generator.rows_of_batch(index), y[..., 1], strict=True):
            scan, z, _ = consensus_of_row(table, row)
            votes = np.bitwise_count(scan.reader_bits[z]).astype(np.float32)
            # Nodule 1 has four readers, nodule 2 has two.
            votes /= np.array([1, 4, 2])[scan.nodule_labels[z]]
            assert np.allclose(shares, middle_crop(votes), atol=1e-6)
            found |= set(np.unique(shares.round(2)))
    assert {0.0, 0.25, 0.5, 0.75, 1.0} <= found


def test_one_reader_is_one_of_those_of_the_nodule_and_all_of_them_come(table):
    drawn_by = set()
    for epoch in range(6):
        generator = of_readers(table, "reader")
        generator.epoch = epoch
        for index in range(len(generator)):
            _, y = generator[index]
            assert y.dtype == np.uint8
            rows = generator.rows_of_batch(index)
            for row, mask in zip(rows, y[..., 1], strict=True):
                scan, z, _ = consensus_of_row(table, row)
                own = middle_crop(scan.nodule_labels[z] == 1)
                bits = middle_crop(scan.reader_bits[z])
                if (bits[own] == 15).all():
                    continue
                same = [r for r in range(4) if (mask[own] == bits[own] >> r & 1).all()]
                assert same
                drawn_by |= set(same) if len(same) == 1 else set()
    assert drawn_by == {0, 1, 2, 3}


def test_validation_looks_at_the_consensus_whatever_is_trained_on(table):
    rows = all_rows(table)[:6]
    batches = replace(BATCHES, reference="votes", lung_mask=False)
    expected = plain(table, replace(BATCHES, lung_mask=False))
    whole = generator2d.validation_of_slices(table, rows, batches)
    assert whole[0][1].dtype == np.uint8
    seeded = replace(batches, crop="seed")
    middles = generator2d.validation_of_slices(table, rows, seeded)
    assert len(middles) == 2
    assert np.array_equal(middles[0][1], expected[0][1])
    few = generator2d.validation_of_slices(table, rows, seeded, most=3)
    assert few.rows_of_batch(0).tolist() == rows[::2].tolist()


def test_relative_input_is_the_same_for_any_scale(table):
    batches = replace(BATCHES, normalisation="relative", lung_mask=False)
    x, _ = plain(table, batches)[0]
    assert np.allclose(x.mean(axis=(1, 2)), 0, atol=1e-4)
    assert np.allclose(x.std(axis=(1, 2)), 1, atol=1e-3)
    hu = table.read("hu", 0)
    one = inputs.to_input(hu, None, batches)
    assert np.allclose(inputs.to_input(hu * 3.0 + 7, None, batches), one, atol=1e-5)
    assert inputs.padding_value(hu, batches) == hu.min()
    flat = inputs.to_input(np.full((4, 4), 9.0), None, batches)
    assert not flat.any()


@pytest.mark.parametrize(
    "change",
    [
        {"crop": "seed", "lung_mask": True},
        {"crop": "seed", "lung_mask": False, "input_px": (32, 48)},
        {"crop": "seed", "lung_mask": False, "target": "lung"},
        {"reference": "votes", "target": "lung"},
        {"reference": "reader", "input_px": (8, 8, 8)},
    ],
)
def test_settings_of_readers_and_seeds_that_cannot_be_are_refused(change):
    with pytest.raises(ValueError, match=r"reference is|crop is"):
        config.Batches(**change)
