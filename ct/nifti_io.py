"""Reading and writing of NIfTI maps and masks on the source's own grid."""

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
"""Steps between probability 0 and 1. Probabilities are stored as uint16 in steps of
1e-4 with NIfTI's `scl_slope`: this takes a quarter of the disk space of float32, and
values below half a step become 0 and compress away."""

UNKNOWN, SCANNER = 0, 1
"""NIfTI's codes for unknown and for scanner coordinates (NIFTI_XFORM_*)."""

QFORM_MM = 0.05
"""Largest position error of a voxel for which the qform is written."""

GZIP_MARK = b"\x1f\x8b"
NIFTI_2_HEADER_BYTES = 540
"""First number in a NIfTI-2 file; in NIfTI-1 it is 348."""


def write_nifti(
    path: Path, array: np.ndarray, grid: Grid, source_grid: Grid, *, exact: bool = False
) -> None:
    """Writes a volume as NIfTI in the axis order and position of its source file.

    If the source's axes are sheared (a tilted gantry), only the sform is written, since
    a qform cannot express shear. Nor can ITK: programs built on it refuse the file,
    whereas with a qform they would show it in the wrong place.

    Args:
        path: Output path ending in .nii or .nii.gz; the file appears whole or not at
            all.
        array: (z, y, x) on `grid`. Floats are probabilities, stored in steps of 1e-4;
            bool and integers are stored as they are (bool as uint8).
        grid: Canonical grid of the scan.
        source_grid: Grid of the scan's source file.
        exact: Stores floats as float32 instead; for values that are not probabilities.

    Raises:
        ValueError: If a probability is outside 0 to 1, or the grids do not match.
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
            "%s: the axes are sheared by up to %.2f mm, as in the source; programs built on "
            "ITK refuse the file",
            path,
            off_mm,
        )
    if slope:
        image.header.set_slope_inter(slope, 0)
    with files.write_atomically(path) as partial:
        nibabel.save(image, partial)


def _furthest_mm(grid: Grid, affine: np.ndarray) -> float:
    """Returns the largest distance between a voxel's positions by `grid` and `affine`."""
    corners = np.array(list(np.ndindex(2, 2, 2))) * (np.array(grid.shape) - 1)
    apart_mm = grid.index_to_ras_mm(corners) - Grid(grid.shape, affine).index_to_ras_mm(
        corners
    )
    return float(np.linalg.norm(apart_mm, axis=1).max())


def _to_stored(array: np.ndarray, *, exact: bool) -> tuple[np.ndarray, float]:
    """Returns the array as stored on disk and its slope; slope 0 means none."""
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
    """Reads a NIfTI volume into canonical orientation.

    Returns:
        The (z, y, x) array and its canonical grid. The array is float32 if the file
        stores scaled values, else it has the stored type.

    Raises:
        ScanError: If the file is missing, damaged or not three-dimensional.
    """
    path = Path(path)
    if not path.is_file():
        raise ScanError(
            f"{path}: no such file; infer.py writes maps, postprocess.py writes masks"
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
    """Opens a NIfTI-1 or NIfTI-2 file as a nibabel image and verifies its checksum.

    Args:
        path: The file, compressed or not.
        remedy: Advice for the error message if the file is damaged.

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
            # Decompress all of it; only then is the gzip checksum at the end verified.
            content = gzip.decompress(content)
        second = _first_is(content, NIFTI_2_HEADER_BYTES)
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
            f"{path}: not a readable NIfTI file ({path.stat().st_size} bytes; {error}); "
            f"{remedy}"
        ) from error


def stored_header(path: Path) -> Any:
    """Reads the header of a NIfTI file as it is stored.

    nibabel repairs headers when it opens an image: a pixdim of 0 becomes 1, for example.
    """
    from nibabel import nifti1, nifti2

    with path.open("rb") as file:
        zipped = file.read(len(GZIP_MARK)) == GZIP_MARK
    with gzip.open(path) if zipped else path.open("rb") as file:
        start = file.read(NIFTI_2_HEADER_BYTES)
    second = _first_is(start, NIFTI_2_HEADER_BYTES)
    kind = nifti2.Nifti2Header if second else nifti1.Nifti1Header
    return kind(start[: kind.template_dtype.itemsize], check=False)


def _first_is(content: bytes, number: int) -> bool:
    """Returns True if the first four bytes are this number in either byte order."""
    return number in (
        int.from_bytes(content[:4], "little"),
        int.from_bytes(content[:4], "big"),
    )


def _from_stored(stored: np.ndarray, slope: float, offset: float) -> np.ndarray:
    if slope == 1 and offset == 0:
        native = stored.dtype.newbyteorder("=")
        return stored.astype(native, copy=False)
    if np.isclose(slope * PROBABILITY_STEPS, 1, rtol=1e-6) and offset == 0:
        # Division gives the float32 nearest to n/10000; NIfTI's float32 slope does not.
        return stored / np.float32(PROBABILITY_STEPS)
    return stored.astype(np.float32) * np.float32(slope) + np.float32(offset)


def check_same_grid(found: Grid, expected: Grid, path: Path) -> None:
    """Refuses a volume that does not lie on the grid of the scan.

    Raises:
        ScanError: If the shapes differ, or the affines differ by more than 0.01 mm.
    """
    same_shape = tuple(found.shape) == tuple(expected.shape)
    if not (same_shape and np.allclose(found.affine, expected.affine, atol=0.01)):
        raise ScanError(
            f"{path}: its grid (shape {tuple(found.shape)}, spacing "
            f"{spacing_text(found)}) is not the scan's (shape {tuple(expected.shape)}, "
            f"spacing {spacing_text(expected)}); run infer.py again with --overwrite"
        )


def spacing_text(grid: Grid) -> str:
    """Returns the (z, y, x) spacing as text, e.g. '2.5 x 0.7 x 0.7 mm'."""
    return " x ".join(f"{mm:.4g}" for mm in grid.spacing_mm) + " mm"
