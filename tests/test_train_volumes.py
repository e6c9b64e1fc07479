"""Training on volumes: tiny U-Nets through the real table, stopped and resumed."""

import csv
import json
from dataclasses import replace

import cv2
import numpy as np
import pytest

import config
import slice_idx
import table
import train
from ct import files
from ct import scan as scan_files
from dataset.slice_table import SliceTable
from inference.candidates import CandidateClassifier
from training.runs import read_settings

TINY = config.Experiment(
    batches=config.Batches(
        target="lung",
        input_px=(16, 16, 16),
        crop="lung",
        normalisation="population",
        lung_mask=False,
        batch_size=2,
    ),
    augment=config.Augment(tilt_deg=10, noise_hu=20, curve_hu=10, synthesis=0.3),
    model=config.Model(
        "unet3d", filters=4, depth=2, dropout=0.2, mask_fraction=0.5, mask_cube_px=3
    ),
    loss=config.Loss("dice_cross_entropy"),
    train=config.Train(
        optimizer="adamw", epochs=2, steps_per_epoch=3, ema=0.9, validation_tiles=4
    ),
)
"""Everything that has a state of its own: masks, dropout, average, schedule."""


@pytest.fixture(scope="module")
def data(tmp_path_factory, make_scan):
    """Folder with table.h5 of volumes alone, and split.json."""
    folder = tmp_path_factory.mktemp("data")
    for index in range(5):
        scan = make_scan(index)
        scan_files.write_scan(scan, scan_files.scan_path(folder, scan.scan_id), {})
    settings = config.Table(slices="none", volume_spacing_mm=3.0)
    table.write_table(folder, folder / "table.h5", settings)
    split = config.Split(fractions=(0.6, 0.2, 0.2))
    slice_idx.write_split(folder / "table.h5", folder / "split.json", split)
    return folder


@pytest.fixture(scope="module")
def run(data):
    return trained(data, "whole", workers=2)


def trained(data, name, experiment=TINY, **options):
    import keras

    keras.utils.clear_session()  # layers are numbered as in a process of its own
    run_dir = data / "runs" / name
    paths = data / "table.h5", data / "split.json"
    train.train(*paths, run_dir, experiment, **options)
    return run_dir


def history(run_dir):
    with (run_dir / "history.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    return [{name: row[name] for name in row if name != "seconds"} for row in rows]


def weights(run_dir, name, experiment=TINY):
    from models import build_model

    model = build_model(experiment.model, (16, 16, 16, 1), 2)
    model.load_weights(run_dir / f"{name}.weights.h5")
    return model.get_weights()


def test_a_run_on_volumes_is_complete_and_pictured(run):
    assert [row["epoch"] for row in history(run)] == ["1", "2"]
    assert 0 <= float(history(run)[-1]["val_dice"]) <= 1
    picture = cv2.imread(str(run / "pictures" / "epoch-0002.png"))
    assert picture.shape == (3 * 256, 4 * 256, 3)  # four tiles validate
    assert (picture[256:512] == (80, 220, 80)).all(-1).any()


def test_a_run_that_is_stopped_between_epochs_ends_as_an_unbroken_one(
    run, data, monkeypatch
):
    from training import callbacks

    class Stopped(Exception):
        pass

    def stop(progress, epochs):
        raise Stopped

    with monkeypatch.context() as patched:
        patched.setattr(callbacks, "epoch_line", stop)  # after the state was written
        with pytest.raises(Stopped):
            trained(data, "broken")
    assert (data / "runs" / "broken.partial" / callbacks.STATE).is_file()
    broken = trained(data, "broken")
    assert history(broken) == history(run)
    for name in ("best", "last"):
        pairs = zip(weights(broken, name), weights(run, name), strict=True)
        assert all(np.array_equal(found, wanted) for found, wanted in pairs)


SHORT = replace(TINY, train=config.Train(epochs=1, steps_per_epoch=2))
DEEP = replace(SHORT, model=replace(TINY.model, depth=3, deep_supervision=True))


def test_deep_supervision_trains_and_is_scored_on_the_finest_level(data):
    run_dir = trained(data, "deep", DEEP)
    assert 0 <= float(history(run_dir)[0]["val_dice"]) <= 1


def test_deep_supervision_weighs_each_level_half_of_the_one_above():
    from training.loop import DeeplySupervised, build_compiled_model

    model = build_compiled_model(DEEP, 1)
    assert isinstance(model, DeeplySupervised)
    model.loss = lambda y, prob: np.float32(0) + float(np.mean(y - prob))
    y = np.zeros((1, 16, 16, 16, 2), np.float32)
    y[..., :8, 1] = 1  # half of it, also after averaging; over both classes a quarter
    zeros = [np.zeros((1, size, size, size, 2), np.float32) for size in (16, 8)]
    fine, coarse = 0.25 - 0.1, 0.25 - 0.4
    found = model.compute_loss(None, y, [zeros[0] + 0.1, zeros[1] + 0.4])
    assert float(found) == pytest.approx((fine + coarse / 2) / 1.5, abs=1e-6)


def test_the_coarse_reference_is_the_share_of_voxels():
    from training.loop import build_compiled_model

    model, seen = build_compiled_model(DEEP, 1), []
    model.loss = lambda y, prob: seen.append(np.asarray(y)) or 0.0
    y = np.zeros((1, 4, 4, 4, 2), np.uint8)
    y[0, :3, 0, 0, 1] = 1
    model.compute_loss(None, y, [y, y[:, ::2, ::2, ::2]])
    assert seen[1].shape == (1, 2, 2, 2, 2)
    assert seen[1][0, :, 0, 0, 1].tolist() == [2 / 8, 1 / 8]


@pytest.mark.parametrize("name", ["unet3d", "unet2d"])
def test_a_frozen_encoder_stays_as_it_was_and_the_decoder_learns(name):
    import keras

    from training.loop import build_compiled_model

    settings = config.Model(name, filters=2, depth=2)
    size = (16, 16, 16) if name == "unet3d" else (16, 16)
    model = build_compiled_model(
        config.Experiment(
            batches=config.Batches(input_px=size),
            model=settings,
            train=config.Train(freeze_encoder=True),
        ),
        steps_per_epoch=1,
    )
    frozen = {layer.name for layer in model.layers if not layer.trainable}
    before = {w.path: np.asarray(w) for w in model.weights}
    x = np.random.default_rng(0).normal(size=(2, *size, 1)).astype(np.float32)
    y = keras.utils.to_categorical(x[..., 0] > 0, 2)
    model.run_eagerly = True  # tracing takes longer than the step
    model.train_on_batch(x, y)
    changed = {w.path for w in model.weights if (np.asarray(w) != before[w.path]).any()}
    convolutions = [
        layer.name
        for layer in model.layers
        if isinstance(layer, keras.layers.Conv2D | keras.layers.Conv3D)
    ]
    # Two per level on the way down: three levels.
    assert {n for n in convolutions if n in frozen} == set(convolutions[:6])
    assert changed
    assert not any(path.split("/")[0] in frozen for path in changed)


@pytest.mark.parametrize("frozen", [True, False])
def test_frozen_normalisation_is_used_and_kept_by_the_moving_average_too(frozen):
    import keras

    from training.loop import build_compiled_model

    model = build_compiled_model(
        config.Experiment(
            batches=config.Batches(input_px=(16, 16, 16)),
            model=config.Model("unet3d", filters=2, depth=2, norm="batch"),
            train=config.Train(freeze_normalisation=frozen, ema=0.9),
        ),
        steps_per_epoch=2,
    )
    rng = np.random.default_rng(0)
    own = {
        w.path: w
        for layer in model.layers
        if isinstance(layer, keras.layers.BatchNormalization)
        for w in layer.weights
    }
    assert len(own) >= 4 * 5
    for weight in own.values():
        weight.assign(rng.uniform(0.5, 2, weight.shape))
    before = {path: np.asarray(weight) for path, weight in own.items()}
    x = rng.normal(3, 1, (2, 16, 16, 16, 1)).astype(np.float32)
    y = keras.utils.to_categorical(x[..., 0] > 3, 2)
    training, use = (np.asarray(model(x, training=mode)) for mode in (True, False))
    assert (np.abs(training - use).max() < 1e-6) == frozen
    model.run_eagerly = True  # tracing takes longer than the steps
    for _ in range(2):
        model.train_on_batch(x, y)
    model.optimizer.finalize_variable_values(model.trainable_variables)
    same = [np.array_equal(before[path], np.asarray(w)) for path, w in own.items()]
    assert all(same) if frozen else not any(same)


def test_what_cannot_be_frozen_is_refused(data, tmp_path):
    from training.loop import build_compiled_model

    frozen = config.Train(freeze_normalisation=True)
    with pytest.raises(ValueError, match="expected model.norm batch"):
        build_compiled_model(
            config.Experiment(
                batches=config.Batches(input_px=(16, 16, 16)),
                model=config.Model("unet3d", filters=2, depth=2, norm="instance"),
                train=frozen,
            ),
            steps_per_epoch=1,
        )
    experiment = config.Experiment(train=frozen)
    with pytest.raises(ValueError, match="without --init"):
        train.train(data / "table.h5", data / "split.json", tmp_path / "x", experiment)


def test_weights_of_another_spacing_are_spoken_of(run, tmp_path, caplog):
    coarse = replace(TINY, table=config.Table(volume_spacing_mm=9.0))
    for init in (None, tmp_path / "best.weights.h5"):
        train.warn_of_other_spacing(init, coarse)
    init = run / "best.weights.h5"
    train.warn_of_other_spacing(init, read_settings(run))
    assert not caplog.messages
    train.warn_of_other_spacing(init, coarse)
    assert caplog.messages == [f"{init} was trained at 3 mm, this run trains at 9 mm"]


def test_a_split_of_nobody_to_train_is_refused(data, tmp_path):
    split = json.loads((data / "split.json").read_text())
    parts = split["parts"]
    parts["test"] = sorted(parts["test"] + parts["train"])
    parts["train"] = []
    del split["sha256"]
    (tmp_path / "split.json").write_text(json.dumps(split))
    with pytest.raises(ValueError, match="the training part has no scans"):
        train.train(data / "table.h5", tmp_path / "split.json", tmp_path / "run", TINY)


def test_patience_begins_to_count_after_its_epochs():
    from training.callbacks import Progress

    progress = Progress()
    for epoch, dice in enumerate((0.5, 0.1, 0.1, 0.1, 0.1), start=1):
        progress.add({"val_dice": dice}, patience=2, patience_after=3)
        assert progress.stopped == (epoch == 5)


def test_the_false_positive_network_trains_on_candidates(data):
    experiment = replace(
        TINY,
        batches=replace(TINY.batches, target="nodule", crop="candidate", batch_size=4),
        augment=config.Augment(tilt_deg=10, shift_px=1),
        lesions=config.Lesions(probability=0.5, findings=("nodule",)),
        model=config.Model(
            "unet3d", filters=4, depth=2, seeded=True, slice_classifier=True
        ),
    )
    run_dir = trained(data, "reduction", experiment)
    rows = history(run_dir)
    assert len(rows) == 2
    losses = [float(row["val_slice_loss"]) for row in rows]
    assert 0 <= float(rows[0]["val_slice_auc"]) <= 1
    # The classifier decides, and its weights are those that count.
    best = json.loads((run_dir / "training.json").read_text())["best_epoch"]
    assert best == np.argmin(losses) + 1
    scan = scan_files.read_scan(scan_files.scan_files(data)[0])
    path = data / "candidates.csv"
    path.write_text(
        "case_id,x_lps_mm,y_lps_mm,z_lps_mm,marked_by\nunknown,0,0,0,slices\n"
    )
    with pytest.raises(ValueError, match=r"none of its 1 scans \(unknown\) is in"):
        trained(data, "by-candidates", experiment, candidates=path)
    with SliceTable(data / "table.h5") as opened, path.open("a") as file:
        file.writelines(f"{name},0,0,0,both\n" for name in opened.scans["scan_id"])
    other = trained(data, "by-candidates", experiment, candidates=path)
    record = json.loads((other / "provenance.json").read_text())
    assert record["candidates_sha256"] == files.sha256(path)
    assert history(other) != rows
    with pytest.raises(FileExistsError, match="candidates_sha256 was"):
        trained(data, "by-candidates", experiment)
    with pytest.raises(ValueError, match="batches.crop is lung; expected candidate"):
        trained(data, "of-all", TINY, candidates=path)
    classifier = CandidateClassifier(run_dir)
    found = classifier.probabilities(scan, [(5, 9, 9), (9, 20, 30)])
    assert (found[0] != found[1]).all()
