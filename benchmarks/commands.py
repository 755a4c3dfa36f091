"""Run commands of `train.py` in other processes, time them, and compare their results."""

import dataclasses
import json
import os
import pathlib
import shlex
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

import lora_jax
from lora_jax.cli import train as command_line
from lora_jax.sweeps.config import GroupConfig, Member

ROOT = pathlib.Path(__file__).resolve().parents[1]


@dataclasses.dataclass(frozen=True)
class Spent:
    """The cost of a process: seconds from start to end, processor seconds, peak resident bytes."""

    seconds: float
    processor: float
    bytes: int


def train(*arguments: str, devices: int = 1) -> Spent:
    """Print and run `python train.py ...`. On a CPU it has this many simulated devices.

    Raises:
      SystemExit: the command failed; the message has the end of its output.
    """
    command = ["train.py", *arguments]
    print(f"JAX_NUM_CPU_DEVICES={devices} python", shlex.join(command), flush=True)
    return spent([sys.executable, *command], {"JAX_NUM_CPU_DEVICES": str(devices)})


def spent(command: Sequence[str], environment: Mapping[str, str]) -> Spent:
    """Run a command to its end, and return its cost.

    Args:
      command: the command.
      environment: variables that are added to the environment of this process.

    Raises:
      SystemExit: the command failed; the message has the end of its output.
    """
    log = pathlib.Path(os.environ.get("TMPDIR", "/tmp")) / f"benchmark-{os.getpid()}.log"
    begun = time.monotonic()
    with log.open("w") as file:
        process = subprocess.Popen(
            command, cwd=ROOT, env={**os.environ, **environment}, stdout=file, stderr=file
        )
        _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    seconds = time.monotonic() - begun
    if process.returncode != 0:
        sys.exit(f"exit status {process.returncode}:\n{log.read_text()[-2000:]}")
    log.unlink()
    unit = 1 if sys.platform == "darwin" else 1024
    return Spent(seconds, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * unit)


def members(config: str) -> tuple[Member, ...]:
    """Return the members of the group in a config file."""
    group = command_line.parse((), config, ROOT)[1]
    assert isinstance(group, GroupConfig)
    return group.members


def summary(run: pathlib.Path) -> dict[str, Any]:
    """Return the summary of a finished run."""
    found: dict[str, Any] = json.loads((run / "summary.json").read_text())
    return found


class Gap(NamedTuple):
    """The difference between the trained parameters of two runs, in their last adapters.

    norm: the norm of the difference, relative to the norm of all parameters.
    largest: the largest difference of a single number, relative to the largest of its array. Adam
      divides a gradient by its size, so if a gradient is zero except for rounding, rounding decides
      the direction in which a number moves.
    """

    norm: float
    largest: float

    def __str__(self) -> str:
        return f"{self.norm:.1e} ({self.largest:.1e})"


def gap(one: pathlib.Path, two: pathlib.Path) -> Gap:
    """Compare two run directories."""
    first, second = trained(one), trained(two)
    assert list(first) == list(second)
    pairs = [(x, second[name]) for name, x in first.items()]
    largest = max(np.abs(x - y).max() / np.abs(x).max() for x, y in pairs)
    squares = [(np.square(x - y).sum(), np.square(x).sum()) for x, y in pairs]
    apart, size = np.sum(squares, axis=0)
    return Gap(float(np.sqrt(apart / size)), float(largest))


def trained(run: pathlib.Path) -> dict[str, Any]:
    """Return the trained arrays of a run, in float64."""
    folder = run / "adapters/last"
    _, adapters, trainable = lora_jax.restore(folder)
    arrays = {f"{p} {n}": x for p, f in adapters.items() for n, x in f._asdict().items()}
    return {n: np.asarray(x, np.float64) for n, x in {**arrays, **trainable}.items()}


def load() -> str:
    """Return the load of the machine, for readers of the times."""
    return f"load average {' '.join(f'{x:.1f}' for x in os.getloadavg())}"
