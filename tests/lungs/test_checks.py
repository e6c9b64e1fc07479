"""Lungs that are not to be trusted are flagged with the reason."""

import numpy as np
import pytest

import infer
from inference.passes import Passes
from inference.segment import NO_RUNS, Lungs
from tests.infer_calls import WITHOUT_SKIN, read, rows_of, save


def test_a_slab_without_lungs_is_flagged(lung_run, volume, tmp_path):
    slab = np.where(volume == -850, np.int16(40), volume)[..., :12]
    path = save(tmp_path / "slab.nii.gz", np.ascontiguousarray(slab))
    infer.infer(
        lung_run,
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
    lung_run, volume, tmp_path, spoil, reason
):
    path = save(tmp_path / "ct.nii.gz", np.ascontiguousarray(spoil(volume)))
    infer.infer(
        lung_run, tmp_path / "out", input=path, lungs=WITHOUT_SKIN, nodules=NO_RUNS
    )
    row = rows_of(tmp_path / "out")["ct"]
    assert row["flag"] == "1"
    assert reason in row["reason"]
