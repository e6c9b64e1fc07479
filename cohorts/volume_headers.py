"""Checks that the header of a NIfTI, MetaImage or NRRD file states the geometry.

SimpleITK and nibabel replace a missing or impossible spacing by 1 mm and missing axes by
those of LPS, and say nothing. docs/data.md lists what is found in headers and what happens.
"""

import logging
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ct.scan import ScanError

log = logging.getLogger(__name__)

METAIMAGE_FIELD = re.compile(r"^[ \t]*(\w+)\s*[=:][ \t]*([^\r\n]*)", re.M)
NRRD_FIELD = re.compile(r"^([^#:=\r\n][^:=\r\n]*):(?!=)[ \t]*([^\r\n]*)", re.M)

NRRD_SPACES = {
    *("right-anterior-superior", "ras"),
    *("left-anterior-superior", "las"),
    *("left-posterior-superior", "lps"),
}
"""Values of NRRD's `space` that say which way is left; SimpleITK reads others as LPS."""

MM = {"", "mm", "millimeter", "millimeters", "millimetre", "millimetres"}

UNKNOWN_UNITS = {"", "?"}
"""Values of MetaImage's DistanceUnits that leave the unit open; MetaIO then means mm."""

NIFTI_UNITS = {0: "unknown", 1: "metres", 2: "mm", 3: "micrometres"}
"""Meanings of the lowest three bits of NIfTI's xyzt_units."""

LIST_COLUMNS = "the columns spacing_z_mm,spacing_y_mm,spacing_x_mm of a CSV list"

FIX = f"correct the header, or give the spacing in {LIST_COLUMNS}"

SAME_PLACE_VOXELS = 1.0
"""Largest distance at the far end of an axis between two spacings of one header."""


def text_fields(start: bytes) -> dict[str, str]:
    """Returns the fields of a MetaImage or NRRD header by name.

    Names of NRRD fields lose capitals and spaces, which do not count there.

    Args:
        start: First bytes of the file, with the whole header.
    """
    text = start.decode("latin-1")
    if not start.startswith(b"NRRD"):
        text = re.split(r"^\s*ElementDataFile", text, maxsplit=1, flags=re.M | re.I)[0]
        return {name: value.strip() for name, value in METAIMAGE_FIELD.findall(text)}
    text = re.split(r"\r?\n\r?\n", text, maxsplit=1)[0]
    return {
        name.replace(" ", "").lower(): value.strip()
        for name, value in NRRD_FIELD.findall(text)
    }


def numbers(text: str) -> list[float]:
    """Returns the numbers in a header field; NaN for words that are no numbers."""
    found = []
    for word in re.split(r"[\s,()]+", text.strip(" \t()")):
        try:
            found.append(float(word))
        except ValueError:
            found.append(math.nan)
    return found


def possible(steps: Sequence[float]) -> bool:
    """Returns True if these are three or more finite numbers above 0."""
    return len(steps) >= 3 and all(0 < step < math.inf for step in steps)


def spacing_of_metaimage(
    fields: Mapping[str, str], path: Path, spacing_mm: Sequence[float] | None
) -> Sequence[float] | None:
    """Checks a MetaImage header and returns the list's spacing if the header has none.

    Args:
        fields: Header fields; see `text_fields`.
        path: The file, for messages.
        spacing_mm: (z, y, x) of the CSV list, or None.

    Returns:
        (z, y, x) mm in place of the file's spacing, or None to use that of the file.

    Raises:
        ScanError: If the spacing, the unit or the orientation is missing or impossible, or
            a linear function of the stored values is not the identity.
    """
    unit = fields.get("DistanceUnits", "").lower()
    if unit not in MM | UNKNOWN_UNITS:
        raise ScanError(
            f"{path}: DistanceUnits is {unit}; expected mm; convert ElementSpacing and "
            "Offset to mm"
        )
    _check_metaimage_values(fields, path)
    _check_metaimage_axes(fields, path)
    if not {"Offset", "Origin", "Position"} & set(fields):
        _warn_of_origin(path, "Offset")
    name = next((n for n in ("ElementSpacing", "ElementSize") if n in fields), None)
    if name is None:
        if spacing_mm is not None:
            _warn_of_list_spacing(path, "ElementSpacing", spacing_mm)
            return spacing_mm
        raise ScanError(
            f"{path}: the header has no ElementSpacing; expected three numbers above 0 in "
            f"mm; {FIX}"
        )
    if not possible(numbers(fields[name])):
        raise ScanError(
            f"{path}: {name} is {fields[name]!r}; expected three numbers above 0 in mm; "
            "correct the header"
        )
    if name == "ElementSize":
        log.warning(
            "%s: the header has no ElementSpacing; using ElementSize, %s mm (x, y, z)",
            path,
            fields[name],
        )
    return None


def _check_metaimage_values(fields: Mapping[str, str], path: Path) -> None:
    """Raises ScanError if stored values have to be converted, which ITK does not do."""
    for end, plain in (("Slope", 1.0), ("Offset", 0.0)):
        name = f"ElementToIntensityFunction{end}"
        if numbers(fields.get(name, f"{plain}")) != [plain]:
            raise ScanError(
                f"{path}: {name} is {fields[name]!r}; expected {plain:g} or none, because "
                "most programs ignore it; apply it to the values and write the file again"
            )


def _check_metaimage_axes(fields: Mapping[str, str], path: Path) -> None:
    """Checks that a MetaImage without a matrix may have the axes of LPS."""
    if {"TransformMatrix", "Rotation", "Orientation"} & set(fields):
        return
    stated = fields.get("AnatomicalOrientation", "???")
    if stated.upper() == "RAI":  # from right, front and feet: the axes of LPS
        return
    if stated.strip("?"):
        raise ScanError(
            f"{path}: AnatomicalOrientation is {stated!r} and there is no TransformMatrix; "
            "expected RAI, because most programs ignore the first and take the axes to run "
            "to left, back and head; write a TransformMatrix"
        )
    log.warning(
        "%s: the header has no TransformMatrix; the axes are taken to run to the "
        "patient's left, back and head, MetaImage's default",
        path,
    )


def spacing_of_nrrd(
    fields: Mapping[str, str], path: Path, spacing_mm: Sequence[float] | None
) -> Sequence[float] | None:
    """Checks an NRRD header and returns the list's spacing if the header has none.

    With the list's spacing, the axes run to the patient's left, back and head.

    Args:
        fields: Header fields; see `text_fields`.
        path: The file, for messages.
        spacing_mm: (z, y, x) of the CSV list, or None.

    Returns:
        (z, y, x) mm in place of the file's geometry, or None to use that of the file.

    Raises:
        ScanError: If the spacing, the unit or the orientation is missing or impossible.
    """
    vectors = fields.get("spacedirections")
    if vectors is None:
        if "spacings" in fields and not possible(numbers(fields["spacings"])):
            raise ScanError(
                f"{path}: spacings is {fields['spacings']!r}; expected three numbers above "
                "0 in mm; correct the header"
            )
        if spacing_mm is not None:
            _warn_of_list_spacing(path, "space directions", spacing_mm)
            return spacing_mm
        raise ScanError(
            f"{path}: the header has no space directions (spacings: "
            f"{fields.get('spacings', 'none')}); expected three vectors in mm, because "
            "spacing, left and right are unknown without them; write them, or give the "
            f"spacing in {LIST_COLUMNS} if the axes run to left, back and head"
        )
    _check_nrrd_space(fields, path)
    found = [numbers(v) for v in re.findall(r"\([^)]*\)", vectors)]
    whole = [len(v) == 3 and all(map(math.isfinite, v)) and any(v) for v in found]
    if len(found) != 3 or not all(whole):
        raise ScanError(
            f"{path}: space directions is {vectors!r}; expected three vectors of three "
            "numbers in mm; correct the header"
        )
    if "spaceorigin" not in fields:
        _warn_of_origin(path, "space origin")
    return None


def _check_nrrd_space(fields: Mapping[str, str], path: Path) -> None:
    """Checks that an NRRD names the directions of its space, and mm as its unit."""
    space = fields.get("space", "")
    if space.lower() not in NRRD_SPACES:
        raise ScanError(
            f"{path}: space is {space or 'not stated'}; expected left-posterior-superior, "
            "right-anterior-superior or left-anterior-superior, because left and right are "
            "unknown without it; write one of them"
        )
    units = re.findall(r'"([^"]*)"', fields.get("spaceunits", ""))
    if any(unit.strip().lower() not in MM for unit in units):
        raise ScanError(
            f"{path}: space units is {', '.join(units)}; expected mm; convert space "
            "directions and space origin to mm"
        )


def check_nifti(
    stored: Any, shape: Sequence[int], path: Path, spacing_mm: Sequence[float] | None
) -> Sequence[float] | None:
    """Checks a NIfTI header and returns the list's spacing if the header has none.

    Args:
        stored: nibabel header as stored, before nibabel repairs it.
        shape: Shape of the array.
        path: The file, for messages.
        spacing_mm: (z, y, x) of the CSV list, or None.

    Returns:
        (z, y, x) mm in place of pixdim, or None to use the geometry of the file.

    Raises:
        ScanError: If the spacing, the unit, the scale of the values or the orientation is
            missing, impossible or contradictory.
    """
    _check_nifti_units(stored, path)
    _check_nifti_scale(stored, path)
    steps = [float(step) for step in stored["pixdim"][1:4]]
    shown = " x ".join(f"{step:g}" for step in steps)
    if stored["sform_code"] <= 0 and stored["qform_code"] <= 0:
        raise ScanError(
            f"{path}: neither sform nor qform gives the orientation (both codes are 0); "
            "expected one, because left and right are unknown without it"
        )
    if stored["sform_code"] > 0:
        rows = np.array([stored[f"srow_{axis}"][:3] for axis in "xyz"], np.float64)
        _compare_spacings(np.linalg.norm(rows, axis=0), steps, shape, path)
        return None
    if possible(steps):
        return None
    if spacing_mm is not None:
        _warn_of_list_spacing(path, "possible pixdim", spacing_mm)
        return spacing_mm
    raise ScanError(
        f"{path}: pixdim is {shown}, and only the qform gives the geometry; expected three "
        f"numbers above 0 in mm; {FIX}"
    )


def _check_nifti_units(stored: Any, path: Path) -> None:
    code = int(stored["xyzt_units"]) & 7
    unit = NIFTI_UNITS.get(code, "no known unit")
    if unit not in ("mm", "unknown"):
        raise ScanError(
            f"{path}: xyzt_units is {code}, spacing in {unit}; expected mm; convert the "
            "affine and pixdim to mm and write code 2"
        )


def _check_nifti_scale(stored: Any, path: Path) -> None:
    """Raises ScanError if readers disagree on how to scale the stored values."""
    slope, offset = float(stored["scl_slope"]), float(stored["scl_inter"])
    scaled = slope != 0 and math.isfinite(slope)  # then nibabel checks the intercept
    if not scaled and math.isfinite(offset) and offset != 0:
        raise ScanError(
            f"{path}: scl_slope is {slope:g} and scl_inter {offset:g}; expected a slope, "
            "because some programs add the intercept and others ignore it; write slope 1 "
            "or intercept 0"
        )


def _compare_spacings(
    by_sform: np.ndarray, pixdim: Sequence[float], shape: Sequence[int], path: Path
) -> None:
    """Checks that pixdim does not contradict the sform, or says that it states nothing.

    nibabel takes the spacing from the sform, ITK from pixdim.
    """
    shown = [" x ".join(f"{s:.4g}" for s in steps) for steps in (by_sform, pixdim)]
    if not possible(pixdim):
        log.warning(
            "%s: pixdim is %s; using the spacing of the sform, %s mm",
            path,
            shown[1],
            shown[0],
        )
        return
    voxels = np.array(shape[:3]) - 1
    apart = float((voxels * np.abs(by_sform / np.array(pixdim) - 1)).max())
    if apart > SAME_PLACE_VOXELS:
        raise ScanError(
            f"{path}: the spacing is {shown[0]} mm by the sform and {shown[1]} mm by pixdim; "
            "expected them to agree, because some programs use one and some the other; "
            "correct the header"
        )


def _warn_of_list_spacing(
    path: Path, missing: str, spacing_mm: Sequence[float]
) -> None:
    shown = " x ".join(f"{step:g}" for step in spacing_mm)
    log.warning(
        "%s: the header has no %s; using the list's spacing, %s mm (z, y, x)",
        path,
        missing,
        shown,
    )


def _warn_of_origin(path: Path, field: str) -> None:
    log.warning(
        "%s: the header has no %s; the first voxel is put at 0, 0, 0 mm", path, field
    )
