"""What is timed and weighed here: on what machine, in turns, and kept as JSON."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import pathlib
import platform
import statistics
import sys
import time
import typing
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

import flax
import jax
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from lora_jax.errors import LoraError

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Machine:
    """Where something was measured.

    processor: of the host. cores: that this process may use.
    backend, device: JAX's, such as cpu and the kind of its first device.
    python, jax, flax: versions.
    """

    processor: str
    cores: int
    backend: str
    device: str
    python: str
    jax: str
    flax: str

    def line(self, *more: str) -> str:
        """All of it in a line; `more` are other versions."""
        versions = [f"Python {self.python}", f"JAX {self.jax}", f"Flax {self.flax}", *more]
        backend = self.backend if self.backend == "cpu" else f"{self.backend} ({self.device})"
        return f"{self.processor}, {self.cores} cores, {backend}; {', '.join(versions)}"


def machine() -> Machine:
    """This one."""
    return Machine(
        processor=processor(),
        cores=cores(),
        backend=jax.default_backend(),
        device=jax.devices()[0].device_kind,
        python=platform.python_version(),
        jax=jax.__version__,
        flax=flax.__version__,
    )


def hardware(*more: str) -> str:
    """One line: processor, cores that this process may use, and versions."""
    return machine().line(*more)


def cores() -> int:
    """That this process may use."""
    usable = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count()
    return usable or 1


def processor() -> str:
    """Of the host, by its name."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            named = [line.split(":", 1)[1].strip() for line in lines if "model name" in line]
    except OSError:
        named = []
    return named[0] if named else platform.processor() or platform.machine()


def timings(
    runs: Mapping[str, Callable[[], Any]],
    repeats: int,
    ran: Callable[[], None] = lambda: None,
) -> dict[str, list[float]]:
    """Seconds of each run, `repeats` of each; one before them does not count.

    Every repeat runs all of them, so a busy moment hits all.

    Args:
      runs: name -> what is run; it is waited for what it gives.
      ran: is told of every run, those that do not count too.
    """
    for run in runs.values():
        jax.block_until_ready(run())
        ran()
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repeats):
        for name, run in runs.items():
            start = time.perf_counter()
            jax.block_until_ready(run())
            seconds[name].append(time.perf_counter() - start)
            ran()
    return seconds


def interleaved(runs: Mapping[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
    """Median seconds of each run, as `timings` takes them."""
    return {name: statistics.median(s) for name, s in timings(runs, repeats).items()}


@contextlib.contextmanager
def bar(console: Console, text: str, total: int) -> Iterator[Callable[[], None]]:
    """A bar on a terminal, and nothing elsewhere; it gives what is to be called at each step."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    shown = console.is_terminal
    with Progress(
        *columns, TimeRemainingColumn(), console=console, transient=True, disable=not shown
    ) as progress:
        task = progress.add_task(text, total=total)
        yield lambda: progress.advance(task)


def prepared(out: str) -> pathlib.Path:
    """The file that results are to go to, its folder made before anything is measured.

    Raises:
      LoraError: it is a folder. OSError: the folder cannot be made.
    """
    file = pathlib.Path(out).expanduser()
    if file.is_dir():
        raise LoraError(f"--out {out} is a folder; give a file in it, such as {file / 'out.json'}")
    file.parent.mkdir(parents=True, exist_ok=True)
    return file


def write(file: pathlib.Path, found: Any) -> None:
    """A dataclass as JSON, whole or not at all."""
    partial = file.with_name(file.name + ".tmp")
    partial.write_text(json.dumps(dataclasses.asdict(found), indent=1) + "\n")
    os.replace(partial, file)


def read(file: pathlib.Path, kind: type[T], command: str) -> T | None:
    """What `write` wrote, checked before it is believed; None where there is no such file.

    Args:
      file: JSON.
      kind: the dataclass; its fields are numbers, texts, bools, dataclasses and tuples of these.
        A tuple has at least one entry.
      command: that makes the file, for the message.

    Raises:
      LoraError: it is not what `write` wrote.
    """
    if not file.is_file():
        return None
    try:
        found: T = _as(kind, json.loads(file.read_text()), "")
    except ValueError as error:
        raise LoraError(
            f"{file} cannot be read: {error}; delete it and make it anew: {command}"
        ) from error
    return found


def _as(kind: Any, value: Any, name: str) -> Any:
    """A value of JSON as a `kind`; a ValueError that names the field where it is none."""
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
