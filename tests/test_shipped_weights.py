"""The weights that ship: what they find in a phantom and in real scans, and their card."""

import itertools
import os
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest

import agreement
import config
import files
import infer
import lung_mask
import metrics
import runs
import slice_idx
from monte_carlo import Passes
from scan import read_scan, readers_in
from volume_io import read_volume

ROOT = Path(__file__).parents[1]
DATA = Path(os.environ.get("LUNG_DATA", ROOT.parent / "shared/data"))

ONE_LOOK = replace(infer.USUAL, passes=Passes(n=1))


def lungs_found(source, folder, lungs, *, weights=infer.SHIPPED):
    """The mask of the only scan in `source`, and its standard deviation."""
    report = infer.infer(weights, folder, input=source, lungs=lungs)
    assert not report.failures
    (mask_path,) = folder.glob("*/mask.nii.gz")
    return (
        read_volume(mask_path)[0],
        read_volume(mask_path.with_name("std.nii.gz"))[0],
    )


@pytest.mark.parametrize("name", ["lung2d", "lung3d", "nodule2d", "nodule3d"])
def test_the_card_names_the_weights_and_their_patients(name):
    folder = ROOT / "weights" / name
    card = (folder / "README.md").read_text()
    assert files.sha256(folder / "best.weights.h5")[:12] in card
    assert "not a medical device" in card
    assert sum(path.stat().st_size for path in folder.iterdir()) < 25e6


@pytest.fixture(scope="module")
def phantom(tmp_path_factory):
    """The folder of a phantom that no weights have seen; its truth is beside it."""
    from cohorts import phantom

    folder = tmp_path_factory.mktemp("phantom")
    settings = phantom.Settings(nodules=(7, 7))
    phantom.write_phantoms(folder, 1, seed=9000, settings=settings)
    return folder / "PHANTOM-9000"


def test_lungs_of_a_phantom_never_seen(phantom, tmp_path):
    (truth,) = phantom.with_name("truth").glob("*.h5")
    four = replace(infer.USUAL, passes=Passes(n=4))
    mask, std = lungs_found(phantom, tmp_path / "out", four)
    lung = np.asarray(read_scan(truth).lung)
    assert metrics.dice(lung > 0, mask > 0) > 0.96
    for side in (1, 2):
        assert metrics.dice(lung == side, mask == side) > 0.95
    assert std[lung == 0].mean() < std[mask > 0].mean()
    flat = ROOT / "weights/lung2d"
    mask, _ = lungs_found(phantom, tmp_path / "flat", ONE_LOOK, weights=flat)
    assert metrics.dice(lung > 0, mask > 0) > 0.96


@pytest.fixture
def real():
    """The folder of LIDC-IDRI-0003, which tested lungs and nodules."""
    folder = DATA / "LIDC-IDRI/LIDC-IDRI-0003"
    if not folder.is_dir():
        pytest.skip(f"no {folder}; set LUNG_DATA")
    return folder


def nodules_met(source, folder):
    """The scan in `source`, labels of its nodules that are found, and how many are false."""
    from cohorts import lidc

    infer.infer(
        infer.SHIPPED,
        folder,
        input=source,
        lungs=ONE_LOOK,
        nodules=infer.NODULE3D,
        reduction=infer.REDUCTION3D,
    )
    scan = lidc.load_scan(lidc.find_scans(source)[0])
    (path,) = folder.glob("*/nodules.nii.gz")
    labels = read_volume(path)[0]
    reference = np.asarray(scan.nodule_labels)
    false = [n for n in np.unique(labels)[1:] if not reference[labels == n].any()]
    return scan, set(np.unique(reference[labels > 0])) - {0}, len(false)


def test_large_nodules_of_a_phantom_never_seen_are_found(phantom, tmp_path):
    scan, met, false = nodules_met(phantom, tmp_path / "out")
    large = {n.label for n in scan.nodules if n.diameter_mm >= 10 and n.readers >= 3}
    assert large
    assert len(met & large) >= len(large) / 2
    assert false <= 2


@pytest.mark.lidc
def test_nodules_of_a_real_scan_never_seen_are_found(real, tmp_path):
    scan, met, false = nodules_met(real, tmp_path / "out")
    assert {n.label for n in scan.nodules if n.readers == 4} <= met
    assert false <= 3


@pytest.mark.lidc
def test_lungs_of_a_real_scan_never_seen(real, tmp_path):
    from cohorts import lidc

    mask, _ = lungs_found(real, tmp_path / "out", ONE_LOOK)
    scan = lidc.load_scan(lidc.find_scans(real)[0])
    classical = lung_mask.lung_labels(scan.hu, scan.spacing_mm, config.LungMask())
    assert metrics.dice(classical > 0, mask > 0) > 0.95
    assert (mask[np.asarray(scan.reader_bits) > 0] > 0).mean() > 0.95


def test_a_nodule_in_a_patch_is_outlined_and_the_vessel_beside_it_is_not():
    y, x = np.ogrid[-64:64, -64:64]
    disc = y**2 + x**2 <= 10**2
    hu = np.random.default_rng(0).normal(-850, 30, (128, 128))
    hu[np.broadcast_to(np.abs(x - 24) <= 2, hu.shape)] = 30
    hu[disc] = 40
    blurred = cv2.GaussianBlur(hu, (0, 0), 0.8)
    (prob,) = infer.segment_patches(blurred[None])
    assert metrics.dice(disc, prob >= 0.5) > 0.85
    assert prob[:, 64 + 22 : 64 + 27].max() < 0.5


@pytest.mark.lidc
def test_others_agree_more_with_outlines_of_unseen_patients_than_with_a_reader():
    source = DATA / "lidc-crops/lidc_crops.zip"
    if not source.is_file():
        pytest.skip(f"no {source}; set LUNG_DATA")
    from cohorts import patches

    run = ROOT / "weights/nodule2d"
    threshold = runs.read_settings(run).postprocess.threshold
    split = slice_idx.read_split(run / "split.json")
    tested = set(slice_idx.patients_of_part(split, "test"))
    scans = (s for s in patches.find_scans(source) if s.patient_id in tested)
    own, readers = [], []
    for scan in map(patches.load_scan, itertools.islice(scans, 60)):
        bits = np.asarray(scan.reader_bits)
        if len(readers_in(bits)) >= 3:
            prob = infer.segment_patches(scan.hu)
            found = agreement.agreement(bits, prob >= threshold)
            own.append(found.others)
            readers.append(found.reader_others)
    assert len(own) > 30
    assert np.mean(own) > np.mean(readers)
