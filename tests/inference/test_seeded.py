"""The chain on patches around nodules, and segment_patches, with a small trained network."""

import csv
import json
import shutil

import cv2
import numpy as np
import pytest

import config
import evaluate
import export
import infer
import postprocess
import preprocess
import slice_idx
import table
import train
from ct.scan import ScanError, read_scan, scan_files
from inference import segment
from inference.seeded import (
    TURNS,
    PatchPredictor,
    expected_dice,
    middle_of_nodule,
    pad_to_size,
    turn,
    undo_turn,
)
from metrics import overlap

SIZE, SEEN = 64, 32

EXPERIMENT = config.Experiment(
    table=config.Table(size_px=(SIZE, SIZE), slices="all"),
    split=config.Split(fractions=(0.6, 0.2, 0.2)),
    batches=config.Batches(
        input_px=(SEEN, SEEN),
        crop="seed",
        normalisation="relative",
        lung_mask=False,
        reference="votes",
        batch_size=8,
        nodule_fraction=0.0,
    ),
    augment=config.Augment(rotate_deg=90.0, zoom=0.3, shift_px=2.0),
    model=config.Model(
        name="unet2d", filters=4, depth=2, norm="batch", residual=True, seeded=True
    ),
    loss=config.Loss(name="dice_cross_entropy"),
    train=config.Train(epochs=4, steps_per_epoch=40, learning_rate=1e-2),
    postprocess=config.Postprocess(
        method="fixed", min_volume_mm3=0.0, within_lung=False
    ),
)


def disc(radius_px, size=SIZE):
    y, x = np.ogrid[:size, :size]
    middle = (size - 1) / 2
    return (y - middle) ** 2 + (x - middle) ** 2 <= radius_px**2


def patch(rng, radius_px, size=SIZE):
    """A bright disc in noise, and a second one that is not in the middle."""
    image = rng.normal(60, 8, (size, size))
    image[disc(radius_px, size)] = 180
    other = np.roll(disc(5, size), (size // 3, size // 3), (0, 1))
    image[other] = 180
    return np.clip(image, 0, 255).astype(np.uint8)


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A work directory after steps 1 to 9: 20 patients with a nodule of two slices each.

    Three readers drew a disc of the nodule's radius, and of one pixel less and more.
    """
    work = tmp_path_factory.mktemp("patches")
    source = work / "collection"
    lines = ["name,patient_id,nodule,slice,readers"]
    rng = np.random.default_rng(0)
    for number in range(20):
        radius = 3 + 2 * (number % 8)
        bits = sum(disc(radius + r - 1).astype(np.uint8) << r for r in range(3))
        for z in range(2):
            name = f"P-{number:02}/{z}"
            for kind, image in (("images", patch(rng, radius)), ("reader_bits", bits)):
                path = source / kind / f"{name}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                cv2.imwrite(str(path), image.astype(np.uint8))
            lines.append(f"{name},P-{number:02},0,{z},3")
    (source / "index.csv").write_text("\n".join(lines) + "\n")
    preprocess.preprocess(source, work / "scans", EXPERIMENT.mask, cohort="patches")
    table.write_table(work / "scans", work / "table.h5", EXPERIMENT.table)
    slice_idx.write_split(work / "table.h5", work / "split.json", EXPERIMENT.split)
    train.train(work / "table.h5", work / "split.json", work / "run", EXPERIMENT)
    infer.infer(work / "run", work / "predictions", scans=work / "scans")
    postprocess.postprocess_predictions(
        postprocess.Arguments(
            predictions=work / "predictions", scans=work / "scans", run=work / "run"
        )
    )
    evaluate.evaluate(
        evaluate.Arguments(
            predictions=work / "predictions",
            scans=work / "scans",
            out=work / "scores",
            draws=100,
        )
    )
    export.export(work / "run", work / "export/patches")
    return work


@pytest.fixture(scope="module")
def predictor(work):
    return PatchPredictor(work / "run", EXPERIMENT, batch_size=4)


@pytest.fixture
def some():
    rng = np.random.default_rng(5)
    return np.stack([patch(rng, radius) for radius in (4, 7, 9)])


def test_the_nodule_in_the_middle_is_outlined_and_the_other_is_not(predictor, some):
    prob = predictor.probability(some)
    assert (prob.dtype, prob.shape) == (np.float32, some.shape)
    for image, radius in zip(prob, (4, 7, 9), strict=True):
        shared = np.count_nonzero((image >= 0.5) & disc(radius))
        sizes = np.count_nonzero(image >= 0.5) + np.count_nonzero(disc(radius))
        assert 2 * shared / sizes > 0.8


def test_patches_have_no_scale(predictor, some):
    expected = predictor.probability(some)
    scaled = some * np.array([0.01, 5.0, 3.0])[:, None, None] - 1000.0
    assert np.allclose(predictor.probability(scaled), expected, atol=1e-4)


def test_with_all_turns_a_turned_patch_gives_the_turned_result(work, some):
    predictor = PatchPredictor(work / "run", EXPERIMENT, turns=TURNS)
    expected = predictor.probability(some)
    turned = predictor.probability(np.rot90(some, axes=(1, 2))[:, ::-1])
    assert np.allclose(turned, np.rot90(expected, axes=(1, 2))[:, ::-1], atol=1e-5)


def test_a_patch_does_not_depend_on_the_others_nor_on_the_batch(work, predictor, some):
    expected = predictor.probability(some)
    assert np.array_equal(predictor.probability(some[1:2])[0], expected[1])
    other = PatchPredictor(work / "run", EXPERIMENT, batch_size=7)
    assert np.allclose(other.probability(some), expected, atol=1e-6)


def test_a_nodule_larger_than_what_is_seen_is_looked_at_from_further_away(predictor):
    rng = np.random.default_rng(6)
    large = patch(rng, 20)[None]
    prob = predictor.probability(large)[0]
    assert prob[32, 32 - 18] >= 0.5  # 16 pixels from the middle the first look ends
    shared = np.count_nonzero((prob >= 0.5) & disc(20))
    assert 2 * shared / (np.count_nonzero(prob >= 0.5) + disc(20).sum()) > 0.8


@pytest.mark.parametrize("size", [20, 32, 33, 63, 100])
def test_patches_of_any_size(predictor, size):
    image = patch(np.random.default_rng(7), 5, size)[None]
    prob = predictor.probability(image)
    assert prob.shape == image.shape
    assert prob[0, size // 2, size // 2] >= 0.5


def test_no_patches_give_no_probability(predictor):
    assert predictor.probability(np.zeros((0, 64, 64))).shape == (0, 64, 64)


def test_a_patch_of_one_value_gives_numbers(predictor):
    assert np.isfinite(predictor.probability(np.full((1, 64, 64), -1024))).all()


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (np.zeros((64, 64)), "shape"),
        (np.zeros((1, 64, 0)), "shape"),
        (np.zeros((1, 64, 64), complex), "type complex"),
        (np.full((2, 64, 64), np.nan), "2 of 2 patches, the first 0"),
    ],
)
def test_what_is_no_patch_is_refused(predictor, wrong, message):
    with pytest.raises(ValueError, match=message):
        predictor.probability(wrong)


def test_turning_back_undoes_a_turn_and_all_turns_differ():
    image = np.arange(9).reshape(3, 3)
    turned = [turn(image, number) for number in range(TURNS)]
    assert len({array.tobytes() for array in turned}) == TURNS
    for number, array in enumerate(turned):
        assert np.array_equal(undo_turn(array, number), image)


def test_segment_patches_is_the_predictor_and_loads_once(work, predictor, some):
    prob = segment.segment_patches(some, work / "run")
    assert np.allclose(prob, predictor.probability(some), atol=1e-6)
    segment.segment_patches(some, str(work / "run"), turns=TURNS)
    before = segment.patch_predictor.cache_info().misses
    segment.segment_patches(some, work / "run")
    assert segment.patch_predictor.cache_info().misses == before


def test_no_weights_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="config.json is missing"):
        segment.segment_patches(np.zeros((1, 64, 64)), tmp_path)


def test_patches_have_no_lungs_and_whole_scans_no_seed(work, make_scan):
    scan = read_scan(scan_files(work / "scans")[0])
    assert scan.lung is None and not scan.whole
    seeded = segment.SeededPredictor(work / "run", EXPERIMENT)
    with pytest.raises(ScanError, match="segment_patches"):
        seeded.probability(make_scan(0))


def test_scores_stand_beside_those_of_the_readers(work):
    with (work / "scores/nodules.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 4
    for row in rows:
        assert float(row["dice_consensus"]) > 0.6
        # Three readers, radii r - 1, r and r + 1: the consensus is the middle one's.
        radius = next(
            r
            for r in range(3, 19)
            if np.isclose(readers_dice(r), float(row["dice_reader_consensus"]))
        )
        assert radius % 2
    scores = json.loads((work / "scores/scores.json").read_text())["scores"]
    names = [line["name"] for line in scores]
    assert "Dice with the 50 % consensus, nodules of 3 or more readers" in names
    errors = [line for line in scores if line["name"].startswith("Calibration")]
    # Validation was predicted too: a temperature is fitted on it.
    assert len(errors) == 2
    assert all(0 <= line["interval"]["value"] < 0.5 for line in errors)


def readers_dice(radius):
    """One reader's mean Dice with the consensus, of discs one pixel apart."""
    sizes = [np.count_nonzero(disc(radius + change)) for change in (-1, 0, 1)]
    inner, middle, outer = sizes
    return np.mean([2 * inner / (inner + middle), 1, 2 * middle / (middle + outer)])


def off_middle(y, x, radius_px=6, slices=2):
    """Slices of noise with a disc off their middle, and its (n, y, x) mask."""
    rng = np.random.default_rng(1)
    image = np.clip(rng.normal(60, 8, (slices, SIZE, SIZE)), 0, 255)
    mask = np.broadcast_to(np.roll(disc(radius_px), (y, x), (0, 1)), image.shape)
    image[mask] = 180
    return image, mask


def test_a_nodule_off_the_middle_is_looked_at_again_from_its_own(predictor, some):
    assert np.array_equal(
        predictor.nodule_probability(some[1:2]), predictor.probability(some[1:2])
    )
    image, mask = off_middle(7, -14)  # cut off by the border of what is seen at first
    first = predictor.probability(image)
    prob = predictor.nodule_probability(image.tolist())
    assert expected_dice(prob) > expected_dice(first)
    assert overlap.dice(mask, prob >= 0.5) > max(0.85, overlap.dice(mask, first >= 0.5))
    centred = predictor.probability(np.roll(image, (-7, 14), (1, 2)))
    seen = (slice(None), slice(24, 56), slice(4, 32))
    assert np.allclose(prob[seen], np.roll(centred, (7, -14), (1, 2))[seen], atol=0.1)


def test_patches_that_show_nothing_are_looked_at_once(predictor, monkeypatch):
    looks = []
    look = predictor.look
    monkeypatch.setattr(predictor, "look", lambda i: looks.append(len(i)) or look(i))
    predictor.nodule_probability(np.full((2, SIZE, SIZE), 7))
    assert looks[0] == 2 and sum(looks[1:]) == 0
    assert middle_of_nodule(np.zeros((2, 8, 8), np.float32), 0.5) is None


def test_the_middle_is_that_of_the_likeliest_component():
    prob = np.zeros((2, 9, 9), np.float32)
    prob[:, 1:3, 1:3] = 0.9  # 7.2 in all
    prob[0, 5:9, 5:9] = 0.6  # 9.6
    assert middle_of_nodule(prob, 0.5).tolist() == [6.5, 6.5]


def test_segment_nodule_decides_over_all_slices(work, tmp_path, some):
    run = tmp_path / "run"
    shutil.copytree(work / "run", run)
    record = json.loads((run / "config.json").read_text())
    record["postprocess"] |= {"one_nodule": True}
    (run / "config.json").write_text(json.dumps(record))
    nodule = np.stack([some[1], some[1], np.full_like(some[1], 60)])
    mask, prob = segment.segment_nodule(nodule, run)
    assert np.array_equal(prob, segment.segment_patches(nodule, run))
    assert overlap.dice(np.stack([disc(7)] * 2), mask[:2]) > 0.8
    assert mask.dtype == bool and mask.any(axis=(1, 2))[:2].all()
    assert not (mask & (prob < 0.5)).any()


def test_the_expected_dice_of_chances():
    # Of the likeliest one, two and three pixels: 0.643, 0.789 and 0.75.
    prob = np.array([[0.6, 0.3], [0.9, 0.0]], np.float32)
    assert expected_dice(prob) == pytest.approx(3 / 3.8)
    assert expected_dice(np.full((9, 9), 0.01, np.float32)) == 0
    rng = np.random.default_rng(0)
    chances = rng.beta(0.5, 1.0, 200_000).astype(np.float32)
    truth = rng.random(chances.shape) < chances
    reached = [overlap.dice(truth, chances >= t) for t in np.arange(0.05, 0.9, 0.02)]
    assert expected_dice(chances) == pytest.approx(max(reached), abs=0.005)


def test_a_small_patch_goes_on_as_its_border(predictor):
    rng = np.random.default_rng(3)
    image = np.clip(rng.normal(60, 8, (SIZE, SIZE)), 0, 255)
    image[disc(6)] = 180
    small = image[20:43, 20:44]  # 23 x 24 of the 32 x 32 that are seen
    (prob,) = predictor.probability(small[None])
    assert prob.shape == small.shape
    assert overlap.dice(disc(6)[20:43, 20:44], prob >= 0.5) > 0.8
    assert max(prob[0].max(), prob[:, 0].max()) < 0.5
    filled = pad_to_size(np.array([[1, 2], [3, 4]]), (4, 3))
    assert filled.tolist() == [[1, 1, 2], [1, 1, 2], [3, 3, 4], [3, 3, 4]]


def test_no_slices_hold_no_nodule(work):
    mask, prob = segment.segment_nodule(np.zeros((0, SIZE, SIZE)), work / "run")
    assert mask.shape == prob.shape == (0, SIZE, SIZE)
