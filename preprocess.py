"""Step 1 of 9: CT -> scan files: HU, geometry, lung mask, the readers' nodule masks.

Example:
    python preprocess.py smoke --source work/phantoms --scans work/scans
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

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

Repair = Literal["gaps", "duplicates", "tilt"]


@dataclass(frozen=True)
class Arguments:
    """Which scans are read, and how their lungs are found."""

    mask: config.LungMask
    source: Path = Path("work/phantoms")
    """Folder or list of scans."""
    cohort: config.CohortName = "lidc"
    """How the source is laid out."""
    scans: Path = Path("work/scans")
    """Scan files are written here."""
    repair: tuple[Repair, ...] = ()
    """Defects of a series to mend instead of refusing it."""
    limit: int = 0
    """Only the first so many scans; 0 for all."""
    workers: int = 2
    """Processes; 1 works in this one."""
    scheduler: str = ""
    """Address of a Dask scheduler to use instead of processes here."""
    overwrite: bool = False
    """Make scan files again that exist."""


@dataclass(frozen=True)
class PrepareTask:
    """One scan to prepare; it travels to a worker process."""

    source: ScanSource
    cohort: str
    scans: Path
    mask: config.LungMask
    repair: tuple[str, ...]

    @property
    def scan_id(self) -> str:
        return self.source.scan_id

    def made_by(self) -> dict[str, Any]:
        """What decides the scan file: settings and source, for its provenance."""
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
    """Writes a scan file for every scan of a cohort; complete ones are kept.

    Raises:
        ValueError: If the source holds no scan, or `scans` was made with other settings.
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
        if overwrite or not complete(task)
    ]
    _, failures = steps.map_scans(
        prepare, tasks, workers=workers, scheduler=scheduler, label="preprocess"
    )
    steps.write_failures(failures, scans / "skipped.csv")
    made = len(tasks) - len(failures)
    return steps.Report(
        f"wrote {scans}: {files.count_text(made, 'scan')}, "
        f"{len(found) - len(tasks)} already there, {len(failures)} skipped, "
        f"{files.size_text(folder_bytes(scans))}",
        failures,
    )


def complete(task: PrepareTask) -> bool:
    """Whether a task's scan file exists and was made of the same source alike.

    Raises:
        ValueError: If it was made otherwise; it is not replaced unasked.
    """
    path = scan_path(task.scans, task.scan_id)
    if not path.exists():
        return False
    try:
        found = flat(read_provenance(path))
    except ScanError:
        return False
    changed = {
        name: (found.get(name), value)
        for name, value in flat(task.made_by()).items()
        if found.get(name) != value
    }
    if changed:
        raise ValueError(
            f"{path} was made otherwise (found, expected): {changed}; use --overwrite or "
            "another --scans"
        )
    return True


def flat(record: Mapping[str, Any]) -> dict[str, Any]:
    """A provenance record with the settings of the mask beside its other facts."""
    return {**record, **(record.get("mask") or {}), "mask": None}


def source_sha256(source: ScanSource) -> str:
    """Tells sources apart: by name and size of the images, content of the annotations."""
    lines = [f"{path.name} {path.stat().st_size}" for path in sorted(source.paths)]
    marks = [*source.annotations, *([source.lung] if source.lung else [])]
    lines += [files.sha256(path) for path in marks if path.is_file()]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def prepare(task: PrepareTask) -> str:
    """Reads one scan, finds its lungs and writes its file; the scan id."""
    import cohorts

    try:
        scan = cohorts.cohort(task.cohort).load_scan(task.source, repair=task.repair)
        scan = with_lungs(scan, task.mask)
    except ScanError as error:
        raise ScanError(without_folders(str(error), task.source)) from error
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
