"""Scans to segment, taken from a split, a folder, a file or a list."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import config
import steps
from ct.fingerprint import hu_sha256
from ct.scan import (
    Scan,
    ScanError,
    ScanSource,
    read_scan,
    scan_files,
    scan_identity,
    without_folders,
)
from dataset.split import patients_of_part, slices_of_part
from lungs.classical import with_lungs
from training import runs

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Reading:
    """Options for choosing and reading DICOM series."""

    repair: tuple[config.Repair, ...] = ()
    """Defects of DICOM series to repair; a series with any other defect is refused."""
    series: str = ""
    """SeriesInstanceUID of the series to segment if a folder holds several. Without it,
    --input segments all, and a row of --csv_file the best: not refused, axial, original, of
    most images, thinnest. `python -m cohorts.dicom FOLDER` lists them."""

    def record(self) -> dict[str, Any]:
        """Returns the options as they are recorded with the results."""
        return {"repair": list(self.repair), "series": self.series}


AS_IT_IS = Reading()


@dataclass(frozen=True)
class Task:
    """A scan to segment: a scan file, or a source that still has to be converted."""

    scan_id: str
    patient_id: str
    part: str
    source: Path | ScanSource
    slices: dict[str, list[int]] = field(default_factory=dict)
    """Slice indices (z) by part; only for a split by slice."""
    warnings: tuple[str, ...] | None = None
    """Oddities of the source; None until it is read."""
    nodules_searched: str = ""
    """Extent of the search for nodules in the lungs: yes, partly, no, or "" if unknown."""
    unmatched: dict[str, Sequence[str]] = field(default_factory=dict)
    """Names of training patients by run, to compare with the scan when it is read; see
    `warn_of_leaks`."""


def without_failures(
    tasks: Sequence[Task], failures: Sequence[steps.Failure]
) -> list[Task]:
    failed = {failure.scan_id for failure in failures}
    return [task for task in tasks if task.scan_id not in failed]


def tasks_of_parts(
    scans_dir: Path, split: dict[str, Any], parts: Sequence[str]
) -> tuple[list[Task], list[steps.Failure]]:
    """Lists the scan files of the patients in `parts` of a split, and unreadable files.

    Raises:
        ValueError: If there is no such scan file.
    """
    if not scans_dir.is_dir():
        raise FileNotFoundError(
            f"no folder {scans_dir}; give a CT with --input or --csv_file, or make scan files "
            "with preprocess.py"
        )
    part_of = {
        patient: part for part in parts for patient in patients_of_part(split, part)
    }
    slices = {part: slices_of_part(split, part) for part in parts if split["leaks"]}
    tasks, unreadable = [], []
    for path in scan_files(scans_dir):
        try:
            patient_id, scan_id = scan_identity(path)
        except ScanError as error:
            unreadable.append(steps.Failure(path.stem, str(error)))
            continue
        own = {part: s[scan_id] for part, s in slices.items() if scan_id in s}
        if split["leaks"] and own:
            tasks.append(Task(scan_id, patient_id, "", path, own))
        elif not split["leaks"] and patient_id in part_of:
            tasks.append(Task(scan_id, patient_id, part_of[patient_id], path))
    if not tasks:
        raise ValueError(
            f"{scans_dir} holds no scan of the {' or '.join(parts)} patients of the run's "
            "split; choose other --parts, or the --scans folder the run was trained from"
        )
    return tasks, unreadable


def tasks_of_input(path: Path, series: str = "") -> list[Task]:
    """Lists the CT scans of a DICOM folder, a volume, a folder of volumes or a CSV list.

    Args:
        path: The folder, file or list.
        series: SeriesInstanceUID of the only DICOM series to list, if there are several.

    Raises:
        ValueError: If there is no such series among several scans.
    """
    from cohorts import nifti

    found = nifti.find_scans(path)
    if series and path.suffix.lower() != ".csv":
        ids = [source.scan_id for source in found]
        found = [source for source in found if source.scan_id == series]
        if not found:
            raise ValueError(
                f"--series {series}: found only {', '.join(ids)}; expected one of these"
            )
    return tasks_of_sources(found)


def tasks_of_list(path: Path) -> tuple[list[Task], list[steps.Failure]]:
    """Lists the scans of a CSV list, and its rows that cannot be used."""
    from cohorts import lists

    sources, refused = lists.read_usable(path)
    failures = [steps.Failure(line, reason) for line, reason in refused.items()]
    return tasks_of_sources(sources), failures


def tasks_of_sources(sources: Sequence[ScanSource]) -> list[Task]:
    return [Task(source.scan_id, source.patient_id, "", source) for source in sources]


def read_ct(task: Task, reading: Reading = AS_IT_IS) -> Scan:
    """Reads the scan of a task, which may lack lung labels; logs its warnings.

    Also warns if a run that `warn_of_leaks` was given was trained on this very scan.
    """
    scan = _read(task, reading)
    for text in scan.warnings:
        log.warning("%s: %s", task.scan_id, text)
    warn_of_known_scan(scan, task.unmatched)
    return scan


def _read(task: Task, reading: Reading) -> Scan:
    if isinstance(task.source, Path):
        return read_scan(task.source)
    from cohorts import nifti

    try:
        return nifti.load_scan(
            task.source, repair=reading.repair, series=reading.series
        )
    except ScanError as error:
        raise ScanError(without_folders(str(error), task.source)) from error


def read_with_lungs(
    task: Task, mask: config.LungMask, reading: Reading = AS_IT_IS
) -> Scan:
    """Reads the scan of a task; segments the lungs of a source that comes without labels."""
    scan = read_ct(task, reading)
    if isinstance(task.source, Path):
        return scan
    return with_lungs(scan, mask)


def warn_of_leaks(tasks: Sequence[Task], seen: Mapping[str, Sequence[str]]) -> None:
    """Warns of every patient that one of the runs was trained on.

    A scan under another name can only be recognised once it is read, so the names of the
    other runs are kept in `Task.unmatched` for `read_ct`.

    Args:
        tasks: Scans to segment.
        seen: Training patients by run directory; see `runs.training_patients_of`.
    """
    for task in tasks:
        names = runs.names_of(task.scan_id, task.patient_id)
        found = _runs_that_saw(names, seen)
        if found:
            log.warning(
                "patient %s was trained on (by %s); the result does not hold for new patients",
                task.patient_id,
                ", ".join(Path(run).name for run in found),
            )
        task.unmatched.update({r: seen[r] for r in seen if r not in found})


def warn_of_known_scan(scan: Scan, seen: Mapping[str, Sequence[str]]) -> None:
    """Warns if a run was trained on this scan, by its series UID or its voxels.

    Args:
        scan: A scan.
        seen: Training patients by run directory.
    """
    if not any(seen.values()):
        return
    found = _runs_that_saw({scan.series_uid, hu_sha256(scan.hu)} - {""}, seen)
    if found:
        log.warning(
            "scan %s was trained on (by %s), under another name; the result does not hold for "
            "new patients",
            scan.scan_id,
            ", ".join(Path(run).name for run in found),
        )


def _runs_that_saw(names: set[str], seen: Mapping[str, Sequence[str]]) -> list[str]:
    return [run for run, patients in seen.items() if not names.isdisjoint(patients)]
