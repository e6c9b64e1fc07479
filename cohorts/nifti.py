"""Reads volume files from lists, folders, nnU-Net layouts, and DICOM folders.

`find_scans` accepts:

    a CSV        columns pid,image_path and optionally seg_path, lung_path, patient_id, and for
                 volumes without spacing spacing_z_mm, spacing_y_mm, spacing_x_mm;
                 relative paths start at the list's folder; without patient_id, the patient
                 comes from the DICOM header or the LIDC-IDRI series, else it is the pid
    a folder     if it contains imagesTr or imagesTs: nnU-Net or Decathlon layout; else all
                 volumes at any depth; else its DICOM series; volumes and DICOM in one
                 folder are an error
    a file       one volume, a DICOM image of several frames, a DICOMDIR, which stands for its
                 folder, or a zip of DICOM series

Formats are NIfTI, NRRD, MHA, MHD, TIFF, and a folder or zip of one DICOM series. Of several
series in the folder of one scan, the best one is read, with a warning. A nodule mask
(seg_path, labelsTr) counts as the mask of one reader, with one nodule per connected
component. A lung mask (lung_path) holds 1 in the right lung and 2 in the left.
"""

import dataclasses
import json
import logging
import re
from collections.abc import Container, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cohorts import dicom, dicom_headers, dicom_read, plausible, zipped
from cohorts.lists import check_unique, read_list
from cohorts.volume_file import (
    CHANNEL,
    SUFFIXES,
    UNSAFE,
    bare_name,
    checked_lung_labels,
    grid_of_affine,
    is_tiff,
    is_volume,
    read_labels,
    read_volume_file,
    stem,
    to_hu,
)
from ct import files, geometry
from ct.geometry import Grid
from ct.scan import Annotation, Nodule, Scan, ScanError, ScanSource, without_folders
from nodules import lidc_database, outlines

log = logging.getLogger(__name__)

MAX_NODULES = 255
"""Largest number of nodules per scan, because labels are uint8."""


def find_scans(source: Path) -> list[ScanSource]:
    """Finds the scans of a list, a folder or a file; see the module docstring.

    Raises:
        ValueError: If the list, layout or folder as a whole is unusable.
    """
    source = Path(source)
    if source.is_dir() or is_dicomdir(source):
        return _find_in_folder(source if source.is_dir() else source.parent)
    if not source.is_file():
        raise ValueError(
            f"{source}: no such file or folder; expected a CSV, a folder or a volume"
        )
    if source.suffix.lower() == ".csv":
        return read_list(source)
    if zipped.is_zip(source):
        return _find_in_zip(source)
    if not is_volume(source):
        image = dicom.find_image(source)
        if image is not None:
            return [image]
        raise ValueError(
            f"{source}: unknown file type; expected .csv, .zip, a DICOM image or "
            f"{', '.join(SUFFIXES)}"
        )
    return [_volume_source(source)]


def load_scan(
    source: ScanSource, *, repair: Sequence[str] = (), series: str = ""
) -> Scan:
    """Reads one scan, its nodule mask and its lung mask.

    Args:
        source: A scan from `find_scans`.
        repair: Defects of DICOM series to repair; see `cohorts.dicom_read`.
        series: SeriesInstanceUID to read if the source is a folder that holds it.

    Raises:
        ScanError: If a file is missing or damaged, is not a CT, or does not fit the others.
    """
    first = source.paths[0]
    if first.is_dir() or not is_volume(first):
        scan = _load_dicom(source, repair, series)
    else:
        array, affine = read_volume_file(first, source.spacing_mm)
        hu, grid = geometry.to_canonical(to_hu(array, first), affine)
        plausible.check_field(grid, str(first))
        plausible.check_hu(hu, str(first))
        scan = Scan(
            scan_id=source.scan_id,
            patient_id=source.patient_id,
            hu=hu,
            grid=grid,
            source_grid=grid_of_affine(array, affine),
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
    """Builds a scan named "array" from an array in memory.

    Args:
        array: (z, y, x) HU; z increases to the head, y to the back, x to the left.
        spacing_mm: (z, y, x).

    Raises:
        ValueError: If the array or the spacing does not describe a volume; a ScanError if
            the values or the size cannot be those of a CT.
    """
    name = Path("array")
    if array.ndim != 3 or min(array.shape) < 2 or array.dtype.kind not in "iuf":
        raise ScanError(
            f"{name}: {array.dtype} of shape {array.shape}; expected (z, y, x) HU with at "
            "least 2 voxels per axis"
        )
    grid = geometry.canonical_grid(array.shape, spacing_mm)
    hu = to_hu(array, name)
    plausible.check_field(grid, str(name))
    plausible.check_hu(hu, str(name))
    return Scan(
        scan_id=name.name, patient_id=name.name, hu=hu, grid=grid, source_grid=grid
    )


def _load_dicom(source: ScanSource, repair: Sequence[str], series: str) -> Scan:
    first = source.paths[0]
    if not first.exists():
        raise ScanError(f"{first}: no such file or folder; expected a CT")
    if zipped.is_zip(first):
        with zipped.extracted(first) as folder:
            return _load_chosen(source, folder, repair, {series, source.scan_id})
    if first.is_dir() or is_dicomdir(first):
        folder = first if first.is_dir() else first.parent
        return _load_chosen(source, folder, repair, {series})
    special = [path for path in source.paths if not path.is_file()]
    if special:
        raise ScanError(f"{special[0]}: not a regular file; expected a CT image")
    return _load_series(source, source.paths, repair)


def _load_chosen(
    source: ScanSource, folder: Path, repair: Sequence[str], wanted: Container[str]
) -> Scan:
    """Reads the wanted series of a folder; the best one if none is wanted."""
    try:
        found = dicom.find_scans(folder)
    except ScanError as error:  # the folder may be named after the patient
        raise ScanError(str(error).replace(str(folder), "the folder")) from error
    named = [item for item in found if item.scan_id in wanted]
    people = {item.patient_id for item in found}
    if len(people) > 1 and not named:
        raise ScanError(
            f"the folder holds {len(found)} CT series of {len(people)} patients or "
            "studies; expected those of one; give a folder of one, or the --series UID of "
            "infer.py"
        )
    chosen = named[0] if named else dicom.best_series(found)
    try:
        scan = _load_series(source, chosen.paths, repair)
    except ScanError as error:
        raise ScanError(without_folders(str(error), chosen)) from error
    if named or len(found) == 1:
        return scan
    others = ", ".join(
        f"{item.scan_id} ({files.count_text(len(item.paths), 'image')})"
        for item in found
        if item is not chosen
    )
    text = (
        f"{len(found)} CT series; read {chosen.scan_id} "
        f"({files.count_text(len(chosen.paths), 'image')}), not {others}; infer.py "
        "--series UID chooses another"
    )
    return dataclasses.replace(scan, warnings=(text, *scan.warnings))


def _load_series(
    source: ScanSource, paths: Iterable[Path], repair: Sequence[str]
) -> Scan:
    series = dicom_read.read_series(paths, repair=repair)
    return Scan(
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


def is_dicomdir(path: Path) -> bool:
    """Tells whether a path is that of a DICOMDIR, whose folder holds the images."""
    return path.name.upper() == "DICOMDIR" and path.is_file()


def _find_in_zip(path: Path) -> list[ScanSource]:
    """Finds the DICOM series in a zip; their path is that of the zip."""
    with zipped.extracted(path) as folder:
        try:
            found = dicom.find_scans(folder)
        except ScanError as error:
            raise ScanError(str(error).replace(str(folder), str(path))) from error
    return [dataclasses.replace(source, paths=(path,)) for source in found]


def _find_in_folder(folder: Path) -> list[ScanSource]:
    if (folder / "imagesTr").is_dir() or (folder / "imagesTs").is_dir():
        return find_nnunet(folder)
    every = sorted(path for path in files.files_below(folder) if is_volume(path))
    # A TIFF beside other scans is more likely a screenshot than a stack.
    volumes = [path for path in every if not is_tiff(path)]
    ct_image = dicom_headers.first_ct_image(folder)
    if not volumes and ct_image is None:
        volumes = every
    if not volumes:
        return dicom.find_scans(folder)
    if ct_image is not None:
        raise ValueError(
            f"{folder}: contains volumes ({len(volumes)}, first {volumes[0]}) and DICOM CT "
            f"(first {ct_image}); expected one kind; give a folder with one kind, or list "
            "the scans in a CSV"
        )
    _refuse_channels(volumes)
    sources = [_volume_source(path) for path in volumes]
    check_unique([(s.scan_id, str(s.paths[0])) for s in sources], folder)
    return sources


def _refuse_channels(volumes: Sequence[Path]) -> None:
    """Raises ValueError if a volume is another nnU-Net channel of one in its folder.

    A name such as LUNG_0001 counts as a channel only if the folder also has LUNG_0000.
    """
    first = {(p.parent, stem(p)) for p in volumes if bare_name(p).endswith(CHANNEL)}
    for path in volumes:
        case, mark, number = bare_name(path).rpartition("_")
        further = mark and re.fullmatch(r"\d{4}", number) and f"_{number}" != CHANNEL
        if further and (path.parent, case) in first:
            raise ValueError(
                f"{path}: a second volume of case {case}, beside {case}{CHANNEL}; expected "
                "one channel, CT; list the scans in a CSV if these are two scans"
            )


def _volume_source(path: Path) -> ScanSource:
    scan_id = safe_id(path)
    patient_id = lidc_database.known_patient(scan_id) or scan_id
    return ScanSource(scan_id, patient_id, (path,))


def safe_id(path: Path) -> str:
    """Returns the scan id of a volume: its stem, with _ for each unsafe character."""
    scan_id = UNSAFE.sub("_", stem(path))
    if not scan_id[:1].isalnum():
        scan_id = f"x{scan_id}"
    if scan_id != stem(path):
        log.warning("%s: using the scan id %s", path, scan_id)
    return files.checked_id(scan_id, where=f"name of {path}")


def find_nnunet(folder: Path) -> list[ScanSource]:
    """Finds the cases of imagesTr and imagesTs, with their labels if there are any.

    Accepts the names of nnU-Net (CASE_0000.nii.gz) and of the Medical Segmentation
    Decathlon (CASE.nii.gz).

    Raises:
        ValueError: If dataset.json describes data other than CT, a case has several
            channels, or labelsTr lacks the label of a training case.
    """
    _check_dataset(folder / "dataset.json")
    sources = [source for part in ("Tr", "Ts") for source in _nnunet_part(folder, part)]
    if not sources:
        raise ValueError(f"{folder}: imagesTr and imagesTs contain no volume")
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
        raise ValueError(f"{path}: channels {channels}; expected only CT")
    if "ignore" in dataset.get("labels", {}):
        raise ValueError(
            f"{path}: the labels have an 'ignore' class; expected only nodules"
        )


def _nnunet_part(folder: Path, part: str) -> Iterator[ScanSource]:
    labels = _volumes_by_stem(folder / f"labels{part}")
    for case, image in _volumes_by_stem(folder / f"images{part}").items():
        scan_id = safe_id(image)
        if part == "Tr" and labels and case not in labels:
            raise ValueError(
                f"{image}: no label in {folder / 'labelsTr'}; expected a file named {case} "
                "with the suffix of a volume"
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
    """Splits a mask of one reader into nodules, its 26-connected components.

    Args:
        mask: (z, y, x) bool.
        grid: Grid of the mask.
        name: Name of the file for error messages.

    Returns:
        The fields `reader_bits`, `nodule_labels` and `nodules` of `Scan`. An empty mask
        means that the scan was read and has no nodule.
    """
    import cc3d

    components = cc3d.connected_components(mask, connectivity=26)
    found = cc3d.statistics(components)
    count = len(found["voxel_counts"]) - 1
    if count > MAX_NODULES:
        raise ScanError(
            f"{name}: {count} connected components; expected at most {MAX_NODULES} nodules"
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
