"""Step 6 of 9: segment scans with a run: probability maps, or lungs with uncertainty.

Example:
    python infer.py --exp_dir work/runs/smoke --result_dir work/predictions/smoke
    python infer.py --csv_file scans.csv --result_dir OUT --n 100 --thresh 0.55
    python infer.py --input imagesTs --result_dir OUT --save_as nnunet

Segments scan files of the validation and test patients, or with --input or --csv_file any
CT: a DICOM folder, a volume, a folder of volumes, or a CSV list with columns pid,image_path.
A run for nodules gives their probability map. A run for lungs gives mean and standard
deviation over many passes, lung labels and, in lungs.csv, whether to trust them. Other runs
then find nodules inside the lungs, outline them, measure them (nodules.csv) and draw them
(overview.png).
Research code, not a medical device.
"""

import functools
import itertools
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

import config
import steps
from ct import files, provenance
from ct.nifti_io import write_nifti
from ct.scan import Scan
from dataset.split import read_split
from inference.passes import CONVERGED_DICE, Passes
from inference.segment import (
    BATCH_SIZE,
    DEFAULT_LUNGS,
    SHIPPED,
    SHIPPED_RUNS,
    Lungs,
    NoduleRuns,
    Preset,
    SeededPredictor,
    log_verdict,
    lungs_of,
    nodule_finder,
    nodule_predictor,
    passes_predictor,
    predict,
    refuse_unused,
    segment_nodule,
    segment_patches,
    training_patients_by_run,
    with_preset,
)
from inference.tasks import (
    AS_IT_IS,
    Reading,
    Task,
    read_ct,
    read_with_lungs,
    tasks_of_input,
    tasks_of_list,
    tasks_of_parts,
    warn_of_leaks,
    without_failures,
)
from results import rows
from results.predictions import (
    PREDICTIONS_JSON,
    STD_NIFTI,
    Predictions,
    read_predictions,
)
from results.result_folder import Results
from training import runs
from training.runs import POSTPROCESS_JSON

__all__ = [
    "Arguments",
    "Lungs",
    "NoduleRuns",
    "Passes",
    "Reading",
    "infer",
    "main",
    "predict",
    "segment_nodule",
    "segment_patches",
]

log = logging.getLogger(__name__)

OWN_NAMES = {
    rows.LUNGS_CSV,
    rows.NODULES_CSV,
    rows.CANDIDATES_CSV,
    rows.LUNGS_JSON,
    PREDICTIONS_JSON,
    POSTPROCESS_JSON,
    "skipped.csv",
}
"""Files beside the results of the scans; a scan id must not be one of these names."""


@dataclass(frozen=True)
class Arguments:
    """Options of infer.py."""

    result_dir: Path
    """Folder for the results, with one folder or file per scan."""
    csv_file: Path | None = None
    """Segment the scans of this CSV list (columns pid,image_path). Rows that cannot be used
    are listed in skipped.csv and do not stop the others."""
    input: Path | None = None
    """Segment this CT: DICOM folder, volume, folder of volumes or CSV list. postprocess.py
    also needs its scan file, which preprocess.py --cohort nifti makes."""
    preset: Preset = "default"
    """w1 takes the settings of Zhuang et al. 2025: 100 passes, 70 % of the cubes hidden, the
    mask is mean > 0.55. An option whose value differs from its usual default overrides the
    preset."""
    overwrite: bool = False
    """Replace existing results, also those made with other weights or settings."""
    exp_dir: Path = SHIPPED
    """Run directory made by train.py; by default the shipped weights for lungs."""
    scans: Path = Path("work/scans")
    """Folder of scan files made by preprocess.py, used if --csv_file and --input are unset."""
    parts: tuple[Literal["train", "validation", "test"], ...] = ("validation", "test")
    """Parts of the run's split whose scan files are segmented."""
    batch_size: int = BATCH_SIZE
    """Tiles per call of a 2-D network."""
    lungs: Annotated[Lungs, tyro.conf.OmitArgPrefixes] = DEFAULT_LUNGS
    nodules: Annotated[NoduleRuns, tyro.conf.OmitArgPrefixes] = SHIPPED_RUNS
    reading: Annotated[Reading, tyro.conf.OmitArgPrefixes] = AS_IT_IS


def infer(
    exp_dir: Path,
    result_dir: Path,
    *,
    csv_file: Path | None = None,
    input: Path | None = None,
    scans: Path = Path("work/scans"),
    parts: Sequence[str] = ("validation", "test"),
    lungs: Lungs = DEFAULT_LUNGS,
    nodules: NoduleRuns = SHIPPED_RUNS,
    batch_size: int = BATCH_SIZE,
    overwrite: bool = False,
    reading: Reading = AS_IT_IS,
) -> steps.Report:
    """Segments every scan; see `Arguments`, which has the same defaults.

    Raises:
        FileNotFoundError: If the run or the scans are missing.
        ValueError: If `result_dir` holds results made with other weights or settings, or
            the run does not support an option.
    """
    if exp_dir == SHIPPED and not (exp_dir / "config.json").exists():
        raise FileNotFoundError(
            f"no weights in {exp_dir}; name a run directory with --exp_dir"
        )
    if input and csv_file:
        raise ValueError(f"--input {input} and --csv_file {csv_file}; expected one")
    if reading != AS_IT_IS and not (input or csv_file):
        raise ValueError(
            f"{reading}, but scan files were read by preprocess.py; use its --repair, or "
            "--input or --csv_file here"
        )
    settings = runs.read_settings(exp_dir)
    split = read_split(exp_dir / "split.json")
    predictions = replace(new_predictions(exp_dir, split), repair=tuple(reading.repair))
    if settings.batches.target == "nodule" and lungs.passes.n not in ("auto", 0, 1):
        made_by = asdict(lungs.passes) | {"precision": lungs.precision}
        predictions = replace(predictions, passes=made_by)
    if csv_file:
        tasks, unusable = tasks_of_list(csv_file)
    elif input:
        tasks, unusable = tasks_of_input(input, reading.series), []
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
        seen |= training_patients_by_run(nodules)
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
        reading=reading,
    )
    write_predictions(result_dir, predictions, done)
    failures = [*unusable, *misnamed, *failures]
    steps.write_failures(failures, result_dir / "skipped.csv")
    return steps.Report(f"wrote {result_dir}: {line}", failures)


Outcome = tuple[list[Task], list[steps.Failure], str]
"""Segmented scans, failures, and text for the closing line."""


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
    reading: Reading = AS_IT_IS,
) -> Outcome:
    """Writes the probability map of every scan that has none yet.

    Uses `passes`, `precision` and `memory_gb` of `lungs`. Several passes also write
    std.nii.gz.
    """
    if lungs.save_as == "nnunet":
        raise ValueError(
            f"--save_as nnunet, but {exp_dir} gives nodule probabilities; expected a run "
            "for lungs, with --nodules to find nodules in them"
        )
    predictor = nodule_predictor(exp_dir, settings, lungs, batch_size=batch_size)
    if overwrite:
        remove_nodules(result_dir)
    start()  # before the first map, so that a killed call leaves its record
    stood = {task.scan_id for task in tasks if map_path(result_dir, task).exists()}
    missing = [task for task in tasks if task.scan_id not in stood]
    odd: dict[str, tuple[str, ...]] = {}

    def segment(task: Task, scan: Scan) -> None:
        odd[task.scan_id] = scan.warnings
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
        segment, missing, lambda task: read_with_lungs(task, settings.mask, reading)
    )
    done = with_warnings(without_failures(tasks, failures), odd)
    volume_bytes = sum(map_path(result_dir, task).stat().st_size for task in done)
    scans = files.count_text(len(done), "scan")
    line = f"{scans}, {files.size_text(volume_bytes)}"
    return done, failures, line + earlier_scans_text(len(stood))


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
    reading: Reading = AS_IT_IS,
) -> Outcome:
    """Writes lungs, uncertainty and nodules of every scan that has no results yet."""
    reach_mm = lungs.labels.snap * runs.input_spacing_mm(settings)
    made_by = {
        "weights_sha256": files.sha256(exp_dir / "best.weights.h5"),
        **asdict(lungs.passes),
        **asdict(lungs.labels) | {"snap": reach_mm},
        "precision": lungs.precision,
        "memory_gb": lungs.memory_gb,
        "mean_is_mask": lungs.mean_is_mask,
        "converged_dice": CONVERGED_DICE if lungs.passes.n == "auto" else None,
        "nodules": None,
        **reading.record(),
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
    odd: dict[str, tuple[str, ...]] = {}
    older = [
        task.scan_id
        for task in tasks
        if task not in missing and not results.rows[task.scan_id].nodules_searched
    ]
    if finder and older:
        log.warning(
            "%s done before lung masks got a second opinion (lungs/anatomy.py), e.g. %s; "
            "--overwrite computes them again",
            files.count_text(len(older), "scan"),
            older[0],
        )

    def segment(task: Task, scan: Scan) -> None:
        started = time.monotonic()
        log.info("%s: segmenting lungs, %d slices", task.scan_id, len(scan.hu))
        segmented = lungs_of(scan, predictor, lungs.labels, reach_mm)
        maps, labels, verdict = segmented.maps, segmented.labels, segmented.verdict
        found = None
        if finder:
            log.info("%s: finding nodules, after %d pass(es)", task.scan_id, maps.n)
            found = finder.find(replace(scan, lung=labels), segmented.searched)
        else:
            verdict = replace(verdict, nodules_searched="")
        seconds = time.monotonic() - started
        row = rows.lung_row(task.scan_id, maps.n, verdict, seconds, scan.warnings)
        odd[task.scan_id] = (*scan.warnings, *verdict.mended)
        results.write(scan, row, maps, labels, found)
        log_verdict(task.scan_id, verdict)

    read = functools.partial(read_ct, reading=reading)
    failures = [*foreign, *read_and_map(segment, missing, read)]
    done = with_warnings(without_failures(tasks, failures), odd)
    flagged = sum(results.rows[task.scan_id].flag for task in done)
    scans = files.count_text(len(done), "scan")
    line = f"lungs of {scans}, {flagged} of them flagged"
    if finder:
        found = sum(results.number_of_nodules(task.scan_id) for task in done)
        line += f"; {files.count_text(found, 'nodule')}"
        done = [
            replace(task, nodules_searched=results.rows[task.scan_id].nodules_searched)
            for task in done
        ]
        if skipped := sum(task.nodules_searched == "no" for task in done):
            line += f", {files.count_text(skipped, 'scan')} not searched"
    return done, failures, line + earlier_scans_text(len(tasks) - len(missing))


def with_warnings(
    tasks: Sequence[Task], odd: Mapping[str, tuple[str, ...]]
) -> list[Task]:
    """Returns the tasks with the warnings of their scans, if they were read just now."""
    return [replace(task, warnings=odd.get(task.scan_id)) for task in tasks]


def earlier_scans_text(count: int) -> str:
    """Returns text for the closing line: the number of scans segmented by earlier calls."""
    return f" ({files.count_text(count, 'scan')} done before)" if count else ""


def read_and_map(
    segment: Callable[[Task, Scan], None],
    tasks: Sequence[Task],
    read: Callable[[Task], Scan],
) -> list[steps.Failure]:
    """Segments every scan while reading the next one; returns the failures."""
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


def map_path(result_dir: Path, task: Task) -> Path:
    """Returns the path of the probability map of a scan."""
    return result_dir / task.scan_id / "prob.nii.gz"


def new_predictions(run_dir: Path, split: dict[str, Any]) -> Predictions:
    """Returns a new record of predictions, with no scans yet."""
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
    """Splits off tasks whose id is the name of a file that infer.py itself writes."""
    misnamed = [
        steps.Failure(
            task.scan_id,
            f"{task.scan_id} is the name of a file that infer.py writes; give the scan "
            "another id",
        )
        for task in tasks
        if task.scan_id.casefold() in OWN_NAMES
    ]
    return without_failures(tasks, misnamed), misnamed


def remove_nodules(result_dir: Path) -> None:
    """Removes probability maps and files made from them, so none of other weights stay."""
    for path in list(result_dir.glob("*/prob.nii.gz")):
        for name in ("prob.nii.gz", STD_NIFTI, "mask.nii.gz", "nodules.csv"):
            files.remove(path.with_name(name))
        if not any(path.parent.iterdir()):
            path.parent.rmdir()
    for name in (PREDICTIONS_JSON, POSTPROCESS_JSON):
        files.remove(result_dir / name)


def refuse_other_predictions(result_dir: Path, predictions: Predictions) -> None:
    """Raises ValueError if `result_dir` has predictions made with other weights or passes."""
    path = result_dir / PREDICTIONS_JSON
    if not path.exists():
        return
    known = read_predictions(result_dir)
    found = known.weights_sha256
    if found != predictions.weights_sha256:
        raise ValueError(
            f"{path}: predictions made with weights {found[:12]}, but this run has weights "
            f"{predictions.weights_sha256[:12]}; use --overwrite or another --result_dir"
        )
    if known.repair != predictions.repair:
        raise ValueError(
            f"{path}: predictions made with --repair {' '.join(known.repair) or '(none)'}; "
            f"expected {' '.join(predictions.repair) or '(none)'}; use --overwrite or "
            "another --result_dir"
        )
    if known.passes != predictions.passes:
        raise ValueError(
            f"{path}: predictions made with passes: {known.passes or 'one'}; expected: "
            f"{predictions.passes or 'one'}; use --overwrite or another --result_dir"
        )


def write_predictions(
    result_dir: Path, predictions: Predictions, tasks: Sequence[Task]
) -> None:
    """Adds scans to predictions.json, keeping those listed by earlier calls."""
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
        warnings = task.warnings
        if warnings is None:
            warnings = scans.get(task.scan_id, {}).get("warnings")
        if warnings:
            facts["warnings"] = list(warnings)
        if task.nodules_searched in ("partly", "no"):
            facts["nodules_searched"] = task.nodules_searched
        scans[task.scan_id] = facts
    replace(predictions, scans=scans).write(result_dir)


def run_step(arguments: Arguments) -> steps.Report:
    """Runs the step from the command line."""
    options: dict[str, Any] = dict(vars(arguments))
    options["lungs"] = with_preset(arguments.lungs, options.pop("preset"))
    return infer(**options)


def main(argv: Sequence[str] | None = None) -> None:
    steps.run(run_step, Arguments, argv=argv)


if __name__ == "__main__":
    main()
