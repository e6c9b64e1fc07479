"""Step 2 of 9: collect the scan files in one HDF5 table of axial slices and volumes.

Example:
    python table.py thesis --scans work/scans --out work/table.h5

The table stores HU and masks unchanged; window, crop and augmentation come later. Its format
is in docs/formats.md. Each scan is first written to its own part in OUT.parts, so that a
stopped build can be resumed. The parts are then joined chunk by chunk and removed. The build
needs disk space for two copies of the table.
"""

import contextlib
import functools
import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

import config
import steps
from ct import files, hdf5
from ct import scan as scans
from ct.scan import ScanError
from dataset.exports import write_npy_slices, write_thesis_layout
from dataset.slice_table import SCAN, SKIPPED, SliceTable, text_sha256, verify_table
from dataset.table_part import make_part
from dataset.table_writer import (
    check_read_back,
    create_table,
    join_parts,
    write_scan_part,
)

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ScanFile:
    """A scan file to add to the table."""

    scan_id: str
    path: Path


def write_table(
    scans_dir: Path,
    out: Path,
    settings: config.Table,
    *,
    workers: int = 1,
    scheduler: str = "",
    overwrite: bool = False,
) -> steps.Report:
    """Collects the scan files of a folder in one table.

    Resumes a stopped build and leaves a complete table as it is. Unusable scan files are
    listed beside the table, in `out` with suffix .skipped.csv.

    Args:
        scans_dir: Folder of scan files.
        out: The table.
        settings: Selection of slices and volumes.
        workers: Number of processes.
        scheduler: Address of a Dask scheduler, see `steps.map_scans`.
        overwrite: Replace a table made with other settings or from other scan files.

    Raises:
        FileNotFoundError: If there are no scan files.
        ValueError: If no scan can be used, or `out` exists and differs.
        OSError: If the disk is full; a later call resumes the build.
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
            f"the first one: {failures[0].reason}"
        )
    join_parts(parts, out, settings, _skipped(failures, items), mask=mask)
    files.remove(parts_dir)
    return _report(out, failures)


def write_part(item: ScanFile, parts_dir: Path, settings: config.Table) -> Path:
    """Writes the part of a scan, a table of this scan alone; keeps a valid existing part."""
    path = parts_dir / f"{item.scan_id}.h5"
    source_sha256 = _source_sha256(item.path)
    if _part_stands(path, settings, source_sha256):
        return path
    part = make_part(scans.read_scan(item.path), settings, source_sha256)
    with files.write_atomically(path) as partial:
        with hdf5.open_new(partial, path) as h5:
            create_table(h5, settings, rows=len(part.rows), provenance_record={})
            write_scan_part(h5, part)
        check_read_back(partial, path)
    return path


def mask_settings(scan_files: Sequence[Path]) -> dict[str, Any] | None:
    """Reads the lung mask settings of scan files; returns None if none are recorded.

    Ignores unreadable files, which are skipped later.

    Raises:
        ValueError: If the masks were made with different settings.
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
            f"{second.name} with {b}; remake them with preprocess.py --overwrite"
        )
    return json.loads(next(iter(found), "null"))


def _part_stands(path: Path, settings: config.Table, source_sha256: str) -> bool:
    """Returns whether a part is intact and made from this scan with these settings."""
    try:
        with SliceTable(path) as part:
            return (
                part.settings == settings
                and part.scans.dtype.names == SCAN.names
                and part.scans["source_sha256"].tolist() == [source_sha256]
                and part.scans["sha256"].tolist() == [part.checksum(0)]
            )
    except (ValueError, OSError):
        return False


def _source_sha256(path: Path) -> str:
    """Returns a checksum over file size and provenance record, without reading pixels."""
    record = ""
    try:
        with hdf5.open_readonly(path) as h5:
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


def _report(out: Path, failures: Sequence[steps.Failure]) -> steps.Report:
    with SliceTable(out) as table:
        cut = int((table.scans["cut_px"] > 0).sum())
        line = f"wrote {_summary(table)}"
    if cut:
        line += f", nodule pixels cropped away in {cut} scans"
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
                f"{out} exists and was made from other scan files: {other[0]} is new, "
                f"missing or changed, {len(set(other))} in all; add --overwrite to replace it"
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


@dataclass(frozen=True)
class Arguments:
    """Input, output and settings of the table."""

    scans: Path = Path("work/scans")
    """Folder of scan files."""
    out: Path = Path("work/table.h5")
    """The table to write."""
    table: config.Table = field(default_factory=config.Table)
    batches: config.Batches = field(default_factory=config.Batches)
    """Used only by --thesis-layout and --npy-slices."""
    overwrite: bool = False
    """Replace a table made with other settings or from other scans."""
    verify: bool = False
    """Write nothing; read the table again and compare its checksums."""
    thesis_layout: Path | None = None
    """Also write the slices to this HDF5 file in the layout of the thesis."""
    npy_slices: Path | None = None
    """Also write the slices as .npy files to this folder, with one folder per patient."""
    middle: int = 0
    """Number of slices that --npy-slices writes, from the middle of each scan; 0 for all."""
    workers: int = 1
    """Number of processes."""
    scheduler: str = ""
    """Address of a Dask scheduler to use instead of local processes."""

    def __post_init__(self) -> None:
        config.require(self.middle >= 0, "middle", self.middle, "0 or more")


def run_step(arguments: Arguments) -> steps.Report:
    """Writes or verifies the table, and writes the other layouts that are asked for."""
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
            f"{path}: checksums of {len(damaged)} scans do not match: "
            f"{', '.join(damaged[:5])}; make the table again with --overwrite"
        )
    with SliceTable(path) as table:
        return steps.Report(f"{_summary(table)}, all checksums match")


def main(argv: Sequence[str] | None = None) -> None:
    steps.run(run_step, Arguments, argv=argv)


if __name__ == "__main__":
    main()
