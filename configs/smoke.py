"""The whole chain in minutes on two cores.

make demo
"""

from dataclasses import replace

from configs.thesis import THESIS

SMOKE = replace(
    THESIS,
    batches=replace(THESIS.batches, input_px=(192, 192), crop="nodule"),
    model=replace(THESIS.model, weights="none"),
    train=replace(THESIS.train, epochs=6),
    postprocess=replace(THESIS.postprocess, method="tuned"),
)

TINY = replace(
    SMOKE,
    batches=replace(SMOKE.batches, input_px=(96, 96)),
    model=replace(SMOKE.model, name="unet2d", filters=8),
    train=replace(SMOKE.train, epochs=2, steps_per_epoch=20),
)

CONFIGS = {
    "smoke": ("Minutes on two cores; the default of the demo.", SMOKE),
    "tiny": ("A small U-Net for two minutes: does every step run?", TINY),
}
"""Name to (one line of help, experiment)."""
