"""Losses on masks small enough to compute by hand."""

import math

import keras
import numpy as np
import pytest
from keras import ops

from models import LOSSES, losses

# Eight pixels, two of them nodule.
MASK = np.array([[[0, 0, 0, 0], [0, 0, 1, 1]]])
EMPTY = np.zeros_like(MASK)


def one_hot(mask):
    return np.eye(2, dtype=np.uint8)[mask]


def certain(mask):
    return one_hot(mask).astype(np.float32)


def even(p):
    """Probability p of nodule in all eight pixels."""
    return np.stack([np.full(MASK.shape, 1 - p), np.full(MASK.shape, p)], -1).astype(
        np.float32
    )


def test_generalized_dice_of_even_odds():
    # Weights: background 1/6^2, nodule 1/2^2. Overlaps 3 and 1; volumes 6 + 4 and 2 + 4.
    overlap = 3 / 36 + 1 / 4
    volumes = 10 / 36 + 6 / 4
    found = losses.generalized_dice(one_hot(MASK), even(0.5))
    assert float(found) == pytest.approx(1 - 2 * overlap / volumes, abs=1e-6)


def test_generalized_dice_without_nodules_is_the_mean_probability_of_nodule():
    # Both weights are the background's: 1 - 2 * 8 (1 - p) / (8 + 8).
    found = losses.generalized_dice(one_hot(EMPTY), even(0.3))
    assert float(found) == pytest.approx(0.3, abs=1e-6)


def test_weighted_cross_entropy_of_even_odds():
    # Six pixels of weight 1 and two of weight 7, each -log(1/2), over eight pixels.
    found = losses.weighted_cross_entropy(one_hot(MASK), even(0.5))
    assert float(found) == pytest.approx((6 + 14) / 8 * math.log(2), abs=1e-6)


def test_class_weights_are_in_the_order_of_the_classes():
    found = losses.weighted_cross_entropy(
        one_hot(MASK), even(0.25), class_weights=(2.0, 5.0)
    )
    by_hand = (6 * 2 * -math.log(0.75) + 2 * 5 * -math.log(0.25)) / 8
    assert float(found) == pytest.approx(by_hand, abs=1e-6)


def test_the_thesis_loss_is_the_sum_of_its_two():
    y_true, y_pred = one_hot(MASK), even(0.2)
    total = losses.generalized_dice_weighted_cross_entropy(y_true, y_pred)
    parts = losses.generalized_dice(y_true, y_pred) + losses.weighted_cross_entropy(
        y_true, y_pred
    )
    assert float(total) == pytest.approx(float(parts), abs=1e-6)


def test_dice_cross_entropy_of_even_odds():
    # Overlap 1, volumes 2 + 4, one pixel added: (2 + 1) / (6 + 1); cross-entropy log 2.
    found = losses.dice_cross_entropy(one_hot(MASK), even(0.5))
    assert float(found) == pytest.approx(1 - 3 / 7 + math.log(2), abs=1e-6)


def test_image_dice_is_the_mean_over_images_whatever_their_size():
    # One image of MASK (2 of 8 pixels), one without: Dice (2 * 1 + 1) / (2 + 4 + 1) and
    # (0 + 1) / (0 + 4 + 1); together, in one Dice, (2 + 1) / (2 + 8 + 1).
    masks, odds = np.concatenate([MASK, EMPTY]), np.concatenate([even(0.5)] * 2)
    found = losses.image_dice_cross_entropy(one_hot(masks), odds)
    expected = 1 - (3 / 7 + 1 / 5) / 2 + math.log(2)
    assert float(found) == pytest.approx(expected, abs=1e-6)
    pooled = losses.dice_cross_entropy(one_hot(masks), odds)
    assert float(pooled) == pytest.approx(1 - 3 / 11 + math.log(2), abs=1e-6)


def test_focal_tversky_of_even_odds():
    # Overlap 1, missed 1, spurious 3: index (1 + 1) / (1 + 0.7 + 0.3 * 3 + 1) = 2 / 3.6.
    found = losses.focal_tversky(one_hot(MASK), even(0.5))
    assert float(found) == pytest.approx((1 - 2 / 3.6) ** 0.75, abs=1e-6)


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
@pytest.mark.parametrize("mask", [MASK, EMPTY], ids=["nodule", "empty"])
def test_a_perfect_prediction_costs_nothing(loss, mask):
    # Focal Tversky stops at 1e-7 ^ 0.75 = 6e-6, where its slope would grow.
    assert float(loss(one_hot(mask), certain(mask))) == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
def test_nearer_to_the_reference_costs_less(loss):
    right, wrong = (0.9 * certain(m) + 0.05 for m in (MASK, 1 - MASK))
    costs = [float(loss(one_hot(MASK), p)) for p in (right, even(0.5), wrong)]
    assert costs == sorted(costs)
    assert len(set(costs)) == 3


def slope(loss, mask, logits):
    """Gradient of the loss by the logits before the softmax, on the present backend."""
    import tensorflow as tf

    x = tf.Variable(logits, dtype=tf.float32)
    with tf.GradientTape() as tape:
        cost = loss(one_hot(mask), ops.softmax(x, axis=-1))
    return float(cost), tape.gradient(cost, x).numpy()


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
@pytest.mark.parametrize("mask", [MASK, EMPTY], ids=["nodule", "empty"])
@pytest.mark.parametrize("sign", [1, -1], ids=["right", "wrong"])
@pytest.mark.parametrize("size", [1.0, 60.0, 1e4])
def test_the_slope_is_finite_for_sure_predictions(loss, mask, sign, size):
    cost, gradient = slope(loss, mask, sign * size * (2 * certain(mask) - 1))
    assert np.isfinite(cost)
    assert np.isfinite(gradient).all()


def test_a_pixel_that_is_quite_wrong_still_has_its_slope():
    # Probability e^-40 = 4e-18 of the truth; d/dlogit of -7 log p / 8 is -7 (1 - p) / 8.
    logits = -20 * (2 * certain(MASK) - 1)
    _, gradient = slope(losses.weighted_cross_entropy, MASK, logits)
    np.testing.assert_allclose(gradient[MASK > 0][:, 1], -7 / 8, rtol=1e-5)


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
def test_half_precision_input_is_computed_in_float32(loss):
    mask = np.zeros((1, 512, 512), int)  # background's volume squared is beyond float16
    mask[0, :3, :3] = 1
    prob = np.stack([np.full(mask.shape, 0.75), np.full(mask.shape, 0.25)], -1)
    half = ops.convert_to_tensor(prob, "float16")
    found = loss(one_hot(mask), half)
    assert keras.backend.standardize_dtype(found.dtype) == "float32"
    whole = loss(one_hot(mask), ops.convert_to_tensor(prob, "float32"))
    assert float(found) == pytest.approx(float(whole), rel=1e-6)


def test_dice_is_pooled_over_the_epoch():
    metric = losses.PooledDice()
    metric.update_state(one_hot(MASK), certain(MASK))  # 2 shared, 2 + 2
    metric.update_state(one_hot(EMPTY), certain(MASK))  # 0 shared, 0 + 2
    assert float(metric.result()) == pytest.approx(2 * 2 / 6)
    metric.reset_state()
    metric.update_state(one_hot(MASK), even(0.5 - 1e-3))
    assert float(metric.result()) == 0


def test_dice_of_nothing_is_undefined():
    metric = losses.PooledDice()
    metric.update_state(one_hot(EMPTY), certain(EMPTY))
    assert math.isnan(float(metric.result()))


# Of volumes: the same eight places, as (1, 2, 2, 2).
CUBE = MASK.reshape(1, 2, 2, 2)


@pytest.mark.parametrize("name", [name for name in LOSSES if "hausdorff" not in name])
def test_a_volume_costs_what_a_slice_of_its_voxels_costs(name):
    """Only the Hausdorff loss asks who is whose neighbour."""
    loss = LOSSES[name]
    prob = np.random.default_rng(0).uniform(0.1, 0.9, (*MASK.shape, 1))
    prob = np.concatenate((1 - prob, prob), -1).astype(np.float32)
    flat, volume = (
        float(loss(y, p))
        for y, p in (
            (one_hot(MASK), prob),
            (one_hot(CUBE), prob.reshape(1, 2, 2, 2, 2)),
        )
    )
    assert volume == pytest.approx(flat, abs=1e-6)


def test_generalized_dice_of_a_volume_of_even_odds():
    overlap, volumes = 3 / 36 + 1 / 4, 10 / 36 + 6 / 4
    found = losses.generalized_dice(one_hot(CUBE), even(0.5).reshape(1, 2, 2, 2, 2))
    assert float(found) == pytest.approx(1 - 2 * overlap / volumes, abs=1e-6)


def test_dice_of_volumes_is_pooled():
    metric = losses.PooledDice()
    metric.update_state(one_hot(CUBE), certain(CUBE))
    metric.update_state(one_hot(1 - CUBE), certain(CUBE))  # 0 shared, 6 + 2
    assert float(metric.result()) == pytest.approx(2 * 2 / (4 + 8))


def blob(size):
    """A mask of 9 x 9 pixels with a wrong square in the middle."""
    mask = np.zeros((1, 9, 9), int)
    mask[0, 4 - size // 2 : 5 + size // 2, 4 - size // 2 : 5 + size // 2] = 1
    return mask


def test_hausdorff_of_a_small_square_by_hand():
    # An error of 3 x 3. Once eroded: middle 2 * 5/5 - 1 = 1, sides 2 * 4/5 - 1 = 0.6,
    # corners 2 * 3/5 - 1 = 0.2. Twice: middle 2 * 3.4/5 - 1 = 0.36, sides and corners
    # nothing (2 * 2/5 and 2 * 1.4/5 are below 1). Three times: nothing.
    found = losses.hausdorff(one_hot(blob(1) * 0), certain(blob(3)), erosions=3)
    once, twice = 1 + 4 * 0.6 + 4 * 0.2, 0.36
    assert float(found) == pytest.approx((once + twice * 4) / (9 + 1) / (1 + 4 + 9))


def test_hausdorff_of_a_single_pixel_is_nothing_and_of_all_wrong_near_one():
    empty = one_hot(blob(1) * 0)
    assert float(losses.hausdorff(empty, certain(blob(1)))) == 0
    assert float(
        losses.hausdorff(empty, 1 - certain(empty[..., 1] * 0))
    ) == pytest.approx(81 / 82)


def test_hausdorff_does_not_depend_on_how_much_is_neither():
    small, large = np.zeros((1, 20, 20), int), np.zeros((1, 60, 60), int)
    small[0, 5:15, 5:15], large[0, 5:15, 5:15] = 1, 1
    costs = [
        float(losses.hausdorff(one_hot(m), certain(m * 0))) for m in (small, large)
    ]
    assert costs[0] == pytest.approx(costs[1], rel=1e-5)
    assert costs[0] > 0


def test_hausdorff_asks_more_for_deep_errors_than_for_many():
    one_deep, four_shallow = np.zeros((2, 1, 20, 20), int)
    one_deep[0, 4:12, 4:12] = 1
    for y, x in ((2, 2), (2, 12), (12, 2), (12, 12)):
        four_shallow[0, y : y + 4, x : x + 4] = 1
    assert one_deep.sum() == four_shallow.sum()
    deep, shallow = (
        float(losses.hausdorff(one_hot(m * 0), certain(m)))
        for m in (one_deep, four_shallow)
    )
    assert deep > 4 * shallow


def test_erosion_in_three_dimensions_asks_six_neighbours():
    error = np.zeros((1, 5, 5, 5, 1), np.float32)
    error[0, 2, 2, 1:4] = 1
    # The middle has two of six neighbours: 2 * 3/7 - 1 is below 0.
    assert float(ops.max(losses.erode(error))) == 0
    error[0, 1:4, 1:4, 1:4] = 1
    found = np.asarray(losses.erode(error))[0, ..., 0]
    assert found[2, 2, 2] == pytest.approx(1)
    assert found[2, 2, 1] == pytest.approx(2 * 6 / 7 - 1)
    assert found[1, 1, 1] == pytest.approx(2 * 4 / 7 - 1)
