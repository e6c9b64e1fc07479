"""The curves of a run."""

import math

import cv2
import numpy as np

from training.curves import draw_curves


def test_curves_show_what_the_history_holds(tmp_path):
    epochs = [
        {
            "epoch": k,
            "loss": 1 / k,
            "dice": 1 - 1 / k,
            "val_loss": 2 / k,
            "val_dice": math.nan,
        }
        for k in range(1, 6)
    ]
    draw_curves(epochs, tmp_path / "with.png")
    without = [{k: v for k, v in row.items() if k != "val_loss"} for row in epochs]
    draw_curves(without, tmp_path / "without.png")
    pictures = [cv2.imread(str(tmp_path / f"{n}.png")) for n in ("with", "without")]
    # The second of matplotlib's colours is that of the validation curve.
    orange = [
        np.all(np.abs(p - np.array([14, 127, 255])) < 9, axis=2) for p in pictures
    ]
    half = orange[0].shape[1] // 2
    assert orange[0][:, :half].sum() > 100
    assert not orange[0][:, half:].any()
    assert not orange[1].any()
