"""Writing of phantoms in the form of LIDC-IDRI: DICOM files and the readers' XML."""

import xml.etree.ElementTree as ET
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from nodules.lidc_database import CHARACTERISTICS
from nodules.outlines import READERS
from phantoms.drawn_nodules import PhantomReading

TransferSyntax = Literal["explicit", "rle", "jpeg-ls"]

INTERCEPT_HU = -1024
PADDING = -2000
"""Stored value outside the round field of view of some scanners, as in LIDC-IDRI."""

DATE = "20000101"
"""Date that the de-identification of LIDC-IDRI put into every scan."""

NODULE_IDS = ("Nodule {:03}", "IL057_{:06}", "MI014_{:05}", "{}")
"""Nodule id format of each reader; LIDC sites used different ones, so no ids match."""


@dataclass(frozen=True, eq=False)
class PhantomSeries:
    """Content of one DICOM series.

    Attributes:
        patient_id: PatientID.
        study_uid, series_uid, frame_uid: UIDs of study, series and frame of reference.
        sop_uids: One UID per slice, in order of increasing z.
        hu: (z, y, x) int16 HU.
        outside_fov: (y, x) bool pixels stored as `PADDING`, or None.
        first_lps_mm: LPS x, y, z of the centre of voxel (0, 0, 0).
        pixel_mm: In-plane spacing.
        slice_spacing_mm: Distance between slices; also their thickness.
        kernel: ConvolutionKernel.
        contrast: True if contrast agent was given.
        transfer_syntax: Encoding of the pixels.
    """

    patient_id: str
    study_uid: str
    series_uid: str
    frame_uid: str
    sop_uids: tuple[str, ...]
    hu: np.ndarray
    outside_fov: np.ndarray | None
    first_lps_mm: tuple[float, float, float]
    pixel_mm: float
    slice_spacing_mm: float
    kernel: str
    contrast: bool
    transfer_syntax: TransferSyntax

    def z_mm(self, index: int) -> float:
        return self.first_lps_mm[2] + index * self.slice_spacing_mm


def uid(*sources: object) -> str:
    """Returns a DICOM UID that depends on `sources` alone."""
    from pydicom.uid import generate_uid

    return str(generate_uid(entropy_srcs=[repr(source) for source in sources]))


def write_dicom_series(
    series: PhantomSeries, folder: Path, file_numbers: Sequence[int]
) -> None:
    """Writes one file per slice.

    Args:
        series: Series to write.
        folder: An existing directory.
        file_numbers: Number in the file name of each slice, in any order.
    """
    import pydicom

    names = [f"{number:06}.dcm" for number in file_numbers]
    for index, name in zip(range(len(series.hu)), names, strict=True):
        pydicom.dcmwrite(
            folder / name, dicom_slice(series, index), enforce_file_format=True
        )


def dicom_slice(series: PhantomSeries, index: int):
    """Returns slice `index` of a series as a pydicom Dataset ready to be written."""
    import pydicom
    from pydicom import uid as known
    from pydicom.dataset import FileMetaDataset
    from pydicom.encaps import encapsulate

    file_meta = FileMetaDataset()
    file_meta.MediaStorageSOPClassUID = known.CTImageStorage
    file_meta.MediaStorageSOPInstanceUID = known.UID(series.sop_uids[index])
    file_meta.TransferSyntaxUID = known.ExplicitVRLittleEndian
    dataset = pydicom.Dataset()
    dataset.file_meta = file_meta
    for keyword, value in _header(series, index):
        setattr(dataset, keyword, value)
    stored = np.clip(series.hu[index].astype(np.int32) - INTERCEPT_HU, 0, 4095)
    stored = stored.astype("<i2")
    if series.outside_fov is not None:
        dataset.add_new("PixelPaddingValue", "SS", PADDING)
        stored[series.outside_fov] = PADDING
    if series.transfer_syntax == "rle":
        file_meta.TransferSyntaxUID = known.RLELossless
        frame = encapsulate([rle_frame(stored)])
        dataset["PixelData"] = pydicom.DataElement("PixelData", "OB", frame)
        dataset["PixelData"].is_undefined_length = True
        return dataset
    dataset["PixelData"] = pydicom.DataElement("PixelData", "OW", stored.tobytes())
    if series.transfer_syntax == "jpeg-ls":
        dataset.compress(known.JPEGLSLossless, generate_instance_uid=False)
    return dataset


def rle_frame(stored: np.ndarray) -> bytes:
    """Encodes a (rows, columns) 16-bit image as DICOM RLE (PS3.5, annex G).

    pydicom encodes byte by byte in Python, which took longer than making the phantom.
    """
    planes = stored.astype(">i2").view(np.uint8).reshape(*stored.shape, 2)
    segments = [_packed_bits(planes[:, :, byte]) for byte in range(2)]
    offsets = [64, 64 + len(segments[0])]
    header = np.array([2, *offsets, *np.zeros(13)], "<u4")
    return header.tobytes() + b"".join(segments)


def _packed_bits(plane: np.ndarray) -> bytes:
    """Encodes the rows of a uint8 plane as PackBits, padded to an even length."""
    columns, pixels = plane.shape[1], plane.ravel()
    starts_row = np.arange(pixels.size) % columns == 0
    starts = np.flatnonzero(starts_row | (np.diff(pixels, prepend=pixels[:1]) != 0))
    lengths = np.diff(starts, append=pixels.size)
    repeats = np.repeat(lengths > 2, lengths)
    # A packet is a run of three or more, or the pixels of a row between two runs.
    begins = starts_row | (np.diff(repeats, prepend=repeats[:1]))
    begins[starts[lengths > 2]] = True
    starts = np.flatnonzero(begins)
    # A packet holds at most 128 pixels.
    nth = np.arange(pixels.size) - np.repeat(
        starts, np.diff(starts, append=pixels.size)
    )
    starts = np.flatnonzero(nth % 128 == 0)
    lengths = np.diff(starts, append=pixels.size)
    runs = repeats[starts] & (lengths > 1)
    sizes = np.where(runs, 2, lengths + 1)
    ends = np.cumsum(sizes)
    packed = np.zeros(ends[-1] + ends[-1] % 2, np.uint8)
    packed[ends - sizes] = np.where(runs, 257 - lengths, lengths - 1)
    packed[(ends - sizes)[runs] + 1] = pixels[starts[runs]]
    within = ~np.repeat(runs, lengths)
    shift = np.repeat(ends - sizes + 1 - starts, lengths)
    packed[(np.arange(pixels.size) + shift)[within]] = pixels[within]
    return packed.tobytes()


SAME_IN_ALL: dict[str, object] = {
    "SpecificCharacterSet": "ISO_IR 100",
    "ImageType": ["ORIGINAL", "PRIMARY", "AXIAL"],
    "AccessionNumber": "",
    "Modality": "CT",
    "Manufacturer": "PHANTOM",
    "ManufacturerModelName": "chest phantom",
    "StudyDescription": "Chest phantom",
    "SeriesDescription": "Simulated; not a person",
    "ReferringPhysicianName": "",
    "PatientName": "",
    "PatientBirthDate": "",
    "PatientSex": "",
    "PatientIdentityRemoved": "YES",
    "DeidentificationMethod": "simulated",
    "BodyPartExamined": "CHEST",
    "ScanOptions": "HELICAL MODE",
    "KVP": "120",
    "DataCollectionDiameter": "500",
    "GantryDetectorTilt": "0",
    "XRayTubeCurrent": 300,
    "PatientPosition": "FFS",
    "StudyID": "",
    "SeriesNumber": 1,
    "AcquisitionNumber": 1,
    "PositionReferenceIndicator": "SN",
    "SamplesPerPixel": 1,
    "PhotometricInterpretation": "MONOCHROME2",
    "BitsAllocated": 16,
    "BitsStored": 16,
    "HighBit": 15,
    "PixelRepresentation": 1,
    "WindowCenter": "-600",
    "WindowWidth": "1600",
    "RescaleSlope": "1",
    "RescaleType": "HU",
}
"""Header elements shared by all slices of all phantoms; they name no person."""


def _header(series: PhantomSeries, index: int) -> Iterator[tuple[str, object]]:
    """Yields keywords and values of one slice, without the pixels."""
    from pydicom import uid as known

    z_mm = series.z_mm(index)
    rows, columns = series.hu.shape[1:]
    yield from SAME_IN_ALL.items()
    yield "SOPClassUID", known.CTImageStorage
    yield "SOPInstanceUID", series.sop_uids[index]
    for keyword in ("StudyDate", "SeriesDate", "AcquisitionDate", "ContentDate"):
        yield keyword, DATE
    for keyword in ("StudyTime", "AcquisitionTime", "ContentTime"):
        yield keyword, "000000"
    yield "PatientID", series.patient_id
    if series.contrast:
        yield "ContrastBolusAgent", "IV"
    yield "SliceThickness", _decimal(series.slice_spacing_mm)
    yield "ReconstructionDiameter", _decimal(columns * series.pixel_mm)
    yield "ConvolutionKernel", series.kernel
    yield "StudyInstanceUID", series.study_uid
    yield "SeriesInstanceUID", series.series_uid
    # The first image is the one closest to the head, as in LIDC-IDRI.
    yield "InstanceNumber", len(series.hu) - index
    position = (*series.first_lps_mm[:2], z_mm)
    yield "ImagePositionPatient", [_decimal(value) for value in position]
    yield "ImageOrientationPatient", ["1", "0", "0", "0", "1", "0"]
    yield "FrameOfReferenceUID", series.frame_uid
    yield "SliceLocation", _decimal(z_mm)
    yield "Rows", rows
    yield "Columns", columns
    yield "PixelSpacing", [_decimal(series.pixel_mm)] * 2
    yield "RescaleIntercept", str(INTERCEPT_HU)


def _decimal(value: float) -> str:
    return f"{value:.6f}"


@dataclass(frozen=True)
class Mark:
    """A point that a reader set on a non-nodule or on a nodule below 3 mm.

    Attributes:
        reader: Reader, 0 to 3.
        small_nodule: True for a nodule below 3 mm, which LIDC does not outline.
        zyx: Voxel index.
    """

    reader: int
    small_nodule: bool
    zyx: tuple[int, int, int]


def write_lidc_xml(
    series: PhantomSeries,
    readings: Sequence[PhantomReading],
    marks: Sequence[Mark],
    path: Path,
) -> None:
    """Writes the readers' outlines and marks in the XML structure of LIDC-IDRI."""
    root = ET.Element(
        "LidcReadMessage",
        {"uid": uid(series.series_uid, "read"), "xmlns": "http://www.nih.gov"},
    )
    header = ET.SubElement(root, "ResponseHeader")
    for tag, text in (
        ("Version", "1.8.1"),
        ("MessageId", "0"),
        ("DateRequest", "2000-01-01"),
        ("TimeRequest", "00:00:00"),
        ("RequestingSite", "removed"),
        ("ServicingSite", "removed"),
        ("TaskDescription", "Second unblinded read"),
        ("CtImageFile", "removed"),
        ("SeriesInstanceUid", series.series_uid),
        ("DateService", "2000-01-01"),
        ("TimeService", "00:00:00"),
        ("ResponseDescription", "1 - Reading complete"),
        ("StudyInstanceUID", series.study_uid),
    ):
        ET.SubElement(header, tag).text = text
    for reader in range(READERS):
        session = ET.SubElement(root, "readingSession")
        ET.SubElement(session, "annotationVersion").text = "3.12"
        ET.SubElement(session, "servicingRadiologistID").text = str(1000 + reader)
        _add_session(session, series, reader, readings, marks)
    ET.indent(root)
    ET.ElementTree(root).write(path, encoding="UTF-8", xml_declaration=True)


def _add_session(session, series, reader, readings, marks) -> None:
    own = [reading for reading in readings if reading.reader == reader]
    points = [mark for mark in marks if mark.reader == reader]
    number = 0
    for reading in own:
        number += 1
        nodule = _add_nodule(session, reader, number)
        ratings = ET.SubElement(nodule, "characteristics")
        for name in CHARACTERISTICS:
            ET.SubElement(ratings, name).text = str(reading.ratings[name])
        for index, outline in sorted(reading.outlines.items(), reverse=True):
            _add_roi(nodule, series, index, outline.tolist())
    for mark in points:
        number += 1
        z, y, x = mark.zyx
        if mark.small_nodule:
            _add_roi(_add_nodule(session, reader, number), series, z, [(x, y)])
            continue
        element = ET.SubElement(session, "nonNodule")
        ET.SubElement(element, "nonNoduleID").text = NODULE_IDS[reader].format(number)
        _add_place(element, series, z)
        _add_point(ET.SubElement(element, "locus"), x, y)


def _add_nodule(session, reader: int, number: int):
    nodule = ET.SubElement(session, "unblindedReadNodule")
    ET.SubElement(nodule, "noduleID").text = NODULE_IDS[reader].format(number)
    return nodule


def _add_roi(nodule, series: PhantomSeries, index: int, points) -> None:
    roi = ET.SubElement(nodule, "roi")
    _add_place(roi, series, index)
    ET.SubElement(roi, "inclusion").text = "TRUE"
    for x, y in points:
        _add_point(ET.SubElement(roi, "edgeMap"), x, y)


def _add_place(element, series: PhantomSeries, index: int) -> None:
    ET.SubElement(element, "imageZposition").text = _decimal(series.z_mm(index))
    ET.SubElement(element, "imageSOP_UID").text = series.sop_uids[index]


def _add_point(element, x: int, y: int) -> None:
    ET.SubElement(element, "xCoord").text = str(x)
    ET.SubElement(element, "yCoord").text = str(y)
