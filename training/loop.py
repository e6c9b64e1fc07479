"""A compiled model from settings, and its epochs; what every training run does alike."""

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
"""Background and target."""


def prepared_model(experiment: config.Experiment, steps_per_epoch: int) -> keras.Model:
    """The compiled network of an experiment; seed and precision policy become global.

    Args:
        experiment: Its sections batches, model, loss and train count.
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
    """A network that predicts at several levels, finest first, trained on all of them.

    The reference of a level is the mean of that of the level above over two voxels along
    each axis; so a border voxel is a share. Each level weighs half as much as the one
    above, and weights sum to 1. Metrics look at the finest level alone.

    Reference: Isensee et al. 2021 (nnU-Net), methods, network architecture; their coarser
    references are the nearest voxels.
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
    """Fixes all layers down to the lowest level, their batch statistics included."""
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
    """Batch normalisation becomes the fixed scaling that it is in use.

    Raises:
        ValueError: If the network has none.
    """
    found = [x for x in model.layers if isinstance(x, layers.BatchNormalization)]
    if not found:
        raise ValueError(
            f"train.freeze_normalisation is set, and {model.name} has no batch "
            "normalisation; expected model.norm batch"
        )
    for layer in found:
        layer.trainable = False


def batch_statistics(model: keras.Model) -> list[keras.Variable]:
    """The moving means and variances of batch normalisation, but frozen ones."""
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
        # Optimising NASNet's graph takes longer than a short run gains by it.
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
    """Trains from the epoch that `progress` names to the last, or until it stops.

    Args:
        model: From `prepared_model`, at the state of `progress`.
        training: Batches, of `data_generator.as_pydataset`.
        validation: Batches to validate on; None for no validation.
        settings: Epochs and patience.
        progress: Kept up to date.
        run_dir: Gets history, weights, state, pictures and curves.
        pictured: Images and masks for the pictures.
        by_slice: Let the classifier's validation loss choose the epoch, not the Dice.
    """
    model.fit(
        training,
        validation_data=validation,
        epochs=settings.epochs,
        initial_epoch=progress.epoch,
        shuffle=False,  # the generator shuffles; Keras would by Python's global state
        verbose="auto" if sys.stderr.isatty() else 0,
        callbacks=[
            callbacks.EpochOfBatches(training.generator),
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
