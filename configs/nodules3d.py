"""Nodules in whole lungs by a 3-D U-Net: what slices cannot tell, a nodule from a vessel.

`nodule3d` is for two cores: 1.5 mm, crops of 64^3 voxels (10 cm). Half of the crops hold a
nodule, the others lie anywhere in the lungs.

    CONFIG=nodule3d PHANTOMS=80 NODULES="5 10" bash scripts/all.sh
"""

from config import (
    Augment,
    Batches,
    Experiment,
    Loss,
    Model,
    Postprocess,
    Split,
    Table,
    Train,
)

NODULE3D = Experiment(
    table=Table(slices="none", volume_spacing_mm=1.5),
    split=Split(fractions=(0.75, 0.125, 0.125)),
    batches=Batches(
        input_px=(64, 64, 64),
        crop="nodule",
        window_hu=(-1024.0, 276.0),
        normalisation="population",
        lung_mask=False,
        batch_size=2,
        nodule_fraction=0.5,
    ),
    augment=Augment(
        rotate_deg=30.0,
        tilt_deg=15.0,
        zoom=0.2,
        stretch=0.1,
        shift_px=0.0,
        elastic_px=1.0,
        elastic_grid_px=24.0,
        gamma=0.2,
        curve_hu=20.0,
        contrast_hu=100.0,
        blur_px=0.8,
        noise_hu=60.0,
        noise_width_px=1.2,
        slice_px=2.0,
    ),
    model=Model(name="unet3d", filters=8, depth=4, norm="batch"),
    loss=Loss(name="dice_cross_entropy"),
    train=Train(
        optimizer="adamw",
        learning_rate=2e-3,
        weight_decay=1e-2,
        warmup_epochs=1.0,
        ema=0.99,
        epochs=40,
        steps_per_epoch=200,
        validation_tiles=200,
    ),
    postprocess=Postprocess(method="tuned"),
)

CONFIGS = {
    "nodule3d": ("Nodules by a 3-D U-Net at 1.5 mm; for two cores.", NODULE3D),
}
"""Name to (one line of help, experiment)."""
