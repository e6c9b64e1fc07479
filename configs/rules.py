"""Rules that turn a map or a mask into nodules; postprocess.py --rule takes one by name."""

from typing import Literal

from config import Postprocess

Rule = Literal["voxels-150"]

RULES: dict[Rule, Postprocess] = {
    # Ignores lungs and voxel size; 150 voxels of 0.7 x 0.7 x 2.5 mm are a ball of 7 mm.
    "voxels-150": Postprocess(
        method="fixed", min_volume_mm3=0.0, min_voxels=150, within_lung=False
    ),
}
