"""Provenance of a file as a plain record: versions, commit, machine and settings."""

import dataclasses
import datetime
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

DISCLAIMER = "Research code, not a medical device."
"""Notice shown wherever a person sees results."""

PACKAGES = (
    "keras",
    "tensorflow",
    "numpy",
    "scipy",
    "tables",
    "opencv-python-headless",
    "pydicom",
    "SimpleITK",
    "nibabel",
    "pylidc",
)
"""Packages whose version can change a result."""


def record(settings: Any = None, **facts: Any) -> dict[str, Any]:
    """Returns a JSON-ready record of how a file was made.

    Args:
        settings: A config dataclass, stored field by field.
        **facts: Further facts about the step: seeds, input checksums, counts.

    Returns:
        The record; only `facts` can hold host names, user names or paths.
    """
    return {
        "made": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": commit(),
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}",
        "packages": {name: package_version(name) for name in PACKAGES},
        "settings": None if settings is None else dataclasses.asdict(settings),
        **facts,
    }


def commit() -> str:
    """Returns the checkout's commit, with '+' if files differ; '' outside of git."""
    git = ["git", "-C", str(Path(__file__).parents[1])]
    try:
        head = subprocess.run(
            [*git, "rev-parse", "--short=12", "HEAD"], capture_output=True
        )
        changed = subprocess.run([*git, "status", "--porcelain"], capture_output=True)
    except FileNotFoundError:
        return ""
    if head.returncode:
        return ""
    return head.stdout.decode().strip() + ("+" if changed.stdout else "")


def package_version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return ""
