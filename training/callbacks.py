"""What happens between epochs: history, weights, state for resuming, pictures, stopping."""

import csv
import json
import logging
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import cv2
import keras
import numpy as np
from keras import ops

import steps
from ct import files
from training.optimizers import FlatOptimizer

log = logging.getLogger(__name__)

STATE = "state.npz"
"""Everything needed to go on after an epoch; only in a run that is not complete."""

REFERENCE_BGR, PREDICTION_BGR = (80, 220, 80), (60, 60, 255)
TILE_PX = 256
"""Least height and width of a slice in the pictures."""


@dataclass
class Progress:
    """How far a run is.

    Attributes:
        epoch: Epochs done.
        best_epoch: The best by `add`, counted from 1; 0 before the first.
        best_dice: Its validation Dice; NaN without validation, and if there was nothing to
            find and nothing was found.
        best_loss: Its validation loss, of the classifier if that decides; NaN without
            validation.
        stopped: Whether `patience` ended the run early.
        history: One row of numbers per epoch.
    """

    epoch: int = 0
    best_epoch: int = 0
    best_dice: float = math.nan
    best_loss: float = math.nan
    stopped: bool = False
    history: list[dict[str, float]] = field(default_factory=list)

    def add(
        self,
        row: dict[str, float],
        patience: int,
        patience_after: int = 0,
        *,
        by_slice: bool = False,
    ) -> bool:
        """Takes in an epoch's numbers; tells whether it is the best so far.

        The largest validation Dice is the best, then the smallest validation loss. A Dice
        of NaN counts as 1: nothing was to be found, and nothing was found. `by_slice`, the
        smallest validation loss of the classifier alone is the best. Without validation
        the last epoch is. Epochs up to `patience_after` never stop it.
        """
        self.epoch += 1
        self.history.append(row)
        dice = row.get("val_dice", math.nan)
        loss = row.get("val_slice_loss" if by_slice else "val_loss", math.nan)
        ranks = [
            goodness(math.nan if by_slice else score, its_loss)
            for score, its_loss in ((dice, loss), (self.best_dice, self.best_loss))
        ]
        better = not self.best_epoch or "val_dice" not in row or ranks[0] > ranks[1]
        if better:
            self.best_epoch, self.best_dice, self.best_loss = self.epoch, dice, loss
        since = self.epoch - max(self.best_epoch, patience_after)
        self.stopped = 0 < patience <= since
        return better


def goodness(dice: float, loss: float) -> tuple[float, float]:
    """Compares epochs; see `Progress.add`."""
    return (1.0 if math.isnan(dice) else dice, -loss)


def write_state(path: Path, model: keras.Model, progress: Progress) -> None:
    """Writes weights, optimizer, dropout seeds and progress as one file, whole or not."""
    arrays = {
        f"{i:05}": ops.convert_to_numpy(v) for i, v in enumerate(variables(model))
    }
    facts = {"paths": [v.path for v in variables(model)], "progress": asdict(progress)}
    arrays["facts"] = np.frombuffer(json.dumps(facts).encode(), np.uint8)
    with files.written_whole(path) as partial, partial.open("wb") as file:
        np.savez(file, **arrays)


def read_state(path: Path, model: keras.Model) -> Progress:
    """Sets a compiled model to the state in a file; the inverse of `write_state`.

    Raises:
        ValueError: If the state is of another network or optimizer.
    """
    with np.load(path, allow_pickle=False) as arrays:
        facts = json.loads(arrays["facts"].tobytes())
        targets = variables(model)
        found = [v.path for v in targets]
        if facts["paths"] != found:
            raise ValueError(
                f"{path} holds {len(facts['paths'])} variables of another network or "
                f"optimizer; this run has {len(found)}; train again with --overwrite"
            )
        for i, variable in enumerate(targets):
            variable.assign(arrays[f"{i:05}"])
    return Progress(**facts["progress"])


def variables(model: keras.Model) -> list[keras.Variable]:
    """All variables that decide how training goes on, in a fixed order."""
    if not model.optimizer.built:
        model.optimizer.build(model.trainable_variables)
    return [*model.variables, *model.optimizer.variables]


@contextmanager
def averaged(model: keras.Model) -> Iterator[None]:
    """The model with the moving average of its weights, if the optimizer keeps one."""
    # Under mixed_float16 Keras wraps the optimizer in one that scales the loss.
    optimizer = getattr(model.optimizer, "inner_optimizer", model.optimizer)
    keeps = isinstance(optimizer, FlatOptimizer) and optimizer.ema > 0
    if keeps:
        optimizer.swap_averages()
    try:
        yield
    finally:
        if keeps:
            optimizer.swap_averages()


def write_weights(path: Path, model: keras.Model) -> None:
    """Writes the weights that are used afterwards: their average where there is one."""
    with averaged(model), files.written_whole(path) as partial:
        without_optimizer(model).save_weights(partial)


def without_optimizer(model: keras.Model) -> keras.Model:
    """The same layers as a model that is not compiled.

    A compiled model's weights file holds, and asks for, the optimizer's variables too.
    """
    return keras.Model(model.inputs, model.output, name=model.name)


def write_history(path: Path, history: list[dict[str, float]]) -> None:
    """Writes one CSV row per epoch."""
    with files.written_whole(path) as partial, partial.open("w", newline="") as file:
        rows = csv.DictWriter(file, list(history[0]))
        rows.writeheader()
        rows.writerows(history)


class Checkpoints(keras.callbacks.Callback):
    """After each epoch: best weights, history.csv, state, one line of log, early stop.

    The state is written last and names the epoch, so a run killed at any moment goes on
    from the end of an epoch, and whatever it wrote after that is written again.

    Args:
        run_dir: Where the files go.
        progress: Continued; empty for a new run.
        epochs: Epochs of the whole run.
        patience: Epochs without a better validation Dice before stopping; 0 for never.
        patience_after: Epochs before that count begins.
        by_slice: As for `Progress.add`.
    """

    def __init__(
        self,
        run_dir: Path,
        progress: Progress,
        *,
        epochs: int,
        patience: int,
        patience_after: int = 0,
        by_slice: bool = False,
    ):
        super().__init__()
        self.run_dir = run_dir
        self.progress = progress
        self.epochs = epochs
        self.patience = patience
        self.patience_after = patience_after
        self.by_slice = by_slice
        self.started = 0.0

    def on_epoch_begin(self, epoch, logs=None):
        self.started = time.monotonic()

    def on_test_begin(self, logs=None):
        self.average = averaged(self.model)
        self.average.__enter__()

    def on_test_end(self, logs=None):
        self.average.__exit__(None, None, None)

    def on_epoch_end(self, epoch, logs=None):
        row = {"epoch": epoch + 1, **in_order(logs or {})}
        row["learning_rate"] = float(
            ops.convert_to_numpy(self.model.optimizer.learning_rate)
        )
        row["seconds"] = round(time.monotonic() - self.started, 3)
        if self.progress.add(
            row, self.patience, self.patience_after, by_slice=self.by_slice
        ):
            write_weights(self.run_dir / "best.weights.h5", self.model)
        write_history(self.run_dir / "history.csv", self.progress.history)
        write_state(self.run_dir / STATE, self.model, self.progress)
        log.info("%s", epoch_line(self.progress, self.epochs))
        if self.progress.stopped:
            self.model.stop_training = True


def in_order(logs: dict[str, Any]) -> dict[str, float]:
    """Keras' logs with plain names, in an order that does not change between runs.

    A network with two outputs calls the mask's Dice mask_dice.
    """
    renamed = {name.replace("mask_dice", "dice"): float(logs[name]) for name in logs}
    return {
        name: renamed[name]
        for name in sorted(renamed, key=lambda name: (name.startswith("val_"), name))
    }


def epoch_line(progress: Progress, epochs: int) -> str:
    """One line on the epoch that ended, e.g. 'epoch 3 of 50: loss 0.5214, ...'."""
    row = progress.history[-1]
    scores = f"loss {row['loss']:.4f}, Dice {row['dice']:.4f}"
    if "val_dice" in row:
        scores += (
            f", validation Dice {row['val_dice']:.4f} (best {progress.best_dice:.4f}, "
            f"epoch {progress.best_epoch})"
        )
    if "val_slice_auc" in row:
        scores += f", of the classifier AUC {row['val_slice_auc']:.4f}"
    latest = [row["seconds"] for row in progress.history[-3:]]
    left = (epochs - progress.epoch) * sum(latest) / len(latest)
    return (
        f"epoch {progress.epoch} of {epochs}: {scores}, "
        f"{steps.duration_text(row['seconds'])}, {steps.duration_text(left)} left"
    )


class StopAtNaN(keras.callbacks.Callback):
    """Ends training with an error at the first batch whose loss is not a number."""

    epoch = 0

    def on_epoch_begin(self, epoch, logs=None):
        self.epoch = epoch

    def on_train_batch_end(self, batch, logs=None):
        loss = (logs or {}).get("loss", 0.0)
        if not math.isfinite(loss):
            raise ValueError(
                f"the loss is {loss} at epoch {self.epoch + 1}, step {batch + 1}; lower "
                "--train.learning-rate, set --train.clip-norm 1, or use --train.precision "
                "float32, and train again with --overwrite"
            )


class EpochOfBatches(keras.callbacks.Callback):
    """Tells the generator the epoch before its first batch is asked for.

    Args:
        generator: Has an attribute `epoch` that its batches depend on.
    """

    def __init__(self, generator: Any):
        super().__init__()
        self.generator = generator

    def on_epoch_begin(self, epoch, logs=None):
        self.generator.epoch = epoch


class Pictures(keras.callbacks.Callback):
    """After each epoch, a picture of predictions of the same few slices.

    Of volumes, their middle slices are shown.

    Args:
        images: (slices, y, x, 1) or (volumes, z, y, x, 1) input.
        masks: The same without the last axis: reference, 0 or 1.
        pictures_dir: Where epoch-0001.png and so on are written.
    """

    def __init__(self, images: np.ndarray, masks: np.ndarray, pictures_dir: Path):
        super().__init__()
        self.images = images
        self.masks = masks
        self.pictures_dir = pictures_dir

    def on_epoch_end(self, epoch, logs=None):
        with averaged(self.model):
            prob = np.stack([self.predicted(image) for image in self.images])
        images = middle_slices(self.images[..., 0])
        picture = prediction_picture(images, middle_slices(self.masks), prob)
        path = self.pictures_dir / f"epoch-{epoch + 1:04}.png"
        with files.written_whole(path) as partial:
            cv2.imwrite(str(partial), picture)

    def predicted(self, image: np.ndarray) -> np.ndarray:
        """(y, x) probability of what is not background; one by one, for want of memory."""
        outputs = self.model(image[None], training=False)
        if isinstance(outputs, dict):
            outputs = outputs["mask"]
        elif isinstance(outputs, list):
            outputs = outputs[0]
        prob = ops.convert_to_numpy(outputs)[..., 1:].sum(-1)
        return middle_slices(prob)[0]


def middle_slices(images: np.ndarray) -> np.ndarray:
    """(n, y, x) images as they are, or the middle slice of each of (n, z, y, x) volumes."""
    return images if images.ndim == 3 else images[:, images.shape[1] // 2]


def prediction_picture(
    images: np.ndarray, masks: np.ndarray, prob: np.ndarray
) -> np.ndarray:
    """Slices in a row: image; with outlines; probability from black to white.

    Args:
        images: (slices, y, x) float, shown from its least to its greatest value.
        masks: (slices, y, x) reference; outlined in green.
        prob: (slices, y, x) probability; above 0.5 it is outlined in red.

    Returns:
        (y, x, 3) uint8 in OpenCV's channel order.
    """
    columns = []
    for image, mask, p in zip(images, masks, prob, strict=True):
        low, high = float(image.min()), float(image.max())
        grey = enlarged((image - low) / max(high - low, 1e-6))
        marked = grey.copy()
        outline(marked, mask > 0, REFERENCE_BGR)
        outline(marked, p > 0.5, PREDICTION_BGR)
        columns.append(np.vstack([grey, marked, enlarged(p)]))
    return np.hstack(columns)


def enlarged(image: np.ndarray) -> np.ndarray:
    """A (y, x) image of 0..1 as grey picture, magnified by a whole number if small."""
    grey = np.round(np.clip(image, 0, 1) * 255).astype(np.uint8)
    scale = magnification(image.shape)
    grey = np.kron(grey, np.ones((scale, scale), np.uint8))
    return cv2.cvtColor(grey, cv2.COLOR_GRAY2BGR)


def outline(picture: np.ndarray, mask: np.ndarray, colour_bgr) -> None:
    """Draws the border of a (y, x) mask into its magnified picture, inside the mask."""
    scale = magnification(mask.shape)
    large = np.kron(mask.astype(np.uint8), np.ones((scale, scale), np.uint8))
    contours, _ = cv2.findContours(large, cv2.RETR_LIST, cv2.CHAIN_APPROX_NONE)
    cv2.drawContours(picture, contours, -1, colour_bgr, 1)


def magnification(size_px: tuple[int, ...]) -> int:
    return max(-(-TILE_PX // min(size_px)), 1)
