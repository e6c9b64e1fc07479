r"""Nodules in slices of whole scans by a plain U-Net: candidates beside those of `nodule3d`.

In slices of native pixels a faint nodule is as wide as it is, and its haze is not averaged
away: of ground glass the 3-D network misses what this one marks. Both sets of candidates are
judged by `reduction3d`. A component of a probability of 0.7 or more, in four voxels or more,
is a candidate, however small it is.

    CONFIG=candidates2d PHANTOMS=80 NODULES="5 10" bash scripts/all.sh

Its weights ship as weights/candidates2d.
"""

from dataclasses import replace

from config import Model, Postprocess
from configs.smoke import PHANTOMS

CANDIDATES2D = replace(
    PHANTOMS,
    model=Model(name="unet2d", filters=16, norm="batch", residual=True),
    train=replace(PHANTOMS.train, epochs=14),
    postprocess=Postprocess(
        method="fixed", threshold=0.7, min_volume_mm3=0.0, min_voxels=4
    ),
)

CONFIGS = {
    "candidates2d": ("Nodules in slices of whole scans, by a U-Net.", CANDIDATES2D),
}
"""Name to (one line of help, experiment)."""
