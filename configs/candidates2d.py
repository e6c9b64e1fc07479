r"""Nodules in slices of whole scans by a plain U-Net; adds candidates to those of `nodule3d`.

Slices keep their native pixels, so faint nodules keep their width and their haze is not
averaged away: this network marks ground-glass nodules that the 3-D network misses. Voxels
with a probability of at least `postprocess.threshold` become candidates for `reduction3d`.

    CONFIG=candidates2d PHANTOMS=80 NODULES="5 10" bash scripts/all.sh

No network of the chain may train on a patient whom another network tests on. One table can
hold the slices and volumes of all three networks, and it has one split.

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
"""Experiments by name, each with one line of help."""
