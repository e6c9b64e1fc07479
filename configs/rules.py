"""Rules that make nodules of a map or a mask; postprocess.py --rule takes one by its name."""

from typing import Literal

from config import Postprocess

Rule = Literal["voxels-150"]

RULES: dict[Rule, Postprocess] = {
    # Wherever they lie, and whatever size a voxel has: at 0.7 x 0.7 x 2.5 mm a ball of 7 mm.
    "voxels-150": Postprocess(
        method="fixed", min_volume_mm3=0.0, min_voxels=150, within_lung=False
    ),
}
