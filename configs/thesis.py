"""The thesis: NASNet-GCN-SE on 400x400 slices, generalised Dice + weighted cross-entropy.

Follows DESIGN W3 with one change: patients, not slices, are split.

    CONFIG=thesis DATA=/data/LIDC-IDRI bash scripts/all.sh
"""

from config import Augment, Batches, Experiment, Model, Postprocess, Train

THESIS = Experiment(
    batches=Batches(input_px=(400, 400), crop="centre", lung_mask=True),
    augment=Augment(flip=True, rotate_deg=15.0, zoom=0.1, shift_px=0.0),
    model=Model(name="nasnet_gcn_se", weights="imagenet"),
    train=Train(optimizer="adam", learning_rate=1e-3, epochs=50),
    postprocess=Postprocess(method="kmeans", erosion_px=5),
)

CONFIGS = {"thesis": ("The thesis as published, split by patient.", THESIS)}
