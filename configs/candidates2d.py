r"""Nodules in slices of whole scans by a plain U-Net: candidates beside those of `nodule3d`.

In slices of native pixels a faint nodule is as wide as it is, and its haze is not averaged
away: of ground glass the 3-D network misses what this one marks. What has a probability of
`postprocess.threshold` or more is a candidate, to be judged by `reduction3d`.

    CONFIG=candidates2d PHANTOMS=80 NODULES="5 10" bash scripts/all.sh

No network of the chain may be trained on who tests another: one table can hold the slices
and volumes of all three, and has one split.

    python table.py candidates2d --table.volume_spacing_mm 1.0
    python slice_idx.py candidates2d
    python train.py candidates2d    # and nodule3d, reduction3d
"""

from dataclasses import replace

from config import Model, Postprocess
from configs.smoke import PHANTOMS

CANDIDATES2D = replace(
    PHANTOMS,
    model=Model(name="unet2d", filters=16, norm="batch", residual=True),
    train=replace(PHANTOMS.train, epochs=14),
    postprocess=Postprocess(method="fixed", threshold=0.7),
)

CONFIGS = {
    "candidates2d": ("Nodules in slices of whole scans, by a U-Net.", CANDIDATES2D),
}
"""Name to (one line of help, experiment)."""
