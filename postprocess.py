"""Step 7 of 9: turn probability maps into nodules, each measured in mm.

If the run's method is "tuned", threshold, erosion, smallest volume and smallest score are
chosen on the validation scans; see `best_of_grid`.

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
    """Finds and measures the nodules in a mask, a label volume or a probability map.

    Different input labels stay separate nodules, even if they touch; unconnected parts of
    one label become separate nodules. A mask without nodules gives labels of 0 and no row.

    Args:
        marked: (z, y, x), z ascending towards the head: a bool mask; integers, which are
            labels from 1 or a mask of 0 and 1; or floats, which are probabilities.
        spacing_mm: (z, y, x).
        settings: Postprocessing settings. The default keeps components of at least 150
            voxels with probabilities of at least 0.5; `replace(settings, min_voxels=0)`
            keeps all components.
        lung: (z, y, x) labels, 1 right and 2 left, used for sides, distances to the pleura
            and `settings.within_lung`.
        hu: (z, y, x) int16, used for the mean HU.

    Returns:
        (z, y, x) labels, uint8 or the smallest unsigned type that holds them, and one row
        per label with the fields of `FoundNodule`. Label 1 has the highest score; equal
        scores, as in a mask, are ordered by their first voxel in the array.

    Raises:
        ValueError: If shapes differ, a spacing is not above 0, integers are below 0 or
            floats are outside 0..1.
    """
    grid = canonical_grid(marked.shape, spacing_mm)
    for other in (lung, hu):
        if other is not None and other.shape != marked.shape:
            raise ValueError(
                f"shapes {marked.shape} and {other.shape}; expected equal shapes"
            )
    is_map = marked.dtype.kind == "f"
    low, high = marked.min(), marked.max()
    if not low >= 0 or (is_map and not high <= 1):
        raise ValueError(
            f"values from {low:g} to {high:g}; expected probabilities from 0 to 1, or a mask "
            "or labels of an integer type"
        )
    prob = marked.astype(np.float32) if is_map else np.ones(marked.shape, np.float32)
    labels, chances = label_nodules(
        prob, grid, settings, lung=lung, marked=None if is_map else marked
    )
    nodules = measure_nodules(labels, chances, grid, lung=lung, hu=hu)
    return labels, [asdict(nodule) for nodule in nodules]


@dataclass(frozen=True)
class Job:
    """One scan to process, with all that a worker process needs to know."""

    scan_id: str
    folder: Path
    scans: Path
    settings: config.Postprocess
    consensus_level: float = 0.5
    min_readers: int = 1
    slices: tuple[int, ...] | None = None
    """Slices (z) that count; None for all."""


def read_prediction(job: Job, name: str) -> tuple[Scan, np.ndarray]:
    """Reads the scan of a job and its predicted volume `name`.

    Raises:
        ScanError: If a file is missing or the grids differ.
    """
    path = scan_path(job.scans, job.scan_id)
    if not path.exists():
        raise ScanError(f"no scan file {path}; run preprocess.py first")
    scan = read_scan(path)
    volume, grid = read_nifti(job.folder / job.scan_id / name)
    check_same_grid(grid, scan.grid, job.folder / job.scan_id / name)
    return scan, volume


def lung_of(scan: Scan) -> np.ndarray:
    """Returns the lung labels of a scan.

    Raises:
        ScanError: If the scan has none.
    """
    if scan.lung is None:
        raise ScanError(
            f"scan {scan.scan_id} has no lung mask; run preprocess.py again with --overwrite"
        )
    return scan.lung


def write_nodules(job: Job) -> int:
    """Writes mask.nii.gz and nodules.csv of one scan; returns the number of nodules.

    nodules.csv is written last, because it marks the scan as done.
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
    """Reads the standard deviation over the passes; None if there was only one pass."""
    path = job.folder / job.scan_id / STD_NIFTI
    if not path.exists():
        return None
    std, grid = read_nifti(path)
    check_same_grid(grid, scan.grid, path)
    return std


def count_for_tuning(job: Job) -> np.ndarray:
    """Counts voxels and false components of one scan for each setting of the grid.

    Returns:
        (thresholds, erosions, volumes, scores, 4) int64: true positive, false positive and
        false negative voxels, and components that touch no reference voxel.
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
    """Predictions to postprocess, and the settings to use."""

    predictions: Path
    """Folder written by infer.py."""
    run: Path
    """Run directory that gives the settings; tuned values are stored there."""
    rule: Rule | None = None
    """Use this rule instead of the run's; voxels-150 keeps components of 150 or more voxels."""
    scans: Path = Path("work/scans")
    """Folder written by preprocess.py."""
    tune: bool = False
    """Tune on the validation scans, whatever the run's method, and replace values that were
    tuned before."""
    workers: int = 2
    """Number of processes on this machine."""
    scheduler: str = ""
    """Address of a Dask scheduler to use instead of local processes."""
    overwrite: bool = False
    """Replace existing masks and nodules."""


def postprocess_predictions(arguments: Arguments) -> steps.Report:
    """Tunes if needed, then writes masks and nodules of every predicted scan."""
    predictions = read_predictions(arguments.predictions)
    experiment = read_experiment(arguments.run)
    weights = arguments.run / "best.weights.h5"
    if weights.exists() and files.sha256(weights) != predictions.weights_sha256:
        raise ValueError(
            f"{arguments.predictions} was predicted by run {predictions.run}, whose weights "
            f"differ from those of {arguments.run}; pass the run that predicted it as --run"
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
        # Remove all of them first: an interrupted run must not leave masks of the older
        # settings that look done.
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
    nodules = files.count_text(int(sum(found)), "nodule")
    line = (
        f"wrote {folder}: {nodules} in {files.count_text(len(found), 'scan')} "
        f"({done} were done before); {settings_text(settings)}, {origin}"
    )
    return steps.Report(line, failures)


def read_experiment(run: Path) -> config.Experiment:
    """Reads the configuration of a run that segments nodules.

    Raises:
        FileNotFoundError: If the run is missing or incomplete.
        ValueError: If the run segments something else.
    """
    experiment = runs.read_settings(run)
    if experiment.batches.target != "nodule":
        raise ValueError(
            f"{run}: the run segments {experiment.batches.target}; expected a run that "
            "segments nodules"
        )
    return experiment


def settings_of_run(
    arguments: Arguments, predictions: Predictions, experiment: config.Experiment
) -> tuple[config.Postprocess, str]:
    """Returns the settings to use, and a phrase that says where they come from."""
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
        # Older records lack these settings, which then had these values.
        before = {"min_voxels": 0, "fill_holes": False} | record.get("tuned_on", {})
        if before == tuned_on(predictions, experiment):
            settings = config.from_json(config.Postprocess, record["settings"])
            return settings, record["origin"]
        log.warning(
            "%s was tuned on other weights, scans or settings; it is ignored", path
        )
    return tune(arguments, predictions, experiment)


def tuned_on(predictions: Predictions, experiment: config.Experiment) -> dict[str, Any]:
    """Returns the weights, validation scans and settings that tuned values depend on."""
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
    """Tunes on the validation scans and stores the result in the run directory."""
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
        log.warning("tuning leaves out %s: %s", failure.scan_id, failure.reason)
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
    """Raises ValueError if the folder holds masks of other settings or other weights."""
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
        changed.append("the weights differ")
    if changed:
        raise ValueError(
            f"{folder} holds masks made with other settings ({'; '.join(changed)}); "
            "add --overwrite to make them again"
        )


def main(argv: Sequence[str] | None = None) -> None:
    steps.run(postprocess_predictions, Arguments, argv=argv)


if __name__ == "__main__":
    main()
