"""Writes the table: one part per scan, then all parts joined chunk by chunk."""

import errno
import json
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

import config
from ct import files, hdf5, provenance
from ct.scan import VOLUMES
from dataset.slice_table import (
    DTYPES,
    FORMAT_VERSION,
    NODULE,
    ROW,
    SCAN,
    SKIPPED,
    compressed,
    verify_table,
)
from dataset.table_part import Part

if TYPE_CHECKING:
    import tables


def write_scan_part(h5: "tables.File", part: Part) -> None:
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
    """Joins tables with the same settings; compressed slices are copied unchanged.

    Args:
        parts: Tables to join, with at least one scan in total, in the order of the result.
        out: Table to write, atomically.
        settings: Settings that all parts were made with.
        skipped: (scans,) `SKIPPED` records of scans that are in no part.
        mask: Provenance of the lung masks.
    """
    from tqdm import tqdm

    _require_room(parts, out)
    total = sum(_rows_of(part) for part in parts)
    made_by = provenance.record(settings, scans=len(parts), mask=mask)
    joined = parts[0].with_name(".joined.h5")
    out.parent.mkdir(parents=True, exist_ok=True)
    try:
        with hdf5.open_new(joined, out) as h5:
            create_table(h5, settings, rows=total, provenance_record=made_by)
            h5.root.skipped.append(skipped)
            first_row = 0
            for index, part in enumerate(
                tqdm(parts, "join", unit="scan", disable=None)
            ):
                with hdf5.open_readonly(part) as source:
                    first_row = _append(h5, source, index, first_row)
        check_read_back(joined, out)
        joined.replace(out)
    finally:
        files.remove(joined)


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


def create_table(
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
    with hdf5.open_readonly(part) as h5:
        return h5.root.rows.nrows


def check_read_back(written: Path, path: Path) -> None:
    """Raises OSError if a table does not hold what was written.

    HDF5 buffers part of its output until it closes the file, and PyTables does not report a
    failure to do so.
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
            f"{out} needs {files.size_text(needed)}, but only {files.size_text(free)} are "
            "free there; free some space and repeat the command, which resumes from here",
        )


def _existing(path: Path) -> Path:
    """Returns the nearest existing folder above `path`."""
    return next(parent for parent in path.absolute().parents if parent.is_dir())
