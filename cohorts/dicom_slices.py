"""The slices of a DICOM series: what each header says of one image."""

import math
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pydicom
from pydicom.uid import UID

from cohorts.dicom_headers import (
    CT_IMAGE,
    FUNCTIONAL_GROUPS,
    HEADER_ERRORS,
    REQUIRED_TAGS,
    SECONDARY_CAPTURE,
    SLICE_TAGS,
    _cause,
    is_ct_image,
    read_header,
    safe_series_uid,
    sop_class_of,
)
from ct import files
from ct.scan import ScanError

SAME_PLACE_MM = 0.01
"""Images closer than this count as being at one position."""

FIND_THREADS = 8
"""Threads that read headers in parallel; reading mostly waits for the disk."""

PIXEL_ERRORS = (*HEADER_ERRORS, RuntimeError)
"""Errors that pydicom and its codecs raise on damaged pixel data."""

MAX_SIZE_PX = 8192
"""Largest number of rows or columns; no CT exceeds 4096."""

MIN_SPACING_MM = 0.01
"""Smallest pixel spacing; no CT of a body is finer than 0.1 mm."""

MAX_POSITION_MM = 1e5
MAX_SLOPE, MAX_INTERCEPT = 1e3, 1e5
MAX_INSTANCE = 2**31 - 1
"""Limits of values that DICOM allows but no CT has."""

COSINE_ATOL = 1e-3
"""Tolerance of direction cosines; some files write them with only four digits."""


@dataclass(frozen=True, eq=False)
class Slice:
    """Header of one image.

    Attributes:
        path: File of the image; `frame` counts from 0 within the file.
        size_px: (rows, columns).
        spacing_mm: Distance between rows and between columns.
        axes_lps: (2, 3) unit vectors along which the row and the column index increase.
        position_lps_mm: (3,) centre of the first pixel.
        slope, intercept: HU = stored * slope + intercept.
        padding: Lowest and highest stored value that marks padding, or None.
        tilt_deg: GantryDetectorTilt; 0 if absent.
        shifted: True if HighBit says that pixels are not in the lowest bits.
        secondary: True for a secondary capture.
        patient_id: PatientID as in the header; never put into a message or an output.
        kernel, thickness, acquisition: Text for comparison only; "" if absent.
    """

    path: Path
    frame: int
    series_uid: str
    sop_uid: str
    modality: str
    photometric: str
    rescale_type: str
    image_type: tuple[str, ...]
    size_px: tuple[int, int]
    spacing_mm: tuple[float, float]
    axes_lps: np.ndarray
    position_lps_mm: np.ndarray
    slope: float
    intercept: float
    padding: tuple[int, int] | None
    instance: int
    tilt_deg: float
    shifted: bool
    secondary: bool
    transfer_syntax: UID
    patient_id: str = field(repr=False)
    study_uid: str
    frame_of_reference: str
    kernel: str
    thickness: str
    acquisition: str

    @property
    def name(self) -> str:
        """File name, followed by #frame unless the frame is 0."""
        return f"{self.path.name}#{self.frame}" if self.frame else self.path.name


def read_slices(paths: Iterable[Path]) -> list[Slice]:
    """Reads the header of every image in the files.

    Raises:
        ScanError: If a file is damaged, is not a CT image, or lacks a required element.
    """
    with ThreadPoolExecutor(FIND_THREADS) as threads:
        headers = list(
            threads.map(lambda path: (path, read_header(path, SLICE_TAGS)), paths)
        )
    slices = [
        item for path, header in headers for item in slices_of_file(Path(path), header)
    ]
    if not slices:
        raise ScanError(
            f"{len(headers)} files contain no image; expected two or more CT images"
        )
    return slices


def slices_of_file(path: Path, header: pydicom.Dataset) -> list[Slice]:
    """Returns one `Slice` per frame of a file."""
    sop_class = sop_class_of(header)
    if not is_ct_image(header):
        raise ScanError(
            f"{path}: found a {UID(sop_class).name or 'file without SOPClassUID'} of "
            f"modality {header.get('Modality', 'none')}; expected a CT image"
        )
    try:
        if sop_class in (CT_IMAGE, SECONDARY_CAPTURE):
            return [_slice(path, 0, header, header)]
        frames = header.get("PerFrameFunctionalGroupsSequence") or []
        return [
            _slice(path, frame, header, _frame_header(header, groups))
            for frame, groups in enumerate(frames)
        ]
    except ScanError:
        raise
    except PIXEL_ERRORS as error:
        raise ScanError(
            f"series {safe_series_uid(header) or 'without uid'}: {path}: a header value is "
            f"malformed ({_cause(error)}); restore the file from its source"
        ) from error


def _frame_header(header: pydicom.Dataset, groups: pydicom.Dataset) -> pydicom.Dataset:
    """Returns the elements of one frame in the flat form of a single-frame image."""
    flat = pydicom.Dataset()
    for tag in ("Rows", "Columns"):
        if tag in header:
            setattr(flat, tag, header[tag].value)
    shared = header.get("SharedFunctionalGroupsSequence") or [pydicom.Dataset()]
    for name in FUNCTIONAL_GROUPS:
        found = groups.get(name) or shared[0].get(name)
        if found:
            flat.update(found[0])
    if "FrameType" in flat:
        flat.ImageType = flat.FrameType
    return flat


def _slice(
    path: Path, frame: int, header: pydicom.Dataset, place: pydicom.Dataset
) -> Slice:
    missing = [tag for tag in REQUIRED_TAGS if place.get(tag) in (None, "")]
    uid = safe_series_uid(header)
    where = f"series {uid or 'without uid'}: {path}"
    if missing:
        raise ScanError(
            f"{where} has no {', '.join(missing)}; HU and position cannot "
            "be computed without them; restore the file from its source"
        )
    spacing_mm = _numbers(
        place, "PixelSpacing", where, count=2, low=MIN_SPACING_MM, unit=" mm"
    ).tolist()
    return Slice(
        path=path,
        frame=frame,
        series_uid=uid,
        sop_uid=str(header.get("SOPInstanceUID") or ""),
        modality=str(header.get("Modality") or ""),
        photometric=str(header.get("PhotometricInterpretation", "")),
        rescale_type=str(place.get("RescaleType") or "").strip().upper(),
        image_type=tuple(place.get("ImageType") or header.get("ImageType") or ()),
        size_px=(_size_px(place, "Rows", where), _size_px(place, "Columns", where)),
        spacing_mm=(spacing_mm[0], spacing_mm[1]),
        axes_lps=_axes_lps(place, where),
        position_lps_mm=_numbers(
            place,
            "ImagePositionPatient",
            where,
            count=3,
            most=MAX_POSITION_MM,
            unit=" mm",
        ),
        slope=_slope(place, where),
        intercept=float(
            _numbers(place, "RescaleIntercept", where, count=1, most=MAX_INTERCEPT)[0]
        ),
        padding=_padding(header),
        instance=_instance(header, where),
        tilt_deg=float(header.get("GantryDetectorTilt") or 0),
        shifted=int(header.get("HighBit") or 0) >= int(header.get("BitsStored") or 16),
        secondary=sop_class_of(header) == SECONDARY_CAPTURE,
        transfer_syntax=UID(str(header.file_meta.TransferSyntaxUID)),
        patient_id=str(header.get("PatientID") or "").strip(),
        study_uid=str(header.get("StudyInstanceUID") or ""),
        frame_of_reference=str(header.get("FrameOfReferenceUID") or ""),
        kernel=_stated(place, header, "ConvolutionKernel"),
        thickness=_stated(place, header, "SliceThickness"),
        acquisition=_stated(
            place, header, "AcquisitionNumber", "FrameAcquisitionNumber"
        ),
    )


def _size_px(place: pydicom.Dataset, tag: str, where: str) -> int:
    return int(_numbers(place, tag, where, count=1, low=1, most=MAX_SIZE_PX)[0])


def _axes_lps(place: pydicom.Dataset, where: str) -> np.ndarray:
    """Returns the (2, 3) unit vectors along which the row and the column index increase."""
    cosines = _numbers(place, "ImageOrientationPatient", where, count=6)
    row, column = cosines.reshape(2, 3)
    # DICOM lists the direction along a row first, in which the column index increases.
    axes_lps = np.array([column, row])
    if not np.allclose(axes_lps @ axes_lps.T, np.eye(2), atol=COSINE_ATOL):
        raise _refusal(
            where,
            "ImageOrientationPatient",
            cosines.tolist(),
            "two perpendicular unit vectors",
        )
    return axes_lps


def _slope(place: pydicom.Dataset, where: str) -> float:
    slope = float(_numbers(place, "RescaleSlope", where, count=1, most=MAX_SLOPE)[0])
    if slope == 0:
        raise _refusal(where, "RescaleSlope", slope, "a number other than 0")
    return slope


def _instance(header: pydicom.Dataset, where: str) -> int:
    if header.get("InstanceNumber") in (None, ""):
        return 0
    return int(_numbers(header, "InstanceNumber", where, count=1, most=MAX_INSTANCE)[0])


def _refusal(where: str, tag: str, value: object, expected: str) -> ScanError:
    found = str(value)
    if len(found) > 100:
        found = f"{found[:40]}... ({len(found)} characters)"
    return ScanError(
        f"{where}: {tag} is {found}; expected {expected}; restore the file from its source"
    )


def _stated(place: pydicom.Dataset, header: pydicom.Dataset, *tags: str) -> str:
    """Returns the first of these elements that is present, as text; else ""."""
    values = (source.get(tag) for tag in tags for source in (place, header))
    return next((str(value) for value in values if value is not None), "")


def _numbers(
    place: pydicom.Dataset,
    tag: str,
    where: str,
    *,
    count: int,
    low: float = -math.inf,
    most: float = math.inf,
    unit: str = "",
) -> np.ndarray:
    """Returns the (count,) numbers of an element.

    Raises:
        ScanError: If their number is another, one is not finite or below `low`, or the
            magnitude of one is above `most`.
    """
    value = place[tag].value
    text = getattr(value, "original_string", value)
    try:
        numbers = np.array(value, float).reshape(-1)
    except (TypeError, ValueError, OverflowError):
        raise _refusal(where, tag, text, f"{count} numbers") from None
    if len(numbers) != count:
        raise _refusal(where, tag, text, files.count_text(count, "number"))
    if tag != "InstanceNumber" and not np.isfinite(numbers).all():
        raise _refusal(where, tag, numbers.tolist(), "finite numbers")
    if (numbers < low).any():
        raise _refusal(where, tag, text, f"at least {low:g}{unit}")
    if (np.abs(numbers) > most).any():
        raise _refusal(where, tag, text, f"a magnitude of at most {most:.10g}{unit}")
    return numbers


def _padding(header: pydicom.Dataset) -> tuple[int, int] | None:
    value = header.get("PixelPaddingValue")
    if value is None:
        return None
    limit = header.get("PixelPaddingRangeLimit")
    ends = [_as_stored(v, header) for v in (value, value if limit is None else limit)]
    return min(ends), max(ends)


def _as_stored(value: int, header: pydicom.Dataset) -> int:
    """Converts a padding value, often stored unsigned, to the sign of the pixels."""
    bits = int(header.get("BitsAllocated") or 16)
    value = int(value) % (1 << bits)
    signed = header.get("PixelRepresentation") == 1 and value >= 1 << (bits - 1)
    return value - (1 << bits) if signed else value


def slice_normal(item: Slice) -> np.ndarray:
    """Returns the (3,) LPS unit normal of a slice.

    It is the cross product of DICOM's row and column directions and points to the head for
    ordinary axial images.
    """
    along_rows, along_columns = item.axes_lps
    normal = np.cross(along_columns, along_rows)
    return normal / np.linalg.norm(normal)


def positions_along_normal_mm(slices: Sequence[Slice]) -> np.ndarray:
    """Returns (slices,) positions along the normal of the first slice."""
    return np.array([s.position_lps_mm for s in slices]) @ slice_normal(slices[0])


def sorted_slices(slices: Sequence[Slice]) -> list[Slice]:
    """Sorts slices by position along the normal, InstanceNumber, path and frame."""
    along_mm = positions_along_normal_mm(slices)
    return [
        item
        for _, item in sorted(
            zip(along_mm, slices, strict=True),
            key=lambda pair: (
                round(pair[0] / SAME_PLACE_MM),
                pair[1].instance,
                pair[1].path,
                pair[1].frame,
            ),
        )
    ]
