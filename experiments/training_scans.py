"""Writes training_scans.csv into older runs, which lack it, from their training scans.

    python -m experiments.training_scans weights/* --folder DATA

experiments/training_scans.csv says where in DATA the scan of a training patient is. A run
gets a row for every scan found there of a patient whom its weights were trained on, so that
infer.py and evaluate.py recognise the scan under another name. Runs of train.py have the
file from the start.
"""

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro

import steps
from cohorts import nifti
from ct.fingerprint import hu_sha256
from training import runs

LIST = Path(__file__).with_suffix(".csv")


@dataclass(frozen=True)
class Arguments:
    """Runs, and the scans they were trained on."""

    run_dirs: tyro.conf.Positional[tuple[Path, ...]]
    """Run directories."""
    folder: Path
    """Folder of the training scans."""
    scans: Path = LIST
    """CSV list with columns patient_id and path, relative to `folder`."""


def run_step(arguments: Arguments) -> steps.Report:
    """Writes training_scans.csv into every run directory.

    Raises:
        ValueError: If a listed scan is missing, unusable, or not the only one at its path.
    """
    known = read_marks(arguments.scans, arguments.folder)
    counts = []
    for run_dir in arguments.run_dirs:
        rows = rows_of(run_dir, known)
        runs.write_training_scans(run_dir, rows)
        counts.append(f"{run_dir.name} {len(rows)}")
    return steps.Report(f"wrote {runs.TRAINING_SCANS_CSV}, scans: {', '.join(counts)}")


def read_marks(scans: Path, folder: Path) -> dict[str, dict[str, str]]:
    """Reads the listed scans and returns the row of each patient."""
    with scans.open(newline="", encoding="utf-8") as file:
        listed = {
            row["patient_id"]: folder / row["path"] for row in csv.DictReader(file)
        }
    return {patient: marks_of(patient, path) for patient, path in listed.items()}


def marks_of(patient_id: str, path: Path) -> dict[str, str]:
    """Reads the only scan at a path and returns its row."""
    found = nifti.find_scans(path)
    if len(found) != 1:
        raise ValueError(f"{path}: {len(found)} scans; expected one of {patient_id}")
    scan = nifti.load_scan(found[0])
    return {
        "patient_id": patient_id,
        "series_uid": scan.series_uid,
        "hu_sha256": hu_sha256(scan.hu),
    }


def rows_of(run_dir: Path, known: Mapping[str, dict[str, str]]) -> list[dict[str, str]]:
    """Returns the rows of the patients that a run's weights were trained on."""
    trained = runs.training_patients_of(run_dir / "best.weights.h5")
    return [known[patient] for patient in trained if patient in known]


def main(argv: Sequence[str] | None = None) -> None:
    steps.run(run_step, Arguments, argv=argv)


if __name__ == "__main__":
    main()
