"""HDF5 files through PyTables: opened without running what is in them, written or an error."""

import errno
import pickle
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ct import files

if TYPE_CHECKING:  # PyTables takes as long to import as all the rest of a --help
    import tables

WRONG = "is damaged, no HDF5 file, or holds a pickled object, which could run any code"


class Unreadable(ValueError):
    """A file is no HDF5 file, or one that this project would not write."""


class _Pickled(ValueError):
    pass


class _NoUnpickling:
    """Stands in for the module pickle within PyTables."""

    HIGHEST_PROTOCOL = pickle.HIGHEST_PROTOCOL
    dumps = staticmethod(pickle.dumps)

    @staticmethod
    def loads(*args: Any, **kwargs: Any) -> None:
        raise _Pickled


@contextmanager
def opened(path: Path) -> Iterator["tables.File"]:
    """An HDF5 file to read; closed at the end.

    PyTables unpickles attributes as soon as it sees them; here that is an error.

    Raises:
        Unreadable: If it is damaged or holds a pickled object, on opening or on reading.
    """
    import tables

    try:
        with open_file(path) as h5:
            yield h5
    except (tables.HDF5ExtError, _Pickled) as error:
        raise Unreadable(f"{path} {WRONG}") from error


def open_file(path: Path) -> "tables.File":
    """As `opened`, but to be closed by the caller.

    Raises:
        Unreadable: If it is damaged or holds a pickled object.
    """
    import tables

    tables.silence_hdf5_messages()  # is per thread; Dask works in threads of its own
    for module in (tables.attributeset, tables.atom):
        vars(module)["pickle"] = _NoUnpickling
    try:
        return tables.open_file(path)
    except (tables.HDF5ExtError, _Pickled) as error:
        raise Unreadable(f"{path} {WRONG}") from error


@contextmanager
def written(partial: Path, path: Path) -> Iterator["tables.File"]:
    """A new HDF5 file `partial`, which will be called `path`.

    HDF5 keeps back some of what it writes until it closes the file, and PyTables does
    not say when that fails: read the file back before it takes its name.

    Raises:
        OSError: If HDF5 cannot write: one line, not a page of its own stack.
    """
    import tables

    tables.silence_hdf5_messages()
    try:
        with tables.open_file(partial, "w") as h5:
            yield h5
    except tables.HDF5ExtError as error:
        found = re.search(r"error message = '([^']*)'", str(error))
        raise not_written(path, found[1] if found else "HDF5 failed") from error


def filters(dtype: np.dtype) -> "tables.Filters":
    """Compression of slices: the fastest to read of those in benchmarks/table.py.

    LZ4HC reads HU no faster, makes them 7 % smaller and takes ten times as long to write;
    Zstandard makes them 15 % smaller and takes twice as long to read.
    """
    import tables

    wide = dtype.itemsize > 1
    return tables.Filters(
        complevel=5, complib="blosc2:lz4", shuffle=wide, bitshuffle=not wide
    )


def not_written(path: Path, reason: str) -> OSError:
    """The error that a file could not be written, with the room that is left."""
    folder = next(p for p in path.absolute().parents if p.is_dir())
    free = files.size_text(shutil.disk_usage(folder).free)
    return OSError(
        errno.ENOSPC,
        f"cannot write {path}: {reason}; {free} are free there. Nothing was left "
        "half-written; free some space, and the same command goes on from here",
    )
