"""The metrics of a run: one JSON line per step and per evaluation, and TensorBoard events.

`metrics.jsonl` is the source, the events are a copy. A checkpoint holds the length of the file at
its step. A run that continues truncates the file to that length first, so that no line is missing
and none is there twice.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import pathlib
import platform
import time
from collections import deque
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.record_writer import RecordWriter
from tensorboardX.summary import scalar

from lora_jax.errors import LoraError, cure
from lora_jax.system import json_file, regular_files, whole_files

Line = dict[str, Any]
_FLUSH_SECONDS = 60


class DelayedMetrics:
    """Device values that are read a few steps later, when they have been computed.

    Reading the loss of the newest step would wait for it, and the device would then be idle until
    the host sends the next step.
    """

    def __init__(self, depth: int = 2) -> None:
        self._depth = depth
        self._pending: deque[tuple[Line, Mapping[str, jax.Array]]] = deque()

    def push(self, line: Line, values: Mapping[str, jax.Array]) -> Iterator[Line]:
        """Add the host values and device values of a step; yield the lines that are due."""
        self._pending.append((line, values))
        yield from self._drain(self._depth)

    def flush(self) -> Iterator[Line]:
        """Wait for all pending lines and yield them."""
        yield from self._drain(0)

    def _drain(self, keep: int) -> Iterator[Line]:
        while len(self._pending) > keep:
            line, values = self._pending.popleft()
            read = {name: np.asarray(value).tolist() for name, value in values.items()}
            yield line | read


class Record:
    """`metrics.jsonl` and `events.*` in a run directory."""

    def __init__(self, directory: pathlib.Path, length: int = 0, step: int = 0) -> None:
        """Open the files; cut metrics.jsonl to `length` bytes, and purge events after `step`."""
        self._directory = directory
        with self._named():
            self._file = whole_files.append(directory / "metrics.jsonl")
            self._file.truncate(min(length, self._file.tell()))  # truncate could also extend it
            self._events = Events(directory, step + 1 if step else 0)

    def write(self, line: Line) -> None:
        """Append a line. It has a "step" and, for an evaluation, a "split"."""
        line = {name: _json(value) for name, value in line.items()}
        group = line.get("split", "train")
        with self._named():
            self._file.write(json.dumps(line).encode() + b"\n")
            for name, value in line.items():
                if name not in ("step", "split") and value is not None:
                    self._events.add(f"{group}/{name}", value, line["step"])

    def sync(self) -> int:
        """Flush everything to disk, and return the length of metrics.jsonl in bytes."""
        with self._named():
            self._file.flush()
            os.fsync(self._file.fileno())
            self._events.flush()
            return self._file.tell()

    @contextlib.contextmanager
    def _named(self) -> Iterator[None]:
        """Turn an OSError into a LoraError with the path and the cure."""
        try:
            yield
        except OSError as error:
            raise LoraError(
                f"{self._directory}: metrics.jsonl or the events cannot be written: "
                f"{error.strerror or error}. {cure(error)}: it goes on from the last checkpoint"
            ) from error

    def close(self) -> None:
        """Flush everything to disk, and close both files even if that fails."""
        try:
            self.sync()
        finally:
            for file in (self._file, self._events):
                with contextlib.suppress(OSError):  # `sync` has raised it already
                    file.close()


class Events:
    """A file of TensorBoard events that the calling thread writes.

    `tensorboardX.SummaryWriter` writes in another thread. On a full disk that thread dies, and the
    caller that adds the twelfth event afterwards waits for ever.
    """

    def __init__(self, directory: pathlib.Path, purge: int) -> None:
        """Start a file in `directory`; events of step `purge` and later are void."""
        host, number = platform.node() or "localhost", _next_number(directory)
        self._writer = RecordWriter(str(directory / f"events.out.tfevents.{number}.{host}"))
        self._flushed = time.monotonic()
        self._write(file_version="brain.Event:2")
        self._write(step=purge, session_log=SessionLog(status=SessionLog.START))

    def add(self, name: str, value: float, step: int) -> None:
        """Append a number, and flush to disk if a minute has passed since the last flush."""
        self._write(step=step, summary=scalar(name, value))
        if time.monotonic() - self._flushed > _FLUSH_SECONDS:
            self.flush()

    def _write(self, **fields: Any) -> None:
        self._writer.write(Event(wall_time=time.time(), **fields).SerializeToString())

    def flush(self) -> None:
        """Flush everything to disk."""
        self._writer.flush()
        self._flushed = time.monotonic()

    def close(self) -> None:
        """Flush everything to disk and close."""
        self._writer.close()


def _next_number(directory: pathlib.Path) -> int:
    """Return the time in seconds, but more than in the name of any file of events there is.

    TensorBoard reads the files by their names, and the clock may have been set back.
    """
    names = [path.name.split(".")[3] for path in directory.glob("events.out.tfevents.*.*")]
    return max([int(time.time()), *(int(name) + 1 for name in names if name.isdecimal())])


def _json(value: Any) -> Any:
    """Replace NaN and infinity, which JSON does not have, by None."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read(directory: pathlib.Path) -> list[Line]:
    """Read metrics.jsonl of a run. An incomplete last line, which a kill leaves, is left out."""
    path = directory / "metrics.jsonl"
    if not path.exists():
        return []
    with regular_files.opened(path, LoraError) as file:
        numbered = regular_files.lines(file, path, LoraError)
        return [_read(line, f"{path}:{n}") for n, line in numbered if line.endswith(b"\n")]


def _read(line: bytes, where: str) -> Line:
    def damaged(message: str) -> LoraError:
        return LoraError(f"{message}; delete the damaged line")

    found = json_file.parse(line, where, damaged)
    if not isinstance(found, dict) or type(found.get("step")) is not int:
        raise LoraError(f"{where} is not a line of train.py's metrics.jsonl: it has no step")
    for name, value in found.items():
        number = value is None or (isinstance(value, int | float) and abs(value) < 1e300)
        if not (isinstance(value, str) if name == "split" else number):
            raise damaged(f"{where}: {name[:80]!r} is {str(value)[:80]!r}")
    return found
