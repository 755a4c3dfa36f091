"""A trace of a few training steps by JAX's profiler."""

from __future__ import annotations

import pathlib
from collections.abc import Callable
from typing import Any

import jax

from lora_jax.training import processes

FOLDER = "profile"  # in the run directory


class Profiler:
    """Traces `steps` steps in process 0, into `profile` of the run directory.

    The trace begins with the first step whose program is compiled already.
    """

    def __init__(self, path: pathlib.Path, steps: int, say: Callable[[str], None]) -> None:
        self._path, self._say = path / FOLDER, say
        self._left, self._first, self._last = steps if processes.first() else 0, 0, 0

    def begin(self, step: int, compiled: bool, settle: Callable[[], None]) -> None:
        """Start the trace before `step` if it is due; `settle` waits for the steps before."""
        if self._left and not self._first and compiled:
            settle()
            options = jax.profiler.ProfileOptions()
            options.python_tracer_level = 0  # each Python call would be an event
            jax.profiler.start_trace(self._path, profiler_options=options)
            self._first = step

    def end(self, step: int, state: Any) -> None:
        """Count a traced step, and write the trace after the last of them."""
        if self._first and self._left:
            self._last, self._left = step, self._left - 1
            if not self._left:
                jax.block_until_ready(state)
                self._write()

    def close(self) -> None:
        """Write the trace if the run ends within it."""
        if self._first and self._left:
            self._left = 0
            self._write()

    def _write(self) -> None:
        jax.profiler.stop_trace()
        written = sorted(self._path.rglob("*.trace.json.gz"))
        file = f"{written[-1]} in https://ui.perfetto.dev" if written else "it in Perfetto"
        self._say(
            f"steps {self._first} to {self._last} are traced in {self._path}: tensorboard --logdir "
            f"{self._path} (pip install tensorboard xprof), or open {file}"
        )
