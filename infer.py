"""Step 6 of 9: scans + a run's weights -> probability maps, or lungs with uncertainty.

Example:
    python infer.py --exp_dir work/runs/smoke --result_dir work/predictions/smoke
    python infer.py --csv_file scans.csv --result_dir OUT --n 100 --thresh 0.55
    python infer.py --input imagesTs --result_dir OUT --save_as nnunet

Segments scan files of the validation and test patients, or with --input or --csv_file any
CT: a DICOM folder, a volume, a folder of volumes, or a CSV list with columns pid,image_path.
A run for nodules gives their probability; a run for lungs gives mean and standard deviation
over many passes, lung labels and, in lungs.csv, whether to trust them. In these lungs other
runs look for nodules, which are outlined, measured (nodules.csv) and drawn (overview.png).
Research code, not a medical device.
"""

import functools
import itertools
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import tyro

import config
import slice_idx
import steps
from ct import files, provenance
from ct.geometry import Grid
from ct.nifti_io import write_nifti
from ct.scan import Scan, ScanError, ScanSource, read_scan, scan_files, scan_identity
from inference.finder import NoduleFinder
from inference.predictor2d import Predictor
from inference.predictor3d import (
    CONVERGED_DICE,
    MEMORY_GB,
    Maps,
    Passes,
    VolumePredictor,
)
from inference.seeded import PatchPredictor
from lungs.classical import body_middle_x, segment_lungs
from lungs.labels import LungMap, Verdict, judge, labels_from_map, snapped, volumes_ml
from nodules.measures import label_nodules
from preprocess import with_lungs, without_folders
from results import result_folder
from results.predictions import (
    POSTPROCESS_JSON,
    PREDICTIONS_JSON,
    STD_NIFTI,
    Predictions,
    read_predictions,
)
from results.result_folder import Results, SaveAs
from training import runs
from training.runs import Precision

log = logging.getLogger(__name__)

SHIPPED = Path(__file__).parent / "weights/lung3d"
"""The run that is used if none is named."""

NODULE3D = Path(__file__).parent / "weights/nodule3d"
"""The run that looks for nodules in lungs if none is named."""

CANDIDATES2D = Path(__file__).parent / "weights/candidates2d"
"""The run that looks for them slice by slice if none is named."""

REDUCTION3D = Path(__file__).parent / "weights/reduction3d"
"""The run that tells nodules from what only looks like them if none is named."""

NODULE2D = Path("weights/nodule2d")
"""The weights of `segment_patches`."""

OUTLINES = Path(__file__).parent / NODULE2D
"""The seeded run that outlines nodules in whole scans."""

BATCH_SIZE = 8

OWN_NAMES = {
    result_folder.LUNGS_CSV,
    result_folder.NODULES_CSV,
    result_folder.CANDIDATES_CSV,
    result_folder.LUNGS_JSON,
    PREDICTIONS_JSON,
    POSTPROCESS_JSON,
    "skipped.csv",
}
"""Files beside the scans' results; no id may be one of them."""


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


@dataclass(frozen=True)
class Arguments:
    """What is segmented, with which run, and where the result goes."""

    result_dir: Path
    """One folder per scan is written here."""
    exp_dir: Path = SHIPPED
    """Run directory made by train.py; by default the weights that ship, for lungs."""
    csv_file: Path | None = None
    """Segment the scans of this CSV list (columns pid,image_path). A row that cannot be
    used is listed in skipped.csv, and the others go on."""
    input: Path | None = None
    """Segment this CT: DICOM folder, volume, folder or CSV list.
    postprocess.py needs its scan file too: run preprocess.py --cohort nifti on it."""
    scans: Path = Path("work/scans")
    """Without a list or an input: folder of scan files made by preprocess.py."""
    parts: tuple[Literal["train", "validation", "test"], ...] = ("validation", "test")
    """Parts of the run's split to segment."""
    lungs: Annotated[Lungs, tyro.conf.arg(name="")] = USUAL
    nodules: Annotated[NoduleRuns, tyro.conf.arg(name="")] = SHIPPED_RUNS
    batch_size: int = BATCH_SIZE
    """Tiles of a 2-D network per call."""
    overwrite: bool = False
    """Replace results that were made otherwise."""


@dataclass(frozen=True)
class Task:
    """One scan to segment: a scan file, or a source that still has to be read."""

    scan_id: str
    patient_id: str
    part: str
    source: Path | ScanSource
    slices: dict[str, list[int]] = field(default_factory=dict)
    """Slices (z) in each part; only of a split by slice."""


def infer(
    exp_dir: Path,
    result_dir: Path,
    *,
    csv_file: Path | None = None,
    input: Path | None = None,
    scans: Path = Path("work/scans"),
    parts: Sequence[str] = ("validation", "test"),
    lungs: Lungs = USUAL,
    nodules: NoduleRuns = SHIPPED_RUNS,
    batch_size: int = BATCH_SIZE,
    overwrite: bool = False,
) -> steps.Report:
    """Segments every scan; see `Arguments`, whose defaults these are.

    Raises:
        FileNotFoundError: If the run or the scans are missing.
        ValueError: If `result_dir` holds results that were made otherwise, or the run
            cannot do what is asked.
    """
    if exp_dir == SHIPPED and not (exp_dir / "config.json").exists():
        raise FileNotFoundError(
            f"no weights in {exp_dir}; name a run directory with --exp_dir"
        )
    if input and csv_file:
        raise ValueError(f"--input {input} and --csv_file {csv_file}; expected one")
    settings = runs.read_settings(exp_dir)
    split = slice_idx.read_split(exp_dir / "split.json")
    predictions = new_predictions(exp_dir, split)
    if settings.batches.target == "nodule" and lungs.passes.n not in ("auto", 0, 1):
        made_by = asdict(lungs.passes) | {"precision": lungs.precision}
        predictions = replace(predictions, passes=made_by)
    if csv_file:
        tasks, unusable = tasks_of_list(csv_file)
    elif input:
        tasks, unusable = tasks_of_input(input), []
    else:
        tasks, unusable = tasks_of_parts(scans, split, parts)
    tasks, misnamed = without_own_names(tasks)
    if not overwrite:
        refuse_other_predictions(result_dir, predictions)
    if settings.batches.target != "lung":
        nodules = replace(nodules, volumes=None)
    refuse_unused(nodules)
    seen = {str(exp_dir): predictions.training_patients}
    segment: Callable[..., Outcome] = write_probabilities
    if settings.batches.target == "lung":
        segment = functools.partial(write_lungs, nodules=nodules)
        seen |= seen_for_nodules(nodules)
    everyone = sorted({patient for some in seen.values() for patient in some})
    predictions = replace(predictions, training_patients=tuple(everyone))
    warn_of_leaks(tasks, seen)
    done, failures, line = segment(
        tasks,
        exp_dir,
        settings,
        result_dir,
        lungs,
        start=lambda: write_predictions(result_dir, predictions, []),
        batch_size=batch_size,
        overwrite=overwrite,
    )
    write_predictions(result_dir, predictions, done)
    failures = [*unusable, *misnamed, *failures]
    steps.write_failures(failures, result_dir / "skipped.csv")
    return steps.Report(f"wrote {result_dir}: {line}", failures)


Outcome = tuple[list[Task], list[steps.Failure], str]
"""Scans that were segmented, those that were not, and the closing line."""


def write_probabilities(
    tasks: Sequence[Task],
    exp_dir: Path,
    settings: config.Experiment,
    result_dir: Path,
    lungs: Lungs,
    *,
    start: Callable[[], None],
    batch_size: int,
    overwrite: bool,
) -> Outcome:
    """Writes the probability map of every scan that has none yet.

    Of `lungs`, passes and precision count; of several passes std.nii.gz is written too.
    """
    if lungs.save_as == "nnunet":
        raise ValueError(
            f"--save_as nnunet, but {exp_dir} gives probabilities of nodule; expected a run "
            "for lungs, in which --nodules are looked for"
        )
    predictor = nodule_predictor(exp_dir, settings, lungs, batch_size=batch_size)
    if overwrite:
        remove_nodules(result_dir)
    start()  # before the first map, so that a run that is killed says whose it is
    stood = {task.scan_id for task in tasks if map_path(result_dir, task).exists()}
    missing = [task for task in tasks if task.scan_id not in stood]

    def segment(task: Task, scan: Scan) -> None:
        path = map_path(result_dir, task)
        if isinstance(predictor, SeededPredictor):
            prob = predictor.probability(scan)
        else:
            maps = predictor.maps(scan, 0.5)
            prob = maps.mean
            if maps.n > 1:
                std_path = path.with_name(STD_NIFTI)
                write_nifti(std_path, maps.std, scan.grid, scan.source_grid)
        write_nifti(path, prob, scan.grid, scan.source_grid)

    failures = read_and_map(
        segment, missing, lambda task: read_with_lungs(task, settings.mask)
    )
    done = without_failures(tasks, failures)
    volume_bytes = sum(map_path(result_dir, task).stat().st_size for task in done)
    scans = files.count_text(len(done), "scan")
    line = f"{scans}, {files.size_text(volume_bytes)}"
    return done, failures, line + there_before(len(stood))


def write_lungs(
    tasks: Sequence[Task],
    exp_dir: Path,
    settings: config.Experiment,
    result_dir: Path,
    lungs: Lungs,
    *,
    nodules: NoduleRuns,
    start: Callable[[], None],
    batch_size: int,
    overwrite: bool,
) -> Outcome:
    """Writes lungs, their uncertainty and their nodules of every scan that has none yet."""
    reach_mm = lungs.labels.snap * runs.seen_mm(settings)
    made_by = {
        "weights_sha256": files.sha256(exp_dir / "best.weights.h5"),
        **asdict(lungs.passes),
        **asdict(lungs.labels) | {"snap": reach_mm},
        "precision": lungs.precision,
        "memory_gb": lungs.memory_gb,
        "converged_dice": CONVERGED_DICE if lungs.passes.n == "auto" else None,
        "nodules": None,
    }
    predictor = passes_predictor(exp_dir, settings, lungs, batch_size=batch_size)
    finder = None
    if nodules.used:
        finder = nodule_finder(nodules, lungs, batch_size=batch_size)
        made_by["nodules"] = finder.made_by
    results = Results(
        result_dir,
        lungs.save_as,
        made_by,
        replaced={task.scan_id for task in tasks} if overwrite else set(),
    )
    start()
    foreign = [
        steps.Failure(task.scan_id, results.foreign(task.scan_id))
        for task in tasks
        if results.foreign(task.scan_id)
    ]
    tasks = without_failures(tasks, foreign)
    missing = [task for task in tasks if not results.complete(task.scan_id)]

    def segment(task: Task, scan: Scan) -> None:
        started = time.monotonic()
        maps, labels, verdict = lungs_of(scan, predictor, lungs.labels, reach_mm)
        found = finder.find(replace(scan, lung=labels)) if finder else None
        seconds = time.monotonic() - started
        row = result_folder.row_of(task.scan_id, maps.n, verdict, seconds)
        results.write(scan, row, maps, labels, found)
        for reason in verdict.reasons:
            log.warning("%s: not to be trusted: %s", task.scan_id, reason)

    failures = [*foreign, *read_and_map(segment, missing, read_ct)]
    done = without_failures(tasks, failures)
    flagged = sum(results.rows[task.scan_id].flag for task in done)
    scans = files.count_text(len(done), "scan")
    line = f"lungs of {scans}, {flagged} of them not to be trusted"
    if finder:
        found = sum(results.number_of_nodules(task.scan_id) for task in done)
        line += f"; {files.count_text(found, 'nodule')}"
    return done, failures, line + there_before(len(tasks) - len(missing))


def there_before(count: int) -> str:
    """For the closing line: how many scans an earlier call had segmented."""
    return f" ({files.count_text(count, 'scan')} there before)" if count else ""


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
        path = Path(__file__).parent / path
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


def read_and_map(
    segment: Callable[[Task, Scan], None],
    tasks: Sequence[Task],
    read: Callable[[Task], Scan],
) -> list[steps.Failure]:
    """Segments every scan, and reads the next one meanwhile; the scans that failed."""
    waiting = iter(tasks)
    with ThreadPoolExecutor(1) as reader:
        ahead = [reader.submit(read, task) for task in itertools.islice(waiting, 1)]

        def work(task: Task) -> None:
            scan = ahead.pop()
            ahead.extend(
                reader.submit(read, task) for task in itertools.islice(waiting, 1)
            )
            segment(task, scan.result())

        _, failures = steps.map_scans(work, tasks, workers=1, label="infer")
    return failures


def without_failures(
    tasks: Sequence[Task], failures: Sequence[steps.Failure]
) -> list[Task]:
    failed = {failure.scan_id for failure in failures}
    return [task for task in tasks if task.scan_id not in failed]


def map_path(result_dir: Path, task: Task) -> Path:
    """Where the probability map of a scan is written."""
    return result_dir / task.scan_id / "prob.nii.gz"


def tasks_of_parts(
    scans_dir: Path, split: dict[str, Any], parts: Sequence[str]
) -> tuple[list[Task], list[steps.Failure]]:
    """The scan files of the patients in `parts` of a split, and those not readable."""
    part_of = {
        patient: part
        for part in parts
        for patient in slice_idx.patients_of_part(split, part)
    }
    slices = {
        part: slice_idx.slices_of_part(split, part) for part in parts if split["leaks"]
    }
    tasks, unreadable = [], []
    for path in scan_files(scans_dir):
        try:
            patient_id, scan_id = scan_identity(path)
        except ScanError as error:
            unreadable.append(steps.Failure(path.stem, str(error)))
            continue
        own = {part: s[scan_id] for part, s in slices.items() if scan_id in s}
        if split["leaks"] and own:
            tasks.append(Task(scan_id, patient_id, "", path, own))
        elif not split["leaks"] and patient_id in part_of:
            tasks.append(Task(scan_id, patient_id, part_of[patient_id], path))
    if not tasks:
        raise ValueError(
            f"{scans_dir} holds no scan of the {' or '.join(parts)} patients of the run's "
            "split; choose other --parts, or the --scans the run was made from"
        )
    return tasks, unreadable


def tasks_of_input(path: Path) -> list[Task]:
    """The CT scans a person names: DICOM folder, volume, folder of volumes, CSV list."""
    from cohorts import nifti

    return tasks_of_sources(nifti.find_scans(path))


def tasks_of_list(path: Path) -> tuple[list[Task], list[steps.Failure]]:
    """The scans of a CSV list, and its rows that cannot be used."""
    from cohorts import nifti

    sources, refused = nifti.read_usable(path)
    failures = [steps.Failure(line, reason) for line, reason in refused.items()]
    return tasks_of_sources(sources), failures


def tasks_of_sources(sources: Sequence[ScanSource]) -> list[Task]:
    return [Task(source.scan_id, source.patient_id, "", source) for source in sources]


def read_ct(task: Task) -> Scan:
    """The scan of a task as it comes, with lung labels or without."""
    if isinstance(task.source, Path):
        return read_scan(task.source)
    from cohorts import nifti

    try:
        return nifti.load_scan(task.source)
    except ScanError as error:
        raise ScanError(without_folders(str(error), task.source)) from error


def read_with_lungs(task: Task, mask: config.LungMask) -> Scan:
    """The scan, with lung labels made by the run's own settings if it has none."""
    scan = read_ct(task)
    if isinstance(task.source, Path):
        return scan
    return with_lungs(scan, mask)


def new_predictions(run_dir: Path, split: dict[str, Any]) -> Predictions:
    """The record that goes beside the predictions, still without scans."""
    weights = run_dir / "best.weights.h5"
    return Predictions(
        run=run_dir.name,
        weights_sha256=files.sha256(weights),
        split_sha256=split["sha256"],
        training_patients=tuple(runs.training_patients_of(weights)),
        scans={},
        provenance=provenance.record(),
    )


def without_own_names(
    tasks: Sequence[Task],
) -> tuple[list[Task], list[steps.Failure]]:
    """The tasks whose id is not that of a file infer.py itself writes; the others."""
    misnamed = [
        steps.Failure(
            task.scan_id,
            f"{task.scan_id} is a file of the result directory's own; give the scan "
            "another id",
        )
        for task in tasks
        if task.scan_id.casefold() in OWN_NAMES
    ]
    return without_failures(tasks, misnamed), misnamed


def remove_nodules(result_dir: Path) -> None:
    """Removes maps and what was made of them, so that none of other weights stays."""
    for path in list(result_dir.glob("*/prob.nii.gz")):
        for name in ("prob.nii.gz", STD_NIFTI, "mask.nii.gz", "nodules.csv"):
            files.remove(path.with_name(name))
        if not any(path.parent.iterdir()):
            path.parent.rmdir()
    for name in (PREDICTIONS_JSON, POSTPROCESS_JSON):
        files.remove(result_dir / name)


def refuse_other_predictions(result_dir: Path, predictions: Predictions) -> None:
    """Refuses a result directory with the predictions of another network.

    Raises:
        ValueError: If it holds such.
    """
    path = result_dir / PREDICTIONS_JSON
    if not path.exists():
        return
    known = read_predictions(result_dir)
    found = known.weights_sha256
    if found != predictions.weights_sha256:
        raise ValueError(
            f"{path}: predictions of weights {found[:12]}; this run's are "
            f"{predictions.weights_sha256[:12]}; use --overwrite or another --result_dir"
        )
    if known.passes != predictions.passes:
        raise ValueError(
            f"{path}: predictions of passes {known.passes or 'one'}; now "
            f"{predictions.passes or 'one'}; use --overwrite or another --result_dir"
        )


def write_predictions(
    result_dir: Path, predictions: Predictions, tasks: Sequence[Task]
) -> None:
    """Lists scans in predictions.json, beside those that an earlier call listed."""
    scans: dict[str, dict[str, Any]] = {}
    if (result_dir / PREDICTIONS_JSON).exists():
        earlier = read_predictions(result_dir)
        if earlier.weights_sha256 == predictions.weights_sha256:
            scans = dict(earlier.scans)
    for task in tasks:
        facts: dict[str, Any] = {"part": task.part, "patient_id": task.patient_id}
        if task.slices:
            earlier = scans.get(task.scan_id, {}).get("slices", {})
            facts["slices"] = earlier | task.slices
        scans[task.scan_id] = facts
    replace(predictions, scans=scans).write(result_dir)


def warn_of_leaks(tasks: Sequence[Task], seen: Mapping[str, Sequence[str]]) -> None:
    """Names the patients that one of the runs, by directory, was trained on."""
    for task in tasks:
        names = runs.names_of(task.scan_id, task.patient_id)
        found = [
            Path(run).name
            for run, patients in seen.items()
            if not names.isdisjoint(patients)
        ]
        if found:
            log.warning(
                "patient %s was trained on (by %s); the result says nothing of new patients",
                task.patient_id,
                ", ".join(found),
            )


def main(argv: Sequence[str] | None = None) -> None:
    steps.run(lambda a: infer(**vars(a)), Arguments, argv=argv)


if __name__ == "__main__":
    main()
