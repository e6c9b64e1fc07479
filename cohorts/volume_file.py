"""Reads NIfTI, MHD, MHA, NRRD and TIFF files as HU or labels, with their geometry."""

import re
import struct
import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path, PureWindowsPath
from typing import Any

import numpy as np

from cohorts import dicom_checks, dicom_volume, volume_headers
from ct import geometry, nifti_io
from ct.geometry import Grid
from ct.scan import AIR_HU, LEFT, RIGHT, ScanError

NIFTI_SUFFIXES = (".nii.gz", ".nii")
ITK_SUFFIXES = (".nrrd", ".nhdr", ".mha", ".mhd")
TIFF_SUFFIXES = (".tif", ".tiff")
SUFFIXES = NIFTI_SUFFIXES + ITK_SUFFIXES + TIFF_SUFFIXES
"""Suffixes of volume files."""

TIFF_ERRORS = (
    ValueError,
    KeyError,
    IndexError,
    ArithmeticError,
    RuntimeError,
    zlib.error,
    struct.error,
)
"""Exceptions that tifffile raises on a damaged file, beside its own TiffFileError."""

CHANNEL = "_0000"
"""nnU-Net's suffix of the first channel; CT is the only channel here."""

SAME_PLACE_VOXELS = 0.1
"""Largest allowed distance between the corners of a label volume and its image."""

MAX_SHEAR_DEG = dicom_checks.TILT_DEG
"""Largest deviation of axes from perpendicular; smaller ones are kept in the affine.

Direction cosines are often written with so few digits that they are not exactly
orthonormal; ITK rejects such files.
"""

MIN_STEP_MM = 0.01
"""Smallest spacing of a CT of a patient; a smaller one is in another unit or damaged."""

UNSAFE = re.compile(r"[^A-Za-z0-9._-]")
"""Characters of a file name that a scan id must not contain."""

DATA_FILE = re.compile(
    rb"(?:ElementDataFile[\s=:]*|^\s*data ?file\s*:\s*)([^\r\n]*)", re.I | re.M
)
"""Header entry of a MetaImage or NRRD that names the file with the voxels."""

MAX_HEADER_BYTES = 1 << 20
"""Longest header that is searched for its end; a file with a longer one is rejected."""


def is_volume(path: Path) -> bool:
    """Returns True if the name has the suffix of a volume file."""
    return path.name.lower().endswith(SUFFIXES)


def is_tiff(path: Path) -> bool:
    """Returns True if the name has the suffix of a TIFF file."""
    return path.name.lower().endswith(TIFF_SUFFIXES)


def stem(path: Path) -> str:
    """Returns the file name without suffix and nnU-Net channel."""
    return bare_name(path).removesuffix(CHANNEL)


def bare_name(path: Path) -> str:
    """Returns the file name without suffix."""
    for suffix in SUFFIXES:
        if path.name.lower().endswith(suffix):
            return path.name[: -len(suffix)]
    return path.stem


def read_volume_file(
    path: Path, spacing_mm: Sequence[float] | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Reads the values and the geometry of a volume file.

    Args:
        path: The file.
        spacing_mm: (z, y, x) from a list, z along the slowest axis of the file. Overrides
            the voxel size of a TIFF stack; other files use it if they state no spacing.

    Returns:
        (i, j, k) array in the file's axis order, with i varying fastest in the file, and
        the (4, 4) affine from index to RAS mm.

    Raises:
        ScanError: If the file is missing or damaged, is not one 3-D volume of numbers, or
            does not define its orientation.
    """
    if not path.is_file():
        raise ScanError(f"{path}: no such file; expected a volume")
    lower = path.name.lower()
    if is_tiff(path):
        array, affine = _read_tiff(path, spacing_mm)
    elif lower.endswith(NIFTI_SUFFIXES):
        array, affine = _read_nifti(path, spacing_mm)
    else:
        array, affine = _read_itk(path, spacing_mm)
    while array.ndim > 3 and array.shape[-1] == 1:
        array = array[..., 0]
    if array.ndim != 3 or min(array.shape) < 2:
        raise ScanError(
            f"{path}: shape {array.shape}; expected one 3-D volume of two or more slices"
        )
    _check_affine(affine, path)
    return array, affine


def _read_nifti(
    path: Path, spacing_mm: Sequence[float] | None
) -> tuple[np.ndarray, np.ndarray]:
    with (
        np.errstate(invalid="ignore"),  # a NaN in pixdim, before the check
        nifti_io.opened_nifti(path, remedy="restore it from its source") as image,
    ):
        stored = nifti_io.stored_header(path)
        _check_nifti_type(image, path)
        override_mm = volume_headers.check_nifti(stored, image.shape, path, spacing_mm)
        affine = image.affine
        if override_mm is not None:
            image.header["pixdim"][1:4] = override_mm[::-1]
            affine = image.header.get_qform()
        elif stored["sform_code"] > 0 and volume_headers.possible(
            stored["pixdim"][1:4]
        ):
            _check_forms_agree(image, path)
        return np.asanyarray(image.dataobj), affine


def _check_nifti_type(image: Any, path: Path) -> None:
    if image.header.get_data_dtype().kind not in "iuf":
        raise ScanError(
            f"{path}: values of type {image.header.get_data_dtype()} (colour or complex); "
            "expected numbers"
        )


def _check_forms_agree(image: Any, path: Path) -> None:
    sform, qform = image.get_sform(coded=True), image.get_qform(coded=True)
    if sform[1] and qform[1]:
        apart = _corners_apart_voxels(image.shape[:3], sform[0], qform[0])
        if apart > 1:
            raise ScanError(
                f"{path}: sform and qform place the volume {apart:.1f} voxels apart; "
                "expected them to agree"
            )


def _read_itk(
    path: Path, spacing_mm: Sequence[float] | None
) -> tuple[np.ndarray, np.ndarray]:
    import SimpleITK

    start = _checked_start(path)
    fields = volume_headers.text_fields(start)
    nrrd = start.startswith(b"NRRD")
    check = (
        volume_headers.spacing_of_nrrd if nrrd else volume_headers.spacing_of_metaimage
    )
    override_mm = check(fields, path, spacing_mm)
    try:
        image = SimpleITK.ReadImage(str(path))
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[-1]
        raise ScanError(
            f"{path}: not a readable volume ({reason}); restore it from its source"
        ) from error
    size = image.GetDimension()
    if image.GetNumberOfComponentsPerPixel() > 1 or size not in (3, 4):
        raise ScanError(
            f"{path}: {size} dimensions and {image.GetNumberOfComponentsPerPixel()} "
            "values per voxel; expected one 3-D volume of numbers"
        )
    direction = np.array(image.GetDirection()).reshape(size, size)[:3, :3]
    steps_mm = image.GetSpacing()[:3]
    if override_mm is not None:
        steps_mm = override_mm[::-1]
        direction = np.eye(3) if nrrd else direction
    columns_lps = np.vstack([(direction * steps_mm).T, image.GetOrigin()[:3]])
    affine = np.eye(4)
    affine[:3] = geometry.flip_xy(columns_lps).T
    return SimpleITK.GetArrayFromImage(image).T, affine


def _read_tiff(
    path: Path, spacing_mm: Sequence[float] | None
) -> tuple[np.ndarray, np.ndarray]:
    """Reads a stack of (y, x) pages, the first at the feet, rows to the back."""
    import tifffile

    try:
        with tifffile.TiffFile(path) as file:
            stated = _imagej_spacing_mm(file)
            array = _calibrated(file.asarray(), file.imagej_metadata or {})
            stacks = len(file.series)
    except (*TIFF_ERRORS, tifffile.TiffFileError) as error:
        raise ScanError(
            f"{path}: not a readable TIFF ({error}); save it again without compression, or "
            "restore it from its source"
        ) from error
    if stacks != 1:
        raise ScanError(
            f"{path}: holds {stacks} separate images; expected one stack; save the slices "
            "as one (z, y, x) stack"
        )
    spacing_mm = spacing_mm or stated
    if spacing_mm is None:
        raise ScanError(
            f"{path}: the TIFF states no spacing in mm; expected ImageJ's voxel size, or "
            "the columns spacing_z_mm,spacing_y_mm,spacing_x_mm of a CSV list"
        )
    if not volume_headers.possible(spacing_mm):
        raise ScanError(
            f"{path}: the spacing of the TIFF is {_numbers(spacing_mm)} mm (z, y, x); "
            f"expected three numbers above 0; {volume_headers.FIX}"
        )
    if array.ndim != 3 or array.shape[-1] in (3, 4) or array.dtype.kind not in "iuf":
        raise ScanError(
            f"{path}: {array.dtype} of shape {array.shape}; expected (z, y, x) numbers "
            "without colour"
        )
    grid = geometry.canonical_grid(array.shape, spacing_mm)
    return array.T, grid.affine[:, [2, 1, 0, 3]]


def _calibrated(array: np.ndarray, stated: dict[str, Any]) -> np.ndarray:
    """Applies the line c0 + c1 * value that ImageJ stores for signed values."""
    if stated.get("cf") != 0 or "c0" not in stated:
        return array
    return array.astype(np.float32) * float(stated.get("c1", 1)) + float(stated["c0"])


def _imagej_spacing_mm(file: Any) -> tuple[float, float, float] | None:
    """Returns the (z, y, x) voxel size that ImageJ stored, or None."""
    stated = file.imagej_metadata or {}
    scale = {"mm": 1.0, "micron": 1e-3, "um": 1e-3, "\u00b5m": 1e-3}.get(
        str(stated.get("unit", "")).replace("\\u00B5", "\u00b5")
    )
    tags = file.pages[0].tags
    if scale is None or "spacing" not in stated or "XResolution" not in tags:
        return None
    y, x = (
        tags[name].value[1] / tags[name].value[0]
        for name in ("YResolution", "XResolution")
    )
    return float(stated["spacing"]) * scale, y * scale, x * scale


def _checked_start(path: Path) -> bytes:
    """Reads the start of a MetaImage or NRRD file, with its header.

    Raises:
        ScanError: If there is no header, or it refers to voxels outside its own folder.
    """
    with path.open("rb") as file:
        start = file.read(MAX_HEADER_BYTES)
    found = list(DATA_FILE.finditer(start))
    attached_nrrd = start.startswith(b"NRRD") and re.search(rb"\n\r?\n", start)
    if not found and not attached_nrrd:
        raise ScanError(
            f"{path}: not a readable volume (no end of a MetaImage or NRRD header in the "
            f"first {len(start)} bytes); restore it from its source"
        )
    for entry in found:
        listed = start[entry.end() :] if entry[1].upper().startswith(b"LIST") else b""
        for name in (entry[1], *listed.splitlines()):
            _check_inside(name.decode(errors="replace").strip(), path)
    return start


def _check_inside(name: str, path: Path) -> None:
    outside = PureWindowsPath(name)  # handles /, \ and drives
    if outside.anchor or ".." in outside.parts or name.startswith("~"):
        raise ScanError(
            f"{path}: its header refers to voxels in {name!r}; expected a file in the "
            "folder of the header; move it there and name it in the header without a folder"
        )


def _check_affine(affine: np.ndarray, path: Path) -> None:
    axes = affine[:3, :3]
    finite = np.isfinite(affine).all()
    if not finite or np.linalg.matrix_rank(axes, tol=1e-12) < 3:
        raise ScanError(
            f"{path}: affine {affine.tolist()}; expected finite, independent axes"
        )
    steps_mm = np.linalg.norm(axes, axis=0)
    if steps_mm.min() < MIN_STEP_MM:
        raise ScanError(
            f"{path}: spacing {_numbers(steps_mm)} mm; expected at least {MIN_STEP_MM} mm; "
            "correct the header"
        )
    units = axes / steps_mm
    cosines = np.abs(units.T @ units - np.eye(3)).max()
    shear_deg = float(np.degrees(np.arcsin(min(cosines, 1))))
    if shear_deg > MAX_SHEAR_DEG:
        raise ScanError(
            f"{path}: the axes are {shear_deg:.1f} deg from perpendicular (gantry tilt?); "
            f"expected at most {MAX_SHEAR_DEG} deg; resample the file to perpendicular axes"
        )


def to_hu(array: np.ndarray, path: Path) -> np.ndarray:
    """Converts values to int16 HU: rounds, clips and sets padding to AIR_HU.

    Raises:
        ScanError: If a value is not finite.
    """
    if array.dtype.kind == "f":
        bad = int(array.size - np.count_nonzero(np.isfinite(array)))
        if bad:
            raise ScanError(
                f"{path}: {bad} voxels are NaN or infinite; expected Hounsfield units "
                f"everywhere ({AIR_HU} outside the scanned field)"
            )
        array = np.rint(array)
    if array.dtype != np.int16:
        limits = np.iinfo(np.int16)
        array = np.clip(array, limits.min, limits.max).astype(np.int16)
    return np.where(array < dicom_volume.PADDING_HU, np.int16(AIR_HU), array)


def grid_of_affine(array: np.ndarray, affine: np.ndarray) -> Grid:
    i, j, k = array.shape
    return Grid((i, j, k), np.asarray(affine, np.float64))


def read_labels(path: Path, grid: Grid) -> np.ndarray:
    """Reads a label volume in canonical orientation.

    Args:
        path: File of the label volume.
        grid: Canonical grid of the image.

    Returns:
        (z, y, x) integer labels on `grid`.

    Raises:
        ScanError: If the file is damaged, does not match the grid of the image, or holds
            values other than whole numbers from 0.
    """
    array, affine = read_volume_file(path, grid.spacing_mm)
    labels, label_grid = geometry.to_canonical(array, affine)
    if labels.shape != tuple(grid.shape):
        raise ScanError(
            f"{path}: shape {labels.shape} (z, y, x) differs from the image's "
            f"{tuple(grid.shape)}; expected a label for every voxel"
        )
    apart = _corners_apart_voxels(grid.shape, grid.affine, label_grid.affine)
    if apart > SAME_PLACE_VOXELS:
        raise ScanError(
            f"{path}: lies {apart:.1f} voxels away from its image (spacing "
            f"{_numbers(label_grid.spacing_mm)} and {_numbers(grid.spacing_mm)} mm); "
            f"expected at most {SAME_PLACE_VOXELS}"
        )
    if not np.isfinite(labels).all() or labels.min() < 0 or (labels % 1).any():
        raise ScanError(
            f"{path}: values from {labels.min()} to {labels.max()}, negative or not whole; "
            "expected labels 0, 1, 2, ..."
        )
    return labels.astype(np.int64) if labels.dtype.kind == "f" else labels


def _corners_apart_voxels(
    shape: Sequence[int], affine: np.ndarray, other: np.ndarray
) -> float:
    """Returns the largest corner distance of two grids, in voxels of the first."""
    ends = np.stack(np.meshgrid(*[(0, n - 1) for n in shape], indexing="ij"), axis=-1)
    corners = np.concatenate([ends.reshape(-1, 3), np.ones((8, 1))], axis=1)
    apart_mm = (corners @ (affine - other).T)[:, :3]
    return float(np.abs(np.linalg.inv(affine[:3, :3]) @ apart_mm.T).max())


def _numbers(values: Iterable[float]) -> str:
    return " x ".join(f"{value:.4g}" for value in values)


def checked_lung_labels(labels: np.ndarray, name: str) -> np.ndarray:
    """Checks that lung labels are 0, 1 right and 2 left, each on its own side.

    Args:
        labels: (z, y, x) integers.
        name: Name of the file for error messages.

    Returns:
        (z, y, x) uint8 labels.
    """
    values = np.unique(labels).tolist()
    if not set(values) <= {0, RIGHT, LEFT}:
        shown = ", ".join(map(str, values[:10]))
        raise ScanError(
            f"{name}: lung labels {shown}; expected 0, {RIGHT} (right) and {LEFT} (left)"
        )
    columns = [np.flatnonzero((labels == side).any(axis=(0, 1))) for side in (1, 2)]
    # x increases to the patient's left.
    if all(map(len, columns)) and columns[0].mean() > columns[1].mean():
        raise ScanError(
            f"{name}: label {RIGHT} (right lung) lies left of label {LEFT} (left lung); "
            "expected the reverse; correct the labels or the orientation"
        )
    return labels.astype(np.uint8)
