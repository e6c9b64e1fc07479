"""Atomic file writing, checksums, and names that are safe on disk."""

import csv
import glob
import hashlib
import json
import logging
import os
import re
import secrets
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

log = logging.getLogger(__name__)

SAFE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
"""Pattern that an id must match to become a file name."""

ABANDONED_S = 24 * 3600
"""Age in seconds above which a partial file is taken for that of a killed process."""


@contextmanager
def write_atomically(path: Path) -> Iterator[Path]:
    """Yields a temporary path that is renamed to `path` when the block succeeds.

    The temporary name keeps the suffix of `path`, so writers that choose a format by
    suffix see the right one. If the block raises, the partial file is removed. Works
    for a file and for a directory.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    token = secrets.token_hex(4)
    for left in path.parent.glob(f".partial-*-{glob.escape(path.name)}"):
        if time.time() - left.stat().st_mtime > ABANDONED_S:
            remove(left)  # left by a process that was killed
    partial = path.with_name(f".partial-{token}-{path.name}")
    try:
        yield partial
        sync(partial)
        if partial.is_dir() and path.exists():
            old = path.with_name(f".partial-{token}-old-{path.name}")
            path.replace(old)
            partial.replace(path)
            remove(old)
        else:
            partial.replace(path)
    finally:
        remove(partial)


def sync(path: Path) -> None:
    """Waits until a file, or every file below a folder, is flushed to the disk."""
    for file in path.rglob("*") if path.is_dir() else [path]:
        if file.is_file():
            with file.open("rb") as opened:
                os.fsync(opened.fileno())


def files_below(folder: Path) -> Iterator[Path]:
    """Yields every file below a folder in a fixed order, except hidden files.

    Follows links to folders and reads no folder twice. Skips devices and pipes; yields
    what cannot be examined, so that reading it tells why.
    """
    seen = set()
    for parent, folders, names in os.walk(folder, onerror=_warn, followlinks=True):
        real = os.path.realpath(parent)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        folders.sort()
        # macOS leaves ._NAME files beside what it copies.
        paths = (Path(parent, name) for name in sorted(names) if name[0] != ".")
        yield from (path for path in paths if _may_be_file(path))


def _warn(error: OSError) -> None:
    log.warning("skipping a folder that cannot be read: %s", error.strerror)


def _may_be_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:
        return True


def remove(path: Path) -> None:
    """Removes a file or a directory tree; does nothing if there is none."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def sha256(path: Path) -> str:
    """Returns the SHA-256 of a file in hexadecimal."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def checked_id(text: str, *, where: str) -> str:
    """Returns `text` if it is safe as a file name in a result directory.

    Args:
        text: An id from a list, a header or a command line.
        where: Source of the id, for the error message.

    Raises:
        ValueError: If it does not match `SAFE_NAME`: for example, it has a path
            separator, starts with a dot, or is too long.
    """
    if not SAFE_NAME.fullmatch(text):
        raise ValueError(
            f"{where}: the id {text!r} cannot name a file; expected 1 to 128 letters, "
            "digits, '.', '_' or '-', beginning with a letter or digit"
        )
    return text


def write_json(path: Path, record: Any) -> None:
    """Writes plain values as JSON; the file appears whole or not at all."""
    with write_atomically(path) as partial:
        partial.write_text(json.dumps(record, indent=1) + "\n")


def count_text(count: int, noun: str) -> str:
    """Returns a count with its noun, e.g. '1 scan' or '3 scans'."""
    return f"{count} {noun}" + ("" if count == 1 else "s")


def size_text(num_bytes: float) -> str:
    """Returns a readable size, e.g. '6.1 GB' (powers of 1000)."""
    for unit in ("B", "kB", "MB", "GB"):
        if num_bytes < 1000:
            return f"{num_bytes:.3g} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:.3g} TB"


def refuse_other_folder(folder: Path, mark: str) -> None:
    """Refuses to replace a folder that lacks the file that marks its kind.

    Raises:
        FileExistsError: If the folder has other content.
    """
    if folder.exists() and any(folder.iterdir()) and not (folder / mark).is_file():
        raise FileExistsError(
            f"{folder} holds other files ({mark} is missing) and would be replaced; "
            "choose another --out"
        )


def write_rows(
    rows: Sequence[dict[str, Any]], columns: Sequence[str], path: Path
) -> None:
    """Writes rows as CSV with a header; the file appears whole or not at all."""
    with write_atomically(path) as partial, partial.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)
