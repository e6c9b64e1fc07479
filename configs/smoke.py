"""The whole chain on two cores, in minutes (`smoke`) or in two hours (`phantoms`).

make demo
PHANTOMS=120 NODULES="5 10" CONFIG=phantoms bash scripts/all.sh
"""

from dataclasses import replace

from config import Augment, LungMask, Postprocess, Split, Table
from configs.thesis import THESIS

SMOKE = replace(
    THESIS,
    mask=LungMask(),
    split=Split(fractions=(0.6, 0.2, 0.2)),
    batches=replace(THESIS.batches, input_px=(96, 96), crop="nodule", batch_size=8),
    augment=Augment(rotate_deg=45.0, zoom=0.2, shift_px=10.0, gamma=0.2, noise_hu=30.0),
    model=replace(THESIS.model, weights="none", filters=8),
    train=replace(THESIS.train, epochs=4, ema=0.98, validation_tiles=400),
    postprocess=Postprocess(method="tuned"),
)

PHANTOMS = replace(
    SMOKE,
    table=Table(negatives_per_nodule_slice=2.0),
    split=Split(fractions=(0.75, 0.125, 0.125)),
    # Input without lung mask, because the mask cuts off parts of large nodules at the pleura.
    batches=replace(
        SMOKE.batches, input_px=(128, 128), nodule_fraction=0.375, lung_mask=False
    ),
    train=replace(
        SMOKE.train, epochs=20, steps_per_epoch=300, ema=0.99, validation_tiles=1000
    ),
)

TINY = replace(
    SMOKE,
    model=replace(SMOKE.model, name="unet2d"),
    train=replace(SMOKE.train, epochs=2, steps_per_epoch=20, ema=0.0),
)

CONFIGS = {
    "smoke": ("The demo's default; takes minutes on two cores.", SMOKE),
    "phantoms": ("Phantoms with many nodules; two hours on two cores.", PHANTOMS),
    "tiny": ("A small U-Net that tests every step in two minutes.", TINY),
}
"""Experiments by name, each with one line of help."""
