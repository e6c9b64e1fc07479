"""Finds the CT DICOM series in a folder of any layout, and reports what can be read.

Example:
    python -m cohorts.dicom FOLDER

prints a row per series: modality, slices, spacing, whether it is read, the --repair that
helps, and why it is refused. `read_series` reads one series; see `cohorts.dicom_read`.
"""

import logging
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import tyro

from cohorts.dicom_checks import few
from cohorts.dicom_headers import Identity, hashed_id, identify
from cohorts.dicom_read import (
    REPAIRS,
    Plan,
    Series,
    check_repair,
    plan_series,
    read_series,
)
from cohorts.dicom_slices import FIND_THREADS, positions_along_normal_mm, slice_normal
from cohorts.pseudonyms import is_anonymous, safe_patient_id
from cohorts.zipped import extracted, is_zip
from ct import files
from ct.scan import ScanError, ScanSource, without_folders

__all__ = [
    "REPAIRS",
    "Row",
    "Series",
    "best_series",
    "check_repair",
    "find_image",
    "find_scans",
    "identify_files",
    "inspect",
    "read_series",
]

log = logging.getLogger(__name__)

AXIAL_COSINE = 0.9
"""Smallest z of the unit slice normal of images that count as axial."""


@dataclass(frozen=True)
class Row:
    """Result of `inspect` for one series.

    Attributes:
        series: SeriesInstanceUID, its hash if it is no UID, or "" for damaged files.
        slices: Number of images.
        spacing_mm: (z, y, x) of the volume, "" if it is not read.
        verdict: ok, ok with warnings, or refused.
        repair: Repairs with which it is read, "" if none helps or is needed.
        reason: The warnings, or why it is refused.
    """

    series: str
    modality: str
    slices: int
    spacing_mm: str
    verdict: str
    repair: str = ""
    reason: str = ""


@dataclass(frozen=True)
class Arguments:
    """Options of python -m cohorts.dicom."""

    folder: tyro.conf.Positional[Path]
    """Folder, or zip, with DICOM series at any depth."""


def find_scans(source: Path) -> list[ScanSource]:
    """Finds all CT series below a folder, sorted by SeriesInstanceUID; reads no pixels.

    Skips files that are not DICOM, objects that are not CT images (RTSTRUCT, SEG, reports)
    and localizers. A damaged file named *.dcm is added to every series in its folder, so
    that reading them fails instead of silently losing a slice. So is an image without
    SeriesInstanceUID, unless its folder holds no other series.

    Raises:
        ScanError: If there is no CT series; the message lists what was found instead.
    """
    source = Path(source)
    identities = list(identify_files(source))
    groups = _series_of(identities)
    if not groups:
        raise ScanError(f"{source}: no CT series; {_inventory(identities)}")
    nameless = sum(is_anonymous(group[0].patient_id) for group in groups.values())
    if nameless:
        log.warning(
            "%d of %d series have no PatientID of their own; each of their studies "
            "counts as a patient, so a person may be on both sides of a split",
            nameless,
            len(groups),
        )
    damaged = [i.path for i in identities if not i.series_uid]
    return [
        ScanSource(
            uid,
            safe_patient_id(replace(group[0], series_uid=uid)),
            _series_paths(group, damaged),
        )
        for uid, group in sorted(groups.items())
    ]


def find_image(path: Path) -> ScanSource | None:
    """Returns the scan of a single CT image file; None if the file is something else."""
    found = identify(path)
    if found is None or not found.ct_image:
        return None
    uid = found.series_uid or hashed_id(path.name)
    patient_id = safe_patient_id(replace(found, series_uid=uid))
    return ScanSource(uid, patient_id, (path,))


def identify_files(folder: Path) -> Iterator[Identity]:
    """Identifies every DICOM file below a folder, by path; reads headers only."""
    if not folder.is_dir():
        found = "is a file" if folder.is_file() else "no such folder"
        raise ScanError(
            f"{folder}: {found}; expected a folder of DICOM files; a volume or CSV list is "
            "read with --cohort nifti (scripts: COHORT=nifti), and scripts/0_phantoms.sh "
            "makes phantoms"
        )
    with ThreadPoolExecutor(FIND_THREADS) as threads:
        identified = threads.map(identify, files.files_below(folder))
        yield from (identity for identity in identified if identity is not None)


def _series_of(identities: Sequence[Identity]) -> dict[str, list[Identity]]:
    """Groups CT images by series; those without UID by folder, if it has no other series."""
    groups = defaultdict(list)
    nameless = defaultdict(list)
    for identity in identities:
        if identity.ct_image and not identity.localizer:
            if identity.series_uid:
                groups[identity.series_uid].append(identity)
            else:
                nameless[identity.path.parent].append(identity)
    folders = {identity.path.parent for group in groups.values() for identity in group}
    for folder, group in nameless.items():
        if folder not in folders:
            names = [group[0].study_uid, *sorted(i.path.name for i in group)]
            groups[hashed_id("\n".join(names))] = group
    return dict(groups)


def _series_paths(
    group: Sequence[Identity], damaged: Sequence[Path]
) -> tuple[Path, ...]:
    paths = {identity.path for identity in group}
    folders = {path.parent for path in paths}
    return tuple(sorted(paths | {path for path in damaged if path.parent in folders}))


def _inventory(identities: Sequence[Identity]) -> str:
    if not identities:
        return (
            "found no DICOM file; expected CT images with DICM at byte 128 (for NIfTI, "
            "NRRD and other volumes, or a CSV list, use infer.py or preprocess.py "
            "--cohort nifti)"
        )
    kinds = Counter(
        "CT localizer"
        if i.localizer
        else "damaged or unreadable"
        if not i.series_uid
        else i.modality
        for i in identities
    )
    found = ", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items()))
    return f"found {len(identities)} DICOM files ({found}), expected CT images"


def best_series(found: Sequence[ScanSource]) -> ScanSource:
    """Chooses one of several series by their headers.

    Prefers series that are read without repair, then axial ones, original ones, those of
    more images and those of thinner slices; among equals, the first UID.
    """
    return max(sorted(found, key=lambda s: s.scan_id), key=_quality)


def _quality(source: ScanSource) -> tuple[float, ...]:
    try:
        plan = plan_series(source.paths)
    except ScanError:
        return (0.0,)
    slices = plan.slices
    axial = abs(slice_normal(slices[0])[2]) >= AXIAL_COSINE
    derived = sum("ORIGINAL" not in item.image_type for item in slices)
    return (
        1.0 if plan.defects else 2.0,
        float(axial),
        float(derived <= few(slices)),
        float(len(slices)),
        -_step_mm(plan),
    )


def _step_mm(plan: Plan) -> float:
    """Returns the median distance between slices in mm; 0 for a single one."""
    gaps_mm = np.diff(positions_along_normal_mm(plan.slices))
    return float(np.median(gaps_mm)) if len(gaps_mm) else 0.0


def inspect(folder: Path) -> list[Row]:
    """Reads every series below a folder, or in a zip, and says what is odd or wrong about each.

    Returns:
        A row per CT series, with its pixels read, and one per modality of other series
        and of damaged files.

    Raises:
        ScanError: If there is no such folder.
    """
    if is_zip(Path(folder)):
        with extracted(Path(folder)) as inside:
            return inspect(inside)
    identities = list(identify_files(Path(folder)))
    groups = _series_of(identities)
    damaged = [i.path for i in identities if not i.series_uid]
    rows = [
        _row_of(ScanSource(uid, "", _series_paths(group, damaged)))
        for uid, group in sorted(groups.items())
    ]
    taken = {identity.path for group in groups.values() for identity in group}
    others: dict[tuple[str, str], int] = Counter(
        _other_kind(identity) for identity in identities if identity.path not in taken
    )
    return rows + [
        Row(uid, modality, count, "", "refused", "", _other_reason(uid, modality))
        for (uid, modality), count in sorted(others.items())
    ]


def _other_kind(identity: Identity) -> tuple[str, str]:
    if identity.localizer:
        return identity.series_uid, "CT localizer"
    return identity.series_uid, identity.modality if identity.series_uid else ""


def _other_reason(uid: str, modality: str) -> str:
    if not uid:
        return "damaged or unreadable files; restore them from their source"
    return f"{modality}; expected CT images"


def _row_of(source: ScanSource) -> Row:
    """Returns the row of a CT series, after reading it as `read_series` does."""
    row = Row(source.scan_id, "CT", len(source.paths), "", "refused")
    try:
        read = read_series(source.paths)
    except ScanError as error:
        reason = without_folders(str(error), source)
        reason = reason.removeprefix(f"series {source.scan_id}: ")
        return replace(row, reason=reason, repair=_helping_repair(source))
    return replace(
        row,
        spacing_mm=" x ".join(f"{mm:.4g}" for mm in read.grid.spacing_mm),
        verdict="ok with warnings" if read.warnings else "ok",
        reason="; ".join(read.warnings),
    )


def _helping_repair(source: ScanSource) -> str:
    """Returns the repairs with which a refused series is read, "" if none helps."""
    try:
        read_series(source.paths, repair=REPAIRS)
        plan = plan_series(source.paths)
        needed = [defect.repair for defect in plan.defects]
        if "duplicates" in needed:  # hides what else is wrong
            plan = plan_series(source.paths, repair=["duplicates"])
            needed += [defect.repair for defect in plan.defects]
    except ScanError:
        return ""
    return " ".join(name for name in REPAIRS if name in needed)


def table_text(rows: Sequence[Row]) -> str:
    """Returns rows as a table in text, with columns as wide as their longest entry."""
    cells = [tuple(Row.__dataclass_fields__), *(_cells(row) for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = (
        "  ".join(
            text.ljust(width) for text, width in zip(line, widths, strict=True)
        ).rstrip()
        for line in cells
    )
    return "\n".join(lines)


def _cells(row: Row) -> tuple[str, ...]:
    return tuple(str(getattr(row, name)) for name in Row.__dataclass_fields__)


def main(argv: Sequence[str] | None = None) -> None:
    """Prints the table of a folder; exits with 1 if there is no such folder."""
    arguments = tyro.cli(
        Arguments, args=argv, prog="python -m cohorts.dicom", description=__doc__
    )
    try:
        sys.stdout.write(table_text(inspect(arguments.folder)) + "\n")
    except ScanError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
