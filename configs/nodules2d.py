r"""Nodules outlined in patches around a seed: a click, a candidate, a middle that is known.

Trained on the patches of LIDC-IDRI's nodules with the masks of up to four readers; of 70 % of
the patients, 15 % choose and 15 % are tested. The middle 64 x 64 pixels enter the network,
each image on the scale of its own range, so that patches of any intensity can be segmented.

    CONFIG=nodule2d COHORT=patches DATA=/data/lidc_crops.zip bash scripts/all.sh

Dice drives what is uncertain to 0 or 1. `nodule2d-calibrated` goes on from there with
cross-entropy alone, to a probability that is the share of readers. Its last weights ship, as
weights/nodule2d/best.weights.h5; Dice alone would choose those of the first epoch.

    python train.py nodule2d-calibrated --name calibrated \
        --init work/runs/nodule2d/best.weights.h5

Once all was chosen, what ships was trained on 91 of those who chose, too: 24 epochs and then 6,
with `--split weights/nodule2d/split.json`.
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


def changed(**sections: object) -> Experiment:
    return replace(NODULE2D, **sections)


CONFIGS = {
    "nodule2d": ("Nodules in patches around a seed.", NODULE2D),
    "nodule2d-calibrated": (
        "Goes on from nodule2d with cross-entropy alone: probabilities that are votes.",
        changed(
            loss=Loss(name="weighted_cross_entropy", class_weights=(1.0, 1.0)),
            train=replace(NODULE2D.train, learning_rate=5e-4, epochs=6),
            postprocess=replace(NODULE2D.postprocess, threshold=0.43, one_nodule=True),
        ),
    ),
    "nodule2d-nasnet": (
        "The same with the network of the thesis.",
        changed(
            model=Model(name="nasnet_gcn_se", filters=8, seeded=True),
        ),
    ),
    "nodule2d-consensus": (
        "The same, trained on the consensus.",
        changed(batches=replace(NODULE2D.batches, reference="consensus")),
    ),
    "nodule2d-reader": (
        "The same, trained on one reader at a time.",
        changed(batches=replace(NODULE2D.batches, reference="reader")),
    ),
    "nodule2d-unseeded": (
        "The same, without a word on where the middle is.",
        changed(model=replace(NODULE2D.model, seeded=False)),
    ),
    "nodule2d-thesis": (
        "Network, loss and optimizer of the thesis, from scratch, on the same patches.",
        changed(
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
"""Name to (one line of help, experiment)."""
