"""Segmentation losses, and the Dice metric that selects the best epoch.

All losses take y_true, (batch, y, x, classes) or (batch, z, y, x, classes) one-hot of any
dtype with background first, and y_pred, probabilities of the same shape. They compute in
float32 and return a scalar. "Pixel" means voxel when the input is a volume.
"""

import keras
from keras import KerasTensor, ops

SMALLEST = 1e-30
"""Lower bound of probabilities before the logarithm. It is far below one over the number of
pixels, so a pixel that is completely wrong keeps its gradient, and 1 / SMALLEST is still
finite in float32."""


def generalized_dice(y_true: KerasTensor, y_pred: KerasTensor) -> KerasTensor:
    """Computes the generalised Dice loss, in 0..1.

    Each class has the weight 1 / (its reference volume)^2, so 30 nodule pixels count as
    much as 160 000 background pixels. Sums run over the batch, not over single slices. A
    class that is absent from the batch gets the largest weight among the classes present;
    1 / 0 would give a constant loss of 1 without gradient. If the batch has no nodule, the
    loss is the mean nodule probability.

    Reference: Sudre et al. 2017, section 2.1; the rule for absent classes is our own.
    """
    y_true, y_pred = as_float32(y_true), as_float32(y_pred)
    axes = all_but_classes(y_pred)
    volume_true, volume_pred = ops.sum(y_true, axis=axes), ops.sum(y_pred, axis=axes)
    overlap = ops.sum(y_true * y_pred, axis=axes)
    weights = 1 / ops.square(ops.maximum(volume_true, 1))
    present = volume_true > 0
    heaviest = ops.max(ops.where(present, weights, 0))
    weights = ops.where(present, weights, heaviest)
    return 1 - 2 * ops.sum(weights * overlap) / ops.sum(
        weights * (volume_true + volume_pred)
    )


def weighted_cross_entropy(
    y_true: KerasTensor,
    y_pred: KerasTensor,
    *,
    class_weights: tuple[float, ...] = (1.0, 7.0),
) -> KerasTensor:
    """Computes the pixel mean of -(weight of the true class) * log(its probability)."""
    y_true, y_pred = as_float32(y_true), as_float32(y_pred)
    log_prob = ops.log(ops.maximum(y_pred, SMALLEST))
    weights = ops.convert_to_tensor(class_weights, dtype="float32")
    return -ops.mean(ops.sum(weights * y_true * log_prob, axis=-1))


def generalized_dice_weighted_cross_entropy(
    y_true: KerasTensor,
    y_pred: KerasTensor,
    *,
    class_weights: tuple[float, ...] = (1.0, 7.0),
) -> KerasTensor:
    """Computes generalised Dice plus weighted cross-entropy, the loss of the thesis."""
    return generalized_dice(y_true, y_pred) + weighted_cross_entropy(
        y_true, y_pred, class_weights=class_weights
    )


def dice_cross_entropy(y_true: KerasTensor, y_pred: KerasTensor) -> KerasTensor:
    """Computes soft Dice loss of the foreground classes plus cross-entropy.

    Dice is pooled over the batch. One pixel is added to numerator and denominator, so an
    empty prediction of an empty reference costs nothing.

    Reference: Isensee et al. 2021 (nnU-Net), methods: batch Dice plus cross-entropy.
    """
    overlap, missed, spurious = sum_errors(y_true, y_pred)
    dice = (2 * overlap + 1) / (2 * overlap + missed + spurious + 1)
    ones = (1.0,) * y_pred.shape[-1]
    return (
        1 - ops.mean(dice) + weighted_cross_entropy(y_true, y_pred, class_weights=ones)
    )


def image_dice_cross_entropy(y_true: KerasTensor, y_pred: KerasTensor) -> KerasTensor:
    """Computes `dice_cross_entropy` with Dice per image, averaged over the images.

    A small nodule then counts as much as a large one, as it does in scores that average
    over nodules.
    """
    true, pred = as_float32(y_true)[..., 1:], as_float32(y_pred)[..., 1:]
    axes = tuple(range(1, len(pred.shape) - 1))
    overlap = ops.sum(true * pred, axis=axes)
    volumes = ops.sum(true, axis=axes) + ops.sum(pred, axis=axes)
    dice = (2 * overlap + 1) / (volumes + 1)
    ones = (1.0,) * y_pred.shape[-1]
    return (
        1 - ops.mean(dice) + weighted_cross_entropy(y_true, y_pred, class_weights=ones)
    )


def dice_cross_entropy_hausdorff(
    y_true: KerasTensor, y_pred: KerasTensor
) -> KerasTensor:
    """Computes `dice_cross_entropy` plus `hausdorff`."""
    return dice_cross_entropy(y_true, y_pred) + hausdorff(y_true, y_pred)


def hausdorff(
    y_true: KerasTensor, y_pred: KerasTensor, *, erosions: int = 10, exponent: int = 2
) -> KerasTensor:
    """Computes an erosion-based Hausdorff loss of the foreground classes, in 0..1.

    It grows with the distance of errors from the reference border. The squared error is
    eroded repeatedly; what remains after k erosions lies k pixels deep in an error and
    costs k^exponent. One soft erosion replaces a pixel by max(2 m - 1, 0), where m is the
    mean over the pixel and its neighbours along the axes: the inside of an error stays 1
    and single pixels vanish at once. The error is mirrored at the image border.

    Reference: Karimi and Salcudean 2019, equation 8 (HD_ER, 10 erosions, exponent 2). They
    rebalance it against Dice in each epoch. We divide by the number of pixels in the union
    of reference and prediction, plus one, so the loss does not depend on the image size; it
    approaches 1 only if a large reference and its prediction do not overlap.
    """
    either = sum(sum_errors(y_true, y_pred))
    left = ops.square(as_float32(y_true)[..., 1:] - as_float32(y_pred)[..., 1:])
    axes = all_but_classes(left)
    cost, most = ops.zeros_like(either), 0
    for k in range(1, erosions + 1):
        left = erode(left)
        cost = cost + ops.sum(left, axis=axes) * k**exponent
        most += k**exponent
    return ops.mean(cost / (either + 1)) / most


def erode(error: KerasTensor) -> KerasTensor:
    """Applies one soft erosion to (batch, ..., classes) errors in 0..1; see `hausdorff`."""
    total, axes = error, range(1, len(error.shape) - 1)
    for axis in axes:
        size = error.shape[axis]
        after = [*range(1, size), size - 1]
        before = [0, *range(size - 1)]
        total = total + ops.take(error, after, axis) + ops.take(error, before, axis)
    return ops.relu(2 * total / (2 * len(axes) + 1) - 1)


def focal_tversky(
    y_true: KerasTensor,
    y_pred: KerasTensor,
    *,
    missed_weight: float = 0.7,
    exponent: float = 0.75,
) -> KerasTensor:
    """Computes (1 - Tversky index)^exponent of the foreground classes, pooled over the batch.

    Args:
        y_true: Reference.
        y_pred: Probabilities.
        missed_weight: Weight of a missed pixel; a spurious pixel has 1 - missed_weight.
        exponent: Values below 1 increase the gradient where the overlap is already good.

    Reference: Abraham and Khan 2019, equation 4 (alpha 0.7, 1 / gamma 0.75). One pixel is
    added to numerator and denominator, so two empty masks cost nothing.
    """
    overlap, missed, spurious = sum_errors(y_true, y_pred)
    index = (overlap + 1) / (
        overlap + missed_weight * missed + (1 - missed_weight) * spurious + 1
    )
    # The gradient of x^0.75 at 0 is infinite.
    shortfall = ops.maximum(1 - ops.mean(index), keras.config.epsilon())
    return ops.power(shortfall, exponent)


def sum_errors(
    y_true: KerasTensor, y_pred: KerasTensor
) -> tuple[KerasTensor, KerasTensor, KerasTensor]:
    """Sums overlap, missed and spurious pixels per foreground class; each (classes - 1,)."""
    y_true, y_pred = as_float32(y_true)[..., 1:], as_float32(y_pred)[..., 1:]
    axes = all_but_classes(y_pred)
    overlap = ops.sum(y_true * y_pred, axis=axes)
    return (
        overlap,
        ops.sum(y_true, axis=axes) - overlap,
        ops.sum(y_pred, axis=axes) - overlap,
    )


def all_but_classes(x: KerasTensor) -> tuple[int, ...]:
    return tuple(range(len(x.shape) - 1))


def as_float32(x: KerasTensor) -> KerasTensor:
    return ops.cast(x, "float32")


@keras.saving.register_keras_serializable("nodules")
class PooledDice(keras.metrics.Metric):
    """Dice of all foreground pixels, pooled over the whole epoch.

    A pixel counts as predicted if background is not its most probable class. The result is
    NaN if reference and prediction are both empty, since Dice is then undefined.
    """

    def __init__(self, name: str = "dice", **kwargs):
        super().__init__(name=name, dtype="float32", **kwargs)
        self.shared = self.add_weight(name="shared", initializer="zeros")
        self.volumes = self.add_weight(name="volumes", initializer="zeros")

    def update_state(self, y_true, y_pred, sample_weight=None):
        reference = ops.argmax(y_true, axis=-1) > 0
        predicted = ops.argmax(y_pred, axis=-1) > 0
        shared = ops.logical_and(reference, predicted)
        self.shared.assign_add(ops.sum(as_float32(shared)))
        self.volumes.assign_add(ops.sum(as_float32(reference) + as_float32(predicted)))

    def result(self):
        return 2 * self.shared / self.volumes

    def get_config(self):
        return {"name": self.name}
