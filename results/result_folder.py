"""The result directory of infer.py: maps, labels and tables of lungs and nodules."""

import json
from collections.abc import Collection
from pathlib import Path
from typing import Any, Literal

import cv2
import numpy as np

import config
from ct import files, provenance
from ct.geometry import Grid
from ct.nifti_io import write_nifti
from ct.scan import Scan
from nodules.found import Found
from results import overview
from results.rows import (
    CANDIDATES_CSV,
    COLUMNS,
    LUNGS_CSV,
    LUNGS_JSON,
    NODULES_CSV,
    LungRow,
    candidate_row,
    nodule_row,
    read_lung_rows,
    read_rows,
    write_lung_rows,
    write_scan_rows,
)

SaveAs = Literal["nifti", "numpy", "nifti-labels", "nnunet"]

FILES = {"numpy": ".npz", "nnunet": ".nii.gz"}
"""File suffixes of the formats that write one file per scan instead of a folder."""

LABELS = {"mask.nii.gz"}
OF_PASSES = {"mean.nii.gz", "std.nii.gz", "uncertainty.nii.gz"}
OF_NODULES = {"nodules.nii.gz", "overview.png"}
MAPS = LABELS | OF_PASSES | OF_NODULES
"""Files in the folder of a scan: `LABELS` always, `OF_PASSES` with --save_as nifti, and
`OF_NODULES` if runs for nodules were used."""

NODULE_SETTINGS = ("settings", "slices", "reduction")
"""Keys of lungs.json that hold postprocessing settings of the networks in `NoduleFinder`."""

UNUSED: dict[str, Any] = {"repair": [], "series": "", "anatomy": True}
"""Settings that lungs.json lists only if they differ from these values."""

FORMAT_VERSION = 3
"""Format version of lungs.json with nodules: 2 added candidates.csv, 3 added marked_by.
Without nodules it is 1."""


class Results:
    """Result directory for lungs, in which all results have the same weights and settings.

    Args:
        folder: The result directory.
        save_as: nifti: one folder per scan; numpy: one .npz file per scan; nifti-labels: a
            folder without the maps; nnunet: one label volume per scan.
        made_by: Weights and settings that determine the results, JSON-ready.
        replaced: Scans whose earlier results are removed. If there are any and the
            settings changed, the results of all scans are removed.

    Raises:
        ValueError: If the folder holds results made with other settings and `replaced` is
            empty.
    """

    def __init__(
        self,
        folder: Path,
        save_as: SaveAs,
        made_by: dict[str, Any],
        *,
        replaced: Collection[str] = (),
    ) -> None:
        self.folder = folder
        self.save_as: SaveAs = save_as
        self.names = LABELS | (OF_PASSES if save_as == "nifti" else set())
        self.thresh = made_by.get("thresh", 0.5)
        self.mean_is_mask = made_by.get("mean_is_mask", False)
        self.names |= OF_NODULES if made_by.get("nodules") else set()
        version = FORMAT_VERSION if made_by.get("nodules") else 1
        made_by = {"format_version": version, "save_as": save_as, **made_by}
        path = folder / LUNGS_JSON
        if path.exists():
            found = read_lungs_json(path)
            changed = differing_settings(found, made_by)
            # The version also differs if only one of the two has nodules.
            both = found.get("nodules") and made_by["nodules"]
            others = changed.keys() - (set() if both else {"format_version"})
            if others == {"nodules"} and not replaced:
                raise ValueError(
                    f"{path}: nodules were searched for "
                    f"{describe_difference(found.get('nodules'), made_by['nodules'])}; "
                    "use the same "
                    "--nodules RUN --slices RUN --reduction RUN (None for no run) "
                    "--min_score SCORE, or --overwrite, or another --result_dir"
                )
            if changed and not replaced:
                raise ValueError(
                    f"{path}: results were made with other settings (found, expected): "
                    f"{changed}; use --overwrite or another --result_dir"
                )
            remove(folder, found["save_as"], None if changed else replaced)
        self.rows = {row.pid: row for row in read_lung_rows(folder / LUNGS_CSV)}
        self.tables = {name: read_rows(folder / name) for name in COLUMNS}
        if not path.exists():
            files.write_json(
                path, without_unused(made_by) | {"provenance": provenance.record()}
            )

    def path(self, pid: str) -> Path:
        """Returns the path of a scan's results: a folder, or a file with numpy and nnunet."""
        return self.folder / (pid + FILES.get(self.save_as, ""))

    def complete(self, pid: str) -> bool:
        """Returns True if all of a scan's results exist, and its row of lungs.csv."""
        path = self.path(pid)
        if self.save_as in FILES:
            return pid in self.rows and path.exists()
        return pid in self.rows and all((path / name).exists() for name in self.names)

    def foreign(self, pid: str) -> str:
        """Returns an error message if the path of a scan holds foreign files, else "".

        Files of an earlier call that was killed before it listed them are not foreign.
        """
        path = self.path(pid)
        if pid in self.rows or not path.exists() or self.started(pid).exists():
            return ""
        if path.is_dir() and {file.name for file in path.iterdir()} <= MAPS:
            return ""
        return (
            f"{path.name} exists in {self.folder.name} and was not written by infer.py; "
            "choose another --result_dir"
        )

    def started(self, pid: str) -> Path:
        """Returns the path of a file that exists while a scan's results are written."""
        return self.folder / f".{pid}.started"

    def number_of_nodules(self, pid: str) -> int:
        return len(self.tables[NODULES_CSV].get(pid, ()))

    def write(
        self,
        scan: Scan,
        row: LungRow,
        maps: Any,
        labels: np.ndarray,
        found: Found | None = None,
    ) -> None:
        """Writes a scan's results completely or not at all, and adds it to the tables.

        Args:
            scan: Scan whose grid the results lie on.
            row: Row of lungs.csv.
            maps: Object with `mean`, `std` and `mutual_information`, (z, y, x) float32.
            labels: (z, y, x) uint8 lung labels.
            found: Nodules; None if no run for nodules was used.
        """
        path = self.path(scan.scan_id)
        self.started(scan.scan_id).touch()
        if self.save_as == "nnunet":
            shown = labels if found is None else found.labels
            write_nifti(path, shown, scan.grid, scan.source_grid)
        else:
            with files.write_atomically(path) as partial:
                mean = maps.mean
                if self.mean_is_mask:
                    mean = (mean > self.thresh).view(np.uint8)
                if self.save_as == "numpy":
                    mask = (maps.mean > self.thresh).view(np.uint8)
                    arrays = {"mean": mean, "mean_seg": mask, "mask": labels}
                    if found is not None:
                        arrays["nodules"] = found.labels
                    write_arrays(partial, maps, arrays, scan.grid)
                else:
                    write_niftis(partial, maps, mean, labels, scan, self.save_as)
                    if found is not None:
                        write_found(partial, found, labels, scan, row.reason)
        if found is not None:
            rows = {
                NODULES_CSV: [nodule_row(n, scan) for n in found.nodules],
                CANDIDATES_CSV: [candidate_row(c, scan) for c in found.candidates],
            }
            for name, table in self.tables.items():
                table[row.pid] = rows[name]
                write_scan_rows(self.folder / name, table)
        # Written last, since this row marks the scan as done.
        self.rows[row.pid] = row
        write_lung_rows(self.folder / LUNGS_CSV, list(self.rows.values()))
        self.started(row.pid).unlink()


def read_lungs_json(path: Path) -> dict[str, Any]:
    """Reads lungs.json; settings newer than the file get their defaults."""
    record = json.loads(path.read_text())
    record = {"mean_is_mask": False, **UNUSED, **record}
    nodules = record.get("nodules") or {}
    for name in NODULE_SETTINGS:
        if name in nodules:
            nodules[name] = config.with_defaults(config.Postprocess, nodules[name])
    return record


def without_unused(made_by: dict[str, Any]) -> dict[str, Any]:
    """Leaves out the settings in `UNUSED` that have the value there."""
    return {
        name: value
        for name, value in made_by.items()
        if name not in UNUSED or value != UNUSED[name]
    }


def differing_settings(
    found: dict[str, Any], made_by: dict[str, Any]
) -> dict[str, Any]:
    """Returns the differences between two records as name -> (found, expected)."""
    return {
        name: (found.get(name), value)
        for name, value in made_by.items()
        if found.get(name) != value
    }


def describe_difference(
    found: dict[str, Any] | None, made_by: dict[str, Any] | None
) -> str:
    """Describes how the earlier search for nodules differs from the present one."""
    if not found:
        return "without a run, and now with one"
    if not made_by:
        return "with a run, and now without one"
    if found["weights_sha256"] != made_by["weights_sha256"]:
        return "by other runs"
    changed = [
        f"{key} {before}, now {now}"
        for name in NODULE_SETTINGS
        for key, (before, now) in differing_settings(
            found.get(name, {}), made_by.get(name, {})
        ).items()
    ]
    return f"with {'; '.join(changed)}" if changed else "in another way"


def remove(folder: Path, save_as: SaveAs, pids: Collection[str] | None) -> None:
    """Removes the results of scans that infer.py wrote, and no other files.

    Args:
        folder: The result directory.
        save_as: Format of the results.
        pids: The scans; None for all, the tables and lungs.json.
    """
    kept = []
    for row in read_lung_rows(folder / LUNGS_CSV):
        if pids is not None and row.pid not in pids:
            kept.append(row)
            continue
        if save_as in FILES:
            files.remove(folder / (row.pid + FILES[save_as]))
            continue
        for name in MAPS:
            files.remove(folder / row.pid / name)
        if (folder / row.pid).is_dir() and not any((folder / row.pid).iterdir()):
            (folder / row.pid).rmdir()
    if pids is None:
        for name in (LUNGS_CSV, NODULES_CSV, CANDIDATES_CSV, LUNGS_JSON):
            files.remove(folder / name)
        return
    write_lung_rows(folder / LUNGS_CSV, kept)
    for name in COLUMNS:
        if (folder / name).exists():
            rows = read_rows(folder / name)
            left = {pid: some for pid, some in rows.items() if pid not in pids}
            write_scan_rows(folder / name, left)


def write_niftis(
    folder: Path,
    maps: Any,
    mean: np.ndarray,
    labels: np.ndarray,
    scan: Scan,
    save_as: SaveAs,
) -> None:
    """Writes mask.nii.gz, and with `save_as` nifti the maps, with `mean` as their mean."""

    def write(name: str, values: np.ndarray) -> None:
        write_nifti(folder / f"{name}.nii.gz", values, scan.grid, scan.source_grid)

    write("mask", labels)
    if save_as == "nifti":
        write("mean", mean)
        write("std", maps.std)
        write("uncertainty", maps.mutual_information)


def write_found(
    folder: Path, found: Found, lung: np.ndarray, scan: Scan, reason: str
) -> None:
    """Writes nodules.nii.gz and overview.png, which shows the reason to distrust lungs."""
    path = folder / "nodules.nii.gz"
    write_nifti(path, found.labels, scan.grid, scan.source_grid)
    picture = overview.draw(scan, lung, found.labels, found.nodules, warning=reason)
    path = folder / "overview.png"
    if not cv2.imwrite(str(path), picture):
        raise OSError(f"{path}: OpenCV could not write the picture")


def write_arrays(
    path: Path, maps: Any, arrays: dict[str, np.ndarray], grid: Grid
) -> None:
    """Writes one .npz with some arrays, the maps of the passes and the affine.

    Arrays are (x, y, z) in RAS order. `mean_seg` and `std_seg` are the names that the
    published tool of Zhuang et al. 2025 gives to the thresholded mean and the standard
    deviation.
    """
    std = to_ras(maps.std)
    np.savez_compressed(
        path,
        allow_pickle=False,
        std=std,
        std_seg=std,
        uncertainty=to_ras(maps.mutual_information),
        affine=ras_affine(grid),
        **{name: to_ras(array) for name, array in arrays.items()},
    )


def to_ras(array: np.ndarray) -> np.ndarray:
    """Turns a canonical (z, y, x) array into (x, y, z) rising to right, front and head."""
    return np.ascontiguousarray(array.transpose(2, 1, 0)[::-1, ::-1])


def ras_affine(grid: Grid) -> np.ndarray:
    """Returns the (4, 4) affine from indices of a `to_ras` array to RAS mm."""
    _, y, x = grid.shape
    to_canonical = np.array(
        [[0, 0, 1, 0], [0, -1, 0, y - 1], [-1, 0, 0, x - 1], [0, 0, 0, 1]]
    )
    return grid.affine @ to_canonical
