"""Step 5 of 9: configuration + table + split -> run directory.

Example:
    python train.py smoke --table work/table.h5 --split work/split.json --name smoke

A run that is killed goes on from its last epoch, to the weights it would have had.
"""

import json
import logging
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

import config
import data_generator
import files
import provenance
import slice_idx
import steps
from slice_table import SliceTable

log = logging.getLogger(__name__)

PICTURES = 6
"""Validation slices that are drawn after each epoch."""


@dataclass(frozen=True)
class Arguments:
    """What is trained, on what, and where the run goes."""

    mask: config.LungMask
    batches: config.Batches
    augment: config.Augment
    model: config.Model
    loss: config.Loss
    train: config.Train
    postprocess: config.Postprocess
    table: Path = Path("work/table.h5")
    """Table made by table.py."""
    split: Path = Path("work/split.json")
    """Split made by slice_idx.py."""
    runs: Path = Path("work/runs")
    """Folder of all runs."""
    name: str = "run"
    """Name of this run; its directory is RUNS/NAME."""
    init: Path | None = None
    """Weights to start from, e.g. best.weights.h5 of another run."""
    workers: int = 2
    """Threads that make batches."""
    overwrite: bool = False
    """Replace a run of this name, complete or not."""


@dataclass(frozen=True)
class Data:
    """Batches for training and validation; validation is None if that part is empty."""

    training: data_generator.SliceGenerator
    validation: data_generator.SliceGenerator | None


def train(
    experiment: config.Experiment,
    table_path: Path,
    split_path: Path,
    run_dir: Path,
    *,
    init: Path | None = None,
    workers: int = 2,
    overwrite: bool = False,
) -> steps.Report:
    """Trains a network and leaves a complete run directory.

    While it trains, the directory is RUN_DIR.partial; a stopped run goes on from there.

    Raises:
        ValueError: If the split is of other patients than the table, an unfinished run of
            the same name has another configuration, or the loss is not a number.
        FileExistsError: If the run exists with another configuration.
    """
    partial = run_dir.with_name(run_dir.name + ".partial")
    if overwrite:
        files.remove(run_dir)
        files.remove(partial)
    refuse_other_run(run_dir, experiment)
    if run_dir.exists():
        return steps.Report(f"{run_dir} is complete; use --overwrite to train it again")
    refuse_other_run(partial, experiment)
    split = slice_idx.read_split(split_path)
    with SliceTable(table_path) as table:
        data = make_data(table, split, experiment)
        write_facts(partial, experiment, split, table)
        progress = fit(partial, data, experiment, init=init, workers=workers)
    finish(partial, run_dir, asdict(progress))
    score = (
        "no validation patients, last weights kept"
        if math.isnan(progress.best_dice)
        else f"best validation Dice {progress.best_dice:.4f} at epoch {progress.best_epoch}"
    )
    return steps.Report(f"wrote {run_dir}: {progress.epoch} epochs, {score}")


def refuse_other_run(run_dir: Path, experiment: config.Experiment) -> None:
    """Raises FileExistsError if a run directory is of another configuration."""
    path = run_dir / "config.json"
    if not path.exists():
        return
    found, expected = json.loads(path.read_text()), plain(experiment)
    if found != expected:
        changed = [name for name in expected if found.get(name) != expected[name]]
        raise FileExistsError(
            f"{run_dir} holds a run with other settings of {', '.join(changed)}; choose "
            "another --name or use --overwrite"
        )


def plain(experiment: config.Experiment) -> dict[str, Any]:
    """The experiment as JSON gives it back: tuples are lists."""
    return json.loads(json.dumps(config.to_json(experiment)))


def make_data(
    table: SliceTable, split: dict[str, Any], experiment: config.Experiment
) -> Data:
    """The generators of the split's training and validation rows."""
    rows = {
        part: slice_idx.rows_of_part(split, table, part)
        for part in ("train", "validation")
    }
    settings, label = experiment.train, experiment.model.slice_classifier
    training = data_generator.SliceGenerator(
        table,
        rows["train"],
        experiment.batches,
        experiment.augment,
        seed=settings.seed,
        steps_per_epoch=settings.steps_per_epoch,
        with_slice_label=label,
    )
    if not len(rows["validation"]):
        log.warning("the validation part is empty: the last weights will be the best")
        return Data(training, None)
    validation = data_generator.SliceGenerator(
        table,
        rows["validation"],
        experiment.batches,
        None,
        seed=settings.seed,
        shuffle=False,
        balanced=False,
        with_slice_label=label,
    )
    return Data(training, validation)


def write_facts(
    partial: Path,
    experiment: config.Experiment,
    split: dict[str, Any],
    table: SliceTable,
) -> None:
    """Writes what is known before the first epoch; the split travels with the weights."""
    record = provenance.record(
        table_sha256=table.sha256, split_sha256=split["sha256"], rows=len(table)
    )
    for name, facts in (
        ("provenance.json", record),
        ("split.json", split),
        ("config.json", plain(experiment)),
    ):
        with files.written_whole(partial / name) as path:
            path.write_text(json.dumps(facts, indent=1))


def fit(
    run_dir: Path,
    data: Data,
    experiment: config.Experiment,
    *,
    init: Path | None,
    workers: int,
) -> Any:
    """Trains from the state in `run_dir`, or from the start; how far it came."""
    import keras

    from models import callbacks

    prepare_backend(experiment.train)
    network = compiled(experiment, len(data.training))
    progress = callbacks.Progress()
    if (run_dir / callbacks.STATE).exists():
        progress = callbacks.read_state(run_dir / callbacks.STATE, network)
        log.info("going on after epoch %d", progress.epoch)
    elif init is not None:
        network.load_weights(init)
    settings = experiment.train
    if progress.epoch >= settings.epochs or progress.stopped:
        return progress
    data.training.epoch = progress.epoch
    watchers = [
        callbacks.StopAtNaN(),
        callbacks.Checkpoints(
            run_dir, progress, epochs=settings.epochs, patience=settings.patience
        ),
        callbacks.Pictures(*shown_slices(data), run_dir / "pictures"),
        keras.callbacks.TensorBoard(run_dir / "tensorboard", write_graph=False),
    ]
    network.fit(
        data_generator.as_pydataset(data.training, workers=workers),
        validation_data=data.validation
        and data_generator.as_pydataset(data.validation, workers=workers),
        initial_epoch=progress.epoch,
        epochs=settings.epochs,
        callbacks=watchers,
        shuffle=False,
        verbose="auto" if log.isEnabledFor(logging.DEBUG) else 0,
    )
    callbacks.write_weights(run_dir / "last.weights.h5", network)
    return progress


def prepare_backend(settings: config.Train) -> None:
    """Seeds everything and makes the backend's operations give the same result twice."""
    import keras

    keras.utils.set_random_seed(settings.seed)
    keras.config.set_dtype_policy(settings.precision)
    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        tf.config.experimental.enable_op_determinism()


def compiled(experiment: config.Experiment, steps_per_epoch: int) -> Any:
    """The experiment's network, ready for `fit`."""
    import keras

    from models import build_loss, build_model, losses
    from models.optimizers import build_optimizer

    network = build_model(experiment.model, (*experiment.batches.input_px, 1), 2)
    loss: Any = build_loss(experiment.loss)
    metrics: Any = [losses.PooledDice()]
    if experiment.model.slice_classifier:
        loss = {"mask": loss, "slice": "binary_crossentropy"}
        metrics = {"mask": metrics, "slice": []}
    # XLA makes TensorFlow's convolutions several times slower on CPU.
    network.compile(
        optimizer=build_optimizer(experiment.train, steps_per_epoch),
        loss=loss,
        metrics=metrics,
        jit_compile=False if keras.backend.backend() == "tensorflow" else "auto",
    )
    return network


def shown_slices(data: Data) -> tuple[np.ndarray, np.ndarray]:
    """A few slices with target, of validation if there is one: images and masks."""
    generator = data.validation or data.training
    images, masks = [], []
    for index in range(len(generator)):
        x, y = generator[index]
        mask = (y["mask"] if isinstance(y, dict) else y)[..., 1]
        chosen = mask.any(axis=(1, 2))
        images.extend(x[chosen])
        masks.extend(mask[chosen])
    every = max(len(images) // PICTURES, 1)
    return np.stack(images[::every][:PICTURES]), np.stack(masks[::every][:PICTURES])


def finish(partial: Path, run_dir: Path, summary: dict[str, Any]) -> None:
    """Takes away what only resuming needs, and gives the run its name."""
    from models.callbacks import STATE

    with files.written_whole(partial / "summary.json") as path:
        path.write_text(json.dumps(summary, indent=1))
    files.remove(partial / STATE)
    partial.replace(run_dir)


def run_step(arguments: Arguments) -> steps.Report:
    """Trains what the command line asks for, on the table and split as they were made."""
    named = {
        name: getattr(arguments, name)
        for name in (
            "mask",
            "batches",
            "augment",
            "model",
            "loss",
            "train",
            "postprocess",
        )
    }
    with SliceTable(arguments.table) as table:
        named["table"] = table.settings
    split = slice_idx.read_split(arguments.split)
    named["split"] = config.from_json(config.Split, split["settings"])
    return train(
        config.Experiment(**named),
        arguments.table,
        arguments.split,
        arguments.runs / arguments.name,
        init=arguments.init,
        workers=arguments.workers,
        overwrite=arguments.overwrite,
    )


def main(argv: Sequence[str] | None = None) -> None:
    steps.run(run_step, Arguments, argv=argv)


if __name__ == "__main__":
    main()
