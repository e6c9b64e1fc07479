"""Exports the table to other layouts: the thesis' HDF5 file and .npy slices."""

import csv
from pathlib import Path
from typing import Any

import numpy as np

import config
from ct import files, hdf5
from ct import scan as scans
from ct.scan import AIR_HU
from dataset.slice_table import SliceTable
from dataset.table_part import fit


def write_thesis_layout(path: Path, out: Path, batches: config.Batches) -> None:
    """Writes the slices in the thesis' layout, for scripts that expect it.

    The file holds `data` (rows, y, x) float32 HU, `truth` (rows, y, x) uint8, which is 1 in
    nodules, and `subject_ids` (rows,) "SCAN_ID_Z", all in the row order of the table.

    Args:
        path: The table.
        out: HDF5 file to write, atomically.
        batches: Uses `input_px` (cut around the centre), `lung_mask` and the consensus
            settings.
    """
    import tables

    filters = tables.Filters(complevel=5, complib="blosc")
    with (
        SliceTable(path) as table,
        files.write_atomically(out) as partial,
        hdf5.open_new(partial, out) as h5,
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
    """Writes slices as .npy files, one folder per patient, in the format of `cohorts.npy`.

    Images are int16 HU. Masks are uint8: lung labels, or 1 in the nodule consensus,
    depending on `batches.target`. A scan without that mask gets images alone.

    Args:
        path: The table.
        out: Folder to write, atomically; an earlier export there is replaced.
        batches: Uses `target` and the consensus settings.
        middle: Number of slices to take from the middle of each scan's rows; 0 for all.

    Returns:
        The number of slices written.

    Raises:
        ValueError: If `out` holds anything else, or an id cannot be a file name.
    """
    from tqdm import tqdm

    from cohorts import npy

    for found in out.iterdir() if out.exists() else ():
        if not (found / npy.LIST).is_file():
            raise ValueError(
                f"{out} holds {found.name}, which is not a folder of slices; expected a new "
                "folder, or one that --npy-slices made"
            )
    lists: dict[str, list[dict[str, Any]]] = {}
    with SliceTable(path) as table, files.write_atomically(out) as partial:
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
    """Returns the middle `count` rows; all rows if there are fewer or `count` is 0."""
    count = min(count or len(rows), len(rows))
    start = (len(rows) - count) // 2
    return rows[start : start + count]


def _write_npy_slice(
    folder: Path, table: SliceTable, row: int, batches: config.Batches
) -> dict[str, Any]:
    """Writes image and mask of a row; returns its entry in the list."""
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
    """Reads (y, x) HU, with air outside the lungs if set, and the bool consensus mask."""
    hu = table.read("hu", row)
    if batches.lung_mask:
        hu[table.read("lung", row) == 0] = AIR_HU
    return hu, _consensus(table, row, batches)


def _consensus(table: SliceTable, row: int, batches: config.Batches) -> np.ndarray:
    """Computes the (y, x) bool consensus mask of the nodules."""
    return scans.consensus(
        table.read("reader_bits", row),
        table.read("nodule_labels", row),
        table.readers_of_label(table.rows["scan"][row]),
        level=batches.consensus_level,
        min_readers=batches.min_readers,
    )
