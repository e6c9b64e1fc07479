r"""Scans with simulated pathology whose lungs are known: to test what disease does to masks.

    python -m experiments.lesioned_scans --truth work/phantoms/truth --out work/lesioned
    python -m experiments.lesioned_scans --truth work/labelled --out work/pleural \
        --disease.findings nodule mass

Writes OUT/truth, the scans with their known lung labels, and OUT/scans, the same with the
classical mask of the changed HU. In both, each connected part of what the pathology made
denser counts as a nodule of one reader, so `experiments.lung_comparison` says how much of
it a mask keeps. The readers' own nodules are left out. Pathology is drawn as in training: other
draws, but of the same kinds, and nodules in the same shapes.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

import config
import steps
from augment import lesions
from ct import files, provenance
from ct.geometry import Grid
from ct.scan import (
    Annotation,
    Nodule,
    Scan,
    ScanError,
    read_provenance,
    read_scan,
    scan_files,
    scan_path,
    write_scan,
)
from lungs.classical import with_lungs
from nodules import outlines

DENSER_HU = 150.0
"""What became so much denser is disease that a mask may lose."""

LEAST_MM3 = 50.0
"""Smaller parts are the grain of larger ones."""

MOST_PARTS = 255
"""Labels that a scan file holds; the largest parts get one."""


@dataclass(frozen=True)
class Arguments:
    """Which scans become ill, and how."""

    truth: Path
    """Scan files with known lung labels."""
    out: Path
    """Two folders of scan files are written here, truth and scans."""
    disease: config.Lesions = field(
        default_factory=lambda: config.Lesions(probability=1.0)
    )
    classical: config.LungMask = field(default_factory=config.LungMask)
    seed: int = 0
    """With the scan's id, decides its lesions."""
    workers: int = 1
    """Processes."""


@dataclass(frozen=True)
class Task:
    """One scan file."""

    scan_id: str
    path: Path
    arguments: Arguments


def lesioned(scan: Scan, settings: config.Lesions, *, seed: int) -> Scan:
    """The scan with simulated pathology, which is marked as its nodules.

    Raises:
        ScanError: If it has no lung labels.
    """
    if scan.lung is None:
        raise ScanError(
            f"scan {scan.scan_id} has no lung labels; expected scan files whose lungs are "
            "known, as phantoms.write or experiments.lung_labels write them"
        )
    rng = np.random.default_rng((seed, *scan.scan_id.encode()))
    lung = np.asarray(scan.lung)
    hu = lesions.simulate(
        np.asarray(scan.hu), lung, scan.spacing_mm, settings, rng, held_out=frozenset()
    )
    denser = (hu - scan.hu.astype(np.float32) >= DENSER_HU) & (lung > 0)
    labels = parts(denser, LEAST_MM3 / scan.grid.voxel_mm3)
    return replace(
        scan,
        hu=hu,
        nodule_labels=labels,
        reader_bits=(labels > 0).view(np.uint8),
        nodules=tuple(
            nodule_of(labels == label, label, scan.grid)
            for label in range(1, int(labels.max()) + 1)
        ),
    )


def parts(mask: np.ndarray, least: float) -> np.ndarray:
    """(z, y, x) uint8: the connected parts of at least `least` voxels, largest first."""
    import cc3d

    found = cc3d.connected_components(mask, connectivity=6)
    counts = np.bincount(found.ravel())
    counts[0] = 0
    order = np.argsort(-counts, kind="stable")[:MOST_PARTS]
    label_of = np.zeros(len(counts), np.uint8)
    for label, part in enumerate(order[counts[order] >= max(least, 1)], start=1):
        label_of[part] = label
    return label_of[found]


def nodule_of(mask: np.ndarray, label: int, grid: Grid) -> Nodule:
    """The nodule that fills a (z, y, x) mask, as one reader would have outlined it."""
    centre_ras_mm = grid.index_to_ras_mm(np.argwhere(mask).mean(axis=0))
    annotation = Annotation(
        reader=0,
        volume_mm3=outlines.volume_mm3(mask, grid.voxel_mm3),
        diameter_mm=outlines.diameter_mm(mask, grid.spacing_mm),
    )
    return Nodule(label, tuple(centre_ras_mm.tolist()), (annotation,))


def write_lesioned(task: Task) -> Task:
    """Writes the scan as truth and as a scan file with its classical mask.

    Raises:
        ScanError: If those that are there were made of another scan.
    """
    arguments = task.arguments
    truth = scan_path(arguments.out / "truth", task.scan_id)
    masked = scan_path(arguments.out / "scans", task.scan_id)
    made_of = {
        "source_sha256": files.sha256(task.path),
        "disease": config.to_json(arguments.disease),
        "seed": arguments.seed,
    }
    if not (truth.exists() and masked.exists()):
        scan = lesioned(read_scan(task.path), arguments.disease, seed=arguments.seed)
        record = provenance.record() | made_of
        write_scan(scan, truth, record)
        write_scan(
            with_lungs(replace(scan, lung=None), arguments.classical), masked, record
        )
    elif read_provenance(truth).get("source_sha256") != made_of["source_sha256"]:
        raise ScanError(f"{truth} was made of another {task.path.name}; remove it")
    return task


def write_all(arguments: Arguments) -> steps.Report:
    """Makes every scan of a folder ill; leaves those that are there.

    Raises:
        ValueError: If nothing would become ill, or OUT holds scans made otherwise.
    """
    if arguments.disease.probability == 0:
        raise ValueError("--disease.probability is 0, so no scan would become ill")
    refuse_made_otherwise(arguments)
    tasks = [Task(path.stem, path, arguments) for path in scan_files(arguments.truth)]
    done, failures = steps.map_scans(
        write_lesioned, tasks, workers=arguments.workers, label="lesions"
    )
    return steps.Report(f"wrote {arguments.out}: {len(done)} scans", failures)


def refuse_made_otherwise(arguments: Arguments) -> None:
    """Writes how OUT's scans are made; raises ValueError if they were made otherwise."""
    path = arguments.out / "lesions.json"
    record = {
        "disease": config.to_json(arguments.disease),
        "classical": config.to_json(arguments.classical),
        "seed": arguments.seed,
    }
    if not path.exists():
        files.write_json(path, record)
    elif json.loads(path.read_text()) != json.loads(json.dumps(record)):
        raise ValueError(
            f"{path}: scans in {arguments.out} were made with other settings; choose "
            "another --out"
        )


def main(argv: Sequence[str] | None = None) -> None:
    steps.run(write_all, Arguments, argv=argv)


if __name__ == "__main__":
    main()
