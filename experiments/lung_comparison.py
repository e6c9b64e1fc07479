r"""Comparison of lung masks: overlap, surface distances and nodules kept by each method.

A method is a folder of predictions (SCAN_ID/mask.nii.gz of infer.py), or a folder of scan files
with lung masks (preprocess.py). The first method is the baseline; the others are compared with
it by paired bootstrap over patients.

    python -m experiments.lung_comparison --scans work/scans --truth work/phantoms/truth \
        --methods classical=work/scans masked=work/predictions/lung3d --out work/scores/lungs

Writes lungs.csv (one row per scan and method), nodules.csv (one per nodule and method),
comparison.csv, .md and .tex, and for methods with probabilities calibration.csv and .png.
Research code, not a medical device.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import steps
from ct import boxes, files
from ct.files import refuse_other_folder, write_rows
from ct.nifti_io import check_same_grid, read_nifti
from ct.provenance import DISCLAIMER
from ct.scan import (
    Scan,
    ScanError,
    read_scan,
    reference_mask,
    scan_files,
    scan_identity,
    scan_path,
)
from dataset.split import patients_of_part, read_split
from experiments import paired
from metrics import calibration, overlap
from metrics.surfaces import surface_distances

AT_PLEURA_MM = 3.0
"""Largest distance of a juxtapleural nodule from the lungs' surface."""

LARGE_MM = 30.0
"""A nodule of at least this diameter is a mass (Fleischner Society, Bankier et al. 2017)."""

SIZES_MM = {
    "below_10": (0.0, 10.0),
    "10_to_20": (10.0, 20.0),
    "20_to_30": (20.0, LARGE_MM),
    "large": (LARGE_MM, float("inf")),
}
"""Diameters of the classes of nodules by size, the upper end excluded."""

MEASURES = (
    paired.mean_of("dice", "Dice per scan"),
    paired.mean_of("hd95_mm", "HD95 (mm)"),
    paired.mean_of("surface_dice", "Surface Dice"),
    paired.ratio_of("kept_all", "voxels_all", "Inclusion, all nodules"),
    paired.ratio_of("kept_pleura", "voxels_pleura", "Inclusion, at the pleura"),
    paired.ratio_of("kept_free", "voxels_free", "Inclusion, free"),
    paired.ratio_of("kept_below_10", "voxels_below_10", "Inclusion, below 10 mm"),
    paired.ratio_of("kept_10_to_20", "voxels_10_to_20", "Inclusion, 10 to 20 mm"),
    paired.ratio_of("kept_20_to_30", "voxels_20_to_30", "Inclusion, 20 to 30 mm"),
    paired.ratio_of("kept_large", "voxels_large", "Inclusion, large"),
    paired.ratio_of("whole_all", "nodules_all", "Kept whole, all nodules"),
    paired.ratio_of("whole_pleura", "nodules_pleura", "Kept whole, at the pleura"),
    paired.ratio_of("whole_large", "nodules_large", "Kept whole, large"),
)

KEPT_WHOLE = 0.95
"""A nodule is kept whole if at least this share of it lies in the mask."""

BINS = 20
"""Number of bins of the reliability curve."""


@dataclass(frozen=True)
class Arguments:
    """Masks to compare, and the scans to compare them on."""

    methods: tuple[str, ...]
    """NAME=FOLDER for each method; the first one is the baseline."""
    out: Path
    """Output folder for tables and figures."""
    scans: Path = Path("work/scans")
    """Folder of scan files with HU and the readers' nodules."""
    truth: Path | None = None
    """Folder of scan files with reference lung labels, by the same ids; scans without a
    reference are scored by their nodules alone."""
    split: Path | None = None
    """Score only the patients in `part` of this split; the default scores every scan."""
    part: str = "test"
    """Part of the split: train, validation or test."""
    tolerance_mm: float = 2.0
    """Largest distance at which surfaces agree."""
    draws: int = 2000
    """Number of bootstrap draws."""
    workers: int = 1
    """Number of processes."""


@dataclass(frozen=True)
class Job:
    """One scan to score with every method."""

    scan_id: str
    path: Path
    arguments: Arguments


@dataclass(frozen=True)
class Scored:
    """Rows of one scan, and the reliability counts of each method with probabilities."""

    rows: list[dict[str, Any]]
    nodules: list[dict[str, Any]]
    reliability: dict[str, np.ndarray]


def compare_lungs(arguments: Arguments) -> steps.Report:
    """Scores every scan with every method and writes the tables.

    Raises:
        ValueError: If a method is not NAME=FOLDER, or no scan could be scored.
    """
    folders = method_folders(arguments.methods)
    refuse_other_folder(arguments.out, "lungs.csv")
    jobs, unreadable = jobs_of(arguments)
    scored, failures = steps.map_scans(
        score, jobs, workers=arguments.workers, label="compare"
    )
    failures = [*unreadable, *failures]
    if not scored:
        reason = failures[0].reason if failures else f"{arguments.scans} holds no scans"
        raise ValueError(f"no scan could be scored: {reason}")
    rows = [row for item in scored for row in item.rows]
    nodules = [nodule for item in scored for nodule in item.nodules]
    by_method = {
        name: [row for row in rows if row["method"] == name] for name in folders
    }
    first, *others = by_method.items()
    cells = paired.compare(*first, None, MEASURES, draws=arguments.draws)
    for name, scans in others:
        cells += paired.compare(name, scans, first[1], MEASURES, draws=arguments.draws)
    patients = len({row["patient_id"] for row in rows})
    facts = protocol(arguments, first[1], nodules, patients, first[0])
    marked = patients >= paired.FEW_PATIENTS
    with files.write_atomically(arguments.out) as out:
        out.mkdir()
        write_rows(rows, list(rows[0]), out / "lungs.csv")
        if nodules:
            write_rows(nodules, list(nodules[0]), out / "nodules.csv")
        write_rows(
            [paired.csv_row(cell) for cell in cells],
            paired.COLUMNS,
            out / "comparison.csv",
        )
        text = paired.markdown(cells, facts, marked=marked)
        (out / "comparison.md").write_text(text)
        (out / "comparison.tex").write_text(paired.latex(cells, facts, marked=marked))
        write_calibration([item.reliability for item in scored], out)
        steps.write_failures(failures, out / "skipped.csv")
    sys.stdout.write(text + "\n")
    line = f"wrote {arguments.out}: {len(folders)} methods, {len(scored)} scans"
    return steps.Report(line, failures)


def jobs_of(arguments: Arguments) -> tuple[list[Job], list[steps.Failure]]:
    """Returns the scan files to score, and failures for those that cannot be read.

    Raises:
        ValueError: If no scan belongs to the part.
    """
    wanted = None
    if arguments.split is not None:
        split = read_split(arguments.split)
        wanted = set(patients_of_part(split, arguments.part))
    jobs, unreadable = [], []
    for path in scan_files(arguments.scans):
        try:
            patient_id, scan_id = scan_identity(path)
        except ScanError as error:
            unreadable.append(steps.Failure(path.stem, str(error)))
            continue
        if wanted is None or patient_id in wanted:
            jobs.append(Job(scan_id, path, arguments))
    if not jobs and not unreadable:
        raise ValueError(
            f"{arguments.scans} holds no scan of the {arguments.part} patients of "
            f"{arguments.split}; choose another --part or --scans"
        )
    return jobs, unreadable


def method_folders(methods: Sequence[str]) -> dict[str, Path]:
    """Parses the options NAME=FOLDER into a mapping from name to folder.

    Raises:
        ValueError: If an option is not NAME=FOLDER, or two share a name.
    """
    folders = {}
    for method in methods:
        name, found, folder = method.partition("=")
        if not (found and name and folder) or name in folders:
            raise ValueError(
                f"--methods {method}: expected NAME=FOLDER, each name once"
            )
        folders[name] = Path(folder)
    return folders


def score(job: Job) -> Scored:
    """Scores one scan with every method.

    Raises:
        ScanError: If a method has no mask of the scan.
    """
    arguments = job.arguments
    scan = read_scan(job.path)
    reference = reference_lung(scan, arguments.truth)
    marks = nodule_marks(scan, reference)
    rows, nodules, reliability = [], [], {}
    for name, folder in method_folders(arguments.methods).items():
        mask = method_mask(folder, scan)
        own = [{"method": name, **facts} for facts in nodule_rows(scan, marks, mask)]
        nodules += own
        rows.append(
            {"method": name, "scan_id": scan.scan_id, "patient_id": scan.patient_id}
            | overlap_scores(reference, mask, scan, arguments.tolerance_mm)
            | inclusion_counts(own)
        )
        prob_path = folder / scan.scan_id / "mean.nii.gz"
        if reference is not None and prob_path.exists():
            prob, grid = read_nifti(prob_path)
            check_same_grid(grid, scan.grid, prob_path)
            if prob.dtype.kind != "f":  # --mean_is_mask wrote a mask
                continue
            reliability[name] = calibration.reliability_counts(
                prob, reference, bins=BINS
            )
    return Scored(rows, nodules, reliability)


def method_mask(folder: Path, scan: Scan) -> np.ndarray:
    """Reads the (z, y, x) bool lung mask of a method.

    Raises:
        ScanError: If the method has no mask of the scan.
    """
    predicted = folder / scan.scan_id / "mask.nii.gz"
    if predicted.exists():
        mask, grid = read_nifti(predicted)
        check_same_grid(grid, scan.grid, predicted)
        return mask > 0
    path = scan_path(folder, scan.scan_id)
    if not path.exists():
        raise ScanError(
            f"{folder} has neither {predicted.relative_to(folder)} nor {path.name}; run "
            "infer.py or preprocess.py for it, or leave the method out"
        )
    lung = read_scan(path).lung
    if lung is None:
        raise ScanError(f"{path} has no lung mask; run preprocess.py with --overwrite")
    return lung > 0


def reference_lung(scan: Scan, truth_dir: Path | None) -> np.ndarray | None:
    """Reads the (z, y, x) bool reference lungs; None if the scan has none."""
    if truth_dir is None or not scan_path(truth_dir, scan.scan_id).exists():
        return None
    truth = read_scan(scan_path(truth_dir, scan.scan_id))
    check_same_grid(truth.grid, scan.grid, scan_path(truth_dir, scan.scan_id))
    return None if truth.lung is None else truth.lung > 0


@dataclass(frozen=True)
class Mark:
    """Nodule with its voxels, its diameter and its distance from the lungs' surface."""

    label: int
    voxels: tuple[np.ndarray, ...]
    diameter_mm: float
    pleura_mm: float


def nodule_marks(scan: Scan, reference: np.ndarray | None) -> list[Mark]:
    """Returns the readers' consensus nodules of a scan; none if it has no readers.

    Distances are measured from the surface of the reference lungs, or else of the scan
    file's lungs, after adding all nodules to them, so that a nodule that the lungs cut off
    counts as at the pleura.
    """
    from scipy.ndimage import distance_transform_edt

    if scan.nodule_labels is None or scan.reader_bits is None:
        return []
    consensus = reference_mask(scan, consensus_level=0.5, min_readers=1)
    labels = np.asarray(scan.nodule_labels) * consensus
    lungs = reference if reference is not None else scan.lung
    if lungs is None or not labels.any():
        return []
    inside = (lungs > 0) | consensus
    box = boxes.bounding_box(inside)
    depth_mm = np.zeros(inside.shape, np.float32)
    padded = np.pad(inside[box], 1)
    depth_mm[box] = distance_transform_edt(padded, sampling=scan.spacing_mm)[
        1:-1, 1:-1, 1:-1
    ]
    known = {nodule.label: nodule.diameter_mm for nodule in scan.nodules}
    marks = []
    for label in np.unique(labels[labels > 0]):
        voxels = np.nonzero(labels == label)
        nearest_mm = float(depth_mm[voxels].min())
        marks.append(Mark(int(label), voxels, known[label], nearest_mm))
    return marks


def nodule_rows(
    scan: Scan, marks: Sequence[Mark], mask: np.ndarray
) -> list[dict[str, Any]]:
    """Returns one row per nodule with the number of its voxels in a mask."""
    return [
        {
            "scan_id": scan.scan_id,
            "patient_id": scan.patient_id,
            "label": mark.label,
            "diameter_mm": mark.diameter_mm,
            "pleura_mm": mark.pleura_mm,
            "voxels": len(mark.voxels[0]),
            "kept": int(mask[mark.voxels].sum()),
        }
        for mark in marks
    ]


def overlap_scores(
    reference: np.ndarray | None, mask: np.ndarray, scan: Scan, tolerance_mm: float
) -> dict[str, float]:
    """Computes Dice and surface scores; NaN without a reference.

    An empty mask gets the diagonal of the volume as its HD95, because leaving it out would
    favour its method.
    """
    if reference is None:
        return dict.fromkeys(("dice", "hd95_mm", "surface_dice"), np.nan)
    surfaces = surface_distances(reference, mask, scan.spacing_mm)
    diagonal_mm = np.linalg.norm(np.array(mask.shape) * scan.spacing_mm)
    return {
        "dice": overlap.dice(reference, mask),
        "hd95_mm": surfaces.hausdorff_mm() if mask.any() else float(diagonal_mm),
        "surface_dice": surfaces.dice(tolerance_mm),
    }


def inclusion_counts(nodules: Sequence[dict[str, Any]]) -> dict[str, int]:
    """Counts a scan's nodules and their voxels, and those that a mask keeps, by kind."""
    kinds = {
        "all": list(nodules),
        "pleura": [n for n in nodules if n["pleura_mm"] <= AT_PLEURA_MM],
        "free": [n for n in nodules if n["pleura_mm"] > AT_PLEURA_MM],
    }
    for kind, (low_mm, high_mm) in SIZES_MM.items():
        kinds[kind] = [n for n in nodules if low_mm <= n["diameter_mm"] < high_mm]
    counts = {}
    for kind, some in kinds.items():
        counts[f"nodules_{kind}"] = len(some)
        counts[f"whole_{kind}"] = sum(
            n["kept"] >= KEPT_WHOLE * n["voxels"] for n in some
        )
        counts[f"voxels_{kind}"] = sum(n["voxels"] for n in some)
        counts[f"kept_{kind}"] = sum(n["kept"] for n in some)
    return counts


def protocol(
    arguments: Arguments,
    rows: Sequence[dict[str, Any]],
    nodules: Sequence[dict[str, Any]],
    patients: int,
    first: str,
) -> list[str]:
    """Returns sentences that explain the scores; every output contains them."""
    with_truth = sum(np.isfinite(row["dice"]) for row in rows)
    own = [nodule for nodule in nodules if nodule["method"] == first]
    kinds = inclusion_counts(own)
    return [
        f"{len(rows)} whole scans of {patients} patients; {with_truth} with reference "
        f"lungs; {kinds['nodules_all']} nodules (consensus of at least 50 % of the readers), "
        f"{kinds['nodules_pleura']} of them within {AT_PLEURA_MM:g} mm of the lungs' surface; "
        f"{kinds['nodules_below_10']} below 10 mm, {kinds['nodules_10_to_20']} of 10 to 20 "
        f"mm, {kinds['nodules_20_to_30']} of 20 to 30 mm, {kinds['nodules_large']} of at "
        f"least {LARGE_MM:g} mm (large).",
        "Inclusion: share of nodule voxels in the mask, summed over scans; kept whole: at "
        f"least {KEPT_WHOLE:.0%} of the nodule. Surfaces agree within "
        f"{arguments.tolerance_mm:g} mm.",
        f"Brackets: 95 % bootstrap interval by patient ({arguments.draws} draws); the line "
        f"below is the paired difference from {first}.",
        paired.caution(patients),
        DISCLAIMER,
    ]


def write_calibration(found: Sequence[dict[str, np.ndarray]], out: Path) -> None:
    """Writes the reliability curve of each method with probabilities, over all scans."""
    names = sorted({name for counts in found for name in counts})
    if not names:
        return
    rows, curves = [], {}
    for name in names:
        counts = sum(counts[name] for counts in found if name in counts)
        curve = calibration.reliability(np.asarray(counts))
        curves[name] = curve
        rows += [
            {
                "method": name,
                "ece": curve.ece,
                "probability": p,
                "observed": o,
                "voxels": n,
            }
            for p, o, n in zip(
                curve.probability, curve.observed, curve.voxels, strict=True
            )
        ]
    write_rows(rows, list(rows[0]), out / "calibration.csv")
    draw_calibration(curves, out / "calibration.png")


def draw_calibration(curves: dict[str, calibration.Reliability], path: Path) -> None:
    """Draws the observed share of lung against predicted probability."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5, 5), layout="constrained")
    axes = figure.subplots()
    axes.plot([0, 1], [0, 1], color="0.7", linewidth=1)
    for name, curve in curves.items():
        axes.plot(
            curve.probability,
            curve.observed,
            marker="o",
            markersize=3,
            label=f"{name} (ECE {curve.ece:.3f})",
        )
    axes.set(xlabel="predicted probability of lung", ylabel="share that is lung")
    axes.set_aspect("equal")
    axes.legend(frameon=False, loc="upper left")
    axes.set_title(DISCLAIMER, fontsize=8)
    figure.savefig(path, dpi=150)


def main(argv: Sequence[str] | None = None) -> None:
    steps.run(compare_lungs, Arguments, argv=argv)


if __name__ == "__main__":
    main()
