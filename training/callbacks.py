"""Callbacks between epochs: history, weights, resumable state, pictures, early stopping."""

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
from training.curves import draw_curves
from training.optimizers import FlatOptimizer

log = logging.getLogger(__name__)

STATE = "state.npz"
"""File with everything needed to resume after an epoch; absent in a complete run."""

REFERENCE_BGR, PREDICTION_BGR = (80, 220, 80), (60, 60, 255)
TILE_PX = 256
"""Minimum height and width of a slice in the pictures."""


@dataclass
class Progress:
    """Progress of a run.

    Attributes:
        epoch: Number of finished epochs.
        best_epoch: Best epoch as chosen by `add`, counted from 1; 0 before the first.
        best_dice: Validation Dice of the best epoch; NaN without validation, and if both
            reference and prediction were empty.
        best_loss: Validation loss of the best epoch, that of the classifier if `by_slice`;
            NaN without validation.
        stopped: True if `patience` ended the run early.
        history: One row of metrics per epoch.
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
        """Records the metrics of an epoch and returns True if it is the best so far.

        The best epoch has the largest validation Dice, and among equals the smallest
        validation loss. A Dice of NaN counts as 1, since reference and prediction are then
        both empty. With `by_slice` the best epoch is the one with the smallest validation
        loss of the classifier. Without validation it is the last epoch. Patience counts
        only epochs after `patience_after`.
        """
        self.epoch += 1
        self.history.append(row)
        dice = row.get("val_dice", math.nan)
        loss = row.get("val_slice_loss" if by_slice else "val_loss", math.nan)
        ranks = [
            rank_epoch(math.nan if by_slice else score, its_loss)
            for score, its_loss in ((dice, loss), (self.best_dice, self.best_loss))
        ]
        better = not self.best_epoch or "val_dice" not in row or ranks[0] > ranks[1]
        if better:
            self.best_epoch, self.best_dice, self.best_loss = self.epoch, dice, loss
        since = self.epoch - max(self.best_epoch, patience_after)
        self.stopped = 0 < patience <= since
        return better


def rank_epoch(dice: float, loss: float) -> tuple[float, float]:
    """Returns a sort key that is larger for better epochs; see `Progress.add`."""
    return (1.0 if math.isnan(dice) else dice, -loss)


def write_state(path: Path, model: keras.Model, progress: Progress) -> None:
    """Writes weights, optimizer, dropout seeds and progress to one file, atomically."""
    arrays = {
        f"{i:05}": ops.convert_to_numpy(v) for i, v in enumerate(variables(model))
    }
    facts = {"paths": [v.path for v in variables(model)], "progress": asdict(progress)}
    arrays["facts"] = np.frombuffer(json.dumps(facts).encode(), np.uint8)
    with files.write_atomically(path) as partial, partial.open("wb") as file:
        np.savez(file, **arrays)


def read_state(path: Path, model: keras.Model) -> Progress:
    """Restores a compiled model from a file that `write_state` wrote; returns the progress.

    Raises:
        ValueError: If the state belongs to another network or optimizer.
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
    """Returns all variables needed to resume training, in a fixed order."""
    if not model.optimizer.built:
        model.optimizer.build(model.trainable_variables)
    return [*model.variables, *model.optimizer.variables]


@contextmanager
def use_averaged_weights(model: keras.Model) -> Iterator[None]:
    """Gives the model its averaged weights in the block, if the optimizer averages them."""
    # Under mixed_float16 Keras wraps the optimizer in a loss-scaling one.
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
    """Writes the weights for inference: their moving average if there is one."""
    with use_averaged_weights(model), files.write_atomically(path) as partial:
        without_optimizer(model).save_weights(partial)


def without_optimizer(model: keras.Model) -> keras.Model:
    """Returns an uncompiled model with the same layers.

    The weights file of a compiled model also contains, and requires, optimizer variables.
    """
    return keras.Model(model.inputs, model.output, name=model.name)


def write_history(path: Path, history: list[dict[str, float]]) -> None:
    """Writes one CSV row per epoch."""
    with files.write_atomically(path) as partial, partial.open("w", newline="") as file:
        rows = csv.DictWriter(file, list(history[0]))
        rows.writeheader()
        rows.writerows(history)


class Checkpoints(keras.callbacks.Callback):
    """Callback that writes best weights, history.csv and state, logs, and stops early.

    The state is written last in each epoch and names the epoch. A run that is killed at any
    moment resumes from the end of its last complete epoch and rewrites whatever it had written
    since.

    Args:
        run_dir: Directory for the files.
        progress: Progress to continue; empty for a new run.
        epochs: Epochs of the whole run.
        patience: Epochs without a better validation score before stopping; 0 for never.
        patience_after: Epochs before that count begins.
        by_slice: Choose the best epoch by the classifier's loss; see `Progress.add`.
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
        self.average = use_averaged_weights(self.model)
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
        draw_curves(self.progress.history, self.run_dir / "curves.png")
        write_state(self.run_dir / STATE, self.model, self.progress)
        log.info("%s", epoch_line(self.progress, self.epochs))
        if self.progress.stopped:
            self.model.stop_training = True


def in_order(logs: dict[str, Any]) -> dict[str, float]:
    """Returns Keras' logs with plain names, in an order that is the same in all runs.

    For a network with two outputs Keras calls the Dice of the mask `mask_dice`.
    """
    renamed = {name.replace("mask_dice", "dice"): float(logs[name]) for name in logs}
    return {
        name: renamed[name]
        for name in sorted(renamed, key=lambda name: (name.startswith("val_"), name))
    }


def epoch_line(progress: Progress, epochs: int) -> str:
    """Returns a log line about the last epoch, e.g. 'epoch 3 of 50: loss 0.5214, ...'."""
    row = progress.history[-1]
    scores = f"loss {row['loss']:.4f}, Dice {row['dice']:.4f}"
    if "val_dice" in row:
        scores += (
            f", validation Dice {row['val_dice']:.4f} (best {progress.best_dice:.4f}, "
            f"epoch {progress.best_epoch})"
        )
    if "val_slice_auc" in row:
        scores += f", classifier AUC {row['val_slice_auc']:.4f}"
    latest = [row["seconds"] for row in progress.history[-3:]]
    left = (epochs - progress.epoch) * sum(latest) / len(latest)
    return (
        f"epoch {progress.epoch} of {epochs}: {scores}, "
        f"{steps.duration_text(row['seconds'])}, {steps.duration_text(left)} left"
    )


class StopAtNaN(keras.callbacks.Callback):
    """Callback that raises ValueError at the first batch whose loss is not finite."""

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


class SetGeneratorEpoch(keras.callbacks.Callback):
    """Callback that sets the generator's epoch before its first batch is requested.

    Args:
        generator: Object whose batches depend on its attribute `epoch`.
    """

    def __init__(self, generator: Any):
        super().__init__()
        self.generator = generator

    def on_epoch_begin(self, epoch, logs=None):
        self.generator.epoch = epoch


class Pictures(keras.callbacks.Callback):
    """Callback that draws the predictions for the same few slices after each epoch.

    Volumes are shown by their middle slices.

    Args:
        images: (slices, y, x, 1) or (volumes, z, y, x, 1) input.
        masks: Reference of 0 and 1, shaped like `images` without the last axis.
        pictures_dir: Directory for epoch-0001.png and so on.
    """

    def __init__(self, images: np.ndarray, masks: np.ndarray, pictures_dir: Path):
        super().__init__()
        self.images = images
        self.masks = masks
        self.pictures_dir = pictures_dir

    def on_epoch_end(self, epoch, logs=None):
        with use_averaged_weights(self.model):
            prob = np.stack([self.predicted(image) for image in self.images])
        images = middle_slices(self.images[..., 0])
        picture = prediction_picture(images, middle_slices(self.masks), prob)
        path = self.pictures_dir / f"epoch-{epoch + 1:04}.png"
        with files.write_atomically(path) as partial:
            cv2.imwrite(str(partial), picture)

    def predicted(self, image: np.ndarray) -> np.ndarray:
        """Returns the (y, x) foreground probability of one image.

        Images are not batched, because a batch may exceed memory.
        """
        outputs = self.model(image[None], training=False)
        if isinstance(outputs, dict):
            outputs = outputs["mask"]
        elif isinstance(outputs, list):
            outputs = outputs[0]
        prob = ops.convert_to_numpy(outputs)[..., 1:].sum(-1)
        return middle_slices(prob)[0]


def middle_slices(images: np.ndarray) -> np.ndarray:
    """Returns (n, y, x) images unchanged, or the middle slice of each (n, z, y, x) volume."""
    return images if images.ndim == 3 else images[:, images.shape[1] // 2]


def prediction_picture(
    images: np.ndarray, masks: np.ndarray, prob: np.ndarray
) -> np.ndarray:
    """Draws one column per slice: image, image with outlines, probability as grey value.

    Args:
        images: (slices, y, x) float; each is scaled from its minimum to its maximum.
        masks: (slices, y, x) reference, outlined in green.
        prob: (slices, y, x) probability; the region above 0.5 is outlined in red.

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
    """Converts a (y, x) image in 0..1 to a grey picture, magnified by an integer if small."""
    grey = np.round(np.clip(image, 0, 1) * 255).astype(np.uint8)
    scale = magnification(image.shape)
    grey = np.kron(grey, np.ones((scale, scale), np.uint8))
    return cv2.cvtColor(grey, cv2.COLOR_GRAY2BGR)


def outline(picture: np.ndarray, mask: np.ndarray, colour_bgr) -> None:
    """Draws the inner border of a (y, x) mask into its magnified picture."""
    scale = magnification(mask.shape)
    large = np.kron(mask.astype(np.uint8), np.ones((scale, scale), np.uint8))
    contours, _ = cv2.findContours(large, cv2.RETR_LIST, cv2.CHAIN_APPROX_NONE)
    cv2.drawContours(picture, contours, -1, colour_bgr, 1)


def magnification(size_px: tuple[int, ...]) -> int:
    return max(-(-TILE_PX // min(size_px)), 1)
