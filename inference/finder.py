"""Nodules of whole scans: marked by two networks, judged by a third, outlined by a fourth.

A 3-D network marks candidates, and one of slices more of them. The false-positive network
looks at each by itself and tells nodules from vessels. What voxels of 1 mm cannot show, the
border of a small nodule, the seeded network outlines slice by slice in the scan's own pixels.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

import config
from ct import files
from ct.geometry import Grid
from ct.scan import Scan, ScanError
from inference.candidates import CandidateClassifier, candidate_map
from inference.outlining import outlined
from inference.passes import Maps, Passes
from inference.predictor2d import Predictor
from inference.predictor3d import MEMORY_GB, VolumePredictor
from inference.seeded import PatchPredictor
from nodules.components import label_nodules
from nodules.found import Candidate, Found, MarkedBy
from nodules.measures import measure_nodules, sphere_diameter_mm
from training import runs
from training.runs import Precision

PIXEL_MM = (0.4, 1.2)
"""Pixels that the seeded network knows; in others the outlines of who found it stay."""


class NoduleFinder:
    """Runs that mark nodules, one that judges and one that outlines; each loads once.

    Args:
        run_dir: Of the 3-D network. If it was tuned, it makes as many passes as it was
            tuned on, and without a false-positive network its values count.
        seeded_dir: Of the seeded network; None keeps the outlines of who marked them.
        slices_dir: Of a network of slices, whose candidates join those of the 3-D one; its
            settings say what they are, and the false-positive network judges them.
        reduction_dir: Of the false-positive network, whose settings say how candidates are
            found and which are kept; None keeps what the 3-D one finds.
        min_score: The least score that is reported; None for what the settings of who
            judges say.
        seed: Of the dropout, if there are several passes.
        batch_size: Tiles of slices in a call.
        precision: Keras' policy for all but the seeded network.
        memory_gb: As for `VolumePredictor`.

    Attributes:
        rule: What is a candidate of the 3-D network, and which candidates are reported.
        made_by: What decides the result, JSON-ready.

    Raises:
        FileNotFoundError: If a run is missing.
        ValueError: If a run does not find nodules in volumes, or in slices, or was tuned
            with other weights, or nothing judges what is found in slices.
    """

    def __init__(
        self,
        run_dir: Path,
        seeded_dir: Path | None,
        *,
        slices_dir: Path | None = None,
        reduction_dir: Path | None = None,
        min_score: float | None = None,
        seed: int = 0,
        batch_size: int = 8,
        precision: Precision = "float32",
        memory_gb: float = MEMORY_GB,
    ) -> None:
        if slices_dir is not None and reduction_dir is None:
            raise ValueError(
                f"{slices_dir} with no false-positive network; expected one"
            )
        settings = runs.read_settings(run_dir)
        if settings.batches.target != "nodule" or settings.model.name != "unet3d":
            raise ValueError(
                f"{run_dir}: a {settings.model.name} for {settings.batches.target}; "
                "expected a unet3d for nodules, such as one of nodule3d"
            )
        self.settings, n = runs.tuned_settings(run_dir, settings)
        self.predictor = VolumePredictor(
            run_dir,
            settings,
            Passes(n=n, seed=seed),
            precision=precision,
            memory_gb=memory_gb,
        )
        self.seeded_dir = seeded_dir
        self.classifier = None
        if reduction_dir is not None:
            self.classifier = CandidateClassifier(reduction_dir, precision=precision)
        self.slices = self.slice_settings = None
        if slices_dir is not None:
            self.slices, self.slice_settings = slice_network(
                slices_dir, seed=seed, batch_size=batch_size, precision=precision
            )
        self.rule = self.settings
        if self.classifier is not None:
            self.rule = self.classifier.postprocess
        if min_score is not None:
            self.rule = replace(self.rule, min_score=min_score)
        every = (run_dir, seeded_dir, slices_dir, reduction_dir)
        used = [run for run in every if run is not None]
        self.made_by: dict[str, Any] = {
            "weights_sha256": [files.sha256(run / "best.weights.h5") for run in used],
            "passes": n,
            "settings": config.to_json(self.settings if self.classifier else self.rule),
        }
        # Results of before, without these, still count.
        if self.classifier is not None:
            self.made_by["reduction"] = config.to_json(self.rule)
        if self.slice_settings is not None:
            self.made_by["slices"] = config.to_json(self.slice_settings)

    @functools.cached_property
    def seeded(self) -> PatchPredictor | None:
        """The seeded network, loaded when the first nodule is outlined."""
        if self.seeded_dir is None:
            return None
        return PatchPredictor(self.seeded_dir, runs.read_settings(self.seeded_dir))

    def find(self, scan: Scan) -> Found:
        """The nodules in the lungs of a scan.

        Raises:
            ScanError: If it has no lung labels.
        """
        if scan.lung is None:
            raise ScanError(f"scan {scan.scan_id} has no lung mask")
        if not scan.lung.any():
            return Found(np.zeros(scan.hu.shape, np.uint8), [])
        maps = self.predictor.maps(scan, self.settings.threshold)
        labels, every = self.candidates(scan, maps)
        reported = sum(candidate.score >= self.rule.min_score for candidate in every)
        labels[labels > reported] = 0
        labels = labels.astype(np.min_scalar_type(max(reported, 255)), copy=False)
        became = list(range(1, reported + 1))
        low, high = PIXEL_MM
        known = all(low <= step <= high for step in scan.spacing_mm[1:])
        if reported and known and self.seeded is not None:
            labels, became = outlined(scan.hu, labels, self.seeded)
        kept = [became.index(n) for n in range(1, max(became, default=0) + 1)]
        chances = np.array([(every[k].score, every[k].max_prob) for k in kept])
        nodules = measure_nodules(
            labels, chances.reshape(-1, 2), scan.grid, lung=scan.lung, hu=scan.hu
        )
        nodules = [
            replace(nodule, score_std=every[k].score_std)
            for nodule, k in zip(nodules, kept, strict=True)
        ]
        for k, nodule_id in enumerate(became):
            every[k] = replace(every[k], nodule_id=nodule_id)
        return Found(labels, nodules, every)

    def candidates(self, scan: Scan, maps: Maps) -> tuple[np.ndarray, list[Candidate]]:
        """What the networks mark, judged by the false-positive network, if any.

        Args:
            scan: With lungs.
            maps: Of the 3-D network's passes.

        Returns:
            (z, y, x) labels, and the candidates in their order, by falling score.
        """
        if self.classifier is None:
            found = components_in(maps.mean, maps, scan, self.rule, marked_by="volumes")
            scores = [component.mean_prob for component in found]
            spreads = [component.mean_std for component in found]
        else:
            prob = candidate_map(maps.mean, self.rule)
            found = components_in(prob, maps, scan, self.rule, marked_by="volumes")
            if self.slices is not None and self.slice_settings is not None:
                of_slices = self.slices.maps(scan, self.slice_settings.threshold)
                found += components_in(
                    of_slices.mean,
                    of_slices,
                    scan,
                    self.slice_settings,
                    marked_by="slices",
                )
            judged = self.classifier.probabilities(scan, [c.centre for c in found])
            peaks = np.array([component.max_prob for component in found])
            # Both must agree: what the one hardly sees, the other may mistake.
            scores = (judged.mean(axis=1) * peaks).tolist()
            spreads = std_of_product(
                judged.mean(axis=1),
                judged.std(axis=1),
                peaks,
                np.array([component.max_std for component in found]),
            ).tolist()
        return joined(found, scores, spreads, scan.grid)


def slice_network(
    run_dir: Path, *, seed: int, batch_size: int, precision: Precision
) -> tuple[Predictor, config.Postprocess]:
    """The network of a run for nodules in slices, and what makes a candidate of its maps.

    Raises:
        FileNotFoundError: If the run is missing.
        ValueError: If it is another kind of run, or was tuned with other weights.
    """
    settings = runs.read_settings(run_dir)
    batches, network = settings.batches, settings.model.name
    whole = len(batches.input_px) == 2 and batches.crop != "seed"
    if batches.target != "nodule" or not whole:
        raise ValueError(
            f"{run_dir}: a {network} for {batches.target}, batches.crop={batches.crop}; "
            "expected a run for nodules in slices, such as one of candidates2d"
        )
    tuned, n = runs.tuned_settings(run_dir, settings)
    predictor = Predictor(
        run_dir,
        settings,
        batch_size=batch_size,
        passes=Passes(n=n, seed=seed),
        precision=precision,
    )
    return predictor, replace(tuned, min_score=0.0)


@dataclass(frozen=True, eq=False)
class Component:
    """What a network marks at one place.

    Attributes:
        voxels: (n, 3) indices (z, y, x).
        mean_prob: Mean probability of the voxels.
        max_prob: The largest.
        mean_std: Mean over the voxels of the standard deviation of the passes; None of one.
        max_std: That at the largest probability; 0 of one pass.
        marked_by: The network.
    """

    voxels: np.ndarray
    mean_prob: float
    max_prob: float
    mean_std: float | None
    max_std: float
    marked_by: MarkedBy

    @property
    def centre(self) -> tuple[float, float, float]:
        """Mean index (z, y, x) of the voxels."""
        z, y, x = self.voxels.mean(axis=0).tolist()
        return z, y, x


def components_in(
    prob: np.ndarray,
    maps: Maps,
    scan: Scan,
    settings: config.Postprocess,
    *,
    marked_by: MarkedBy,
) -> list[Component]:
    """The components of a map of probability, whatever their score.

    Args:
        prob: (z, y, x), the mean of passes or a part of it.
        maps: Of the passes.
        scan: Whose grid and lungs they are.
        settings: What makes a component.
        marked_by: Whose map it is.
    """
    every = replace(settings, min_score=0.0)
    labels, chances = label_nodules(prob, scan.grid, every, lung=scan.lung)
    found = []
    for voxels, (mean, peak) in zip(voxels_of(labels), chances.tolist(), strict=True):
        mean_std, max_std = None, 0.0
        if maps.n > 1:
            own = tuple(voxels.T)
            mean_std = float(maps.std[own].mean())
            max_std = float(maps.std[tuple(voxels[prob[own].argmax()])])
        found.append(Component(voxels, mean, peak, mean_std, max_std, marked_by))
    return found


def joined(
    found: Sequence[Component],
    scores: Sequence[float],
    spreads: Sequence[float | None],
    grid: Grid,
) -> tuple[np.ndarray, list[Candidate]]:
    """Candidates of what overlaps: one with a higher score takes what it overlaps.

    The voxels of what overlaps two candidates are neither's.

    Args:
        found: Components; those of one network do not overlap.
        scores: Of each component.
        spreads: Standard deviation of each score.
        grid: Where they lie.

    Returns:
        (z, y, x) labels, and the candidates in their order, by falling score.
    """
    labels = np.zeros(grid.shape, np.min_scalar_type(max(len(found), 255)))
    first: list[int] = []
    marked_by: list[MarkedBy] = []
    for k in np.argsort(-np.array(scores), kind="stable").tolist():
        own = tuple(found[k].voxels.T)
        met = np.setdiff1d(labels[own], 0)
        if not len(met):
            first.append(k)
            marked_by.append(found[k].marked_by)
            labels[own] = len(first)
            continue
        for number in met.tolist():
            marked_by[number - 1] = "both"
        if len(met) == 1:
            labels[own] = met
    sizes = np.bincount(labels.ravel(), minlength=len(first) + 1)[1:]
    return labels, [
        Candidate(
            found[k].centre,
            scores[k],
            spreads[k],
            found[k].max_prob,
            sphere_diameter_mm(size * grid.voxel_mm3),
            who,
        )
        for k, size, who in zip(first, sizes.tolist(), marked_by, strict=True)
    ]


def voxels_of(labels: np.ndarray) -> list[np.ndarray]:
    """(n, 3) indices (z, y, x) of the voxels of each label, from 1 on."""
    from scipy.ndimage import find_objects

    return [
        np.argwhere(labels[box] == number) + [part.start for part in box]
        for number, box in enumerate(find_objects(labels), start=1)
    ]


def std_of_product(
    mean_a: np.ndarray, std_a: np.ndarray, mean_b: np.ndarray, std_b: np.ndarray
) -> np.ndarray:
    """Standard deviation of the product of two independent values (Goodman, 1960)."""
    return np.sqrt((mean_a * std_b) ** 2 + (mean_b * std_a) ** 2 + (std_a * std_b) ** 2)
