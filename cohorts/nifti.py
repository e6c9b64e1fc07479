"""Volumes in files: lists, folders, the nnU-Net layout, single files and DICOM folders.

What `find_scans` takes:

    a CSV        columns pid,image_path and optionally seg_path, lung_path, patient_id;
                 relative paths start at the list's folder; without patient_id the patient
                 is that of the DICOM header, or of LIDC-IDRI's series, else the pid
    a folder     with imagesTr or imagesTs: nnU-Net or Decathlon layout; else every volume
                 in it and below; else its DICOM series; not both
    a file       one volume

Formats: NIfTI, NRRD, MHA, MHD, and a folder of one DICOM series. Nodule masks (seg_path,
labelsTr) become those of one reader: a nodule is a connected component. Lung masks
(lung_path) hold 1 in the right lung and 2 in the left.
"""

import dataclasses
import json
import logging
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cohorts import dicom, dicom_headers, plausible
from cohorts.lists import check_unique, read_list
from cohorts.volume_file import (
    CHANNEL,
    SUFFIXES,
    UNSAFE,
    _bare,
    _grid,
    checked_lung_labels,
    is_volume,
    read_labels,
    read_volume_file,
    stem,
    to_hu,
)
from ct import files, geometry
from ct.geometry import Grid
from ct.scan import Annotation, Nodule, Scan, ScanError, ScanSource
from nodules import lidc_database, outlines

log = logging.getLogger(__name__)

MAX_NODULES = 255
"""Labels are uint8."""


def find_scans(source: Path) -> list[ScanSource]:
    """The scans of a list, a folder or a file, by scan id; see the head of this module.

    Raises:
        ValueError: If the list, layout or folder cannot be used as a whole.
    """
    source = Path(source)
    if source.is_dir():
        return _find_in_folder(source)
    if not source.is_file():
        raise ValueError(
            f"{source}: no such file or folder; expected a CSV, a folder or a volume"
        )
    if source.suffix.lower() == ".csv":
        return read_list(source)
    if not is_volume(source):
        raise ValueError(
            f"{source}: unknown kind of file; expected .csv or {', '.join(SUFFIXES)}"
        )
    return [_volume_source(source)]


def load_scan(source: ScanSource, *, repair: Sequence[str] = ()) -> Scan:
    """Reads one scan, its nodule mask and its lung mask.

    Args:
        source: As `find_scans` gives it.
        repair: Defects of DICOM series to mend; see `cohorts.dicom`.

    Raises:
        ScanError: If a file is missing or damaged, is no CT, or does not fit the others.
    """
    first = source.paths[0]
    if first.is_dir() or not is_volume(first):
        scan = _load_dicom(source, repair)
    else:
        array, affine = read_volume_file(first)
        hu, grid = geometry.to_canonical(to_hu(array, first), affine)
        plausible.check_field(grid, str(first))
        plausible.check_hu(hu, str(first))
        scan = Scan(
            scan_id=source.scan_id,
            patient_id=source.patient_id,
            hu=hu,
            grid=grid,
            source_grid=_grid(array, affine),
            subset=source.subset,
        )
    known: dict[str, Any] = {}
    if source.annotations:
        labels = read_labels(source.annotations[0], scan.grid)
        known = nodules_of_mask(labels > 0, scan.grid, str(source.annotations[0]))
    if source.lung is not None:
        known["lung"] = checked_lung_labels(
            read_labels(source.lung, scan.grid), str(source.lung)
        )
    return dataclasses.replace(scan, **known)


def scan_of_array(array: np.ndarray, spacing_mm: Sequence[float]) -> Scan:
    """A scan of an array in memory, called "array".

    Args:
        array: (z, y, x) HU, z rising to the head, y to the back, x to the patient's left.
        spacing_mm: (z, y, x).

    Raises:
        ValueError: If these are not the voxels and spacings of a volume; as ScanError if
            its values or size are not those of a CT.
    """
    name = Path("array")
    if array.ndim != 3 or min(array.shape) < 2 or array.dtype.kind not in "iuf":
        raise ScanError(
            f"{name}: {array.dtype} of shape {array.shape}; expected (z, y, x) HU of two or "
            "more slices"
        )
    grid = geometry.canonical_grid(array.shape, spacing_mm)
    hu = to_hu(array, name)
    plausible.check_field(grid, str(name))
    plausible.check_hu(hu, str(name))
    return Scan(
        scan_id=name.name, patient_id=name.name, hu=hu, grid=grid, source_grid=grid
    )


def _load_dicom(source: ScanSource, repair: Sequence[str]) -> Scan:
    paths = source.paths
    if not paths[0].exists():
        raise ScanError(f"{paths[0]}: no such file or folder; expected a CT")
    if paths[0].is_dir():
        found = dicom.find_scans(paths[0])
        if len(found) > 1:
            listed = ", ".join(f"{s.scan_id} ({len(s.paths)} files)" for s in found)
            raise ScanError(
                f"{paths[0]}: {len(found)} CT series ({listed}); expected one; name "
                "a folder that holds one"
            )
        paths = found[0].paths
    series = dicom.read_series(paths, repair=repair)
    return Scan(
        scan_id=source.scan_id,
        patient_id=source.patient_id,
        hu=series.hu,
        grid=series.grid,
        source_grid=series.source_grid,
        series_uid=series.series_uid,
        subset=source.subset,
        acquisition=series.acquisition,
    )


def _find_in_folder(folder: Path) -> list[ScanSource]:
    if (folder / "imagesTr").is_dir() or (folder / "imagesTs").is_dir():
        return find_nnunet(folder)
    volumes = sorted(path for path in files.below(folder) if is_volume(path))
    if not volumes:
        return dicom.find_scans(folder)
    ct_image = dicom_headers.first_ct_image(folder)
    if ct_image is not None:
        raise ValueError(
            f"{folder}: holds volumes ({len(volumes)}, first {volumes[0]}) and DICOM CT "
            f"(first {ct_image}); expected one kind. Name a folder that holds one, or list "
            "the scans in a CSV"
        )
    _refuse_channels(volumes)
    sources = [_volume_source(path) for path in volumes]
    check_unique([(s.scan_id, str(s.paths[0])) for s in sources], folder)
    return sources


def _refuse_channels(volumes: Sequence[Path]) -> None:
    """Raises ValueError if a volume is nnU-Net's second channel of one beside it.

    A name that ends in a number is no channel where there is no CASE_0000: LUNG_0001.
    """
    first = {(p.parent, stem(p)) for p in volumes if _bare(p).endswith(CHANNEL)}
    for path in volumes:
        case, mark, number = _bare(path).rpartition("_")
        further = mark and re.fullmatch(r"\d{4}", number) and f"_{number}" != CHANNEL
        if further and (path.parent, case) in first:
            raise ValueError(
                f"{path}: a second volume of case {case}, beside its {case}{CHANNEL}; "
                "expected one channel, CT; list the scans in a CSV if these are two"
            )


def _volume_source(path: Path) -> ScanSource:
    scan_id = safe_id(path)
    patient_id = lidc_database.known_patient(scan_id) or scan_id
    return ScanSource(scan_id, patient_id, (path,))


def safe_id(path: Path) -> str:
    """The id of a volume's scan: the file's stem, what cannot name a file replaced by _."""
    scan_id = UNSAFE.sub("_", stem(path))
    if not scan_id[:1].isalnum():
        scan_id = f"x{scan_id}"
    if scan_id != stem(path):
        log.warning("%s: its scan is called %s", path, scan_id)
    return files.checked_id(scan_id, where=f"name of {path}")


def find_nnunet(folder: Path) -> list[ScanSource]:
    """The cases of imagesTr (with labelsTr) and imagesTs (with labelsTs, if there).

    nnU-Net's names (CASE_0000.nii.gz) and those of the Medical Segmentation Decathlon
    (CASE.nii.gz) are understood.

    Raises:
        ValueError: If dataset.json speaks of something else than CT, a case has several
            channels, or a training case lacks its label.
    """
    _check_dataset(folder / "dataset.json")
    sources = [source for part in ("Tr", "Ts") for source in _nnunet_part(folder, part)]
    if not sources:
        raise ValueError(f"{folder}: imagesTr and imagesTs hold no volume")
    check_unique([(s.scan_id, str(s.paths[0])) for s in sources], folder)
    return sources


def _check_dataset(path: Path) -> None:
    if not path.is_file():
        return
    try:
        dataset = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not readable JSON ({error})") from error
    channels = dataset.get("channel_names", dataset.get("modality", {"0": "CT"}))
    if [str(name).upper() for name in channels.values()] != ["CT"]:
        raise ValueError(f"{path}: channels {channels}; expected CT alone")
    if "ignore" in dataset.get("labels", {}):
        raise ValueError(
            f"{path}: the labels have an 'ignore' class; expected nodules alone"
        )


def _nnunet_part(folder: Path, part: str) -> Iterator[ScanSource]:
    labels = _volumes_by_stem(folder / f"labels{part}")
    for case, image in _volumes_by_stem(folder / f"images{part}").items():
        scan_id = safe_id(image)
        if part == "Tr" and labels and case not in labels:
            raise ValueError(
                f"{image}: no label for it in {folder / 'labelsTr'}; expected one named "
                f"{case} with the suffix of a volume"
            )
        annotations = (labels[case],) if case in labels else ()
        patient_id = lidc_database.known_patient(scan_id) or scan_id
        yield ScanSource(scan_id, patient_id, (image,), annotations, part)


def _volumes_by_stem(folder: Path) -> dict[str, Path]:
    if not folder.is_dir():
        return {}
    volumes = sorted(
        p for p in folder.iterdir() if is_volume(p) and not p.name.startswith(".")
    )
    _refuse_channels(volumes)
    by_stem: dict[str, Path] = {}
    for path in volumes:
        if stem(path) in by_stem:
            raise ValueError(
                f"{path}: a second volume of case {stem(path)}; expected one channel, CT"
            )
        by_stem[stem(path)] = path
    return by_stem


def nodules_of_mask(mask: np.ndarray, grid: Grid, name: str) -> dict[str, Any]:
    """One reader's nodules: the connected components of a mask, 26-connected.

    Args:
        mask: (z, y, x) bool.
        grid: Where it lies.
        name: The file, for the message.

    Returns:
        `reader_bits`, `nodule_labels` and `nodules` as `Scan` has them; all empty for an
        empty mask: read, and no nodule.
    """
    import cc3d

    components = cc3d.connected_components(mask, connectivity=26)
    found = cc3d.statistics(components)
    count = len(found["voxel_counts"]) - 1
    if count > MAX_NODULES:
        raise ScanError(
            f"{name}: {count} separate regions; expected at most {MAX_NODULES} nodules"
        )
    nodules = []
    for label in range(1, count + 1):
        box = found["bounding_boxes"][label]
        region = components[box] == label
        annotation = Annotation(
            reader=0,
            volume_mm3=outlines.volume_mm3(region, grid.voxel_mm3),
            diameter_mm=outlines.diameter_mm(region, grid.spacing_mm),
        )
        centre = grid.index_to_ras_mm(found["centroids"][label]).tolist()
        nodules.append(Nodule(label, tuple(centre), (annotation,)))
    return {
        "reader_bits": mask.astype(np.uint8),
        "nodule_labels": components.astype(np.uint8),
        "nodules": tuple(nodules),
    }
