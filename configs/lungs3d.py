"""Whole lungs in volumes by a 3-D U-Net that is trained with random cubes hidden.

`lung3d` is the setup of Zhuang et al. 2025 at full size: 2 mm, the whole chest in 224^3
voxels, HU clipped to -1024..276 and normalised by the mean and standard deviation of their
population, and 70 % of the 7-voxel cubes replaced by 1. It needs a GPU with 24 GB or more.
It differs in three points: cubes lie at random offsets, samples are augmented, and the loss
is Dice + cross-entropy with AdamW.

`lung3d-3mm` suits two cores: 3 mm, crops of 80^3 voxels (24 cm), cubes of 5 voxels (15 mm;
theirs are 14 mm). It trains on crops but runs on whole chests, with and without hidden
cubes. It therefore uses batch normalisation, because instance statistics change with the
field of view, and it hides from 0 to 70 % of the cubes in training.

    python table.py lung3d-3mm && python slice_idx.py lung3d-3mm
    python train.py lung3d-3mm --name lung3d
"""

from dataclasses import replace

from config import (
    Augment,
    Batches,
    Experiment,
    Lesions,
    Loss,
    Model,
    Split,
    Table,
    Train,
)

LUNG3D_3MM = Experiment(
    table=Table(slices="none", volume_spacing_mm=3.0),
    split=Split(fractions=(0.8, 0.1, 0.1)),
    batches=Batches(
        target="lung",
        input_px=(80, 80, 80),
        crop="lung",
        window_hu=(-1024.0, 276.0),
        normalisation="population",
        lung_mask=False,
        batch_size=2,
    ),
    augment=Augment(
        rotate_deg=20.0,
        tilt_deg=12.0,
        zoom=0.2,
        stretch=0.1,
        shift_px=10.0,
        elastic_px=1.5,
        elastic_grid_px=24.0,
        gamma=0.3,
        curve_hu=20.0,
        contrast_hu=150.0,
        blur_px=1.2,
        noise_hu=80.0,
        noise_width_px=1.5,
        slice_px=3.0,
        field_cut=0.25,
        synthesis=0.2,
    ),
    lesions=Lesions(probability=0.7),
    model=Model(
        name="unet3d",
        filters=8,
        depth=4,
        norm="batch",
        mask_fraction=0.7,
        mask_cube_px=5,
        mask_value=1.0,
        mask_varied=True,
    ),
    loss=Loss(name="dice_cross_entropy"),
    train=Train(
        optimizer="adamw",
        learning_rate=2e-3,
        weight_decay=1e-2,
        warmup_epochs=1.0,
        ema=0.99,
        epochs=60,
        steps_per_epoch=100,
        validation_tiles=40,
    ),
)

LUNG3D = replace(
    LUNG3D_3MM,
    table=replace(LUNG3D_3MM.table, volume_spacing_mm=2.0),
    batches=replace(
        LUNG3D_3MM.batches, input_px=(224, 224, 224), crop="centre", batch_size=1
    ),
    augment=replace(
        LUNG3D_3MM.augment,
        shift_px=15.0,
        elastic_px=2.0,
        elastic_grid_px=36.0,
        blur_px=1.8,
        slice_px=4.0,
    ),
    model=replace(
        LUNG3D_3MM.model,
        filters=16,
        depth=5,
        norm="instance",
        mask_cube_px=7,
        mask_varied=False,
        deep_supervision=True,
    ),
    train=replace(LUNG3D_3MM.train, epochs=200, steps_per_epoch=250),
)


LUNG3D_ANYWHERE = replace(
    LUNG3D_3MM,
    batches=replace(LUNG3D_3MM.batches, crop="body", real_fraction=0.5),
    augment=replace(LUNG3D_3MM.augment, gas=0.6, zoom=0.35),
    train=replace(LUNG3D_3MM.train, learning_rate=1e-3, epochs=16, steps_per_epoch=60),
)


def without_masking(base: Experiment, *, dropout: float = 0.0) -> Experiment:
    """Returns `base` without hidden cubes, optionally with dropout."""
    return replace(base, model=replace(base.model, mask_fraction=0.0, dropout=dropout))


CONFIGS = {
    "lung3d": ("3-D U-Net with hidden cubes, whole chests at 2 mm; for a GPU.", LUNG3D),
    "lung3d-3mm": ("3-D U-Net with hidden cubes at 3 mm; for two cores.", LUNG3D_3MM),
    "lung3d-anywhere": (
        "Continues lung3d-3mm on whole bodies, with bowel gas; --init its weights.",
        LUNG3D_ANYWHERE,
    ),
    "lung3d-nomask": (
        "lung3d-3mm without hidden cubes.",
        without_masking(LUNG3D_3MM),
    ),
    "lung3d-mask30": (
        "lung3d-3mm with up to 30 % of the cubes hidden.",
        replace(LUNG3D_3MM, model=replace(LUNG3D_3MM.model, mask_fraction=0.3)),
    ),
    "lung3d-dropout": (
        "lung3d-3mm with dropout instead of hidden cubes.",
        without_masking(LUNG3D_3MM, dropout=0.2),
    ),
}
"""Experiments by name, each with one line of help."""
