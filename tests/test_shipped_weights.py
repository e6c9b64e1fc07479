"""The weights that ship: what they find in a phantom and in real scans, and their card."""

import csv
import itertools
import json
import os
import re
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest

import config
import infer
from ct import files
from ct.geometry import canonical_grid
from ct.nifti_io import read_nifti
from ct.scan import read_scan, readers_in
from dataset.split import patients_of_part, read_split
from inference import segment
from inference.passes import Passes
from inference.tasks import (
    read_ct,
    tasks_of_input,
    warn_of_known_scan,
    warn_of_leaks,
)
from lungs.classical import segment_lungs
from metrics import agreement, overlap
from nodules.measures import find_nodules
from training import runs

ROOT = Path(__file__).parents[1]
DATA = Path(os.environ.get("LUNG_DATA", ROOT.parent / "shared/data"))

ONE_LOOK = replace(segment.DEFAULT_LUNGS, passes=Passes(n=1))


def lungs_found(source, folder, lungs, *, weights=segment.SHIPPED):
    """The mask of the only scan in `source`, and its standard deviation."""
    report = infer.infer(weights, folder, input=source, lungs=lungs)
    assert not report.failures
    (mask_path,) = folder.glob("*/mask.nii.gz")
    return (
        read_nifti(mask_path)[0],
        read_nifti(mask_path.with_name("std.nii.gz"))[0],
    )


WEIGHTS = sorted(path.parent for path in ROOT.glob("weights/*/README.md"))

CLAIM = re.compile(
    r"^\|\s*(?P<part>training|validation|test)\s*\|(?P<row>.*)\|"
    r"|(?P<words>[^|:]*?)\b(?P<verb>trained|chose|tested)\b",
    re.MULTILINE,
)
"""What a card says of its data: a row for each part, or who trained, chose, was tested."""

PART_OF_VERB = {"trained": "train", "chose": "validation", "tested": "test"}


def test_the_default_weights_are_among_those_that_ship():
    used = {segment.SHIPPED, *segment.SHIPPED_RUNS.used.values(), segment.OUTLINES}
    assert used <= set(WEIGHTS)


def test_all_networks_of_a_whole_scan_say_whom_they_have_seen():
    seen = segment.training_patients_by_run(segment.SHIPPED_RUNS)
    split = read_split(segment.SHIPPED / "split.json")
    predictions = infer.new_predictions(segment.SHIPPED, split)
    seen[str(segment.SHIPPED)] = predictions.training_patients
    used = (segment.SHIPPED, *segment.SHIPPED_RUNS.used.values(), segment.OUTLINES)
    assert len(used) == 5
    assert set(seen) == {str(folder) for folder in used}
    for folder in used:
        split = read_split(folder / "split.json")
        trained = patients_of_part(split, "train")
        assert trained and set(trained) <= set(seen[str(folder)])


@pytest.mark.parametrize("folder", WEIGHTS, ids=lambda folder: folder.name)
def test_the_card_names_the_weights(folder):
    card = (folder / "README.md").read_text()
    (stated,) = re.findall(r"best\.weights\.h5`, sha256 ([0-9a-f]{12})", card)
    assert files.sha256(folder / "best.weights.h5")[:12] == stated
    assert "not a medical device" in card
    assert sum(path.stat().st_size for path in folder.iterdir()) < 25e6


@pytest.mark.parametrize("folder", WEIGHTS, ids=lambda folder: folder.name)
def test_marks_of_training_scans_are_those_of_training_patients(folder):
    weights = folder / "best.weights.h5"
    with (folder / runs.TRAINING_SCANS_CSV).open(newline="") as file:
        rows = list(csv.DictReader(file))
    seen = runs.training_patients_of(weights)
    assert {row["patient_id"] for row in rows} <= set(seen)
    assert all(re.fullmatch("[0-9a-f]{64}", row["hu_sha256"]) for row in rows)
    if "LIDC-IDRI-0001" in seen:
        assert "LIDC-IDRI-0001" in {row["patient_id"] for row in rows}


@pytest.mark.lidc
def test_a_real_training_scan_is_recognised_in_its_own_dicom_folder(caplog):
    source = DATA / "Lung-PET-CT-Dx/Lung_Dx-A0001"
    if not source.is_dir():
        pytest.skip(f"no {source}; set LUNG_DATA")
    seen = {
        str(folder): runs.training_patients_of(folder / "best.weights.h5")
        for folder in WEIGHTS
    }
    (task,) = tasks_of_input(source)
    warn_of_leaks([task], seen)
    assert "was trained on (by lung2d, lung3d, nodule3d)" in caplog.text
    caplog.clear()
    renamed = replace(read_ct(task), scan_id="x", patient_id="y", series_uid="")
    warn_of_known_scan(renamed, seen)
    assert "scan x was trained on (by lung2d, lung3d, nodule3d)" in caplog.text


def claims_of(card):
    """Part -> what the data section of a card says of it."""
    section = card.partition("\n## Data\n")[2].partition("\n## ")[0]
    section = re.sub(r"(?<![\w-])-(\d{4})\b", r"LIDC-IDRI-\1", section)  # "and -0003"
    claims = {"train": "", "validation": "", "test": ""}
    for found in CLAIM.finditer(section):
        part = (found["part"] or PART_OF_VERB[found["verb"]]).replace(
            "training", "train"
        )
        claims[part] += found["row"] or found[0]
    return claims


def numbers(pattern, text):
    return [int(number) for number in re.findall(pattern, text)]


@pytest.mark.parametrize("folder", WEIGHTS, ids=lambda folder: folder.name)
def test_the_card_names_patients_in_the_part_they_are_in(folder):
    split = read_split(folder / "split.json")
    made_by = json.loads((folder / "provenance.json").read_text())
    assert made_by["split_sha256"] == split["sha256"]
    card = (folder / "README.md").read_text()
    for stated in re.findall(r"split hash ([0-9a-f]+)", card):
        assert split["sha256"].startswith(stated)
    claims = claims_of(card)
    assert claims["train"]
    for part, text in claims.items():
        patients = set(patients_of_part(split, part))
        phantoms = [patient for patient in patients if patient.startswith("PHANTOM-")]
        assert set(re.findall(r"LIDC-IDRI-\d{4}", text)) <= patients
        for number in numbers(r"\b(\d+)\s+phantoms", text):
            assert number == len(phantoms)
        for number in numbers(
            r"\b(\d+)\s+(?:patients\s+)?(?:were\s+)?(?:trained|chose|tested)", text
        ):
            assert number == len(patients)


def test_what_cards_say_that_other_weights_have_seen_is_so():
    seen = re.compile(
        r"\]\(\.\./(\w+)/README\.md\), which has seen[^.;]*?(LIDC-IDRI-\d+)"
    )
    for folder in WEIGHTS:
        for other, patient in seen.findall((folder / "README.md").read_text()):
            weights = ROOT / "weights" / other / "best.weights.h5"
            assert patient in runs.training_patients_of(weights), folder


def test_a_claim_of_a_card_is_read():
    card = (
        "# x\n\n## Data\n\nOf 9 readers: LIDC-IDRI-0001 and -0003 and 4 phantoms trained, 12 "
        "patients chose,\nLIDC-IDRI-0002 was tested.\n\n## Scores\n\nLIDC-IDRI-0004 trained"
    )
    train, validation, test = claims_of(card).values()
    assert re.findall(r"LIDC-IDRI-\d{4}", train) == ["LIDC-IDRI-0001", "LIDC-IDRI-0003"]
    assert numbers(r"(\d+) phantoms", train) == [4]
    assert numbers(r"(\d+) patients", validation) == [12]
    assert "LIDC-IDRI-0002" in test
    rows = "## Data\n\n| part | scans |\n| training | LIDC-IDRI-0001 |\n| test | 3 phantoms |"
    claims = claims_of(f"\n{rows}\n")
    assert claims["train"].strip() == "LIDC-IDRI-0001"
    assert claims["test"].strip() == "3 phantoms"


@pytest.fixture(scope="module")
def phantom(tmp_path_factory):
    """The folder of a phantom that no weights have seen; its truth is beside it."""
    from phantoms import write
    from phantoms.settings import Settings

    folder = tmp_path_factory.mktemp("phantom")
    settings = Settings(nodules=(7, 7))
    write.write_phantoms(folder, 1, seed=9000, settings=settings)
    return folder / "PHANTOM-9000"


def test_lungs_of_a_phantom_never_seen(phantom, tmp_path):
    (truth,) = phantom.with_name("truth").glob("*.h5")
    four = replace(segment.DEFAULT_LUNGS, passes=Passes(n=4))
    mask, std = lungs_found(phantom, tmp_path / "out", four)
    lung = np.asarray(read_scan(truth).lung)
    assert overlap.dice(lung > 0, mask > 0) > 0.96
    for side in (1, 2):
        assert overlap.dice(lung == side, mask == side) > 0.95
    assert std[lung == 0].mean() < std[mask > 0].mean()
    flat = ROOT / "weights/lung2d"
    mask, _ = lungs_found(phantom, tmp_path / "flat", ONE_LOOK, weights=flat)
    assert overlap.dice(lung > 0, mask > 0) > 0.96


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
        segment.SHIPPED,
        folder,
        input=source,
        lungs=ONE_LOOK,
        nodules=segment.SHIPPED_RUNS,
    )
    scan = lidc.load_scan(lidc.find_scans(source)[0])
    (path,) = folder.glob("*/nodules.nii.gz")
    labels = read_nifti(path)[0]
    reference = np.asarray(scan.nodule_labels)
    false = [n for n in np.unique(labels)[1:] if not reference[labels == n].any()]
    return scan, set(np.unique(reference[labels > 0])) - {0}, len(false)


@pytest.mark.parametrize("part", ["bases", "slab", "apices"])
def test_lungs_that_the_scan_cuts_are_found(phantom, part):
    (truth,) = phantom.with_name("truth").glob("*.h5")
    scan = read_scan(truth)
    levels = np.flatnonzero(np.any(scan.lung, axis=(1, 2)))
    middle = len(scan.hu) // 2
    slices = {
        "bases": slice(0, levels[0] + 25),
        "slab": slice(middle - 8, middle + 8),
        "apices": slice(levels[-1] - 25, None),
    }[part]
    hu = np.ascontiguousarray(scan.hu[slices])
    grid = canonical_grid(hu.shape, scan.spacing_mm)
    cut = replace(scan.unread(), hu=hu, lung=None, grid=grid, source_grid=grid)
    settings = runs.read_settings(segment.SHIPPED)
    predictor = segment.passes_predictor(
        segment.SHIPPED, settings, ONE_LOOK, batch_size=1
    )
    found = segment.lungs_of(cut, predictor, ONE_LOOK.labels, 4.5)
    assert overlap.dice(scan.lung[slices] > 0, found.labels > 0) > 0.9


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
    classical = segment_lungs(scan.hu, scan.spacing_mm, config.LungMask())
    assert overlap.dice(classical > 0, mask > 0) > 0.95
    assert (mask[np.asarray(scan.reader_bits) > 0] > 0).mean() > 0.95


def test_a_nodule_in_a_patch_is_outlined_and_the_vessel_beside_it_is_not():
    y, x = np.ogrid[-64:64, -64:64]
    disc = y**2 + x**2 <= 10**2
    hu = np.random.default_rng(0).normal(-850, 30, (128, 128))
    hu[np.broadcast_to(np.abs(x - 24) <= 2, hu.shape)] = 30
    hu[disc] = 40
    blurred = cv2.GaussianBlur(hu, (0, 0), 0.8)
    (prob,) = segment.segment_patches(blurred[None])
    assert overlap.dice(disc, prob >= 0.5) > 0.85
    assert prob[:, 64 + 22 : 64 + 27].max() < 0.5


@pytest.mark.lidc
def test_others_agree_more_with_outlines_of_unseen_patients_than_with_a_reader():
    source = DATA / "lidc-crops/lidc_crops.zip"
    if not source.is_file():
        pytest.skip(f"no {source}; set LUNG_DATA")
    from cohorts import patches

    run = ROOT / "weights/nodule2d"
    settings = runs.read_settings(run)
    predictor = segment.SeededPredictor(run, settings)
    split = read_split(run / "split.json")
    tested = set(patients_of_part(split, "test"))
    scans = (s for s in patches.find_scans(source) if s.patient_id in tested)
    own, readers = [], []
    for scan in map(patches.load_scan, itertools.islice(scans, 60)):
        bits = np.asarray(scan.reader_bits)
        if len(readers_in(bits)) >= 3:
            prob = predictor.probability(scan)
            labels, _ = find_nodules(prob, scan.grid, settings.postprocess)
            found = agreement.agreement(bits, labels > 0)
            own.append(found.others)
            readers.append(found.reader_others)
    assert len(own) > 30
    assert np.mean(own) > np.mean(readers) + 0.02
