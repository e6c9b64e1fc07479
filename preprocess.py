"""Step 1 of 9: write scan files with HU, geometry, lung mask and the readers' nodule masks.

Example:
    python preprocess.py smoke --source work/phantoms --scans work/scans
"""

import hashlib
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import config
import steps
from ct import files, provenance
from ct.scan import (
    ScanError,
    ScanSource,
    read_provenance,
    scan_path,
    without_folders,
    write_scan,
)
from lungs.classical import with_lungs

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Arguments:
    """Scans to read, and settings of their lung masks."""

    mask: config.LungMask
    source: Path = Path("work/phantoms")
    """Folder or list of scans."""
    cohort: config.CohortName = "lidc"
    """Layout of the source."""
    scans: Path = Path("work/scans")
    """Output folder of the scan files."""
    repair: tuple[config.Repair, ...] = ()
    """Defects to repair; a series with any other defect is refused."""
    limit: int = 0
    """Number of scans to read, from the first on; 0 for all."""
    workers: int = 2
    """Number of processes; 1 works in this process."""
    scheduler: str = ""
    """Address of a Dask scheduler to use instead of local processes."""
    overwrite: bool = False
    """Replace existing scan files."""


@dataclass(frozen=True)
class PrepareTask:
    """One scan to prepare, as sent to a worker process."""

    source: ScanSource
    cohort: str
    scans: Path
    mask: config.LungMask
    repair: tuple[str, ...]

    @property
    def scan_id(self) -> str:
        return self.source.scan_id

    def made_by(self) -> dict[str, Any]:
        """Returns the settings and the source that determine the scan file."""
        return {
            "mask": asdict(self.mask),
            "cohort": self.cohort,
            "repair": list(self.repair),
            "source_sha256": source_sha256(self.source),
        }


def preprocess(
    source: Path,
    scans: Path,
    mask: config.LungMask,
    *,
    cohort: str,
    repair: Sequence[str] = (),
    limit: int = 0,
    workers: int = 1,
    scheduler: str = "",
    overwrite: bool = False,
) -> steps.Report:
    """Writes a scan file for every scan of a cohort; keeps complete ones.

    Raises:
        ValueError: If the source holds no scan, or a file in `scans` was made with other
            settings or from another source.
    """
    import cohorts

    found = cohorts.cohort(cohort).find_scans(source)
    if limit:
        found = found[:limit]
    tasks = [
        task
        for task in (
            PrepareTask(item, cohort, scans, mask, tuple(repair)) for item in found
        )
        if overwrite or not is_complete(task)
    ]
    _, failures = steps.map_scans(
        prepare_scan, tasks, workers=workers, scheduler=scheduler, label="preprocess"
    )
    steps.write_failures(failures, scans / "skipped.csv")
    made = len(tasks) - len(failures)
    return steps.Report(
        f"wrote {scans}: {files.count_text(made, 'scan')}, "
        f"{len(found) - len(tasks)} already there, {len(failures)} skipped, "
        f"{files.size_text(folder_bytes(scans))}",
        failures,
    )


def is_complete(task: PrepareTask) -> bool:
    """Returns whether the task's scan file exists, with the same settings and source.

    Raises:
        ValueError: If it was made with other settings or from another source; it is only
            replaced on request.
    """
    path = scan_path(task.scans, task.scan_id)
    if not path.exists():
        return False
    try:
        found = flatten_record(read_provenance(path))
    except ScanError:
        return False
    changed = {
        name: (found.get(name), value)
        for name, value in flatten_record(task.made_by()).items()
        if found.get(name) != value
    }
    if changed:
        raise ValueError(
            f"{path} was made with other settings or from another source (found, expected): "
            f"{changed}; use --overwrite or another --scans"
        )
    return True


def flatten_record(record: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a provenance record with the mask settings moved to its top level."""
    return {**record, **(record.get("mask") or {}), "mask": None}


def source_sha256(source: ScanSource) -> str:
    """Returns a checksum over image names, image sizes and annotation contents."""
    lines = [f"{path.name} {path.stat().st_size}" for path in sorted(source.paths)]
    marks = [*source.annotations, *([source.lung] if source.lung else [])]
    lines += [files.sha256(path) for path in marks if path.is_file()]
    if source.spacing_mm is not None:
        lines.append(f"spacing {source.spacing_mm}")
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def prepare_scan(task: PrepareTask) -> str:
    """Reads one scan, segments its lungs, writes its scan file and returns the scan id."""
    import cohorts

    try:
        scan = cohorts.cohort(task.cohort).load_scan(task.source, repair=task.repair)
        scan = with_lungs(scan, task.mask)
    except ScanError as error:
        raise ScanError(without_folders(str(error), task.source)) from error
    for text in scan.warnings:
        log.warning("%s: %s", scan.scan_id, text)
    record = provenance.record() | task.made_by()
    write_scan(scan, scan_path(task.scans, scan.scan_id), record)
    return scan.scan_id


def folder_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.h5"))


def run_step(arguments: Arguments) -> steps.Report:
    return preprocess(**vars(arguments))


def main(argv: Sequence[str] | None = None) -> None:
    steps.run(run_step, Arguments, argv=argv)


if __name__ == "__main__":
    main()
