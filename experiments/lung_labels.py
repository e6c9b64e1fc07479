r"""Lung labels for training: cleaned classical masks, corrected where a person saw a mistake.

Removes and adds the ellipses of a CSV file, which a person drew where the mask includes bowel
or the oesophagus, or leaves out disease; then adds every nodule that a reader outlined.
Columns: scan_id, is_lung (yes or no), z_first, z_last (slices of the scan file), y_px, x_px,
radius_y_px, radius_x_px, below_hu (only voxels below it are added; empty for 250, which leaves
out bone) and why. Added voxels take the side of the nearest lung.

    python -m experiments.lung_labels --scans work/scans --out work/labelled \
        --corrections weights/lung3d/corrections.csv
"""

import csv
import json
from collections.abc import Sequence
from dataclasses import astuple, dataclass, replace
from pathlib import Path

import numpy as np

import steps
from ct import files, provenance
from ct.scan import (
    Scan,
    ScanError,
    read_provenance,
    read_scan,
    scan_files,
    scan_path,
    write_scan,
)

COLUMNS = (
    "scan_id",
    "is_lung",
    "z_first",
    "z_last",
    "y_px",
    "x_px",
    "radius_y_px",
    "radius_x_px",
    "below_hu",
    "why",
)

BONE_HU = 250.0
"""Voxels with at least this HU are bone of the chest wall and are not added to the lung."""

YES_NO = {"yes": True, "no": False}


@dataclass(frozen=True)
class Arguments:
    """Masks to correct, and the output folder."""

    out: Path
    """Output folder for scan files with corrected lung labels."""
    scans: Path = Path("work/scans")
    """Folder written by preprocess.py."""
    corrections: Path | None = None
    """CSV file of ellipses to add and to remove."""


@dataclass(frozen=True)
class Ellipse:
    """Ellipse on a range of slices that is added to the lung, or removed from it."""

    z_first: int
    z_last: int
    centre_yx: tuple[float, float]
    radius_yx: tuple[float, float]
    is_lung: bool = True
    below_hu: float = BONE_HU


@dataclass(frozen=True)
class Task:
    """One scan file to correct."""

    scan_id: str
    path: Path
    ellipses: tuple[Ellipse, ...]
    out: Path


def read_corrections(path: Path) -> dict[str, tuple[Ellipse, ...]]:
    """Reads the ellipses of each scan, by scan id.

    Raises:
        ValueError: If a column is missing or has a value of another kind.
    """
    found: dict[str, tuple[Ellipse, ...]] = {}
    with path.open(newline="") as file:
        rows = csv.DictReader(file)
        missing = set(COLUMNS) - set(rows.fieldnames or ())
        if missing:
            raise ValueError(
                f"{path}: columns {', '.join(sorted(missing))} are missing; expected "
                f"{', '.join(COLUMNS)}"
            )
        for line, row in enumerate(rows, start=2):
            try:
                ellipse = Ellipse(
                    int(row["z_first"]),
                    int(row["z_last"]),
                    (float(row["y_px"]), float(row["x_px"])),
                    (float(row["radius_y_px"]), float(row["radius_x_px"])),
                    YES_NO[row["is_lung"]],
                    float(row["below_hu"] or BONE_HU),
                )
            except ValueError as error:
                raise ValueError(f"{path}, line {line}: {error}") from error
            except KeyError as error:
                raise ValueError(
                    f"{path}, line {line}: is_lung is {error}; expected yes or no"
                ) from error
            found[row["scan_id"]] = (*found.get(row["scan_id"], ()), ellipse)
    return found


def correct(task: Task) -> Task:
    """Writes the scan file with corrected lung labels; keeps an existing file.

    Raises:
        ScanError: If the existing file was made from another mask or other ellipses.
    """
    target = scan_path(task.out, task.scan_id)
    made_of = {
        "source_sha256": files.sha256(task.path),
        "ellipses": [list(astuple(ellipse)) for ellipse in task.ellipses],
    }
    made_of = json.loads(json.dumps(made_of))
    if not target.exists():
        scan = read_scan(task.path)
        corrected = replace(scan, lung=corrected_lung(scan, task.ellipses))
        write_scan(corrected, target, provenance.record() | made_of)
    elif not made_of.items() <= read_provenance(target).items():
        raise ScanError(
            f"{target} was made from another mask or other corrections; remove it"
        )
    return task


def corrected_lung(scan: Scan, ellipses: Sequence[Ellipse]) -> np.ndarray:
    """Returns (z, y, x) uint8 lung labels corrected by ellipses and the readers' nodules.

    Raises:
        ScanError: If the scan has no lung mask, or lacks the slices of an ellipse.
    """
    from scipy.ndimage import distance_transform_edt

    if scan.lung is None:
        raise ScanError(f"scan {scan.scan_id} has no lung mask; run preprocess.py")
    lung = np.array(scan.lung)
    added = np.zeros(lung.shape, bool)
    y, x = np.ogrid[: lung.shape[1], : lung.shape[2]]
    for ellipse in ellipses:
        if not 0 <= ellipse.z_first <= ellipse.z_last < len(lung):
            raise ScanError(
                f"scan {scan.scan_id}: a correction is for slices {ellipse.z_first} to "
                f"{ellipse.z_last}; the scan has 0 to {len(lung) - 1}"
            )
        inside = ((y - ellipse.centre_yx[0]) / ellipse.radius_yx[0]) ** 2
        inside = inside + ((x - ellipse.centre_yx[1]) / ellipse.radius_yx[1]) ** 2 <= 1
        part = slice(ellipse.z_first, ellipse.z_last + 1)
        if ellipse.is_lung:
            added[part] |= inside & (np.asarray(scan.hu[part]) < ellipse.below_hu)
        else:
            lung[part][:, inside] = 0
    if scan.reader_bits is not None:
        added |= np.asarray(scan.reader_bits) > 0
    added &= lung == 0
    if added.any() and lung.any():
        nearest = distance_transform_edt(
            lung == 0,
            sampling=scan.spacing_mm,
            return_distances=False,
            return_indices=True,
        )
        lung[added] = lung[tuple(axis[added] for axis in nearest)]
    return lung


def correct_all(arguments: Arguments) -> steps.Report:
    """Corrects every scan file of a folder.

    Raises:
        ValueError: If the CSV file names a scan that is missing from the folder.
    """
    corrections = (
        read_corrections(arguments.corrections) if arguments.corrections else {}
    )
    paths = {path.stem: path for path in scan_files(arguments.scans)}
    unknown = sorted(set(corrections) - set(paths))
    if unknown:
        raise ValueError(
            f"{arguments.corrections} corrects {', '.join(unknown)}, missing from "
            f"{arguments.scans}; run preprocess.py on them first"
        )
    tasks = [
        Task(scan_id, path, corrections.get(scan_id, ()), arguments.out)
        for scan_id, path in paths.items()
    ]
    done, failures = steps.map_scans(correct, tasks, workers=1, label="labels")
    size = sum(scan_path(arguments.out, t.scan_id).stat().st_size for t in done)
    line = f"wrote {arguments.out}: {len(done)} scans, {files.size_text(size)}"
    return steps.Report(line, failures)


def main(argv: Sequence[str] | None = None) -> None:
    steps.run(correct_all, Arguments, argv=argv)


if __name__ == "__main__":
    main()
