"""Fixtures: scans small enough to reason about by hand."""

import numpy as np
import pytest

from geometry import Grid
from scan import AIR_HU, LEFT, RIGHT, Annotation, Nodule, Scan

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
