"""Networks and losses by the names that settings use; the only code that imports Keras."""

from collections.abc import Callable

import keras

import config
from models import losses, nasnet_gcn_se, unet2d

MODELS: dict[str, Callable[..., keras.Model]] = {
    "nasnet_gcn_se": nasnet_gcn_se.build,
    "unet2d": unet2d.build,
}

LOSSES: dict[str, Callable] = {
    "generalized_dice": losses.generalized_dice,
    "weighted_cross_entropy": losses.weighted_cross_entropy,
    "generalized_dice_weighted_cross_entropy": (
        losses.generalized_dice_weighted_cross_entropy
    ),
    "dice_cross_entropy": losses.dice_cross_entropy,
    "focal_tversky": losses.focal_tversky,
}


def build_model(
    settings: config.Model, input_shape: tuple[int, int, int], num_classes: int
) -> keras.Model:
    """The network that `settings` describes, under the precision policy now in force.

    Args:
        settings: Name and options; those that the network does not have are not used.
        input_shape: (y, x, channels).
        num_classes: Classes of the mask, background included.

    Raises:
        ValueError: If ImageNet weights are asked of a network that has none.
    """
    options = {
        "filters": settings.filters,
        "dropout": settings.dropout,
        "slice_classifier": settings.slice_classifier,
    }
    if settings.name == "nasnet_gcn_se":
        options |= {
            "weights": settings.weights,
            "gcn_kernels": settings.gcn_kernels,
            "squeeze_excite": settings.squeeze_excite,
        }
    elif settings.weights != "none":
        raise ValueError(
            f"model.weights is {settings.weights!r}, but {settings.name} has no such "
            "weights; use --model.weights none"
        )
    return MODELS[settings.name](input_shape, num_classes, **options)


def build_loss(settings: config.Loss) -> Callable:
    """The loss that `settings` describes: a function of (y_true, y_pred)."""
    loss = LOSSES[settings.name]
    if "weighted_cross_entropy" not in settings.name:
        return loss

    def weighted(y_true, y_pred):
        return loss(y_true, y_pred, class_weights=settings.class_weights)

    return weighted
