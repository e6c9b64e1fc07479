"""Reads DICOM headers: the kind of each file and the geometry of each slice."""

import hashlib
import logging
import math
import re
import struct
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pydicom.config as pydicom_config
from pydicom.errors import BytesLengthException, InvalidDicomError
from pydicom.multival import MultiValue
from pydicom.uid import (
    UID,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
)

from ct import files
from ct.scan import ScanError

log = logging.getLogger(__name__)

# Values are checked here. pydicom's own warnings would print them, whatever they are.
pydicom_config.settings.reading_validation_mode = pydicom_config.IGNORE

SERIES_UID = re.compile(
    r"[0-9][0-9.]{0,63}|[0-9a-fA-F]{8}(-?[0-9a-fA-F]{4}){3}-?[0-9a-fA-F]{12}"
)
"""DICOM UIDs and UUIDs, which name output files; any other text is hashed."""

CT_IMAGE = "1.2.840.10008.5.1.4.1.1.2"
ENHANCED_CT_IMAGE = "1.2.840.10008.5.1.4.1.1.2.1"
LEGACY_ENHANCED_CT_IMAGE = "1.2.840.10008.5.1.4.1.1.2.2"
CT_IMAGES = (CT_IMAGE, ENHANCED_CT_IMAGE, LEGACY_ENHANCED_CT_IMAGE)
"""SOP classes that hold CT images."""

SECONDARY_CAPTURE = "1.2.840.10008.5.1.4.1.1.7"
"""SOP class that some converters write; a CT image if Modality and position say so."""

BARE_STARTS = tuple(
    bytes((group, 0, element, 0))
    for group in (2, 8)
    for element in (0, 1, 5, 8, 22, 24)
)
"""First bytes of DICOM files that lack the preamble with DICM at byte 128."""

SAME_PLACE_MM = 0.01
"""Images closer than this count as being at one position."""

FIND_THREADS = 8
"""Threads that read headers in parallel; reading mostly waits for the disk."""

HEADER_ERRORS = (
    InvalidDicomError,
    BytesLengthException,
    EOFError,
    ValueError,
    NotImplementedError,
    struct.error,
    AttributeError,
    LookupError,
    TypeError,
    ArithmeticError,
    RecursionError,
    OSError,
)
"""Errors that pydicom raises if a file cannot be read, is not DICOM or is damaged."""

PIXEL_ERRORS = (*HEADER_ERRORS, RuntimeError)
"""Errors that pydicom and its codecs raise on damaged pixel data."""

IMAGE_SUFFIXES = ("", ".dcm", ".dicom", ".ima")
"""Suffixes of files that may be images although their content cannot be read."""

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

IDENTITY_TAGS = [
    "SOPClassUID",
    "Modality",
    "ImageType",
    "ImagePositionPatient",
    "PatientID",
    "StudyInstanceUID",
    "SeriesInstanceUID",
]
SLICE_TAGS = [
    *IDENTITY_TAGS,
    "SOPInstanceUID",
    "InstanceNumber",
    "Manufacturer",
    "ManufacturerModelName",
    "ConvolutionKernel",
    "KVP",
    "SliceThickness",
    "AcquisitionNumber",
    "FrameOfReferenceUID",
    "XRayTubeCurrent",
    "GantryDetectorTilt",
    "ImageOrientationPatient",
    "PixelSpacing",
    "Rows",
    "Columns",
    "NumberOfFrames",
    "SamplesPerPixel",
    "PhotometricInterpretation",
    "BitsAllocated",
    "BitsStored",
    "HighBit",
    "PixelRepresentation",
    "PixelPaddingValue",
    "PixelPaddingRangeLimit",
    "RescaleSlope",
    "RescaleIntercept",
    "RescaleType",
    "SharedFunctionalGroupsSequence",
    "PerFrameFunctionalGroupsSequence",
]
REQUIRED_TAGS = (
    "Rows",
    "Columns",
    "PixelSpacing",
    "ImagePositionPatient",
    "ImageOrientationPatient",
    "RescaleSlope",
    "RescaleIntercept",
)
FUNCTIONAL_GROUPS = (
    "PixelMeasuresSequence",
    "PlanePositionSequence",
    "PlaneOrientationSequence",
    "PixelValueTransformationSequence",
    "CTImageFrameTypeSequence",
    "CTReconstructionSequence",
    "FrameContentSequence",
)
"""Sequences in which a multi-frame file keeps the top-level elements of an image."""

ACQUISITION_TAGS = (
    "Manufacturer",
    "ManufacturerModelName",
    "ConvolutionKernel",
    "KVP",
    "SliceThickness",
    "XRayTubeCurrent",
)


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


@dataclass(frozen=True)
class Identity:
    """Kind of a file; `series_uid` is "" if the file is damaged or has no UID.

    `patient_id` is the raw value of the header; pass on nothing but its `safe_patient_id`.
    """

    path: Path
    series_uid: str = ""
    study_uid: str = ""
    patient_id: str = field(default="", repr=False)
    modality: str = ""
    ct_image: bool = False
    localizer: bool = False


def identify(path: Path) -> Identity | None:
    """Returns the kind of a file; None if it is neither DICOM nor named like an image."""
    named = path.suffix.lower() == ".dcm"
    try:
        marked = _has_mark(path)
        if not marked and not _is_bare(path):
            return Identity(path) if named else None
    except OSError as error:
        log.warning("%s: cannot be read (%s)", path.name, error.strerror)
        return Identity(path) if path.suffix.lower() in IMAGE_SUFFIXES else None
    try:
        header = read_header(path, IDENTITY_TAGS)
    except ScanError:
        return Identity(path) if marked or named else None
    if not marked and not sop_class_of(header):
        return Identity(path) if named else None
    series_uid = safe_series_uid(header)
    if not is_ct_image(header):
        modality = str(header.get("Modality", "")) or UID(sop_class_of(header)).name
        return Identity(path, series_uid or "-", modality=modality)
    return Identity(
        path,
        series_uid,
        study_uid=str(header.get("StudyInstanceUID") or ""),
        patient_id=str(header.get("PatientID") or "").strip(),
        modality="CT",
        ct_image=True,
        localizer="LOCALIZER" in (header.get("ImageType") or ()),
    )


def safe_series_uid(header: pydicom.Dataset) -> str:
    """Returns a SeriesInstanceUID that can name a file; "" if the header has none.

    Some anonymisers write other text than a UID; it becomes a hash, as it might be a name
    or a path.
    """
    text = str(header.get("SeriesInstanceUID") or "").strip(" \0")
    return text if not text or SERIES_UID.fullmatch(text) else hashed_id(text)


def hashed_id(text: str) -> str:
    """Returns an id that is the same for the same text and says nothing about it."""
    return "series-" + hashlib.sha256(text.encode()).hexdigest()[:16]


def sop_class_of(header: pydicom.Dataset) -> str:
    """Returns the SOP class of a file, from its meta header if the data set has none."""
    stated = header.get("SOPClassUID")
    return str(stated or header.file_meta.get("MediaStorageSOPClassUID", ""))


def is_ct_image(header: pydicom.Dataset) -> bool:
    """Tells whether a file holds CT images, by SOP class, and by place if it is generic."""
    sop_class = sop_class_of(header)
    placed = bool(header.get("ImagePositionPatient")) and header.get("Modality") == "CT"
    return sop_class in CT_IMAGES or (sop_class == SECONDARY_CAPTURE and placed)


def first_ct_image(folder: Path) -> Path | None:
    """Returns the first DICOM CT image below a folder, or None; stops at the first."""
    identified = (identify(path) for path in files.files_below(folder))
    return next((i.path for i in identified if i is not None and i.ct_image), None)


def _has_mark(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            return file.read(132)[128:] == b"DICM"
    except FileNotFoundError:
        return False  # a link whose target was not fetched


def _is_bare(path: Path) -> bool:
    """Tells whether a file may be DICOM without a preamble."""
    with path.open("rb") as file:
        return file.read(4) in BARE_STARTS


def _read_dataset(path: Path, tags: Sequence[str]) -> pydicom.Dataset:
    """Reads the named elements, also of a file without preamble or meta header.

    Without a transfer syntax, the encoding of the header tells it.
    """
    options: dict[str, Any] = {"stop_before_pixels": True, "specific_tags": [*tags]}
    try:
        header = pydicom.dcmread(path, **options)
    except InvalidDicomError:
        if not _is_bare(path):
            raise
        header = pydicom.dcmread(path, force=True, **options)
    if "TransferSyntaxUID" not in header.file_meta:
        implicit, little = header.original_encoding
        explicit = ExplicitVRLittleEndian if little else ExplicitVRBigEndian
        syntax = ImplicitVRLittleEndian if implicit else explicit
        header.file_meta.TransferSyntaxUID = syntax
    return header


def acquisition_facts(header: pydicom.Dataset) -> dict[str, Any]:
    """Returns manufacturer, model, kernel, kVp, mA, thickness and transfer syntax."""
    facts: dict[str, Any] = {}
    for tag in ACQUISITION_TAGS:
        value = header.get(tag)
        if value is None or value == "":
            continue
        if isinstance(value, MultiValue):
            value = "\\".join(map(str, value))
        facts[tag] = float(value) if isinstance(value, float | int) else str(value)
    facts["TransferSyntax"] = UID(str(header.file_meta.TransferSyntaxUID)).name
    return facts


def read_header(path: Path, tags: Sequence[str]) -> pydicom.Dataset:
    """Reads the named elements of a DICOM file.

    Raises:
        ScanError: If the file is damaged or not DICOM.
    """
    try:
        header = _read_dataset(path, tags)
        # pydicom parses elements on access; parse them here, where errors are caught.
        for _ in (*header.file_meta.iterall(), *header.iterall()):
            pass
    except HEADER_ERRORS as error:
        raise ScanError(
            f"{path}: cannot read this file{_size_text(path)} as DICOM "
            f"({_cause(error)}); restore it from its source"
        ) from error
    return header


def _size_text(path: Path) -> str:
    try:
        return f" of {path.stat().st_size} bytes"
    except OSError:
        return ""


def _cause(error: BaseException) -> str:
    """Returns the reason of an error in one line, without the path of an OSError."""
    if isinstance(error, RecursionError):
        return "its sequences are nested too deeply"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return " ".join(str(error).split())[:200]


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
