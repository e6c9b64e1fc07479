r"""Real nodules in real lungs, to compare how much of each nodule lung masks include.

Pastes nodules of LIDC-IDRI, from cubes with one reader's mask, into scans with known lungs:
free ones into aerated lung, juxtapleural ones where the surface of the lung looks like the one
in their own scan. The true lung is then the host's lung and the pasted nodules. A scan with
pasted nodules is called SCAN_ID-pasted.

    python -m experiments.lung_inclusion --hosts work/labelled \
        --cubes ../shared/data/lidc-cubes --out work/pasted

Writes OUT/truth, scan files whose only nodules are the pasted ones; OUT/volumes and
OUT/scans.csv, the same HU as NIfTI and their list; and OUT/nodules.csv, which names the patient
and the row of each nodule's cube: a network trained on that patient has seen the nodule.

The masks to compare are then made from the list, and the table from the masks; P is OUT:

    L="--input P/scans.csv --nodules None --save_as nifti-labels"
    python infer.py $L --result_dir P/lung3d
    python infer.py $L --result_dir P/own-border --snap 0
    python infer.py $L --result_dir P/lung2d --exp_dir weights/lung2d
    python preprocess.py smoke --cohort nifti --source P/scans.csv --scans P/classical
    python preprocess.py thesis --cohort nifti --source P/scans.csv --scans P/slice-rule
    python -m experiments.lung_comparison --scans P/truth --truth P/truth --out P/scores \
        --methods lung3d=P/lung3d own-border=P/own-border lung2d=P/lung2d \
        classical=P/classical slice-rule=P/slice-rule

`smoke` has the classical mask with its cleaning, `thesis` only the slice rule of the thesis.
A row of the host's own lung shows the most that any mask of the host could include: add
`host=HOSTS` to the methods.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

import steps
from ct import files, provenance
from ct.geometry import Grid
from ct.nifti_io import write_nifti
from ct.scan import (
    Annotation,
    Nodule,
    Scan,
    ScanError,
    read_scan,
    scan_files,
    scan_path,
    write_scan,
)
from experiments import pasted_nodules
from experiments.nodule_cubes import Cube, read_cubes
from nodules import outlines

Part = Literal["all", "train", "test"]

TEST_ROW = 1
"""Cubes of the test part have this remainder when their row is divided by three."""


@dataclass(frozen=True)
class Arguments:
    """Lungs and nodules, and where the scans with pasted nodules go."""

    hosts: Path
    """Folder of scan files with reference lung labels."""
    cubes: Path
    """Folder of cubes.h5 and index.csv."""
    out: Path
    """Output folder; scans of the same ids are replaced."""
    lung_ml: float = 60.0
    """Volume of lung per pasted nodule."""
    part: Part = "all"
    """Cubes to paste. test: every third; train: the others, for training scans."""
    exclude_patients: tuple[str, ...] = ()
    """Patients of LIDC-IDRI whose nodules are not pasted, such as those of the test part."""
    workers: int = 1
    """Number of processes."""
    seed: int = 0
    """Seed of places and noise, combined with the scan id."""


def paste_nodules(
    scan: Scan, cubes: Sequence[Cube], lung_ml: float, *, seed: int
) -> tuple[Scan, list[dict[str, Any]]]:
    """Pastes nodules into a scan, large ones first, each cube at most once.

    Args:
        scan: Scan with lung labels; its own nodules are not kept as labels.
        cubes: Nodules to choose from; those of the scan's patient are left out.
        lung_ml: Volume of lung per nodule.
        seed: Seed of places and noise.

    Returns:
        The scan with the nodules as those of one reader and as part of the lung, and one
        row per nodule.

    Raises:
        ScanError: If the scan has no lung labels, or no nodule fits.
    """
    if scan.lung is None or not np.any(scan.lung):
        raise ScanError(
            f"scan {scan.scan_id} has no lung labels; expected scan files with known "
            "lungs, as written by experiments.lung_labels"
        )
    rng = np.random.default_rng((seed, *scan.scan_id.encode()))
    hu, host_lung = np.array(scan.hu), np.asarray(scan.lung)
    lung, labels = host_lung.copy(), np.zeros(hu.shape, np.uint8)
    nodules, rows = [], []
    taken: list[tuple[np.ndarray, float]] = []
    host = pasted_nodules.build_host(scan)
    for cube in choose(cubes, scan, lung_ml, rng):
        place = pasted_nodules.find_place(host, cube, taken, rng)
        if place is None:
            continue
        box, mask = pasted_nodules.paste(hu, host_lung, scan.grid, cube, place, rng)
        if not mask.any():
            continue
        sides = np.bincount(host_lung[box][mask], minlength=3)
        labels[box][mask] = len(nodules) + 1
        lung[box][mask & (lung[box] == 0)] = 1 + sides[1:].argmax()
        start = [part.start for part in box]
        centre = np.argwhere(mask).mean(axis=0) + start
        nodules.append(nodule_of(len(nodules) + 1, mask, centre, scan.grid, cube))
        middle_mm = scan.grid.index_to_ras_mm(place.centre)
        taken.append((middle_mm, pasted_nodules.radius_mm(cube)))
        rows.append(
            {
                "scan_id": scan.scan_id,
                "label": len(nodules),
                "row": cube.row,
                "patient_id": cube.patient_id,
                "long_mm": round(cube.long_mm, 1),
                "juxtapleural": cube.juxtapleural,
                "agreement": round(place.agreement, 3),
                "in_host_lung": round(1 - sides[0] / sides.sum(), 3),
            }
            | dict(zip("zyx", np.round(centre, 1).tolist(), strict=True))
        )
    if not nodules:
        raise ScanError(f"scan {scan.scan_id}: no nodule fits into its lungs")
    pasted = replace(
        scan,
        hu=hu,
        lung=lung,
        nodule_labels=labels,
        reader_bits=(labels > 0).view(np.uint8),
        nodules=tuple(nodules),
    )
    return pasted, rows


def choose(
    cubes: Sequence[Cube], scan: Scan, lung_ml: float, rng: np.random.Generator
) -> list[Cube]:
    """Draws cubes of other patients for the volume of a scan's lungs, large ones first."""
    others = [cube for cube in cubes if cube.patient_id != scan.patient_id]
    own_ml = np.count_nonzero(np.asarray(scan.lung)) * scan.grid.voxel_mm3 / 1000
    count = min(max(round(own_ml / lung_ml), 1), len(others), 255)
    drawn = [others[i] for i in rng.permutation(len(others))[:count]]
    return sorted(drawn, key=lambda cube: -cube.long_mm)


def nodule_of(
    label: int, mask: np.ndarray, centre: np.ndarray, grid: Grid, cube: Cube
) -> Nodule:
    """Returns a pasted nodule; its diameter is the long axis in its own scan."""
    annotation = Annotation(
        reader=0,
        volume_mm3=outlines.volume_mm3(mask, grid.voxel_mm3),
        diameter_mm=cube.long_mm,
    )
    centre_ras_mm = grid.index_to_ras_mm(centre)
    return Nodule(label, tuple(centre_ras_mm.tolist()), (annotation,))


@dataclass(frozen=True)
class Task:
    """One host to paste nodules into."""

    scan_id: str
    path: Path
    arguments: Arguments


def cubes_of_part(cubes: Sequence[Cube], part: Part) -> list[Cube]:
    """Returns all cubes, or those of one part; a patient has one cube."""
    return [cube for cube in cubes if part in ("all", part_of(cube.row))]


def part_of(row: int) -> Part:
    return "test" if row % 3 == TEST_ROW else "train"


def write_pasted(task: Task) -> tuple[dict[str, str], list[dict[str, Any]]]:
    """Writes one host with pasted nodules; returns its line of the list, and its nodules."""
    arguments = task.arguments
    cubes = [
        cube
        for cube in cubes_of_part(read_cubes(arguments.cubes), arguments.part)
        if cube.patient_id not in arguments.exclude_patients
    ]
    scan, rows = paste_nodules(
        read_scan(task.path), cubes, arguments.lung_ml, seed=arguments.seed
    )
    scan = replace(scan, scan_id=f"{scan.scan_id}-pasted", series_uid="")
    rows = [row | {"scan_id": scan.scan_id} for row in rows]
    record = provenance.record() | {
        "made_by": "experiments.lung_inclusion",
        "source_sha256": files.sha256(task.path),
        "seed": arguments.seed,
        "lung_ml": arguments.lung_ml,
        "part": arguments.part,
        "nodule_patients": sorted({row["patient_id"] for row in rows}),
    }
    write_scan(scan, scan_path(arguments.out / "truth", scan.scan_id), record)
    volume = f"volumes/{scan.scan_id}.nii.gz"
    write_nifti(arguments.out / volume, scan.hu, scan.grid, scan.source_grid)
    line = {
        "pid": scan.scan_id,
        "image_path": volume,
        "patient_id": scan.patient_id,
    }
    return line, rows


def write_all(arguments: Arguments) -> steps.Report:
    """Pastes nodules into every host of a folder."""
    tasks = [Task(path.stem, path, arguments) for path in scan_files(arguments.hosts)]
    done, failures = steps.map_scans(
        write_pasted, tasks, workers=arguments.workers, label="paste"
    )
    lines, rows = (
        [line for line, _ in done],
        [row for _, found in done for row in found],
    )
    if lines:
        files.write_rows(lines, list(lines[0]), arguments.out / "scans.csv")
        files.write_rows(rows, list(rows[0]), arguments.out / "nodules.csv")
    scans, pasted = (
        files.count_text(len(lines), "scan"),
        files.count_text(len(rows), "nodule"),
    )
    return steps.Report(f"wrote {arguments.out}: {scans}, {pasted}", failures)


def main(argv: Sequence[str] | None = None) -> None:
    steps.run(write_all, Arguments, argv=argv)


if __name__ == "__main__":
    main()
