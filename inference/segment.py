"""Segmentation of lungs and nodules in one CT, and of nodules around seed points."""

import functools
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Annotated, Any, Literal

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
from inference.tasks import Task, warn_of_known_scan, warn_of_leaks
from lungs.anatomy import second_opinion
from lungs.checks import Verdict, extent, judge, searched_labels, volumes_ml
from lungs.classical import segment_lungs
from lungs.labels import LungMap, labels_from_map, snap_to_classical
from lungs.sides import body_middle_x
from nodules.components import label_nodules
from results.result_folder import SaveAs
from training import runs
from training.runs import Precision

log = logging.getLogger(__name__)

ROOT = Path(__file__).parents[1]

SHIPPED = ROOT / "weights/lung3d"
"""Default run for lungs."""

NODULE3D = ROOT / "weights/nodule3d"
"""Default run that finds nodules in lungs."""

CANDIDATES2D = ROOT / "weights/candidates2d"
"""Default run that finds nodules slice by slice."""

REDUCTION3D = ROOT / "weights/reduction3d"
"""Default run for false-positive reduction."""

NODULE2D = Path("weights/nodule2d")
"""Default run of `segment_patches`."""

OUTLINES = ROOT / NODULE2D
"""Seeded run that outlines nodules in whole scans."""

BATCH_SIZE = 8


@dataclass(frozen=True)
class Lungs:
    """Options for lungs and for saving; a run for nodules ignores `labels` and `save_as`."""

    passes: Annotated[Passes, tyro.conf.OmitArgPrefixes] = field(default_factory=Passes)
    labels: Annotated[LungMap, tyro.conf.OmitArgPrefixes] = field(
        default_factory=LungMap
    )
    save_as: SaveAs = "nifti"
    """nifti: maps, masks and overview.png on the source's grid; numpy: maps and masks in one
    .npz per scan, in RAS order; nifti-labels: masks and overview.png; nnunet: one label volume
    PID.nii.gz with the nodule numbers, or with --nodules None the lungs. Every choice writes
    the tables."""
    precision: Precision = "float32"
    """Keras dtype policy; mixed_bfloat16 is faster on CPUs with AVX512_BF16 or AMX."""
    memory_gb: float = MEMORY_GB
    """Memory limit of a pass in GB; larger scans are covered by tiles."""
    mean_is_mask: bool = False
    """Write 1 where the mean is above --thresh and 0 elsewhere into mean.nii.gz, as the
    published tool of Zhuang et al. 2025 does, instead of the mean."""


DEFAULT_LUNGS = Lungs()

Preset = Literal["default", "w1"]

PRESETS: dict[Preset, Lungs] = {
    "default": DEFAULT_LUNGS,
    # Zhuang et al., ISBI 2025: the mask is mean > 0.55, with nothing removed or filled.
    "w1": Lungs(
        Passes(n=100, mask_fraction=0.7),
        LungMap(
            thresh=0.55,
            min_volume_mm3=0.0,
            min_share=0.0,
            max_pieces=1_000_000,
            fill_holes=False,
            anatomy=False,
            snap=0.0,
        ),
        mean_is_mask=True,
    ),
}
"""Named sets of options; infer.py --preset takes one."""


def with_preset(lungs: Lungs, preset: Preset) -> Lungs:
    """Returns `lungs` with the options of a preset where they have their default value.

    A single pass hides nothing, so it takes no `mask_fraction` from the preset.
    """
    named = PRESETS[preset]
    parts = {
        name: _fill_defaults(getattr(lungs, name), getattr(named, name), kind())
        for name, kind in (("passes", Passes), ("labels", LungMap))
    }
    if parts["passes"].n in (0, 1):
        share = lungs.passes.mask_fraction
        parts["passes"] = replace(parts["passes"], mask_fraction=share)
    return _fill_defaults(replace(lungs, **parts), replace(named, **parts), Lungs())


def _fill_defaults(chosen: Any, named: Any, default: Any) -> Any:
    """Returns `chosen` with the fields of `named` where it equals `default`."""
    return replace(
        chosen,
        **{
            name: getattr(named, name)
            for name in (part.name for part in fields(chosen))
            if getattr(chosen, name) == getattr(default, name)
        },
    )


@dataclass(frozen=True)
class NoduleRuns:
    """Runs that find nodules inside the lungs; the defaults are the shipped weights."""

    volumes: Annotated[Path | None, tyro.conf.arg(name="nodules")] = NODULE3D
    """Run that finds nodules inside the lungs; None skips nodules. Used with a run for lungs
    only."""
    slices: Path | None = CANDIDATES2D
    """Run that finds more candidates slice by slice, in addition to --nodules; None skips it,
    and so does --reduction None."""
    reduction: Path | None = REDUCTION3D
    """Run for false-positive reduction, which tells nodules from vessels; None keeps
    everything that --nodules finds."""
    min_score: float | None = None
    """Least score of a reported nodule, 0 to below 1; by default that of the runs, 0.85 for
    the shipped ones. candidates.csv also lists candidates below it. Another value in the same
    folder needs --overwrite and computes the scans again."""

    def __post_init__(self) -> None:
        fits = self.min_score is None or 0 <= self.min_score < 1
        config.require(fits, "min_score", self.min_score, "0 to below 1")

    @property
    def used(self) -> dict[str, Path]:
        """The runs that are used, by option name."""
        if self.volumes is None:
            return {}
        every = {"--nodules": self.volumes}
        if self.reduction is not None:
            every |= {"--slices": self.slices, "--reduction": self.reduction}
        return {option: run for option, run in every.items() if run is not None}


SHIPPED_RUNS = NoduleRuns()
NO_RUNS = NoduleRuns(volumes=None)


@dataclass(frozen=True, eq=False)
class SegmentedLungs:
    """Lungs of a scan; arrays are (z, y, x).

    Attributes:
        maps: Mean and standard deviation of the probability over the passes.
        labels: uint8, 1 right and 2 left.
        searched: uint8, the labels without what is not to be searched for nodules.
        verdict: Volumes, score, and reasons not to trust the labels.
    """

    maps: Maps
    labels: np.ndarray
    searched: np.ndarray
    verdict: Verdict


def lungs_of(
    scan: Scan,
    predictor: VolumePredictor | Predictor,
    settings: LungMap,
    reach_mm: float,
) -> SegmentedLungs:
    """Segments the lungs of a scan, leaves out what cannot be lung, and checks the result.

    Args:
        scan: The scan.
        predictor: The network for lungs.
        settings: Settings that turn the mean map into labels.
        reach_mm: Distance up to which the border snaps to that of the classical mask; 0
            for never.
    """
    maps = predictor.maps(scan, settings.thresh)
    labels = labels_from_map(
        maps.mean,
        scan.spacing_mm,
        settings,
        middle_x=body_middle_x(scan.hu),
    )
    of_network = labels
    if reach_mm and labels.any():
        classical = segment_lungs(scan.hu, scan.spacing_mm, config.LungMask())
        labels = snap_to_classical(labels, classical, scan.spacing_mm, reach_mm)
    opinion = second_opinion(labels, scan.hu, scan.spacing_mm, remove=settings.anatomy)
    removed = (labels > 0) & (opinion.labels == 0)
    labels = opinion.labels
    judged = np.where(removed, np.uint8(0), of_network) if labels.any() else labels
    mean = np.where(removed, np.float32(0), maps.mean) if removed.any() else maps.mean
    verdict = judge(judged, mean, maps.std, scan)
    searched = searched_labels(labels, opinion.doubtful, scan)
    right_ml, left_ml = volumes_ml(labels, scan.grid.voxel_mm3)
    searched_ml = sum(volumes_ml(searched, scan.grid.voxel_mm3))
    doubts = (part.text for part in opinion.parts if not part.removed)
    verdict = replace(
        verdict,
        right_ml=right_ml,
        left_ml=left_ml,
        reasons=(*verdict.reasons, *doubts),
        mended=tuple(part.text for part in opinion.parts if part.removed),
        unsearched_ml=right_ml + left_ml - searched_ml,
        nodules_searched=extent(labels, searched),
    )
    return SegmentedLungs(maps, labels, searched, verdict)


def predict(
    image: str | Path | np.ndarray,
    spacing_mm: Sequence[float] | None = None,
    *,
    exp_dir: Path = SHIPPED,
    lungs: Lungs = DEFAULT_LUNGS,
    nodules: NoduleRuns = SHIPPED_RUNS,
) -> np.ndarray:
    """Finds the nodules of one CT, as infer.py does.

    The networks are loaded in the first call and kept for later ones.

    Args:
        image: Path of a volume or a DICOM folder, or a (z, y, x) array of HU in canonical
            orientation.
        spacing_mm: (z, y, x) spacing of an array; None for files, which store their own.
        exp_dir: Run for lungs.
        lungs: Options of that run, such as `Lungs(passes=Passes(n=1))` for one pass.
        nodules: Runs that find nodules inside the lungs.

    Returns:
        (z, y, x) labels in canonical orientation: the number of the nodule, or 0.

    Raises:
        FileNotFoundError: If a run is missing.
        ValueError: If the image is not one CT, or a run is of the wrong kind.
    """
    from cohorts import nifti

    if not nodules.used:
        raise ValueError(f"nodules is {nodules}; expected a run that finds nodules")
    refuse_unused(nodules)
    if isinstance(image, np.ndarray):
        if spacing_mm is None:
            raise ValueError(
                "spacing_mm is missing; expected (z, y, x) mm of the array"
            )
        scan = nifti.scan_of_array(image, spacing_mm)
    else:
        if spacing_mm is not None:
            raise ValueError(
                f"spacing_mm is {spacing_mm}, but {image} has its own; leave it out"
            )
        sources = nifti.find_scans(Path(image))
        if len(sources) != 1:
            raise ValueError(f"{image}: {len(sources)} scans; expected one")
        scan = nifti.load_scan(sources[0])
        for text in scan.warnings:
            log.warning("%s: %s", scan.scan_id, text)
    seen = training_patients_by_run(nodules)
    predictor, reach_mm, finder = scan_networks(exp_dir, lungs, nodules)
    patients = tuple(runs.training_patients_of(exp_dir / "best.weights.h5"))
    seen = {str(exp_dir): patients, **seen}
    task = Task(scan.scan_id, scan.patient_id, "", Path(scan.scan_id))
    warn_of_leaks([task], seen)
    warn_of_known_scan(scan, task.unmatched)
    found = lungs_of(scan, predictor, lungs.labels, reach_mm)
    log_verdict(scan.scan_id, found.verdict)
    return finder.find(replace(scan, lung=found.labels), found.searched).labels


def log_verdict(scan_id: str, verdict: Verdict) -> None:
    """Logs what was left out of lungs, and why not to trust or search them."""
    for text in verdict.mended:
        log.warning("%s: %s", scan_id, text)
    for reason in verdict.reasons:
        log.warning("%s: do not trust the lungs: %s", scan_id, reason)
    if verdict.nodules_searched == "no":
        log.warning("%s: no nodules were searched in these lungs", scan_id)


@functools.lru_cache(maxsize=1)
def scan_networks(
    exp_dir: Path, lungs: Lungs, nodules: NoduleRuns
) -> tuple[VolumePredictor | Predictor, float, NoduleFinder]:
    """Loads the networks of `predict`.

    Returns:
        The network for lungs, the distance `reach_mm` of `lungs_of`, and the nodule finder.
    """
    settings = runs.read_settings(exp_dir)
    if settings.batches.target != "lung":
        raise ValueError(
            f"{exp_dir}: the run segments {settings.batches.target}; expected one for lungs"
        )
    predictor = passes_predictor(exp_dir, settings, lungs, batch_size=BATCH_SIZE)
    reach_mm = lungs.labels.snap * runs.input_spacing_mm(settings)
    finder = nodule_finder(nodules, lungs, batch_size=BATCH_SIZE)
    return predictor, reach_mm, finder


class SeededPredictor:
    """A seeded network for scans that are patches around one nodule."""

    def __init__(self, exp_dir: Path, settings: config.Experiment) -> None:
        self.predictor = PatchPredictor(exp_dir, settings)

    def probability(self, scan: Scan) -> np.ndarray:
        """Computes the (z, y, x) float32 probability of the nodule.

        Raises:
            ScanError: If the scan is a whole CT and no patch.
        """
        if scan.whole:
            raise ScanError(
                f"scan {scan.scan_id} is a whole CT, but the run outlines nodules at the "
                "centre of patches; use inference.segment.segment_patches, or another run"
            )
        return self.predictor.nodule_probability(scan.hu)


def segment_patches(
    patches: np.ndarray, weights: str | Path = NODULE2D, *, turns: int = 1
) -> np.ndarray:
    """Computes the probability of the nodule at the centre (seed point) of each patch.

    The network is loaded in the first call and kept for later ones. The function does not
    check for training patients; see `runs.training_patients_of`.

    Args:
        patches: (n, y, x) numbers, an increasing linear function of HU that may differ from
            patch to patch. Pixels are the scanner's own (0.5 to 1 mm), with the nodule at
            the centre. Patches below 64 x 64 are padded by repeating border pixels, which
            no network was trained on.
        weights: Run directory of a seeded network, relative to the working directory or to
            the root of the checkout.
        turns: Number of turned and mirrored copies that are averaged, 1 to 8. With the
            shipped weights, 8 raise Dice by 0.001 at eight times the cost.

    Returns:
        (n, y, x) float32. With weights trained on reader votes, it is the share of readers
        who would outline the pixel. With the shipped weights, pixels of 0.43 or more are
        nodule; see `segment_nodule`.

    Raises:
        FileNotFoundError: If the run is missing.
        ValueError: If `patches` has another shape or type, or `turns` is out of range.
    """
    return patch_predictor(own_path(weights), turns).probability(patches)


def segment_nodule(
    slices: np.ndarray, weights: str | Path = NODULE2D
) -> tuple[np.ndarray, np.ndarray]:
    """Segments one nodule in patches of the slices that show it.

    All slices together decide which component is the nodule, and where its centre is.

    Args:
        slices: (n, y, x) patches of the slices in order, all cut out at the same place; for
            their values see `segment_patches`.
        weights: See `segment_patches`.

    Returns:
        (n, y, x) bool mask and (n, y, x) float32 probability. The mask is empty if the
        network finds no nodule.

    Raises:
        FileNotFoundError: If the run is missing.
        ValueError: If `slices` has another shape or type.
    """
    predictor = patch_predictor(own_path(weights), 1)
    prob = predictor.nodule_probability(slices)
    grid = Grid(prob.shape, np.eye(4))
    labels, _ = label_nodules(prob, grid, predictor.postprocess)
    return labels > 0, prob


def own_path(weights: str | Path) -> Path:
    """Resolves a run directory against the working directory, else the checkout."""
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
    """Loads the network of a run for nodules, which makes one pass if `n` is auto."""
    if settings.batches.crop == "seed":
        if lungs.passes.n not in ("auto", 0, 1):
            raise ValueError(
                f"n is {lungs.passes.n}, but {exp_dir} sees patches in one pass; leave --n out"
            )
        return SeededPredictor(exp_dir, settings)
    passes = lungs.passes
    if passes.n == "auto":
        passes = replace(passes, n=1)
    lungs = replace(lungs, passes=passes)
    return passes_predictor(exp_dir, settings, lungs, batch_size=batch_size)


def refuse_unused(nodules: NoduleRuns) -> None:
    """Raises ValueError if an option for nodules is set but would have no effect."""
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
                f"{option} {value}, but no run finds nodules in lungs: --nodules is None, or "
                "--exp_dir is not a run for lungs; leave this option out"
            )
        raise ValueError(
            f"{option} {value} with --reduction None; expected a run that judges the "
            "candidates found slice by slice"
        )


def training_patients_by_run(nodules: NoduleRuns) -> dict[str, tuple[str, ...]]:
    """Returns the training patients of the runs that find nodules, by run directory.

    Raises:
        FileNotFoundError: If a run is missing.
    """
    for option, run_dir in nodules.used.items():
        if not (run_dir / "config.json").exists():
            raise FileNotFoundError(
                f"no weights for nodules in {run_dir}; name a run directory with {option}, "
                f"or skip it with {option} None"
            )
    used = [*nodules.used.values(), OUTLINES] if nodules.used else []
    return {
        str(run): tuple(runs.training_patients_of(run / "best.weights.h5"))
        for run in used
    }


def nodule_finder(
    nodules: NoduleRuns, lungs: Lungs, *, batch_size: int
) -> NoduleFinder:
    """Loads the networks that find nodules in lungs, outlined by the run `OUTLINES`."""
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
    """Loads the 3-D or 2-D network of a run, set to make `lungs.passes`."""
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
