"""infer.py with a run for lungs: W1's command line, in this process, on small scans."""

import csv
import functools
import json
import shutil
from dataclasses import replace

import cv2
import nibabel
import numpy as np
import pytest
import SimpleITK
from scipy import ndimage

import config
import evaluate
import infer
import postprocess
from ct import files
from ct.fingerprint import hu_sha256
from ct.scan import Annotation, Nodule, scan_path, write_scan
from inference import segment as segment_module
from inference.passes import Passes
from inference.predictor2d import Predictor
from inference.segment import (
    CANDIDATES2D,
    NO_RUNS,
    OUTLINES,
    Lungs,
    NoduleRuns,
    scan_networks,
    with_preset,
)
from lungs.labels import LungMap
from results.rows import read_lung_rows, write_lung_rows
from tests.cohorts.conftest import ct_series, save_series
from training import runs
from training.runs import read_settings


@pytest.fixture(scope="module")
def run(make_lung_run, tmp_path_factory):
    return make_lung_run(tmp_path_factory.mktemp("runs") / "hand")


@pytest.fixture(scope="module")
def volume(make_chest):
    """`chest` as (x, y, z) voxels of 3 x 3 x 5 mm, x to the left, y to the back."""
    return np.ascontiguousarray(make_chest()[0].transpose(2, 1, 0)[::2, ::2])


AFFINE = np.diag([-3.0, -3.0, 5.0, 1.0])

WITHOUT_SKIN = Lungs(Passes(n=1), LungMap(min_volume_mm3=60_000))
"""Parts of the skin, which the network set by hand takes for lung, are smaller."""


def save(path, volume, affine=AFFINE):
    nibabel.save(nibabel.Nifti1Image(volume, affine), path)
    return path


def write_list(path, rows):
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([("pid", "image_path"), *rows])
    return path


def run_main(*argv):
    """The exit code of the command; it looks for no nodules unless they are spoken of."""
    for option in ("--nodules", "--slices", "--reduction"):
        if option not in argv:
            argv = (*argv, option, None)
    with pytest.raises(SystemExit) as ended:
        infer.main([str(word) for word in argv])
    return ended.value.code


def rows_of(folder):
    with (folder / "lungs.csv").open(newline="") as file:
        return {row["pid"]: row for row in csv.DictReader(file)}


def read(path):
    return np.asarray(nibabel.load(path).dataobj)


@pytest.fixture(scope="module")
def nodule_run(make_nodule_run, tmp_path_factory):
    return make_nodule_run(tmp_path_factory.mktemp("runs") / "nodules")


def alone(nodule_run):
    """That run, with none beside it."""
    return NoduleRuns(nodule_run, slices=None, reduction=None)


@pytest.fixture(scope="module")
def slices_run(make_slices_run, tmp_path_factory):
    """A run of slices that marks what is near -400 HU."""
    return make_slices_run(tmp_path_factory.mktemp("runs") / "slices", hu=-400)


@pytest.fixture(scope="module")
def reduction_run(make_reduction_run, tmp_path_factory):
    """A false-positive network that refuses everything."""
    folder = tmp_path_factory.mktemp("runs") / "reduction"
    return make_reduction_run(folder, threshold=0.5, min_score=0.99)


@pytest.fixture(scope="module")
def ill_volume(volume):
    """`volume` with a ball of soft tissue, 20 mm wide, in the right lung."""
    x, y, z = np.ogrid[tuple(slice(n) for n in volume.shape)]
    apart_mm2 = ((x - 32) * 3) ** 2 + ((y - 47) * 3) ** 2 + ((z - 16) * 5) ** 2
    return np.where(apart_mm2 <= 10**2, 20, volume).astype(volume.dtype)


@pytest.fixture(scope="module")
def written(run, volume, tmp_path_factory):
    """What W1's command line wrote of two good rows of a list of seven."""
    folder = tmp_path_factory.mktemp("lists")
    save(folder / "chest.nii.gz", volume)
    broken = volume.astype(np.float32)
    broken[0, 0, 0] = np.nan
    save(folder / "nan.nii.gz", broken)
    rows = [
        ("good", "chest.nii.gz"),
        ("../escape", "chest.nii.gz"),
        ("same", "chest.nii.gz"),
        ("Same", "chest.nii.gz"),
        ("absent", "nothing.nii.gz"),
        ("nan", "nan.nii.gz"),
        ("last", "chest.nii.gz"),
    ]
    out = folder / "OUT"
    code = run_main(
        *("--csv_file", write_list(folder / "scans.csv", rows), "--result_dir", out),
        *("--exp_dir", run, "--n", 20, "--thresh", 0.55, "--save_as", "nifti"),
    )
    assert code == 3
    return out


def test_what_w1_promises_is_written_on_the_sources_grid(written, volume):
    for name in ("mean", "std", "uncertainty", "mask"):
        image = nibabel.load(written / "good" / f"{name}.nii.gz")
        assert image.shape == volume.shape
        assert np.allclose(image.affine, AFFINE)
    inner = ndimage.binary_erosion(volume == -850, iterations=3)
    mean, std = (read(written / "good" / f"{name}.nii.gz") for name in ("mean", "std"))
    # 30 % of the cubes are hidden: 0.7 and sqrt(0.3 * 0.7), a little less between voxels.
    assert mean[inner].mean() == pytest.approx(0.7, abs=0.04)
    assert std[inner].mean() == pytest.approx(0.44, abs=0.04)
    # Not thresholded, as W1's was.
    assert len(np.unique(mean)) > 100
    assert not mean[:2].any()


def test_bad_rows_are_listed_and_the_others_go_on(written):
    with (written / "skipped.csv").open(newline="") as file:
        skipped = {row["scan_id"]: row["reason"] for row in csv.DictReader(file)}
    assert set(skipped) == {"line 3", "line 4", "line 5", "absent", "nan"}
    assert "'../escape' cannot name a file" in skipped["line 3"]
    assert "line 4 and line 5" in skipped["line 4"]
    assert "no such file" in skipped["absent"]
    assert "1 voxels are NaN" in skipped["nan"]
    assert set(rows_of(written)) == {"good", "last"}
    assert not (written.parent / "escape").exists()
    assert str(written.parent) not in (written / "skipped.csv").read_text()


def test_the_table_says_what_is_to_be_thought_of_each_scan(written, volume):
    row = rows_of(written)["good"]
    mask = read(written / "good/mask.nii.gz")
    voxel_ml = 3 * 3 * 5 / 1000
    assert float(row["right_ml"]) == pytest.approx(
        (mask == 1).sum() * voxel_ml, abs=1e-3
    )
    assert float(row["left_ml"]) == pytest.approx(
        (mask == 2).sum() * voxel_ml, abs=1e-3
    )
    assert row["n"] == "20"
    # Passes that hide 30 % and see no context are no ground for trust.
    assert row["flag"] == "1"
    assert "the passes disagree on the border" in row["reason"]
    assert float(row["seconds"]) > 0


def test_same_seed_same_bytes_another_seed_others(run, volume, tmp_path):
    path = save(tmp_path / "chest.nii.gz", volume)
    bytes_of = {}
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        out = tmp_path / name
        lungs = Lungs(passes=Passes(n=2, seed=seed))
        infer.infer(run, out, input=path, lungs=lungs, nodules=NO_RUNS)
        bytes_of[name] = [
            (out / "chest" / f"{m}.nii.gz").read_bytes() for m in ("mean", "std")
        ]
    assert bytes_of["a"] == bytes_of["b"]
    assert bytes_of["a"] != bytes_of["c"]


def test_a_single_look_finds_both_lungs_and_they_are_trusted(run, volume, tmp_path):
    path = save(tmp_path / "chest.nii.gz", volume)
    out = tmp_path / "out"
    skin = ("--min_volume_mm3", 60_000)
    args = ("--exp-dir", run, "--result-dir", out, "--n=1", *skin)
    assert run_main("--input", path, *args) == 0
    row = rows_of(out)["chest"]
    assert (row["n"], row["flag"], row["reason"]) == ("1", "0", "")
    # An ellipse of 45 x 27 pixels of 1.5 mm over 26 slices of 5 mm.
    lung_ml = np.pi * 67.5 * 40.5 * 130 / 1000
    for side in ("right_ml", "left_ml"):
        assert float(row[side]) == pytest.approx(lung_ml, rel=0.03)
    other = tmp_path / "own-border"
    args = ("--exp-dir", run, "--result-dir", other, "--n=1", "--snap=0")
    assert run_main("--input", path, *args) == 0
    row = rows_of(other)["chest"]
    for side in ("right_ml", "left_ml"):  # the network set by hand loses their borders
        assert 0.75 * lung_ml < float(row[side]) < 0.95 * lung_ml
    assert not read(out / "chest/std.nii.gz").any()
    mask = read(out / "chest/mask.nii.gz")
    # x rises to the left in the file, so the right lung comes first.
    assert np.nonzero(mask == 1)[0].mean() < 50 < np.nonzero(mask == 2)[0].mean()


def test_numpy_holds_the_same_in_ras_order(run, volume, tmp_path):
    path = save(tmp_path / "chest.nii.gz", volume)
    for save_as in ("numpy", "nifti"):
        lungs = Lungs(passes=Passes(n=2), save_as=save_as)
        infer.infer(run, tmp_path / save_as, input=path, lungs=lungs, nodules=NO_RUNS)
    assert not (tmp_path / "numpy/chest").exists()
    folder = tmp_path / "nifti/chest"
    with np.load(tmp_path / "numpy/chest.npz", allow_pickle=False) as arrays:
        for name in ("mean", "std", "uncertainty", "mask"):
            image = nibabel.as_closest_canonical(
                nibabel.load(folder / f"{name}.nii.gz")
            )
            stored = arrays[name]
            assert stored.dtype == (np.uint8 if name == "mask" else np.float32)
            assert np.allclose(stored, np.asarray(image.dataobj), atol=6e-5)
            assert np.allclose(arrays["affine"], image.affine)


def test_labels_alone_are_written_when_asked(run, volume, tmp_path):
    path = save(tmp_path / "chest.nii.gz", volume)
    code = run_main(
        *("--input", path, "--exp_dir", run, "--result_dir", tmp_path / "out"),
        *("--save_as", "nifti-labels", "--n", 0),
    )
    assert code == 0
    assert [p.name for p in (tmp_path / "out/chest").iterdir()] == ["mask.nii.gz"]


def oblique(angle_deg):
    """`AFFINE` turned about x, away from the origin."""
    turn = np.deg2rad(angle_deg)
    c, s = np.cos(turn), np.sin(turn)
    affine = np.eye(4)
    affine[:3, :3] = np.array([[1, 0, 0], [0, c, -s], [0, s, c]]) @ AFFINE[:3, :3]
    affine[:3, 3] = (120, -40, 300)
    return affine


@pytest.mark.parametrize("flip", [(), (0,), (1, 2), (0, 1, 2)])
def test_simpleitk_reads_the_mask_where_the_oblique_source_lies(
    run, volume, tmp_path, flip
):
    affine = oblique(20)
    for axis in flip:
        affine[:3, 3] += affine[:3, axis] * (volume.shape[axis] - 1)
        affine[:3, axis] *= -1
    flipped = np.flip(volume, flip)
    save(
        tmp_path / "ct.nii.gz",
        np.ascontiguousarray(flipped.transpose(2, 0, 1)),
        affine[:, [2, 0, 1, 3]],
    )
    infer.infer(
        run,
        tmp_path / "out",
        input=tmp_path / "ct.nii.gz",
        lungs=WITHOUT_SKIN,
        nodules=NO_RUNS,
    )
    source = SimpleITK.ReadImage(str(tmp_path / "ct.nii.gz"))
    mask = SimpleITK.ReadImage(str(tmp_path / "out/ct/mask.nii.gz"))
    assert mask.GetSize() == source.GetSize()
    assert np.allclose(mask.GetOrigin(), source.GetOrigin(), atol=1e-3)
    assert np.allclose(mask.GetSpacing(), source.GetSpacing(), atol=1e-4)
    assert np.allclose(mask.GetDirection(), source.GetDirection(), atol=1e-5)
    lung = SimpleITK.GetArrayFromImage(source) == -850
    labels = SimpleITK.GetArrayFromImage(mask)
    # The network set by hand loses borders, but must not leave the lungs.
    assert not labels[~lung].any()
    assert (labels[lung] > 0).mean() > 0.75
    x_lps = {
        side: np.mean(
            [
                mask.TransformIndexToPhysicalPoint(i[::-1].tolist())[0]
                for i in np.argwhere(labels == side)[::997]
            ]
        )
        for side in (1, 2)
    }
    assert x_lps[1] < x_lps[2]  # in LPS, x rises to the left


def test_what_is_there_is_kept_and_other_settings_are_refused(run, volume, tmp_path):
    path = save(tmp_path / "chest.nii.gz", volume)
    out = tmp_path / "out"
    one = Lungs(passes=Passes(n=1))
    infer.infer(run, out, input=path, lungs=one, nodules=NO_RUNS)
    mask = out / "chest/mask.nii.gz"
    before = mask.stat().st_mtime_ns
    report = infer.infer(run, out, input=path, lungs=one, nodules=NO_RUNS)
    assert "(1 scan done before)" in report.line
    assert mask.stat().st_mtime_ns == before
    other = Lungs(passes=Passes(n=2))
    with pytest.raises(ValueError, match=r"'n': \(1, 2\).*use --overwrite"):
        infer.infer(run, out, input=path, lungs=other, nodules=NO_RUNS)
    infer.infer(run, out, input=path, lungs=other, overwrite=True, nodules=NO_RUNS)
    assert rows_of(out)["chest"]["n"] == "2"


def test_a_slab_without_lungs_is_flagged(run, volume, tmp_path):
    slab = np.where(volume == -850, np.int16(40), volume)[..., :12]
    path = save(tmp_path / "slab.nii.gz", np.ascontiguousarray(slab))
    infer.infer(
        run,
        tmp_path / "out",
        input=path,
        lungs=Lungs(Passes(n=1)),
        nodules=NO_RUNS,
    )
    row = rows_of(tmp_path / "out")["slab"]
    assert row["flag"] == "1"
    assert row["reason"].startswith("no lung was found; the field is 60 x 300 x 300 mm")
    assert not read(tmp_path / "out/slab/mask.nii.gz").any()


def without_lungs(volume):
    return np.where(volume == -850, np.int16(40), volume)


def without_the_right_lung(volume):
    spoilt = volume.copy()
    spoilt[:50] = without_lungs(spoilt[:50])  # x rises to the left
    return spoilt


def face_down(volume):
    spoilt = volume.copy()
    spoilt[48:52, 75:82] = 700  # the spine
    return spoilt[:, ::-1]


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (without_lungs, "no lung was found"),
        (
            without_the_right_lung,
            "the right lung was not found: only 0 ml were labelled",
        ),
        (lambda volume: volume[..., :16], "the apices are cut off"),
        (lambda volume: volume[..., ::-1], "head and feet look swapped"),
        (face_down, "front and back look swapped"),
        (lambda volume: volume[..., 10:12], "the field is 10 x 300 x 300 mm"),
    ],
)
def test_what_is_no_whole_chest_is_flagged_with_its_reason(
    run, volume, tmp_path, spoil, reason
):
    path = save(tmp_path / "ct.nii.gz", np.ascontiguousarray(spoil(volume)))
    infer.infer(run, tmp_path / "out", input=path, lungs=WITHOUT_SKIN, nodules=NO_RUNS)
    row = rows_of(tmp_path / "out")["ct"]
    assert row["flag"] == "1"
    assert reason in row["reason"]


@pytest.mark.parametrize(("slices", "step_mm"), [(25, 8.0), (2000, 0.1)])
def test_thick_and_many_slices_give_the_same_lungs(
    run, volume, tmp_path, slices, step_mm
):
    nearest = np.arange(slices) * step_mm / 5
    cut = volume[::2, ::2, nearest.astype(int)]  # 200 mm as before
    path = save(tmp_path / "ct.nii.gz", cut, np.diag([-6.0, -6.0, step_mm, 1.0]))
    lungs = replace(WITHOUT_SKIN, save_as="nifti-labels")
    report = infer.infer(
        run, tmp_path / "out", input=path, lungs=lungs, nodules=NO_RUNS
    )
    assert not report.failures
    row = rows_of(tmp_path / "out")["ct"]
    lung_ml = np.pi * 67.5 * 40.5 * 130 / 1000
    for side in ("right_ml", "left_ml"):  # the network set by hand loses their borders
        assert float(row[side]) == pytest.approx(lung_ml, rel=0.2)
    assert read(tmp_path / "out/ct/mask.nii.gz").shape == (50, 50, slices)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda volume: (volume + 1000).clip(0) // 4, "not Hounsfield units"),  # as MR
        (lambda volume: volume / np.float32(1000), "not Hounsfield units"),
        (
            lambda volume: volume[..., :1],
            "expected one 3-D volume of two or more slices",
        ),
        (lambda volume: (volume + 1024).astype(np.int16), "not Hounsfield units"),
    ],
)
def test_what_is_no_ct_is_refused(run, volume, tmp_path, spoil, message):
    path = save(tmp_path / "bad.nii.gz", np.ascontiguousarray(spoil(volume)))
    report = infer.infer(run, tmp_path / "out", input=path, nodules=NO_RUNS)
    assert message in report.failures[0].reason
    assert str(tmp_path) not in report.failures[0].reason


def test_a_patient_that_was_trained_on_is_named(run, volume, tmp_path, caplog):
    path = save(tmp_path / "trained-on.nii.gz", volume)
    infer.infer(
        run,
        tmp_path / "out",
        input=path,
        lungs=Lungs(Passes(n=1)),
        nodules=NO_RUNS,
    )
    assert "patient trained-on was trained on (by hand)" in caplog.text


def with_training_patients(run, folder, *patients):
    """A copy of a run with other patients in the training part of its split."""
    shutil.copytree(run, folder)
    record = json.loads((folder / "split.json").read_text())
    record["parts"]["train"] = list(patients)
    (folder / "split.json").write_text(json.dumps(record))
    return folder


def test_a_training_scan_under_another_name_is_named(run, volume, tmp_path, caplog):
    trained = with_training_patients(run, tmp_path / "run", "someone")
    row = {"patient_id": "someone", "series_uid": "", "hu_sha256": hu_sha256(volume)}
    runs.write_training_scans(trained, [row])
    path = save(tmp_path / "new-name.nii.gz", volume)
    options = {"lungs": Lungs(Passes(n=1)), "nodules": NO_RUNS}
    infer.infer(trained, tmp_path / "out", input=path, **options)
    assert "scan new-name was trained on (by run), under another name" in caplog.text
    record = json.loads((tmp_path / "out/predictions.json").read_text())
    assert record["training_patients"] == sorted(["someone", row["hu_sha256"]])
    caplog.clear()
    other = volume.copy()
    other[0, 0, 0] += 1
    path = save(tmp_path / "other.nii.gz", other)
    infer.infer(trained, tmp_path / "out", input=path, **options)
    assert "trained on" not in caplog.text


def test_a_volume_of_luna16_is_known_by_its_patient(run, volume, tmp_path, caplog):
    trained = with_training_patients(run, tmp_path / "run", "LIDC-IDRI-0001")
    uid = "1.3.6.1.4.1.14519.5.2.1.6279.6001.179049373636438705059720603192"
    path = save(tmp_path / f"{uid}.nii.gz", volume)
    infer.infer(
        trained,
        tmp_path / "a",
        input=path,
        lungs=Lungs(Passes(n=1)),
        nodules=NO_RUNS,
    )
    assert "patient LIDC-IDRI-0001 was trained on (by run)" in caplog.text
    caplog.clear()
    scans = tmp_path / "scans.csv"
    scans.write_text(f"pid,image_path,patient_id\n{uid},{path.name},someone\n")
    infer.infer(
        trained,
        tmp_path / "b",
        csv_file=scans,
        lungs=Lungs(Passes(n=1)),
        nodules=NO_RUNS,
    )
    assert "patient someone was trained on (by run)" in caplog.text


def test_every_network_of_a_result_counts(
    run, nodule_run, slices_run, reduction_run, volume, tmp_path, monkeypatch, caplog
):
    runs_of = {"lungs": run, "nodules": nodule_run}
    runs_of |= {"slices": slices_run, "reduction": reduction_run}
    trained = {
        name: with_training_patients(made, tmp_path / name, f"of-{name}")
        for name, made in runs_of.items()
    }
    monkeypatch.setattr(segment_module, "OUTLINES", tmp_path / "outlines")
    with_training_patients(nodule_run, tmp_path / "outlines", "of-outlines")
    provenance = {"init_training_patients": ["of-before"]}
    (trained["nodules"] / "provenance.json").write_text(json.dumps(provenance))
    for name in (*trained, "outlines", "before", "nobody"):
        save(tmp_path / f"of-{name}.nii.gz", volume)
    rows = [(f"{path.name[:-7]}", path.name) for path in tmp_path.glob("of-*.nii.gz")]
    infer.infer(
        trained["lungs"],
        tmp_path / "OUT",
        csv_file=write_list(tmp_path / "scans.csv", rows),
        lungs=WITHOUT_SKIN,
        nodules=NoduleRuns(*(trained[name] for name in list(trained)[1:])),
    )
    for name in (*trained, "outlines"):
        assert f"patient of-{name} was trained on (by {name})" in caplog.text
    assert "patient of-before was trained on (by nodules)" in caplog.text
    assert "of-nobody was trained on" not in caplog.text
    record = json.loads((tmp_path / "OUT/predictions.json").read_text())
    seen = {f"of-{name}" for name in (*trained, "outlines", "before")}
    assert set(record["training_patients"]) == seen


def test_a_2d_run_writes_the_same_files(make_lung_run, run, volume, tmp_path):
    settings = read_settings(run)
    flat = make_lung_run(
        tmp_path / "flat",
        experiment=replace(
            settings,
            batches=replace(settings.batches, input_px=(128, 128)),
            model=replace(settings.model, name="unet2d", filters=2, depth=2),
        ),
        by_hand=False,
    )
    thin = np.ascontiguousarray(volume[..., 10:14])
    path = save(tmp_path / "thin.nii.gz", thin)
    out = tmp_path / "out"
    lungs = Lungs(passes=Passes(n=3))  # drawn by dropout, for it has no masks
    infer.infer(flat, out, input=path, lungs=lungs, nodules=NO_RUNS)
    assert rows_of(out)["thin"]["n"] == "3"
    mean, std = (read(out / "thin" / f"{name}.nii.gz") for name in ("mean", "std"))
    assert mean.shape == thin.shape
    assert std.max() > 0
    infer.infer(flat, tmp_path / "again", input=path, lungs=lungs, nodules=NO_RUNS)
    for name in ("mean", "std"):
        one, other = (
            (folder / "thin" / f"{name}.nii.gz").read_bytes()
            for folder in (out, tmp_path / "again")
        )
        assert one == other


def test_a_2d_run_sees_pixels_of_its_own_size(make_lung_run, run, chest_scan, tmp_path):
    settings = read_settings(run)
    settings = replace(
        settings,
        batches=replace(settings.batches, input_px=(48, 48), pixel_mm=4.0),
        model=replace(settings.model, name="unet2d", filters=2, depth=2),
    )
    flat = make_lung_run(tmp_path / "flat", experiment=settings, by_hand=False)
    scan = replace(chest_scan, hu=chest_scan.hu[18:20], lung=None)
    maps = Predictor(flat, settings, batch_size=2).maps(scan, 0.5)
    # 200 pixels of 1.5 mm are 75 of 4 mm; one that sees those as they are says the same.
    coarse = np.stack([cv2.resize(hu, (75, 75), None, 0, 0, 3) for hu in scan.hu])
    plain = replace(settings, batches=replace(settings.batches, pixel_mm=0.0))
    expected = Predictor(flat, plain, batch_size=2).probability(
        replace(scan, hu=coarse)
    )
    assert np.array_equal(maps.moments.mean, expected)
    assert runs.input_spacing_mm(settings) == 4.0
    assert runs.input_spacing_mm(plain) == 0.0
    # Of its map, every pixel of the scan lies between those of the nearest.
    back = [cv2.resize(image, (200, 200)) for image in expected]
    assert np.allclose(maps.mean, back)


def test_without_weights_that_ship_a_run_must_be_named(tmp_path, monkeypatch):
    monkeypatch.setattr(infer, "SHIPPED", tmp_path / "weights/lung3d")
    with pytest.raises(FileNotFoundError, match="weights/lung3d.*--exp_dir"):
        infer.infer(infer.SHIPPED, tmp_path / "out", input=tmp_path, nodules=NO_RUNS)


def test_a_list_and_an_input_are_one_too_many(run, tmp_path):
    with pytest.raises(ValueError, match="expected one"):
        infer.infer(
            run,
            tmp_path,
            input=tmp_path / "a",
            csv_file=tmp_path / "b",
            nodules=NO_RUNS,
        )


def test_a_list_without_a_usable_row_fails(run, tmp_path):
    path = write_list(tmp_path / "scans.csv", [("..", "ct.nii.gz")])
    assert run_main("--csv_file", path, "--result_dir", tmp_path, "--exp_dir", run) == 1
    with pytest.raises(ValueError, match="no row is usable"):
        infer.infer(run, tmp_path / "out", csv_file=path, nodules=NO_RUNS)


def test_the_record_says_how_the_lungs_were_made(written):
    record = json.loads((written / "lungs.json").read_text())
    assert (record["n"], record["seed"], record["thresh"]) == (20, 0, 0.55)
    assert record["converged_dice"] is None  # for 20 passes were asked for
    assert len(record["weights_sha256"]) == 64
    assert record["provenance"]["packages"]["tensorflow"]


@pytest.fixture
def beside(volume, tmp_path):
    """Two scans, each in a folder of its id, and a list of them."""
    for pid in ("P1", "P2"):
        (tmp_path / pid).mkdir()
        save(tmp_path / pid / "ct.nii.gz", volume)
    rows = [(pid, f"{pid}/ct.nii.gz") for pid in ("P1", "P2")]
    return write_list(tmp_path / "scans.csv", rows)


@pytest.mark.parametrize("options", [(), ("--overwrite",)])
def test_results_never_replace_what_is_not_infers(run, beside, options):
    """The sources lie where the results would: RESULT_DIR/PID."""
    command = ("--csv_file", beside, "--result_dir", beside.parent, "--exp_dir", run)
    assert run_main(*command, "--n", 1, *options) == 3
    for pid in ("P1", "P2"):
        assert [p.name for p in (beside.parent / pid).iterdir()] == ["ct.nii.gz"]
    assert "was not written by infer.py" in (beside.parent / "skipped.csv").read_text()


def test_overwriting_removes_what_infer_wrote_and_no_more(run, beside):
    out = beside.parent / "OUT"
    command = ("--csv_file", beside, "--result_dir", out, "--exp_dir", run, "--n", 1)
    assert run_main(*command) == 0
    (out / "P2" / "notes.txt").write_text("mine")
    before = (out / "P1/mask.nii.gz").stat().st_mtime_ns
    one = write_list(beside.with_name("one.csv"), [("P1", "P1/ct.nii.gz")])
    alone = ("--csv_file", one, *command[2:], "--overwrite")
    assert run_main(*alone) == 0  # same settings: P2 is not in the list and stays
    assert (out / "P1/mask.nii.gz").stat().st_mtime_ns > before
    assert set(rows_of(out)) == {"P1", "P2"}
    assert (out / "P2/mask.nii.gz").exists()
    assert run_main(*alone, "--thresh", 0.7) == 0  # others: none of the old may stay
    assert set(rows_of(out)) == {"P1"}
    assert [path.name for path in (out / "P2").iterdir()] == ["notes.txt"]


def test_a_refused_call_leaves_nothing_that_refuses_the_next(
    make_lung_run, run, beside, tmp_path
):
    model = replace(read_settings(run).model, dropout=0.0)
    settings = replace(read_settings(run), model=model)
    run = make_lung_run(tmp_path / "no-dropout", experiment=settings)
    command = ("--csv_file", beside, "--result_dir", tmp_path / "OUT", "--exp_dir", run)
    assert run_main(*command, "--draw", "dropout", "--n", 5) == 1
    assert not (tmp_path / "OUT").exists()


@pytest.mark.parametrize("pid", ["lungs.csv", "Lungs.json", "predictions.json"])
def test_an_id_that_is_a_file_of_the_directory_is_refused(run, volume, tmp_path, pid):
    save(tmp_path / "chest.nii.gz", volume)
    rows = [(pid, "chest.nii.gz"), ("good", "chest.nii.gz")]
    listed = write_list(tmp_path / "scans.csv", rows)
    command = ("--csv_file", listed, "--result_dir", tmp_path / "OUT", "--n", 1)
    assert run_main(*command, "--exp_dir", run) == 3
    assert set(rows_of(tmp_path / "OUT")) == {"good"}
    assert "give the scan another id" in (tmp_path / "OUT/skipped.csv").read_text()


def test_a_call_that_is_killed_has_said_whose_results_these_are(
    run, beside, tmp_path, monkeypatch
):
    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(infer, "read_and_map", killed)
    with pytest.raises(KeyboardInterrupt):
        infer.infer(run, tmp_path / "OUT", csv_file=beside, nodules=NO_RUNS)
    record = json.loads((tmp_path / "OUT/predictions.json").read_text())
    assert len(record["weights_sha256"]) == 64
    assert record["scans"] == {}


def nodules_of(folder, table="nodules.csv"):
    with (folder / table).open(newline="") as file:
        return list(csv.DictReader(file))


def scores_of(folder):
    record = json.loads((folder / "scores.json").read_text())
    return {line["name"]: line["interval"]["value"] for line in record["scores"]}


def test_nodules_are_found_in_the_lungs_measured_and_drawn(
    run, nodule_run, ill_volume, volume, tmp_path, capsys
):
    rows = [
        ("ill", save(tmp_path / "ill.nii.gz", ill_volume)),
        ("well", save(tmp_path / "well.nii.gz", volume)),
    ]
    listed = write_list(tmp_path / "scans.csv", rows)
    options = ("--exp_dir", run, "--n", 1, "--min_volume_mm3", 60_000)
    out = tmp_path / "OUT"
    command = ("--csv_file", listed, "--result_dir", out, *options)
    assert run_main(*command, "--nodules", nodule_run) == 0
    (nodule,) = nodules_of(out)
    assert (nodule["case_id"], nodule["nodule_id"]) == ("ill", "1")
    assert nodule["side"] == "right"
    assert float(nodule["long_axis_mm"]) == pytest.approx(20, abs=5)
    place = [float(nodule[f"{axis}_source"]) for axis in "ijk"]
    assert place == pytest.approx([32, 47, 16], abs=0.7)
    image = nibabel.load(out / "ill/nodules.nii.gz")
    assert np.allclose(image.affine, AFFINE)
    labels = np.asarray(image.dataobj)
    assert labels[32, 47, 16] == 1
    assert np.count_nonzero(labels) == pytest.approx(
        float(nodule["volume_mm3"]) / 45, abs=0.5
    )
    assert not read(out / "well/nodules.nii.gz").any()
    for pid in ("ill", "well"):
        picture = cv2.imread(str(out / pid / "overview.png"))
        assert picture.std() > 20
    record = json.loads((out / "lungs.json").read_text())
    assert len(record["nodules"]["weights_sha256"]) == 2
    # Killed between the two tables: the scan is done again, and its nodules stand once.
    rows = (out / "lungs.csv").read_text().splitlines(keepends=True)
    (out / "lungs.csv").write_text("".join(rows[:1] + rows[2:]))
    assert run_main(*command, "--nodules", nodule_run) == 0
    assert nodules_of(out) == [nodule]
    assert rows_of(out).keys() == {"ill", "well"}
    # A record of before there were these settings; and what was lost is made again.
    for setting in ("min_voxels", "fill_holes"):
        del record["nodules"]["settings"][setting]
    (out / "lungs.json").write_text(json.dumps(record))
    (out / "ill/nodules.nii.gz").unlink()
    assert run_main(*command, "--nodules", nodule_run) == 0
    assert (out / "ill/nodules.nii.gz").exists()
    # Without nodules these are other results.
    assert run_main(*command, "--nodules", None) == 1
    assert "(None for no run)" in capsys.readouterr().err
    assert run_main(*command, "--nodules", None, "--overwrite") == 0
    assert not (out / "nodules.csv").exists()
    assert {file.name for file in (out / "ill").iterdir()} == {
        *("mask.nii.gz", "mean.nii.gz", "std.nii.gz", "uncertainty.nii.gz"),
    }


def test_numpy_holds_nodules_too(run, nodule_run, ill_volume, tmp_path):
    lungs = replace(WITHOUT_SKIN, save_as="numpy")
    source = save(tmp_path / "ill.nii.gz", ill_volume)
    out = tmp_path / "OUT"
    infer.infer(run, out, input=source, lungs=lungs, nodules=alone(nodule_run))
    with np.load(out / "ill.npz") as arrays:
        labels = arrays["nodules"]
    # x rises to the right, y to the front.
    full = ill_volume.shape
    assert labels[full[0] - 1 - 32, full[1] - 1 - 47, 16] == 1
    assert len(nodules_of(out)) == 1
    arguments = evaluate.Arguments(out, tmp_path / "scores", part="all")
    with pytest.raises(ValueError, match="saved as numpy"):
        evaluate.evaluate(arguments)


def rotation_z(radians):
    turn = np.eye(4)
    cos, sin = np.cos(radians), np.sin(radians)
    turn[:2, :2] = (cos, -sin), (sin, cos)
    return turn


def test_nnunets_names_in_give_nnunets_names_out(
    run, nodule_run, ill_volume, volume, tmp_path, capsys
):
    turned = np.float64(np.float32(rotation_z(0.1) @ AFFINE + [[0, 0, 0, 1 / 3]] * 4))
    turned[3] = 0, 0, 0, 1
    source, out = tmp_path / "images", tmp_path / "OUT"
    source.mkdir()
    save(source / "ill_0000.nii.gz", ill_volume, turned)
    save(source / "well_0000.nii.gz", volume[:, :, ::-1], np.diag([-3.0, -3, -5, 1]))
    command = (
        *("--input", source, "--result_dir", out, "--save_as", "nnunet"),
        *("--exp_dir", run, "--n", 1, "--min_volume_mm3", 60_000, "--snap", 0),
        *("--nodules", nodule_run),
    )
    assert run_main(*command) == 0
    tables = {"lungs.csv", "nodules.csv", "candidates.csv", "lungs.json"}
    assert {path.name for path in out.iterdir()} == tables | {
        *("ill.nii.gz", "well.nii.gz", "predictions.json"),
    }
    for case in ("ill", "well"):
        given, image = (
            nibabel.load(folder / name)
            for folder, name in (
                (source, f"{case}_0000.nii.gz"),
                (out, f"{case}.nii.gz"),
            )
        )
        assert image.shape == given.shape
        assert np.array_equal(image.affine, given.affine)
        assert image.get_data_dtype() == np.uint8
    labels = read(out / "ill.nii.gz")
    (nodule,) = nodules_of(out)
    assert nodule["case_id"] == "ill"
    assert np.unique(labels).tolist() == [0, int(nodule["nodule_id"])]
    assert labels[32, 47, 16] == 1
    assert not read(out / "well.nii.gz").any()
    assert rows_of(out).keys() == {"ill", "well"}
    with pytest.raises(ValueError, match="saved as nnunet"):
        evaluate.evaluate(evaluate.Arguments(out, tmp_path / "scores", part="all"))
    save(source / "ill_0001.nii.gz", ill_volume, turned)
    assert run_main(*command[:2], "--result_dir", tmp_path / "other") == 1
    assert "a second volume of case ill" in capsys.readouterr().err


def test_nnunets_files_hold_the_lungs_where_no_nodules_are_looked_for(
    run, volume, tmp_path
):
    source, out = save(tmp_path / "chest_0000.nii.gz", volume), tmp_path / "OUT"

    def segment(save_as, **options):
        lungs = replace(WITHOUT_SKIN, save_as=save_as)
        return infer.infer(
            run, out, input=source, lungs=lungs, nodules=NO_RUNS, **options
        ).line

    segment("nnunet")
    labels = read(out / "chest.nii.gz")
    assert np.unique(labels).tolist() == [0, 1, 2]
    assert "(1 scan done before)" in segment("nnunet")
    (out / "chest.nii.gz").unlink()
    segment("nnunet")  # what is lost is made again
    assert np.array_equal(read(out / "chest.nii.gz"), labels)
    with pytest.raises(ValueError, match="made with other settings"):
        segment("nifti")
    segment("nifti-labels", overwrite=True)
    assert not (out / "chest.nii.gz").exists()
    assert np.array_equal(read(out / "chest/mask.nii.gz"), labels)


def test_a_case_is_not_written_over_its_own_image(run, volume, tmp_path):
    lungs = replace(WITHOUT_SKIN, save_as="nnunet")
    source = save(tmp_path / "chest.nii.gz", volume)
    before = source.read_bytes()
    report = infer.infer(
        run, tmp_path, input=source, lungs=lungs, overwrite=True, nodules=NO_RUNS
    )
    assert "was not written by infer.py" in report.failures[0].reason
    assert source.read_bytes() == before


def test_probabilities_of_nodules_have_no_nnunet_form(nodule_run, volume, tmp_path):
    source = save(tmp_path / "chest.nii.gz", volume)
    lungs = replace(WITHOUT_SKIN, save_as="nnunet")
    with pytest.raises(ValueError, match="gives nodule probabilities; expected a run"):
        infer.infer(
            nodule_run,
            tmp_path / "OUT",
            input=source,
            lungs=lungs,
            nodules=NO_RUNS,
        )


def test_predict_finds_in_a_file_and_in_an_array_what_the_command_does(
    run, nodule_run, ill_volume, tmp_path
):
    source = save(tmp_path / "ill.nii.gz", ill_volume)
    out = tmp_path / "OUT"
    infer.infer(run, out, input=source, lungs=WITHOUT_SKIN, nodules=alone(nodule_run))
    expected = read(out / "ill/nodules.nii.gz").transpose(2, 1, 0)  # rises to S, P, L
    assert expected.any()
    options = {"exp_dir": run, "nodules": alone(nodule_run)}
    predict = functools.partial(segment_module.predict, lungs=WITHOUT_SKIN, **options)
    assert np.array_equal(predict(source), expected)
    array = np.ascontiguousarray(ill_volume.transpose(2, 1, 0))
    labels = predict(array, (5, 3, 3))
    assert np.array_equal(labels, expected)
    every = config.Postprocess(min_volume_mm3=0, within_lung=False)
    instances, rows = postprocess.postprocess(labels, (5, 3, 3), settings=every)
    assert np.array_equal(instances, expected)
    assert len(rows) == len(nodules_of(out))
    assert float(nodules_of(out)[0]["long_axis_mm"]) == pytest.approx(
        rows[0]["long_axis_mm"], abs=1e-3
    )
    scan_networks.cache_clear()


def test_predict_names_a_patient_that_was_trained_on(
    run, nodule_run, volume, tmp_path, caplog
):
    source = save(tmp_path / "trained-on.nii.gz", volume)
    options = {"exp_dir": run, "nodules": alone(nodule_run)}
    assert not segment_module.predict(source, lungs=WITHOUT_SKIN, **options).any()
    assert "patient trained-on was trained on (by hand, nodules)" in caplog.text
    scan_networks.cache_clear()


def test_predict_refuses_what_is_not_one_ct(run, nodule_run, volume, tmp_path):
    with pytest.raises(ValueError, match="spacing_mm is missing"):
        segment_module.predict(volume)
    with pytest.raises(ValueError, match=r"array: .* expected \(z, y, x\) HU"):
        segment_module.predict(volume[0], (1, 1, 1))
    with pytest.raises(ValueError, match="not Hounsfield units"):
        segment_module.predict(np.zeros((9, 9, 9), np.int16), (1, 1, 1))
    for name in ("a", "b"):
        save(tmp_path / f"{name}.nii.gz", volume)
    with pytest.raises(ValueError, match="has its own"):
        segment_module.predict(tmp_path / "a.nii.gz", (1, 1, 1))
    with pytest.raises(ValueError, match="2 scans; expected one"):
        segment_module.predict(tmp_path)
    with pytest.raises(ValueError, match="segments nodule; expected one for lungs"):
        segment_module.predict(tmp_path / "a.nii.gz", exp_dir=nodule_run)


def test_nodules_of_a_folder_without_a_run_are_refused(run, volume, tmp_path):
    source = save(tmp_path / "chest.nii.gz", volume)
    with pytest.raises(FileNotFoundError, match="--nodules None"):
        infer.infer(
            run, tmp_path / "OUT", input=source, nodules=alone(tmp_path / "absent")
        )


def test_what_the_false_positive_network_refuses_is_no_nodule(
    run, nodule_run, reduction_run, ill_volume, tmp_path, capsys
):
    source, out = save(tmp_path / "ill.nii.gz", ill_volume), tmp_path / "OUT"
    command = (
        *("--input", source, "--result_dir", out, "--exp_dir", run, "--n", 1),
        *("--min_volume_mm3", 60_000, "--nodules", nodule_run),
    )
    assert run_main(*command) == 0
    found = nodules_of(out)
    assert len(found) == 1
    assert run_main(*command, "--reduction", reduction_run) == 1
    assert "--reduction RUN" in capsys.readouterr().err
    assert run_main(*command, "--reduction", reduction_run, "--overwrite") == 0
    assert nodules_of(out) == []
    (candidate,) = nodules_of(out, "candidates.csv")
    assert (candidate["case_id"], candidate["nodule_id"]) == ("ill", "")
    assert 0 < float(candidate["score"]) < 0.99
    assert candidate["marked_by"] == "volumes"
    (before,) = found
    for name in ("i_source", "j_source", "k_source", "z_slice"):
        assert float(candidate[name]) == pytest.approx(float(before[name]), abs=1)
    record = json.loads((out / "lungs.json").read_text())
    assert record["nodules"]["reduction"]["min_score"] == 0.99
    command = (*command, "--reduction", reduction_run)
    assert run_main(*command, "--min_score", 0.01) == 1
    assert "with min_score 0.99, now 0.01; use the same" in capsys.readouterr().err
    assert run_main(*command, "--min_score", 1, "--overwrite") == 2
    assert "min_score is 1.0; expected 0 to below 1" in capsys.readouterr().err
    assert run_main(*command, "--min_score", 0.01, "--overwrite") == 0
    assert len(nodules_of(out)) == 1
    predictions = json.loads((out / "predictions.json").read_text())
    assert "trained-on" in predictions["training_patients"]


def test_a_file_of_a_scan_that_was_not_finished_is_written_again(run, volume, tmp_path):
    source, out = save(tmp_path / "chest.nii.gz", volume), tmp_path / "OUT"
    lungs = replace(WITHOUT_SKIN, save_as="nnunet")
    infer.infer(run, out, input=source, lungs=lungs, nodules=NO_RUNS)
    assert {path.name for path in out.iterdir()} == {
        "chest.nii.gz",
        "lungs.csv",
        "lungs.json",
        "predictions.json",
    }
    # Killed before it was listed.
    lines = (out / "lungs.csv").read_text().splitlines(keepends=True)
    (out / "lungs.csv").write_text(lines[0])
    (out / ".chest.started").touch()
    infer.infer(run, out, input=source, lungs=lungs, nodules=NO_RUNS)
    assert rows_of(out).keys() == {"chest"}
    assert not (out / ".chest.started").exists()
    # Without that mark it is another's.
    (out / "lungs.csv").write_text(lines[0])
    report = infer.infer(run, out, input=source, lungs=lungs, nodules=NO_RUNS)
    assert "was not written by infer.py" in report.failures[0].reason


def test_a_false_positive_network_that_is_missing_or_useless_is_refused(
    run, nodule_run, reduction_run, volume, tmp_path
):
    source, out = save(tmp_path / "chest.nii.gz", volume), tmp_path / "OUT"
    with pytest.raises(FileNotFoundError, match="--reduction None"):
        runs_of = NoduleRuns(nodule_run, None, tmp_path / "absent")
        infer.infer(run, out, input=source, nodules=runs_of)
    with pytest.raises(ValueError, match="no run finds nodules"):
        infer.infer(
            run, out, input=source, nodules=NoduleRuns(None, None, reduction_run)
        )
    with pytest.raises(ValueError, match="judges candidates, not volumes"):
        infer.infer(run, out, input=source, nodules=alone(reduction_run))


def test_runs_of_slices_that_are_missing_or_useless_are_refused(
    run, nodule_run, slices_run, reduction_run, volume, tmp_path
):
    source, out = save(tmp_path / "chest.nii.gz", volume), tmp_path / "OUT"

    def find(*runs_of):
        infer.infer(run, out, input=source, nodules=NoduleRuns(*runs_of))

    with pytest.raises(FileNotFoundError, match="--slices None"):
        find(nodule_run, tmp_path / "absent", reduction_run)
    with pytest.raises(
        ValueError, match="--reduction None; expected a run that judges"
    ):
        find(nodule_run, slices_run, None)
    with pytest.raises(ValueError, match="no run finds nodules"):
        find(None, slices_run, None)
    with pytest.raises(ValueError, match="expected a run for nodules in slices"):
        find(nodule_run, nodule_run, reduction_run)
    with pytest.raises(ValueError, match="expected a run for nodules in slices"):
        find(nodule_run, OUTLINES, reduction_run)
    # The runs that ship are left out without a word.
    find(nodule_run, CANDIDATES2D, None)
    assert rows_of(out).keys() == {"chest"}


def test_what_would_not_be_used_is_refused(run, nodule_run, volume, tmp_path):
    source, out = save(tmp_path / "chest.nii.gz", volume), tmp_path / "OUT"
    unused = NoduleRuns(None, min_score=0.5)
    with pytest.raises(ValueError, match="--min_score 0.5, but no run finds"):
        infer.infer(run, out, input=source, nodules=unused)
    unused = NoduleRuns(nodule_run, None, None, min_score=0.5)
    with pytest.raises(ValueError, match="no run finds nodules in lungs"):
        infer.infer(nodule_run, out, input=source, nodules=unused)
    with pytest.raises(ValueError, match="expected 0 to below 1"):
        replace(unused, min_score=1.0)
    with pytest.raises(ValueError, match="expected a run that finds nodules"):
        segment_module.predict(source, exp_dir=run, nodules=NO_RUNS)
    with pytest.raises(ValueError, match="--reduction None"):
        segment_module.predict(
            source, exp_dir=run, nodules=NoduleRuns(nodule_run, run, None)
        )
    assert not out.exists()


def test_a_nodule_that_slices_alone_mark_is_reported(
    run, nodule_run, slices_run, reduction_run, ill_volume, tmp_path, capsys
):
    source = save(tmp_path / "ill.nii.gz", np.where(ill_volume == 20, -400, ill_volume))
    out = tmp_path / "OUT"
    command = (
        *("--input", source, "--result_dir", out, "--exp_dir", run, "--n", 1),
        *("--min_volume_mm3", 60_000, "--nodules", nodule_run),
        *("--reduction", reduction_run, "--min_score", 0),
    )
    assert run_main(*command) == 0
    assert nodules_of(out) == []
    # Other runs, other results; those of before are asked for as then.
    assert run_main(*command, "--slices", slices_run) == 1
    shown = capsys.readouterr().err
    assert "by other runs; use the same" in shown
    assert "--slices RUN --reduction RUN" in shown
    assert run_main(*command) == 0
    assert run_main(*command, "--slices", slices_run, "--overwrite") == 0
    (nodule,) = nodules_of(out)
    place = [float(nodule[f"{axis}_source"]) for axis in "ijk"]
    assert place == pytest.approx([32, 47, 16], abs=0.7)
    first = nodules_of(out, "candidates.csv")[0]
    assert (first["nodule_id"], first["marked_by"]) == ("1", "slices")
    marked_mm = float(first["equivalent_diameter_mm"])
    assert marked_mm == pytest.approx(float(nodule["equivalent_diameter_mm"]), rel=0.2)
    record = json.loads((out / "lungs.json").read_text())
    assert record["nodules"]["slices"]["min_voxels"] == 4
    assert run_main(*command, "--slices", slices_run) == 0
    assert len(nodules_of(out)) == 1


def test_another_table_of_nodules_in_the_folder_is_refused(
    run, nodule_run, volume, tmp_path
):
    source = save(tmp_path / "chest.nii.gz", volume)
    out = tmp_path / "scores"
    out.mkdir()
    (out / "nodules.csv").write_text("scan_id,dice\na,0.5\n")
    with pytest.raises(ValueError, match="choose another --result_dir"):
        infer.infer(
            run, out, input=source, lungs=WITHOUT_SKIN, nodules=alone(nodule_run)
        )
    assert not (out / "lungs.json").exists()


def test_nodules_in_lungs_are_scored_as_those_of_a_run(
    run, nodule_run, reduction_run, chest_scan, tmp_path
):
    z, y, x = np.ogrid[tuple(slice(n) for n in chest_scan.hu.shape)]
    apart_mm2 = ((z - 16) * 5) ** 2 + ((y - 95) * 1.5) ** 2 + ((x - 65) * 1.5) ** 2
    ball = apart_mm2 <= 10**2
    centre = tuple(chest_scan.grid.index_to_ras_mm(np.array([16, 95, 65])).tolist())
    readers = tuple(Annotation(r, 4000.0, 20.0, {}) for r in range(2))
    scan = replace(
        chest_scan,
        hu=np.where(ball, 20, chest_scan.hu).astype(np.int16),
        reader_bits=ball * np.uint8(3),
        nodule_labels=ball.astype(np.uint8),
        nodules=(Nodule(1, centre, readers),),
    )
    write_scan(scan, scan_path(tmp_path / "scans", "chest"), {})
    arguments = evaluate.Arguments(
        tmp_path / "OUT", tmp_path / "scores", scans=tmp_path / "scans"
    )
    options = {"scans": tmp_path / "scans", "parts": ("test",), "lungs": WITHOUT_SKIN}
    infer.infer(run, arguments.predictions, nodules=NO_RUNS, **options)
    with pytest.raises(ValueError, match="holds lung masks without nodules"):
        evaluate.evaluate(arguments)
    infer.infer(
        run, arguments.predictions, nodules=alone(nodule_run), overwrite=True, **options
    )
    evaluate.evaluate(arguments)
    (nodule,) = nodules_of(arguments.out)
    assert nodule["hit"] == "1"
    assert float(nodule["dice"]) > 0.8
    record = json.loads((arguments.out / "scores.json").read_text())
    assert scores_of(arguments.out)["CPM (mean of these)"] == 1
    (made_by,) = (line for line in record["protocol"] if "found in the run's" in line)
    assert files.sha256(nodule_run / "best.weights.h5")[:12] in made_by
    # What is not reported is missed, and still a candidate of the FROC curve.
    infer.infer(
        run,
        arguments.predictions,
        nodules=NoduleRuns(nodule_run, None, reduction_run),
        overwrite=True,
        **options,
    )
    evaluate.evaluate(arguments)
    scores = scores_of(arguments.out)
    assert scores["Nodule sensitivity, all"] == 0
    assert scores["CPM (mean of these)"] == 1


def test_the_names_of_the_readme_are_there():
    for name in ("predict", "segment_nodule", "segment_patches", "Lungs", "Passes"):
        assert callable(getattr(infer, name))


def test_preset_w1_thresholds_the_mean_and_removes_nothing(run, volume, tmp_path):
    source, out = save(tmp_path / "chest.nii.gz", volume), tmp_path / "OUT"
    command = ("--input", source, "--exp_dir", run, "--preset", "w1", "--n", 20)
    assert run_main(*command, "--result_dir", out) == 0
    mean, mask = read(out / "chest/mean.nii.gz"), read(out / "chest/mask.nii.gz")
    assert np.unique(mean).tolist() == [0, 1]
    assert np.array_equal(mask > 0, mean > 0)
    record = json.loads((out / "lungs.json").read_text())
    assert (record["n"], record["mask_fraction"], record["snap"]) == (20, 0.7, 0)
    assert run_main(*command, "--result_dir", out / "npz", "--save_as", "numpy") == 0
    with np.load(out / "npz/chest.npz") as arrays:
        assert np.array_equal(arrays["mean_seg"], arrays["mask"] > 0)
        assert np.array_equal(arrays["std_seg"], arrays["std"])
        assert arrays["mean_seg"].dtype == np.uint8


def test_a_preset_fills_in_what_is_not_given():
    w1 = with_preset(infer.Lungs(), "w1")
    assert (w1.passes.n, w1.passes.mask_fraction, w1.labels.snap) == (100, 0.7, 0)
    given = infer.Lungs(Passes(n=3), LungMap(thresh=0.4), save_as="numpy")
    mixed = with_preset(given, "w1")
    assert (mixed.passes.n, mixed.labels.thresh, mixed.save_as) == (3, 0.4, "numpy")
    assert mixed.passes.mask_fraction == 0.7
    assert with_preset(given, "default") == given


@pytest.fixture
def dicom_images(volume):
    """`volume` as a DICOM series, one of whose headers has another frame of reference."""
    # Slices of a chest resemble their neighbours.
    hu = ndimage.uniform_filter1d(volume.transpose(2, 1, 0), 3, axis=0)
    hu[:, 0, 0] += np.arange(len(hu), dtype=hu.dtype)  # equal slices are refused
    images = ct_series(hu, step=(0, 0, 5.0))
    for image in images:
        image.PixelSpacing = ["3", "3"]
    images[3].FrameOfReferenceUID = "1.2.3"
    return images


def test_warnings_of_a_series_stay_with_its_results(
    run, dicom_images, tmp_path, caplog
):
    save_series(dicom_images, tmp_path / "Secret Name")
    listed = write_list(tmp_path / "scans.csv", [("P1", "Secret Name")])
    out = tmp_path / "OUT"
    command = ("--csv_file", listed, "--result_dir", out, "--exp_dir", run, "--n", 1)
    assert run_main(*command) == 0
    warning = rows_of(out)["P1"]["warnings"]
    assert "have another FrameOfReferenceUID" in warning
    assert f"P1: {warning}" in caplog.text
    record = json.loads((out / "predictions.json").read_text())
    assert record["scans"]["P1"]["warnings"] == [warning]
    assert "repair" not in record
    lungs = json.loads((out / "lungs.json").read_text())
    assert not {"repair", "series"} & set(lungs)
    assert run_main(*command) == 0  # nothing is read again, and nothing is lost
    assert (
        json.loads((out / "predictions.json").read_text())["scans"] == record["scans"]
    )
    written = caplog.text + "".join(p.read_text() for p in out.glob("*.[cj]s*"))
    assert "Secret" not in written


def test_repair_reads_a_series_with_a_gap_and_is_recorded(run, dicom_images, tmp_path):
    dicom_images[3].FrameOfReferenceUID = dicom_images[0].FrameOfReferenceUID
    save_series([im for k, im in enumerate(dicom_images) if k != 5], tmp_path / "ct")
    command = ("--input", tmp_path / "ct", "--exp_dir", run, "--n", 1)
    assert run_main(*command, "--result_dir", tmp_path / "refused") == 3
    assert "--repair gaps" in (tmp_path / "refused/skipped.csv").read_text()
    out = tmp_path / "OUT"
    command = (*command, "--result_dir", out)
    assert run_main(*command, "--repair", "gaps", "tilt") == 0
    (pid,) = rows_of(out)
    assert json.loads((out / "lungs.json").read_text())["repair"] == ["gaps", "tilt"]
    mask = nibabel.load(out / pid / "mask.nii.gz")
    assert mask.shape[2] == len(dicom_images)
    assert run_main(*command) == 1  # results of other settings
    assert run_main(*command, "--repair", "gaps", "tilt") == 0


def test_a_series_is_chosen_by_its_uid(run, dicom_images, tmp_path):
    save_series(dicom_images, tmp_path / "ct/a")
    for image in dicom_images:
        image.SeriesInstanceUID = "1.2.3"
    save_series(dicom_images[1:], tmp_path / "ct/b")
    options = ("--exp_dir", run, "--n", 1)
    chosen = ("--input", tmp_path / "ct", "--series", "1.2.3")
    assert run_main(*chosen, *options, "--result_dir", tmp_path / "one") == 0
    assert set(rows_of(tmp_path / "one")) == {"1.2.3"}
    assert json.loads((tmp_path / "one/lungs.json").read_text())["series"] == "1.2.3"
    every = ("--input", tmp_path / "ct", "--result_dir", tmp_path / "all")
    assert run_main(*every, *options) == 0
    assert len(rows_of(tmp_path / "all")) == 2
    absent = ("--series", "9.9", "--result_dir", tmp_path / "none")
    assert run_main(*chosen[:2], *options, *absent) == 1
    listed = write_list(tmp_path / "scans.csv", [("P1", "ct")])
    command = ("--csv_file", listed, "--result_dir", tmp_path / "best", *options)
    assert run_main(*command) == 0
    best = rows_of(tmp_path / "best")["P1"]
    assert "2 CT series; read 1.2.826" in best["warnings"]


def test_repair_of_scan_files_is_refused(run, tmp_path, capsys):
    command = ("--exp_dir", run, "--result_dir", tmp_path / "OUT", "--repair", "gaps")
    assert run_main(*command) == 1
    assert "scan files were read by preprocess.py" in capsys.readouterr().err


def test_rows_of_lungs_without_later_columns_are_read_as_before(tmp_path):
    path = tmp_path / "lungs.csv"
    path.write_text(
        "pid,n,right_ml,left_ml,score,flag,reason,seconds\nP1,1,2.0,3.0,0.9,0,,1.0\n"
    )
    (row,) = read_lung_rows(path)
    assert (row.pid, row.warnings, row.nodules_searched) == ("P1", "", "")
    write_lung_rows(path, [replace(row, warnings="odd; indeed")])
    (row,) = read_lung_rows(path)
    assert row.warnings == "odd; indeed"
    path.write_text(
        "pid,n,right_ml,left_ml,score,flag,reason,seconds,warnings\n"
        "P1,1,2.0,3.0,0.9,0,,1.0,odd\n"
    )
    (row,) = read_lung_rows(path)
    assert (row.warnings, row.unsearched_ml) == ("odd", 0.0)
