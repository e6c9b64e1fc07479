"""Sources of scans, one module each; all provide `find_scans` and `load_scan`."""

import importlib
from types import ModuleType

COHORTS = {
    "lidc": "cohorts.lidc",
    "luna16": "cohorts.luna16",
    "nifti": "cohorts.nifti",
    "npy": "cohorts.npy",
    "patches": "cohorts.patches",
}
"""Maps a command-line name to its module; `config.CohortName` lists the same names."""


def cohort(name: str) -> ModuleType:
    """Imports and returns the module of a source; importing late keeps `--help` fast.

    Raises:
        ValueError: If the source is unknown.
    """
    if name not in COHORTS:
        raise ValueError(f"no cohort {name!r}; expected one of {', '.join(COHORTS)}")
    return importlib.import_module(COHORTS[name])
