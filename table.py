"""Step 2 of 9: gather the prepared scans into one HDF5 table of axial slices.

Example:
    python table.py thesis --scans work/scans --out work/table.h5

A table holds facts, not choices: HU and masks as they are; window, crop and augmentation
come later. Its format is in docs/formats.md. Each scan is first written to a part of its
own in OUT.parts, so a build that was stopped goes on where it stood; parts are then
joined, chunk by chunk, and removed. Disk needed while it builds: twice the table.
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
from dataset.slice_table import SKIPPED, SliceTable, text_sha256, verify_table
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
    """A scan file to be taken into the table."""

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
            create_table(h5, settings, rows=len(part.rows), provenance_record={})
            write_scan_part(h5, part)
        check_read_back(partial, path)
    return path


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
