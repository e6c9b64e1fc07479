"""Sources of scans, one module each; all offer `find_scans` and `load_scan`."""

import importlib
from types import ModuleType

COHORTS = {
    "lidc": "cohorts.lidc",
    "luna16": "cohorts.luna16",
    "nifti": "cohorts.nifti",
    "npy": "cohorts.npy",
    "patches": "cohorts.patches",
}
"""Name on the command line to module; `config.CohortName` holds the same names."""


def cohort(name: str) -> ModuleType:
    """The module of a source, imported now: its readers would slow every `--help`.

    Raises:
        ValueError: If there is no such source.
    """
    if name not in COHORTS:
        raise ValueError(f"no cohort {name!r}; expected one of {', '.join(COHORTS)}")
    return importlib.import_module(COHORTS[name])
