"""The thesis: NASNet-GCN-SE on 400x400 slices, generalised Dice + weighted cross-entropy.

Follows Ghofrani's thesis (2020), with these differences: the split is by patient, not by
slice; the decoder also uses the encoder's stride 2, takes one tap per stride and upsamples
with aligned pixels (models/nasnet_gcn_se.py); K-means clusters the probabilities of a scan,
not of a slice, and a component needs a voxel of at least 0.5; the learning rate follows a
cosine schedule and gradients are clipped at norm 1.

    CONFIG=thesis DATA=/data/LIDC-IDRI bash scripts/all.sh
"""

from config import Augment, Batches, Experiment, LungMask, Model, Postprocess, Train

THESIS = Experiment(
    mask=LungMask(cleaning=False),
    batches=Batches(input_px=(400, 400), crop="centre", lung_mask=True),
    augment=Augment(flip=True, rotate_deg=15.0, zoom=0.1, shift_px=0.0),
    model=Model(name="nasnet_gcn_se", weights="imagenet"),
    train=Train(optimizer="adam", learning_rate=1e-3, epochs=50),
    postprocess=Postprocess(method="kmeans", erosion_px=5, min_volume_mm3=0.0),
)

CONFIGS = {"thesis": ("The setup of the thesis, but split by patient.", THESIS)}
