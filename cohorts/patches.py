"""Reads slice patches around nodules with several readers' masks; folder or .zip.

Each nodule is a separate scan. It consists of the slices that readers drew the nodule on,
in order; slice numbers may have gaps. There are two layouts:

    index.csv                           columns name, patient_id, nodule, slice, readers
    images/NAME.webp                    grey; .png and .tif also work
    reader_bits/NAME.png                bit r of a pixel is set where reader r drew

    PATIENT/nodule-N/images/SLICE.png   image
    PATIENT/nodule-N/mask-R/SLICE.png   mask of reader R, above 0 where the reader drew

`readers` is the number of readers who drew the nodule on at least one slice. Spacing and HU
are unknown. Grey values of 8 bits are kept, and 32768 is subtracted from those of 16 bits.
Pixels and slices count as 1 mm, so a length in mm of such a scan is a length in pixels.
"""

import csv
import functools
import io
import re
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np

from ct import files
from ct.geometry import Grid
from ct.scan import Annotation, Nodule, Scan, ScanError, ScanSource, readers_in
from nodules import outlines

INDEX = "index.csv"
COLUMNS = ("name", "patient_id", "nodule", "slice", "readers")
IMAGE_ENDINGS = (".webp", ".png", ".tif", ".tiff")
MAX_READERS = 8
"""Number of bits in a mask pixel."""


@dataclass(frozen=True)
class Patch:
    """One slice of a nodule.

    Attributes:
        z: Slice number.
        image: Name of the image in the collection.
        bits: Name of the file with the reader bits; "" if each reader has a separate mask.
        masks: Pairs of reader and name of the mask.
    """

    z: int
    image: str
    bits: str = ""
    masks: tuple[tuple[int, str], ...] = ()

    @property
    def files(self) -> tuple[str, ...]:
        """Names of all files of the slice."""
        bits = (self.bits,) if self.bits else ()
        return (self.image, *bits, *(name for _, name in self.masks))


@dataclass(frozen=True)
class PatchNodule:
    """One nodule of a collection.

    Attributes:
        patient_id: Patient who has the nodule.
        readers: Number of readers who drew it; None if only the masks show that.
        patches: Slices of the nodule.
    """

    patient_id: str
    readers: int | None
    patches: tuple[Patch, ...]


def find_scans(source: Path) -> list[ScanSource]:
    """Finds the nodules of a collection, by scan id (PATIENT_nodule-N).

    Raises:
        ValueError: If the layout is unknown, or a listed file is missing.
    """
    source = Path(source)
    in_folder = source.is_dir()
    found = []
    for scan_id, nodule in read_collection(source).items():
        # List the files of the nodule, so that a change in one of them is noticed.
        images = [source / patch.image for patch in nodule.patches]
        marks = [source / n for patch in nodule.patches for n in patch.files[1:]]
        found.append(
            ScanSource(
                scan_id,
                nodule.patient_id,
                (source, *(images if in_folder else ())),
                annotations=tuple(marks) if in_folder else (),
            )
        )
    return found


def load_scan(source: ScanSource, *, repair: Sequence[str] = ()) -> Scan:
    """Reads the slices of one nodule and its readers' masks.

    Args:
        source: A scan from `find_scans`.
        repair: Not used.

    Raises:
        ScanError: If a slice is duplicate or damaged, sizes differ, or the number of
            readers in the masks differs from the list.
    """
    path, name = source.paths[0], source.scan_id
    nodule = read_collection(path)[name]
    collection = Collection(path)
    slices = [patch.z for patch in nodule.patches]
    if len(set(slices)) < len(slices):
        raise ScanError(f"{name}: slices {slices}; expected every number once")
    images = [collection.image(patch.image) for patch in nodule.patches]
    bits = [reader_bits(collection, patch) for patch in nodule.patches]
    shapes = {image.shape for image in (*images, *bits)}
    if len(shapes) > 1:
        raise ScanError(
            f"{name}: images and masks of sizes {sorted(shapes)}; expected one"
        )
    volume = np.stack(images)
    if volume.dtype == np.uint16:
        volume = volume.astype(np.int32) - 2**15
    grid = grid_of(volume.shape)
    marks = np.stack(bits)
    return Scan(
        scan_id=name,
        patient_id=source.patient_id,
        hu=volume.astype(np.int16),
        grid=grid,
        source_grid=grid,
        reader_bits=marks,
        nodule_labels=(marks > 0).astype(np.uint8),
        nodules=(nodule_of(marks, grid, nodule.readers, name),),
        whole=False,
    )


def nodule_of(marks: np.ndarray, grid: Grid, readers: int | None, name: str) -> Nodule:
    """Builds a nodule with one annotation per reader.

    Raises:
        ScanError: If no reader drew it, or the number of readers differs from the list.
    """
    drawn = readers_in(marks)
    if not drawn or (readers is not None and len(drawn) != readers):
        raise ScanError(
            f"{name}: {len(drawn)} readers drew on its slices; expected "
            f"{readers or 'at least 1'}"
        )
    masks = {r: (marks >> r & 1).astype(bool) for r in drawn}
    centre = np.argwhere(marks).mean(axis=0)
    annotations = tuple(
        Annotation(
            reader=reader,
            volume_mm3=outlines.volume_mm3(mask, grid.voxel_mm3),
            diameter_mm=outlines.diameter_mm(mask, grid.spacing_mm),
        )
        for reader, mask in masks.items()
    )
    return Nodule(1, tuple(grid.index_to_ras_mm(centre).tolist()), annotations)


def grid_of(shape: tuple[int, ...]) -> Grid:
    """Returns a canonical grid of 1 mm voxels, with axes to S, P and L."""
    affine = np.diag([0.0, -1.0, 0.0, 1.0])
    affine[2, 0], affine[0, 2] = 1, -1
    return Grid((shape[0], shape[1], shape[2]), affine)


def reader_bits(collection: "Collection", patch: Patch) -> np.ndarray:
    """Reads (y, x) uint8 reader bits; bit r is set where reader r drew.

    Raises:
        ScanError: If there is no mask, or masks differ in size.
    """
    if patch.bits:
        bits = collection.image(patch.bits)
        if bits.dtype != np.uint8:
            raise ScanError(f"{patch.bits}: {bits.dtype}; expected uint8 reader bits")
        return bits
    masks = {reader: collection.image(name) for reader, name in patch.masks}
    if len({mask.shape for mask in masks.values()}) != 1:
        sizes = sorted(mask.shape for mask in masks.values())
        raise ScanError(
            f"{patch.image}: masks of sizes {sizes}; expected at least one, all equal"
        )
    bits = np.zeros(next(iter(masks.values())).shape, np.uint8)
    for reader, mask in masks.items():
        bits |= (mask > 0).astype(np.uint8) << reader
    return bits


class Collection:
    """Files of a folder or a .zip, accessed by their names within it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.names = list_files(path, path.stat().st_mtime_ns)

    def read(self, name: str) -> bytes:
        """Reads the content of a file.

        Raises:
            ScanError: If the file is missing or damaged.
        """
        if name not in self.names:
            raise ScanError(f"{self.path}: no file {name}")
        try:
            if self.path.is_dir():
                return (self.path / name).read_bytes()
            return open_archive(self.path, self.path.stat().st_mtime_ns).read(name)
        except (OSError, zipfile.BadZipFile, RuntimeError) as error:
            raise ScanError(f"{self.path}: cannot read {name} ({error})") from error

    def image(self, name: str) -> np.ndarray:
        """Reads a (y, x) grey image; accepts colour formats with equal channels.

        Raises:
            ScanError: If the image is missing, damaged or in colour.
        """
        encoded = np.frombuffer(self.read(name), np.uint8)
        image = cv2.imdecode(encoded, cv2.IMREAD_UNCHANGED) if len(encoded) else None
        if image is None or image.dtype not in (np.uint8, np.uint16):
            raise ScanError(f"{self.path}: {name} is not an image of 8 or 16 bits")
        if image.ndim == 3:
            if (image[..., :3] != image[..., :1]).any():
                raise ScanError(f"{self.path}: {name} is in colour; expected grey")
            image = image[..., 0]
        return image


@functools.lru_cache(maxsize=2)
def list_files(path: Path, changed: int) -> Mapping[str, None]:
    """Returns sorted names of all files; `changed` (mtime) refreshes the cache."""
    if path.is_dir():
        found = (p.relative_to(path).as_posix() for p in path.rglob("*") if p.is_file())
    else:
        found = (
            name for name in open_archive(path, changed).namelist() if name[-1] != "/"
        )
    return dict.fromkeys(sorted(found))


@functools.lru_cache(maxsize=2)
def open_archive(path: Path, changed: int) -> zipfile.ZipFile:
    """Opens a .zip; cached, as reading its list of files is slower than reading a file.

    Raises:
        ValueError: If the file is not a .zip.
    """
    try:
        return zipfile.ZipFile(path)
    except (OSError, zipfile.BadZipFile) as error:
        raise ValueError(
            f"{path}: not a .zip ({error}); expected a folder or a .zip of patches"
        ) from error


def read_collection(path: Path) -> dict[str, PatchNodule]:
    """Reads the nodules of a collection, by scan id.

    Raises:
        ValueError: If the path or a listed file is missing, or the layout is unknown.
    """
    if not path.exists():
        raise ValueError(
            f"{path}: no such path; expected a folder or a .zip of patches"
        )
    return _read_collection(path, path.stat().st_mtime_ns)


@functools.lru_cache(maxsize=2)
def _read_collection(path: Path, changed: int) -> dict[str, PatchNodule]:
    names = list_files(path, changed)
    nodules = _of_index(path, names) if INDEX in names else _of_folders(path, names)
    for nodule in nodules.values():
        for patch in nodule.patches:
            for name in patch.files:
                if name not in names:
                    raise ValueError(
                        f"{path}: no file {name}; expected one for every slice"
                    )
    return dict(sorted(nodules.items()))


def _of_index(path: Path, names: Mapping[str, None]) -> dict[str, PatchNodule]:
    text = Collection(path).read(INDEX).decode("utf-8-sig")
    rows = csv.DictReader(io.StringIO(text), strict=True)
    missing = [name for name in COLUMNS if name not in (rows.fieldnames or ())]
    if missing:
        raise ValueError(
            f"{path}, {INDEX}: no column {', '.join(missing)}; expected {', '.join(COLUMNS)}"
        )
    found: dict[str, PatchNodule] = {}
    for row in rows:
        where = f"{path}, {INDEX}, line {rows.line_num}"
        if not all((row[name] or "").strip() for name in COLUMNS):
            raise ValueError(f"{where}: a value is missing; expected one per column")
        if not (row["slice"].isdecimal() and row["readers"].isdecimal()):
            raise ValueError(f"{where}: slice and readers must be whole numbers")
        readers = int(row["readers"])
        if not 1 <= readers <= MAX_READERS:
            raise ValueError(f"{where}: {readers} readers; expected 1 to {MAX_READERS}")
        endings = [e for e in IMAGE_ENDINGS if f"images/{row['name']}{e}" in names]
        patch = Patch(
            int(row["slice"]),
            f"images/{row['name']}{endings[0] if endings else IMAGE_ENDINGS[0]}",
            bits=f"reader_bits/{row['name']}.png",
        )
        _add(found, row["patient_id"], row["nodule"], patch, where, readers=readers)
    return found


FOLDERS = re.compile(
    r"(.*/)?(?P<patient>[^/]+)/nodule-(?P<nodule>[^/]+)/images/(?P<name>[^/]+)"
)


def _of_folders(path: Path, names: Mapping[str, None]) -> dict[str, PatchNodule]:
    found: dict[str, PatchNodule] = {}
    matches = [match for match in map(FOLDERS.fullmatch, names) if match]
    if not matches:
        raise ValueError(
            f"{path}: contains neither {INDEX} nor PATIENT/nodule-N/images; expected one "
            "of these layouts; see docs/data.md"
        )
    for match in matches:
        image = match.string
        number = re.search(r"(\d+)\.\w+$", match["name"])
        if number is None:
            raise ValueError(
                f"{path}: {image} has no slice number; expected NAME-12.png"
            )
        nodule, _, _ = image.rpartition("/images/")
        masks = [(r, f"{nodule}/mask-{r}/{match['name']}") for r in range(MAX_READERS)]
        known = tuple((r, mask) for r, mask in masks if mask in names)
        patch = Patch(int(number[1]), image, masks=known)
        _add(found, match["patient"], match["nodule"], patch, image)
    return found


def _add(
    found: dict[str, PatchNodule],
    patient: str,
    number: str,
    patch: Patch,
    where: str,
    *,
    readers: int | None = None,
) -> None:
    """Adds a slice to its nodule, keeping slices in order."""
    patient = files.checked_id(patient, where=where)
    scan_id = files.checked_id(f"{patient}_nodule-{number}", where=where)
    known = found.get(scan_id, PatchNodule(patient, readers, ()))
    if known.readers != readers:
        raise ValueError(
            f"{where}: {readers} readers, but another slice of the nodule has "
            f"{known.readers}; expected one number per nodule"
        )
    patches = sorted((*known.patches, patch), key=lambda patch: patch.z)
    found[scan_id] = PatchNodule(patient, readers, tuple(patches))
