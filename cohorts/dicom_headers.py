"""Reads DICOM headers: the kind of each file and the geometry of each slice."""

import re
import struct
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
from pydicom.errors import BytesLengthException, InvalidDicomError
from pydicom.multival import MultiValue
from pydicom.uid import UID

from ct import files
from ct.scan import ScanError

SERIES_UID = re.compile(r"[0-9][0-9.]{0,63}")
"""Valid series UIDs; output files are named after them, so others are rejected."""

CT_IMAGE = "1.2.840.10008.5.1.4.1.1.2"
ENHANCED_CT_IMAGE = "1.2.840.10008.5.1.4.1.1.2.1"
LEGACY_ENHANCED_CT_IMAGE = "1.2.840.10008.5.1.4.1.1.2.2"
CT_IMAGES = (CT_IMAGE, ENHANCED_CT_IMAGE, LEGACY_ENHANCED_CT_IMAGE)
"""SOP classes that hold CT images."""

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
)
"""Errors that pydicom raises if a file is not DICOM or is damaged before the pixels."""

PIXEL_ERRORS = (
    *HEADER_ERRORS,
    AttributeError,
    KeyError,
    IndexError,
    RuntimeError,
    TypeError,
    OSError,
)
"""Errors that pydicom and its codecs raise on damaged pixel data."""

IDENTITY_TAGS = [
    "SOPClassUID",
    "Modality",
    "ImageType",
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
    "ImagePositionPatient",
    "ImageOrientationPatient",
    "PixelSpacing",
    "Rows",
    "Columns",
    "NumberOfFrames",
    "SamplesPerPixel",
    "PhotometricInterpretation",
    "BitsAllocated",
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
    """Kind of a file; `series_uid` is "" if the file is damaged or has no valid UID.

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
    """Returns the kind of a file; None if it is neither DICOM nor named *.dcm."""
    if not _has_mark(path):
        return Identity(path) if path.suffix.lower() == ".dcm" else None
    try:
        header = read_header(path, IDENTITY_TAGS)
    except ScanError:
        return Identity(path)
    media_class = str(header.file_meta.get("MediaStorageSOPClassUID", ""))
    sop_class = str(header.get("SOPClassUID", media_class))
    series_uid = str(header.get("SeriesInstanceUID", ""))
    if sop_class not in CT_IMAGES:
        modality = str(header.get("Modality", "")) or UID(sop_class).name
        return Identity(path, series_uid or "-", modality=modality)
    if not SERIES_UID.fullmatch(series_uid):
        return Identity(path)
    return Identity(
        path,
        series_uid,
        study_uid=str(header.get("StudyInstanceUID") or ""),
        patient_id=str(header.get("PatientID") or "").strip(),
        modality="CT",
        ct_image=True,
        localizer="LOCALIZER" in (header.get("ImageType") or ()),
    )


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
    facts["TransferSyntax"] = header.file_meta.TransferSyntaxUID.name
    return facts


def read_header(path: Path, tags: Sequence[str]) -> pydicom.Dataset:
    """Reads the named elements of a DICOM file.

    Raises:
        ScanError: If the file is damaged or not DICOM.
    """
    try:
        header = pydicom.dcmread(path, stop_before_pixels=True, specific_tags=[*tags])
        # pydicom parses elements on access; parse them here, where errors are caught.
        for _ in (*header.file_meta.iterall(), *header.iterall()):
            pass
    except HEADER_ERRORS as error:
        raise ScanError(
            f"{path}: cannot read this file of {path.stat().st_size} bytes as DICOM "
            f"({error}); restore it from its source"
        ) from error
    return header


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
    sop_class = str(header.get("SOPClassUID", ""))
    if sop_class not in CT_IMAGES:
        raise ScanError(
            f"{path}: found a {UID(sop_class).name or 'file without SOPClassUID'} of "
            f"modality {header.get('Modality', 'none')}; expected a CT image"
        )
    try:
        if sop_class == CT_IMAGE:
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
            f"{path}: a header value is malformed ({error}); restore the file from its "
            "source"
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
    uid = header.get("SeriesInstanceUID", "without uid")
    if missing:
        raise ScanError(
            f"series {uid}: {path} has no {', '.join(missing)}; HU and position cannot "
            "be computed without them; restore the file from its source"
        )
    if not SERIES_UID.fullmatch(str(uid)):
        raise ScanError(
            f"{path}: SeriesInstanceUID {str(uid)!r}; expected 1 to 64 digits and dots"
        )
    row, column = _finite(place, "ImageOrientationPatient", path).reshape(2, 3)
    spacing_mm = _finite(place, "PixelSpacing", path).tolist()
    return Slice(
        path=path,
        frame=frame,
        series_uid=str(uid),
        sop_uid=str(header.get("SOPInstanceUID", "")),
        modality=str(header.get("Modality", "")),
        photometric=str(header.get("PhotometricInterpretation", "")),
        rescale_type=str(place.get("RescaleType") or ""),
        image_type=tuple(place.get("ImageType") or header.get("ImageType") or ()),
        size_px=(int(place.Rows), int(place.Columns)),
        spacing_mm=(spacing_mm[0], spacing_mm[1]),
        # DICOM lists the direction along a row first, in which the column index increases.
        axes_lps=np.array([column, row]),
        position_lps_mm=_finite(place, "ImagePositionPatient", path).reshape(3),
        slope=float(_finite(place, "RescaleSlope", path)),
        intercept=float(_finite(place, "RescaleIntercept", path)),
        padding=_padding(header),
        instance=int(header.get("InstanceNumber") or 0),
        tilt_deg=float(header.get("GantryDetectorTilt") or 0),
        transfer_syntax=header.file_meta.TransferSyntaxUID,
        patient_id=str(header.get("PatientID") or "").strip(),
        study_uid=str(header.get("StudyInstanceUID") or ""),
        frame_of_reference=str(header.get("FrameOfReferenceUID") or ""),
        kernel=_stated(place, header, "ConvolutionKernel"),
        thickness=_stated(place, header, "SliceThickness"),
        acquisition=_stated(
            place, header, "AcquisitionNumber", "FrameAcquisitionNumber"
        ),
    )


def _stated(place: pydicom.Dataset, header: pydicom.Dataset, *tags: str) -> str:
    """Returns the first of these elements that is present, as text; else ""."""
    values = (source.get(tag) for tag in tags for source in (place, header))
    return next((str(value) for value in values if value is not None), "")


def _finite(place: pydicom.Dataset, tag: str, path: Path) -> np.ndarray:
    """Returns the numbers of an element; raises ScanError if any is NaN or infinite."""
    numbers = np.asarray(place[tag].value, float)
    if not np.isfinite(numbers).all():
        raise ScanError(f"{path}: {tag} is {numbers.tolist()}; expected finite numbers")
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
