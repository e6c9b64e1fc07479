"""The false-positive network on candidates: nodule, or a vessel, the pleura, a scar?

A run with a classifier, trained on crops around nodules, around what else is as dense, and
around what other networks took for nodules (`batches.crop` candidate). It sees each candidate
in the middle of a crop, and its mirror images: a candidate is judged by their mean.
"""

import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

import config
from ct import boxes, resample
from ct.geometry import Grid
from ct.inputs import to_input
from ct.scan import AIR_HU, Scan
from inference import predictor3d
from nodules.components import components
from training import runs
from training.runs import Precision

MIRRORS = ((), (1,), (2,), (1, 2))
"""Axes of (z, y, x) along which a crop is mirrored; head and feet are never exchanged."""

OUTLINED_FROM = 0.5
"""Probability of the 3-D network within the outline of a candidate that reaches it."""

CANDIDATES_AT_ONCE = 4
"""In a call of the network; fewer are padded, so that it is traced once."""


class CandidateClassifier:
    """A false-positive network, built and loaded once for any number of scans.

    Args:
        run_dir: Made by train.py.
        precision: Keras' policy while the network is built.

    Attributes:
        postprocess: How candidates are found; `min_score` is the least score of one that
            is kept, the probability times that of who found it.

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
        predictor3d.refuse_lung_masks(run_dir, settings.batches)
        self.batches = settings.batches
        self.postprocess = settings.postprocess
        self.spacing_mm = settings.table.volume_spacing_mm
        self.network = runs.load_network(
            run_dir, settings, settings.batches.volume_px, precision=precision
        )

    def probabilities(
        self, scan: Scan, places: Sequence[Sequence[float]]
    ) -> np.ndarray:
        """Probability that there is a nodule at places of a scan, by every mirror image.

        Args:
            scan: The scan.
            places: (n, 3) indices (z, y, x) of its voxels, fractions allowed.

        Returns:
            (n, mirrors) float64; a candidate is judged by the mean of its row.
        """
        size_px = self.batches.volume_px
        found = np.zeros((len(places), len(MIRRORS)))
        batch = np.zeros((CANDIDATES_AT_ONCE, len(MIRRORS), *size_px), np.float32)
        cut = crops(scan, places, self.spacing_mm, size_px)
        for start in range(0, len(places), CANDIDATES_AT_ONCE):
            some = found[start : start + CANDIDATES_AT_ONCE]
            for index, crop in enumerate(itertools.islice(cut, len(some))):
                image = to_input(crop, None, self.batches)
                batch[index] = [np.flip(image, axes) for axes in MIRRORS]
            inputs = batch.reshape(-1, *size_px, 1)
            judged = np.asarray(self.network.predict_on_batch(inputs)["slice"])
            some[:] = judged.reshape(len(batch), -1)[: len(some)]
        return found


def crops(
    scan: Scan,
    places: Sequence[Sequence[float]],
    spacing_mm: float,
    size: tuple[int, int, int],
) -> Iterator[np.ndarray]:
    """(z, y, x) float32 HU around places of a scan in cubic voxels; beyond it is air.

    They are parts of the volume that the table would hold, without making all of it.
    """
    weights, affine = resample.isotropic(scan.grid, spacing_mm)
    shape = (len(weights[0]), len(weights[1]), len(weights[2]))
    cubic = Grid(shape, affine)
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
        yield crop


def candidate_map(prob: np.ndarray, settings: config.Postprocess) -> np.ndarray:
    """A map that holds candidates alone, each within its outline.

    Components from `OUTLINED_FROM` on are outlined by it. Then it is halved, down to
    `settings.threshold`, and components with nothing yet in them are added: what is less
    probable has its own outline, and is joined to no other.

    Args:
        prob: (z, y, x) probability of nodule.
        settings: `threshold` and `connectivity` count.

    Returns:
        (z, y, x) float32: `prob` in the candidates, else 0.
    """
    result = np.zeros(prob.shape, np.float32)
    box = boxes.around(prob >= np.float32(min(settings.threshold, OUTLINED_FROM)))
    if box is None:
        return result
    threshold = OUTLINED_FROM
    inner, taken = prob[box], np.zeros(prob[box].shape, bool)
    while True:
        parts = components(inner >= np.float32(threshold), settings.connectivity)
        known = np.unique(parts[taken])
        taken |= (parts > 0) & ~np.isin(parts, known[known > 0])
        if threshold <= settings.threshold:
            break
        threshold = max(threshold / 2, settings.threshold)
    result[box] = np.where(taken, inner, 0)
    return result
