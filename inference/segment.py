"""Lungs and nodules of one CT, and nodules around a seed, by the shipped weights or others."""

import functools
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro

import config
from ct.geometry import Grid
from ct.scan import Scan, ScanError
from inference.finder import NoduleFinder
from inference.passes import Maps, Passes
from inference.predictor2d import Predictor
from inference.predictor3d import MEMORY_GB, VolumePredictor
from inference.seeded import PatchPredictor
from inference.tasks import Task, warn_of_leaks
from lungs.checks import Verdict, judge, volumes_ml
from lungs.classical import segment_lungs
from lungs.labels import LungMap, labels_from_map, snapped
from lungs.sides import body_middle_x
from nodules.components import label_nodules
from results.result_folder import SaveAs
from training import runs
from training.runs import Precision

log = logging.getLogger(__name__)

ROOT = Path(__file__).parents[1]

SHIPPED = ROOT / "weights/lung3d"
"""The run that is used if none is named."""

NODULE3D = ROOT / "weights/nodule3d"
"""The run that looks for nodules in lungs if none is named."""

CANDIDATES2D = ROOT / "weights/candidates2d"
"""The run that looks for them slice by slice if none is named."""

REDUCTION3D = ROOT / "weights/reduction3d"
"""The run that tells nodules from what only looks like them if none is named."""

NODULE2D = Path("weights/nodule2d")
"""The weights of `segment_patches`."""

OUTLINES = ROOT / NODULE2D
"""The seeded run that outlines nodules in whole scans."""

BATCH_SIZE = 8


@dataclass(frozen=True)
class Lungs:
    """How a run for lungs is used; for nodules, labels do not matter, nor how it is saved."""

    passes: Annotated[Passes, tyro.conf.arg(name="")] = field(default_factory=Passes)
    labels: Annotated[LungMap, tyro.conf.arg(name="")] = field(default_factory=LungMap)
    save_as: SaveAs = "nifti"
    """nifti: maps and mask on the source's grid; numpy: the same in one .npz per scan, in
    RAS order, no picture; nifti-labels: masks and picture, no maps; nnunet: PID.nii.gz with
    the nodules' numbers, or with --nodules None the lungs, and the tables."""
    precision: Precision = "float32"
    """mixed_bfloat16 is faster on CPUs that have it (AVX512_BF16, AMX)."""
    memory_gb: float = MEMORY_GB
    """A scan whose passes would take more is covered by tiles."""


USUAL = Lungs()


@dataclass(frozen=True)
class NoduleRuns:
    """The runs that look for nodules in lungs, by default the weights that ship."""

    volumes: Annotated[Path | None, tyro.conf.arg(name="nodules")] = NODULE3D
    """Of a run for lungs: the run that looks for nodules in them; None looks for none."""
    slices: Path | None = CANDIDATES2D
    """The run whose candidates, found slice by slice, join those of --nodules; None does
    without, as does --reduction None."""
    reduction: Path | None = REDUCTION3D
    """The run that tells nodules from vessels among what was found; None keeps what
    --nodules finds."""
    min_score: float | None = None
    """The least score of a nodule that is reported, 0 to below 1; by default as the runs
    say, with those that ship 0.85. candidates.csv lists the others; another value in the
    same folder needs --overwrite, and computes the scans again."""

    def __post_init__(self) -> None:
        fits = self.min_score is None or 0 <= self.min_score < 1
        config.require(fits, "min_score", self.min_score, "0 to below 1")

    @property
    def used(self) -> dict[str, Path]:
        """The runs that are used, by their option."""
        if self.volumes is None:
            return {}
        every = {"--nodules": self.volumes}
        if self.reduction is not None:
            every |= {"--slices": self.slices, "--reduction": self.reduction}
        return {option: run for option, run in every.items() if run is not None}


SHIPPED_RUNS = NoduleRuns()
NO_RUNS = NoduleRuns(volumes=None)


def lungs_of(
    scan: Scan,
    predictor: VolumePredictor | Predictor,
    settings: LungMap,
    reach_mm: float,
) -> tuple[Maps, np.ndarray, Verdict]:
    """Maps of the lungs of a scan, its (z, y, x) uint8 lung labels, and what they are worth.

    Args:
        scan: The scan.
        predictor: The network for lungs.
        settings: How maps become labels.
        reach_mm: Labels follow the classical mask if its border is as near as this.
    """
    maps = predictor.maps(scan, settings.thresh)
    labels = labels_from_map(
        maps.mean,
        scan.spacing_mm,
        settings,
        middle_x=body_middle_x(scan.hu),
    )
    verdict = judge(labels, maps.mean, maps.std, scan)
    if reach_mm and labels.any():
        classical = segment_lungs(scan.hu, scan.spacing_mm, config.LungMask())
        labels = snapped(labels, classical, scan.spacing_mm, reach_mm)
        right_ml, left_ml = volumes_ml(labels, scan.grid.voxel_mm3)
        verdict = replace(verdict, right_ml=right_ml, left_ml=left_ml)
    return maps, labels, verdict


def predict(
    image: str | Path | np.ndarray,
    spacing_mm: Sequence[float] | None = None,
    *,
    exp_dir: Path = SHIPPED,
    lungs: Lungs = USUAL,
    nodules: NoduleRuns = SHIPPED_RUNS,
) -> np.ndarray:
    """The nodules of one CT, as the command line finds them; see `postprocess.predict`.

    The networks are loaded once; calls after the first only compute.

    Args:
        image: A volume, a DICOM folder, or (z, y, x) HU in canonical orientation.
        spacing_mm: (z, y, x) of an array; files say their own.
        exp_dir: Run for lungs.
        lungs: How it is used, such as `Lungs(passes=Passes(n=1))` for one pass.
        nodules: The runs that look for nodules in them.

    Returns:
        (z, y, x) labels, canonical: 0, or the number of the nodule.

    Raises:
        FileNotFoundError: If a run is missing.
        ValueError: If the image is not one CT, or the run segments no lungs.
    """
    from cohorts import nifti

    if not nodules.used:
        raise ValueError(f"nodules is {nodules}; expected a run that looks for nodules")
    refuse_unused(nodules)
    if isinstance(image, np.ndarray):
        if spacing_mm is None:
            raise ValueError(
                "spacing_mm is missing; expected (z, y, x) mm of the array"
            )
        scan = nifti.scan_of_array(image, spacing_mm)
    else:
        if spacing_mm is not None:
            raise ValueError(f"spacing_mm is {spacing_mm}, but {image} says its own")
        sources = nifti.find_scans(Path(image))
        if len(sources) != 1:
            raise ValueError(f"{image}: {len(sources)} scans; expected one")
        scan = nifti.load_scan(sources[0])
    seen = seen_for_nodules(nodules)
    predictor, reach_mm, finder = scan_networks(exp_dir, lungs, nodules)
    patients = tuple(runs.training_patients_of(exp_dir / "best.weights.h5"))
    seen = {str(exp_dir): patients, **seen}
    warn_of_leaks([Task(scan.scan_id, scan.patient_id, "", Path(scan.scan_id))], seen)
    _, labels, verdict = lungs_of(scan, predictor, lungs.labels, reach_mm)
    for reason in verdict.reasons:
        log.warning("%s: not to be trusted: %s", scan.scan_id, reason)
    return finder.find(replace(scan, lung=labels)).labels


@functools.lru_cache(maxsize=1)
def scan_networks(
    exp_dir: Path, lungs: Lungs, nodules: NoduleRuns
) -> tuple[VolumePredictor | Predictor, float, NoduleFinder]:
    """What `predict` computes with: the network for lungs, its reach in mm, the finder."""
    settings = runs.read_settings(exp_dir)
    if settings.batches.target != "lung":
        raise ValueError(
            f"{exp_dir}: the run segments {settings.batches.target}; expected one for lungs"
        )
    predictor = passes_predictor(exp_dir, settings, lungs, batch_size=BATCH_SIZE)
    reach_mm = lungs.labels.snap * runs.seen_mm(settings)
    finder = nodule_finder(nodules, lungs, batch_size=BATCH_SIZE)
    return predictor, reach_mm, finder


class SeededPredictor:
    """A seeded network on scans that are patches around one nodule."""

    def __init__(self, exp_dir: Path, settings: config.Experiment) -> None:
        self.predictor = PatchPredictor(exp_dir, settings)

    def probability(self, scan: Scan) -> np.ndarray:
        """(z, y, x) float32 probability of the nodule.

        Raises:
            ScanError: If the scan is a whole one.
        """
        if scan.whole:
            raise ScanError(
                f"scan {scan.scan_id} is a whole one, and the run outlines nodules in the "
                "middle of patches; see infer.segment_patches, or use another run"
            )
        return self.predictor.nodule_probability(scan.hu)


def segment_patches(
    patches: np.ndarray, weights: str | Path = NODULE2D, *, turns: int = 1
) -> np.ndarray:
    """Probability of the nodule in the middle of each patch: a click, a candidate.

    The network is loaded once; calls after the first only compute. Whose patches they are
    is not asked: `runs.training_patients_of` says of whom a result means nothing.

    Args:
        patches: (n, y, x) numbers on any rising linear scale of HU, one per patch. Pixels
            as the scanner made them (0.5 to 1 mm), nodules in the middle. Below 64 x 64
            their border pixels are repeated, which no network was trained on.
        weights: Run directory of patches, relative to the working directory or to this
            file's.
        turns: Turned and mirrored copies that are averaged, 1 to 8. With the weights that
            ship 8 raise Dice by 0.001 at eight times the price.

    Returns:
        (n, y, x) float32: of weights trained on votes, the share of readers that would draw
        the pixel. With those that ship, the nodule is what has 0.43 or more; see
        `segment_nodule`.

    Raises:
        FileNotFoundError: If there is no such run.
        ValueError: If the patches are no such array, or there are no such turns.
    """
    return patch_predictor(own_path(weights), turns).probability(patches)


def segment_nodule(
    slices: np.ndarray, weights: str | Path = NODULE2D
) -> tuple[np.ndarray, np.ndarray]:
    """One nodule, in patches of the slices that show it.

    All slices decide together which component is the nodule, and where its middle is.

    Args:
        slices: (n, y, x) as of `segment_patches`, in their order, cut out at one place.
        weights: As there.

    Returns:
        (n, y, x) bool mask, and (n, y, x) float32 probability. Nothing is marked where the
        network sees no nodule.

    Raises:
        FileNotFoundError: If there is no such run.
        ValueError: If the slices are no such array.
    """
    predictor = patch_predictor(own_path(weights), 1)
    prob = predictor.nodule_probability(slices)
    grid = Grid(prob.shape, np.eye(4))
    labels, _ = label_nodules(prob, grid, predictor.postprocess)
    return labels > 0, prob


def own_path(weights: str | Path) -> Path:
    """A run directory, from the working directory or else from this file's."""
    path = Path(weights)
    if not path.is_absolute() and not path.exists():
        path = ROOT / path
    return path.resolve()


@functools.lru_cache(maxsize=4)
def patch_predictor(run_dir: Path, turns: int) -> PatchPredictor:
    return PatchPredictor(run_dir, runs.read_settings(run_dir), turns=turns)


def nodule_predictor(
    exp_dir: Path, settings: config.Experiment, lungs: Lungs, *, batch_size: int
) -> VolumePredictor | Predictor | SeededPredictor:
    """The network of a run for nodules; it makes one pass unless a number is asked for."""
    if settings.batches.crop == "seed":
        if lungs.passes.n not in ("auto", 0, 1):
            raise ValueError(
                f"n is {lungs.passes.n}, but {exp_dir} sees patches, in one pass; leave --n out"
            )
        return SeededPredictor(exp_dir, settings)
    passes = lungs.passes
    if passes.n == "auto":
        passes = replace(passes, n=1)
    lungs = replace(lungs, passes=passes)
    return passes_predictor(exp_dir, settings, lungs, batch_size=batch_size)


def refuse_unused(nodules: NoduleRuns) -> None:
    """Refuses what was asked for but would not be used.

    Raises:
        ValueError: If there is something.
    """
    asked: dict[str, Any] = {
        "--slices": nodules.slices,
        "--reduction": nodules.reduction,
        "--min_score": nodules.min_score,
    }
    used = [*nodules.used, *(["--min_score"] if nodules.used else [])]
    usual = (None, SHIPPED_RUNS.slices, SHIPPED_RUNS.reduction)
    for option, value in asked.items():
        if option in used or value in usual:
            continue
        if not nodules.used:
            raise ValueError(
                f"{option} {value}, but no run looks for nodules in lungs: --nodules is "
                "None, or --exp_dir is no run for lungs; leave one of them out"
            )
        raise ValueError(
            f"{option} {value} with --reduction None; expected a run that judges what is "
            "found slice by slice"
        )


def seen_for_nodules(nodules: NoduleRuns) -> dict[str, tuple[str, ...]]:
    """Whom the runs that look for nodules were trained on, by their directories.

    Raises:
        FileNotFoundError: If one of them is missing.
    """
    for option, run_dir in nodules.used.items():
        if not (run_dir / "config.json").exists():
            raise FileNotFoundError(
                f"no weights for nodules in {run_dir}; name a run directory with {option}, "
                f"or do without: {option} None"
            )
    used = [*nodules.used.values(), OUTLINES] if nodules.used else []
    return {
        str(run): tuple(runs.training_patients_of(run / "best.weights.h5"))
        for run in used
    }


def nodule_finder(
    nodules: NoduleRuns, lungs: Lungs, *, batch_size: int
) -> NoduleFinder:
    """What looks for nodules in lungs, with outlines by the weights of patches."""
    used = nodules.used
    return NoduleFinder(
        used["--nodules"],
        OUTLINES,
        slices_dir=used.get("--slices"),
        reduction_dir=used.get("--reduction"),
        min_score=nodules.min_score,
        seed=lungs.passes.seed,
        batch_size=batch_size,
        precision=lungs.precision,
        memory_gb=lungs.memory_gb,
    )


def passes_predictor(
    exp_dir: Path, settings: config.Experiment, lungs: Lungs, *, batch_size: int
) -> VolumePredictor | Predictor:
    """The network of a run, 3-D or 2-D, that makes `lungs.passes`."""
    if settings.model.name == "unet3d":
        return VolumePredictor(
            exp_dir,
            settings,
            lungs.passes,
            precision=lungs.precision,
            memory_gb=lungs.memory_gb,
        )
    return Predictor(
        exp_dir,
        settings,
        batch_size=batch_size,
        passes=lungs.passes,
        precision=lungs.precision,
    )
