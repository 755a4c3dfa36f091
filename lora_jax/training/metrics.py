"""The metrics of a run: one JSON line per step and per evaluation, and the same in its loggers.

`metrics.jsonl` is the source, the loggers (`lora_jax.training.loggers`) have copies. A checkpoint
holds the length of the file at its step. A run that continues truncates the file to that length
first, so that no line is missing and none is there twice.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import pathlib
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from lora_jax.errors import LoraError, cure
from lora_jax.system import json_file, regular_files, whole_files
from lora_jax.training import loggers

Line = dict[str, Any]


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
        yield from self.flush(self._depth)

    def flush(self, keep: int = 0) -> Iterator[Line]:
        """Wait for all pending lines but the last `keep`, and yield them."""
        while len(self._pending) > keep:
            line, values = self._pending.popleft()
            read = {name: np.asarray(value).tolist() for name, value in values.items()}
            yield line | read


class Record:
    """`metrics.jsonl` in a run directory, and its loggers."""

    def __init__(
        self,
        directory: pathlib.Path,
        length: int = 0,
        step: int = 0,
        log_to: Sequence[str] = ("tensorboard",),
        settings: Mapping[str, Any] | None = None,
    ) -> None:
        """Open the files; cut metrics.jsonl to `length` bytes, and purge events after `step`.

        `settings` are the config's, for loggers that show them.
        """
        self._directory = directory
        with self._named():
            self._file = whole_files.append(directory / "metrics.jsonl")
            self._file.truncate(min(length, self._file.tell()))  # truncate could also extend it
            make = (loggers.KINDS[name] for name in log_to)
            self._loggers = [kind(directory, step, settings or {}) for kind in make]

    def write(self, line: Line) -> None:
        """Append a line. It has a "step" and, for an evaluation, a "split"."""
        line = {name: _json(value) for name, value in line.items()}
        group = line.get("split", "train")
        with self._named():
            self._file.write(json.dumps(line).encode() + b"\n")
            known = {n: x for n, x in line.items() if n not in ("step", "split") and x is not None}
            for logger in self._loggers:
                logger.add({f"{group}/{name}": x for name, x in known.items()}, line["step"])

    def sync(self) -> int:
        """Flush everything to disk, and return the length of metrics.jsonl in bytes."""
        with self._named():
            self._file.flush()
            os.fsync(self._file.fileno())
            for logger in self._loggers:
                logger.flush()
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
            for close in (self._file.close, *(logger.close for logger in self._loggers)):
                with contextlib.suppress(OSError):  # `sync` has raised it already
                    close()


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
