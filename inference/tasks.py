"""Scans to segment: from a split, a folder, a file or a list."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import config
import steps
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
class Task:
    """One scan to segment: a scan file, or a source that still has to be read."""

    scan_id: str
    patient_id: str
    part: str
    source: Path | ScanSource
    slices: dict[str, list[int]] = field(default_factory=dict)
    """Slices (z) in each part; only of a split by slice."""


def without_failures(
    tasks: Sequence[Task], failures: Sequence[steps.Failure]
) -> list[Task]:
    failed = {failure.scan_id for failure in failures}
    return [task for task in tasks if task.scan_id not in failed]


def tasks_of_parts(
    scans_dir: Path, split: dict[str, Any], parts: Sequence[str]
) -> tuple[list[Task], list[steps.Failure]]:
    """The scan files of the patients in `parts` of a split, and those not readable."""
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
            "split; choose other --parts, or the --scans the run was made from"
        )
    return tasks, unreadable


def tasks_of_input(path: Path) -> list[Task]:
    """The CT scans a person names: DICOM folder, volume, folder of volumes, CSV list."""
    from cohorts import nifti

    return tasks_of_sources(nifti.find_scans(path))


def tasks_of_list(path: Path) -> tuple[list[Task], list[steps.Failure]]:
    """The scans of a CSV list, and its rows that cannot be used."""
    from cohorts import lists

    sources, refused = lists.read_usable(path)
    failures = [steps.Failure(line, reason) for line, reason in refused.items()]
    return tasks_of_sources(sources), failures


def tasks_of_sources(sources: Sequence[ScanSource]) -> list[Task]:
    return [Task(source.scan_id, source.patient_id, "", source) for source in sources]


def read_ct(task: Task) -> Scan:
    """The scan of a task as it comes, with lung labels or without."""
    if isinstance(task.source, Path):
        return read_scan(task.source)
    from cohorts import nifti

    try:
        return nifti.load_scan(task.source)
    except ScanError as error:
        raise ScanError(without_folders(str(error), task.source)) from error


def read_with_lungs(task: Task, mask: config.LungMask) -> Scan:
    """The scan, with lung labels made by the run's own settings if it has none."""
    scan = read_ct(task)
    if isinstance(task.source, Path):
        return scan
    return with_lungs(scan, mask)


def warn_of_leaks(tasks: Sequence[Task], seen: Mapping[str, Sequence[str]]) -> None:
    """Names the patients that one of the runs, by directory, was trained on."""
    for task in tasks:
        names = runs.names_of(task.scan_id, task.patient_id)
        found = [
            Path(run).name
            for run, patients in seen.items()
            if not names.isdisjoint(patients)
        ]
        if found:
            log.warning(
                "patient %s was trained on (by %s); the result says nothing of new patients",
                task.patient_id,
                ", ".join(found),
            )
