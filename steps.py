"""Shared parts of the numbered steps: command line, exit codes and work over scans."""

import csv
import difflib
import errno
import logging
import os
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

import config
from configs import CONFIGS
from ct import files
from ct.scan import ScanError

log = logging.getLogger(__name__)

DONE, FAILED, USAGE, SOME_SKIPPED = 0, 1, 2, 3
"""Exit codes of every step."""

PROGRESS_LOG_S = 60.0
"""Least interval between progress lines in the log when there is no terminal."""


@dataclass(frozen=True)
class Failure:
    """A skipped scan and the reason."""

    scan_id: str
    reason: str


@dataclass(frozen=True)
class Report:
    """Result of a step: its closing line and the skipped scans."""

    line: str
    failures: Sequence[Failure] = ()


def run(
    step: Callable[[Any], Report], arguments: Any, *, argv: Sequence[str] | None
) -> None:
    """Parses the command line into `arguments`, runs `step` and exits with its exit code.

    Args:
        step: Function of the parsed arguments.
        arguments: A frozen dataclass type. If it has fields with the name and type of
            sections of `config.Experiment`, the first word of the command line names
            the experiment that fills them, and `--section.field value` changes a setting.
        argv: Command line without the program's name; None takes that of this process.
    """
    logging.basicConfig(
        level=logging.INFO,
        format="%(asctime)s %(module)s: %(message)s",
        stream=sys.stderr,
    )
    logging.getLogger("distributed").setLevel(logging.ERROR)
    logging.getLogger("numexpr").setLevel(logging.WARNING)  # PyTables' own
    try:
        parsed = parse(arguments, argv)
    except ValueError as error:  # tyro itself reports errors of prefixed sections
        sys.stderr.write(f"error: {error}\n")
        sys.exit(USAGE)
    except BrokenPipeError:  # the reader, such as `head`, closed the pipe
        for stream in (sys.stdout, sys.stderr):
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        words = sys.argv[1:] if argv is None else argv
        sys.exit(DONE if {"-h", "--help"} & set(words) else USAGE)
    started = time.monotonic()
    try:
        report = step(parsed)
    except (ValueError, OSError) as error:
        sys.stderr.write(f"error: {error}\n")
        sys.exit(FAILED)
    for failure in report.failures:
        sys.stderr.write(f"skipped {failure.scan_id}: {failure.reason}\n")
    print(f"{report.line}, {duration_text(time.monotonic() - started)}")
    sys.exit(SOME_SKIPPED if report.failures else DONE)


def parse(arguments: Any, argv: Sequence[str] | None) -> Any:
    """Parses the command line into an instance of `arguments`; see `run`."""
    description = sys.modules[arguments.__module__].__doc__
    sections = [
        name
        for name, argument in arguments.__dataclass_fields__.items()
        if argument.type is config.Experiment.__annotations__.get(name)
    ]
    if not sections:
        return tyro.cli(arguments, args=argv, description=description)
    words = list(sys.argv[1:] if argv is None else argv)
    if words and words[0] not in (*CONFIGS, "-h", "--help"):
        near = difflib.get_close_matches(words[0], CONFIGS, 1)
        guess = f"; did you mean {near[0]}?" if near else ""
        sys.stderr.write(
            f"error: the first word must be an experiment ({', '.join(CONFIGS)}), found "
            f"{words[0]!r}{guess}\n"
        )
        sys.exit(USAGE)
    if words and words[0] in CONFIGS:  # --help then describes this experiment
        help_line, experiment = CONFIGS[words[0]]
        chosen = arguments(**{s: getattr(experiment, s) for s in sections})
        return tyro.cli(
            arguments,
            args=words[1:],
            default=chosen,
            prog=f"{Path(sys.argv[0]).name} {words[0]}",
            description=f"{description}\n\n{words[0]}: {help_line}",
        )
    defaults = {
        name: (help_line, arguments(**{s: getattr(experiment, s) for s in sections}))
        for name, (help_line, experiment) in CONFIGS.items()
    }
    return tyro.extras.overridable_config_cli(
        defaults,
        args=argv,
        description=f"{description}\n\nAdd --help after an experiment's name to list its "
        "settings.",
    )


def map_scans(
    work: Callable[[Any], Any],
    items: Sequence[Any],
    *,
    workers: int,
    scheduler: str = "",
    label: str,
) -> tuple[list[Any], list[Failure]]:
    """Runs `work` on every item, in worker processes; a failed scan is reported, not fatal.

    Args:
        work: A module-level function of one item; its results are returned.
        items: Objects with an attribute `scan_id`.
        workers: Number of processes on this machine; 1 works in this process.
        scheduler: Address of a Dask scheduler to use instead, e.g. tcp://host:8786.
        label: Text of the progress bar.

    Returns:
        The results of the items that succeeded, in the order of `items`, and the
        failures.

    Raises:
        OSError: If the disk is full, because every other scan would fail too.
    """
    if scheduler or (workers > 1 and len(items) > 1):
        outcomes = _map_by_dask(work, items, workers, scheduler, label)
    else:
        outcomes = {
            index: _attempt(work, item)
            for index, item in enumerate(_progress(items, len(items), label))
        }
    ordered = [outcomes[index] for index in range(len(items))]
    failures = [outcome for outcome in ordered if isinstance(outcome, Failure)]
    return [o for o in ordered if not isinstance(o, Failure)], failures


def _attempt(work: Callable[[Any], Any], item: Any) -> Any:
    try:
        return work(item)
    except ScanError as error:
        return Failure(item.scan_id, str(error))
    except Exception as error:  # one bad scan must not stop the others
        if isinstance(error, OSError) and error.errno == errno.ENOSPC:
            raise
        log.exception("scan %s failed unexpectedly", item.scan_id)
        return Failure(item.scan_id, f"{type(error).__name__}: {error}")


def _map_by_dask(
    work: Callable[[Any], Any],
    items: Sequence[Any],
    workers: int,
    scheduler: str,
    label: str,
) -> dict[int, Any]:
    from dask import distributed

    logging.getLogger("distributed").setLevel(logging.WARNING)
    # Without an address the client starts local worker processes and ends them on closing.
    where: dict[str, Any] = (
        {"address": scheduler}
        if scheduler
        else {
            "n_workers": workers,
            "threads_per_worker": 1,
            "dashboard_address": "127.0.0.1:0",
        }
    )
    outcomes = {}
    with distributed.Client(**where) as client:
        futures = {
            client.submit(_attempt, work, item, pure=False): index
            for index, item in enumerate(items)
        }
        done = distributed.as_completed(futures)
        for future in _progress(done, len(items), label):
            index = futures[future]
            try:
                outcomes[index] = future.result()
            except distributed.KilledWorker:
                outcomes[index] = Failure(
                    items[index].scan_id,
                    "its worker process died, most likely because memory ran out; "
                    "run again with --workers 1",
                )
            future.release()
    return outcomes


def _progress(items: Iterable[Any], total: int, label: str) -> Iterable[Any]:
    """Shows a progress bar in a terminal, and regular log lines elsewhere."""
    if sys.stderr is None or not sys.stderr.isatty():
        return _told(items, total, label)
    from tqdm import tqdm

    return tqdm(items, total=total, desc=label, unit="scan")


def _told(items: Iterable[Any], total: int, label: str) -> Iterable[Any]:
    begun = told = time.monotonic()
    for done, item in enumerate(items):
        now = time.monotonic()
        if done and now - told >= PROGRESS_LOG_S:
            spent = duration_text(now - begun)
            log.info("%s: %d of %d scans, %s", label, done, total, spent)
            told = now
        yield item


def write_failures(failures: Sequence[Failure], path: Path) -> None:
    """Writes the skipped scans to a CSV; removes an older list if there are none."""
    if not failures:
        files.remove(path)
        return
    with files.write_atomically(path) as partial, partial.open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(("scan_id", "reason"))
        rows.writerows((failure.scan_id, failure.reason) for failure in failures)


def duration_text(seconds: float) -> str:
    """Returns a readable duration, e.g. '41 min'."""
    if seconds < 100:
        return f"{seconds:.3g} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
