r"""Nodules in whole lungs by a 3-D U-Net; in a single slice, vessels look like nodules.

`nodule3d` suits two cores: 1 mm, crops of 64^3 voxels (6.4 cm). Half of the crops hold a
nodule, the others lie anywhere in the lungs. Half of all crops get additional simulated
nodules (`lesions.simulate_nodules`), a quarter of them ground glass. Nodules fill 0.3 % of
the crops: with Dice and plain cross-entropy the network found nothing after 400 steps, so
nodule voxels have 20 times the weight. Noise and blur are weaker than for lungs, because a
small nodule is a few voxels wide and disappears in them. If there are patients and phantoms,
three samples in ten come from patients, however few they are.

    CONFIG=nodule3d PHANTOMS=80 NODULES="5 10" bash scripts/all.sh

A scan takes 34 MB in the table (11 MB at 1.5 mm, `table.py nodule3d
--table.volume_spacing_mm 1.5`) and 95 MB of memory during training, up to 8 GiB for all scans.

`nodule3d-continued` continues from these weights, or from weights of another spacing, and
keeps their batch normalisation, because two crops give poor statistics. The weights of the
last epoch ship; the Dice over tiles would choose weights that miss more nodules.

    python train.py nodule3d-continued --name continued \
        --init work/runs/nodule3d/best.weights.h5
    cp work/runs/continued/last.weights.h5 work/runs/continued/best.weights.h5

`reduction3d` is the false-positive network, trained on the same table and split. Its crops
of 32^3 voxels (3.2 cm) are centred on a real nodule (a third), a simulated nodule (a sixth),
or another structure in the lungs that is as dense. Scans are drawn and augmented as for
`nodule3d`. One head outlines the nodule, the other gives the probability that the middle is
nodule. Candidates come from `nodule3d`, where its probability is at least
`postprocess.threshold`, and from `candidates2d`. A candidate is kept if its probability times
that of the classifier is at least `postprocess.min_score`.

    python train.py reduction3d --table work/table.h5 --split work/split.json --name reduction3d

False positives of other networks on the training scans are harder to tell from nodules than
arbitrary dense structures. So first train a network that finds candidates, and then run

    python infer.py --input SOURCE --result_dir OUT --n 1    # the input of preprocess.py
    python train.py reduction3d --candidates OUT/candidates.csv --name continued \
        --init work/runs/reduction3d/best.weights.h5

The shipped weights continue earlier ones (see their model cards).
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
        "Continues from weights of nodule3d; ships as weights/nodule3d.",
        NODULE3D_CONTINUED,
    ),
    "reduction3d": ("False-positive network: nodule or not.", REDUCTION3D),
}
"""Experiments by name, each with one line of help."""
