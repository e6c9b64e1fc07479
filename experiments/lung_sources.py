r"""Lung masks of scans from many sources, the worst scan first.

Compares results of infer.py with the lung labels of scan files, scan by scan: a mean over many
easy scans hides the one whose bowel is called lung.

    python infer.py --input SCANS --result_dir OUT --nodules None --n 1
    python -m experiments.lung_sources --references work/labelled --masks OUT --out SCORES

Writes lung_sources.csv, lung_sources.md, and lung_sources.jpg with the masks of the
worst scans. Research code, not a medical device.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np

import steps
from ct import files
from ct.nifti_io import check_same_grid, read_nifti
from ct.provenance import DISCLAIMER
from ct.scan import Scan, ScanError, read_scan, scan_files
from experiments.lung_sheet import scan_row
from metrics import overlap
from metrics.surfaces import surface_distances
from results.rows import LUNGS_CSV, LungRow, read_lung_rows

GAS_HU = -850
"""Voxels below it that are wrongly called lung are gas: bowel, airways or air outside."""

MOST_PICTURES = 100
"""Largest number of scans on the sheet, the worst ones; JPEG ends at 65,535 rows."""

COLUMNS = (
    *("scan_id", "patient_id", "dice", "hd95_mm", "reference_ml", "missed_ml"),
    *("extra_ml", "extra_gas_ml", "nodule_share", "score", "flag", "reason"),
)


@dataclass(frozen=True)
class Arguments:
    """Masks to compare with references."""

    masks: Path
    """Result folder of infer.py."""
    references: Path
    """Folder of scan files whose lung labels are the reference."""
    out: Path
    """Folder for the tables."""


@dataclass(frozen=True)
class Task:
    """One scan file with reference lungs, the mask to compare, and its row of lungs.csv."""

    scan_id: str
    path: Path
    mask_path: Path
    verdict: LungRow | None


def compare(scan: Scan, mask: np.ndarray) -> dict[str, Any]:
    """Returns overlap and volumes of a lung mask and the labels of a scan.

    `nodule_share` is the share of the outlined nodules' voxels that lie in the mask.

    Args:
        scan: Scan with lung labels.
        mask: (z, y, x) bool.
    """
    if scan.lung is None:
        raise ScanError(f"scan {scan.scan_id} has no lung labels to compare with")
    reference = np.asarray(scan.lung) > 0
    extra, missed = mask & ~reference, reference & ~mask
    ml = scan.grid.voxel_mm3 / 1000
    hd95 = float("nan")
    nodule_share = float("nan")
    if scan.nodule_labels is not None and np.any(scan.nodule_labels):
        nodule_share = float(mask[np.asarray(scan.nodule_labels) > 0].mean())
    if mask.any() and reference.any():
        hd95 = surface_distances(reference, mask, scan.spacing_mm).hausdorff_mm()
    return {
        "scan_id": scan.scan_id,
        "patient_id": scan.patient_id,
        "dice": overlap.dice(reference, mask),
        "hd95_mm": hd95,
        "reference_ml": reference.sum() * ml,
        "missed_ml": missed.sum() * ml,
        "extra_ml": extra.sum() * ml,
        "extra_gas_ml": (extra & (np.asarray(scan.hu) < GAS_HU)).sum() * ml,
        "nodule_share": nodule_share,
    }


def compare_files(task: Task) -> tuple[dict[str, Any], np.ndarray]:
    """Returns a row of the table, with the verdict of infer.py, and a picture of the mask.

    Raises:
        ScanError: If the mask is missing or on another grid, or the scan has no lung labels.
    """
    if not task.mask_path.exists():
        raise ScanError(f"no {task.mask_path}")
    scan = read_scan(task.path)
    mask, grid = read_nifti(task.mask_path)
    check_same_grid(grid, scan.grid, task.mask_path)
    row = compare(scan, mask > 0)
    if task.verdict:
        row |= {
            name: getattr(task.verdict, name) for name in ("score", "flag", "reason")
        }
    row = {name: row.get(name, "") for name in COLUMNS}
    text = f"{scan.scan_id}: Dice {row['dice']:.3f} {row['reason']}"
    return row, scan_row(scan, mask, text)


def by_dice(compared: tuple[dict[str, Any], np.ndarray]) -> tuple[bool, float]:
    """Returns the key for the order by Dice; rows without a Dice come first."""
    dice = compared[0]["dice"]
    return bool(np.isfinite(dice)), dice


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    """Returns the rows as a Markdown table."""
    lines = [f"| {' | '.join(COLUMNS)} |", "|" + "---|" * len(COLUMNS)]
    for row in rows:
        shown = [
            f"{value:.4g}" if isinstance(value, float) else str(value)
            for value in (row[name] for name in COLUMNS)
        ]
        lines.append(f"| {' | '.join(shown)} |")
    return "\n".join([*lines, "", DISCLAIMER, ""])


def compare_all(arguments: Arguments) -> steps.Report:
    """Compares every reference that has a mask; lists the others.

    Raises:
        ValueError: If no reference has a mask.
    """
    verdicts = {row.pid: row for row in read_lung_rows(arguments.masks / LUNGS_CSV)}
    tasks = [
        Task(
            path.stem,
            path,
            arguments.masks / path.stem / "mask.nii.gz",
            verdicts.get(path.stem),
        )
        for path in scan_files(arguments.references)
    ]
    compared, failures = steps.map_scans(
        compare_files, tasks, workers=1, label="compare"
    )
    if not compared:
        raise ValueError(
            f"{arguments.masks} has no mask of a scan in {arguments.references}; run infer.py "
            "on the same scans"
        )
    compared.sort(key=by_dice)
    rows = [row for row, _ in compared]
    arguments.out.mkdir(parents=True, exist_ok=True)
    files.write_rows(rows, COLUMNS, arguments.out / "lung_sources.csv")
    table = markdown(rows)
    (arguments.out / "lung_sources.md").write_text(table)
    pictures = [picture for _, picture in compared[:MOST_PICTURES]]
    cv2.imwrite(str(arguments.out / "lung_sources.jpg"), np.vstack(pictures))
    sys.stdout.write(table)
    scans = files.count_text(len(rows), "scan")
    return steps.Report(f"wrote {arguments.out}: {scans}, worst first", failures)


def main(argv: Sequence[str] | None = None) -> None:
    steps.run(compare_all, Arguments, argv=argv)


if __name__ == "__main__":
    main()
