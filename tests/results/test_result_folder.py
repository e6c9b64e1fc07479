"""The result folder of infer.py: its formats, and what is kept, replaced or refused there."""

import json
from dataclasses import replace

import nibabel
import numpy as np
import pytest

import evaluate
import infer
from inference.passes import Passes
from inference.segment import NO_RUNS, Lungs
from tests.infer_calls import (
    AFFINE,
    WITHOUT_SKIN,
    alone,
    nodules_of,
    read,
    rows_of,
    run_main,
    save,
    write_list,
)
from training.runs import read_settings


def test_numpy_holds_the_same_in_ras_order(lung_run, volume, tmp_path):
    path = save(tmp_path / "chest.nii.gz", volume)
    for save_as in ("numpy", "nifti"):
        lungs = Lungs(passes=Passes(n=2), save_as=save_as)
        infer.infer(
            lung_run, tmp_path / save_as, input=path, lungs=lungs, nodules=NO_RUNS
        )
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


def test_labels_alone_are_written_when_asked(lung_run, volume, tmp_path):
    path = save(tmp_path / "chest.nii.gz", volume)
    code = run_main(
        *("--input", path, "--exp_dir", lung_run, "--result_dir", tmp_path / "out"),
        *("--save_as", "nifti-labels", "--n", 0),
    )
    assert code == 0
    assert [p.name for p in (tmp_path / "out/chest").iterdir()] == ["mask.nii.gz"]


def test_numpy_holds_nodules_too(lung_run, nodule_run, ill_volume, tmp_path):
    lungs = replace(WITHOUT_SKIN, save_as="numpy")
    source = save(tmp_path / "ill.nii.gz", ill_volume)
    out = tmp_path / "OUT"
    infer.infer(lung_run, out, input=source, lungs=lungs, nodules=alone(nodule_run))
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
    lung_run, nodule_run, ill_volume, volume, tmp_path, capsys
):
    turned = np.float64(np.float32(rotation_z(0.1) @ AFFINE + [[0, 0, 0, 1 / 3]] * 4))
    turned[3] = 0, 0, 0, 1
    source, out = tmp_path / "images", tmp_path / "OUT"
    source.mkdir()
    save(source / "ill_0000.nii.gz", ill_volume, turned)
    save(source / "well_0000.nii.gz", volume[:, :, ::-1], np.diag([-3.0, -3, -5, 1]))
    command = (
        *("--input", source, "--result_dir", out, "--save_as", "nnunet"),
        *("--exp_dir", lung_run, "--n", 1, "--min_volume_mm3", 60_000, "--snap", 0),
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
    lung_run, volume, tmp_path
):
    source, out = save(tmp_path / "chest_0000.nii.gz", volume), tmp_path / "OUT"

    def segment(save_as, **options):
        lungs = replace(WITHOUT_SKIN, save_as=save_as)
        return infer.infer(
            lung_run, out, input=source, lungs=lungs, nodules=NO_RUNS, **options
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


def test_a_case_is_not_written_over_its_own_image(lung_run, volume, tmp_path):
    lungs = replace(WITHOUT_SKIN, save_as="nnunet")
    source = save(tmp_path / "chest.nii.gz", volume)
    before = source.read_bytes()
    report = infer.infer(
        lung_run, tmp_path, input=source, lungs=lungs, overwrite=True, nodules=NO_RUNS
    )
    assert "was not written by infer.py" in report.failures[0].reason
    assert source.read_bytes() == before


def test_what_is_there_is_kept_and_other_settings_are_refused(
    lung_run, volume, tmp_path
):
    path = save(tmp_path / "chest.nii.gz", volume)
    out = tmp_path / "out"
    one = Lungs(passes=Passes(n=1))
    infer.infer(lung_run, out, input=path, lungs=one, nodules=NO_RUNS)
    mask = out / "chest/mask.nii.gz"
    before = mask.stat().st_mtime_ns
    report = infer.infer(lung_run, out, input=path, lungs=one, nodules=NO_RUNS)
    assert "(1 scan done before)" in report.line
    assert mask.stat().st_mtime_ns == before
    other = Lungs(passes=Passes(n=2))
    with pytest.raises(ValueError, match=r"'n': \(1, 2\).*use --overwrite"):
        infer.infer(lung_run, out, input=path, lungs=other, nodules=NO_RUNS)
    infer.infer(lung_run, out, input=path, lungs=other, overwrite=True, nodules=NO_RUNS)
    assert rows_of(out)["chest"]["n"] == "2"


@pytest.fixture
def beside(volume, tmp_path):
    """Two scans, each in a folder of its id, and a list of them."""
    for pid in ("P1", "P2"):
        (tmp_path / pid).mkdir()
        save(tmp_path / pid / "ct.nii.gz", volume)
    rows = [(pid, f"{pid}/ct.nii.gz") for pid in ("P1", "P2")]
    return write_list(tmp_path / "scans.csv", rows)


@pytest.mark.parametrize("options", [(), ("--overwrite",)])
def test_results_never_replace_what_is_not_infers(lung_run, beside, options):
    """The sources lie where the results would: RESULT_DIR/PID."""
    command = (
        "--csv_file",
        beside,
        "--result_dir",
        beside.parent,
        "--exp_dir",
        lung_run,
    )
    assert run_main(*command, "--n", 1, *options) == 3
    for pid in ("P1", "P2"):
        assert [p.name for p in (beside.parent / pid).iterdir()] == ["ct.nii.gz"]
    assert "was not written by infer.py" in (beside.parent / "skipped.csv").read_text()


def test_overwriting_removes_what_infer_wrote_and_no_more(lung_run, beside):
    out = beside.parent / "OUT"
    options = ("--exp_dir", lung_run, "--n", 1)
    command = ("--csv_file", beside, "--result_dir", out, *options)
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
    make_lung_run, lung_run, beside, tmp_path
):
    model = replace(read_settings(lung_run).model, dropout=0.0)
    settings = replace(read_settings(lung_run), model=model)
    lung_run = make_lung_run(tmp_path / "no-dropout", experiment=settings)
    command = (
        "--csv_file",
        beside,
        "--result_dir",
        tmp_path / "OUT",
        "--exp_dir",
        lung_run,
    )
    assert run_main(*command, "--draw", "dropout", "--n", 5) == 1
    assert not (tmp_path / "OUT").exists()


def test_a_call_that_is_killed_has_said_whose_results_these_are(
    lung_run, beside, tmp_path, monkeypatch
):
    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(infer, "read_and_map", killed)
    with pytest.raises(KeyboardInterrupt):
        infer.infer(lung_run, tmp_path / "OUT", csv_file=beside, nodules=NO_RUNS)
    record = json.loads((tmp_path / "OUT/predictions.json").read_text())
    assert len(record["weights_sha256"]) == 64
    assert record["scans"] == {}


def test_a_file_of_a_scan_that_was_not_finished_is_written_again(
    lung_run, volume, tmp_path
):
    source, out = save(tmp_path / "chest.nii.gz", volume), tmp_path / "OUT"
    lungs = replace(WITHOUT_SKIN, save_as="nnunet")
    infer.infer(lung_run, out, input=source, lungs=lungs, nodules=NO_RUNS)
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
    infer.infer(lung_run, out, input=source, lungs=lungs, nodules=NO_RUNS)
    assert rows_of(out).keys() == {"chest"}
    assert not (out / ".chest.started").exists()
    # Without that mark it is another's.
    (out / "lungs.csv").write_text(lines[0])
    report = infer.infer(lung_run, out, input=source, lungs=lungs, nodules=NO_RUNS)
    assert "was not written by infer.py" in report.failures[0].reason


def test_another_table_of_nodules_in_the_folder_is_refused(
    lung_run, nodule_run, volume, tmp_path
):
    source = save(tmp_path / "chest.nii.gz", volume)
    out = tmp_path / "scores"
    out.mkdir()
    (out / "nodules.csv").write_text("scan_id,dice\na,0.5\n")
    with pytest.raises(ValueError, match="choose another --result_dir"):
        infer.infer(
            lung_run, out, input=source, lungs=WITHOUT_SKIN, nodules=alone(nodule_run)
        )
    assert not (out / "lungs.json").exists()
