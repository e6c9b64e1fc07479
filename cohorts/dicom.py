"""CT DICOM: the series of a folder, in any layout, as HU in canonical orientation.

A series is used only if its headers describe one evenly spaced volume; anything else is a
`ScanError` that says what was found where, and which `repair` mends it:

    gaps        missing or unevenly spaced slices: linear interpolation between neighbours
    duplicates  several sets of images at the same positions: the first set stays
    tilt        sheared stacks (gantry tilt): slices are shifted in-plane to a straight stack

A mended series has the mended grid as its source grid.
"""

import hashlib
import hmac
import logging
import os
import re
import secrets
import struct
import tempfile
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
from pydicom.errors import BytesLengthException, InvalidDicomError
from pydicom.multival import MultiValue
from pydicom.pixels.utils import iter_pixels
from pydicom.uid import UID, JPEGLSLossless, JPEGLSNearLossless

from ct import files, geometry
from ct.geometry import Grid
from ct.scan import AIR_HU, PHANTOM, ScanError, ScanSource

log = logging.getLogger(__name__)

REPAIRS = ("gaps", "duplicates", "tilt")
"""Defects that `read_series` can mend."""

PUBLIC_IDS = re.compile(rf"(LIDC-IDRI-|{PHANTOM})\d{{4}}")
"""Patient ids that are public research ids and are kept as they are."""
ANONYMOUS_IDS = re.compile(
    r"\W*|0+|x+|anon[^1-9]*"
    r"|(de-?identified|no ?name|unknown|none|null|n/?a|patient|test)[^a-z1-9]*",
    re.IGNORECASE,
)
"""Patient ids that stand for nobody in particular, so many patients may share them."""

KEY_FILE_VARIABLE = "LUNG_PATIENT_KEY_FILE"
KEY_BYTES = 32
"""Pseudonyms are made with a secret key: without one, an id of seven digits is found by
trying them all."""

SERIES_UID = re.compile(r"[0-9][0-9.]{0,63}")
"""A series' uid becomes the name of its files, so nothing else is taken for one."""

CT_IMAGE = "1.2.840.10008.5.1.4.1.1.2"
ENHANCED_CT_IMAGE = "1.2.840.10008.5.1.4.1.1.2.1"
LEGACY_ENHANCED_CT_IMAGE = "1.2.840.10008.5.1.4.1.1.2.2"
CT_IMAGES = (CT_IMAGE, ENHANCED_CT_IMAGE, LEGACY_ENHANCED_CT_IMAGE)
"""SOP classes that hold CT images."""

GAP_RTOL, GAP_ATOL_MM = 0.01, 0.01
"""How far a gap between slices may be from the usual one: 1 % and 0.01 mm.

Of the 1018 LIDC-IDRI scans 1014 stay below 0.0001 mm; the other four have a gap of 1.6
times the usual one or more.
"""
SAME_PLACE_MM = 0.01
"""Images closer than this lie at one position."""
MAX_MENDED_GAP_MM = 10.0
"""Wider gaps are not interpolated: a nodule could lie unseen in them."""
SIDEWAYS_MM = 0.1
"""How far a slice may lie off the straight line through all slices."""
TILT_DEG = 0.5
"""Stacks leaning more than this are sheared; below, the affine says it exactly."""
COSINE_ATOL = 1e-3
"""Tolerance of direction cosines; they are written with as few as four digits."""
SPACING_RTOL = 1e-3
"""Tolerance of pixel spacings within a series."""

PADDING_HU = -1500
"""Lower values are no density: scanners write -2000 or less outside the field of view."""
TISSUE_HU = (-900, 3000)
"""A padding value between these could be tissue; it is not replaced."""

AIR_RANGE_HU, MIN_AIR_SHARE = (AIR_HU + 1, -700), 0.001
"""Lung, bowel gas, skin surface: every CT has some, apart from padding at exactly AIR_HU."""
SOFT_RANGE_HU, MIN_SOFT_SHARE = (-200, 200), 0.005
"""Fat to enhanced blood. Seen through an offset of 1024, only cortical bone lies here."""
USUAL_INTERCEPT_HU = -1024
"""Where it is missing, all values are too high by as much; the message then says so."""

MAX_FIELD_MM = (3000.0, 1000.0, 1000.0)
"""Largest (z, y, x) field: longer than a body, wider than the bore of a scanner. Micrometres
taken for mm give more, and cubic voxels over all of it would fill any memory."""

CORRUPT_RATIO, CORRUPT_HU = 3.0, 150.0
"""Neighbours that differ in a quarter of the image by this many times the usual mean
difference, and by this many HU, do not belong together. In six whole scans of 2.5 to 8 mm
few quarters differed by 150 HU, and those 1.5 times as much as usual; where three slices
had their lower half blanked, it was 172 HU and 4.3 times or more."""

NAMED_SLICES = 4
"""A message names no more."""

FIND_THREADS = 8
"""Reading headers waits for the disk."""

PLUGINS = {JPEGLSLossless: "pyjpegls", JPEGLSNearLossless: "pyjpegls"}
"""Decoders that are faster than pydicom's own choice: 9 ms against 40 ms per slice."""

HEADER_ERRORS = (
    InvalidDicomError,
    BytesLengthException,
    EOFError,
    ValueError,
    NotImplementedError,
    struct.error,
)
"""What pydicom raises on a file that is not DICOM, or damaged before the pixels."""
PIXEL_ERRORS = (
    *HEADER_ERRORS,
    AttributeError,
    KeyError,
    IndexError,
    RuntimeError,
    TypeError,
    OSError,
)
"""What pydicom and its codecs raise on damaged pixel data."""

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
"""Where a multi-frame file keeps what a single image has at its top."""
DOUBLE_TAGS = {
    "ConvolutionKernel": "kernel",
    "SliceThickness": "thickness",
    "AcquisitionNumber": "acquisition",
    "ImageType": "image_type",
}
"""Images at one position that differ in these are not two of a kind."""
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
    """What the header says of one image.

    Attributes:
        path: The file; `frame` counts from 0 within it.
        size_px: (rows, columns).
        spacing_mm: Distance between rows, and between columns.
        axes_lps: (2, 3) unit vectors along which the row and the column index rise.
        position_lps_mm: (3,) centre of the first pixel.
        slope, intercept: HU = stored * slope + intercept.
        padding: Lowest and highest stored value that is padding, or None.
        tilt_deg: GantryDetectorTilt, 0 if absent.
        patient_id: As in the header; it goes into no message and no output.
        kernel, thickness, acquisition: As text, "" if absent; only compared.
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
        """The file's name, with the frame if it holds several."""
        return f"{self.path.name}#{self.frame}" if self.frame else self.path.name


@dataclass(frozen=True)
class Defect:
    """Why a series cannot be used as it is; `repair` names what mends it, or is ""."""

    reason: str
    repair: str = ""

    def __str__(self) -> str:
        return self.reason + (
            f" (--repair {self.repair} mends it)" if self.repair else ""
        )


@dataclass(frozen=True, eq=False)
class Series:
    """A CT series as a volume.

    Attributes:
        hu: (z, y, x) int16 HU, canonical.
        grid: Where `hu` lies.
        source_grid: (column, row, slice) grid, the order in which SimpleITK, dcm2niix and
            nnU-Net have a series; slices rise along the slice normal.
        z_of_sop: SOPInstanceUID to canonical z, for single-frame axial series; else {}.
        acquisition: Technical facts only.
    """

    hu: np.ndarray
    grid: Grid
    source_grid: Grid
    series_uid: str
    z_of_sop: dict[str, int]
    acquisition: dict[str, Any]


@dataclass(frozen=True)
class Identity:
    """What a file is; `series_uid` is "" when it is damaged, or has no usable one.

    `patient_id` is as it stands in the header; only `safe_patient_id` of it may go further.
    """

    path: Path
    series_uid: str = ""
    study_uid: str = ""
    patient_id: str = field(default="", repr=False)
    modality: str = ""
    ct_image: bool = False
    localizer: bool = False


def find_scans(source: Path) -> list[ScanSource]:
    """Every CT series below a folder, by SeriesInstanceUID; no pixels are read.

    Files that are not DICOM, objects that are not CT images (RTSTRUCT, SEG, reports) and
    localizers are passed over. A damaged file named *.dcm counts with the series of its
    folder, so that they are refused rather than silently short of a slice.

    Raises:
        ScanError: If there is no CT series; the message says what there is.
    """
    source = Path(source)
    identities = list(identify_files(source))
    groups = defaultdict(list)
    for identity in identities:
        if identity.ct_image and not identity.localizer:
            groups[identity.series_uid].append(identity)
    if not groups:
        raise ScanError(f"{source}: no CT series; {_inventory(identities)}")
    nameless = sum(is_anonymous(group[0].patient_id) for group in groups.values())
    if nameless:
        log.warning(
            "%s: %d of %d series have no PatientID of their own; each study counts as a "
            "patient, so studies of one person may fall on both sides of a split",
            source,
            nameless,
            len(groups),
        )
    damaged = [i.path for i in identities if not i.series_uid]
    return [
        ScanSource(uid, safe_patient_id(group[0]), _series_paths(group, damaged))
        for uid, group in sorted(groups.items())
    ]


def read_series(
    paths: Iterable[Path],
    *,
    repair: Sequence[str] = (),
) -> Series:
    """Reads the files of one series.

    Args:
        paths: Its files, in any order.
        repair: Defects to mend instead of refusing; see the head of this module.

    Raises:
        ScanError: If the series is not one regular CT volume.
        ValueError: If `repair` names something unknown.
    """
    check_repair(repair)
    slices = sorted_slices(read_slices(paths))
    if "duplicates" in repair:
        slices = without_duplicates(slices)
    uid = slices[0].series_uid
    findings = check_series(slices)
    unmended = [f for f in findings if f.repair not in repair]
    if unmended:
        raise ScanError(f"series {uid}: " + "; ".join(map(str, unmended)))
    volume, slice_grid = stack_slices(slices)
    check_neighbours(volume, slices)
    if any(f.repair == "gaps" for f in findings):
        volume, slice_grid = fill_gaps(volume, slices)
    if any(f.repair == "tilt" for f in findings):
        volume, slice_grid = straighten(volume, slice_grid)
    hu, grid = geometry.to_canonical(volume, slice_grid.affine)
    check_field(grid, f"series {uid}")
    check_hu(hu, f"series {uid}")
    header = read_header(slices[0].path, SLICE_TAGS)
    return Series(
        hu=hu,
        grid=grid,
        source_grid=reversed_axes(slice_grid),
        series_uid=uid,
        z_of_sop=_z_of_sop(slices, grid),
        acquisition=acquisition_facts(header),
    )


def check_repair(repair: Sequence[str]) -> None:
    """Raises ValueError if `repair` names a defect that cannot be mended."""
    unknown = sorted(set(repair) - set(REPAIRS))
    if unknown:
        raise ValueError(f"repair {unknown}: expected some of {', '.join(REPAIRS)}")


def identify_files(folder: Path) -> Iterator[Identity]:
    """What every DICOM file below a folder is, in order of path; headers only."""
    if not folder.is_dir():
        raise ScanError(f"{folder}: no such folder; expected a folder of DICOM files")
    with ThreadPoolExecutor(FIND_THREADS) as threads:
        identified = threads.map(identify, files.below(folder))
        yield from (identity for identity in identified if identity is not None)


def identify(path: Path) -> Identity | None:
    """What a file is, or None if it is not DICOM and not named *.dcm."""
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
    """The first DICOM CT image below a folder, or None; stops reading when it finds one."""
    identified = (identify(path) for path in files.below(folder))
    return next((i.path for i in identified if i is not None and i.ct_image), None)


def _has_mark(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            return file.read(132)[128:] == b"DICM"
    except FileNotFoundError:
        return False  # a link whose file was not fetched


def _series_paths(
    group: Sequence[Identity], damaged: Sequence[Path]
) -> tuple[Path, ...]:
    paths = [identity.path for identity in group]
    folders = {path.parent for path in paths}
    return tuple(
        sorted([*paths, *(path for path in damaged if path.parent in folders)])
    )


def _inventory(identities: Sequence[Identity]) -> str:
    if not identities:
        return (
            "no DICOM file at all; expected CT images with DICM at byte 128 (NIfTI, NRRD "
            "and other volumes, and CSV lists, are read by infer.py and by preprocess.py "
            "--cohort nifti)"
        )
    kinds = Counter(
        "damaged or without a SeriesInstanceUID of digits and dots"
        if not i.series_uid
        else "CT localizer"
        if i.localizer
        else i.modality
        for i in identities
    )
    found = ", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items()))
    return f"found {len(identities)} DICOM files ({found}), expected CT images"


def safe_patient_id(identity: Identity) -> str:
    """The patient's id if it is public; else a pseudonym, the same for all its series.

    Where the id stands for nobody in particular, the study stands for the patient.
    """
    if PUBLIC_IDS.fullmatch(identity.patient_id):
        return identity.patient_id
    secret = identity.patient_id
    if is_anonymous(secret):
        secret = identity.study_uid or identity.series_uid
    mark = hmac.new(read_key(key_path()), secret.encode(), hashlib.sha256)
    return "p-" + mark.hexdigest()[:12]


def is_anonymous(patient_id: str) -> bool:
    """Whether a PatientID is one that many patients may share."""
    return ANONYMOUS_IDS.fullmatch(patient_id) is not None


def key_path() -> Path:
    """The file with the key of this user's pseudonyms."""
    if named := os.environ.get(KEY_FILE_VARIABLE):
        return Path(named)
    settings = os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config"
    return Path(settings, "lung-nodules/patient_key")


@cache
def read_key(path: Path) -> bytes:
    """The key in a file, which is made, for its owner alone, if there is none.

    Raises:
        ValueError: If the file holds no key.
    """
    if not path.exists():
        _make_key(path)
    key = path.read_bytes()
    if len(key) != KEY_BYTES:
        raise ValueError(
            f"{path}: {len(key)} bytes; expected a key of {KEY_BYTES}. Restore it; or "
            "remove it for a new one, with which all pseudonyms of patients change"
        )
    return key


def _make_key(path: Path) -> None:
    """Writes a new key; if another process was faster, its key stays."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent) as file:  # of mode 0600
        file.write(secrets.token_bytes(KEY_BYTES))
        file.flush()
        with suppress(FileExistsError):
            os.link(file.name, path)
            log.info("made %s, the key of this user's pseudonyms of patients", path)


def acquisition_facts(header: pydicom.Dataset) -> dict[str, Any]:
    """Technical facts of the scan: maker, model, kernel, kVp, mA, thickness, coding."""
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
    """The named elements of a DICOM file.

    Raises:
        ScanError: If the file is not DICOM, or damaged.
    """
    try:
        header = pydicom.dcmread(path, stop_before_pixels=True, specific_tags=[*tags])
        # Elements are parsed on access: parse them here, where errors are expected.
        for _ in (*header.file_meta.iterall(), *header.iterall()):
            pass
    except HEADER_ERRORS as error:
        raise ScanError(
            f"{path}: not a readable DICOM file of {path.stat().st_size} bytes "
            f"({error}); restore it from its source"
        ) from error
    return header


def read_slices(paths: Iterable[Path]) -> list[Slice]:
    """What the headers say of every image in the files.

    Raises:
        ScanError: If a file is damaged, no CT image, or lacks an element.
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
            f"{len(headers)} files without an image; expected two or more CT images"
        )
    return slices


def slices_of_file(path: Path, header: pydicom.Dataset) -> list[Slice]:
    """One `Slice` per frame of a file."""
    sop_class = str(header.get("SOPClassUID", ""))
    if sop_class not in CT_IMAGES:
        raise ScanError(
            f"{path}: a {UID(sop_class).name or 'file without SOPClassUID'} of modality "
            f"{header.get('Modality', 'none')}; expected a CT image"
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
            f"{path}: a value of the header has the wrong form ({error}); restore the "
            "file from its source"
        ) from error


def _frame_header(header: pydicom.Dataset, groups: pydicom.Dataset) -> pydicom.Dataset:
    """The elements of one frame of a multi-frame file as a single image has them."""
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
            f"series {uid}: {path} has no {', '.join(missing)}; HU and position "
            "cannot be known without"
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
        # DICOM names the direction *of a row* first: the one the column index rises in.
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
    """The first of these elements that is there, as text; else ""."""
    values = (source.get(tag) for tag in tags for source in (place, header))
    return next((str(value) for value in values if value is not None), "")


def _finite(place: pydicom.Dataset, tag: str, path: Path) -> np.ndarray:
    """The number or numbers of an element, none of them NaN or infinite."""
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
    """A padding value in the pixels' own signedness; files often have it unsigned."""
    bits = int(header.get("BitsAllocated") or 16)
    value = int(value) % (1 << bits)
    signed = header.get("PixelRepresentation") == 1 and value >= 1 << (bits - 1)
    return value - (1 << bits) if signed else value


def check_series(slices: Sequence[Slice]) -> list[Defect]:
    """Why these images are not one regular CT volume; [] if they are.

    What they are is checked first, then whether they belong together, then where they
    lie, since each means something only if the one before holds.
    """
    for check in (_check_kind, _check_sameness, _check_place):
        findings = list(check(slices))
        if findings:
            return findings
    return []


def _check_kind(slices: Sequence[Slice]) -> Iterator[Defect]:
    for name, attribute, accepted in (
        ("modality", "modality", ("CT",)),
        ("PhotometricInterpretation", "photometric", ("MONOCHROME2",)),
        ("RescaleType", "rescale_type", ("", "HU", "US")),
    ):
        wrong = [s for s in slices if getattr(s, attribute) not in accepted]
        if wrong:
            yield Defect(
                f"{name} {getattr(wrong[0], attribute)!r} in {_files(wrong, slices)}; "
                f"expected {' or '.join(filter(None, accepted))}"
            )
    scouts = [s for s in slices if "LOCALIZER" in s.image_type]
    if scouts:
        yield Defect(
            f"localizer (scout) images: {_files(scouts, slices)}; expected axial images"
        )
    if len(slices) == 1:
        yield Defect(f"one image only ({slices[0].name}); expected two or more")


def _check_sameness(slices: Sequence[Slice]) -> Iterator[Defect]:
    first = slices[0]
    mixed = sorted({s.series_uid for s in slices})
    if len(mixed) > 1:
        yield Defect(
            f"mixed with other series: {', '.join(mixed)}; expected one SeriesInstanceUID"
        )
    for name, attribute in (
        ("StudyInstanceUID", "study_uid"),
        ("FrameOfReferenceUID", "frame_of_reference"),
        ("ConvolutionKernel", "kernel"),
    ):
        other = [
            s for s in slices if getattr(s, attribute) != getattr(first, attribute)
        ]
        if other:
            yield Defect(
                f"mixed {name}: {getattr(other[0], attribute)!r} in "
                f"{_files(other, slices)}, {getattr(first, attribute)!r} in {first.name}; "
                "expected one throughout"
            )
    strangers = [s for s in slices if s.patient_id != first.patient_id]
    if strangers:
        yield Defect(
            f"two or more PatientIDs: that of {_files(strangers, slices)} is not that of "
            f"{first.name}; expected one patient"
        )
    for name, attribute, tolerance in (
        ("matrix size", "size_px", 0.0),
        ("pixel spacing in mm", "spacing_mm", SPACING_RTOL * first.spacing_mm[0]),
        ("orientation", "axes_lps", COSINE_ATOL),
    ):
        expected = getattr(first, attribute)
        other = [
            s
            for s in slices
            if not np.allclose(getattr(s, attribute), expected, rtol=0, atol=tolerance)
        ]
        if other:
            yield Defect(
                f"mixed {name}: {_text(getattr(other[0], attribute))} in "
                f"{_files(other, slices)}, {_text(expected)} in {first.name}; expected "
                "one throughout"
            )
    if min(first.spacing_mm) <= 0:
        yield Defect(f"pixel spacing {first.spacing_mm} mm; expected above 0")
    if not np.allclose(first.axes_lps @ first.axes_lps.T, np.eye(2), atol=COSINE_ATOL):
        yield Defect(
            f"direction cosines {_text(first.axes_lps)} in {first.name}; expected two "
            "perpendicular unit vectors"
        )


def _check_place(slices: Sequence[Slice]) -> Iterator[Defect]:
    ordered = sorted_slices(slices)
    along_mm = along_normal_mm(ordered)
    gaps_mm = np.diff(along_mm)
    places = by_place(ordered)
    doubled = [place for place in places if len(place) > 1]
    if doubled:
        one, another = doubled[0][:2]
        unlike = unlike_doubles(doubled)
        yield Defect(
            f"{len(ordered) - len(places)} doubled slices, first {one.name} and "
            f"{another.name} at {along_normal_mm([one])[0]:.2f} mm; expected one image per "
            f"position{unlike and '; ' + unlike}",
            "" if unlike else "duplicates",
        )
    apart_mm = gaps_mm[gaps_mm >= SAME_PLACE_MM]
    if not len(apart_mm):
        return
    yield from _check_gaps(ordered, along_mm, usual_mm=float(np.median(apart_mm)))
    yield from _check_tilt(ordered, along_mm)


def _check_gaps(
    ordered: Sequence[Slice], along_mm: np.ndarray, *, usual_mm: float
) -> Iterator[Defect]:
    gaps_mm = np.diff(along_mm)
    uneven = (gaps_mm >= SAME_PLACE_MM) & (
        np.abs(gaps_mm - usual_mm) > GAP_ATOL_MM + GAP_RTOL * usual_mm
    )
    if not uneven.any():
        return
    k = int(np.argmax(np.where(uneven, gaps_mm, 0)))
    missing = int(np.rint(gaps_mm[uneven] / usual_mm - 1).clip(0).sum())
    reason = (
        f"{int(uneven.sum())} uneven gaps, about {missing} slices missing; widest "
        f"{gaps_mm[k]:.3f} mm between {ordered[k].name} and {ordered[k + 1].name} at "
        f"{along_mm[k]:.2f} mm; expected {usual_mm:.3f} mm throughout"
    )
    if gaps_mm[k] > MAX_MENDED_GAP_MM and missing:
        yield Defect(f"{reason}; gaps above {MAX_MENDED_GAP_MM:g} mm are not mended")
    else:
        yield Defect(reason, "gaps")


def _check_tilt(ordered: Sequence[Slice], along_mm: np.ndarray) -> Iterator[Defect]:
    line_mm, lean = _line(ordered, along_mm)
    off_mm = np.linalg.norm(_sideways_mm(ordered, along_mm) - line_mm, axis=1)
    k = int(np.argmax(off_mm))
    if off_mm[k] > SIDEWAYS_MM:
        yield Defect(
            f"{ordered[k].name} lies {off_mm[k]:.2f} mm beside the line through all "
            f"slices; expected at most {SIDEWAYS_MM} mm"
        )
        return
    lean_deg = float(np.degrees(np.arctan(np.linalg.norm(lean))))
    if lean_deg > TILT_DEG:
        yield Defect(
            f"the stack leans {lean_deg:.1f} deg from the slice normal (gantry tilt); "
            f"expected at most {TILT_DEG} deg",
            "tilt",
        )
        return
    stated = max(ordered, key=lambda s: abs(s.tilt_deg))
    normal_deg = float(np.degrees(np.arccos(min(abs(slice_normal(stated)[2]), 1))))
    if abs(stated.tilt_deg) > TILT_DEG and normal_deg < TILT_DEG:
        yield Defect(
            f"GantryDetectorTilt is {stated.tilt_deg:g} deg in {stated.name}, but the "
            "positions and orientation show none; expected them to agree; to trust the "
            "positions",
            "tilt",
        )


def slice_normal(item: Slice) -> np.ndarray:
    """(3,) LPS unit vector from the slice towards where its column x row axes point.

    It is the cross product of DICOM's row and column directions: towards the head for
    ordinary axial images.
    """
    along_rows, along_columns = item.axes_lps
    normal = np.cross(along_columns, along_rows)
    return normal / np.linalg.norm(normal)


def along_normal_mm(slices: Sequence[Slice]) -> np.ndarray:
    """(slices,) position of each slice along the normal of the first."""
    return np.array([s.position_lps_mm for s in slices]) @ slice_normal(slices[0])


def sorted_slices(slices: Sequence[Slice]) -> list[Slice]:
    """By position along the normal, then InstanceNumber, then path and frame."""
    along_mm = along_normal_mm(slices)
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


def by_place(ordered: Sequence[Slice]) -> list[list[Slice]]:
    """Sorted slices, those at one position together: by InstanceNumber, path and frame."""
    along_mm = along_normal_mm(ordered)
    places: list[list[Slice]] = []
    start_mm = -np.inf
    for item, at_mm in zip(ordered, along_mm, strict=True):
        if at_mm - start_mm >= SAME_PLACE_MM:
            places.append([])
            start_mm = at_mm
        places[-1].append(item)
    return [sorted(p, key=lambda s: (s.instance, s.path, s.frame)) for p in places]


def unlike_doubles(doubled: Sequence[Sequence[Slice]]) -> str:
    """Why images at the same positions are not the same series twice; "" if they are.

    Args:
        doubled: Per position, its images as `by_place` sorts them. Their first ones are
            kept, so these must be one set, and so must the second ones.
    """
    for place in doubled:
        for name, attribute in DOUBLE_TAGS.items():
            found = [getattr(item, attribute) for item in place]
            for item, value in zip(place, found, strict=True):
                if value != found[0]:
                    return (
                        f"{place[0].name} and {item.name} differ in {name} ({found[0]!r}, "
                        f"{value!r}), so they are two reconstructions; separate them"
                    )
    # Copies of one file: it does not matter which stays.
    doubled = [p for p in doubled if len({item.sop_uid for item in p}) > 1]
    if _in_folders(doubled) or _in_order(doubled):
        return ""
    return (
        "neither InstanceNumber nor folder tells which images belong together; separate "
        "the two sets"
    )


def _in_folders(doubled: Sequence[Sequence[Slice]]) -> bool:
    """Whether the first images of all positions, the second ones, ... have a folder each."""
    folders = [tuple(item.path.parent for item in place) for place in doubled]
    most = max(folders, key=len, default=())
    return len(set(most)) == len(most) and all(f == most[: len(f)] for f in folders)


def _in_order(doubled: Sequence[Sequence[Slice]]) -> bool:
    """Whether the first images of all positions, the second ones, ... are numbered one way."""
    for place in doubled:
        if any(a.instance == b.instance for a, b in pairwise(place)):
            return False
    for rank in range(max(map(len, doubled), default=0)):
        numbers = [place[rank].instance for place in doubled if len(place) > rank]
        directions = {int(np.sign(step)) for step in np.diff(numbers)}
        if not (directions <= {1} or directions <= {-1}):
            return False
    return True


def without_duplicates(ordered: Sequence[Slice]) -> list[Slice]:
    """Keeps the first image of each position, if these are one set; else all."""
    places = by_place(ordered)
    if unlike_doubles([place for place in places if len(place) > 1]):
        return list(ordered)
    return [place[0] for place in places]


def _sideways_mm(ordered: Sequence[Slice], along_mm: np.ndarray) -> np.ndarray:
    """(slices, 3) LPS offset of each slice across the normal, from the first slice."""
    origins = (
        np.array([s.position_lps_mm for s in ordered]) - ordered[0].position_lps_mm
    )
    return origins - np.outer(along_mm - along_mm[0], slice_normal(ordered[0]))


def _line(
    ordered: Sequence[Slice], along_mm: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """The straight line nearest to the slices' sideways offsets, and its lean per mm."""
    sideways_mm = _sideways_mm(ordered, along_mm)
    centred_mm = along_mm - along_mm.mean()
    lean = centred_mm @ sideways_mm / (centred_mm @ centred_mm)
    return sideways_mm.mean(axis=0) + np.outer(centred_mm, lean), lean


def _files(some: Sequence[Slice], every: Sequence[Slice]) -> str:
    return f"{len(some)} of {len(every)} images (first {some[0].name})"


def _text(value: Any) -> str:
    return np.array2string(np.asarray(value), precision=4, separator=", ").replace(
        "\n", ""
    )


def stack_slices(ordered: Sequence[Slice]) -> tuple[np.ndarray, Grid]:
    """HU of sorted slices, and their grid.

    Returns:
        (slice, row, column) int16 HU, and the grid, with the mean step between slices.

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
    arrays = iter_pixels(
        path,
        indices=[item.frame for item in frames],
        raw=True,
        decoding_plugin=PLUGINS.get(syntax, ""),
    )
    try:
        for item, stored in zip(frames, arrays, strict=True):
            if stored.shape != item.size_px:
                raise ValueError(f"shape {stored.shape}, expected {item.size_px}")
            yield stored
    except PIXEL_ERRORS as error:
        reason = " ".join(str(error).split())
        raise ScanError(
            f"series {frames[0].series_uid}: the pixels of {path.name} ({syntax.name}) "
            f"cannot be read: {reason}; restore the file from its source"
        ) from error


def to_hu(stored: np.ndarray, item: Slice) -> np.ndarray:
    """HU of one image: rescaled, rounded, clipped to int16, padding set to AIR_HU."""
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
    """Grid of (slice, row, column) voxels: LPS columns of the affine, turned to RAS."""
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
    """The same voxels in the opposite order of axes."""
    i, j, k = grid.shape
    return Grid((k, j, i), grid.affine[:, [2, 1, 0, 3]])


def check_neighbours(volume: np.ndarray, ordered: Sequence[Slice]) -> None:
    """Raises ScanError where slices are damaged, though they could be decoded.

    Refused are blank slices, slices that are their neighbour's copy, and neighbours that
    differ too much: a slice of another scan, or some slices of another rescale.

    Args:
        volume: (slice, row, column) HU.
        ordered: Its slices.
    """
    series = f"series {ordered[0].series_uid}"
    blank = [k for k, image in enumerate(volume) if image.min() == image.max()]
    if blank:
        raise ScanError(
            f"{series}: {_names(blank, ordered)} blank, the first is {volume[blank[0], 0, 0]} "
            "HU throughout; expected an image of the body; restore the files"
        )
    copies = [
        k + 1 for k, (a, b) in enumerate(pairwise(volume)) if np.array_equal(a, b)
    ]
    if copies:
        raise ScanError(
            f"{series}: {_names(copies, ordered)} equal to the slice before, to the last "
            f"bit (first {ordered[copies[0] - 1].name}); expected another image at "
            "another position; restore the files"
        )
    if len(volume) < 4:
        return
    steps_hu = _steps_by_quarter_hu(volume)
    usual_hu = np.median(steps_hu, axis=0)
    gaps_mm = np.diff(along_normal_mm(ordered))
    # Slices further apart may differ by more.
    apart = np.maximum(gaps_mm / np.median(gaps_mm), 1)
    over = steps_hu > np.maximum(CORRUPT_HU, CORRUPT_RATIO * np.outer(apart, usual_hu))
    jumps = np.flatnonzero(over.any(axis=1))
    if len(jumps):
        named = ", and ".join(
            f"by {steps_hu[k].max():.0f} HU from {ordered[k].name} to {ordered[k + 1].name}"
            for k in jumps[:NAMED_SLICES]
        )
        raise ScanError(
            f"{series}: the values change {len(jumps)} times more than between other "
            f"slices, on average over a quarter of the image {named}; expected about "
            f"{usual_hu.max():.0f} HU as elsewhere; the slices on one side are damaged, or "
            "of another scan or rescale"
        )


def _steps_by_quarter_hu(volume: np.ndarray) -> np.ndarray:
    """(slices - 1, 4) mean difference of neighbours in the quarters of the image."""
    thin = volume[:, ::4, ::4].astype(np.float32)
    steps_hu = np.abs(np.diff(thin, axis=0))
    row, column = (n // 2 for n in thin.shape[1:])
    return np.stack(
        [
            steps_hu[:, rows, columns].mean(axis=(1, 2))
            for rows in (slice(row), slice(row, None))
            for columns in (slice(column), slice(column, None))
        ],
        axis=1,
    )


def _names(indices: Sequence[int], ordered: Sequence[Slice]) -> str:
    """Some slices by name, and how many they are."""
    named = ", ".join(ordered[k].name for k in indices[:NAMED_SLICES])
    more = ", ..." if len(indices) > NAMED_SLICES else ""
    return f"{len(indices)} of {len(ordered)} slices ({named}{more}) are"


def check_field(grid: Grid, name: str) -> None:
    """Raises ScanError if a volume is larger than any that a scanner makes.

    Args:
        grid: Canonical.
        name: The series or file, for the message.
    """
    sizes_mm = [n * mm for n, mm in zip(grid.shape, grid.spacing_mm, strict=True)]
    if any(size > most for size, most in zip(sizes_mm, MAX_FIELD_MM, strict=True)):
        found, expected = (
            " x ".join(f"{mm:.0f}" for mm in sizes)
            for sizes in (sizes_mm, MAX_FIELD_MM)
        )
        raise ScanError(
            f"{name}: the field is {found} mm (z, y, x); expected at most {expected}; is "
            "its spacing in mm?"
        )


def check_hu(hu: np.ndarray, name: str) -> None:
    """Raises ScanError if the values of a volume cannot be HU of a body.

    There must be air (apart from padding) and soft tissue.

    Args:
        hu: (z, y, x) int16.
        name: The series or file, for the message.
    """
    thin = hu[:, ::4, ::4] if hu[0].size > 256 * 256 else hu
    counts = np.bincount(thin.ravel().astype(np.int32) - np.iinfo(np.int16).min)
    counts = np.pad(counts, (0, (1 << 16) - len(counts)))
    if _looks_like_hu(counts, 0):
        return
    low, middle, high = np.percentile(thin, (1, 50, 99))
    message = (
        f"{name}: the values are no Hounsfield units (1st, 50th and 99th percentile "
        f"{low:.0f}, {middle:.0f}, {high:.0f}); expected air near -1000 and soft tissue "
        "near 0 to 100"
    )
    if _looks_like_hu(counts, -USUAL_INTERCEPT_HU):
        message += (
            f"; they would be if {-USUAL_INTERCEPT_HU} were subtracted: is the rescale "
            "intercept missing?"
        )
    raise ScanError(message)


def _looks_like_hu(counts: np.ndarray, offset_hu: int) -> bool:
    def share(low: int, high: int) -> float:
        start = offset_hu - np.iinfo(np.int16).min
        return counts[max(low + start, 0) : max(high + start, 0)].sum() / counts.sum()

    return (
        share(*AIR_RANGE_HU) >= MIN_AIR_SHARE
        and share(*SOFT_RANGE_HU) >= MIN_SOFT_SHARE
    )


def _z_of_sop(ordered: Sequence[Slice], grid: Grid) -> dict[str, int]:
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
    return {item.sop_uid: k for item, k in zip(ordered, z, strict=True)}


def fill_gaps(volume: np.ndarray, ordered: Sequence[Slice]) -> tuple[np.ndarray, Grid]:
    """Slices at even distances, linearly interpolated where there was none.

    Args:
        volume: (slice, row, column) HU at the positions of `ordered`.
        ordered: Its slices, none doubled.

    Returns:
        The regular volume, int16, from the first to the last slice, and its grid.
    """
    along_mm = along_normal_mm(ordered)
    length_mm = along_mm[-1] - along_mm[0]
    count = round(length_mm / np.median(np.diff(along_mm))) + 1
    wanted_mm = np.linspace(along_mm[0], along_mm[-1], count)
    right = np.clip(np.searchsorted(along_mm, wanted_mm), 1, len(along_mm) - 1)
    span_mm = along_mm[right] - along_mm[right - 1]
    shares = (wanted_mm - along_mm[right - 1]) / span_mm
    # A slice that is there stays as it is, though it lies a hair beside its place.
    close = GAP_ATOL_MM + GAP_RTOL * span_mm
    shares[np.abs(wanted_mm - along_mm[right - 1]) <= close] = 0
    shares[np.abs(wanted_mm - along_mm[right]) <= close] = 1
    regular = np.empty((count, *volume.shape[1:]), np.int16)
    for k, (after, share) in enumerate(zip(right, shares, strict=True)):
        mixed = volume[after - 1] * (1 - share) + volume[after] * share
        regular[k] = np.rint(mixed)
    step = (ordered[-1].position_lps_mm - ordered[0].position_lps_mm) / (count - 1)
    log.info(
        "series %s: %d slices became %d", ordered[0].series_uid, len(volume), count
    )
    return regular, _grid(regular.shape, ordered[0], step)


def straighten(volume: np.ndarray, grid: Grid) -> tuple[np.ndarray, Grid]:
    """Undoes the shear of a tilted stack by shifting each slice within its plane.

    Args:
        volume: (slice, row, column) HU.
        grid: Its sheared grid.

    Returns:
        The volume on a grid with perpendicular axes, int16; rows and columns are added
        so that no slice is cut, and filled with AIR_HU.
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
