"""Fixtures: scans small enough to reason about by hand."""

import functools
import json
from dataclasses import replace

import numpy as np
import pytest

import config
from ct.geometry import Grid
from ct.scan import AIR_HU, LEFT, RIGHT, Annotation, Nodule, Scan

SHAPE = (24, 64, 64)
SPACING_MM = (2.5, 1.5, 1.5)


def ball(centre_zyx, radius_mm):
    """Bool (z, y, x) of voxels whose centre lies within `radius_mm` of a voxel."""
    axes = np.ogrid[tuple(slice(n) for n in SHAPE)]
    return (
        sum(
            ((axis - c) * s) ** 2
            for axis, c, s in zip(axes, centre_zyx, SPACING_MM, strict=True)
        )
        <= radius_mm**2
    )


def canonical_grid(shape=SHAPE, spacing_mm=SPACING_MM):
    """A grid whose axes rise to S, P, L: RAS x and y fall with the index."""
    affine = np.zeros((4, 4))
    affine[2, 0], affine[1, 1], affine[0, 2] = spacing_mm * np.array([1, -1, -1])
    affine[:, 3] = (48.0, 48.0, -30.0, 1.0)
    return Grid(tuple(shape), affine)


def tiny_scan(index=0):
    """A body of water with two lungs of air and two nodules, read by four readers.

    Readers 0 to 3 outlined nodule 1 (reader r a ball of 5 + r/2 mm); readers 0 and 1
    outlined nodule 2 (4 mm). `index` moves nodule 1 and names scan and patient.
    """
    rng = np.random.default_rng(index)
    hu = np.full(SHAPE, AIR_HU, np.int16)
    y, x = np.ogrid[: SHAPE[1], : SHAPE[2]]
    hu[:, ((y - 32) / 28) ** 2 + ((x - 32) / 31) ** 2 <= 1] = 40
    lung = np.zeros(SHAPE, np.uint8)
    for label, centre_x in ((RIGHT, 18), (LEFT, 46)):
        lung[3:21, ((y - 32) / 18) ** 2 + ((x - centre_x) / 11) ** 2 <= 1] = label
    hu[lung > 0] = -850
    reader_bits = np.zeros(SHAPE, np.uint8)
    nodule_labels = np.zeros(SHAPE, np.uint8)
    nodules = []
    for label, centre, radii_mm in (
        (1, (10, 30 + index % 5, 18), (5.0, 5.5, 6.0, 6.5)),
        (2, (14, 34, 46), (4.0, 4.0)),
    ):
        annotations = []
        for reader, radius_mm in enumerate(radii_mm):
            mask = ball(centre, radius_mm)
            reader_bits[mask] |= 1 << reader
            nodule_labels[mask] = label
            volume_mm3 = float(mask.sum() * np.prod(SPACING_MM))
            annotations.append(
                Annotation(reader, volume_mm3, 2 * radius_mm, {"malignancy": 3})
            )
        hu[ball(centre, radii_mm[0])] = 20
        centre_ras = canonical_grid().index_to_ras_mm(np.array(centre))
        nodules.append(Nodule(label, tuple(centre_ras.tolist()), tuple(annotations)))
    hu += rng.normal(0, 15, SHAPE).astype(np.int16)
    return Scan(
        scan_id=f"scan-{index:03}",
        patient_id=f"patient-{index:03}",
        hu=hu,
        grid=canonical_grid(),
        source_grid=canonical_grid(),
        lung=lung,
        reader_bits=reader_bits,
        nodule_labels=nodule_labels,
        nodules=tuple(nodules),
    )


def chest(shape=(40, 200, 200)):
    """A body with two lungs, a trachea above them and a table below; and its parts.

    Returns:
        (z, y, x) int16 HU, and bool masks of the right lung, left lung and trachea.
    """
    z, y, x = np.ogrid[tuple(slice(n) for n in shape)]
    hu = np.full(shape, -1000, np.int16)
    hu[:, 175:180, 40:160] = 100  # table, with a gap to the body
    body = ((y - 95) / 75) ** 2 + ((x - 100) / 90) ** 2 + 0 * z <= 1
    hu[body] = 40
    right, left = (
        (((y - 95) / 45) ** 2 + ((x - middle) / 27) ** 2 <= 1) & (z >= 4) & (z < 30)
        for middle in (65, 135)
    )
    trachea = ((y - 95) ** 2 + (x - 100) ** 2 <= 6**2) & (z >= 15)
    hu[right | left] = -850
    hu[trachea] = -990
    return hu, right, left, trachea


@pytest.fixture(autouse=True)
def key_file(tmp_path_factory, monkeypatch):
    """Keeps the key of pseudonyms out of the home of whoever runs the tests."""
    path = tmp_path_factory.mktemp("key") / "lung-nodules/patient_key"
    monkeypatch.setenv("LUNG_PATIENT_KEY_FILE", str(path))
    return path


@pytest.fixture
def scan():
    return tiny_scan()


@pytest.fixture
def scans():
    return [tiny_scan(index) for index in range(10)]


@pytest.fixture(scope="session")
def make_scan():
    """make_scan(index): `tiny_scan`, for fixtures that outlive a test."""
    return tiny_scan


@pytest.fixture(scope="session")
def make_chest():
    """make_chest(): `chest`, whose lungs the classical chain finds."""
    return chest


LUNG_RUN = config.Experiment(
    table=config.Table(volume_spacing_mm=4.0),
    batches=config.Batches(
        target="lung",
        input_px=(32, 32, 32),
        window_hu=(-1024.0, 276.0),
        normalisation="population",
        lung_mask=False,
    ),
    model=config.Model(
        name="unet3d",
        filters=2,
        depth=1,
        norm="batch",
        mask_fraction=0.3,
        mask_cube_px=4,
        dropout=0.5,
    ),
)
"""A run whose network is set by hand; see `set_by_hand`."""


NODULE_RUN = replace(
    LUNG_RUN,
    table=config.Table(volume_spacing_mm=2.0),
    batches=replace(LUNG_RUN.batches, target="nodule"),
    model=replace(LUNG_RUN.model, mask_fraction=0.0, dropout=0.0),
)
"""The same for nodules, of 20 HU."""

SLICES_RUN = replace(
    NODULE_RUN,
    batches=replace(NODULE_RUN.batches, input_px=(32, 32)),
    model=replace(NODULE_RUN.model, name="unet2d"),
    postprocess=config.Postprocess(method="fixed", min_volume_mm3=0.0, min_voxels=4),
)
"""The same in slices."""

REDUCTION_RUN = replace(
    NODULE_RUN,
    batches=replace(NODULE_RUN.batches, input_px=(8, 16, 16), crop="candidate"),
    model=config.Model(
        name="unet3d", filters=4, depth=2, seeded=True, slice_classifier=True
    ),
)
"""A false-positive network, with weights as they are drawn."""


def set_by_hand(network, hu=-850):
    """Makes a U-Net of depth 1 and 2 filters tell lung by a voxel's own value.

    Two channels hold how far the value lies above and below that of `hu`. With batch
    normalisation as it starts, the path through the skip connection keeps them, and the
    probability is sigmoid(10 - 50 |difference|): above 0.99 within 45 HU of -850, below
    0.01 from 130 HU on. So borders are lost where voxels are part tissue, and parts of the
    skin, half air, are found. Masked voxels have the value 1 and are no lung. The lower
    level, where the dropout is, counts for nothing.
    """
    import keras

    own = (hu + 370.00039) / 436.59987
    kinds = (keras.layers.Conv2D, keras.layers.Conv3D)
    convolutions = [x for x in network.layers if type(x) in kinds]
    norms = [
        x for x in network.layers if isinstance(x, keras.layers.BatchNormalization)
    ]
    first, second, _, _, joined, last, head = convolutions

    def set_kernel(layer, taps):
        kernel = np.zeros(layer.kernel.shape, np.float32)
        for (source, result), value in taps.items():
            kernel[(*(1,) * (kernel.ndim - 2), source, result)] = value
        layer.kernel.assign(kernel)

    set_kernel(first, {(0, 0): 1, (0, 1): -1})
    norms[0].beta.assign([-own, own])
    set_kernel(second, {(0, 0): 1, (1, 1): 1})
    skip = joined.kernel.shape[-2] - 2  # after those of the lower level
    set_kernel(joined, {(skip, 0): 1, (skip + 1, 1): 1})
    set_kernel(last, {(0, 0): 1, (1, 1): 1})
    head.kernel.assign(np.reshape([[0, -50], [0, -50]], head.kernel.shape))
    head.bias.assign([0, 10])


@pytest.fixture(scope="session")
def make_lung_run():
    """make_lung_run(folder, experiment=..., by_hand=True): a run as train.py leaves it.

    What its network finds has values near `hu`.
    """

    def make(folder, *, experiment=LUNG_RUN, by_hand=True, hu=-850):
        from models import build_model

        folder.mkdir(parents=True)
        record = {
            "format_version": 1,
            "settings": {"unit": "patient"},
            "parts": {"train": ["trained-on"], "validation": [], "test": ["chest"]},
        }
        (folder / "config.json").write_text(json.dumps(config.to_json(experiment)))
        (folder / "split.json").write_text(json.dumps(record))
        (folder / "provenance.json").write_text("{}")
        shape = (*experiment.batches.input_px, 1)
        network = build_model(experiment.model, shape, 2)
        if by_hand:
            set_by_hand(network, hu)
        network.save_weights(folder / "best.weights.h5")
        return folder

    return make


@pytest.fixture(scope="session")
def make_nodule_run(make_lung_run):
    """make_nodule_run(folder): the same for nodules; what is near 20 HU is one."""
    return functools.partial(make_lung_run, experiment=NODULE_RUN, hu=20)


@pytest.fixture(scope="session")
def make_slices_run(make_lung_run):
    """make_slices_run(folder, hu=20): the same of slices."""
    return functools.partial(make_lung_run, experiment=SLICES_RUN, hu=20)


@pytest.fixture(scope="session")
def make_reduction_run(make_lung_run):
    """make_reduction_run(folder, min_score=...): an untrained false-positive network."""

    def make(folder, **postprocess):
        settings = config.Postprocess(method="fixed", **postprocess)
        experiment = replace(REDUCTION_RUN, postprocess=settings)
        return make_lung_run(folder, experiment=experiment, by_hand=False)

    return make


@pytest.fixture(scope="session")
def chest_scan(make_chest):
    """`chest` with voxels of 5 x 1.5 x 1.5 mm: 200 x 300 x 300 mm, lungs of 1.1 l each."""
    hu = make_chest()[0]
    grid = canonical_grid(hu.shape, (5.0, 1.5, 1.5))
    return Scan(scan_id="chest", patient_id="chest", hu=hu, grid=grid, source_grid=grid)


@pytest.fixture(scope="session")
def lung_run(make_lung_run, tmp_path_factory):
    """A run for lungs, set by hand to find what is near -850 HU."""
    return make_lung_run(tmp_path_factory.mktemp("runs") / "hand")


@pytest.fixture(scope="session")
def nodule_run(make_nodule_run, tmp_path_factory):
    """A run for nodules, set by hand to find what is near 20 HU."""
    return make_nodule_run(tmp_path_factory.mktemp("runs") / "nodules")


@pytest.fixture(scope="session")
def slices_run(make_slices_run, tmp_path_factory):
    """A run of slices that marks what is near -400 HU."""
    return make_slices_run(tmp_path_factory.mktemp("runs") / "slices", hu=-400)


@pytest.fixture(scope="session")
def reduction_run(make_reduction_run, tmp_path_factory):
    """A false-positive network that refuses everything."""
    folder = tmp_path_factory.mktemp("runs") / "reduction"
    return make_reduction_run(folder, threshold=0.5, min_score=0.99)


@pytest.fixture(scope="session")
def volume(make_chest):
    """`chest` as (x, y, z) voxels of 3 x 3 x 5 mm, x to the left, y to the back."""
    return np.ascontiguousarray(make_chest()[0].transpose(2, 1, 0)[::2, ::2])


@pytest.fixture(scope="session")
def ill_volume(volume):
    """`volume` with a ball of soft tissue, 20 mm wide, in the right lung."""
    x, y, z = np.ogrid[tuple(slice(n) for n in volume.shape)]
    apart_mm2 = ((x - 32) * 3) ** 2 + ((y - 47) * 3) ** 2 + ((z - 16) * 5) ** 2
    return np.where(apart_mm2 <= 10**2, 20, volume).astype(volume.dtype)
