"""Ablations, each a difference from `thesis` or `smoke`; `experiments/` makes the tables."""

from dataclasses import replace

from config import Experiment
from configs.smoke import SMOKE
from configs.thesis import THESIS


def ablations_of(base: Experiment) -> dict[str, tuple[str, Experiment]]:
    """Returns the ablations of the thesis, applied to `base`."""
    model, loss = base.model, base.loss
    return {
        "no-gcn": (
            "Without global convolutions.",
            replace(base, model=replace(model, gcn_kernels=())),
        ),
        "no-se": (
            "Without squeeze-excite.",
            replace(base, model=replace(model, squeeze_excite=False)),
        ),
        "gdl-only": (
            "Generalised Dice loss alone.",
            replace(base, loss=replace(loss, name="generalized_dice")),
        ),
        "wce-only": (
            "Weighted cross-entropy alone.",
            replace(base, loss=replace(loss, name="weighted_cross_entropy")),
        ),
        "unet": (
            "A plain U-Net in place of NASNet-GCN-SE.",
            replace(base, model=replace(model, name="unet2d", weights="none")),
        ),
        "no-lung-mask": (
            "The whole slice enters the network.",
            replace(base, batches=replace(base.batches, lung_mask=False)),
        ),
        "slice-split": (
            "Split by slice as in the thesis, to measure how much this leaks.",
            replace(base, split=replace(base.split, unit="slice")),
        ),
    }


CONFIGS = {
    f"{prefix}-{name}": entry
    for prefix, base in (("thesis", THESIS), ("smoke", SMOKE))
    for name, entry in ablations_of(base).items()
}
