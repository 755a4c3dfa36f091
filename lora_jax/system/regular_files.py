"""Read the files of folders that may come from a stranger.

Only regular files are opened, so that a FIFO or a device cannot stop a command. A link in a folder
is followed only to a file of the same folder, since what it leads to may end up in a report or an
export. At most a limit of bytes is read, and a file that consists of holes is refused.
"""

from __future__ import annotations

import contextlib
import os
import pathlib
import stat
from collections.abc import Callable, Iterator
from typing import IO, BinaryIO

AnyPath = str | os.PathLike[str]
MakeError = Callable[[str], Exception]

MOST_BYTES = 2**26  # limit for a file, or a line, that is read at once
RATIO = 1000  # a larger file may have this many bytes for each one on the disk
_HOLES = 1000  # what is behind so many holes of a file does not count


def opened(path: AnyPath, error: MakeError, *, given: bool = False) -> BinaryIO:
    """Open a file for reading.

    It must be a regular file with at most `RATIO` bytes for each one on the disk. Unless the user
    has named it (`given`), it is a file of a folder, and may not be a link out of that folder.
    """
    if not given and os.path.islink(path):
        _check_link(pathlib.Path(path), error)
    # Without O_NONBLOCK, opening a FIFO waits for a process that writes to it.
    wait: int = getattr(os, "O_NONBLOCK", 0)  # not on Windows
    file = open(path, "rb", opener=lambda name, flags: os.open(name, flags | wait))  # noqa: SIM115
    found = os.fstat(file.fileno())
    if not stat.S_ISREG(found.st_mode):
        file.close()
        raise error(f"{path} is not a regular file, but a FIFO, a device or a socket")
    if found.st_size > max(MOST_BYTES, RATIO * allocated(path)):
        file.close()
        raise error(
            f"{path} has {found.st_size:,} bytes, nearly all of them in holes of the file; if that "
            "is meant, copy it with cp --sparse=never"
        )
    return file


def check(path: AnyPath, error: MakeError, *, given: bool = False) -> None:
    """Raise as `opened` does, before a library opens the file by its name."""
    opened(path, error, given=given).close()


def read(path: AnyPath, error: MakeError, *, most: int = MOST_BYTES, given: bool = False) -> bytes:
    """Return the contents of a file of at most `most` bytes (see `opened`)."""
    with opened(path, error, given=given) as file:
        data = file.read(most + 1)
        if len(data) > most:
            size = os.fstat(file.fileno()).st_size
            raise error(f"{path} has {size:,} bytes; the limit is {most:,}")
    return data


def lines(file: IO[bytes], where: object, error: MakeError) -> Iterator[tuple[int, bytes]]:
    """Yield (number, line) of an open file; numbers begin at 1, and a line keeps its end."""
    number = 0
    while line := file.readline(MOST_BYTES + 1):
        number += 1
        if len(line) > MOST_BYTES:
            raise error(f"{where}, line {number} has more than {MOST_BYTES:,} bytes")
        yield number, line


def allocated(path: AnyPath) -> int:
    """Return the bytes of a regular file that are on the disk: those in holes do not count."""
    found = os.stat(path)
    blocks = 512 * getattr(found, "st_blocks", found.st_size)
    if blocks >= found.st_size or getattr(os, "SEEK_DATA", None) is None:
        return min(blocks, found.st_size)
    # File systems that compress, or that count the blocks of a new file late, know its holes.
    total = end = 0
    with open(path, "rb") as file, contextlib.suppress(OSError):  # ends after the last data
        for _ in range(_HOLES):
            start = os.lseek(file.fileno(), end, os.SEEK_DATA)
            end = os.lseek(file.fileno(), start, os.SEEK_HOLE)
            total += end - start
    return total


def _check_link(path: pathlib.Path, error: MakeError) -> None:
    """Raise unless a link leads to its own folder, or to the blobs of a cache of the model hub."""
    folder, target = (pathlib.Path(os.path.realpath(p)) for p in (path.parent, path))
    blobs = folder.parent.parent / "blobs"
    hub = folder.parent.name == "snapshots" and target.is_relative_to(blobs)
    if not hub and not target.is_relative_to(folder):
        raise error(
            f"{path} is a link to {target}, out of its folder; if you trust it, copy the folder "
            "with its links followed (cp -rL)"
        )
