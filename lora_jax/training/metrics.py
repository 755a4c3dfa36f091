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
from collections import deque
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
import tensorboardX

from lora_jax import json_file
from lora_jax.errors import LoraError

Line = dict[str, Any]


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
        self._file = (directory / "metrics.jsonl").open("ab")
        self._file.truncate(min(length, self._file.tell()))  # never longer than it is
        purge = step + 1 if step else 0
        self._events = tensorboardX.SummaryWriter(str(directory), purge_step=purge)

    def write(self, line: Line) -> None:
        """Append a line that holds "step", and for an evaluation "split"."""
        line = {name: _json(value) for name, value in line.items()}
        with self._named():
            self._file.write(json.dumps(line).encode() + b"\n")
        group = line.get("split", "train")
        for name, value in line.items():
            if name not in ("step", "split") and value is not None:
                self._events.add_scalar(f"{group}/{name}", value, line["step"])

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
                f"{self._file.name} cannot be written: {error.strerror}. Make room, and start the "
                "same command again: it goes on from the last checkpoint"
            ) from error

    def close(self) -> None:
        """Put everything on disk and close."""
        self.sync()
        self._file.close()
        self._events.close()


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
