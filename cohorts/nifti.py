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

import csv
import dataclasses
import json
import logging
import re
from collections.abc import Iterator, Sequence
from pathlib import Path, PureWindowsPath
from typing import Any

import numpy as np

from cohorts import dicom
from ct import files, geometry, nifti_io
from ct.geometry import Grid
from ct.scan import AIR_HU, LEFT, RIGHT, Annotation, Nodule, Scan, ScanError, ScanSource
from nodules import lidc_database, outlines

log = logging.getLogger(__name__)

NIFTI_SUFFIXES = (".nii.gz", ".nii")
ITK_SUFFIXES = (".nrrd", ".nhdr", ".mha", ".mhd")
SUFFIXES = NIFTI_SUFFIXES + ITK_SUFFIXES
"""File names that are taken for volumes."""

CHANNEL = "_0000"
"""nnU-Net's mark of the first channel; CT is the only one here."""

REQUIRED_COLUMNS = ("pid", "image_path")
OPTIONAL_COLUMNS = ("seg_path", "lung_path", "patient_id")

SAME_PLACE_VOXELS = 0.1
"""How far the corners of a label volume may lie from those of its image."""
MAX_SHEAR_DEG = dicom.TILT_DEG
"""Axes further from perpendicular are refused; below, the affine is used as it is.

Direction cosines are often written with so few digits that they are not orthonormal to
the last one; ITK refuses such files.
"""
MAX_NODULES = 255
"""Labels are uint8."""

UNSAFE = re.compile(r"[^A-Za-z0-9._-]")
"""Characters of a file's name that its scan's id does not keep."""

DATA_FILE = re.compile(
    rb"(?:ElementDataFile[\s=:]*|^\s*data ?file\s*:\s*)([^\r\n]*)", re.I | re.M
)
"""Where the header of a MetaImage or NRRD says in which file the voxels are."""
MAX_HEADER_BYTES = 1 << 20
"""A header that is longer is refused."""


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
        dicom.check_field(grid, str(first))
        dicom.check_hu(hu, str(first))
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
    dicom.check_field(grid, str(name))
    dicom.check_hu(hu, str(name))
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


def is_volume(path: Path) -> bool:
    """Whether the name is that of a volume file."""
    return path.name.lower().endswith(SUFFIXES)


def stem(path: Path) -> str:
    """The file's name without suffix and without nnU-Net's channel mark."""
    return _bare(path).removesuffix(CHANNEL)


def _bare(path: Path) -> str:
    """The file's name without suffix."""
    for suffix in SUFFIXES:
        if path.name.lower().endswith(suffix):
            return path.name[: -len(suffix)]
    return path.stem


def read_list(path: Path) -> list[ScanSource]:
    """The scans of a CSV list.

    Raises:
        ValueError: Naming the line, if a column or value is missing, an id is doubled or
            cannot be a file name, or none of the images exists.
    """
    sources = [_row_source(row, path.parent, where) for where, row in _rows(path)]
    check_unique([(s.scan_id, f"image {s.paths[0]}") for s in sources], path)
    _check_exists(sources, path)
    return sources


def read_usable(path: Path) -> tuple[list[ScanSource], dict[str, str]]:
    """The scans of a CSV list whose rows can be used, and what is wrong with the others.

    Of rows with the same id none is used: nobody can say whose result it would be.

    Returns:
        The scans, and "line N" -> reason for the other rows.

    Raises:
        ValueError: If a column is missing, or no row can be used or none of their images
            exists.
    """
    found, refused = {}, {}
    for where, row in _rows(path):
        try:
            found[where] = _row_source(row, path.parent, where)
        except ValueError as error:
            refused[where] = str(error)
    lines: dict[str, list[str]] = {}
    for where, source in found.items():
        lines.setdefault(source.scan_id.casefold(), []).append(_line(where))
    for where, source in list(found.items()):
        same = lines[source.scan_id.casefold()]
        if len(same) > 1:
            refused[where] = (
                f"{where}: the id {source.scan_id} is that of {' and '.join(same)}; "
                "expected every id once"
            )
            del found[where]
    if not found:
        raise ValueError(
            f"{path}: no row can be used; the first: {next(iter(refused.values()))}"
        )
    sources = list(found.values())
    _check_exists(sources, path)
    # Without the folder of the list, which hospitals name after patients.
    return sources, {
        _line(where): reason.replace(where, _line(where))
        for where, reason in refused.items()
    }


def _line(where: str) -> str:
    """The last part of a place that `_rows` gives, e.g. "line 3"."""
    return where.rpartition(", ")[2]


def _rows(path: Path) -> list[tuple[str, dict[Any, Any]]]:
    """The rows of a list, each with its place; their columns are checked."""
    if not path.is_file():
        raise ValueError(f"{path}: no such file; expected a CSV list")
    with path.open(newline="", encoding="utf-8-sig") as file:
        rows = csv.DictReader(file, strict=True)
        try:
            _check_columns(rows.fieldnames or (), path)
            found = [(f"{path}, line {rows.line_num}", row) for row in rows]
        except (csv.Error, UnicodeDecodeError) as error:
            raise ValueError(f"{path}: not a readable CSV list ({error})") from error
    if not found:
        raise ValueError(f"{path}: no rows; expected one scan per line")
    return found


def _check_exists(sources: Sequence[ScanSource], path: Path) -> None:
    if not any(s.paths[0].exists() for s in sources):
        raise ValueError(
            f"{path}: none of its {len(sources)} images exists, the first is "
            f"{sources[0].paths[0]}; relative paths start at the list's folder"
        )


def _check_columns(columns: Sequence[str], path: Path) -> None:
    missing = [name for name in REQUIRED_COLUMNS if name not in columns]
    if missing:
        raise ValueError(
            f"{path}, line 1: no column {', '.join(missing)} (found "
            f"{', '.join(columns) or 'nothing'}); expected pid,image_path and optionally "
            f"{', '.join(OPTIONAL_COLUMNS)}"
        )
    others = sorted(set(columns) - set(REQUIRED_COLUMNS + OPTIONAL_COLUMNS))
    if others:
        log.warning("%s: columns passed over: %s", path, ", ".join(others))


def _row_source(row: dict[Any, Any], folder: Path, where: str) -> ScanSource:
    if None in row or None in row.values():
        raise ValueError(f"{where}: another number of values than the first line has")
    value = {name: text.strip() for name, text in row.items()}
    if not value["image_path"]:
        raise ValueError(f"{where}: image_path is empty; expected a file or folder")
    pid = files.checked_id(value["pid"], where=f"{where}, column pid")
    image = folder / value["image_path"]
    patient_id = value.get("patient_id") or patient_by_itself(image, pid) or pid
    return ScanSource(
        scan_id=pid,
        patient_id=files.checked_id(patient_id, where=f"{where}, column patient_id"),
        paths=(image,),
        annotations=(folder / value["seg_path"],) if value.get("seg_path") else (),
        lung=folder / value["lung_path"] if value.get("lung_path") else None,
    )


def patient_by_itself(image: Path, pid: str) -> str:
    """Whose scan it is, where no list says so; "" if that is unknown.

    A volume, or its pid, may be called after a series of LIDC-IDRI. The patient of a DICOM
    file or folder is that of its header, as `dicom.safe_patient_id` makes it.
    """
    if is_volume(image) and not image.is_dir():
        of_pid, of_file = map(lidc_database.known_patient, (pid, stem(image)))
        return of_pid or of_file
    path = dicom.first_ct_image(image) if image.is_dir() else image
    found = dicom.identify(path) if path is not None and path.is_file() else None
    if found is None or not found.ct_image:
        return ""
    try:
        return lidc_database.known_patient(found.series_uid) or dicom.safe_patient_id(
            found
        )
    except OSError as error:
        log.warning(
            "scan %s: no pseudonym for its patient, the pid counts: %s", pid, error
        )
        return ""


def check_unique(named: Sequence[tuple[str, str]], where: Path) -> None:
    """Raises ValueError if two of (scan id, where it is from) have the same id."""
    # Compared without case: some file systems have one file for "A1" and "a1".
    seen: dict[str, str] = {}
    for name, what in named:
        if name.casefold() in seen:
            raise ValueError(
                f"{where}: two scans are called {name}: {seen[name.casefold()]} and "
                f"{what}; expected every id once"
            )
        seen[name.casefold()] = what


def _find_in_folder(folder: Path) -> list[ScanSource]:
    if (folder / "imagesTr").is_dir() or (folder / "imagesTs").is_dir():
        return find_nnunet(folder)
    volumes = sorted(path for path in files.below(folder) if is_volume(path))
    if not volumes:
        return dicom.find_scans(folder)
    ct_image = dicom.first_ct_image(folder)
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


def read_volume_file(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Values and place of a volume file.

    Returns:
        (i, j, k) array in the file's axis order, i fastest in the file, and the (4, 4)
        affine from index to RAS mm.

    Raises:
        ScanError: If the file is missing or damaged, is not one 3-D volume of numbers, or
            does not say where its voxels lie.
    """
    if not path.is_file():
        raise ScanError(f"{path}: no such file; expected a volume")
    lower = path.name.lower()
    array, affine = (
        _read_nifti(path) if lower.endswith(NIFTI_SUFFIXES) else _read_itk(path)
    )
    while array.ndim > 3 and array.shape[-1] == 1:
        array = array[..., 0]
    if array.ndim != 3 or min(array.shape) < 2:
        raise ScanError(
            f"{path}: shape {array.shape}; expected one 3-D volume of two or more slices"
        )
    _check_affine(affine, path)
    return array, affine


def _read_nifti(path: Path) -> tuple[np.ndarray, np.ndarray]:
    with nifti_io.opened_nifti(path, remedy="restore it from its source") as image:
        _check_nifti_header(image, path)
        return np.asanyarray(image.dataobj), image.affine


def _check_nifti_header(image: Any, path: Path) -> None:
    header = image.header
    if header.get_data_dtype().kind not in "iuf":
        raise ScanError(
            f"{path}: values of type {header.get_data_dtype()} (colour or complex); "
            "expected numbers"
        )
    unit = header.get_xyzt_units()[0]
    if unit not in ("mm", "unknown"):
        raise ScanError(f"{path}: lengths in {unit}; expected mm")
    sform, qform = image.get_sform(coded=True), image.get_qform(coded=True)
    if not sform[1] and not qform[1]:
        raise ScanError(
            f"{path}: neither sform nor qform says how the volume lies (both codes are "
            "0); expected one, or left and right cannot be told"
        )
    if sform[1] and qform[1]:
        apart = _corners_apart_voxels(image.shape[:3], sform[0], qform[0])
        if apart > 1:
            raise ScanError(
                f"{path}: sform and qform place the volume {apart:.1f} voxels apart; "
                "expected them to agree"
            )


def _read_itk(path: Path) -> tuple[np.ndarray, np.ndarray]:
    import SimpleITK

    _check_data_file(path)
    try:
        image = SimpleITK.ReadImage(str(path))
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[-1]
        raise ScanError(
            f"{path}: not a readable volume ({reason}); restore it from its source"
        ) from error
    size = image.GetDimension()
    if image.GetNumberOfComponentsPerPixel() > 1 or size not in (3, 4):
        raise ScanError(
            f"{path}: {size} dimensions and {image.GetNumberOfComponentsPerPixel()} "
            "values per voxel; expected one 3-D volume of numbers"
        )
    direction = np.array(image.GetDirection()).reshape(size, size)[:3, :3]
    columns_lps = np.vstack(
        [(direction * image.GetSpacing()[:3]).T, image.GetOrigin()[:3]]
    )
    affine = np.eye(4)
    affine[:3] = geometry.flip_xy(columns_lps).T
    return SimpleITK.GetArrayFromImage(image).T, affine


def _check_data_file(path: Path) -> None:
    """Raises ScanError if a header takes its voxels from outside of its folder."""
    with path.open("rb") as file:
        start = file.read(MAX_HEADER_BYTES)
    found = list(DATA_FILE.finditer(start))
    attached_nrrd = start.startswith(b"NRRD") and re.search(rb"\n\r?\n", start)
    if not found and not attached_nrrd:
        raise ScanError(
            f"{path}: not a readable volume (no end of a MetaImage or NRRD header in its "
            f"first {len(start)} bytes); restore it from its source"
        )
    for entry in found:
        listed = start[entry.end() :] if entry[1].upper().startswith(b"LIST") else b""
        for name in (entry[1], *listed.splitlines()):
            _check_inside(name.decode(errors="replace").strip(), path)


def _check_inside(name: str, path: Path) -> None:
    outside = PureWindowsPath(name)  # knows /, \ and drives
    if outside.anchor or ".." in outside.parts or name.startswith("~"):
        raise ScanError(
            f"{path}: its voxels are said to be in {name!r}; expected a file in the folder "
            "of the header; move it there and name it without folders"
        )


def _check_affine(affine: np.ndarray, path: Path) -> None:
    axes = affine[:3, :3]
    if not np.isfinite(affine).all() or abs(np.linalg.det(axes)) < 1e-9:
        raise ScanError(
            f"{path}: affine {affine.tolist()}; expected finite numbers and three axes"
        )
    units = axes / np.linalg.norm(axes, axis=0)
    cosines = np.abs(units.T @ units - np.eye(3)).max()
    shear_deg = float(np.degrees(np.arcsin(min(cosines, 1))))
    if shear_deg > MAX_SHEAR_DEG:
        raise ScanError(
            f"{path}: the axes are {shear_deg:.1f} deg from perpendicular (gantry tilt?); "
            f"expected at most {MAX_SHEAR_DEG} deg; resample it to perpendicular axes"
        )


def to_hu(array: np.ndarray, path: Path) -> np.ndarray:
    """Values as int16 HU: rounded, clipped, padding set to AIR_HU.

    Raises:
        ScanError: If there are values that are not finite.
    """
    if array.dtype.kind == "f":
        bad = int(array.size - np.count_nonzero(np.isfinite(array)))
        if bad:
            raise ScanError(
                f"{path}: {bad} voxels are NaN or infinite; expected Hounsfield units "
                f"everywhere ({AIR_HU} where there is no scan)"
            )
        array = np.rint(array)
    if array.dtype != np.int16:
        limits = np.iinfo(np.int16)
        array = np.clip(array, limits.min, limits.max).astype(np.int16)
    return np.where(array < dicom.PADDING_HU, np.int16(AIR_HU), array)


def _grid(array: np.ndarray, affine: np.ndarray) -> Grid:
    i, j, k = array.shape
    return Grid((i, j, k), np.asarray(affine, np.float64))


def read_labels(path: Path, grid: Grid) -> np.ndarray:
    """A label volume turned to canonical orientation.

    Args:
        path: The label volume.
        grid: The canonical grid of its image.

    Returns:
        (z, y, x) integer labels on `grid`.

    Raises:
        ScanError: If it is damaged, does not lie on the image, or holds no whole numbers
            from 0.
    """
    array, affine = read_volume_file(path)
    labels, label_grid = geometry.to_canonical(array, affine)
    if labels.shape != tuple(grid.shape):
        raise ScanError(
            f"{path}: shape {labels.shape} (z, y, x) differs from its image's "
            f"{tuple(grid.shape)}; expected a label for every voxel"
        )
    apart = _corners_apart_voxels(grid.shape, grid.affine, label_grid.affine)
    if apart > SAME_PLACE_VOXELS:
        raise ScanError(
            f"{path}: lies {apart:.1f} voxels from its image (spacing "
            f"{_numbers(label_grid.spacing_mm)} and {_numbers(grid.spacing_mm)} mm); "
            f"expected at most {SAME_PLACE_VOXELS}"
        )
    if not np.isfinite(labels).all() or labels.min() < 0 or (labels % 1).any():
        raise ScanError(
            f"{path}: values from {labels.min()} to {labels.max()}, not all whole; "
            "expected labels 0, 1, 2, ..."
        )
    return labels.astype(np.int64) if labels.dtype.kind == "f" else labels


def _corners_apart_voxels(
    shape: Sequence[int], affine: np.ndarray, other: np.ndarray
) -> float:
    """Largest distance between the corners of two grids, in voxels of the first."""
    ends = np.stack(np.meshgrid(*[(0, n - 1) for n in shape], indexing="ij"), axis=-1)
    corners = np.concatenate([ends.reshape(-1, 3), np.ones((8, 1))], axis=1)
    apart_mm = (corners @ (affine - other).T)[:, :3]
    return float(np.abs(np.linalg.inv(affine[:3, :3]) @ apart_mm.T).max())


def _numbers(values: Sequence[float]) -> str:
    return " x ".join(f"{value:.4g}" for value in values)


def checked_lung_labels(labels: np.ndarray, name: str) -> np.ndarray:
    """Lung labels checked: 0, 1 right, 2 left, and the right one on the right.

    Args:
        labels: (z, y, x) integers.
        name: The file, for the message.

    Returns:
        (z, y, x) uint8.
    """
    values = np.unique(labels).tolist()
    if not set(values) <= {0, RIGHT, LEFT}:
        shown = ", ".join(map(str, values[:10]))
        raise ScanError(
            f"{name}: lung labels {shown}; expected 0, {RIGHT} (right) and {LEFT} (left)"
        )
    columns = [np.flatnonzero((labels == side).any(axis=(0, 1))) for side in (1, 2)]
    # x rises to the patient's left.
    if all(map(len, columns)) and columns[0].mean() > columns[1].mean():
        raise ScanError(
            f"{name}: label {RIGHT} (right lung) lies left of label {LEFT} (left lung); "
            "expected the other way round: labels or orientation are wrong"
        )
    return labels.astype(np.uint8)


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
