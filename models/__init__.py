"""Builds networks and losses from settings; import it before Keras to keep TensorFlow quiet."""

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any


def import_quietly() -> None:
    """Imports TensorFlow without its banners and hints, unless TF_CPP_MIN_LOG_LEVEL is 0 or 1.

    Redirects stderr during the import, because TensorFlow writes to it before reading that
    variable: it reports as errors that there is no GPU and that oneDNN does not support bool on
    this CPU. Python exceptions still get through.
    """
    level = os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    if level < "2" or os.environ.get("KERAS_BACKEND", "tensorflow") != "tensorflow":
        return
    sys.stderr.flush()
    kept = os.dup(2)
    try:
        with Path(os.devnull).open("w") as nowhere:
            os.dup2(nowhere.fileno(), 2)
        import tensorflow as tf

        tf.config.list_physical_devices("GPU")
        # Hides the warning about retracing: a 3-D network is built for each scan shape.
        tf.get_logger().addFilter(
            lambda line: "make_predict_function" not in line.getMessage()
        )
    finally:
        os.dup2(kept, 2)
        os.close(kept)


import_quietly()

import keras  # noqa: E402

import config  # noqa: E402
from models import losses, nasnet_gcn_se, unet2d, unet3d  # noqa: E402

MODELS: dict[str, Callable[..., keras.Model]] = {
    "nasnet_gcn_se": nasnet_gcn_se.build,
    "unet2d": unet2d.build,
    "unet3d": unet3d.build,
}

LOSSES: dict[str, Callable] = {
    "generalized_dice": losses.generalized_dice,
    "weighted_cross_entropy": losses.weighted_cross_entropy,
    "generalized_dice_weighted_cross_entropy": (
        losses.generalized_dice_weighted_cross_entropy
    ),
    "dice_cross_entropy": losses.dice_cross_entropy,
    "image_dice_cross_entropy": losses.image_dice_cross_entropy,
    "dice_cross_entropy_hausdorff": losses.dice_cross_entropy_hausdorff,
    "focal_tversky": losses.focal_tversky,
}


def build_model(
    settings: config.Model,
    input_shape: tuple[int, ...],
    num_classes: int,
    **inputs: bool,
) -> keras.Model:
    """Builds the network that `settings` describes, under the current precision policy.

    Args:
        settings: Name and options; options that the network does not have are ignored.
        input_shape: (y, x, channels), or (z, y, x, channels) for unet3d.
        num_classes: Number of mask classes, background included.
        inputs: Further options of the network: `noise_input` for unet3d.

    Raises:
        ValueError: If ImageNet weights are requested for a network that has none.
    """
    options: dict[str, Any] = {"filters": settings.filters, "dropout": settings.dropout}
    match settings.name:
        case "nasnet_gcn_se":
            options |= {
                "slice_classifier": settings.slice_classifier,
                "weights": settings.weights,
                "gcn_kernels": settings.gcn_kernels,
                "squeeze_excite": settings.squeeze_excite,
                "seeded": settings.seeded,
            }
        case "unet2d":
            options |= {
                "slice_classifier": settings.slice_classifier,
                "depth": settings.depth,
                "norm": settings.norm,
                "residual": settings.residual,
                "seeded": settings.seeded,
            }
        case "unet3d":
            options |= {
                "depth": settings.depth,
                "norm": settings.norm,
                "deep_supervision": settings.deep_supervision,
                "slice_classifier": settings.slice_classifier,
                "seeded": settings.seeded,
                "cube_px": settings.mask_cube_px,
                "mask_fraction": settings.mask_fraction,
                "mask_value": settings.mask_value,
                "mask_varied": settings.mask_varied,
                **inputs,
            }
    if settings.weights != "none" and settings.name != "nasnet_gcn_se":
        raise ValueError(
            f"model.weights is {settings.weights!r}, but {settings.name} has no pretrained "
            "weights; use --model.weights none"
        )
    return MODELS[settings.name](input_shape, num_classes, **options)


def build_loss(settings: config.Loss) -> Callable:
    """Returns the loss that `settings` describes, a function of (y_true, y_pred)."""
    loss = LOSSES[settings.name]
    if "weighted_cross_entropy" not in settings.name:
        return loss

    def weighted(y_true, y_pred):
        return loss(y_true, y_pred, class_weights=settings.class_weights)

    return weighted
