"""Nodule detection in whole scans: two networks mark, a third judges, a fourth outlines.

A 3-D network marks candidates, and a 2-D network on slices marks more. The false-positive
network looks at each candidate and tells nodules from vessels. Voxels of 1 mm do not show the
border of a small nodule, so the seeded network outlines it slice by slice in the scan's own
pixels.
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
from inference.outlining import outline_nodules
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
"""Pixel sizes the seeded network was trained on; at others the found mask is kept."""


class NoduleFinder:
    """Networks that mark, judge and outline nodules, each loaded once.

    Args:
        run_dir: Run of the 3-D network. A tuned run makes as many passes as it was tuned
            on; its tuned values apply unless a false-positive network is used.
        seeded_dir: Run of the seeded network; None keeps the masks of the marking network.
        slices_dir: Run of a 2-D network on slices. Its own settings define its candidates,
            which join those of the 3-D network and need a false-positive network.
        reduction_dir: Run of the false-positive network, whose settings define the
            candidates of the 3-D network and the least score kept; None keeps everything
            the 3-D network finds.
        min_score: Least score that is reported; None uses the setting of the false-positive run
            or, without such a run, of the 3-D run.
        seed: Dropout seed, used with several passes.
        batch_size: Tiles of slices per network call.
        precision: Keras dtype policy of all networks but the seeded one.
        memory_gb: See `VolumePredictor`.

    Attributes:
        rule: Settings that define a candidate of the 3-D network and the least score
            reported.
        made_by: Weights and settings that determine the result, JSON-ready.

    Raises:
        FileNotFoundError: If a run is missing.
        ValueError: If a run is of the wrong kind or was tuned with other weights, or
            `slices_dir` is given without `reduction_dir`.
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
                f"{slices_dir} marks candidates, but no false-positive network judges them; "
                "expected reduction_dir"
            )
        settings = runs.read_settings(run_dir)
        if settings.batches.target != "nodule" or settings.model.name != "unet3d":
            raise ValueError(
                f"{run_dir}: a {settings.model.name} for {settings.batches.target}; "
                "expected a unet3d for nodules, such as a nodule3d run"
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
        # Unused keys are left out, so results written before they existed stay valid.
        if self.classifier is not None:
            self.made_by["reduction"] = config.to_json(self.rule)
        if self.slice_settings is not None:
            self.made_by["slices"] = config.to_json(self.slice_settings)

    @functools.cached_property
    def seeded(self) -> PatchPredictor | None:
        """The seeded network, loaded on first use; None without `seeded_dir`."""
        if self.seeded_dir is None:
            return None
        return PatchPredictor(self.seeded_dir, runs.read_settings(self.seeded_dir))

    def find(self, scan: Scan, searched: np.ndarray | None = None) -> Found:
        """Finds the nodules in the lungs of a scan.

        Args:
            scan: Scan with lung labels, which give side and distance of each nodule.
            searched: (z, y, x) lung labels that are searched; by default all.

        Raises:
            ScanError: If the scan has no lung labels.
        """
        if scan.lung is None:
            raise ScanError(f"scan {scan.scan_id} has no lung mask")
        within = scan if searched is None else replace(scan, lung=searched)
        if not np.any(within.lung):
            return Found(np.zeros(scan.hu.shape, np.uint8), [])
        maps = self.predictor.maps(within, self.settings.threshold)
        labels, every = self.candidates(within, maps)
        reported = sum(candidate.score >= self.rule.min_score for candidate in every)
        labels[labels > reported] = 0
        labels = labels.astype(np.min_scalar_type(max(reported, 255)), copy=False)
        became = list(range(1, reported + 1))
        low, high = PIXEL_MM
        known = all(low <= step <= high for step in scan.spacing_mm[1:])
        if reported and known and self.seeded is not None:
            labels, became = outline_nodules(scan.hu, labels, self.seeded)
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
        """Finds the candidates, scored by the false-positive network if there is one.

        Args:
            scan: Scan with lung labels.
            maps: Maps of the 3-D network's passes.

        Returns:
            (z, y, x) labels and the candidates in label order, by falling score.
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
            # Both networks must agree: a faint candidate is easily misjudged.
            scores = (judged.mean(axis=1) * peaks).tolist()
            spreads = std_of_product(
                judged.mean(axis=1),
                judged.std(axis=1),
                peaks,
                np.array([component.max_std for component in found]),
            ).tolist()
        return merge_overlapping(found, scores, spreads, scan.grid)


def slice_network(
    run_dir: Path, *, seed: int, batch_size: int, precision: Precision
) -> tuple[Predictor, config.Postprocess]:
    """Loads the network of a run for nodules in slices, and its candidate settings.

    Raises:
        FileNotFoundError: If the run is missing.
        ValueError: If the run is of another kind or was tuned with other weights.
    """
    settings = runs.read_settings(run_dir)
    batches, network = settings.batches, settings.model.name
    whole = len(batches.input_px) == 2 and batches.crop != "seed"
    if batches.target != "nodule" or not whole:
        raise ValueError(
            f"{run_dir}: a {network} for {batches.target}, batches.crop={batches.crop}; "
            "expected a run for nodules in slices, such as a candidates2d run"
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
    """A connected component that a network marks.

    Attributes:
        voxels: (n, 3) indices (z, y, x).
        mean_prob: Mean probability of the voxels.
        max_prob: Largest probability of the voxels.
        mean_std: Standard deviation over the passes, averaged over the voxels; None for
            one pass.
        max_std: Standard deviation over the passes at the voxel of largest probability; 0
            for one pass.
        marked_by: Network that marks it.
    """

    voxels: np.ndarray
    mean_prob: float
    max_prob: float
    mean_std: float | None
    max_std: float
    marked_by: MarkedBy

    @property
    def centre(self) -> tuple[float, float, float]:
        """The mean index (z, y, x) of the voxels."""
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
    """Finds the components of a probability map, whatever their score.

    Args:
        prob: (z, y, x) mean over the passes, or a masked copy of it.
        maps: Maps of the passes.
        scan: Scan with the grid and the lung labels.
        settings: Settings that define a component; `min_score` is ignored.
        marked_by: Network that made the map.
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


def merge_overlapping(
    found: Sequence[Component],
    scores: Sequence[float],
    spreads: Sequence[float | None],
    grid: Grid,
) -> tuple[np.ndarray, list[Candidate]]:
    """Merges overlapping components into candidates that keep the highest score.

    Components are visited by falling score; one that overlaps a single candidate adds its
    voxels to it. A component that overlaps two candidates or more adds none.

    Args:
        found: Components; those of the same network do not overlap.
        scores: Score of each component.
        spreads: Standard deviation of each score.
        grid: Grid of the voxels.

    Returns:
        (z, y, x) labels and the candidates in label order, by falling score.
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
    """Returns the (n, 3) indices (z, y, x) of the voxels of each label, from 1 on."""
    from scipy.ndimage import find_objects

    return [
        np.argwhere(labels[box] == number) + [part.start for part in box]
        for number, box in enumerate(find_objects(labels), start=1)
    ]


def std_of_product(
    mean_a: np.ndarray, std_a: np.ndarray, mean_b: np.ndarray, std_b: np.ndarray
) -> np.ndarray:
    """Returns the standard deviation of a product of independent values (Goodman 1960)."""
    return np.sqrt((mean_a * std_b) ** 2 + (mean_b * std_a) ** 2 + (std_a * std_b) ** 2)
