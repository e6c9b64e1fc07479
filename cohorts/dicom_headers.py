"""Reads DICOM headers: the kind of each file and the geometry of each slice."""

import hashlib
import logging
import re
import struct
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

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

IMAGE_SUFFIXES = ("", ".dcm", ".dicom", ".ima")
"""Suffixes of files that may be images although their content cannot be read."""

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
