r"""Scans with simulated pathology and known lungs, to test lung masks on diseased lungs.

    python -m experiments.lesioned_scans --truth work/phantoms/truth --out work/lesioned
    python -m experiments.lesioned_scans --truth work/labelled --out work/pleural \
        --disease.findings nodule mass

Writes OUT/truth, the scans with their known lung labels, and OUT/scans, the same scans with the
classical mask of the changed HU. In both, each connected component that the pathology made
denser counts as a nodule of one reader, so `experiments.lung_comparison` reports how much of it
a mask keeps. The readers' own nodules are left out. Pathology is drawn as in training, with
other random draws but the same kinds of findings and the same nodule shapes.
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
"""Voxels that became denser by at least this much are disease that a mask may lose."""

LEAST_MM3 = 50.0
"""Smallest volume of a component; smaller ones are specks that image noise separates from
larger ones."""

MOST_PARTS = 255
"""Largest number of components, as scan files hold no more labels; the largest are kept."""


@dataclass(frozen=True)
class Arguments:
    """Scans to change, and the pathology to simulate in them."""

    truth: Path
    """Folder of scan files with known lung labels."""
    out: Path
    """Output folder; scan files are written to its subfolders truth and scans."""
    disease: config.Lesions = field(
        default_factory=lambda: config.Lesions(probability=1.0)
    )
    classical: config.LungMask = field(default_factory=config.LungMask)
    seed: int = 0
    """Seed of the lesions, combined with the scan id."""
    workers: int = 1
    """Number of processes."""


@dataclass(frozen=True)
class Task:
    """One scan file to process."""

    scan_id: str
    path: Path
    arguments: Arguments


def add_lesions(scan: Scan, settings: config.Lesions, *, seed: int) -> Scan:
    """Returns the scan with simulated pathology, which is labelled as nodules.

    Raises:
        ScanError: If the scan has no lung labels.
    """
    if scan.lung is None:
        raise ScanError(
            f"scan {scan.scan_id} has no lung labels; expected scan files with known lungs, "
            "as written by phantoms.write or experiments.lung_labels"
        )
    rng = np.random.default_rng((seed, *scan.scan_id.encode()))
    lung = np.asarray(scan.lung)
    hu = lesions.simulate_lesions(
        np.asarray(scan.hu), lung, scan.spacing_mm, settings, rng, held_out=frozenset()
    )
    denser = (hu - scan.hu.astype(np.float32) >= DENSER_HU) & (lung > 0)
    labels = label_components(denser, LEAST_MM3 / scan.grid.voxel_mm3)
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


def label_components(mask: np.ndarray, least: float) -> np.ndarray:
    """Labels the components of at least `least` voxels, largest first; (z, y, x) uint8."""
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
    """Returns the nodule that fills a (z, y, x) mask, as if one reader had outlined it."""
    centre_ras_mm = grid.index_to_ras_mm(np.argwhere(mask).mean(axis=0))
    annotation = Annotation(
        reader=0,
        volume_mm3=outlines.volume_mm3(mask, grid.voxel_mm3),
        diameter_mm=outlines.diameter_mm(mask, grid.spacing_mm),
    )
    return Nodule(label, tuple(centre_ras_mm.tolist()), (annotation,))


def write_lesioned(task: Task) -> Task:
    """Writes the scan as truth and as a scan file with its classical mask.

    Existing files are kept.

    Raises:
        ScanError: If the existing files were made from another scan.
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
        scan = add_lesions(read_scan(task.path), arguments.disease, seed=arguments.seed)
        record = provenance.record() | made_of
        write_scan(scan, truth, record)
        write_scan(
            with_lungs(replace(scan, lung=None), arguments.classical), masked, record
        )
    elif read_provenance(truth).get("source_sha256") != made_of["source_sha256"]:
        raise ScanError(f"{truth} was made from another {task.path.name}; remove it")
    return task


def write_all(arguments: Arguments) -> steps.Report:
    """Simulates pathology in every scan of a folder; existing results are kept.

    Raises:
        ValueError: If the probability is 0, or OUT holds scans made with other settings.
    """
    if arguments.disease.probability == 0:
        raise ValueError(
            "--disease.probability is 0, so no scan would change; expected above 0"
        )
    refuse_made_otherwise(arguments)
    tasks = [Task(path.stem, path, arguments) for path in scan_files(arguments.truth)]
    done, failures = steps.map_scans(
        write_lesioned, tasks, workers=arguments.workers, label="lesions"
    )
    return steps.Report(f"wrote {arguments.out}: {len(done)} scans", failures)


def refuse_made_otherwise(arguments: Arguments) -> None:
    """Writes lesions.json; raises ValueError if OUT was made with other settings."""
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
