"""HDF5 files through PyTables: read without unpickling, written with error checks."""

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

if TYPE_CHECKING:  # importing PyTables takes as long as all the rest of --help
    import tables

WRONG = "is damaged, is not HDF5, or holds a pickled object, which could run any code"


class Unreadable(ValueError):
    """A file that is not HDF5, or that this project would not write."""


class _Pickled(ValueError):
    pass


class _NoUnpickling:
    """Replacement for the module pickle within PyTables; refuses to unpickle."""

    HIGHEST_PROTOCOL = pickle.HIGHEST_PROTOCOL
    dumps = staticmethod(pickle.dumps)

    @staticmethod
    def loads(*args: Any, **kwargs: Any) -> None:
        raise _Pickled


@contextmanager
def open_readonly(path: Path) -> Iterator["tables.File"]:
    """Opens an HDF5 file for reading and closes it at the end.

    PyTables unpickles attributes as soon as it sees them; here that raises an error.

    Raises:
        Unreadable: If the file is damaged or holds a pickled object, on opening or
            reading.
    """
    import tables

    try:
        with open_file(path) as h5:
            yield h5
    except (tables.HDF5ExtError, _Pickled) as error:
        raise Unreadable(f"{path} {WRONG}") from error


def open_file(path: Path) -> "tables.File":
    """Opens an HDF5 file for reading like `open_readonly`, but the caller closes it.

    Raises:
        Unreadable: If the file is damaged or holds a pickled object.
    """
    import tables

    tables.silence_hdf5_messages()  # set per thread, and Dask has its own threads
    for module in (tables.attributeset, tables.atom):
        vars(module)["pickle"] = _NoUnpickling
    try:
        return tables.open_file(path)
    except (tables.HDF5ExtError, _Pickled) as error:
        raise Unreadable(f"{path} {WRONG}") from error


@contextmanager
def open_new(partial: Path, path: Path) -> Iterator["tables.File"]:
    """Opens a new HDF5 file `partial` for writing; `path` is its final name.

    HDF5 writes some of its data only when it closes the file, and PyTables does not
    report when that fails, so read the file back before renaming it.

    Raises:
        OSError: If HDF5 cannot write; one line instead of HDF5's page-long stack.
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
    """Returns the compression of slices, the fastest to read in benchmarks/table.py.

    LZ4HC reads HU no faster, compresses them 7 % smaller and takes ten times as long to
    write; Zstandard compresses them 15 % smaller and takes twice as long to read.
    """
    import tables

    wide = dtype.itemsize > 1
    return tables.Filters(
        complevel=5, complib="blosc2:lz4", shuffle=wide, bitshuffle=not wide
    )


def not_written(path: Path, reason: str) -> OSError:
    """Returns the error for a file that cannot be written, with the free disk space."""
    folder = next(p for p in path.absolute().parents if p.is_dir())
    free = files.size_text(shutil.disk_usage(folder).free)
    return OSError(
        errno.ENOSPC,
        f"cannot write {path}: {reason}; {free} are free there. Nothing was left "
        "half-written; free some space, then run the same command again",
    )
