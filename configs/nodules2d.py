r"""Outlines of nodules in patches around a seed point: a click, a candidate or a known centre.

The networks are trained on patches of the LIDC-IDRI nodules with the masks of up to four
readers; 70 % of the patients train, 15 % validate and 15 % test. The network sees the middle
64 x 64 pixels. Each image is scaled by its own range, so patches of any intensity scale can
be segmented.

    CONFIG=nodule2d COHORT=patches DATA=/data/lidc_crops.zip bash scripts/all.sh

The Dice loss drives uncertain pixels to 0 or 1. `nodule2d-calibrated` therefore continues
with cross-entropy alone, so that the probability becomes the fraction of readers. Its last
weights ship as weights/nodule2d/best.weights.h5; Dice alone would choose the first epoch.

    python train.py nodule2d-calibrated --name calibrated \
        --init work/runs/nodule2d/best.weights.h5

After all choices were made, the shipped weights were trained with 91 of the validation
patients added: 24 epochs and then 6, with `--split weights/nodule2d/split.json`.
"""

from dataclasses import replace

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

NODULE2D = Experiment(
    table=Table(size_px=(128, 128), slices="all"),
    split=Split(fractions=(0.7, 0.15, 0.15)),
    batches=Batches(
        input_px=(64, 64),
        crop="seed",
        normalisation="relative",
        lung_mask=False,
        reference="votes",
        batch_size=32,
        nodule_fraction=0.0,
    ),
    augment=Augment(
        flip=True,
        rotate_deg=180.0,
        zoom=0.2,
        shift_px=4.0,
        elastic_px=1.0,
        elastic_grid_px=24.0,
        gamma=0.3,
        noise_hu=8.0,
    ),
    model=Model(name="unet2d", filters=16, norm="batch", residual=True, seeded=True),
    loss=Loss(name="image_dice_cross_entropy"),
    train=Train(
        optimizer="adamw",
        weight_decay=1e-2,
        learning_rate=1e-3,
        warmup_epochs=1.0,
        clip_norm=1.0,
        ema=0.998,
        epochs=22,
    ),
    postprocess=Postprocess(method="fixed", min_volume_mm3=0.0, within_lung=False),
)


def replace_sections(**sections: object) -> Experiment:
    """Returns `nodule2d` with some sections replaced."""
    return replace(NODULE2D, **sections)


CONFIGS = {
    "nodule2d": ("Nodules in patches around a seed point.", NODULE2D),
    "nodule2d-calibrated": (
        "Continues nodule2d with cross-entropy alone, to predict fractions of readers.",
        replace_sections(
            loss=Loss(name="weighted_cross_entropy", class_weights=(1.0, 1.0)),
            train=replace(NODULE2D.train, learning_rate=5e-4, epochs=6),
            postprocess=replace(NODULE2D.postprocess, threshold=0.43, one_nodule=True),
        ),
    ),
    "nodule2d-nasnet": (
        "nodule2d with the network of the thesis.",
        replace_sections(
            model=Model(name="nasnet_gcn_se", filters=8, seeded=True),
        ),
    ),
    "nodule2d-consensus": (
        "nodule2d trained on the consensus.",
        replace_sections(batches=replace(NODULE2D.batches, reference="consensus")),
    ),
    "nodule2d-reader": (
        "nodule2d trained on one reader at a time.",
        replace_sections(batches=replace(NODULE2D.batches, reference="reader")),
    ),
    "nodule2d-unseeded": (
        "nodule2d without the distance from the middle as input.",
        replace_sections(model=replace(NODULE2D.model, seeded=False)),
    ),
    "nodule2d-thesis": (
        "Network, loss and optimizer of the thesis, trained from scratch on the patches.",
        replace_sections(
            batches=replace(
                NODULE2D.batches, input_px=(128, 128), reference="consensus"
            ),
            augment=Augment(rotate_deg=15.0, zoom=0.1, shift_px=0.0),
            model=Model(name="nasnet_gcn_se"),
            loss=Loss(),
            train=Train(epochs=10),
        ),
    ),
}
"""Experiments by name, each with one line of help."""
