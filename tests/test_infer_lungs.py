"""infer.py with a run for lungs: W1's command line, in this process, on small scans."""

import csv
import json
from dataclasses import replace

import nibabel
import numpy as np
import pytest
import SimpleITK
from scipy import ndimage

import infer
from inference.passes import Passes
from inference.segment import NO_RUNS, Lungs
from tests.infer_calls import (
    AFFINE,
    WITHOUT_SKIN,
    read,
    rows_of,
    run_main,
    save,
    write_list,
)


@pytest.fixture(scope="module")
def written(lung_run, volume, tmp_path_factory):
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
        *("--exp_dir", lung_run, "--n", 20, "--thresh", 0.55, "--save_as", "nifti"),
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


def test_the_record_says_how_the_lungs_were_made(written):
    record = json.loads((written / "lungs.json").read_text())
    assert (record["n"], record["seed"], record["thresh"]) == (20, 0, 0.55)
    assert record["converged_dice"] is None  # for 20 passes were asked for
    assert len(record["weights_sha256"]) == 64
    assert record["provenance"]["packages"]["tensorflow"]


def test_same_seed_same_bytes_another_seed_others(lung_run, volume, tmp_path):
    path = save(tmp_path / "chest.nii.gz", volume)
    bytes_of = {}
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        out = tmp_path / name
        lungs = Lungs(passes=Passes(n=2, seed=seed))
        infer.infer(lung_run, out, input=path, lungs=lungs, nodules=NO_RUNS)
        bytes_of[name] = [
            (out / "chest" / f"{m}.nii.gz").read_bytes() for m in ("mean", "std")
        ]
    assert bytes_of["a"] == bytes_of["b"]
    assert bytes_of["a"] != bytes_of["c"]


def test_a_single_look_finds_both_lungs_and_they_are_trusted(
    lung_run, volume, tmp_path
):
    path = save(tmp_path / "chest.nii.gz", volume)
    out = tmp_path / "out"
    assert (
        run_main("--input", path, "--exp-dir", lung_run, "--result-dir", out, "--n=1")
        == 0
    )
    row = rows_of(out)["chest"]
    assert (row["n"], row["flag"], row["reason"]) == ("1", "0", "")
    # An ellipse of 45 x 27 pixels of 1.5 mm over 26 slices of 5 mm.
    lung_ml = np.pi * 67.5 * 40.5 * 130 / 1000
    for side in ("right_ml", "left_ml"):
        assert float(row[side]) == pytest.approx(lung_ml, rel=0.03)
    other = tmp_path / "own-border"
    args = ("--exp-dir", lung_run, "--result-dir", other, "--n=1", "--snap=0")
    assert run_main("--input", path, *args) == 0
    row = rows_of(other)["chest"]
    for side in ("right_ml", "left_ml"):  # the network set by hand loses their borders
        assert 0.75 * lung_ml < float(row[side]) < 0.95 * lung_ml
    assert not read(out / "chest/std.nii.gz").any()
    mask = read(out / "chest/mask.nii.gz")
    # x rises to the left in the file, so the right lung comes first.
    assert np.nonzero(mask == 1)[0].mean() < 50 < np.nonzero(mask == 2)[0].mean()


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
    lung_run, volume, tmp_path, flip
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
        lung_run,
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


@pytest.mark.parametrize(("slices", "step_mm"), [(25, 8.0), (2000, 0.1)])
def test_thick_and_many_slices_give_the_same_lungs(
    lung_run, volume, tmp_path, slices, step_mm
):
    nearest = np.arange(slices) * step_mm / 5
    cut = volume[::2, ::2, nearest.astype(int)]  # 200 mm as before
    path = save(tmp_path / "ct.nii.gz", cut, np.diag([-6.0, -6.0, step_mm, 1.0]))
    lungs = replace(WITHOUT_SKIN, save_as="nifti-labels")
    report = infer.infer(
        lung_run, tmp_path / "out", input=path, lungs=lungs, nodules=NO_RUNS
    )
    assert not report.failures
    row = rows_of(tmp_path / "out")["ct"]
    lung_ml = np.pi * 67.5 * 40.5 * 130 / 1000
    for side in ("right_ml", "left_ml"):  # the network set by hand loses their borders
        assert float(row[side]) == pytest.approx(lung_ml, rel=0.2)
    assert read(tmp_path / "out/ct/mask.nii.gz").shape == (50, 50, slices)


def test_the_names_of_the_readme_are_there():
    for name in ("predict", "segment_nodule", "segment_patches", "Lungs", "Passes"):
        assert callable(getattr(infer, name))


def test_preset_w1_thresholds_the_mean_and_removes_nothing(lung_run, volume, tmp_path):
    source, out = save(tmp_path / "chest.nii.gz", volume), tmp_path / "OUT"
    command = ("--input", source, "--exp_dir", lung_run, "--preset", "w1", "--n", 20)
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
