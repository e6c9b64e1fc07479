r"""Chests over an abdomen: scan files with a field of view that few public scans have.

Every chest is cut at its lowest slice and continued by slices of an abdomen below its own
lungs. Both are resampled to cubic voxels; the abdomen is scaled and shifted in the slice
plane to the body of the chest, and the two are blended over a few slices. The lungs are those
of the chest. Abdomens are scan files, simulated ones (`phantoms.abdomen`), or both; which a
chest gets is drawn by seed, and so is the length. Real abdomens, which are few, are also
mirrored from left to right.

A stitched scan keeps the patient of the chest; train on the abdomen's patient, too. The
provenance of its file names the abdomen.

    python -m experiments.stitched_scans --chests work/labelled --abdomens work/abdomens \
        --synthetic 40 --each 2 --out work/stitched
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

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
from lungs.checks import END_CM2, end_cm2
from phantoms.abdomen import make_abdomen

BODY_HU = -300
"""HU above which a voxel belongs to the body."""

GAP_MM = 15.0
"""Distance from the lowest lung of the abdomen to the first slice that is used."""

BLEND_MM = 12.0
"""Length over which both scans are mixed."""

LEAST_MM = 80.0
"""Shortest length of an abdomen under a chest."""

MIRRORED = 0.5
"""Share of the real abdomens that are mirrored."""


@dataclass(frozen=True)
class Arguments:
    """Scans to stitch, and where they go."""

    out: Path
    """Folder for the stitched scan files."""
    chests: Path = Path("work/scans")
    """Folder of scan files with lung labels."""
    abdomens: Path | None = None
    """Folder of scan files of abdomens, with lung labels where they have lungs."""
    synthetic: int = 0
    """Number of simulated abdomens; their seeds are `seed`, `seed` + 1, and so on."""
    each: int = 1
    """Number of abdomens for each chest."""
    seed: int = 0
    """Seed of what is drawn, combined with the name of the chest."""
    spacing_mm: float = 2.0
    """Edge of the cubic voxels."""
    workers: int = 1
    """Number of processes."""


@dataclass(frozen=True)
class Task:
    """One stitched scan to make.

    Attributes:
        scan_id: Name of the stitched scan.
        path: Scan file of the chest.
        abdomen: Scan file of the abdomen, or the seed of a simulated one.
        arguments: What the user asked for.
    """

    scan_id: str
    path: Path
    abdomen: Path | int
    arguments: Arguments


def cubic(scan: Scan, spacing_mm: float) -> tuple[np.ndarray, np.ndarray]:
    """Returns the (z, y, x) int16 HU and uint8 lung labels of a scan as cubic voxels."""
    weights, _ = resample.isotropic(scan.grid, spacing_mm)
    hu = np.rint(resample.volume(scan.hu, weights)).astype(np.int16)
    lung = np.zeros(scan.hu.shape, np.uint8) if scan.lung is None else scan.lung
    return hu, resample.labels(np.asarray(lung), weights)


def read_chest(path: Path, spacing_mm: float) -> tuple[Scan, np.ndarray, np.ndarray]:
    """Reads a chest; returns it with its HU and lung labels as cubic voxels.

    Raises:
        ScanError: If it cannot be read, has no lung labels, or is cut above the bases of
            its lungs.
    """
    scan = read_scan(path)
    if scan.lung is None:
        raise ScanError(f"scan {scan.scan_id} has no lung labels")
    cut_cm2 = end_cm2(np.asarray(scan.lung), scan.spacing_mm, 0)
    if cut_cm2 > END_CM2:
        raise ScanError(
            f"the lowest slice holds {cut_cm2:.0f} cm2 of lung, expected {END_CM2:g} or "
            "less; lungs that the scan cuts cannot be continued"
        )
    return scan, *cubic(scan, spacing_mm)


def read_abdomen(
    abdomen: Path | int, spacing_mm: float, rng: np.random.Generator
) -> tuple[np.ndarray, dict[str, Any]]:
    """Reads or makes an abdomen, and mirrors and shortens it at random.

    Args:
        abdomen: Scan file, or the seed of a simulated abdomen.
        spacing_mm: Edge of the cubic voxels.
        rng: Draws length and mirroring.

    Returns:
        (z, y, x) int16 HU of slices without lung, and a record of what was drawn.

    Raises:
        ScanError: If the file cannot be read, or too little lies below its lungs.
    """
    mirrored = rng.random() < MIRRORED
    share = rng.random()
    if isinstance(abdomen, Path):
        scan = read_scan(abdomen)
        hu = below_lungs(*cubic(scan, spacing_mm), spacing_mm)
        record = {"abdomen": scan.scan_id, "abdomen_patient": scan.patient_id}
    else:
        hu, mirrored = make_abdomen(abdomen, spacing_mm), False
        record = {"abdomen": f"simulated, seed {abdomen}", "abdomen_patient": ""}
    hu = hu[:, :, ::-1] if mirrored else hu
    least = round(LEAST_MM / spacing_mm)
    count = least + round(share * (len(hu) - least))
    return hu[-count:], record | {"mirrored": mirrored, "slices": count}


def below_lungs(hu: np.ndarray, lung: np.ndarray, spacing_mm: float) -> np.ndarray:
    """Returns the slices of an abdomen that lie clear of its lungs, if it has any.

    Raises:
        ScanError: If they are too few.
    """
    with_lung = np.flatnonzero(lung.any(axis=(1, 2)))
    gap = round(GAP_MM / spacing_mm)
    top = max(int(with_lung[0]) - gap, 0) if len(with_lung) else len(hu)
    if top * spacing_mm < LEAST_MM:
        raise ScanError(
            f"only {top * spacing_mm:.0f} mm of the abdomen lie below its lungs, expected "
            f"{LEAST_MM:.0f} mm or more"
        )
    return hu[:top]


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
    hu: np.ndarray, lung: np.ndarray, below: np.ndarray, spacing_mm: float
) -> tuple[np.ndarray, np.ndarray]:
    """Joins a chest and the abdomen below it, both of cubic voxels.

    Args:
        hu: (z, y, x) int16 HU of the chest.
        lung: (z, y, x) uint8 lung labels of the chest.
        below: (z, y, x) int16 HU of the abdomen, in a slice plane of any size.
        spacing_mm: Edge of the voxels.

    Returns:
        (z, y, x) int16 HU and uint8 lung labels; the abdomen comes first (lowest).

    Raises:
        ScanError: If one of the slices that meet shows no body.
    """
    blend = min(round(BLEND_MM / spacing_mm), len(hu) // 4, len(below) - 1)
    moved = fitted(below, hu[0])
    top = len(moved) - blend
    share = (np.arange(1, blend + 1, dtype=np.float32) / (blend + 1))[:, None, None]
    mixed = moved[top:] * (1 - share) + hu[:blend] * share
    joined = [moved[:top], np.rint(mixed).astype(np.int16), hu[blend:]]
    labels = np.concatenate([np.zeros(moved[:top].shape, np.uint8), lung])
    return np.concatenate(joined), labels


def fitted(below: np.ndarray, image: np.ndarray) -> np.ndarray:
    """Scales and shifts slices so that the body of the highest fits that of an image.

    Args:
        below: (z, y, x) int16 HU.
        image: (y, x) int16 HU of the slice that comes next.

    Returns:
        Slices of the size of `image`.
    """
    centre, size = body_of(image)
    centre_below, size_below = body_of(below[-1])
    scale = size / size_below
    matrix = np.column_stack([np.diag(scale), centre - scale * centre_below])
    return np.stack(
        [
            cv2.warpAffine(
                np.ascontiguousarray(plane),
                matrix,
                (image.shape[1], image.shape[0]),
                flags=cv2.INTER_LINEAR,
                borderMode=cv2.BORDER_CONSTANT,
                borderValue=AIR_HU,
            )
            for plane in below
        ]
    )


def stitch_all(arguments: Arguments) -> steps.Report:
    """Writes the stitched scan files of every chest; existing ones are replaced.

    Raises:
        ValueError: If there is no abdomen, or fewer than each chest shall get.
    """
    done, failures = steps.map_scans(
        write_stitched, plan(arguments), workers=arguments.workers, label="stitch"
    )
    line = f"wrote {arguments.out}: {files.count_text(len(done), 'scan')}"
    return steps.Report(line, failures)


def plan(arguments: Arguments) -> list[Task]:
    """Draws different abdomens for every chest, and names each scan CHEST-over-ABDOMEN."""
    real = [] if arguments.abdomens is None else scan_files(arguments.abdomens)
    first = arguments.seed
    abdomens = [*real, *range(first, first + arguments.synthetic)]
    if not abdomens:
        raise ValueError("no abdomens; give --abdomens, --synthetic or both")
    if not 1 <= arguments.each <= len(abdomens):
        raise ValueError(
            f"--each is {arguments.each}, expected 1 to {len(abdomens)}, the number of "
            "abdomens in --abdomens and of --synthetic"
        )
    tasks = []
    for path in scan_files(arguments.chests):
        rng = np.random.default_rng((arguments.seed, *path.stem.encode()))
        drawn = rng.permutation(len(abdomens))[: arguments.each]
        for abdomen in (abdomens[index] for index in drawn):
            below = (
                abdomen.stem if isinstance(abdomen, Path) else f"simulated-{abdomen}"
            )
            name = f"{path.stem}-over-{below}"
            tasks.append(Task(name, path, abdomen, arguments))
    return tasks


def write_stitched(task: Task) -> str:
    """Stitches one chest to one abdomen, writes the scan file, and returns its name.

    Raises:
        ScanError: If one of the two cannot be used, or they do not fit together.
    """
    spacing = task.arguments.spacing_mm
    scan, hu, lung = read_chest(task.path, spacing)
    rng = np.random.default_rng((task.arguments.seed, *task.scan_id.encode()))
    below, drawn = read_abdomen(task.abdomen, spacing, rng)
    hu, lung = stitch(hu, lung, below, spacing)
    grid = canonical_grid(hu.shape, (spacing,) * 3)
    stitched = replace(
        scan.unread(),
        scan_id=task.scan_id,
        series_uid="",
        hu=hu,
        lung=lung,
        grid=grid,
        source_grid=grid,
    )
    made_by = {"made_by": "experiments.stitched_scans", "chest": scan.scan_id}
    record = provenance.record() | made_by | drawn
    write_scan(stitched, scan_path(task.arguments.out, task.scan_id), record)
    return task.scan_id


def main(argv: Sequence[str] | None = None) -> None:
    steps.run(stitch_all, Arguments, argv=argv)


if __name__ == "__main__":
    main()
