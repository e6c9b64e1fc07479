"""Step 2 of 9: gather the prepared scans into one HDF5 table of axial slices.

Example:
    python table.py thesis --scans work/scans --out work/table.h5

A table holds facts, not choices: HU and masks as they are; window, crop and augmentation
come later. Its format is in docs/layout.md. Each scan is first written to a part of its
own in OUT.parts, so a build that was stopped goes on where it stood; parts are then
joined, chunk by chunk, and removed. Disk needed while it builds: twice the table.
"""

import contextlib
import csv
import errno
import functools
import json
import logging
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

import config
import steps
from ct import files, hdf5, provenance, resample
from ct import scan as scans
from ct.scan import AIR_HU, VOLUMES, Scan, ScanError
from dataset.slice_table import (
    DTYPES,
    FORMAT_VERSION,
    NODULE,
    ROW,
    SCAN,
    SKIPPED,
    SliceTable,
    compressed,
    content_sha256,
    text_sha256,
    verify_table,
)

if TYPE_CHECKING:
    import tables

log = logging.getLogger(__name__)

HEALTHY_SLICES = 11
"""With `slices=nodule`, a scan in which readers found no nodule gives negatives as if it
had this many nodule slices: the median of the 883 LIDC-IDRI scans with a nodule."""


@dataclass(frozen=True)
class ScanFile:
    """A scan file to be taken into the table."""

    scan_id: str
    path: Path


@dataclass(frozen=True, eq=False)
class Part:
    """What the table holds of one scan, in memory.

    Attributes:
        scan: (1,) `SCAN`.
        rows: (rows,) `ROW`.
        nodules: (nodules,) `NODULE`.
        slices: Name to (rows, y, x).
        volumes: Name to (z, y, x) resampled volume; empty when none is stored.
        volume_affine: (4, 4) array index of the volumes -> RAS mm.
    """

    scan: np.ndarray
    rows: np.ndarray
    nodules: np.ndarray
    slices: dict[str, np.ndarray]
    volumes: dict[str, np.ndarray]
    volume_affine: np.ndarray

    def arrays(self) -> Iterator[np.ndarray]:
        """In the order of `SliceTable.checksum`."""
        yield from self.slices.values()
        if self.volumes:
            yield self.volume_affine
            yield from self.volumes.values()


def write_table(
    scans_dir: Path,
    out: Path,
    settings: config.Table,
    *,
    workers: int = 1,
    scheduler: str = "",
    overwrite: bool = False,
) -> steps.Report:
    """Gathers the scan files of a folder into one table.

    A build that was stopped goes on; one that is complete is left as it is. Scan files
    that cannot be used are listed beside the table, in `out` with suffix .skipped.csv.

    Args:
        scans_dir: Folder of scan files.
        out: The table.
        settings: Which slices and volumes.
        workers: Processes.
        scheduler: Address of a Dask scheduler, see `steps.map_scans`.
        overwrite: Replace a table made otherwise.

    Raises:
        FileNotFoundError: If there are no scan files.
        ValueError: If no scan can be used, or `out` exists and differs.
        OSError: If the disk is full; a later call goes on from there.
    """
    items = [ScanFile(path.stem, path) for path in scans.scan_files(scans_dir)]
    out = Path(out)
    skipped_csv = out.with_suffix(".skipped.csv")
    if out.exists() and not overwrite:
        return _report_of_complete(out, settings, items)
    mask = mask_settings([item.path for item in items])
    parts_dir = out.with_name(f"{out.name}.parts")
    make = functools.partial(write_part, parts_dir=parts_dir, settings=settings)
    parts, failures = steps.map_scans(
        make, items, workers=workers, scheduler=scheduler, label="scans"
    )
    steps.write_failures(failures, skipped_csv)
    if not parts:
        raise ValueError(
            f"none of the {len(items)} scan files in {scans_dir} can be used; "
            f"the first: {failures[0].reason}"
        )
    join_parts(parts, out, settings, _skipped(failures, items), mask=mask)
    files.remove(parts_dir)
    return _report(out, failures)


def write_part(item: ScanFile, parts_dir: Path, settings: config.Table) -> Path:
    """Writes a scan's part, a table of this scan alone; a good one there is kept."""
    path = parts_dir / f"{item.scan_id}.h5"
    source_sha256 = _source_sha256(item.path)
    if _part_stands(path, settings, source_sha256):
        return path
    part = make_part(scans.read_scan(item.path), settings, source_sha256)
    with files.written_whole(path) as partial:
        with hdf5.written(partial, path) as h5:
            _create(h5, settings, rows=len(part.rows), provenance_record={})
            _write(h5, part)
        _read_back(partial, path)
    return path


def _write(h5: "tables.File", part: Part) -> None:
    for name, images in part.slices.items():
        _write_chunks(h5.get_node("/slices", name), map(compressed, images))
    for name, volume in part.volumes.items():
        node = _create_volume(h5, 0, name, volume.shape, part.volume_affine)
        _write_chunks(node, map(compressed, volume))
    h5.root.scans.append(part.scan)
    h5.root.rows.append(part.rows)
    h5.root.nodules.append(part.nodules)


def join_parts(
    parts: Sequence[Path],
    out: Path,
    settings: config.Table,
    skipped: np.ndarray,
    *,
    mask: dict[str, Any] | None = None,
) -> None:
    """Joins tables of the same settings; slices are copied as they are, compressed.

    Args:
        parts: Tables of at least one scan together, in the order of the result.
        out: The table; it appears whole or not at all.
        settings: Of all parts.
        skipped: (scans,) `SKIPPED` scans that are in no part.
        mask: How the lung masks were made.
    """
    from tqdm import tqdm

    _require_room(parts, out)
    total = sum(_rows_of(part) for part in parts)
    made_by = provenance.record(settings, scans=len(parts), mask=mask)
    joined = parts[0].with_name(".joined.h5")
    out.parent.mkdir(parents=True, exist_ok=True)
    try:
        with hdf5.written(joined, out) as h5:
            _create(h5, settings, rows=total, provenance_record=made_by)
            h5.root.skipped.append(skipped)
            first_row = 0
            for index, part in enumerate(
                tqdm(parts, "join", unit="scan", disable=None)
            ):
                with hdf5.opened(part) as source:
                    first_row = _append(h5, source, index, first_row)
        _read_back(joined, out)
        joined.replace(out)
    finally:
        files.remove(joined)


def mask_settings(scan_files: Sequence[Path]) -> dict[str, Any] | None:
    """How the lung masks of scan files were made; None if they do not say.

    Files that cannot be read are left to be skipped.

    Raises:
        ValueError: If they were made with different settings.
    """
    found: dict[str, Path] = {}
    for path in scan_files:
        with contextlib.suppress(ScanError):
            settings = scans.read_provenance(path).get("mask")
            found.setdefault(json.dumps(settings), path)
    if len(found) > 1:
        (a, first), (b, second), *_ = found.items()
        raise ValueError(
            f"lung masks were made with different settings: {first.name} with {a}, "
            f"{second.name} with {b}; make them alike with preprocess.py --overwrite"
        )
    return json.loads(next(iter(found), "null"))


def _append(h5: "tables.File", part: "tables.File", index: int, first_row: int) -> int:
    for name in VOLUMES:
        frames = _frames(part.get_node("/slices", name))
        _write_chunks(h5.get_node("/slices", name), frames, start=first_row)
    if "scan0" in part.root.volumes:
        source = part.root.volumes._f_get_child("scan0")
        for name in VOLUMES:
            old = source._f_get_child(name)
            affine = source._v_attrs.affine
            node = _create_volume(h5, index, name, old.shape, affine)
            _write_chunks(node, _frames(old))
    scan, rows, nodules = (
        part.get_node("/", n)[:] for n in ("scans", "rows", "nodules")
    )
    scan["first_row"] = first_row
    rows["scan"] = nodules["scan"] = index
    h5.root.scans.append(scan)
    h5.root.rows.append(rows)
    h5.root.nodules.append(nodules)
    return first_row + len(rows)


def _create(
    h5: "tables.File",
    settings: config.Table,
    *,
    rows: int,
    provenance_record: Mapping[str, Any],
) -> None:
    record = {
        "format_version": FORMAT_VERSION,
        "settings": config.to_json(settings),
        "provenance": provenance_record,
    }
    h5.root._v_attrs.table = json.dumps(record)
    for name in VOLUMES:
        shape = (rows, *settings.size_px)
        _create_array(h5, "/slices", name, shape)
    h5.create_group("/", "volumes")
    kinds = {"rows": ROW, "scans": SCAN, "nodules": NODULE, "skipped": SKIPPED}
    for name, kind in kinds.items():
        h5.create_table("/", name, description=kind, expectedrows=max(rows, 1))


def _create_array(
    h5: "tables.File", where: str, name: str, shape: tuple[int, ...]
) -> "tables.EArray":
    import tables

    array = h5.create_earray(
        where,
        name,
        atom=tables.Atom.from_dtype(DTYPES[name]),
        shape=(0, *shape[1:]),
        chunkshape=(1, *shape[1:]),
        filters=hdf5.filters(DTYPES[name]),
        createparents=True,
    )
    array.truncate(shape[0])
    return array


def _create_volume(
    h5: "tables.File", index: int, name: str, shape: tuple[int, ...], affine: np.ndarray
) -> "tables.EArray":
    node = _create_array(h5, f"/volumes/scan{index}", name, shape)
    node._v_parent._v_attrs.affine = affine
    return node


def _write_chunks(
    node: "tables.EArray", frames: Iterable[bytes], *, start: int = 0
) -> None:
    for index, frame in enumerate(frames, start):
        node.write_chunk((index, 0, 0), frame)


def _frames(node: "tables.EArray") -> Iterator[bytes]:
    for index in range(len(node)):
        yield node.read_chunk((index, 0, 0))


def _rows_of(part: Path) -> int:
    with hdf5.opened(part) as h5:
        return h5.root.rows.nrows


def _part_stands(path: Path, settings: config.Table, source_sha256: str) -> bool:
    """Whether a part from a stopped build is whole and of the same scan and settings."""
    try:
        with SliceTable(path) as part:
            return (
                part.settings == settings
                and part.scans["source_sha256"].tolist() == [source_sha256]
                and part.scans["sha256"].tolist() == [part.checksum(0)]
            )
    except (ValueError, OSError):
        return False


def _source_sha256(path: Path) -> str:
    """Tells scan files apart without reading their pixels: by size and record."""
    record = ""
    try:
        with hdf5.opened(path) as h5:
            if "record" in h5.root:
                record = h5.root.record[:].tobytes().decode()
    except hdf5.Unreadable:
        log.debug("%s has no readable record", path)
    return text_sha256(f"{path.stat().st_size} {record}")


def _skipped(
    failures: Sequence[steps.Failure], items: Sequence[ScanFile]
) -> np.ndarray:
    paths = {item.scan_id: item.path for item in items}
    return np.array(
        [
            (
                _cut_text(f.scan_id),
                _cut_text(f.reason),
                _source_sha256(paths[f.scan_id]),
            )
            for f in failures
        ],
        SKIPPED,
    )


def _cut_text(text: str) -> bytes:
    return text.encode("ascii", "replace")


def _read_back(written: Path, path: Path) -> None:
    """Raises OSError if a table does not hold what was written.

    HDF5 keeps back some of what it writes until it closes the file, and PyTables does
    not say when that fails.
    """
    try:
        good = not verify_table(written)
    except (ValueError, OSError):
        good = False
    if not good:
        raise hdf5.not_written(path, "it does not read back as it was written")


def _require_room(parts: Sequence[Path], out: Path) -> None:
    needed = sum(part.stat().st_size for part in parts)
    free = shutil.disk_usage(_existing(out)).free
    if free < needed:
        raise OSError(
            errno.ENOSPC,
            f"{out} needs {files.size_text(needed)}, {files.size_text(free)} are free "
            "there; free some space, and the same command goes on from here",
        )


def _existing(path: Path) -> Path:
    """The nearest folder above `path` that exists."""
    return next(parent for parent in path.absolute().parents if parent.is_dir())


def _report(out: Path, failures: Sequence[steps.Failure]) -> steps.Report:
    with SliceTable(out) as table:
        cut = int((table.scans["cut_px"] > 0).sum())
        line = f"wrote {_summary(table)}"
    if cut:
        line += f", nodule pixels cut away in {cut} scans"
    return steps.Report(line, failures)


def _summary(table: SliceTable) -> str:
    slices, scan_count = (
        f"{n:,}".replace(",", " ") for n in (len(table), len(table.scans))
    )
    size = files.size_text(table.path.stat().st_size)
    return f"{table.path}: {slices} slices, {scan_count} scans, {size}"


def _report_of_complete(
    out: Path, settings: config.Table, items: Sequence[ScanFile]
) -> steps.Report:
    with SliceTable(out) as table:
        if table.settings != settings:
            raise ValueError(
                f"{out} exists and was made with {_differences(table.settings, settings)}; "
                "add --overwrite to replace it"
            )
        made_of = {
            row["scan_id"]: row["source_sha256"]
            for records in (table.scans, table.skipped)
            for row in records
        }
        wanted = {item.scan_id: _source_sha256(item.path) for item in items}
        if made_of != wanted:
            other = sorted(i for i, _ in made_of.items() ^ wanted.items())
            raise ValueError(
                f"{out} exists and was made of other scan files: {other[0]} is new, gone "
                f"or changed, {len(set(other))} in all; add --overwrite to replace it"
            )
        failures = [
            steps.Failure(row["scan_id"], row["reason"]) for row in table.skipped
        ]
        return steps.Report(f"{_summary(table)} is complete", failures)


def _differences(found: config.Table, expected: config.Table) -> str:
    found_json, expected_json = config.to_json(found), config.to_json(expected)
    return ", ".join(
        f"table.{name}={value}, now {expected_json[name]}"
        for name, value in found_json.items()
        if value != expected_json[name]
    )


def make_part(scan: Scan, settings: config.Table, source_sha256: str) -> Part:
    """What the table holds of a scan.

    Raises:
        ScanError: If the scan lacks a mask that `settings.slices` goes by, or has an id
            too long for the table.
    """
    volumes = {
        "hu": scan.hu,
        **{
            name: getattr(scan, name)
            if getattr(scan, name) is not None
            else np.broadcast_to(np.uint8(0), scan.hu.shape)
            for name in VOLUMES[1:]
        },
    }
    fitted = {
        name: fit(volumes[name], settings.size_px, fill=0) for name in VOLUMES[1:]
    }
    lung_px = np.count_nonzero(fitted["lung"], axis=(1, 2))
    nodule_px = np.count_nonzero(fitted["reader_bits"], axis=(1, 2))
    chosen = choose_slices(scan, lung_px, nodule_px, settings)
    rows = np.zeros(len(chosen), ROW)
    rows["z"], rows["z_mm"] = chosen, _z_mm(scan, chosen)
    rows["lung_px"], rows["nodule_px"] = lung_px[chosen], nodule_px[chosen]
    # Patches have a scale of their own: air would be far below it.
    beyond = AIR_HU if scan.whole else int(scan.hu.min())
    slices = {"hu": fit(scan.hu[chosen], settings.size_px, fill=beyond)}
    slices |= {name: masks[chosen] for name, masks in fitted.items()}
    cut_px = int(np.count_nonzero(volumes["reader_bits"]) - nodule_px.sum())
    if cut_px:
        log.warning(
            "scan %s: %d px that readers marked lie outside of %s px",
            scan.scan_id,
            cut_px,
            settings.size_px,
        )
    resampled, affine = _volumes(scan, volumes, settings.volume_spacing_mm)
    part = Part(
        _scan_record(scan, settings, len(rows), cut_px, source_sha256),
        rows,
        _nodule_records(scan),
        slices,
        resampled,
        affine,
    )
    part.scan["sha256"] = content_sha256((part.scan, rows, part.nodules), part.arrays())
    return part


def choose_slices(
    scan: Scan, lung_px: np.ndarray, nodule_px: np.ndarray, settings: config.Table
) -> np.ndarray:
    """The slices of a scan that go into the table.

    With `slices=nodule`, negatives are drawn among the slices with lung and without
    nodule. The draw depends on the seed and the scan's id alone, so another cohort or
    another order of the scans changes nothing.

    Args:
        scan: The scan; `lung` or `reader_bits` may be unknown.
        lung_px: (z,) lung pixels per slice.
        nodule_px: (z,) pixels per slice that any reader marked.
        settings: Which slices.

    Returns:
        Sorted z indices.

    Raises:
        ScanError: If the mask that decides is unknown.
    """
    if settings.slices == "all":
        return np.arange(len(lung_px))
    if settings.slices == "none":
        return np.arange(0)
    if scan.lung is None:
        raise ScanError(
            f"scan {scan.scan_id} has no lung mask, which table.slices={settings.slices} "
            "needs; run preprocess.py again, or take --table.slices all"
        )
    if settings.slices == "lung":
        return np.flatnonzero(lung_px)
    if scan.reader_bits is None:
        raise ScanError(
            f"scan {scan.scan_id} has no nodule masks, so no slices with nodules can be "
            "chosen to train on; segment it with infer.py --input, or store all its slices "
            "with --table.slices lung"
        )
    with_nodule = np.flatnonzero(nodule_px)
    negatives = np.flatnonzero((lung_px > 0) & (nodule_px == 0))
    ratio = settings.negatives_per_nodule_slice
    wanted = round(ratio * (len(with_nodule) or HEALTHY_SLICES))
    rng = np.random.default_rng(
        (settings.seed, int(text_sha256(scan.scan_id)[:16], 16))
    )
    drawn = rng.choice(negatives, min(wanted, len(negatives)), replace=False)
    return np.sort(np.concatenate((with_nodule, drawn)))


def offset_px(shape_px: Sequence[int], size_px: Sequence[int]) -> tuple[int, int]:
    """Where pixel (0, 0) of an image lies in one of another size with the same centre.

    Args:
        shape_px: (y, x) size of the image.
        size_px: (y, x) size it is padded or cut to.

    Returns:
        (y, x), negative where it is cut; an odd pixel goes last.
    """
    y, x = (
        int((size - full) / 2) for full, size in zip(shape_px, size_px, strict=True)
    )
    return y, x


def fit(images: np.ndarray, size_px: tuple[int, int], *, fill: int) -> np.ndarray:
    """Images padded or cut to (y, x) `size_px` around their centre.

    Args:
        images: (z, y, x).
        size_px: (y, x).
        fill: Value of the padding.

    Returns:
        (z, y, x); `images` itself when the size is right.
    """
    if images.shape[1:] == tuple(size_px):
        return images
    target, source = [slice(None)], [slice(None)]
    offsets = offset_px(images.shape[1:], size_px)
    for full, size, offset in zip(images.shape[1:], size_px, offsets, strict=True):
        length = min(full, size)
        target.append(slice(max(offset, 0), max(offset, 0) + length))
        source.append(slice(max(-offset, 0), max(-offset, 0) + length))
    fitted = np.full((len(images), *size_px), fill, images.dtype)
    fitted[tuple(target)] = images[tuple(source)]
    return fitted


def _z_mm(scan: Scan, z: np.ndarray) -> np.ndarray:
    """RAS z of the centre of each slice."""
    _, height, width = scan.hu.shape
    centre = [(height - 1) / 2, (width - 1) / 2]
    index = np.column_stack((z, np.broadcast_to(centre, (len(z), 2))))
    return scan.grid.index_to_ras_mm(index)[:, 2]


def _scan_record(
    scan: Scan, settings: config.Table, rows: int, cut_px: int, source_sha256: str
) -> np.ndarray:
    record = np.zeros(1, SCAN)
    for name in ("scan_id", "patient_id", "series_uid", "subset"):
        text = getattr(scan, name).encode()
        if len(text) > SCAN[name].itemsize:
            raise ScanError(
                f"scan {scan.scan_id}: its {name} has {len(text)} bytes; the table "
                f"holds {SCAN[name].itemsize}"
            )
        record[name] = text
    record["spacing_mm"], record["affine"] = scan.spacing_mm, scan.grid.affine
    record["shape"] = scan.hu.shape
    record["offset_px"] = offset_px(scan.hu.shape[1:], settings.size_px)
    record["rows"], record["cut_px"] = rows, cut_px
    record["read"] = scan.reader_bits is not None
    record["has_lung"] = scan.lung is not None
    record["source_sha256"] = source_sha256
    return record


def _nodule_records(scan: Scan) -> np.ndarray:
    records = np.zeros(len(scan.nodules), NODULE)
    for record, nodule in zip(records, scan.nodules, strict=True):
        record["label"], record["readers"] = nodule.label, nodule.readers
        record["diameter_mm"] = nodule.diameter_mm
        record["volume_mm3"] = np.mean([a.volume_mm3 for a in nodule.annotations])
        record["centre_ras_mm"] = nodule.centre_ras_mm
        for name in ("subtlety", "malignancy"):
            rated = [a for a in nodule.annotations if name in a.characteristics]
            ratings = [a.characteristics[name] for a in rated]
            record[name] = np.mean(ratings) if ratings else np.nan
    return records


def _volumes(
    scan: Scan, volumes: Mapping[str, np.ndarray], spacing_mm: float
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """The resampled volumes by name and their affine; none if `spacing_mm` is 0."""
    if not spacing_mm:
        return {}, np.eye(4)
    weights, affine = resample.isotropic(scan.grid, spacing_mm)
    bits, labels = resample.nodules(
        volumes["reader_bits"], volumes["nodule_labels"], weights
    )
    resampled = {
        "hu": np.rint(resample.volume(scan.hu, weights)).astype(np.int16),
        "lung": resample.labels(volumes["lung"], weights),
        "reader_bits": bits,
        "nodule_labels": labels,
    }
    return resampled, affine


def write_thesis_layout(path: Path, out: Path, batches: config.Batches) -> None:
    """Writes the slices as the thesis stored them, for scripts that expect that.

    The file holds `data` (rows, y, x) float32 HU, `truth` (rows, y, x) uint8, 1 where
    nodule, and `subject_ids` (rows,) "SCAN_ID_Z"; the same row order as the table.

    Args:
        path: The table.
        out: The HDF5 file; it appears whole or not at all.
        batches: `input_px` (cut around the centre), `lung_mask` and the consensus.
    """
    import tables

    filters = tables.Filters(complevel=5, complib="blosc")
    with (
        SliceTable(path) as table,
        files.written_whole(out) as partial,
        hdf5.written(partial, out) as h5,
    ):
        shape = (0, *batches.slice_px)
        data, truth = (
            h5.create_earray("/", name, atom, shape, "", filters, len(table))
            for name, atom in (
                ("data", tables.Float32Atom()),
                ("truth", tables.UInt8Atom()),
            )
        )
        for row in range(len(table)):
            hu, mask = _hu_and_mask(table, row, batches)
            data.append(fit(hu[None], batches.slice_px, fill=AIR_HU).astype(np.float32))
            truth.append(fit(mask[None], batches.slice_px, fill=0).astype(np.uint8))
        subject_ids = [
            f"{table.scans['scan_id'][row['scan']]}_{row['z']}".encode()
            for row in table.rows
        ]
        h5.create_array("/", "subject_ids", subject_ids)


def write_npy_slices(
    path: Path, out: Path, batches: config.Batches, *, middle: int = 0
) -> int:
    """Writes slices as .npy files, one folder per patient; `cohorts.npy` reads them.

    Images are int16 HU. Masks are uint8: lung labels, or 1 where the consensus says
    nodule, by `batches.target`; where it is unknown, there are none.

    Args:
        path: The table.
        out: The folder; it appears whole or not at all, and replaces one like it.
        batches: `target` and the consensus.
        middle: Only so many slices in the middle of each scan's rows; 0 for all.

    Returns:
        The number of slices.

    Raises:
        ValueError: If `out` holds something else, or an id cannot name a file.
    """
    from tqdm import tqdm

    from cohorts import npy

    for found in out.iterdir() if out.exists() else ():
        if not (found / npy.LIST).is_file():
            raise ValueError(
                f"{out} holds {found.name}, which is no folder of slices; expected a new "
                "folder, or one that --npy-slices made"
            )
    lists: dict[str, list[dict[str, Any]]] = {}
    with SliceTable(path) as table, files.written_whole(out) as partial:
        partial.mkdir()
        patients = tqdm(table.scans["patient_id"], "npy", unit="scan", disable=None)
        for index, patient in enumerate(patients):
            patient_id = files.checked_id(str(patient), where=f"patients of {path}")
            rows = middle_rows(table.rows_of_scan(index), middle)
            for row in rows:
                (partial / patient_id).mkdir(exist_ok=True)
                entry = _write_npy_slice(partial / patient_id, table, row, batches)
                lists.setdefault(patient_id, []).append(entry)
        for patient_id, entries in lists.items():
            listed = partial / patient_id / npy.LIST
            with listed.open("w", newline="", encoding="utf-8") as file:
                writer = csv.DictWriter(file, npy.COLUMNS)
                writer.writeheader()
                writer.writerows(entries)
    return sum(map(len, lists.values()))


def middle_rows(rows: range, count: int) -> range:
    """`count` rows in the middle, all if there are fewer; 0 for all."""
    count = min(count or len(rows), len(rows))
    start = (len(rows) - count) // 2
    return rows[start : start + count]


def _write_npy_slice(
    folder: Path, table: SliceTable, row: int, batches: config.Batches
) -> dict[str, Any]:
    """Writes image and mask of a row; its line of the list."""
    from cohorts import npy

    scan, z = table.scans[table.rows["scan"][row]], int(table.rows["z"][row])
    name = f"{scan['scan_id']}_z{z:04}"
    entry = {"pid": scan["scan_id"], "z": z, "patient_id": scan["patient_id"]}
    entry |= zip(npy.SPACING, scan["spacing_mm"].tolist(), strict=True)
    images = {"image_path": (f"{name}.npy", table.read("hu", row))}
    if batches.target == "lung" and scan["has_lung"]:
        images["lung_path"] = (f"{name}_lung.npy", table.read("lung", row))
    if batches.target == "nodule" and scan["read"]:
        mask = _consensus(table, row, batches).astype(np.uint8)
        images["seg_path"] = (f"{name}_nodule.npy", mask)
    for column, (file_name, image) in images.items():
        entry[column] = files.checked_id(file_name, where=f"{table.path}, row {row}")
        np.save(folder / file_name, image, allow_pickle=False)
    return entry


def _hu_and_mask(
    table: SliceTable, row: int, batches: config.Batches
) -> tuple[np.ndarray, np.ndarray]:
    """(y, x) HU, air outside of the lungs if wanted, and the bool consensus mask."""
    hu = table.read("hu", row)
    if batches.lung_mask:
        hu[table.read("lung", row) == 0] = AIR_HU
    return hu, _consensus(table, row, batches)


def _consensus(table: SliceTable, row: int, batches: config.Batches) -> np.ndarray:
    """(y, x) bool consensus mask of the nodules."""
    return scans.consensus(
        table.read("reader_bits", row),
        table.read("nodule_labels", row),
        table.readers_of_label(table.rows["scan"][row]),
        level=batches.consensus_level,
        min_readers=batches.min_readers,
    )


@dataclass(frozen=True)
class Arguments:
    scans: Path = Path("work/scans")
    """Folder of scan files."""
    out: Path = Path("work/table.h5")
    """The table."""
    table: config.Table = field(default_factory=config.Table)
    batches: config.Batches = field(default_factory=config.Batches)
    """Used by --thesis-layout and --npy-slices alone."""
    overwrite: bool = False
    """Replace a table made with other settings or of other scans."""
    verify: bool = False
    """Make nothing; read the table again and compare its checksums."""
    thesis_layout: Path | None = None
    """Also write the slices to this HDF5 file as the thesis laid them out."""
    npy_slices: Path | None = None
    """Also write the slices as .npy files to this folder, with one folder per patient."""
    middle: int = 0
    """Of --npy-slices only so many in the middle of each scan; 0 for all."""
    workers: int = 1
    """Processes."""
    scheduler: str = ""
    """Address of a Dask scheduler to use instead."""

    def __post_init__(self) -> None:
        config.require(self.middle >= 0, "middle", self.middle, "0 or more")


def run_step(arguments: Arguments) -> steps.Report:
    """What the command line asks for."""
    thesis, npy = arguments.thesis_layout, arguments.npy_slices
    for other in (thesis, npy):
        if other and other.exists() and not arguments.overwrite:
            raise ValueError(f"{other} exists; add --overwrite to replace it")
    if arguments.verify:
        return _verified(arguments.out)
    report = write_table(
        arguments.scans,
        arguments.out,
        arguments.table,
        workers=arguments.workers,
        scheduler=arguments.scheduler,
        overwrite=arguments.overwrite,
    )
    if thesis:
        write_thesis_layout(arguments.out, thesis, arguments.batches)
    if npy:
        count = write_npy_slices(
            arguments.out, npy, arguments.batches, middle=arguments.middle
        )
        report = replace(report, line=f"{report.line}; wrote {npy}: {count} slices")
    return report


def _verified(path: Path) -> steps.Report:
    damaged = verify_table(path)
    if damaged:
        raise ValueError(
            f"{path}: {len(damaged)} scans do not read as they were written: "
            f"{', '.join(damaged[:5])}; make it again with --overwrite"
        )
    with SliceTable(path) as table:
        return steps.Report(f"{_summary(table)} reads as it was written")


def main(argv: Sequence[str] | None = None) -> None:
    steps.run(run_step, Arguments, argv=argv)


if __name__ == "__main__":
    main()
