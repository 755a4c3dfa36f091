"""The metrics of a run: one JSON line per step and per evaluation, and TensorBoard events.

`metrics.jsonl` is the record; the events are a view of it. A checkpoint holds the length of the
file at its step, and a run that goes on cuts the file there first, so that no line is ever there
twice and none is missing.
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

from lora_jax import json_file
from lora_jax.errors import LoraError, cure

Line = dict[str, Any]
_FLUSH_SECONDS = 60


class DelayedMetrics:
    """Device values read a few steps after they were asked for, when they are there already.

    Reading the loss of the step just sent would wait for it, and the device would then wait for
    the host to send the next one.
    """

    def __init__(self, depth: int = 2) -> None:
        self._depth = depth
        self._pending: deque[tuple[Line, Mapping[str, jax.Array]]] = deque()

    def push(self, line: Line, values: Mapping[str, jax.Array]) -> Iterator[Line]:
        """Keep one step's host line and device values; give the lines that are due."""
        self._pending.append((line, values))
        yield from self._drain(self._depth)

    def flush(self) -> Iterator[Line]:
        """All that is pending, waiting for it."""
        yield from self._drain(0)

    def _drain(self, keep: int) -> Iterator[Line]:
        while len(self._pending) > keep:
            line, values = self._pending.popleft()
            read = {name: np.asarray(value).tolist() for name, value in values.items()}
            yield line | read


class Record:
    """`metrics.jsonl` and `events.*` in a run directory."""

    def __init__(self, directory: pathlib.Path, length: int = 0, step: int = 0) -> None:
        """Open the record, cut to `length` bytes; events after `step` are marked as purged."""
        self._directory = directory
        with self._named():
            self._file = (directory / "metrics.jsonl").open("ab")
            self._file.truncate(min(length, self._file.tell()))  # never longer than it is
            self._events = Events(directory, step + 1 if step else 0)

    def write(self, line: Line) -> None:
        """Append a line that holds "step", and for an evaluation "split"."""
        line = {name: _json(value) for name, value in line.items()}
        group = line.get("split", "train")
        with self._named():
            self._file.write(json.dumps(line).encode() + b"\n")
            for name, value in line.items():
                if name not in ("step", "split") and value is not None:
                    self._events.add(f"{group}/{name}", value, line["step"])

    def sync(self) -> int:
        """Put everything on disk; the length of the JSON lines in bytes."""
        with self._named():
            self._file.flush()
            os.fsync(self._file.fileno())
            self._events.flush()
            return self._file.tell()

    @contextlib.contextmanager
    def _named(self) -> Iterator[None]:
        """What the system says, with the path and the cure."""
        try:
            yield
        except OSError as error:
            raise LoraError(
                f"{self._directory}: metrics.jsonl or the events cannot be written: "
                f"{error.strerror or error}. {cure(error)}: it goes on from the last checkpoint"
            ) from error

    def close(self) -> None:
        """Put everything on disk and close, both files in any case."""
        try:
            self.sync()
        finally:
            for file in (self._file, self._events):
                with contextlib.suppress(OSError):  # `sync` has said it
                    file.close()


class Events:
    """A file of TensorBoard events, written by whoever adds to it.

    `tensorboardX.SummaryWriter` leaves that to a thread. On a full disk the thread dies with a
    traceback, and whoever adds the twelfth event after that waits for ever.
    """

    def __init__(self, directory: pathlib.Path, purge: int) -> None:
        """Begin a file in `directory`; the events of step `purge` and later ones are void."""
        host, number = platform.node() or "localhost", _next_number(directory)
        self._writer = RecordWriter(str(directory / f"events.out.tfevents.{number}.{host}"))
        self._flushed = time.monotonic()
        self._write(file_version="brain.Event:2")
        self._write(step=purge, session_log=SessionLog(status=SessionLog.START))

    def add(self, name: str, value: float, step: int) -> None:
        """Append a number; it is on disk within a minute or at the next event after that."""
        self._write(step=step, summary=scalar(name, value))
        if time.monotonic() - self._flushed > _FLUSH_SECONDS:
            self.flush()

    def _write(self, **fields: Any) -> None:
        self._writer.write(Event(wall_time=time.time(), **fields).SerializeToString())

    def flush(self) -> None:
        """Put everything on disk."""
        self._writer.flush()
        self._flushed = time.monotonic()

    def close(self) -> None:
        """Put everything on disk and close."""
        self._writer.close()


def _next_number(directory: pathlib.Path) -> int:
    """Return the time in seconds, but more than in the name of any file of events there is.

    TensorBoard reads the files by their names, and the clock may have been set back.
    """
    names = [path.name.split(".")[3] for path in directory.glob("events.out.tfevents.*.*")]
    return max([int(time.time()), *(int(name) + 1 for name in names if name.isdecimal())])


def _json(value: Any) -> Any:
    """JSON has no NaN and no infinity."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read(directory: pathlib.Path) -> list[Line]:
    """The lines of a run's record; a last line cut short by a kill is left out.

    Raises:
      LoraError: a line that is not JSON, or holds no step.
    """
    path = directory / "metrics.jsonl"
    if not path.is_file():
        return []
    with path.open("rb") as file:
        whole = ((n, line) for n, line in enumerate(file, 1) if line.endswith(b"\n"))
        return [_read(line, f"{path}:{number}") for number, line in whole]


def _read(line: bytes, where: str) -> Line:
    def damaged(message: str) -> LoraError:
        return LoraError(f"{message}; delete the line that is damaged")

    found = json_file.parse(line, where, damaged)
    if not isinstance(found, dict) or not isinstance(found.get("step"), int):
        raise LoraError(f"{where} is no record of train.py: a line without a step")
    return found
