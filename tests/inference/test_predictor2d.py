"""A 2-D run for lungs, slice by slice."""

from dataclasses import replace

import cv2
import numpy as np

import infer
from inference.passes import Passes
from inference.predictor2d import Predictor
from inference.segment import NO_RUNS, Lungs
from tests.infer_calls import read, rows_of, save
from training import runs
from training.runs import read_settings


def test_a_2d_run_writes_the_same_files(make_lung_run, lung_run, volume, tmp_path):
    settings = read_settings(lung_run)
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


def test_a_2d_run_sees_pixels_of_its_own_size(
    make_lung_run, lung_run, chest_scan, tmp_path
):
    settings = read_settings(lung_run)
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
