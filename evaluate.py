r"""Step 8 of 9: score predictions against the readers; write tables and figures.

Example:
    python evaluate.py --predictions work/predictions/smoke --scans work/scans \
        --out work/scores/smoke

Research code, not a medical device.
"""

import json
import logging
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

import config
import steps
from ct import files, provenance
from ct.files import refuse_other_folder, write_rows
from ct.nifti_io import check_same_grid, read_nifti
from ct.provenance import DISCLAIMER
from ct.scan import (
    Scan,
    ScanError,
    read_scan,
    reference_mask,
    scan_identity,
    scan_marks,
    scan_path,
)
from metrics import calibration, figures, froc, froc_points, nodule_scores, overlap
from metrics.figures import draw_froc
from metrics.surfaces import surface_distances
from metrics.tables import (
    Scored,
    calibration_lines,
    curve_of,
    froc_lines,
    latex,
    leak_text,
    markdown,
    number,
    summary,
)
from results import result_folder
from results.predictions import Predictions, read_predictions, settings_text
from results.rows import CANDIDATES_CSV, LUNGS_JSON, NODULES_CSV
from training import runs
from training.runs import POSTPROCESS_JSON

log = logging.getLogger(__name__)

FIGURES = ("dice.png", "overlays.png")

WHOLE_SCAN = ("hd95_mm", "surface_dice", "nodules", "nodules_hit", "false_positives")
"""Columns that stay undefined if only some slices of a scan count."""


@dataclass(frozen=True)
class Arguments:
    """Predictions to score, and the settings of the reference."""

    predictions: Path
    """Folder written by infer.py and postprocess.py, or by infer.py alone for lungs with
    nodules."""
    out: Path
    """Output folder for tables and figures."""
    scans: Path = Path("work/scans")
    """Folder of scan files with the readers' masks."""
    part: str = "test"
    """Part of the split to score; "all" scores every prediction."""
    consensus_level: float = 0.5
    """Share of a nodule's readers who must draw a voxel for it to be in the reference."""
    min_readers: int = 1
    """Nodules outlined by fewer readers are ignored, and so are components on them."""
    surface_tolerance_mm: float = 1.0
    """Largest distance at which surfaces agree."""
    lung_truth: Path | None = None
    """Folder of scan files with exact lung labels, e.g. PHANTOMS/truth, to score lung masks."""
    draws: int = 2000
    """Number of bootstrap draws."""
    workers: int = 1
    """Number of processes."""


@dataclass(frozen=True)
class Job:
    """One prediction to score."""

    scan_id: str
    patient_id: str
    part: str
    leak: bool
    slices: tuple[int, ...] | None
    """Slices (z) that count; None for all."""
    arguments: Arguments


def evaluate(arguments: Arguments) -> steps.Report:
    """Scores every prediction of a part and writes tables and figures.

    Raises:
        FileNotFoundError: If there are no predictions.
        ValueError: If the part has no prediction, or none could be scored.
    """
    predictions = read_predictions(arguments.predictions)
    refuse_other_folder(arguments.out, "scores.json")
    jobs = jobs_of(predictions, arguments)
    scored, failures = steps.map_scans(
        score, jobs, workers=arguments.workers, label="evaluate"
    )
    if not scored:
        raise ValueError(
            f"no prediction could be scored; first failure: {failures[0].reason}"
        )
    rows = [item.row for item in scored]
    nodules = [nodule for item in scored for nodule in item.nodules]
    lines = summary(rows, nodules, draws=arguments.draws)
    known = [item.reliability for item in scored if item.reliability is not None]
    temperature, fitted = (
        temperature_of(predictions, arguments) if known else (None, "")
    )
    lines += calibration_lines(scored, temperature, draws=arguments.draws)
    curve = curve_of(scored, draws=arguments.draws)
    lines += froc_lines(curve, scored)
    seen = leak_text(scored, draws=arguments.draws)
    facts = protocol(arguments, predictions, rows, seen, fitted)
    with files.write_atomically(arguments.out) as out:
        out.mkdir()
        write_rows(rows, list(rows[0]), out / "scores.csv")
        if nodules:
            columns = nodule_scores.columns_of(nodules)
            write_rows(nodules, columns, out / "nodules.csv")
        (out / "scores.md").write_text(markdown(lines, facts, head=seen))
        (out / "scores.tex").write_text(latex(lines, facts))
        record = {
            "setting": setting(arguments, predictions),
            "protocol": facts,
            "scores": [
                asdict(line) | {"interval": line.interval._asdict()} for line in lines
            ],
            "provenance": provenance.record(),
        }
        files.write_json(out / "scores.json", record)
        draw_figures(arguments, rows, nodules, out)
        if curve is not None:
            draw_froc(curve, out / "froc.png")
        if known:
            figures.write_reliability(np.sum(known, axis=0), out)
        steps.write_failures(failures, out / "skipped.csv")
    out = arguments.out
    sys.stdout.write(markdown(lines, facts, head=seen) + "\n")
    named = ", ".join(str(out / name) for name in FIGURES)
    scans = files.count_text(len(rows), "scan")
    scored = files.count_text(len(nodules), "nodule")
    return steps.Report(
        f"wrote {out}: {scans}, {scored}; figures {named}",
        failures,
    )


def setting(arguments: Arguments, predictions: Predictions) -> dict[str, Any]:
    """Returns the settings that two runs must share for their scores to be compared."""
    return {
        "part": arguments.part,
        "consensus_level": arguments.consensus_level,
        "min_readers": arguments.min_readers,
        "surface_tolerance_mm": arguments.surface_tolerance_mm,
        "by_slice": by_slice(predictions),
    }


def by_slice(predictions: Predictions) -> bool:
    """Returns True if the split is by slice, so that only some slices of a scan count."""
    return any("slices" in facts for facts in predictions.scans.values())


def jobs_of(predictions: Predictions, arguments: Arguments) -> list[Job]:
    """Returns a job per prediction of the part; logs the patients that were trained on.

    Raises:
        ValueError: If the part has no prediction, the masks were made from maps of other
            weights, the folder holds lungs without nodules, or the results are not NIfTI.
    """
    if read_nodule_record(arguments.predictions) == {}:
        raise ValueError(
            f"{arguments.predictions} holds lung masks without nodules; run infer.py with "
            "--nodules, or compare the lung masks with experiments.lung_comparison"
        )
    path = arguments.predictions / POSTPROCESS_JSON
    if path.exists():
        used = json.loads(path.read_text())["weights_sha256"]
        if used != predictions.weights_sha256:
            raise ValueError(
                f"{path}: the masks were made from maps of weights {used[:12]}, but the maps "
                f"are of weights {predictions.weights_sha256[:12]}; run postprocess.py again "
                "with --overwrite"
            )
    path = arguments.predictions / LUNGS_JSON
    save_as = json.loads(path.read_text())["save_as"] if path.exists() else "nifti"
    if save_as in result_folder.FILES:
        raise ValueError(
            f"{path}: results were saved as {save_as}; expected nifti or nifti-labels; run "
            "infer.py with one of them and another --result_dir"
        )
    jobs = [
        job_of(scan_id, slices, predictions, arguments)
        for scan_id, slices in predictions.of_part(arguments.part).items()
    ]
    if not jobs:
        parts = sorted({facts["part"] for facts in predictions.scans.values()})
        if parts == [""]:
            raise ValueError(
                f"{arguments.predictions}: the scans belong to no split; use --part all"
            )
        raise ValueError(
            f"{arguments.predictions} has no scan in part {arguments.part!r}, only in "
            f"{parts}; choose another --part"
        )
    if read_nodule_record(arguments.predictions):
        path = arguments.predictions / CANDIDATES_CSV
        froc_points.warn_of_unknown_cases(path, predictions.scans.keys())
    for job in jobs:
        if job.leak:
            log.warning(
                "patient %s was trained on; its row is marked as leak", job.patient_id
            )
    return jobs


def job_of(
    scan_id: str,
    slices: tuple[int, ...] | None,
    predictions: Predictions,
    arguments: Arguments,
) -> Job:
    """Returns the job of one prediction, with the patient id of the scan file.

    The job is a leak if the run was trained on this patient, by the id in the scan file or
    by the id in predictions.json, or on this scan, by its series UID or its voxels.
    """
    facts = predictions.scans[scan_id]
    patient_id, marks = facts["patient_id"], ("", "")
    with suppress(ScanError, OSError):  # `score` reports the error of this file
        path = scan_path(arguments.scans, scan_id)
        patient_id, _ = scan_identity(path)
        marks = scan_marks(path)
    names = runs.names_of(scan_id, patient_id, facts["patient_id"], *marks)
    leak = not names.isdisjoint(predictions.training_patients)
    return Job(scan_id, patient_id, facts["part"], leak, slices, arguments)


def score(job: Job) -> Scored:
    """Scores one scan.

    Raises:
        ScanError: If the mask or the scan file is missing, the scan has no readers, or the
            rows of nodules.csv or the probability map do not fit the scan.
    """
    arguments = job.arguments
    scan, labels = read_pair(job)
    reference = reference_mask(
        scan,
        consensus_level=arguments.consensus_level,
        min_readers=arguments.min_readers,
    )
    labels, reference = (
        overlap.only_slices(volume, job.slices) for volume in (labels, reference)
    )
    predicted = labels > 0
    counts = overlap.count_voxels(reference, predicted)
    with_nodule = reference.any(axis=(1, 2))
    row = {
        "scan_id": job.scan_id,
        "patient_id": job.patient_id,
        "part": job.part,
        "leak": int(job.leak),
        "whole": int(scan.whole),
        **counts._asdict(),
        "dice": counts.dice if with_nodule.any() else np.nan,
        "dice_nodule_slices": overlap.dice(
            reference[with_nodule], predicted[with_nodule]
        ),
        "iou": counts.iou if with_nodule.any() else np.nan,
        "sensitivity": counts.sensitivity,
        "precision": counts.precision,
        "reference_mm3": float(reference.sum() * scan.grid.voxel_mm3),
        "predicted_mm3": float(predicted.sum() * scan.grid.voxel_mm3),
        **lung_scores(scan, reference, arguments.lung_truth),
    }
    if job.slices is not None:  # single slices give neither surfaces nor whole nodules
        return Scored(row | dict.fromkeys(WHOLE_SCAN, np.nan), [])
    surfaces = surface_distances(reference, predicted, scan.spacing_mm)
    known = nodule_scores.nodules_that_count(scan, arguments.min_readers)
    labels_ref = nodule_scores.reference_labels(scan, reference, known)
    _, irrelevant = froc_points.spheres_of(scan, arguments.min_readers)
    marked = np.asarray(scan.reader_bits) > 0
    marked |= froc_points.within_spheres(scan, irrelevant)
    match = overlap.match_nodules(labels_ref, labels, marked)
    row |= {
        "hd95_mm": surfaces.hausdorff_mm(),
        "surface_dice": (
            surfaces.dice(arguments.surface_tolerance_mm)
            if with_nodule.any()
            else np.nan
        ),
        "nodules": len(known),
        "nodules_hit": int((match.hit_by > 0).sum()),
        "false_positives": int(match.false_positive.sum()),
    }
    owner = {
        "scan_id": job.scan_id,
        "patient_id": job.patient_id,
        "leak": int(job.leak),
    }
    nodules = nodule_scores.nodule_rows(
        scan,
        known,
        labels_ref,
        labels,
        match,
        tolerance_mm=arguments.surface_tolerance_mm,
    )
    return Scored(
        row,
        [owner | nodule for nodule in nodules],
        calibration_counts(job, scan),
        **points_of(job, scan),
    )


def read_pair(job: Job) -> tuple[Scan, np.ndarray]:
    """Reads the scan of a job and its predicted nodule labels.

    Raises:
        ScanError: If a file is missing or the grids differ.
    """
    folder = job.arguments.predictions
    name, maker = "mask.nii.gz", "postprocess.py"
    if read_nodule_record(folder):
        name, maker = "nodules.nii.gz", "infer.py"
    mask_path = folder / job.scan_id / name
    path = scan_path(job.arguments.scans, job.scan_id)
    for needed, step in ((mask_path, maker), (path, "preprocess.py")):
        if not needed.exists():
            raise ScanError(f"{needed} is missing; run {step} first")
    scan = read_scan(path)
    labels, grid = read_nifti(mask_path)
    check_same_grid(grid, scan.grid, mask_path)
    return scan, labels


def read_nodule_record(predictions: Path) -> dict[str, Any] | None:
    """Reads from lungs.json how nodules were found inside the lungs.

    Returns:
        None if the folder does not hold lungs; {} if nodules were skipped.
    """
    path = predictions / LUNGS_JSON
    if not path.exists():
        return None
    return json.loads(path.read_text()).get("nodules") or {}


def lung_scores(
    scan: Scan, reference: np.ndarray, truth_dir: Path | None
) -> dict[str, float]:
    """Computes the lung mask's Dice (NaN without truth) and its share of nodule voxels."""
    if scan.lung is None:
        return {"lung_dice": np.nan, "lung_inclusion": np.nan}
    inside = scan.lung > 0
    dice = np.nan
    if truth_dir is not None and scan_path(truth_dir, scan.scan_id).exists():
        truth = read_scan(scan_path(truth_dir, scan.scan_id)).lung
        if truth is not None:
            dice = overlap.dice(truth > 0, inside)
    inclusion = overlap.ratio((reference & inside).sum(), reference.sum())
    return {"lung_dice": dice, "lung_inclusion": inclusion}


def points_of(job: Job, scan: Scan) -> dict[str, np.ndarray]:
    """Returns candidates, counted nodules and irrelevant findings for `froc.mark`.

    The result is empty for patches, and for masks from elsewhere that have no nodules.csv.
    For nodules found inside lungs, candidates of any score count.

    Raises:
        ScanError: If a row of the table or a point is invalid.
    """
    folder = job.arguments.predictions
    path = folder / job.scan_id / NODULES_CSV
    shared = read_nodule_record(folder) is not None
    if shared:
        path = folder / CANDIDATES_CSV
    if not scan.whole or not path.exists():
        return {}
    targets, irrelevant = froc_points.spheres_of(scan, job.arguments.min_readers)
    points = {
        "candidates": froc_points.read_candidates(path, scan, shared=shared),
        "targets": targets,
        "irrelevant": irrelevant,
    }
    try:
        froc.mark([job.scan_id], *({job.scan_id: rows} for rows in points.values()))
    except ValueError as error:
        raise ScanError(f"scan {job.scan_id}: {error}") from error
    return points


def calibration_counts(job: Job, scan: Scan) -> np.ndarray | None:
    """Returns the calibration histogram of a scan; None without a map or counted voxels.

    Raises:
        ScanError: If the map is on another grid or its values are not probabilities.
    """
    path = job.arguments.predictions / job.scan_id / "prob.nii.gz"
    if not path.exists():
        return None
    counts = calibration.histogram(path, scan)
    return counts if counts.any() else None


def temperature_of(
    predictions: Predictions, arguments: Arguments
) -> tuple[float | None, str]:
    """Fits the temperature on the validation scans; also returns a sentence about it.

    The temperature is None without validation scans, for a split by slice, and if the
    validation scans themselves are scored.
    """
    if arguments.part in ("validation", "all") or by_slice(predictions):
        return None, ""
    jobs = [
        job_of(scan_id, None, predictions, arguments)
        for scan_id in predictions.of_part("validation")
    ]
    found, _ = steps.map_scans(
        votes_of, jobs, workers=arguments.workers, label="temperature"
    )
    counts = [some for some in found if some is not None]
    value = calibration.fit_temperature(np.sum(counts, axis=0)) if counts else None
    if value is None:
        return None, ""
    scans = f"{len(counts)} of {files.count_text(len(jobs), 'validation scan')}"
    return value, f" Temperature {value:.3f}, fitted on {scans}."


def votes_of(job: Job) -> np.ndarray | None:
    """Returns `calibration_counts` of a job's scan; None without readers' marks."""
    path = job.arguments.predictions / job.scan_id / "prob.nii.gz"
    if not path.exists():
        return None
    scan_file = scan_path(job.arguments.scans, job.scan_id)
    if not scan_file.exists():
        raise ScanError(f"{scan_file} is missing; run preprocess.py first")
    scan = read_scan(scan_file)
    return None if scan.reader_bits is None else calibration_counts(job, scan)


def protocol(
    arguments: Arguments,
    predictions: Predictions,
    rows: Sequence[dict[str, Any]],
    seen: str,
    fitted: str,
) -> list[str]:
    """Returns sentences that explain the scores; every output contains them."""
    patients = {row["patient_id"] for row in rows}
    what = files.count_text(len(rows), "whole scan")
    if not any(row["whole"] for row in rows):
        what = files.count_text(len(rows), "nodule")
        what += ", each a stack of patches whose pixels count as 1 mm,"
    if by_slice(predictions):
        what = f"{files.count_text(len(rows), 'scan')} (only their slices in the part)"
    candidates = "the components that postprocessing kept"
    if read_nodule_record(arguments.predictions):
        candidates = "every candidate"
    return [
        f"Run {predictions.run}, weights {predictions.weights_sha256[:12]}; "
        f"{what} of {files.count_text(len(patients), 'patient')}, part {arguments.part}.",
        f"Reference: consensus of at least {arguments.consensus_level:.0%} of the readers "
        f"who outlined a nodule, nodules of at least {arguments.min_readers} reader(s).",
        f"Brackets: 95 % bootstrap interval by patient ({arguments.draws} draws). "
        "n: scans where the value is defined, which are those with a nodule, and for HD95 and "
        "precision also with a prediction. Predictions in scans without a nodule count in the "
        "pooled scores and as false positives.",
        masks_made_by(arguments.predictions),
        f"Dice of readers: over all slices of a nodule; the majority of n others is at least "
        "n/2 of them. ECE: over voxels that a reader drew or whose probability is above "
        f"{calibration.LEAST_PROBABILITY:g}, in bins of 0.05." + fitted,
        f"A component hits a nodule if their IoU is >= {overlap.MIN_IOU:g}; surfaces agree "
        f"within {arguments.surface_tolerance_mm:g} mm. A nodule without consensus voxels "
        "consists of every voxel that any reader drew.",
        "Strata: diameter is the readers' mean, texture and subtlety their median rating "
        "(texture 1 ground glass, 2 and 3 part-solid, 4 and 5 solid; 3.5 counts as 3); the "
        "distance to the pleura is the distance to the nearest voxel outside the scan file's "
        "lung mask and nodules.",
        seen,
        "Sensitivities at rates of false positives (FROC) follow the rules of LUNA16, with its "
        "own lists or else with this cohort's nodules (radius from the readers' mean "
        f"diameter), and count {candidates}. Nodules of too few readers are neither hits nor "
        "false positives, nor are nodules below 3 mm and non-nodules, which LIDC's XML marks "
        f"by a point and which get a diameter of {froc_points.UNKNOWN_MM:g} mm.",
        DISCLAIMER,
    ]


def masks_made_by(predictions: Path) -> str:
    """Returns a sentence on the settings that made the masks."""
    found = read_nodule_record(predictions)
    if found:
        used = config.from_json(config.Postprocess, found["settings"])
        how = settings_text(used)
        if "reduction" in found:
            kept = config.from_json(config.Postprocess, found["reduction"])
            how = (
                f"candidates from volumes, threshold {kept.threshold:g}, at least "
                f"{kept.min_volume_mm3:g} mm3"
            )
            if "slices" in found:
                used = config.from_json(config.Postprocess, found["slices"])
                how += f", from slices, {settings_text(used)}"
            how += (
                f"; reported with a score of at least {kept.min_score:g}; the score is the "
                "probability of the network that found it times that of the classifier"
            )
        weights = ", ".join(sha256[:12] for sha256 in found["weights_sha256"])
        return (
            f"Nodules: found in the run's lung masks and outlined by weights {weights}, "
            f"{found['passes']} pass(es); {how}."
        )
    path = predictions / POSTPROCESS_JSON
    if not path.exists():
        return "Masks: made with unknown settings."
    record = json.loads(path.read_text())
    used = config.from_json(config.Postprocess, record["settings"])
    return f"Masks: {settings_text(used)}; {record['origin']}."


def draw_figures(
    arguments: Arguments,
    rows: Sequence[dict[str, Any]],
    nodules: Sequence[dict[str, Any]],
    out: Path,
) -> None:
    """Draws Dice per scan, Dice by nodule size, and overlays of three scans."""
    figures.draw_dice(rows, nodules, out / FIGURES[0])
    overlays = [read_overlay(arguments, row) for row in three_scans(rows)]
    figures.draw_overlays(overlays, out / FIGURES[1])


def three_scans(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns the rows of the best, the median and the worst scan by Dice.

    Scans without a reference nodule are chosen only if no scan has one.
    """
    defined = [row for row in rows if np.isfinite(row["dice"])]
    order = sorted(defined, key=lambda row: -row["dice"]) or list(rows)
    places = dict.fromkeys((0, len(order) // 2, len(order) - 1))
    return [order[place] for place in places]


def read_overlay(arguments: Arguments, row: dict[str, Any]) -> figures.Overlay:
    """Reads the slice of a scan with most reference voxels, or most predicted ones."""
    job = Job(row["scan_id"], row["patient_id"], "", False, None, arguments)
    scan, labels = read_pair(job)
    reference = reference_mask(
        scan,
        consensus_level=arguments.consensus_level,
        min_readers=arguments.min_readers,
    )
    counted = reference if reference.any() else labels > 0
    z = int(counted.sum(axis=(1, 2)).argmax())
    return figures.Overlay(
        f"{row['patient_id']}, slice {z}: Dice {number(row['dice'])}",
        scan.hu[z],
        reference[z],
        labels[z] > 0,
        in_hu=scan.whole,
    )


def main(argv: Sequence[str] | None = None) -> None:
    steps.run(evaluate, Arguments, argv=argv)


if __name__ == "__main__":
    main()
