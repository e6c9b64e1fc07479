"""What made a file: versions, commit, machine and settings, as a plain record."""

import dataclasses
import datetime
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

DISCLAIMER = "Research code, not a medical device."
"""Stands wherever a person sees results."""

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
    """Everything needed to say how a file came to be; JSON-ready.

    Args:
        settings: A config dataclass, stored field by field.
        **facts: Whatever else the step knows: seeds, input checksums, counts.

    Returns:
        A record without host names, user names or paths outside `facts`.
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
    """The checkout's commit, with '+' if files differ from it; '' outside of git."""
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
