"""Write measurements as a JSON file, check them when they are read, and show a progress bar.

The check is written by hand: the JSON is a plain dataclass, and a library that validates it
(msgspec, pydantic) would be one more dependency in place of the 25 lines of `_as`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import pathlib
import typing
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from lora_jax.errors import LoraError
from lora_jax.system.whole_files import write_json

T = TypeVar("T")


@contextlib.contextmanager
def bar(console: Console, text: str, total: int) -> Iterator[Callable[[], None]]:
    """Show a bar on a terminal, and nothing elsewhere; yield the function that advances it."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    shown = console.is_terminal
    with Progress(
        *columns, TimeRemainingColumn(), console=console, transient=True, disable=not shown
    ) as progress:
        task = progress.add_task(text, total=total)
        yield lambda: progress.advance(task)


def prepared(out: str) -> pathlib.Path:
    """Make the folder of a results file, before anything is measured, and return its path."""
    file = pathlib.Path(out).expanduser()
    if file.is_dir():
        raise LoraError(f"--out {out} is a folder; give a file in it, such as {file / 'out.json'}")
    file.parent.mkdir(parents=True, exist_ok=True)
    return file


def write(file: pathlib.Path, found: Any) -> None:
    """Write a dataclass as JSON, completely or not at all."""
    write_json(file, dataclasses.asdict(found))


def read(file: pathlib.Path, kind: type[T], command: str) -> T | None:
    """Read and check a file that `write` wrote; return None if there is no such file."""
    if not file.is_file():
        return None
    try:
        found: T = _as(kind, json.loads(file.read_text()), "")
    except ValueError as error:
        raise LoraError(
            f"{file} cannot be read: {error}; delete it and make it again: {command}"
        ) from error
    return found


def _as(kind: Any, value: Any, name: str) -> Any:
    """Return a JSON value as a `kind`, or raise a ValueError that names the field."""
    if dataclasses.is_dataclass(kind) and isinstance(kind, type):
        hints = typing.get_type_hints(kind)
        if not isinstance(value, dict) or value.keys() != hints.keys():
            got = ", ".join(map(str, value)) if isinstance(value, dict) else type(value).__name__
            raise ValueError(f"{name or 'it'} has {got or 'nothing'}, expected {', '.join(hints)}")
        inner = {field: _as(hint, value[field], field) for field, hint in hints.items()}
        return kind(**inner)
    if typing.get_origin(kind) is tuple:
        if not isinstance(value, list) or not value:
            raise ValueError(f"{name} is {str(value)[:80]!r}, expected a list with entries")
        return tuple(_as(typing.get_args(kind)[0], entry, name) for entry in value)
    wanted = (int, float) if kind is float else kind
    fits = isinstance(value, wanted) and isinstance(value, bool) == (kind is bool)
    if not fits or (kind is float and not math.isfinite(value)):
        raise ValueError(f"{name} is {str(value)[:80]!r}, expected a {kind.__name__}")
    return value
