"""A kind of file for the fuzzer: how its cases are made, and how they are read."""

from __future__ import annotations

import dataclasses
import functools
import os
import pathlib
from collections.abc import Callable, Mapping
from random import Random

TESTS = pathlib.Path(__file__).parents[1]
FORMATS, GOLDEN = TESTS / "formats", TESTS / "golden"
Files = dict[str, bytes]  # contents by path, relative to the case's folder


class Link(bytes):
    """Contents that are written as a link to this path."""


class Pipe(bytes):
    """Contents that are written as a named pipe."""


class Hole(bytes):
    """Contents that are written as a file of `size` bytes without any block."""

    size: int

    def __new__(cls, size: int) -> Hole:
        """Return the contents; no memory is taken."""
        found = super().__new__(cls)
        found.size = size
        return found


@dataclasses.dataclass(frozen=True)
class Kind:
    """One kind of input.

    make: draws the files of a case.
    read: reads the files from their folder as the package does, and asserts that the result is
      right.
    errors: the errors that the package documents for a file that it refuses.
    cases: the number of cases that CI runs.
    """

    make: Callable[[Random], Files]
    read: Callable[[Random, pathlib.Path], object]
    errors: tuple[type[BaseException], ...]
    cases: int


def write(folder: pathlib.Path, files: Mapping[str, bytes]) -> None:
    """Write the files of a case."""
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        match data:
            case Link():
                (folder / name).symlink_to(os.fsdecode(data))
            case Pipe():
                os.mkfifo(folder / name)
            case Hole():
                (folder / name).touch()
                os.truncate(folder / name, data.size)
            case _:
                (folder / name).write_bytes(data)


@functools.cache
def stored(folder: pathlib.Path) -> Mapping[str, bytes]:
    """Return the files of a folder, which are read once."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}
