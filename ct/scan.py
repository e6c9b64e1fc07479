"""One CT scan in memory and on disk: HU, geometry, lung labels and readers' nodules.

A scan file is HDF5, one Blosc2-compressed chunk per axial slice:

    /hu             (z, y, x) int16   Hounsfield units
    /lung           (z, y, x) uint8   0 outside, 1 right lung, 2 left lung
    /reader_bits    (z, y, x) uint8   bit r is set where reader r outlined a nodule
    /nodule_labels  (z, y, x) uint8   0, or the label of the nodule the voxel belongs to

`lung`, `reader_bits` and `nodule_labels` are absent when unknown. /record holds
everything else as JSON in UTF-8 bytes; an HDF5 attribute could not exceed 64 kB.
"""

import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ct import files, hdf5
from ct.fingerprint import hu_sha256
from ct.geometry import Grid

if TYPE_CHECKING:
    import tables


FORMAT_VERSION = 2
"""Format version of scan files; increased when older files become unreadable."""

VOLUMES = ("hu", "lung", "reader_bits", "nodule_labels")
RIGHT, LEFT = 1, 2
"""Values of lung labels, the same as lungmask writes."""

AIR_HU = -1024
"""HU outside the body and outside the field of view."""

PHANTOM = "PHANTOM-"
"""Prefix of the patient ids of phantoms; no real patient id begins with it."""


class ScanError(ValueError):
    """Unusable series; the message says which, what was found and what was expected."""


@dataclass(frozen=True)
class ScanSource:
    """Location of one scan, known without reading its pixels.

    Attributes:
        scan_id: Name of the scan in every output; a SeriesInstanceUID or the list's
            pid.
        patient_id: Id that splits are made by; never a patient's name.
        paths: Image file, or the DICOM files of the series in any order.
        annotations: Files with nodules: LIDC XML, a label volume, LUNA16's CSV.
        subset: LUNA16 subset or nnU-Net part ("Tr", "Ts"); "" when there is none.
        lung: Label volume of the lungs, or None.
        spacing_mm: (z, y, x) of a volume without spacing, if a list gives it.
    """

    scan_id: str
    patient_id: str
    paths: tuple[Path, ...]
    annotations: tuple[Path, ...] = ()
    subset: str = ""
    lung: Path | None = None
    spacing_mm: tuple[float, float, float] | None = None


@dataclass(frozen=True)
class Annotation:
    """One reader's annotation of one nodule.

    Attributes:
        reader: Number of the reader, 0 to 7, and of its bit in `Scan.reader_bits`.
        volume_mm3: Number of outlined voxels times the voxel volume.
        diameter_mm: Largest in-plane extent; see `outlines.diameter_mm`.
        characteristics: LIDC ratings (subtlety, malignancy, ...), 1 to 5 or 6.
        outline_volume_mm3, outline_diameter_mm: Volume and diameter by pylidc's
            definition, from the outline instead of the mask; larger. None without
            outline.
    """

    reader: int
    volume_mm3: float
    diameter_mm: float
    characteristics: dict[str, int] = field(default_factory=dict)
    outline_volume_mm3: float | None = None
    outline_diameter_mm: float | None = None


@dataclass(frozen=True)
class Nodule:
    """One nodule: the annotations of the readers who outlined it.

    Attributes:
        label: Value in `Scan.nodule_labels`, 1 to 255.
        centre_ras_mm: Centre of mass of the union of the readers' masks.
        annotations: One per reader, ordered by reader.
    """

    label: int
    centre_ras_mm: tuple[float, float, float]
    annotations: tuple[Annotation, ...]

    @property
    def diameter_mm(self) -> float:
        """Mean of the readers' diameters."""
        return sum(a.diameter_mm for a in self.annotations) / len(self.annotations)

    @property
    def readers(self) -> int:
        """Number of readers who outlined it."""
        return len(self.annotations)


@dataclass(frozen=True, eq=False)
class Scan:
    """A CT scan in canonical orientation (see `geometry`) and the facts known about it.

    Attributes:
        scan_id, patient_id, subset: See `ScanSource`.
        series_uid: SeriesInstanceUID, or "" when the source has none.
        hu: (z, y, x) int16 Hounsfield units.
        grid: Grid of `hu`.
        source_grid: Grid of the source file; `geometry.to_source` maps outputs back to
            it.
        lung: (z, y, x) uint8 lung labels, or None.
        reader_bits: (z, y, x) uint8, bit r is set where reader r outlined a nodule.
            None if no reader read the scan; all zero if it was read and has no nodule.
        nodule_labels: (z, y, x) uint8 nodule label of each voxel in any reader's mask,
            or None.
        nodules: One per label.
        acquisition: Technical header facts (kernel, kVp, thickness) without identity,
            and the source's statements about findings that are not outlined.
        warnings: What is odd about the source without making geometry or HU wrong; names
            files without folders.
        whole: False for patches around a nodule (`cohorts.patches`): these get no lung
            labels, and values named mm or HU may be in other units.
    """

    scan_id: str
    patient_id: str
    hu: np.ndarray
    grid: Grid
    source_grid: Grid
    series_uid: str = ""
    subset: str = ""
    lung: np.ndarray | None = None
    reader_bits: np.ndarray | None = None
    nodule_labels: np.ndarray | None = None
    nodules: tuple[Nodule, ...] = ()
    acquisition: dict[str, Any] = field(default_factory=dict)
    whole: bool = True
    warnings: tuple[str, ...] = ()

    @property
    def spacing_mm(self) -> tuple[float, float, float]:
        """Voxel spacing (z, y, x) in mm."""
        return self.grid.spacing_mm

    def unread(self) -> "Scan":
        """Returns the scan without nodules and their masks, as if no reader had read it."""
        return replace(self, reader_bits=None, nodule_labels=None, nodules=())


def reader_votes(reader_bits: np.ndarray) -> np.ndarray:
    """Counts the readers who marked each voxel; uint8, shape of `reader_bits`."""
    return np.bitwise_count(reader_bits)


def readers_in(bits: np.ndarray | int) -> list[int]:
    """Returns the readers, ascending, whose bit is set anywhere in `bits`."""
    drawn = int(np.bitwise_or.reduce(np.asarray(bits), axis=None))
    return [reader for reader in range(8) if drawn >> reader & 1]


def consensus(
    reader_bits: np.ndarray,
    nodule_labels: np.ndarray,
    readers_of_label: np.ndarray,
    *,
    level: float,
    min_readers: int = 1,
) -> np.ndarray:
    """Returns the voxels outlined by at least a share `level` of a nodule's readers.

    Args:
        reader_bits: (...) uint8 reader bits.
        nodule_labels: (...) uint8 label of the nodule at each voxel.
        readers_of_label: (256,) number of readers per label; entry 0 is unused.
        level: Share of the nodule's own readers, above 0 to 1; `clevel` in pylidc.
        min_readers: Nodules outlined by fewer readers are left out.

    Returns:
        (...) bool mask.
    """
    readers = np.asarray(readers_of_label, np.float32)
    votes_needed = np.maximum(np.ceil(readers * level - 1e-6), 1)
    votes_needed[readers < max(min_readers, 1)] = 255
    votes_needed[0] = 255
    return reader_votes(reader_bits) >= votes_needed.astype(np.uint8)[nodule_labels]


def readers_of_label(nodules: Iterable[Nodule]) -> np.ndarray:
    """Counts the readers of each nodule label; (256,) uint8, 0 for unused labels."""
    counts = np.zeros(256, np.uint8)
    for nodule in nodules:
        counts[nodule.label] = nodule.readers
    return counts


def write_scan(scan: Scan, path: Path, provenance: dict[str, Any]) -> None:
    """Writes a scan file and reads it back; the file appears whole or not at all.

    Raises:
        OSError: If it cannot be written, for example because the disk is full.
    """
    record = {
        "format_version": FORMAT_VERSION,
        "scan_id": scan.scan_id,
        "patient_id": scan.patient_id,
        "series_uid": scan.series_uid,
        "hu_sha256": hu_sha256(scan.hu),
        "subset": scan.subset,
        "grid": scan.grid.to_json(),
        "source_grid": scan.source_grid.to_json(),
        "nodules": [nodule_to_json(nodule) for nodule in scan.nodules],
        "acquisition": scan.acquisition,
        "whole": scan.whole,
        "warnings": list(scan.warnings),
        "provenance": provenance,
    }
    with files.write_atomically(path) as partial:
        with hdf5.open_new(partial, path) as h5:
            for name in VOLUMES:
                volume = getattr(scan, name)
                if volume is not None:
                    h5.create_carray(
                        "/",
                        name,
                        obj=volume,
                        filters=hdf5.filters(volume.dtype),
                        chunkshape=(1, *volume.shape[1:]),
                    )
            text = json.dumps(record).encode()
            h5.create_array("/", "record", obj=np.frombuffer(text, np.uint8))
        if not _holds(partial, scan):
            raise hdf5.not_written(path, "it does not read back as it was written")


def _holds(path: Path, scan: Scan) -> bool:
    """Tells whether a scan file holds the volumes and the nodules of `scan`."""
    try:
        found = read_scan(path)
    except (ScanError, OSError):
        return False
    return found.nodules == scan.nodules and all(
        np.array_equal(getattr(found, name), getattr(scan, name))
        for name in VOLUMES
        if getattr(scan, name) is not None
    )


def read_scan(path: Path) -> Scan:
    """Reads a scan file.

    Raises:
        ScanError: If the file is damaged or has another format version.
    """
    with open_scan_file(path) as h5:
        record = read_record(h5, path)
        volumes = {
            name: h5.get_node("/", name)[:] for name in VOLUMES if name in h5.root
        }
    return Scan(
        scan_id=record["scan_id"],
        patient_id=record["patient_id"],
        series_uid=record["series_uid"],
        subset=record["subset"],
        grid=Grid.from_json(record["grid"]),
        source_grid=Grid.from_json(record["source_grid"]),
        nodules=tuple(nodule_from_json(nodule) for nodule in record["nodules"]),
        acquisition=record["acquisition"],
        whole=record.get("whole", True),
        warnings=tuple(record.get("warnings", ())),
        **volumes,
    )


@contextmanager
def open_scan_file(path: Path) -> Iterator["tables.File"]:
    """Opens a scan file for reading.

    Raises:
        ScanError: If the file is damaged or not a scan file.
    """
    try:
        with hdf5.open_readonly(path) as h5:
            yield h5
    except hdf5.Unreadable as error:
        raise ScanError(
            f"not a readable scan file: {error}; remove it and run preprocess.py again"
        ) from error


def read_record(h5: "tables.File", path: Path) -> dict[str, Any]:
    """Reads the JSON record of an open scan file and checks its format version."""
    if "record" not in h5.root:
        raise ScanError(
            f"{path}: no scan record of format {FORMAT_VERSION}; expected a file made by "
            "this version's preprocess.py"
        )
    record = json.loads(h5.root.record[:].tobytes())
    if record["format_version"] != FORMAT_VERSION:
        raise ScanError(
            f"{path}: scan format {record['format_version']}, expected {FORMAT_VERSION}; "
            "run preprocess.py again with --overwrite"
        )
    return record


def scan_identity(path: Path) -> tuple[str, str]:
    """Returns patient id and scan id of a scan file without reading its volumes.

    Raises:
        ScanError: If the file is damaged or has another format version.
    """
    with open_scan_file(path) as h5:
        record = read_record(h5, path)
    return record["patient_id"], record["scan_id"]


def scan_marks(path: Path) -> tuple[str, str]:
    """Returns series UID and `hu_sha256` of a scan file; "" where it does not say.

    Raises:
        ScanError: If the file is damaged or has another format version.
    """
    with open_scan_file(path) as h5:
        record = read_record(h5, path)
    return record["series_uid"], record.get("hu_sha256", "")


def read_provenance(path: Path) -> dict[str, Any]:
    """Reads the provenance of a scan file; see `read_scan` for errors."""
    with open_scan_file(path) as h5:
        return read_record(h5, path)["provenance"]


def scan_path(scans_dir: Path, scan_id: str) -> Path:
    """Returns the path at which preprocess.py stores the scan file of `scan_id`.

    Raises:
        ValueError: If the id cannot be a file name.
    """
    scan_id = files.checked_id(scan_id, where=f"a scan file in {scans_dir}")
    return Path(scans_dir) / f"{scan_id}.h5"


def scan_files(scans_dir: Path) -> list[Path]:
    """Lists the scan files in `scans_dir`, sorted by scan id.

    Raises:
        FileNotFoundError: If there is none.
    """
    paths = sorted(Path(scans_dir).glob("[!.]*.h5"))
    if not paths:
        raise FileNotFoundError(
            f"no scan files in {scans_dir}; run preprocess.py first"
        )
    return paths


def nodule_to_json(nodule: Nodule) -> dict[str, Any]:
    return {
        "label": nodule.label,
        "centre_ras_mm": list(nodule.centre_ras_mm),
        "annotations": [vars(annotation) for annotation in nodule.annotations],
    }


def nodule_from_json(record: dict[str, Any]) -> Nodule:
    annotations = tuple(
        Annotation(**annotation) for annotation in record["annotations"]
    )
    return Nodule(record["label"], tuple(record["centre_ras_mm"]), annotations)


def reference_mask(
    scan: Scan, *, consensus_level: float, min_readers: int
) -> np.ndarray:
    """Returns the (z, y, x) bool consensus of the scan's readers.

    Raises:
        ScanError: If no reader read the scan.
    """
    if scan.reader_bits is None or scan.nodule_labels is None:
        raise ScanError(
            f"scan {scan.scan_id} has no reader annotations to compare with"
        )
    return consensus(
        scan.reader_bits,
        scan.nodule_labels,
        readers_of_label(scan.nodules),
        level=consensus_level,
        min_readers=min_readers,
    )


def without_folders(text: str, source: ScanSource) -> str:
    """Removes a source's folders from a message; hospitals name them after patients."""
    folders = {path.parent for path in (*source.paths, *source.annotations)}
    folders -= {Path(), Path("/")}
    for folder in sorted(folders, key=lambda folder: -len(str(folder))):
        text = text.replace(f"{folder}/", "").replace(str(folder), "its folder")
    return text
