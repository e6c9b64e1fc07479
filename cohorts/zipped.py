"""Extracts a zip of DICOM files into a temporary folder, if its members are harmless."""

import shutil
import stat
import tempfile
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

from ct import files
from ct.scan import ScanError

MAX_BYTES, MAX_MEMBERS = 8 * 2**30, 20_000
"""Largest size of the extracted files and their largest number; a series of 2,000 slices
of 512 x 512 pixels has 1 GiB."""

ZIP_ERRORS = (
    zipfile.BadZipFile,
    zlib.error,
    NotImplementedError,
    RuntimeError,
    EOFError,
)
"""Errors that zipfile raises on damaged members and unknown compression."""


def is_zip(path: Path) -> bool:
    """Tells whether a path is that of a file named *.zip."""
    return path.suffix.lower() == ".zip" and path.is_file()


@contextmanager
def extracted(path: Path) -> Iterator[Path]:
    """Extracts a zip into a temporary folder, which is removed afterwards.

    Every folder of the zip becomes a numbered folder. Hidden files are left out.

    Raises:
        ScanError: If the zip is damaged or encrypted, or a member is too large or names a
            place outside the zip.
    """
    with tempfile.TemporaryDirectory(prefix="lung-zip-") as name:
        try:
            with zipfile.ZipFile(path) as archive:
                _extract(archive, Path(name), path)
        except ZIP_ERRORS as error:
            raise ScanError(
                f"{path}: not a readable zip ({error}); expected DICOM files without a "
                "password; restore it from its source"
            ) from error
        yield Path(name)


def _extract(archive: zipfile.ZipFile, folder: Path, path: Path) -> None:
    members = [member for member in archive.infolist() if not member.is_dir()]
    total = sum(member.file_size for member in members)
    if total > MAX_BYTES or len(members) > MAX_MEMBERS:
        raise ScanError(
            f"{path}: {len(members)} files of {files.size_text(total)}; expected at most "
            f"{MAX_MEMBERS} files of {files.size_text(MAX_BYTES)}; extract it yourself"
        )
    numbers: dict[PurePosixPath, int] = {}
    for member in members:
        name = PurePosixPath(member.filename.replace("\\", "/"))
        _check_member(member, name, path)
        if any(part.startswith(".") for part in name.parts) or "__MACOSX" in name.parts:
            continue
        number = numbers.setdefault(name.parent, len(numbers))
        target = folder / str(number) / name.name[-200:]
        target.parent.mkdir(exist_ok=True)
        # "xb" refuses a second member of the same name.
        try:
            with archive.open(member) as source, target.open("xb") as file:
                shutil.copyfileobj(source, file)
        except FileExistsError:
            raise ScanError(
                f"{path}: two members are named {name.name}; expected every name once per "
                "folder"
            ) from None


def _check_member(member: zipfile.ZipInfo, name: PurePosixPath, path: Path) -> None:
    outside = name.is_absolute() or ".." in name.parts or ":" in name.parts[0]
    if outside or stat.S_ISLNK(member.external_attr >> 16):
        raise ScanError(
            f"{path}: member {member.filename!r} is a link or leaves the folder; expected "
            "files inside the zip"
        )
