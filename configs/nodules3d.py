r"""Nodules in whole lungs by a 3-D U-Net: what slices cannot tell, a nodule from a vessel.

`nodule3d` is for two cores: 1 mm, crops of 64^3 voxels (6.4 cm). Half of the crops hold a
nodule, the others lie anywhere in the lungs; into half of all, further nodules are drawn
(`lesions.simulate_nodules`), a quarter of them ground glass. Nodules fill 0.3 % of the crops:
with Dice and plain cross-entropy nothing was found after 400 steps, so nodule voxels weigh 20
times as much. Noise and blur are weaker than for lungs: a small nodule is a few voxels wide and
drowns in them. Where there are patients and phantoms, three samples in ten are of patients,
however few they are.

    CONFIG=nodule3d PHANTOMS=80 NODULES="5 10" bash scripts/all.sh

A scan takes 34 MB of the table (of 1.5 mm, `table.py nodule3d --table.volume_spacing_mm 1.5`,
11 MB), and while it trains 95 MB of memory, up to 8 GiB for all.

`nodule3d-continued` goes on from its weights, or from those of another spacing, with their
batch normalisation: the statistics of two crops say little. What the last epoch left ships;
the Dice of tiles would choose weights that miss more nodules.

    python train.py nodule3d-continued --name continued \
        --init work/runs/nodule3d/best.weights.h5
    cp work/runs/continued/last.weights.h5 work/runs/continued/best.weights.h5

`reduction3d` is the false-positive network, trained on the same table and split: crops of
32^3 voxels (3.2 cm) with a nodule in the middle, real (a third) or drawn (a sixth), or
something else in the lungs that is as dense; scans are drawn and changed as for `nodule3d`.
One head outlines, the other says whether the middle is nodule. Candidates are what `nodule3d`
gives at least `postprocess.threshold`, and what `candidates2d` marks; they are kept if that
probability times the classifier's is at least `postprocess.min_score`.

    python train.py reduction3d --table work/table.h5 --split work/split.json --name reduction3d

What else networks mark in the scans trained on is harder to tell from nodules than what is as
dense; so a network that finds candidates comes first, and then

    python infer.py --input SOURCE --result_dir OUT --n 1    # what preprocess.py read
    python train.py reduction3d --candidates OUT/candidates.csv --name continued \
        --init work/runs/reduction3d/best.weights.h5

The weights that ship went on from those of before (see their cards).
"""

from dataclasses import replace

from config import Lesions, Loss, Model, Postprocess, Split
from configs.lungs3d import LUNG3D_3MM

NODULE3D = replace(
    LUNG3D_3MM,
    table=replace(LUNG3D_3MM.table, volume_spacing_mm=1.0),
    split=Split(fractions=(0.75, 0.125, 0.125)),
    batches=replace(
        LUNG3D_3MM.batches,
        target="nodule",
        input_px=(64, 64, 64),
        crop="nodule",
        real_fraction=0.3,
    ),
    augment=replace(
        LUNG3D_3MM.augment,
        rotate_deg=30.0,
        tilt_deg=15.0,
        shift_px=0.0,
        elastic_px=1.0,
        gamma=0.2,
        contrast_hu=100.0,
        blur_px=0.5,
        noise_hu=30.0,
        noise_width_px=1.0,
        slice_px=2.5,
        field_cut=0.0,
        synthesis=0.0,
    ),
    lesions=Lesions(
        probability=0.5, findings=("nodule",), nodule_kinds=(0.6, 0.15, 0.25)
    ),
    model=Model(name="unet3d", filters=8, depth=4, norm="batch", dropout=0.1),
    loss=Loss(class_weights=(1.0, 20.0)),
    train=replace(
        LUNG3D_3MM.train,
        learning_rate=1e-3,
        epochs=40,
        steps_per_epoch=200,
        validation_tiles=200,
    ),
    postprocess=Postprocess(method="tuned"),
)

NODULE3D_CONTINUED = replace(
    NODULE3D,
    train=replace(
        NODULE3D.train,
        learning_rate=7e-4,
        epochs=26,
        steps_per_epoch=100,
        validation_tiles=80,
        freeze_normalisation=True,
    ),
)

REDUCTION3D = replace(
    NODULE3D,
    batches=replace(
        NODULE3D.batches,
        input_px=(32, 32, 32),
        crop="candidate",
        batch_size=16,
        nodule_fraction=0.35,
    ),
    lesions=replace(NODULE3D.lesions, probability=0.25),
    augment=replace(NODULE3D.augment, shift_px=2.0),
    model=Model(
        name="unet3d",
        filters=8,
        depth=3,
        norm="batch",
        dropout=0.1,
        seeded=True,
        slice_classifier=True,
    ),
    loss=Loss(name="dice_cross_entropy"),
    train=replace(NODULE3D.train, epochs=15, steps_per_epoch=100, validation_tiles=480),
    postprocess=Postprocess(
        method="fixed", threshold=0.1, min_volume_mm3=14.0, min_score=0.85
    ),
)

CONFIGS = {
    "nodule3d": ("Nodules by a 3-D U-Net at 1 mm; for two cores.", NODULE3D),
    "nodule3d-continued": (
        "Goes on from weights of nodule3d; ships as weights/nodule3d.",
        NODULE3D_CONTINUED,
    ),
    "reduction3d": ("Nodule or not: the false-positive network.", REDUCTION3D),
}
"""Name to (one line of help, experiment)."""
