"""Calls of infer.py in this process on small scans, and readers of their results."""

import csv

import nibabel
import numpy as np
import pytest

import infer
from inference.passes import Passes
from inference.segment import Lungs, NoduleRuns
from lungs.labels import LungMap

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


def nodules_of(folder, table="nodules.csv"):
    with (folder / table).open(newline="") as file:
        return list(csv.DictReader(file))


def read(path):
    return np.asarray(nibabel.load(path).dataobj)


def alone(nodule_run):
    """That run, with none beside it."""
    return NoduleRuns(nodule_run, slices=None, reduction=None)
