"""Commands of `train.py`, timed from outside, and what they leave compared."""

import dataclasses
import json
import os
import pathlib
import shlex
import subprocess
import sys
import time
from typing import Any

import numpy as np

import lora_jax
from lora_jax.checkpoint import restore_base
from lora_jax.training import command
from lora_jax.training.group.config import GroupConfig, Member

ROOT = pathlib.Path(__file__).resolve().parents[1]


@dataclasses.dataclass(frozen=True)
class Spent:
    """What a process took: seconds from its start to its end, and its largest resident size."""

    seconds: float
    processor: float
    bytes: int


def train(*arguments: str) -> Spent:
    """Print and run `python train.py ...` to its end.

    Raises:
      SystemExit: it failed; its last words are said.
    """
    command = ["train.py", *arguments]
    print("python", shlex.join(command), flush=True)
    log = pathlib.Path(os.environ.get("TMPDIR", "/tmp")) / f"benchmark-{os.getpid()}.log"
    begun = time.monotonic()
    with log.open("w") as file:
        process = subprocess.Popen([sys.executable, *command], cwd=ROOT, stdout=file, stderr=file)
        _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    seconds = time.monotonic() - begun
    if process.returncode != 0:
        sys.exit(f"exit status {process.returncode}:\n{log.read_text()[-2000:]}")
    log.unlink()
    unit = 1 if sys.platform == "darwin" else 1024
    return Spent(seconds, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * unit)


def members(config: str) -> tuple[Member, ...]:
    """Those of the group in a config file."""
    group = command.parse((), config, ROOT)[1]
    assert isinstance(group, GroupConfig)
    return group.members


def summary(run: pathlib.Path) -> dict[str, Any]:
    """What a finished run came to."""
    found: dict[str, Any] = json.loads((run / "summary.json").read_text())
    return found


def difference(one: pathlib.Path, two: pathlib.Path) -> float:
    """Largest difference between what two runs trained, relative to the largest number.

    Of the last adapters and the parameters trained beside them, array by array.
    """
    trained = []
    for run in (one, two):
        folder = run / "adapters/last"
        adapters = lora_jax.restore(folder)[1]
        arrays = {f"{p} {n}": x for p, f in adapters.items() for n, x in f._asdict().items()}
        trained.append({n: np.asarray(x) for n, x in (arrays | restore_base(folder)).items()})
    assert list(trained[0]) == list(trained[1])
    gaps = [np.abs(x - trained[1][n]).max() / np.abs(x).max() for n, x in trained[0].items()]
    return float(max(gaps))


def load() -> str:
    """The machine's load, for whoever reads the times."""
    return f"load average {' '.join(f'{x:.1f}' for x in os.getloadavg())}"
