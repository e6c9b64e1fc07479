"""Lungs in 2-D slices, with simulated pathology in different fractions of the samples.

The recipe follows the study on lung segmentation irrespective of pathology: a U-Net trained
with Dice and cross-entropy by AdamW, gradients clipped at norm 1, four batches of eight
accumulated per step, lesions in 8 of 10 samples. These choices are ours: the split of
70/10/20 (train, validation, test; theirs is 70/20/10), the 400x400 pixels around the centre
as in the thesis, the augmentation, the weight decay and the learning rate. `lung2d-small`
suits two cores: slices with 1.5 mm pixels, fewer filters, no accumulation, batch
normalisation, and also slices without lung.

    CONFIG=lung2d-pathology DATA=/data/LIDC-IDRI bash scripts/all.sh
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

LUNG2D = Experiment(
    table=Table(slices="lung"),
    split=Split(fractions=(0.7, 0.1, 0.2)),
    batches=Batches(
        target="lung",
        input_px=(400, 400),
        crop="centre",
        lung_mask=False,
        batch_size=8,
        nodule_fraction=0.0,
    ),
    augment=Augment(
        flip=False,
        rotate_deg=15.0,
        zoom=0.2,
        shift_px=20.0,
        elastic_px=3.0,
        gamma=0.2,
        noise_hu=30.0,
    ),
    model=Model(name="unet2d", filters=32),
    loss=Loss(name="dice_cross_entropy"),
    train=Train(
        optimizer="adamw",
        weight_decay=1e-2,
        learning_rate=1e-3,
        clip_norm=1.0,
        accumulate=4,
        epochs=50,
    ),
)

SMALL = replace(
    LUNG2D,
    table=replace(LUNG2D.table, slices="all"),
    batches=replace(LUNG2D.batches, pixel_mm=1.5, input_px=(256, 256)),
    augment=replace(LUNG2D.augment, flip=True, shift_px=12.0, elastic_px=1.5),
    model=replace(LUNG2D.model, filters=8, norm="batch"),
    train=replace(
        LUNG2D.train,
        accumulate=1,
        warmup_epochs=1.0,
        epochs=6,
        steps_per_epoch=60,
        validation_tiles=240,
    ),
)
"""1.5 mm pixels, so that two cores can train on whole slices, even of the abdomen."""


def make_pathology_experiments(
    name: str, base: Experiment
) -> dict[str, tuple[str, Experiment]]:
    """Returns `base` with lesions in various fractions of samples, and a residual encoder."""

    def lesioned(share: float, **options) -> Experiment:
        return replace(base, lesions=Lesions(probability=share, **options))

    ablation = {
        f"{name}-p{digits}": (f"Circles in {share:.0%} of the samples.", entry)
        for digits, share in (("0", 0.0), ("06", 0.6), ("08", 0.8), ("09", 0.9))
        for entry in [lesioned(share, kind="circles")]
    }
    return ablation | {
        f"{name}-pathology": (
            "Lungs with realistic lesions in 8 of 10 samples.",
            lesioned(0.8),
        ),
        f"{name}-residual": (
            "Lungs with realistic lesions and a residual encoder.",
            replace(lesioned(0.8), model=replace(base.model, residual=True)),
        ),
    }


COARSE = replace(
    SMALL,
    lesions=Lesions(probability=0.8),
    train=replace(SMALL.train, learning_rate=2e-3, ema=0.99, epochs=16),
)

CONFIGS = {
    "lung2d": ("Lungs in slices, by a U-Net.", LUNG2D),
    "lung2d-small": ("Small version of lung2d for two cores.", SMALL),
    "lung2d-coarse": (
        "Longer training with realistic lesions; ships as weights/lung2d.",
        COARSE,
    ),
    **make_pathology_experiments("lung2d", LUNG2D),
    **make_pathology_experiments("lung2d-small", SMALL),
}
"""Experiments by name, each with one line of help."""
