"""Reads the files of one CT DICOM series as HU in canonical orientation.

A series is accepted if its headers describe one evenly spaced volume; whatever else is odd
becomes a warning. Otherwise a `ScanError` names the defect, where it is, and the `repair`
that fixes it, if there is one:

    gaps        missing or unevenly spaced slices: interpolate linearly between neighbours
    duplicates  several sets of images at the same positions: keep the first set
    tilt        sheared stacks (gantry tilt): shift slices in-plane to straighten the stack

The source grid of a repaired series is the repaired grid.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cohorts.dicom_checks import (
    Defect,
    check_pixels,
    check_series,
    drop_duplicates,
    without_scouts,
)
from cohorts.dicom_headers import SLICE_TAGS, acquisition_facts, read_header
from cohorts.dicom_oddities import find_oddities
from cohorts.dicom_slices import Slice, read_slices, sorted_slices
from cohorts.dicom_volume import (
    drop_copies,
    fill_gaps,
    reversed_axes,
    stack_slices,
    straighten,
    z_of_sop,
)
from cohorts.plausible import check_field, check_hu
from ct import geometry
from ct.geometry import Grid
from ct.scan import ScanError

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
        series_uid: A SeriesInstanceUID that can name a file; "" if the headers have none.
        z_of_sop: Maps SOPInstanceUID to canonical z for single-frame axial series; else {}.
        acquisition: Technical facts; nothing about the patient.
        warnings: What is odd about the series without making geometry or HU wrong.
    """

    hu: np.ndarray
    grid: Grid
    source_grid: Grid
    series_uid: str
    z_of_sop: dict[str, int]
    acquisition: dict[str, Any]
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class Plan:
    """The images that form the volume of a series, sorted; known without most pixels."""

    slices: list[Slice]
    defects: list[Defect]
    warnings: tuple[str, ...]

    @property
    def name(self) -> str:
        """Text for messages: the series, by its UID."""
        return f"series {self.slices[0].series_uid or 'without uid'}"


def plan_series(paths: Iterable[Path], *, repair: Sequence[str] = ()) -> Plan:
    """Reads the headers of a series and chooses the images of its volume.

    Raises:
        ScanError: If a file cannot be read or a header lacks what a volume needs.
    """
    kept, scouts = without_scouts(read_slices(paths))
    slices, copies = drop_copies(sorted_slices(kept))
    if "duplicates" in repair:
        slices = drop_duplicates(slices)
    defects = check_series(slices)
    unmended = [f for f in defects if f.repair not in repair]
    odd = [] if unmended else find_oddities(slices)
    return Plan(slices, defects, (*scouts, *copies, *odd))


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
    plan = plan_series(paths, repair=repair)
    slices = plan.slices
    unmended = [f for f in plan.defects if f.repair not in repair]
    if unmended:
        raise ScanError(f"{plan.name}: " + "; ".join(map(str, unmended)))
    volume, slice_grid = stack_slices(slices)
    blank = check_pixels(volume, slices)
    if any(f.repair == "gaps" for f in plan.defects):
        volume, slice_grid = fill_gaps(volume, slices)
    if any(f.repair == "tilt" for f in plan.defects):
        volume, slice_grid = straighten(volume, slice_grid)
    hu, grid = geometry.to_canonical(volume, slice_grid.affine)
    check_field(grid, plan.name)
    check_hu(hu, plan.name)
    header = read_header(slices[0].path, SLICE_TAGS)
    return Series(
        hu=hu,
        grid=grid,
        source_grid=reversed_axes(slice_grid),
        series_uid=slices[0].series_uid,
        z_of_sop=z_of_sop(slices, grid),
        acquisition=acquisition_facts(header),
        warnings=(*plan.warnings, *blank),
    )


def check_repair(repair: Sequence[str]) -> None:
    """Raises ValueError if `repair` names an unknown repair."""
    unknown = sorted(set(repair) - set(REPAIRS))
    if unknown:
        raise ValueError(f"repair {unknown}: expected any of {', '.join(REPAIRS)}")
