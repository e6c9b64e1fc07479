"""Makes patient ids safe to write: public ids, or pseudonyms made with a secret key."""

import hashlib
import hmac
import logging
import os
import re
import secrets
import tempfile
from contextlib import suppress
from functools import cache
from pathlib import Path

from cohorts.dicom_headers import Identity
from ct.scan import PHANTOM

log = logging.getLogger(__name__)

PUBLIC_IDS = re.compile(rf"(LIDC-IDRI-|{PHANTOM})\d{{4}}")
"""Public research ids, which are kept unchanged."""

ANONYMOUS_IDS = re.compile(
    r"\W*|0+|x+|anon[^1-9]*"
    r"|(de-?identified|no ?name|unknown|none|null|n/?a|patient|test)[^a-z1-9]*",
    re.IGNORECASE,
)
"""Placeholder ids such as "anonymous", which many patients may share."""

KEY_FILE_VARIABLE = "LUNG_PATIENT_KEY_FILE"
KEY_BYTES = 32
"""Length of the secret key; without a key, trying all ids of seven digits would reveal
the one behind a pseudonym."""


def safe_patient_id(identity: Identity) -> str:
    """Returns the patient id if it is public, else one pseudonym for all of its series.

    If the id is a placeholder, the pseudonym comes from the study UID, else the series UID.
    """
    if PUBLIC_IDS.fullmatch(identity.patient_id):
        return identity.patient_id
    secret = identity.patient_id
    if is_anonymous(secret):
        secret = identity.study_uid or identity.series_uid
    mark = hmac.new(read_key(key_path()), secret.encode(), hashlib.sha256)
    return "p-" + mark.hexdigest()[:12]


def is_anonymous(patient_id: str) -> bool:
    """Returns True if a PatientID is a placeholder that many patients may share."""
    return ANONYMOUS_IDS.fullmatch(patient_id) is not None


def key_path() -> Path:
    """Returns the path of this user's pseudonym key."""
    if named := os.environ.get(KEY_FILE_VARIABLE):
        return Path(named)
    settings = os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config"
    return Path(settings, "lung-nodules/patient_key")


@cache
def read_key(path: Path) -> bytes:
    """Reads the key from a file; creates the file, private to its owner, if missing.

    Raises:
        ValueError: If the file does not hold a key.
    """
    if not path.exists():
        _make_key(path)
    key = path.read_bytes()
    if len(key) != KEY_BYTES:
        raise ValueError(
            f"{path}: {len(key)} bytes; expected a key of {KEY_BYTES}; restore the file, "
            "or remove it to make a new key, which changes all patient pseudonyms"
        )
    return key


def _make_key(path: Path) -> None:
    """Writes a new key, unless another process has just written one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent) as file:  # created with mode 0600
        file.write(secrets.token_bytes(KEY_BYTES))
        file.flush()
        with suppress(FileExistsError):
            os.link(file.name, path)
            log.info("wrote %s, the key for this user's patient pseudonyms", path)
