"""False-positive reduction: a classifier tells nodules from vessels, pleura and scars.

The run was trained with `batches.crop=candidate`: on crops around nodules, around other dense
structures and around false positives of other networks. It sees each candidate in the centre
of a crop and in the mirror images of that crop; the mean over them is the probability.
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
"""Axes of (z, y, x) along which a crop is mirrored; z never is, so the head stays up."""

OUTLINED_FROM = 0.5
"""Threshold at which a candidate of the 3-D network is outlined if its peak reaches it."""

CANDIDATES_AT_ONCE = 4
"""Candidates per network call; fewer are padded, so that the network is traced once."""


class CandidateClassifier:
    """A false-positive network, built and loaded once for any number of scans.

    Args:
        run_dir: Run directory made by train.py.
        precision: Keras dtype policy while the network is built.

    Attributes:
        postprocess: Settings that find candidates. Candidates with a score below
            `min_score` are dropped; the score is this network's probability times the
            largest probability of the network that marked the candidate.

    Raises:
        FileNotFoundError: If the run is missing.
        ValueError: If the run does not classify candidates.
    """

    def __init__(self, run_dir: Path, *, precision: Precision | None = None) -> None:
        settings = runs.read_settings(run_dir)
        if settings.batches.crop != "candidate" or not settings.model.slice_classifier:
            raise ValueError(
                f"{run_dir}: batches.crop={settings.batches.crop}, model.slice_classifier="
                f"{settings.model.slice_classifier}; expected candidate and True, such as "
                "a reduction3d run"
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
        """Computes the nodule probability at places of a scan for every mirror image.

        Args:
            scan: The scan.
            places: (n, 3) voxel indices (z, y, x), fractions allowed.

        Returns:
            (n, mirrors) float64; the mean of a row is the probability of its candidate.
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
    """Yields (z, y, x) float32 crops in HU around places, in cubic voxels.

    The crops equal parts of the resampled volume in the table, without resampling all of it.
    Voxels outside the scan are air.
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
    """Keeps the probability map inside candidates only, each within its own outline.

    The first candidates are the components at the threshold `OUTLINED_FROM`. The threshold
    is then halved step by step down to `settings.threshold`; each step adds the components
    that contain no earlier candidate. Thus less probable candidates get an outline of their own
    and do not merge with others.

    Args:
        prob: (z, y, x) nodule probability.
        settings: Only `threshold` and `connectivity` are used.

    Returns:
        (z, y, x) float32: `prob` in the candidates, 0 elsewhere.
    """
    result = np.zeros(prob.shape, np.float32)
    box = boxes.bounding_box(prob >= np.float32(min(settings.threshold, OUTLINED_FROM)))
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
