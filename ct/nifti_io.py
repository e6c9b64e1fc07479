"""NIfTI volumes on the source's own grid: probability maps and masks, written and read."""

import gzip
import logging
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from ct import files
from ct.geometry import Grid, to_canonical, to_source
from ct.scan import ScanError

log = logging.getLogger(__name__)

PROBABILITY_STEPS = 10_000
"""Probabilities are stored as uint16 in steps of 1e-4 with NIfTI's `scl_slope`: a quarter
of the disk of float32, and what is below half a step becomes 0 and compresses away."""

UNKNOWN, SCANNER = 0, 1
"""NIfTI's codes for no coordinates and for those of the scanner (NIFTI_XFORM_*)."""

QFORM_MM = 0.05
"""A qform that would place a voxel further from where it lies is left out."""

GZIP_MARK = b"\x1f\x8b"
NIFTI_2_HEADER_BYTES = 540
"""The first number in a file of NIfTI-2; in NIfTI-1 it is 348."""


def write_nifti(
    path: Path, array: np.ndarray, grid: Grid, source_grid: Grid, *, exact: bool = False
) -> None:
    """Writes a volume as NIfTI in the axis order and place of the file it came from.

    Where the source's axes are sheared (a tilted gantry), only the sform is written, since a
    qform has no shear. ITK has none either: programs made with it refuse the file, where
    with a qform they would show it beside its place.

    Args:
        path: Ends in .nii or .nii.gz; appears whole or not at all.
        array: (z, y, x) on `grid`. Floats are probabilities, stored in steps of 1e-4;
            bool and integers are stored as they are (bool as uint8).
        grid: Canonical grid of the scan.
        source_grid: Grid of the file the scan came from.
        exact: Store floats as float32 instead; for values that are no probability.

    Raises:
        ValueError: If a probability is not within 0 and 1, or the grids do not match.
    """
    import nibabel

    stored, slope = _to_stored(array, exact=exact)
    image = nibabel.Nifti1Image(
        to_source(stored, grid, source_grid), source_grid.affine
    )
    image.header.set_xyzt_units("mm")
    image.set_sform(source_grid.affine, SCANNER)
    image.header.set_qform(source_grid.affine, SCANNER, strip_shears=True)
    off_mm = _furthest_mm(source_grid, np.asarray(image.header.get_qform()))
    if off_mm > QFORM_MM:
        image.header["qform_code"] = UNKNOWN
        log.warning(
            "%s: its axes are sheared by up to %.2f mm, as its source's are; programs made "
            "with ITK refuse it. --repair tilt makes a DICOM series straight",
            path,
            off_mm,
        )
    if slope:
        image.header.set_slope_inter(slope, 0)
    with files.written_whole(path) as partial:
        nibabel.save(image, partial)


def _furthest_mm(grid: Grid, affine: np.ndarray) -> float:
    """How far the farthest voxel of `grid` lies from where `affine` places it."""
    corners = np.array(list(np.ndindex(2, 2, 2))) * (np.array(grid.shape) - 1)
    apart_mm = grid.index_to_ras_mm(corners) - Grid(grid.shape, affine).index_to_ras_mm(
        corners
    )
    return float(np.linalg.norm(apart_mm, axis=1).max())


def _to_stored(array: np.ndarray, *, exact: bool) -> tuple[np.ndarray, float]:
    """The array as it lies on disk, and its slope; slope 0 for none."""
    if array.dtype == bool:
        return array.astype(np.uint8), 0.0
    if array.dtype.kind in "iu":
        return array, 0.0
    if exact:
        return array.astype(np.float32), 0.0
    low, high = float(array.min()), float(array.max())
    if not (low >= 0 and high <= 1):
        raise ValueError(
            f"probabilities run from {low:.4g} to {high:.4g}; expected 0 to 1 "
            "(exact=True stores other values)"
        )
    steps = np.rint(array * np.float32(PROBABILITY_STEPS)).astype(np.uint16)
    return steps, 1 / PROBABILITY_STEPS


def read_nifti(path: Path) -> tuple[np.ndarray, Grid]:
    """Reads a NIfTI volume in canonical orientation.

    Returns:
        The (z, y, x) array, float32 if the file stores scaled values and else of the
        stored type, and its canonical grid.

    Raises:
        ScanError: If the file is missing, damaged or not three-dimensional.
    """
    path = Path(path)
    if not path.is_file():
        raise ScanError(
            f"{path}: no such file; infer.py writes probabilities, postprocess.py masks"
        )
    with opened_nifti(path, remedy="remove it and make it again") as image:
        proxy = image.dataobj
        stored = np.asarray(proxy.get_unscaled())
    if stored.ndim != 3:
        raise ScanError(f"{path}: {stored.ndim} dimensions, expected 3")
    turned, grid = to_canonical(stored, image.affine)
    return _from_stored(turned, proxy.slope, proxy.inter), grid


@contextmanager
def opened_nifti(path: Path, *, remedy: str) -> Iterator[Any]:
    """A NIfTI-1 or NIfTI-2 file as nibabel's image, its gzip checksum compared.

    Args:
        path: The file, compressed or not.
        remedy: What to do if it is damaged, for the message.

    Raises:
        ScanError: If the file cannot be read, or nibabel fails within the block.
    """
    from nibabel import nifti1, nifti2
    from nibabel.filebasedimages import ImageFileError
    from nibabel.spatialimages import HeaderDataError
    from nibabel.wrapstruct import WrapStructError

    try:
        content = path.read_bytes()
        if content.startswith(GZIP_MARK):
            # Unpacked whole, for only then is the checksum at the end of it compared.
            content = gzip.decompress(content)
        second = NIFTI_2_HEADER_BYTES in (
            int.from_bytes(content[:4], "little"),
            int.from_bytes(content[:4], "big"),
        )
        kind = nifti2.Nifti2Image if second else nifti1.Nifti1Image
        yield kind.from_bytes(content)
    except ScanError:
        raise
    except (
        ImageFileError,
        HeaderDataError,
        WrapStructError,
        OSError,
        EOFError,
        KeyError,
        ValueError,
        OverflowError,
        zlib.error,
    ) as error:
        raise ScanError(
            f"{path}: not a readable NIfTI file of {path.stat().st_size} bytes ({error}); "
            f"{remedy}"
        ) from error


def _from_stored(stored: np.ndarray, slope: float, offset: float) -> np.ndarray:
    if slope == 1 and offset == 0:
        native = stored.dtype.newbyteorder("=")
        return stored.astype(native, copy=False)
    if np.isclose(slope * PROBABILITY_STEPS, 1, rtol=1e-6) and offset == 0:
        # Division gives the float32 nearest to n/10000; NIfTI's float32 slope does not.
        return stored / np.float32(PROBABILITY_STEPS)
    return stored.astype(np.float32) * np.float32(slope) + np.float32(offset)


def check_same_grid(found: Grid, expected: Grid, path: Path) -> None:
    """Refuses a volume that does not lie where the scan lies.

    Raises:
        ScanError: If shape or affine differ by more than a hundredth of a millimetre.
    """
    same_shape = tuple(found.shape) == tuple(expected.shape)
    if not (same_shape and np.allclose(found.affine, expected.affine, atol=0.01)):
        raise ScanError(
            f"{path}: its grid (shape {tuple(found.shape)}, spacing "
            f"{spacing_text(found)}) is not the scan's (shape {tuple(expected.shape)}, "
            f"spacing {spacing_text(expected)}); run infer.py again with --overwrite"
        )


def spacing_text(grid: Grid) -> str:
    """(z, y, x) spacing as text, e.g. '2.5 x 0.7 x 0.7 mm'."""
    return " x ".join(f"{mm:.4g}" for mm in grid.spacing_mm) + " mm"
