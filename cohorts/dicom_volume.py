"""Builds the volume of a DICOM series: HU, grid, and repairs of gaps and tilt."""

import logging
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path

import numpy as np
import pydicom
from pydicom.pixels.utils import iter_pixels
from pydicom.uid import JPEGLSLossless, JPEGLSNearLossless

from cohorts.dicom_checks import GAP_ATOL_MM, GAP_RTOL, group_by_position, named
from cohorts.dicom_slices import (
    PIXEL_ERRORS,
    Slice,
    positions_along_normal_mm,
    slice_normal,
)
from ct import geometry
from ct.geometry import Grid
from ct.scan import AIR_HU, ScanError

log = logging.getLogger(__name__)

PADDING_HU = -1500
"""Lower values are padding: scanners write -2000 or less outside the field of view."""

TISSUE_HU = (-900, 3000)
"""Range in which a padding value could be tissue, so it is not replaced."""

PLUGINS = {JPEGLSLossless: "pyjpegls", JPEGLSNearLossless: "pyjpegls"}
"""Decoders that are faster than pydicom's default: 9 ms instead of 40 ms per slice."""


def drop_copies(ordered: Sequence[Slice]) -> tuple[list[Slice], list[str]]:
    """Leaves out images that equal another one in place and HU; returns warnings, too.

    Args:
        ordered: Sorted slices.

    Raises:
        ScanError: If the pixels of a doubled image cannot be decoded.
    """
    copies: set[Slice] = set()
    for place in group_by_position(ordered):
        if len({item.path for item in place}) == len(place) > 1:
            copies.update(_copies(place))
    if not copies:
        return list(ordered), []
    kept = [item for item in ordered if item not in copies]
    out = [item for item in ordered if item in copies]
    return kept, [f"{named(out, ordered)} are copies of others; left out"]


def _copies(place: Sequence[Slice]) -> Iterator[Slice]:
    """Yields the images at one place that equal an earlier one of them."""
    earlier: list[np.ndarray] = []
    for item in place:
        (stored,) = _stored_pixels(item.path, [item])
        hu = to_hu(stored, item)
        if any(np.array_equal(hu, other) for other in earlier):
            yield item
        else:
            earlier.append(hu)


def stack_slices(ordered: Sequence[Slice]) -> tuple[np.ndarray, Grid]:
    """Reads the pixels of sorted slices as HU.

    Returns:
        (slice, row, column) int16 HU, and the grid; its step is the mean slice distance.

    Raises:
        ScanError: If the pixels of a file cannot be decoded.
    """
    first, last = ordered[0], ordered[-1]
    volume = np.empty((len(ordered), *first.size_px), np.int16)
    index_of = {(item.path, item.frame): k for k, item in enumerate(ordered)}
    by_file = sorted(ordered, key=lambda s: (s.path, s.frame))
    for path, group in groupby(by_file, key=lambda s: s.path):
        frames = list(group)
        for item, stored in zip(frames, _stored_pixels(path, frames), strict=True):
            volume[index_of[path, item.frame]] = to_hu(stored, item)
    step_lps_mm = (last.position_lps_mm - first.position_lps_mm) / (len(ordered) - 1)
    return volume, _grid(volume.shape, first, step_lps_mm)


def _stored_pixels(path: Path, frames: Sequence[Slice]) -> Iterator[np.ndarray]:
    syntax = frames[0].transfer_syntax
    try:
        if frames[0].shifted and not syntax.is_compressed:
            _check_lowest_bits(path)
        # pydicom finds the pixels of a deflated file only after reading the whole of it.
        source = pydicom.dcmread(path, force=True) if syntax.is_deflated else path
        arrays = iter_pixels(
            source,
            indices=[item.frame for item in frames],
            raw=True,
            transfer_syntax_uid=syntax,
            decoding_plugin=PLUGINS.get(syntax, ""),
        )
        for item, stored in zip(frames, arrays, strict=True):
            if stored.shape != item.size_px:
                raise ValueError(f"shape {stored.shape}, expected {item.size_px}")
            yield stored
    except PIXEL_ERRORS as error:
        reason = " ".join(str(error).split())
        raise ScanError(
            f"series {frames[0].series_uid}: cannot read the pixels of {path.name} "
            f"({syntax.name}): {reason}; restore the file from its source"
        ) from error


def _check_lowest_bits(path: Path) -> None:
    """Raises ValueError if a pixel does not fit into the lowest `BitsStored` bits.

    A HighBit of 15 with 12 bits stored is mostly a slip, and the pixels are where they
    should be; if they are not, pydicom reads something else.
    """
    header = pydicom.dcmread(path, force=True)
    signed = header.PixelRepresentation == 1
    kind = np.int16 if signed else np.uint16
    stored = np.frombuffer(header.PixelData, kind)
    low = -(1 << header.BitsStored - 1) if signed else 0
    if stored.min() < low or stored.max() >= low + (1 << header.BitsStored):
        raise ValueError(
            f"HighBit is {header.HighBit} with {header.BitsStored} bits stored, and pixels "
            f"exceed these bits; expected HighBit {header.BitsStored - 1}"
        )


def to_hu(stored: np.ndarray, item: Slice) -> np.ndarray:
    """Converts to HU: rescales, rounds, clips to int16 and sets padding to AIR_HU."""
    if item.slope == 1 and item.intercept.is_integer():
        hu = stored.astype(np.int32) + int(item.intercept)
    else:
        hu = np.rint(stored * item.slope + item.intercept)
    limits = np.iinfo(np.int16)
    hu = np.clip(hu, limits.min, limits.max).astype(np.int16)
    hu[hu < PADDING_HU] = AIR_HU
    if item.padding is not None:
        low, high = item.padding
        ends_hu = np.array(item.padding) * item.slope + item.intercept
        tissue = (ends_hu.max() >= TISSUE_HU[0]) & (ends_hu.min() <= TISSUE_HU[1])
        if not tissue:
            hu[(stored >= low) & (stored <= high)] = AIR_HU
    return hu


def _grid(shape: tuple[int, ...], first: Slice, step_lps_mm: np.ndarray) -> Grid:
    """Returns the RAS grid of (slice, row, column) voxels, built from LPS vectors."""
    columns_lps = np.stack(
        [
            step_lps_mm,
            first.axes_lps[0] * first.spacing_mm[0],
            first.axes_lps[1] * first.spacing_mm[1],
            first.position_lps_mm,
        ]
    )
    affine = np.eye(4)
    affine[:3] = geometry.flip_xy(columns_lps).T
    slices, rows, columns = shape
    return Grid((slices, rows, columns), affine)


def reversed_axes(grid: Grid) -> Grid:
    """Returns the grid of the same voxels with the axes in reverse order."""
    i, j, k = grid.shape
    return Grid((k, j, i), grid.affine[:, [2, 1, 0, 3]])


def z_of_sop(ordered: Sequence[Slice], grid: Grid) -> dict[str, int]:
    single_frame = len({s.path for s in ordered}) == len(ordered)
    axial = int(np.argmax(np.abs(slice_normal(ordered[0])))) == 2
    if not (single_frame and axial):
        return {}
    centre_px = (np.array(ordered[0].size_px) - 1) / 2 * ordered[0].spacing_mm
    centre_lps_mm = centre_px @ ordered[0].axes_lps
    at_ras_mm = geometry.flip_xy(
        np.array([s.position_lps_mm for s in ordered]) + centre_lps_mm
    )
    z = np.rint(grid.ras_mm_to_index(at_ras_mm)[:, 0]).astype(int).tolist()
    return {item.sop_uid: k for item, k in zip(ordered, z, strict=True) if item.sop_uid}


def fill_gaps(volume: np.ndarray, ordered: Sequence[Slice]) -> tuple[np.ndarray, Grid]:
    """Resamples to evenly spaced slices by linear interpolation.

    Args:
        volume: (slice, row, column) HU at the positions of `ordered`.
        ordered: Sorted slices of the volume, without duplicates.

    Returns:
        The regular int16 volume from the first to the last slice, and its grid.
    """
    along_mm = positions_along_normal_mm(ordered)
    length_mm = along_mm[-1] - along_mm[0]
    count = round(length_mm / np.median(np.diff(along_mm))) + 1
    wanted_mm = np.linspace(along_mm[0], along_mm[-1], count)
    right = np.clip(np.searchsorted(along_mm, wanted_mm), 1, len(along_mm) - 1)
    span_mm = along_mm[right] - along_mm[right - 1]
    shares = (wanted_mm - along_mm[right - 1]) / span_mm
    # Keep an existing slice unchanged if it is within tolerance of a wanted position.
    close = GAP_ATOL_MM + GAP_RTOL * span_mm
    shares[np.abs(wanted_mm - along_mm[right - 1]) <= close] = 0
    shares[np.abs(wanted_mm - along_mm[right]) <= close] = 1
    regular = np.empty((count, *volume.shape[1:]), np.int16)
    for k, (after, share) in enumerate(zip(right, shares, strict=True)):
        mixed = volume[after - 1] * (1 - share) + volume[after] * share
        regular[k] = np.rint(mixed)
    step = (ordered[-1].position_lps_mm - ordered[0].position_lps_mm) / (count - 1)
    log.info(
        "series %s: resampled %d slices to %d",
        ordered[0].series_uid,
        len(volume),
        count,
    )
    return regular, _grid(regular.shape, ordered[0], step)


def straighten(volume: np.ndarray, grid: Grid) -> tuple[np.ndarray, Grid]:
    """Removes the shear of a tilted stack by shifting each slice within its plane.

    Args:
        volume: (slice, row, column) HU.
        grid: Sheared grid of the volume.

    Returns:
        The int16 volume and its grid with perpendicular axes. Rows and columns filled with
        AIR_HU are added so that no slice is cropped.
    """
    from scipy import ndimage

    matrix = grid.affine[:3, :3]
    in_plane = matrix[:, 1:] / np.linalg.norm(matrix[:, 1:], axis=0)
    spacing_mm = np.array(grid.spacing_mm[1:])
    lean_px = (
        in_plane.T @ matrix[:, 0] / spacing_mm
    )  # per slice, along rows and columns
    shifts_px = np.outer(np.arange(len(volume)), lean_px)
    least_px = shifts_px.min(axis=0)
    added = np.ceil(shifts_px.max(axis=0) - least_px - 1e-6).astype(int)
    shape = (len(volume), *(np.array(volume.shape[1:]) + added).tolist())
    straight = np.full(shape, AIR_HU, np.int16)
    for k, shift_px in enumerate(shifts_px - least_px):
        grown = np.pad(
            volume[k].astype(np.float32),
            [(0, n) for n in added],
            constant_values=AIR_HU,
        )
        straight[k] = np.rint(ndimage.shift(grown, shift_px, order=1, cval=AIR_HU))
    affine = grid.affine.copy()
    affine[:3, 0] -= in_plane @ (lean_px * spacing_mm)
    affine[:3, 3] += matrix[:, 1:] @ least_px
    return straight, Grid(shape, affine)
