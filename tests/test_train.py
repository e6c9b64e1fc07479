"""Training on tiny scans through the real table, killed and resumed for real."""

import csv
import json
import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest

import config
import slice_idx
import steps
import table
import train
from ct import scan as scan_files
from ct.fingerprint import hu_sha256
from dataset.slice_table import SliceTable
from dataset.split import read_split, rows_of_part, split_sha256
from training import runs

ROOT = Path(train.__file__).parent

TINY = config.Experiment(
    batches=config.Batches(input_px=(64, 64), crop="centre"),
    augment=config.Augment(noise_hu=20.0),
    model=config.Model("unet2d", filters=2, dropout=0.3),
    train=config.Train(epochs=3, steps_per_epoch=5, accumulate=2, ema=0.9),
)
"""Everything that has a state of its own: dropout, accumulation, average, schedule."""

FLAGS = [
    *("--batches.input-px", "64", "64"),
    *("--batches.crop", "centre"),
    *("--batches.batch-size", "4"),
    *("--augment.rotate-deg", "15"),
    *("--augment.zoom", "0.1"),
    *("--augment.gamma", "0"),
    *("--augment.shift-px", "10"),
    *("--augment.noise-hu", "20"),
    *("--model.name", "unet2d"),
    *("--model.weights", "none"),
    *("--model.filters", "2"),
    *("--model.dropout", "0.3"),
    *("--train.epochs", "3"),
    *("--train.steps-per-epoch", "5"),
    *("--train.accumulate", "2"),
    *("--train.ema", "0.9"),
    *("--train.validation-tiles", "0"),
]
"""TINY as a difference from `smoke`."""


@pytest.fixture(scope="module")
def data(tmp_path_factory, make_scan):
    """Folder with table.h5, split.json, and nobody.json, a split without validation."""
    folder = tmp_path_factory.mktemp("data")
    for index in range(6):
        scan = make_scan(index)
        scan_files.write_scan(scan, scan_files.scan_path(folder, scan.scan_id), {})
    table.write_table(folder, folder / "table.h5", config.Table(size_px=(64, 64)))
    for name, fractions in (("split", (0.5, 0.2, 0.3)), ("nobody", (0.5, 0.0, 0.5))):
        settings = config.Split(fractions=fractions)
        slice_idx.write_split(folder / "table.h5", folder / f"{name}.json", settings)
    return folder


@pytest.fixture(scope="module")
def run(data):
    """An unbroken run."""
    return trained(data, "whole", workers=2)


def trained(data, name, experiment=TINY, *, split="split.json", **options):
    run_dir = data / "runs" / name
    train.train(data / "table.h5", data / split, run_dir, experiment, **options)
    return run_dir


def history(run_dir):
    """Rows of history.csv, without the time they took."""
    with (run_dir / "history.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    return [{name: row[name] for name in row if name != "seconds"} for row in rows]


def weights(run_dir, name):
    from models import build_model

    model = build_model(TINY.model, (64, 64, 1), 2)
    model.load_weights(run_dir / f"{name}.weights.h5")
    return model.get_weights()


def assert_same_result(run_dir, expected):
    assert history(run_dir) == history(expected)
    for name in ("best", "last"):
        for found, wanted in zip(
            weights(run_dir, name), weights(expected, name), strict=True
        ):
            np.testing.assert_array_equal(found, wanted)


def test_a_run_is_complete(run):
    assert {path.name for path in run.iterdir()} == {
        *("config.json", "provenance.json", "split.json", "history.csv"),
        *("training.json", "tensorboard", "pictures", "training_scans.csv"),
        *("best.weights.h5", "last.weights.h5", "curves.png"),
    }
    assert not run.with_name("whole.partial").exists()
    assert [row["epoch"] for row in history(run)] == ["1", "2", "3"]
    assert len(list((run / "tensorboard").rglob("events*"))) == 2


def test_a_run_says_what_it_was_trained_with(run, data):
    record = json.loads((run / "config.json").read_text())
    experiment = config.from_json(config.Experiment, record)
    assert experiment.model == TINY.model
    assert experiment.table.size_px == (64, 64)
    assert experiment.split.fractions == (0.5, 0.2, 0.3)
    split = read_split(run / "split.json")
    assert split == read_split(data / "split.json")
    provenance = json.loads((run / "provenance.json").read_text())
    assert provenance["split_sha256"] == split["sha256"]


def test_the_summary_names_the_best_epoch(run):
    facts = json.loads((run / "training.json").read_text())
    scores = [float(row["val_dice"]) for row in history(run)]
    assert facts["best_validation_dice"] == max(scores)
    assert facts["best_epoch"] == 1 + scores.index(max(scores))
    assert facts["epochs"] == 3


def test_best_weights_give_the_validation_dice_of_the_best_epoch(run, data):
    import keras

    from dataset.generator2d import SliceGenerator
    from dataset.slice_table import SliceTable
    from models import build_model

    model = build_model(TINY.model, (64, 64, 1), 2)
    model.load_weights(run / "best.weights.h5")
    shared = volumes = 0
    with SliceTable(data / "table.h5") as source:
        split = read_split(data / "split.json")
        rows = rows_of_part(split, source, "validation")
        generator = SliceGenerator(
            source, rows, TINY.batches, None, seed=0, shuffle=False, balanced=False
        )
        for index in range(len(generator)):
            images, masks = generator[index]
            prob = keras.ops.convert_to_numpy(model(images, training=False))
            predicted, reference = prob[..., 1] > 0.5, masks[..., 1] > 0
            shared += (predicted & reference).sum()
            volumes += predicted.sum() + reference.sum()
    facts = json.loads((run / "training.json").read_text())
    assert facts["best_validation_dice"] == pytest.approx(
        2 * shared / volumes, rel=1e-3
    )


def test_a_picture_per_epoch_shows_six_slices_in_three_rows(run):
    pictures = sorted((run / "pictures").iterdir())
    assert [path.name for path in pictures] == [f"epoch-000{i}.png" for i in (1, 2, 3)]
    picture = cv2.imread(str(pictures[-1]))
    assert picture.shape == (3 * 256, 6 * 256, 3)
    middle = picture[256:512]
    assert (middle == (80, 220, 80)).all(-1).any()  # the reference's outline


def test_threads_do_not_change_the_result(run, data):
    assert_same_result(trained(data, "one-thread", workers=1), run)


@pytest.mark.slow
def test_a_killed_run_ends_as_an_unbroken_one(run, data):
    command = [sys.executable, str(ROOT / "train.py"), "smoke", "--name", "killed"]
    command += ["--table", str(data / "table.h5"), "--split", str(data / "split.json")]
    command += ["--runs", str(data / "runs"), *FLAGS]
    kill_after(command, data / "runs" / "killed.partial", epochs=1)
    assert not (data / "runs" / "killed").exists()
    subprocess.run(command, check=True, capture_output=True, cwd=ROOT)
    assert not (data / "runs" / "killed.partial").exists()
    assert_same_result(data / "runs" / "killed", run)


def kill_after(command, partial, epochs):
    """Runs the command and kills it as soon as its state is that of `epochs`."""
    with subprocess.Popen(command, stderr=subprocess.DEVNULL, cwd=ROOT) as process:
        deadline = time.monotonic() + 300
        while epochs_done(partial) < epochs and time.monotonic() < deadline:
            assert process.poll() is None
            time.sleep(0.01)
        os.kill(process.pid, signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    assert epochs_done(partial) == epochs


def epochs_done(partial):
    state = partial / "state.npz"
    if not state.is_file():
        return 0
    with np.load(state, allow_pickle=False) as arrays:
        return json.loads(arrays["facts"].tobytes())["progress"]["epoch"]


def test_a_complete_run_is_left_as_it_is(run, data):
    before = (run / "best.weights.h5").stat().st_mtime_ns
    report = train.train(data / "table.h5", data / "split.json", run, TINY)
    assert "is complete: 3 epochs" in report.line
    assert (run / "best.weights.h5").stat().st_mtime_ns == before


def test_a_run_killed_before_it_took_its_name_takes_it(run, data):
    files_before = {p: p.stat().st_mtime_ns for p in run.rglob("*.h5")}
    run.rename(run.with_name("whole.partial"))
    report = train.train(data / "table.h5", data / "split.json", run, TINY)
    assert "wrote" in report.line
    assert {p: p.stat().st_mtime_ns for p in run.rglob("*.h5")} == files_before


def test_a_run_with_other_settings_is_refused_by_name(run, data):
    other = replace(TINY, train=replace(TINY.train, learning_rate=0.5))
    with pytest.raises(FileExistsError, match=r"train.learning_rate was 0.001, is 0.5"):
        train.train(data / "table.h5", data / "split.json", run, other)


def test_a_run_of_another_split_is_refused(run, data):
    with pytest.raises(FileExistsError, match="split_sha256 was"):
        train.train(data / "table.h5", data / "nobody.json", run, TINY)


def test_settings_of_later_steps_do_not_make_another_run(run, data):
    other = replace(TINY, postprocess=config.Postprocess(threshold=0.25))
    report = train.train(data / "table.h5", data / "split.json", run, other)
    assert "is complete" in report.line
    record = json.loads((run / "config.json").read_text())
    assert record["postprocess"]["threshold"] == 0.25


def test_a_split_of_other_patients_is_refused(data):
    split = json.loads((data / "split.json").read_text())
    split["parts"]["train"] = ["somebody"]
    del split["sha256"]
    path = data / "other.json"
    path.write_text(json.dumps(split))
    with pytest.raises(ValueError, match="the split lists other patients"):
        trained(data, "other", split="other.json")
    assert not (data / "runs" / "other.partial").exists()


SHORT = replace(TINY, train=config.Train(epochs=1, steps_per_epoch=2, clip_norm=0.0))


def test_without_validation_the_last_epoch_is_the_best(data, caplog):
    experiment = replace(SHORT, train=replace(SHORT.train, epochs=2))
    run_dir = trained(data, "nobody", experiment, split="nobody.json")
    assert "the validation part is empty" in caplog.text
    facts = json.loads((run_dir / "training.json").read_text())
    assert (facts["best_epoch"], facts["best_validation_dice"]) == (2, None)
    for best, last in zip(
        weights(run_dir, "best"), weights(run_dir, "last"), strict=True
    ):
        np.testing.assert_array_equal(best, last)


def test_a_loss_that_is_not_a_number_names_epoch_step_and_remedy(data):
    settings = replace(
        SHORT.train, optimizer="sgd", learning_rate=1e30, steps_per_epoch=9
    )
    with pytest.raises(
        ValueError, match=r"nan at epoch 1, step \d.* --train.clip-norm"
    ):
        trained(data, "nan", replace(SHORT, train=settings))
    assert not (data / "runs" / "nan").exists()


def test_training_starts_from_the_weights_of_another_run(run, data):
    still = replace(SHORT.train, learning_rate=1e-30)
    run_dir = trained(
        data, "tuned", replace(SHORT, train=still), init=run / "best.weights.h5"
    )
    for found, before in zip(
        weights(run_dir, "last"), weights(run, "best"), strict=True
    ):
        np.testing.assert_allclose(found, before, atol=1e-6)
    record = json.loads((run_dir / "provenance.json").read_text())
    split = read_split(run / "split.json")
    text = (run / "training_scans.csv").read_text()
    trained_scans = list(csv.DictReader(text.splitlines()))
    marks = {row[name] for row in trained_scans for name in runs.SCAN_MARKS} - {""}
    assert set(record["init_training_patients"]) == {*split["parts"]["train"], *marks}
    seen = runs.training_patients_of(run_dir / "best.weights.h5")
    assert seen == record["init_training_patients"]  # the same table


def test_a_run_keeps_series_and_checksum_of_its_training_scans(run, data):
    split = read_split(run / "split.json")
    text = (run / "training_scans.csv").read_text()
    rows = list(csv.DictReader(text.splitlines()))
    assert sorted(row["patient_id"] for row in rows) == split["parts"]["train"]
    paths = [p for p in scan_files.scan_files(data) if p.name != "table.h5"]
    scans = map(scan_files.read_scan, paths)
    facts = {s.patient_id: (s.series_uid, hu_sha256(s.hu)) for s in scans}
    assert {
        row["patient_id"]: (row["series_uid"], row["hu_sha256"]) for row in rows
    } == {patient: facts[patient] for patient in split["parts"]["train"]}


def test_an_older_table_without_checksums_gives_series_alone():
    before = Path(__file__).parent / "data/before_rooms"
    split = read_split(before / "split.json")
    with SliceTable(before / "table.h5") as old:
        scans = runs.training_scans(old, split)
    assert [scan["patient_id"] for scan in scans] == split["parts"]["train"]
    assert {scan["hu_sha256"] for scan in scans} == {""}


def test_weights_of_another_network_are_refused_by_name(run, data):
    wider = replace(SHORT, model=replace(TINY.model, filters=3))
    with pytest.raises(ValueError, match="weights do not fit this network, unet2d"):
        trained(data, "wider", wider, init=run / "best.weights.h5")


def test_the_slice_classifier_and_half_precision_train(data):
    import keras

    policy = keras.config.dtype_policy()
    experiment = replace(
        SHORT,
        model=replace(TINY.model, slice_classifier=True),
        train=replace(SHORT.train, precision="mixed_float16", ema=0.5),
    )
    rows = history(trained(data, "heads", experiment))
    keras.config.set_dtype_policy(policy)
    assert 0 <= float(rows[0]["val_dice"]) <= 1
    total = float(rows[0]["val_loss"])
    parts = float(rows[0]["val_mask_loss"]) + float(rows[0]["val_slice_loss"])
    assert total == pytest.approx(parts, rel=1e-3)


def test_lungs_are_trained_with_pathology(data):
    from configs import CONFIGS

    base = CONFIGS["lung2d-small-pathology"][1]
    experiment = replace(
        base,
        batches=replace(base.batches, input_px=(64, 64), batch_size=2),
        model=replace(base.model, filters=2, depth=1),
        train=replace(base.train, epochs=1, steps_per_epoch=2),
    )
    run_dir = trained(data, "lungs", experiment)
    (row,) = history(run_dir)
    assert 0 <= float(row["val_dice"]) <= 1
    settings = json.loads((run_dir / "config.json").read_text())["lesions"]
    assert settings["probability"] == 0.8


def test_other_lesions_are_another_run(run, data):
    sick = replace(TINY, lesions=config.Lesions(probability=0.5))
    with pytest.raises(FileExistsError, match=r"lesions.probability was 0.0, is 0.5"):
        trained(data, "whole", sick)


def test_the_flags_of_the_killed_run_are_those_of_the_unbroken_one():
    parsed = steps.parse(train.Arguments, ["smoke", "--name", "x", *FLAGS])
    for section in train.WEIGHT_SECTIONS:
        assert getattr(parsed, section) == getattr(TINY, section)


def test_a_name_that_leaves_the_folder_is_refused(tmp_path, capsys):
    with pytest.raises(SystemExit):
        train.main(["smoke", "--name", "../x", "--runs", str(tmp_path)])
    assert "cannot name a file" in capsys.readouterr().err


def test_missing_tables_are_named(tmp_path, capsys):
    arguments = ["smoke", "--name", "x", "--split", str(tmp_path / "none.json")]
    with pytest.raises(SystemExit) as ended:
        train.main(arguments)
    assert ended.value.code == steps.FAILED
    assert "run slice_idx.py first" in capsys.readouterr().err


def test_patience_counts_epochs_since_the_best():
    from training.callbacks import Progress

    progress = Progress()
    better = [
        progress.add({"val_dice": dice}, patience=2) for dice in (0.1, 0.3, 0.2, 0.3)
    ]
    assert better == [True, True, False, False]
    assert (progress.best_epoch, progress.best_dice) == (2, 0.3)
    assert progress.stopped


def test_the_classifier_alone_chooses_where_candidates_are_judged():
    from training.callbacks import Progress

    progress = Progress()
    rows = [(0.9, 0.5, 0.4), (0.8, 0.6, 0.2), (0.95, 0.1, 0.3)]
    best = [
        progress.add(
            {"val_dice": dice, "val_loss": loss, "val_slice_loss": slice_loss},
            0,
            by_slice=True,
        )
        for dice, loss, slice_loss in rows
    ]
    assert best == [True, True, False]
    assert (progress.best_epoch, progress.best_dice, progress.best_loss) == (
        2,
        0.8,
        0.2,
    )


def test_where_nothing_is_to_be_found_silence_is_best_and_loss_decides():
    from training.callbacks import Progress

    progress = Progress()
    # Dice 0: something was found; NaN: nothing, as it should be.
    epochs = ((0.0, 0.9), (math.nan, 0.8), (math.nan, 0.9), (math.nan, 0.7), (0.0, 0.1))
    better = [
        progress.add({"val_dice": dice, "val_loss": loss}, patience=0)
        for dice, loss in epochs
    ]
    assert better == [True, True, False, True, False]
    assert progress.best_epoch == 4


def test_equal_dice_is_decided_by_the_loss():
    from training.callbacks import Progress

    progress = Progress()
    rows = [{"val_dice": 0.5, "val_loss": loss} for loss in (0.9, 0.8, 0.85)]
    assert [progress.add(row, patience=0) for row in rows] == [True, True, False]


def test_a_folder_that_is_no_run_is_never_removed(data):
    folder = data / "runs/scans"
    folder.mkdir(parents=True)
    (folder / "precious.h5").write_bytes(b"scan")
    for overwrite in (False, True):
        with pytest.raises(FileExistsError, match="is not a run of train.py"):
            trained(data, "scans", overwrite=overwrite)
    assert (folder / "precious.h5").read_bytes() == b"scan"


def test_patients_of_every_earlier_run_count_as_seen(tmp_path):
    for name, patients, earlier in (("a", ["p1"], []), ("b", ["p2"], ["p0"])):
        run = tmp_path / name
        run.mkdir()
        parts = {"train": patients, "validation": [], "test": []}
        split = {
            "format_version": 1,
            "settings": config.to_json(config.Split()),
            "leaks": False,
            "sha256": split_sha256(parts),
            "parts": parts,
        }
        (run / "split.json").write_text(json.dumps(split))
        (run / "provenance.json").write_text(
            json.dumps({"init_training_patients": earlier})
        )
    assert runs.training_patients_of(tmp_path / "a/best.weights.h5") == ["p1"]
    assert runs.training_patients_of(tmp_path / "b/best.weights.h5") == ["p0", "p2"]


def test_early_stopping_is_the_same_after_a_resume(tmp_path):
    import keras

    from training import callbacks

    model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1)])
    model.compile("sgd", "mse")
    progress = callbacks.Progress()
    progress.add({"val_dice": 0.5, "val_loss": 1.0}, patience=2)
    progress.add({"val_dice": 0.4, "val_loss": 1.0}, patience=2)
    assert not progress.stopped
    callbacks.write_state(tmp_path / "state.npz", model, progress)
    model.set_weights([np.full((1, 1), 9.0), np.zeros(1)])
    again = callbacks.read_state(tmp_path / "state.npz", model)
    assert again == progress
    assert model.get_weights()[0] != 9
    again.add({"val_dice": 0.4, "val_loss": 1.0}, patience=2)
    assert again.stopped


def test_a_state_of_another_network_is_refused(tmp_path):
    import keras

    from training import callbacks

    small = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1)])
    large = keras.Sequential([keras.Input((1,)), *[keras.layers.Dense(1)] * 2])
    for model in (small, large):
        model.compile("sgd", "mse")
    callbacks.write_state(tmp_path / "state.npz", small, callbacks.Progress())
    with pytest.raises(ValueError, match="variables of another network"):
        callbacks.read_state(tmp_path / "state.npz", large)


def test_the_line_of_an_epoch_tells_scores_and_time_left():
    from training.callbacks import Progress, epoch_line

    progress = Progress()
    for dice, seconds in ((0.5, 30.0), (0.25, 10.0)):
        row = {"loss": 1.0, "dice": 0.125, "val_dice": dice, "seconds": seconds}
        progress.add(row, patience=0)
    # Two of four epochs are left, at 20 s each.
    assert epoch_line(progress, 4) == (
        "epoch 2 of 4: loss 1.0000, Dice 0.1250, validation Dice 0.2500 "
        "(best 0.5000, epoch 1), 10 s, 40 s left"
    )


def test_a_run_older_than_a_setting_had_its_default():
    settings = config.to_json(config.Experiment())
    keys = {"table_sha256": "a", "split_sha256": "b", "init_sha256": ""}
    settings = json.loads(json.dumps(settings))
    wanted = {**keys, "candidates_sha256": None, "settings": settings}
    older = json.loads(json.dumps(wanted))
    del older["candidates_sha256"]
    del older["settings"]["batches"]["real_fraction"]
    del older["settings"]["lesions"]
    assert train.differing_fields(older, wanted) == []
    wanted["settings"]["batches"]["real_fraction"] = 0.5
    assert train.differing_fields(older, wanted) == [
        "batches.real_fraction was 0.0, is 0.5"
    ]
