"""The whole chain in minutes on two cores: small crops, few steps.

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

CONFIGS = {"smoke": ("Minutes on two cores; the default of the demo.", SMOKE)}
