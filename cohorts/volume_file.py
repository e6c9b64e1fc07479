"""Volume files: NIfTI, MHD, MHA and NRRD to HU or labels, with their geometry."""

import re
from collections.abc import Sequence
from pathlib import Path, PureWindowsPath
from typing import Any

import numpy as np

from cohorts import dicom_checks, dicom_volume
from ct import geometry, nifti_io
from ct.geometry import Grid
from ct.scan import AIR_HU, LEFT, RIGHT, ScanError

NIFTI_SUFFIXES = (".nii.gz", ".nii")
ITK_SUFFIXES = (".nrrd", ".nhdr", ".mha", ".mhd")
SUFFIXES = NIFTI_SUFFIXES + ITK_SUFFIXES
"""File names that are taken for volumes."""

CHANNEL = "_0000"
"""nnU-Net's mark of the first channel; CT is the only one here."""

SAME_PLACE_VOXELS = 0.1
"""How far the corners of a label volume may lie from those of its image."""

MAX_SHEAR_DEG = dicom_checks.TILT_DEG
"""Axes further from perpendicular are refused; below, the affine is used as it is.

Direction cosines are often written with so few digits that they are not orthonormal to
the last one; ITK refuses such files.
"""

UNSAFE = re.compile(r"[^A-Za-z0-9._-]")
"""Characters of a file's name that its scan's id does not keep."""

DATA_FILE = re.compile(
    rb"(?:ElementDataFile[\s=:]*|^\s*data ?file\s*:\s*)([^\r\n]*)", re.I | re.M
)
"""Where the header of a MetaImage or NRRD says in which file the voxels are."""

MAX_HEADER_BYTES = 1 << 20
"""A header that is longer is refused."""


def is_volume(path: Path) -> bool:
    """Whether the name is that of a volume file."""
    return path.name.lower().endswith(SUFFIXES)


def stem(path: Path) -> str:
    """The file's name without suffix and without nnU-Net's channel mark."""
    return _bare(path).removesuffix(CHANNEL)


def _bare(path: Path) -> str:
    """The file's name without suffix."""
    for suffix in SUFFIXES:
        if path.name.lower().endswith(suffix):
            return path.name[: -len(suffix)]
    return path.stem


def read_volume_file(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Values and place of a volume file.

    Returns:
        (i, j, k) array in the file's axis order, i fastest in the file, and the (4, 4)
        affine from index to RAS mm.

    Raises:
        ScanError: If the file is missing or damaged, is not one 3-D volume of numbers, or
            does not say where its voxels lie.
    """
    if not path.is_file():
        raise ScanError(f"{path}: no such file; expected a volume")
    lower = path.name.lower()
    array, affine = (
        _read_nifti(path) if lower.endswith(NIFTI_SUFFIXES) else _read_itk(path)
    )
    while array.ndim > 3 and array.shape[-1] == 1:
        array = array[..., 0]
    if array.ndim != 3 or min(array.shape) < 2:
        raise ScanError(
            f"{path}: shape {array.shape}; expected one 3-D volume of two or more slices"
        )
    _check_affine(affine, path)
    return array, affine


def _read_nifti(path: Path) -> tuple[np.ndarray, np.ndarray]:
    with nifti_io.opened_nifti(path, remedy="restore it from its source") as image:
        _check_nifti_header(image, path)
        return np.asanyarray(image.dataobj), image.affine


def _check_nifti_header(image: Any, path: Path) -> None:
    header = image.header
    if header.get_data_dtype().kind not in "iuf":
        raise ScanError(
            f"{path}: values of type {header.get_data_dtype()} (colour or complex); "
            "expected numbers"
        )
    unit = header.get_xyzt_units()[0]
    if unit not in ("mm", "unknown"):
        raise ScanError(f"{path}: lengths in {unit}; expected mm")
    sform, qform = image.get_sform(coded=True), image.get_qform(coded=True)
    if not sform[1] and not qform[1]:
        raise ScanError(
            f"{path}: neither sform nor qform says how the volume lies (both codes are "
            "0); expected one, or left and right cannot be told"
        )
    if sform[1] and qform[1]:
        apart = _corners_apart_voxels(image.shape[:3], sform[0], qform[0])
        if apart > 1:
            raise ScanError(
                f"{path}: sform and qform place the volume {apart:.1f} voxels apart; "
                "expected them to agree"
            )


def _read_itk(path: Path) -> tuple[np.ndarray, np.ndarray]:
    import SimpleITK

    _check_data_file(path)
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
    columns_lps = np.vstack(
        [(direction * image.GetSpacing()[:3]).T, image.GetOrigin()[:3]]
    )
    affine = np.eye(4)
    affine[:3] = geometry.flip_xy(columns_lps).T
    return SimpleITK.GetArrayFromImage(image).T, affine


def _check_data_file(path: Path) -> None:
    """Raises ScanError if a header takes its voxels from outside of its folder."""
    with path.open("rb") as file:
        start = file.read(MAX_HEADER_BYTES)
    found = list(DATA_FILE.finditer(start))
    attached_nrrd = start.startswith(b"NRRD") and re.search(rb"\n\r?\n", start)
    if not found and not attached_nrrd:
        raise ScanError(
            f"{path}: not a readable volume (no end of a MetaImage or NRRD header in its "
            f"first {len(start)} bytes); restore it from its source"
        )
    for entry in found:
        listed = start[entry.end() :] if entry[1].upper().startswith(b"LIST") else b""
        for name in (entry[1], *listed.splitlines()):
            _check_inside(name.decode(errors="replace").strip(), path)


def _check_inside(name: str, path: Path) -> None:
    outside = PureWindowsPath(name)  # knows /, \ and drives
    if outside.anchor or ".." in outside.parts or name.startswith("~"):
        raise ScanError(
            f"{path}: its voxels are said to be in {name!r}; expected a file in the folder "
            "of the header; move it there and name it without folders"
        )


def _check_affine(affine: np.ndarray, path: Path) -> None:
    axes = affine[:3, :3]
    if not np.isfinite(affine).all() or abs(np.linalg.det(axes)) < 1e-9:
        raise ScanError(
            f"{path}: affine {affine.tolist()}; expected finite numbers and three axes"
        )
    units = axes / np.linalg.norm(axes, axis=0)
    cosines = np.abs(units.T @ units - np.eye(3)).max()
    shear_deg = float(np.degrees(np.arcsin(min(cosines, 1))))
    if shear_deg > MAX_SHEAR_DEG:
        raise ScanError(
            f"{path}: the axes are {shear_deg:.1f} deg from perpendicular (gantry tilt?); "
            f"expected at most {MAX_SHEAR_DEG} deg; resample it to perpendicular axes"
        )


def to_hu(array: np.ndarray, path: Path) -> np.ndarray:
    """Values as int16 HU: rounded, clipped, padding set to AIR_HU.

    Raises:
        ScanError: If there are values that are not finite.
    """
    if array.dtype.kind == "f":
        bad = int(array.size - np.count_nonzero(np.isfinite(array)))
        if bad:
            raise ScanError(
                f"{path}: {bad} voxels are NaN or infinite; expected Hounsfield units "
                f"everywhere ({AIR_HU} where there is no scan)"
            )
        array = np.rint(array)
    if array.dtype != np.int16:
        limits = np.iinfo(np.int16)
        array = np.clip(array, limits.min, limits.max).astype(np.int16)
    return np.where(array < dicom_volume.PADDING_HU, np.int16(AIR_HU), array)


def _grid(array: np.ndarray, affine: np.ndarray) -> Grid:
    i, j, k = array.shape
    return Grid((i, j, k), np.asarray(affine, np.float64))


def read_labels(path: Path, grid: Grid) -> np.ndarray:
    """A label volume turned to canonical orientation.

    Args:
        path: The label volume.
        grid: The canonical grid of its image.

    Returns:
        (z, y, x) integer labels on `grid`.

    Raises:
        ScanError: If it is damaged, does not lie on the image, or holds no whole numbers
            from 0.
    """
    array, affine = read_volume_file(path)
    labels, label_grid = geometry.to_canonical(array, affine)
    if labels.shape != tuple(grid.shape):
        raise ScanError(
            f"{path}: shape {labels.shape} (z, y, x) differs from its image's "
            f"{tuple(grid.shape)}; expected a label for every voxel"
        )
    apart = _corners_apart_voxels(grid.shape, grid.affine, label_grid.affine)
    if apart > SAME_PLACE_VOXELS:
        raise ScanError(
            f"{path}: lies {apart:.1f} voxels from its image (spacing "
            f"{_numbers(label_grid.spacing_mm)} and {_numbers(grid.spacing_mm)} mm); "
            f"expected at most {SAME_PLACE_VOXELS}"
        )
    if not np.isfinite(labels).all() or labels.min() < 0 or (labels % 1).any():
        raise ScanError(
            f"{path}: values from {labels.min()} to {labels.max()}, not all whole; "
            "expected labels 0, 1, 2, ..."
        )
    return labels.astype(np.int64) if labels.dtype.kind == "f" else labels


def _corners_apart_voxels(
    shape: Sequence[int], affine: np.ndarray, other: np.ndarray
) -> float:
    """Largest distance between the corners of two grids, in voxels of the first."""
    ends = np.stack(np.meshgrid(*[(0, n - 1) for n in shape], indexing="ij"), axis=-1)
    corners = np.concatenate([ends.reshape(-1, 3), np.ones((8, 1))], axis=1)
    apart_mm = (corners @ (affine - other).T)[:, :3]
    return float(np.abs(np.linalg.inv(affine[:3, :3]) @ apart_mm.T).max())


def _numbers(values: Sequence[float]) -> str:
    return " x ".join(f"{value:.4g}" for value in values)


def checked_lung_labels(labels: np.ndarray, name: str) -> np.ndarray:
    """Lung labels checked: 0, 1 right, 2 left, and the right one on the right.

    Args:
        labels: (z, y, x) integers.
        name: The file, for the message.

    Returns:
        (z, y, x) uint8.
    """
    values = np.unique(labels).tolist()
    if not set(values) <= {0, RIGHT, LEFT}:
        shown = ", ".join(map(str, values[:10]))
        raise ScanError(
            f"{name}: lung labels {shown}; expected 0, {RIGHT} (right) and {LEFT} (left)"
        )
    columns = [np.flatnonzero((labels == side).any(axis=(0, 1))) for side in (1, 2)]
    # x rises to the patient's left.
    if all(map(len, columns)) and columns[0].mean() > columns[1].mean():
        raise ScanError(
            f"{name}: label {RIGHT} (right lung) lies left of label {LEFT} (left lung); "
            "expected the other way round: labels or orientation are wrong"
        )
    return labels.astype(np.uint8)
