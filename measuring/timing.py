"""Time functions in turns, and describe the machine that they ran on."""

from __future__ import annotations

import dataclasses
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

import flax
import jax


@dataclasses.dataclass(frozen=True)
class Machine:
    """A machine on which something was measured.

    processor: the processor of the host.
    cores: the number of cores that this process may use.
    backend: JAX's backend, such as cpu.
    device: the kind of JAX's first device.
    python, jax, flax: their versions.
    """

    processor: str
    cores: int
    backend: str
    device: str
    python: str
    jax: str
    flax: str

    def line(self, *more: str) -> str:
        """Describe the machine in a line. `more` has further versions."""
        versions = [f"Python {self.python}", f"JAX {self.jax}", f"Flax {self.flax}", *more]
        backend = self.backend if self.backend == "cpu" else f"{self.backend} ({self.device})"
        return f"{self.processor}, {self.cores} cores, {backend}; {', '.join(versions)}"


def machine() -> Machine:
    """Return the description of this machine."""
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
    """Describe this machine in a line: processor, cores that this process may use, versions."""
    return machine().line(*more)


def cores() -> int:
    """Return the number of cores that this process may use."""
    usable = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count()
    return usable or 1


def processor() -> str:
    """Return the model name of the CPU."""
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
    """Measure the seconds of each run, after one run of each that is not counted.

    Every repeat runs all functions, so that a busy moment of the machine slows all of them.

    Args:
      runs: name -> the function to run; its result is waited for.
      repeats: the number of times that are returned for each.
      ran: called after every run, counted or not.

    Returns:
      Name -> the seconds of each run.
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
    """Return the median seconds of each run, as `timings` takes them."""
    return {name: statistics.median(s) for name, s in timings(runs, repeats).items()}
