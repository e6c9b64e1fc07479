"""Reads CT DICOM series from a folder in any layout, as HU in canonical orientation.

A series is accepted only if its headers describe one evenly spaced volume. Otherwise a
`ScanError` names the defect, where it is, and the `repair` that fixes it, if there is one:

    gaps        missing or unevenly spaced slices: interpolate linearly between neighbours
    duplicates  several sets of images at the same positions: keep the first set
    tilt        sheared stacks (gantry tilt): shift slices in-plane to straighten the stack

The source grid of a repaired series is the repaired grid.
"""

import logging
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cohorts.dicom_checks import check_neighbours, check_series, drop_duplicates
from cohorts.dicom_headers import (
    FIND_THREADS,
    SLICE_TAGS,
    Identity,
    acquisition_facts,
    identify,
    read_header,
    read_slices,
    sorted_slices,
)
from cohorts.dicom_volume import (
    fill_gaps,
    reversed_axes,
    stack_slices,
    straighten,
    z_of_sop,
)
from cohorts.plausible import check_field, check_hu
from cohorts.pseudonyms import is_anonymous, safe_patient_id
from ct import files, geometry
from ct.geometry import Grid
from ct.scan import ScanError, ScanSource

log = logging.getLogger(__name__)

REPAIRS = ("gaps", "duplicates", "tilt")
"""Defects that `read_series` can repair."""


@dataclass(frozen=True, eq=False)
class Series:
    """A CT series as a volume.

    Attributes:
        hu: (z, y, x) int16 HU, canonical.
        grid: Canonical grid of `hu`.
        source_grid: (column, row, slice) grid, the axis order of SimpleITK, dcm2niix and
            nnU-Net; the slice index increases along the slice normal.
        z_of_sop: Maps SOPInstanceUID to canonical z for single-frame axial series; else {}.
        acquisition: Technical facts; nothing about the patient.
    """

    hu: np.ndarray
    grid: Grid
    source_grid: Grid
    series_uid: str
    z_of_sop: dict[str, int]
    acquisition: dict[str, Any]


def find_scans(source: Path) -> list[ScanSource]:
    """Finds all CT series below a folder, sorted by SeriesInstanceUID; reads no pixels.

    Skips files that are not DICOM, objects that are not CT images (RTSTRUCT, SEG, reports)
    and localizers. A damaged file named *.dcm is added to every series in its folder, so
    that reading them fails instead of silently losing a slice.

    Raises:
        ScanError: If there is no CT series; the message lists what was found instead.
    """
    source = Path(source)
    identities = list(identify_files(source))
    groups = defaultdict(list)
    for identity in identities:
        if identity.ct_image and not identity.localizer:
            groups[identity.series_uid].append(identity)
    if not groups:
        raise ScanError(f"{source}: no CT series; {_inventory(identities)}")
    nameless = sum(is_anonymous(group[0].patient_id) for group in groups.values())
    if nameless:
        log.warning(
            "%s: %d of %d series have no PatientID of their own; each of their studies "
            "counts as a patient, so a person may be on both sides of a split",
            source,
            nameless,
            len(groups),
        )
    damaged = [i.path for i in identities if not i.series_uid]
    return [
        ScanSource(uid, safe_patient_id(group[0]), _series_paths(group, damaged))
        for uid, group in sorted(groups.items())
    ]


def read_series(
    paths: Iterable[Path],
    *,
    repair: Sequence[str] = (),
) -> Series:
    """Reads the files of one series.

    Args:
        paths: Files of the series, in any order.
        repair: Defects to repair instead of raising; see the module docstring.

    Raises:
        ScanError: If the series is not one regular CT volume.
        ValueError: If `repair` names an unknown repair.
    """
    check_repair(repair)
    slices = sorted_slices(read_slices(paths))
    if "duplicates" in repair:
        slices = drop_duplicates(slices)
    uid = slices[0].series_uid
    findings = check_series(slices)
    unmended = [f for f in findings if f.repair not in repair]
    if unmended:
        raise ScanError(f"series {uid}: " + "; ".join(map(str, unmended)))
    volume, slice_grid = stack_slices(slices)
    check_neighbours(volume, slices)
    if any(f.repair == "gaps" for f in findings):
        volume, slice_grid = fill_gaps(volume, slices)
    if any(f.repair == "tilt" for f in findings):
        volume, slice_grid = straighten(volume, slice_grid)
    hu, grid = geometry.to_canonical(volume, slice_grid.affine)
    check_field(grid, f"series {uid}")
    check_hu(hu, f"series {uid}")
    header = read_header(slices[0].path, SLICE_TAGS)
    return Series(
        hu=hu,
        grid=grid,
        source_grid=reversed_axes(slice_grid),
        series_uid=uid,
        z_of_sop=z_of_sop(slices, grid),
        acquisition=acquisition_facts(header),
    )


def check_repair(repair: Sequence[str]) -> None:
    """Raises ValueError if `repair` names an unknown repair."""
    unknown = sorted(set(repair) - set(REPAIRS))
    if unknown:
        raise ValueError(f"repair {unknown}: expected any of {', '.join(REPAIRS)}")


def identify_files(folder: Path) -> Iterator[Identity]:
    """Identifies every DICOM file below a folder, by path; reads headers only."""
    if not folder.is_dir():
        raise ScanError(f"{folder}: no such folder; expected a folder of DICOM files")
    with ThreadPoolExecutor(FIND_THREADS) as threads:
        identified = threads.map(identify, files.files_below(folder))
        yield from (identity for identity in identified if identity is not None)


def _series_paths(
    group: Sequence[Identity], damaged: Sequence[Path]
) -> tuple[Path, ...]:
    paths = [identity.path for identity in group]
    folders = {path.parent for path in paths}
    return tuple(
        sorted([*paths, *(path for path in damaged if path.parent in folders)])
    )


def _inventory(identities: Sequence[Identity]) -> str:
    if not identities:
        return (
            "found no DICOM file; expected CT images with DICM at byte 128 (for NIfTI, "
            "NRRD and other volumes, or a CSV list, use infer.py or preprocess.py "
            "--cohort nifti)"
        )
    kinds = Counter(
        "damaged or without a SeriesInstanceUID of digits and dots"
        if not i.series_uid
        else "CT localizer"
        if i.localizer
        else i.modality
        for i in identities
    )
    found = ", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items()))
    return f"found {len(identities)} DICOM files ({found}), expected CT images"
