"""Unpack a wheel or a source archive as plain files; nothing in it is imported or run.

The standard library does the unpacking, and writes nothing outside of the folder. These are refused
before a file is written: a member whose path leads out of the folder, more than 100,000 members,
and more total bytes than 16 GiB or than 200 times the archive's own (256 MiB are always allowed).
"""

from __future__ import annotations

import errno
import lzma
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path, PurePosixPath

from lora_jax.errors import PackageError

FILES = 100_000
MOST_BYTES = 2**34
ANY_ARCHIVE = 2**28  # bytes that an archive of any size may unpack to
RATIO = 200  # unpacked bytes allowed for each byte of the archive

_BROKEN = (
    *(zipfile.BadZipFile, tarfile.TarError, zlib.error, lzma.LZMAError, struct.error, OSError),
    *(EOFError, NotImplementedError, RuntimeError),  # an encrypted member is a RuntimeError
)


def unpack(archive: Path, folder: Path) -> None:
    """Unpack a wheel (.whl), or a .tar.gz without its single top folder, into a new folder.

    After an error the folder may hold some of the files.
    """
    folder.mkdir()
    try:
        if archive.suffix == ".whl":
            with zipfile.ZipFile(archive) as wheel:
                _check(archive, {member.filename: member.file_size for member in wheel.infolist()})
                wheel.extractall(folder)  # a link becomes a file that holds its target
        else:
            with tarfile.open(archive, "r:gz") as source:
                _check(archive, {member.name: member.size for member in source})
                source.extractall(folder, filter="data")  # refuses devices and links out of it
            tops = list(folder.iterdir())
            if len(tops) != 1 or not tops[0].is_dir():
                raise PackageError(f"{archive.name} does not hold one folder at its top")
            for child in list(tops[0].iterdir()):
                child.rename(folder / child.name)
    except _BROKEN as error:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise PackageError(f"{folder} cannot be written: {error.strerror}") from error
        raise PackageError(f"{archive.name} is damaged: {type(error).__name__}: {error}") from error


def _check(archive: Path, members: Mapping[str, int]) -> None:
    """Raise unless the members, by path with their declared bytes, may be unpacked."""
    if len(members) > FILES:
        raise PackageError(f"{archive.name} holds {len(members):,} files; the limit is {FILES:,}")
    size, declared = archive.stat().st_size, sum(members.values())
    most = min(MOST_BYTES, max(ANY_ARCHIVE, RATIO * size))
    if declared > most:
        raise PackageError(
            f"{archive.name} has {size:,} bytes and declares {declared:,} unpacked; the limit is "
            f"{most:,}"
        )
    for name in members:
        path = PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts or set("\\:\0") & set(name):
            raise PackageError(f"{archive.name}: {name[:200]!r} could lead out of its folder")
