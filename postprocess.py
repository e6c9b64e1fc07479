"""Step 7 of 9: turn probability maps into nodules, each measured in mm.

A run whose method is "tuned" gets threshold, erosion and smallest volume from the
validation scans; `best_of_grid` says how.

Example:
    python postprocess.py --predictions work/predictions/thesis --run work/runs/thesis
"""

import json
import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

import config
import steps
from configs.rules import RULES, Rule
from ct import files, provenance
from ct.files import write_rows
from ct.geometry import canonical_grid
from ct.nifti_io import check_same_grid, read_nifti, write_nifti
from ct.scan import Scan, ScanError, read_scan, reference_mask, scan_path
from metrics.tuning import best_of_grid, tuning_counts
from nodules.components import label_nodules
from nodules.measures import find_nodules, measure_nodules
from results.predictions import (
    FORMAT_VERSION,
    STD_NIFTI,
    Predictions,
    read_predictions,
    settings_text,
)
from results.rows import NODULE_COLUMNS, nodule_row
from training import runs
from training.runs import POSTPROCESS_JSON

log = logging.getLogger(__name__)


def postprocess(
    marked: np.ndarray,
    spacing_mm: Sequence[float],
    *,
    settings: config.Postprocess = RULES["voxels-150"],
    lung: np.ndarray | None = None,
    hu: np.ndarray | None = None,
) -> tuple[np.ndarray, list[dict[str, Any]]]:
    """Instances of a mask, of labels or of a map of probability, and a table of them.

    Every label of labels stays apart, even from one it touches; parts of it that do not
    touch each other become two. A mask without nodules gives labels of 0 and no row.

    Args:
        marked: (z, y, x), z rising to the head: a bool mask; integers, labels from 1 or a
            mask of 0 and 1; or floats, probabilities.
        spacing_mm: (z, y, x).
        settings: By default components of 150 voxels or more, of probabilities of 0.5 or
            more; `replace(settings, min_voxels=0)` keeps all.
        lung: (z, y, x) labels, 1 right and 2 left: for sides, distances to the pleura, and
            `settings.within_lung`.
        hu: (z, y, x) int16, for the mean HU.

    Returns:
        (z, y, x) labels, uint8 or the smallest unsigned type that holds them, and a
        row for each, as `FoundNodule` has them. 1 has the highest score; of equal ones,
        as all of a mask are, that which comes first in the array.

    Raises:
        ValueError: If shapes differ, a spacing is not above 0, integers are below 0 or
            floats are not within 0 and 1.
    """
    grid = canonical_grid(marked.shape, spacing_mm)
    for other in (lung, hu):
        if other is not None and other.shape != marked.shape:
            raise ValueError(f"shapes {marked.shape} and {other.shape}; expected one")
    is_map = marked.dtype.kind == "f"
    low, high = marked.min(), marked.max()
    if not low >= 0 or (is_map and not high <= 1):
        raise ValueError(
            f"values run from {low:g} to {high:g}; expected probabilities of 0 to 1, or a "
            "mask or labels of a whole-number type"
        )
    prob = marked.astype(np.float32) if is_map else np.ones(marked.shape, np.float32)
    labels, chances = label_nodules(
        prob, grid, settings, lung=lung, marked=None if is_map else marked
    )
    nodules = measure_nodules(labels, chances, grid, lung=lung, hu=hu)
    return labels, [asdict(nodule) for nodule in nodules]


@dataclass(frozen=True)
class Job:
    """One scan to work on, wherever that happens."""

    scan_id: str
    folder: Path
    scans: Path
    settings: config.Postprocess
    consensus_level: float = 0.5
    min_readers: int = 1
    slices: tuple[int, ...] | None = None
    """The slices (z) that count; None for all."""


def read_prediction(job: Job, name: str) -> tuple[Scan, np.ndarray]:
    """The scan of a job, and its volume `name` on the same grid.

    Raises:
        ScanError: If one is missing or they do not lie on one grid.
    """
    path = scan_path(job.scans, job.scan_id)
    if not path.exists():
        raise ScanError(f"no scan file {path}; run preprocess.py first")
    scan = read_scan(path)
    volume, grid = read_nifti(job.folder / job.scan_id / name)
    check_same_grid(grid, scan.grid, job.folder / job.scan_id / name)
    return scan, volume


def lung_of(scan: Scan) -> np.ndarray:
    """The lung labels of a scan.

    Raises:
        ScanError: If it has none.
    """
    if scan.lung is None:
        raise ScanError(
            f"scan {scan.scan_id} has no lung mask; run preprocess.py again with --overwrite"
        )
    return scan.lung


def write_nodules(job: Job) -> int:
    """Writes mask.nii.gz and nodules.csv of one scan.

    Returns:
        The number of nodules. nodules.csv is written last: it marks a scan as done.
    """
    scan, prob = read_prediction(job, "prob.nii.gz")
    labels, nodules = find_nodules(
        prob,
        scan.grid,
        job.settings,
        std=std_of(job, scan),
        lung=lung_of(scan) if job.settings.within_lung else scan.lung,
        hu=scan.hu,
    )
    folder = job.folder / job.scan_id
    write_nifti(folder / "mask.nii.gz", labels, scan.grid, scan.source_grid)
    rows = [nodule_row(nodule, scan) for nodule in nodules]
    write_rows(rows, NODULE_COLUMNS, folder / "nodules.csv")
    return len(nodules)


def std_of(job: Job, scan: Scan) -> np.ndarray | None:
    """The standard deviation over passes; None where there was one pass."""
    path = job.folder / job.scan_id / STD_NIFTI
    if not path.exists():
        return None
    std, grid = read_nifti(path)
    check_same_grid(grid, scan.grid, path)
    return std


def count_for_tuning(job: Job) -> np.ndarray:
    """What each setting of the grid gives on one scan.

    Returns:
        (thresholds, erosions, volumes, scores, 4) int64: voxels true positive, false positive
        and false negative, and components that touch no reference voxel.
    """
    scan, prob = read_prediction(job, "prob.nii.gz")
    reference = reference_mask(
        scan, consensus_level=job.consensus_level, min_readers=job.min_readers
    )
    return tuning_counts(
        prob,
        reference,
        scan.grid,
        job.settings,
        within=lung_of(scan) > 0 if job.settings.within_lung else None,
        slices=job.slices,
    )


@dataclass(frozen=True)
class Arguments:
    """What to work on."""

    predictions: Path
    """Folder that infer.py wrote."""
    run: Path
    """Run directory whose configuration holds; tuned values are kept there."""
    rule: Rule | None = None
    """Use this rule instead of the run's: voxels-150, components of 150 voxels or more."""
    scans: Path = Path("work/scans")
    """Folder that preprocess.py wrote."""
    tune: bool = False
    """Tune on the validation scans whatever the run's method is, and tune again if it
    was done before."""
    workers: int = 2
    """Processes on this machine."""
    scheduler: str = ""
    """Address of a Dask scheduler to use instead."""
    overwrite: bool = False
    """Replace masks and nodules that are there."""


def postprocess_predictions(arguments: Arguments) -> steps.Report:
    """Tunes if needed, then writes masks and nodules of every predicted scan."""
    predictions = read_predictions(arguments.predictions)
    experiment = read_experiment(arguments.run)
    weights = arguments.run / "best.weights.h5"
    if weights.exists() and files.sha256(weights) != predictions.weights_sha256:
        raise ValueError(
            f"{arguments.predictions} was predicted by run {predictions.run} with other "
            f"weights than those of {arguments.run}; name the run that made it"
        )
    settings, origin = settings_of_run(arguments, predictions, experiment)
    record = {
        "format_version": FORMAT_VERSION,
        "weights_sha256": predictions.weights_sha256,
        "settings": config.to_json(settings),
        "origin": origin,
    }
    folder = arguments.predictions
    if arguments.overwrite:
        # All at once: a run that is stopped must not leave masks of the older settings
        # that look done.
        for scan_id in predictions.scans:
            files.remove(folder / scan_id / "nodules.csv")
    refuse_other_settings(record, folder)
    files.write_json(
        folder / POSTPROCESS_JSON, {**record, "provenance": provenance.record()}
    )
    jobs = [
        Job(scan_id, folder, arguments.scans, settings)
        for scan_id in sorted(predictions.scans)
        if not (folder / scan_id / "nodules.csv").exists()
    ]
    found, failures = steps.map_scans(
        write_nodules,
        jobs,
        workers=arguments.workers,
        scheduler=arguments.scheduler,
        label="nodules",
    )
    done = len(predictions.scans) - len(jobs)
    line = (
        f"wrote {folder}: {sum(found)} nodules in {len(found)} scans "
        f"({done} were done before); {settings_text(settings)}, {origin}"
    )
    return steps.Report(line, failures)


def read_experiment(run: Path) -> config.Experiment:
    """The configuration of a run that segments nodules.

    Raises:
        FileNotFoundError: If the run is absent or not complete.
        ValueError: If the run segments something else.
    """
    experiment = runs.read_settings(run)
    if experiment.batches.target != "nodule":
        raise ValueError(
            f"{run}: the run segments {experiment.batches.target}; nodules are found "
            "only in probabilities of nodule"
        )
    return experiment


def settings_of_run(
    arguments: Arguments, predictions: Predictions, experiment: config.Experiment
) -> tuple[config.Postprocess, str]:
    """The settings to use, and a phrase that says where they come from."""
    if arguments.rule is not None:
        if arguments.tune:
            raise ValueError(f"--rule {arguments.rule} and --tune; expected one")
        return RULES[arguments.rule], f"rule {arguments.rule}"
    base = experiment.postprocess
    if base.method != "tuned" and not arguments.tune:
        return base, f"method {base.method} of the run"
    path = arguments.run / POSTPROCESS_JSON
    if path.exists() and not arguments.tune:
        record = json.loads(path.read_text())
        # Records of before these could be set.
        before = {"min_voxels": 0, "fill_holes": False} | record.get("tuned_on", {})
        if before == tuned_on(predictions, experiment):
            settings = config.from_json(config.Postprocess, record["settings"])
            return settings, record["origin"]
        log.warning(
            "%s was tuned on other weights, scans or settings; it does not count", path
        )
    return tune(arguments, predictions, experiment)


def tuned_on(predictions: Predictions, experiment: config.Experiment) -> dict[str, Any]:
    """What tuned values hold for: weights, validation scans and what is not tuned."""
    batches, base = experiment.batches, experiment.postprocess
    scans = predictions.of_part("validation")
    return {
        "weights_sha256": predictions.weights_sha256,
        "passes": predictions.passes,
        "scans": {
            scan_id: slices and list(slices) for scan_id, slices in scans.items()
        },
        "consensus_level": batches.consensus_level,
        "min_readers": batches.min_readers,
        "within_lung": base.within_lung,
        "connectivity": base.connectivity,
        "min_voxels": base.min_voxels,
        "fill_holes": base.fill_holes,
    }


def tune(
    arguments: Arguments, predictions: Predictions, experiment: config.Experiment
) -> tuple[config.Postprocess, str]:
    """Tunes on the validation scans and keeps the result in the run directory."""
    base, batches = experiment.postprocess, experiment.batches
    jobs = [
        Job(
            scan_id,
            arguments.predictions,
            arguments.scans,
            base,
            batches.consensus_level,
            batches.min_readers,
            slices,
        )
        for scan_id, slices in predictions.of_part("validation").items()
    ]
    counts, failures = steps.map_scans(
        count_for_tuning,
        jobs,
        workers=arguments.workers,
        scheduler=arguments.scheduler,
        label="tuning",
    )
    for failure in failures:
        log.warning("not tuned on %s: %s", failure.scan_id, failure.reason)
    if not counts:
        log.warning(
            "no validation scan to tune on; the fixed threshold %g is used",
            base.threshold,
        )
        return replace(base, method="fixed"), "not tuned: no validation scans"
    settings, reached = best_of_grid(np.stack(counts), base)
    origin = (
        f"tuned on {len(counts)} validation scans, {reached['scans_with_nodule']} of them "
        "with a nodule"
    )
    if reached["mean_dice"] is not None:
        origin += f" (mean Dice {reached['mean_dice']:.3f})"
    record = {
        "format_version": FORMAT_VERSION,
        "tuned_on": tuned_on(predictions, experiment),
        "settings": config.to_json(settings),
        "origin": origin,
        "reached": reached,
        "provenance": provenance.record(),
    }
    files.write_json(arguments.run / POSTPROCESS_JSON, record)
    return settings, origin


def refuse_other_settings(record: dict[str, Any], folder: Path) -> None:
    """Stops before masks of two settings or two weights lie in one folder.

    Raises:
        ValueError: If masks are there that were made otherwise.
    """
    path = Path(folder) / POSTPROCESS_JSON
    if not path.exists() or not any(folder.glob("*/nodules.csv")):
        return
    before = json.loads(path.read_text())
    settings = config.with_defaults(config.Postprocess, before["settings"])
    changed = [
        f"{name} was {settings[name]}, is {value}"
        for name, value in record["settings"].items()
        if settings[name] != value
    ]
    if before["weights_sha256"] != record["weights_sha256"]:
        changed.append("the weights are others")
    if changed:
        raise ValueError(
            f"{folder} holds masks made otherwise ({'; '.join(changed)}); "
            "add --overwrite to make them again"
        )


def main(argv: Sequence[str] | None = None) -> None:
    steps.run(postprocess_predictions, Arguments, argv=argv)


if __name__ == "__main__":
    main()
