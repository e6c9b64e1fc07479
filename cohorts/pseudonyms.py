"""Patient ids that are safe to write: public ids, or pseudonyms made with a secret key."""

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
"""Patient ids that are public research ids and are kept as they are."""

ANONYMOUS_IDS = re.compile(
    r"\W*|0+|x+|anon[^1-9]*"
    r"|(de-?identified|no ?name|unknown|none|null|n/?a|patient|test)[^a-z1-9]*",
    re.IGNORECASE,
)
"""Patient ids that stand for nobody in particular, so many patients may share them."""

KEY_FILE_VARIABLE = "LUNG_PATIENT_KEY_FILE"
KEY_BYTES = 32
"""Pseudonyms are made with a secret key: without one, an id of seven digits is found by
trying them all."""


def safe_patient_id(identity: Identity) -> str:
    """The patient's id if it is public; else a pseudonym, the same for all its series.

    Where the id stands for nobody in particular, the study stands for the patient.
    """
    if PUBLIC_IDS.fullmatch(identity.patient_id):
        return identity.patient_id
    secret = identity.patient_id
    if is_anonymous(secret):
        secret = identity.study_uid or identity.series_uid
    mark = hmac.new(read_key(key_path()), secret.encode(), hashlib.sha256)
    return "p-" + mark.hexdigest()[:12]


def is_anonymous(patient_id: str) -> bool:
    """Whether a PatientID is one that many patients may share."""
    return ANONYMOUS_IDS.fullmatch(patient_id) is not None


def key_path() -> Path:
    """The file with the key of this user's pseudonyms."""
    if named := os.environ.get(KEY_FILE_VARIABLE):
        return Path(named)
    settings = os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config"
    return Path(settings, "lung-nodules/patient_key")


@cache
def read_key(path: Path) -> bytes:
    """The key in a file, which is made, for its owner alone, if there is none.

    Raises:
        ValueError: If the file holds no key.
    """
    if not path.exists():
        _make_key(path)
    key = path.read_bytes()
    if len(key) != KEY_BYTES:
        raise ValueError(
            f"{path}: {len(key)} bytes; expected a key of {KEY_BYTES}. Restore it; or "
            "remove it for a new one, with which all pseudonyms of patients change"
        )
    return key


def _make_key(path: Path) -> None:
    """Writes a new key; if another process was faster, its key stays."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent) as file:  # of mode 0600
        file.write(secrets.token_bytes(KEY_BYTES))
        file.flush()
        with suppress(FileExistsError):
            os.link(file.name, path)
            log.info("made %s, the key of this user's pseudonyms of patients", path)
