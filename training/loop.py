"""Builds a compiled model from settings and trains it; shared by all training runs."""

import sys
from pathlib import Path
from typing import Any

import keras
import numpy as np
from keras import layers, ops

import config
from models import build_loss, build_model
from models.losses import PooledDice
from training import callbacks
from training.optimizers import build_optimizer

CLASSES = 2
"""Number of mask classes: background and target."""


def build_compiled_model(
    experiment: config.Experiment, steps_per_epoch: int
) -> keras.Model:
    """Builds and compiles the network of an experiment.

    Sets Keras' random seed and precision policy globally.

    Args:
        experiment: Settings; uses the sections batches, model, loss and train.
        steps_per_epoch: Batches per epoch, for the learning-rate schedule.
    """
    settings = experiment.train
    keras.utils.set_random_seed(settings.seed)
    keras.config.set_dtype_policy(settings.precision)
    on_gpu = bool(keras.distribution.list_devices("gpu"))
    if keras.backend.backend() == "tensorflow":
        prepare_tensorflow(on_gpu)
    model = build_model(experiment.model, (*experiment.batches.input_px, 1), CLASSES)
    if settings.freeze_encoder:
        freeze_encoder(model)
    if settings.freeze_normalisation:
        freeze_normalisation(model)
    if isinstance(model.output, list):
        model = DeeplySupervised(model.input, model.output, name=model.name)
    mask_loss, dice = build_loss(experiment.loss), PooledDice()
    heads = isinstance(model.output, dict)
    model.compile(
        build_optimizer(settings, steps_per_epoch, batch_statistics(model)),
        loss={"mask": mask_loss, "slice": "binary_crossentropy"}
        if heads
        else mask_loss,
        metrics={"mask": dice, "slice": keras.metrics.AUC(name="auc")}
        if heads
        else [dice],
        jit_compile="auto" if on_gpu else False,
    )
    return model


class DeeplySupervised(keras.Model):
    """Network that predicts at several levels, finest first, and is trained on all of them.

    The reference of a level averages that of the next finer level over two voxels along
    each axis, so border voxels hold fractions. Each level has half the weight of the next
    finer one, and the weights sum to 1. Metrics use the finest level alone.

    Reference: Isensee et al. 2021 (nnU-Net), methods, network architecture; they take the
    nearest voxels for the coarser references.
    """

    def compute_loss(
        self, x=None, y=None, y_pred=(), sample_weight=None, training=True
    ):
        y, total, weights = ops.cast(y, "float32"), 0.0, 0.0
        for level, prob in enumerate(y_pred):
            if level:
                y = ops.average_pool(y, 2)
            total = total + self.loss(y, prob) / 2**level
            weights += 1 / 2**level
        return total / weights

    def compute_metrics(self, x, y, y_pred, sample_weight=None):
        return super().compute_metrics(x, y, y_pred[0], sample_weight)


def freeze_encoder(model: keras.Model) -> None:
    """Freezes all encoder layers down to the deepest level, batch statistics included."""
    up = next(
        layer
        for layer in model.layers
        if isinstance(
            layer,
            layers.UpSampling2D | layers.Conv2DTranspose | layers.Conv3DTranspose,
        )
    )
    for layer in keras.Model(model.inputs, up.input).layers:
        layer.trainable = False


def freeze_normalisation(model: keras.Model) -> None:
    """Freezes batch normalisation: it becomes the fixed scaling applied at inference.

    Raises:
        ValueError: If the network has no batch normalisation.
    """
    found = [x for x in model.layers if isinstance(x, layers.BatchNormalization)]
    if not found:
        raise ValueError(
            f"train.freeze_normalisation is set, but {model.name} has no batch "
            "normalisation; expected model.norm batch"
        )
    for layer in found:
        layer.trainable = False


def batch_statistics(model: keras.Model) -> list[keras.Variable]:
    """Returns the moving means and variances of batch normalisation that is not frozen."""
    return [
        variable
        for layer in model.layers
        if isinstance(layer, layers.BatchNormalization) and layer.trainable
        for variable in (layer.moving_mean, layer.moving_variance)
    ]


def prepare_tensorflow(on_gpu: bool) -> None:
    import tensorflow as tf

    if on_gpu:
        tf.config.experimental.enable_op_determinism()
    else:
        # Optimising NASNet's graph takes longer than it saves in a short run.
        tf.config.optimizer.set_experimental_options({"disable_meta_optimizer": True})


def run_epochs(
    model: keras.Model,
    training: Any,
    validation: Any | None,
    settings: config.Train,
    progress: callbacks.Progress,
    *,
    run_dir: Path,
    pictured: tuple[np.ndarray, np.ndarray],
    by_slice: bool = False,
) -> None:
    """Trains from the epoch stored in `progress` to the last one, or until early stopping.

    Args:
        model: Network from `build_compiled_model`, in the state that `progress` describes.
        training: Training batches from `data_generator.as_pydataset`.
        validation: Validation batches; None for no validation.
        settings: Epochs and patience.
        progress: Progress of the run; updated after each epoch.
        run_dir: Directory for history, weights, state, pictures and TensorBoard curves.
        pictured: Images and masks for the pictures.
        by_slice: Choose the best epoch by the classifier's validation loss, not by Dice.
    """
    model.fit(
        training,
        validation_data=validation,
        epochs=settings.epochs,
        initial_epoch=progress.epoch,
        shuffle=False,  # the generator shuffles; Keras would use Python's global state
        verbose="auto" if sys.stderr.isatty() else 0,
        callbacks=[
            callbacks.SetGeneratorEpoch(training.generator),
            callbacks.StopAtNaN(),
            keras.callbacks.TensorBoard(run_dir / "tensorboard", write_graph=False),
            callbacks.Pictures(*pictured, run_dir / "pictures"),
            callbacks.Checkpoints(
                run_dir,
                progress,
                epochs=settings.epochs,
                patience=settings.patience,
                patience_after=settings.patience_after,
                by_slice=by_slice,
            ),
        ],
    )
