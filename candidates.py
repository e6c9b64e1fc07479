"""The false-positive network on candidates: nodule, or a vessel, the pleura, a scar?

A run with a classifier, trained on crops around nodules and around what else is as dense
(`batches.crop` candidate). It sees each candidate in the middle of a crop, and its mirror
images: a candidate is judged by the mean.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

import augment
import boxes
import monte_carlo
import resample
import runs
from geometry import Grid
from runs import Precision
from scan import AIR_HU, Scan

MIRRORS = ((), (1,), (2,), (1, 2))
"""Axes of (z, y, x) along which a crop is mirrored; head and feet are never exchanged."""

CANDIDATES_AT_ONCE = 4
"""In a call of the network; fewer are padded, so that it is traced once."""


class CandidateClassifier:
    """A false-positive network, built and loaded once for any number of scans.

    Args:
        run_dir: Made by train.py.
        precision: Keras' policy while the network is built.

    Attributes:
        postprocess: How candidates are found; `min_score` is the least probability of one
            that is kept.

    Raises:
        FileNotFoundError: If the run is missing.
        ValueError: If it classifies no candidates.
    """

    def __init__(self, run_dir: Path, *, precision: Precision | None = None) -> None:
        settings = runs.read_settings(run_dir)
        if settings.batches.crop != "candidate" or not settings.model.slice_classifier:
            raise ValueError(
                f"{run_dir}: batches.crop={settings.batches.crop}, model.slice_classifier="
                f"{settings.model.slice_classifier}; expected candidate and True, such as "
                "a run of reduction3d"
            )
        monte_carlo.refuse_lung_masks(run_dir, settings.batches)
        self.batches = settings.batches
        self.postprocess = settings.postprocess
        self.spacing_mm = settings.table.volume_spacing_mm
        self.network = runs.load_network(
            run_dir, settings, settings.batches.volume_px, precision=precision
        )

    def probability(self, scan: Scan, places: Sequence[Sequence[float]]) -> np.ndarray:
        """Probability that there is a nodule at places of a scan.

        Args:
            scan: The scan.
            places: (n, 3) indices (z, y, x) of its voxels, fractions allowed.

        Returns:
            (n,) float64.
        """
        inputs = [
            augment.to_input(crop, None, self.batches)
            for crop in crops(scan, places, self.spacing_mm, self.batches.volume_px)
        ]
        mirrored = [np.flip(image, axes) for image in inputs for axes in MIRRORS]
        found: list[float] = []
        size = CANDIDATES_AT_ONCE * len(MIRRORS)
        for start in range(0, len(mirrored), size):
            batch = np.stack(mirrored[start : start + size])
            batch = np.resize(batch, (size, *batch.shape[1:]))
            output = self.network.predict_on_batch(batch[..., None])
            found += np.asarray(output["slice"])[:, 0].tolist()
        return np.reshape(found[: len(mirrored)], (-1, len(MIRRORS))).mean(axis=1)


def crops(
    scan: Scan,
    places: Sequence[Sequence[float]],
    spacing_mm: float,
    size: tuple[int, int, int],
) -> list[np.ndarray]:
    """(z, y, x) float32 HU around places of a scan in cubic voxels; beyond it is air.

    They are parts of the volume that the table would hold, without making all of it.
    """
    weights, affine = resample.isotropic(scan.grid, spacing_mm)
    shape = (len(weights[0]), len(weights[1]), len(weights[2]))
    cubic = Grid(shape, affine)
    found = []
    for place in places:
        at = cubic.ras_mm_to_index(scan.grid.index_to_ras_mm(np.asarray(place)))
        inside, covered = boxes.overlap(boxes.crop_on(at, size).start, size, shape)
        crop = np.full(size, AIR_HU, np.float32)
        if all(part.stop > part.start for part in inside):
            rows = [axis[part] for axis, part in zip(weights, inside, strict=True)]
            read = [np.flatnonzero(row.any(axis=0)) for row in rows]
            own = tuple(slice(int(used[0]), int(used[-1]) + 1) for used in read)
            inner = [row[:, part] for row, part in zip(rows, own, strict=True)]
            crop[covered] = resample.volume(scan.hu[own], inner)
        found.append(crop)
    return found


def tightened(labels: np.ndarray, prob: np.ndarray, threshold: float) -> np.ndarray:
    """A map cut down to the outlines of the candidates in it.

    A threshold that misses no candidate is too low for an outline. What counts of each is
    what reaches `threshold`, or half of its own largest probability if that is less.

    Args:
        labels: (z, y, x) labels 1 to n of the candidates.
        prob: (z, y, x) the map they were found in.
        threshold: Of an outline.

    Returns:
        (z, y, x) float32: `prob` in the outlines, else 0.
    """
    inside = labels > 0
    owners, chances = labels[inside], prob[inside]
    peaks = np.zeros(int(owners.max(initial=0)) + 1, np.float32)
    np.maximum.at(peaks, owners, chances)
    least = np.minimum(np.float32(threshold), peaks / 2)
    result = np.zeros(prob.shape, np.float32)
    result[inside] = np.where(chances >= least[owners], chances, 0)
    return result
