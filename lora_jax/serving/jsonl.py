"""Read and write JSONL, one JSON object a line; "-" is stdin or stdout.

The jsonlines package does not return the size of a line in bytes, which the progress bar needs, and
its reader is not strict (`lora_jax.system.json_file`).
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import pathlib
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, BinaryIO, Self, TypeVar

from lora_jax.errors import LoraError, writing
from lora_jax.system import json_file, regular_files

T = TypeVar("T")
STANDARD = "-"
_UNSEEN = re.compile("[\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069]")
_EXPECTED = 'expected an object, like {"text": "..."}, one on each line'


class LineError(LoraError):
    """A line cannot be used; the message names the line."""


@dataclasses.dataclass(frozen=True)
class JsonLine:
    """One object of a JSONL file.

    where: the file and the number of the line from 1, for messages.
    size: bytes of the line, including its end.
    fault: the error of a line that is not an object; its value is empty.
    """

    value: Mapping[str, Any]
    where: str
    size: int = 0
    fault: LineError | None = None

    @property
    def fields(self) -> str:
        """The names of the fields, for a message."""
        names = ", ".join(map(repr, itertools.islice(self.value, 40))) or "none"
        return names if len(names) <= 1_000 else f"{names[:1_000]}..."

    def get(self, field: str, kind: type[T], default: T | None = None) -> T:
        """Return a field of this type. Unless `default` is given, it must be there and not null."""
        found = self.value.get(field)
        if found is None and default is not None:
            return default
        if field not in self.value:
            raise LineError(f"{self.where} has no field {field!r}; its fields: {self.fields}")
        if not isinstance(found, kind):
            raise LineError(
                f"{self.where}: {field!r} is {json.dumps(found)[:80]}, expected a {kind.__name__}"
            )
        return found


def read(path: str, *, keep_broken: bool = False) -> Iterator[JsonLine]:
    """Read the objects of a file, or of stdin, one at a time; empty lines are skipped.

    With `keep_broken`, a line that is not an object in UTF-8 is yielded with its fault.
    """
    with opened(path, "rb") as file:
        yield from objects(file, "stdin" if path == STANDARD else path, keep_broken)


def objects(file: BinaryIO, name: str, keep_broken: bool = False) -> Iterator[JsonLine]:
    """Read objects as `read` does, from an open file."""

    def broken(message: str) -> LineError:
        return LineError(f"{message}\n{_EXPECTED}")

    for number, raw in regular_files.lines(file, name, LineError):
        if not raw.strip():
            continue
        where = f"{name}, line {number}"
        try:
            yield JsonLine(json_file.parse_object(raw, where, broken), where, len(raw))
        except LineError as error:
            if not keep_broken:
                raise
            yield JsonLine({}, where, len(raw), error)


class Writer:
    """Writes objects as they come. Each line is written completely, even if the run is killed.

    The old contents of a file are deleted when the first line is written, so that an earlier error
    loses nothing.
    """

    def __init__(self, path: str, *, reading: str | None = None) -> None:
        """Open the file, or stdout, which may not be the one that is read at the same time."""
        if reading is not None and _same(path, reading):
            raise LineError(f"{path} is read and written at once; give another file as --out")
        self._stack, self.path = contextlib.ExitStack(), path
        self._made = path != STANDARD and not pathlib.Path(path).exists()
        self.count, self.last = 0, ""  # objects that are written, and the place of the last one
        self._file = self._stack.enter_context(opened(path, "ab"))
        self._old = pathlib.Path(path).is_file() and path != STANDARD

    def write(self, values: Sequence[Mapping[str, Any]]) -> None:
        """Append the objects, and flush them to the operating system."""
        self._forget()
        text = "".join(json.dumps(v, ensure_ascii=False, allow_nan=False) + "\n" for v in values)
        # JSON leaves these characters as they are, and a terminal may take them for commands, or
        # write what follows from right to left.
        text = _UNSEEN.sub(lambda found: f"\\u{ord(found[0]):04x}", text)
        with writing(self.path):
            self._file.write(text.encode())
            self._file.flush()
        self.count += len(values)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        with writing(self.path):
            if not any(error):
                self._forget()
            self._stack.close()
            if any(error) and self._made and not self.count:
                pathlib.Path(self.path).unlink()

    def _forget(self) -> None:
        if self._old:
            self._file.truncate(0)
            self._old = False


@contextlib.contextmanager
def opened(path: str, mode: str) -> Iterator[Any]:
    """Open a file that the user named, or stdin or stdout, to read ("rb") or to append ("ab")."""
    if path == STANDARD:
        yield sys.stdin.buffer if mode == "rb" else sys.stdout.buffer
        return
    reading = mode == "rb"
    with regular_files.opened(path, LineError, given=True) if reading else open(path, mode) as file:
        yield file


def _same(one: str, other: str) -> bool:
    if STANDARD in (one, other):
        return False
    places = [pathlib.Path(path) for path in (one, other)]
    return all(place.exists() for place in places) and places[0].samefile(places[1])


def in_order(numbered: Iterable[tuple[int, T]]) -> Iterator[T]:
    """Yield values in the order of their numbers 0, 1, ..., each as soon as that is possible.

    >>> list(in_order([(1, "b"), (0, "a"), (2, "c")]))
    ['a', 'b', 'c']
    """
    waiting: dict[int, T] = {}
    due = 0
    for number, value in numbered:
        waiting[number] = value
        while due in waiting:
            yield waiting.pop(due)
            due += 1
