"""Unpacks a wheel or a source archive as plain files; nothing in it is imported or run.

What is refused, before a file is written: a member whose path leads out of the folder, a link or
another special file, two members with one path, more than 100,000 members, and more bytes in all
than 16 GiB or than 200 times the archive's own (256 MiB are always allowed).
"""

from __future__ import annotations

import lzma
import shutil
import stat
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import IO, Any, NamedTuple

FILES = 100_000
MOST_BYTES = 2**34
ANY_ARCHIVE = 2**28  # bytes that an archive of any size may unpack to
RATIO = 200  # bytes unpacked for each of the archive

_BROKEN = (
    *(zipfile.BadZipFile, tarfile.TarError, zlib.error, lzma.LZMAError, struct.error),
    *(EOFError, NotImplementedError, RuntimeError),  # an encrypted member is a RuntimeError
)


class ArchiveError(ValueError):
    """An archive that cannot be unpacked, or may not be; the message says why."""


class _Member(NamedTuple):
    name: str
    size: int  # as declared; no more is read
    regular: bool
    open: Callable[[], IO[bytes] | None]


def unpack(archive: Path, folder: Path) -> None:
    """Unpack `archive` into `folder`, which is made and must not exist.

    Args:
        archive: a wheel (.whl), whose files are placed as in site-packages; or a .tar.gz, whose
            single top folder is left out.
        folder: on an error, it may hold a part of the files.

    Raises:
        ArchiveError: the archive is damaged, or one that is refused.
    """
    folder.mkdir()
    try:
        if archive.suffix == ".whl":
            with zipfile.ZipFile(archive) as wheel:
                _write(archive, _of_wheel(wheel), folder)
        else:
            with tarfile.open(archive, "r:gz") as source:
                _write(archive, _of_source(source), folder)
    except _BROKEN as error:
        raise ArchiveError(f"{archive.name} is damaged: {type(error).__name__}: {error}") from error


def _of_wheel(wheel: zipfile.ZipFile) -> list[_Member]:
    return [
        _Member(
            _installed_as(info.filename),
            info.file_size,
            stat.S_IFMT(info.external_attr >> 16) in (0, stat.S_IFREG),
            partial(wheel.open, info),
        )
        for info in wheel.infolist()
        if not info.is_dir()
    ]


def _of_source(source: tarfile.TarFile) -> list[_Member]:
    return [
        _Member(
            info.name.partition("/")[2], info.size, info.isreg(), partial(source.extractfile, info)
        )
        for info in source.getmembers()
        if not info.isdir()
    ]


def _installed_as(name: str) -> str:
    """The path in site-packages of a member of a wheel.

    >>> _installed_as("a/b.txt"), _installed_as("a-1.data/purelib/a/b.txt")
    ('a/b.txt', 'a/b.txt')
    """
    top, _, rest = name.partition("/")
    scheme, _, inner = rest.partition("/")
    return inner if top.endswith(".data") and scheme in ("purelib", "platlib") else name


def _write(archive: Path, members: Sequence[_Member], folder: Path) -> None:
    _check(archive, members)
    for member in members:
        place = folder / member.name
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            target: Any = place.open("xb")
        except (FileExistsError, NotADirectoryError) as error:
            raise ArchiveError(f"{archive.name} holds {member.name[:200]!r} twice") from error
        with target:
            content = member.open()
            if content is not None:  # None only for what `_check` has refused
                with content:
                    shutil.copyfileobj(content, target)


def _check(archive: Path, members: Sequence[_Member]) -> None:
    if len(members) > FILES:
        raise ArchiveError(f"{archive.name} holds {len(members):,} files; the limit is {FILES:,}")
    size = archive.stat().st_size
    declared, most = sum(m.size for m in members), min(MOST_BYTES, max(ANY_ARCHIVE, RATIO * size))
    if declared > most:
        raise ArchiveError(
            f"{archive.name} has {size:,} bytes and declares {declared:,} unpacked; the limit is "
            f"{most:,}"
        )
    for member in members:
        if not member.regular:
            raise ArchiveError(f"{archive.name}: {member.name[:200]!r} is a link or a special file")
        if set("\\:\0") & set(member.name) or {"", ".", ".."} & set(member.name.split("/")):
            raise ArchiveError(
                f"{archive.name}: {member.name[:200]!r} could lead out of its folder"
            )
