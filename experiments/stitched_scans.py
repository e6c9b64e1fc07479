r"""Chests over an abdomen: scan files with a field of view that few public scans have.

Every chest is cut at its lowest slice and continued by slices of an abdomen below its own
lungs. Both are resampled to cubic voxels; the abdomen is scaled and shifted in the slice
plane to the body of the chest, and the two are blended over a few slices. The lungs are those
of the chest. A stitched scan keeps the patient of the chest; train on the abdomen's patient,
too.

    python -m experiments.stitched_scans --chests work/labelled --abdomen work/abdomen.h5 \
        --out work/stitched
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import cv2
import numpy as np

import steps
from ct import files, provenance, resample
from ct.geometry import canonical_grid
from ct.scan import (
    AIR_HU,
    Scan,
    ScanError,
    read_scan,
    scan_files,
    scan_path,
    write_scan,
)

BODY_HU = -300
"""HU above which a voxel belongs to the body."""

GAP_MM = 15.0
"""Distance from the lowest lung of the abdomen to the first slice that is used."""

BLEND_MM = 12.0
"""Length over which both scans are mixed."""


@dataclass(frozen=True)
class Arguments:
    """Scans to stitch, and where they go."""

    abdomen: Path
    """Scan file of the abdomen, with lung labels where it has lungs."""
    out: Path
    """Folder for the stitched scan files."""
    chests: Path = Path("work/scans")
    """Folder of scan files with lung labels."""
    spacing_mm: float = 2.0
    """Edge of the cubic voxels."""


@dataclass(frozen=True, eq=False)
class Task:
    """One chest to stitch, and the abdomen as HU and lung labels of cubic voxels."""

    scan_id: str
    path: Path
    abdomen: tuple[np.ndarray, np.ndarray]
    arguments: Arguments


def cubic(scan: Scan, spacing_mm: float) -> tuple[np.ndarray, np.ndarray]:
    """Returns the (z, y, x) int16 HU and uint8 lung labels of a scan as cubic voxels."""
    weights, _ = resample.isotropic(scan.grid, spacing_mm)
    hu = np.rint(resample.volume(scan.hu, weights)).astype(np.int16)
    lung = np.zeros(scan.hu.shape, np.uint8) if scan.lung is None else scan.lung
    return hu, resample.labels(np.asarray(lung), weights)


def body_of(image: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns centre and size (x, y) of the largest body in a (y, x) image of HU."""
    mask = (image > BODY_HU).astype(np.uint8)
    mask = cv2.morphologyEx(mask, cv2.MORPH_OPEN, np.ones((7, 7), np.uint8))
    _, _, stats, _ = cv2.connectedComponentsWithStats(mask)
    if len(stats) < 2:
        raise ScanError("no body in the slice where the scans meet")
    x, y, width, height, _ = stats[1 + stats[1:, cv2.CC_STAT_AREA].argmax()]
    return np.array([x + width / 2, y + height / 2]), np.array([width, height], float)


def stitch(
    chest: tuple[np.ndarray, np.ndarray],
    abdomen: tuple[np.ndarray, np.ndarray],
    spacing_mm: float,
) -> tuple[np.ndarray, np.ndarray]:
    """Joins two volumes of cubic voxels, each with HU and lung labels.

    Returns:
        (z, y, x) int16 HU and uint8 lung labels; the abdomen comes first (lowest).
    """
    hu, lung = chest
    below, lung_below = abdomen
    with_lung = np.flatnonzero(lung_below.any(axis=(1, 2)))
    top = int(with_lung[0]) if len(with_lung) else len(below)
    top -= round(GAP_MM / spacing_mm)
    blend = min(round(BLEND_MM / spacing_mm), len(hu) // 4)
    if top <= blend:
        raise ScanError(f"only {top} slices lie below the lungs of the abdomen")
    centre, size = body_of(hu[0])
    centre_below, size_below = body_of(below[top - 1])
    scale = size / size_below
    matrix = np.column_stack([np.diag(scale), centre - scale * centre_below])
    shape_xy = (hu.shape[2], hu.shape[1])
    moved = np.stack(
        [
            cv2.warpAffine(
                plane,
                matrix,
                shape_xy,
                flags=cv2.INTER_LINEAR,
                borderMode=cv2.BORDER_CONSTANT,
                borderValue=AIR_HU,
            )
            for plane in below[:top]
        ]
    )
    share = (np.arange(1, blend + 1, dtype=np.float32) / (blend + 1))[:, None, None]
    mixed = moved[-blend:] * (1 - share) + hu[:blend] * share
    joined = [moved[:-blend], np.rint(mixed).astype(np.int16), hu[blend:]]
    labels = np.concatenate([np.zeros(moved[:-blend].shape, np.uint8), lung])
    return np.concatenate(joined), labels


def stitch_all(arguments: Arguments) -> steps.Report:
    """Writes a stitched scan file for every chest; existing ones are replaced."""
    abdomen = cubic(read_scan(arguments.abdomen), arguments.spacing_mm)
    tasks = [
        Task(path.stem, path, abdomen, arguments)
        for path in scan_files(arguments.chests)
    ]
    done, failures = steps.map_scans(write_stitched, tasks, workers=1, label="stitch")
    line = f"wrote {arguments.out}: {files.count_text(len(done), 'scan')}"
    return steps.Report(line, failures)


def write_stitched(task: Task) -> Task:
    """Stitches one chest and writes its scan file, named SCAN_ID-abdomen.

    Raises:
        ScanError: If the chest cannot be read, or the two do not fit together.
    """
    scan = read_scan(task.path)
    spacing = task.arguments.spacing_mm
    hu, lung = stitch(cubic(scan, spacing), task.abdomen, spacing)
    grid = canonical_grid(hu.shape, (spacing,) * 3)
    name = f"{scan.scan_id}-abdomen"
    stitched = replace(
        scan.unread(),
        scan_id=name,
        series_uid="",
        hu=hu,
        lung=lung,
        grid=grid,
        source_grid=grid,
    )
    record = provenance.record() | {"made_by": "experiments.stitched_scans"}
    write_scan(stitched, scan_path(task.arguments.out, name), record)
    return task


def main(argv: Sequence[str] | None = None) -> None:
    steps.run(stitch_all, Arguments, argv=argv)


if __name__ == "__main__":
    main()
