"""Run the commands of an experiment, and record what each of them cost."""

from __future__ import annotations

import dataclasses
import datetime
import json
import os
import pathlib
import platform
import resource
import shlex
import subprocess
import sys
import time
from typing import Any

import jax

from experiments.paper.experiments import Task
from lora_jax.errors import LoraError
from lora_jax.training.directory import write_json
from measuring.timing import cores, processor

FILE = "cost.json"  # beside what the command leaves


@dataclasses.dataclass(frozen=True)
class Cost:
    """What a command took, over all times that it was started.

    arguments: what followed `python`.
    seconds, processor_seconds: from start to end, and of all cores together (NaN: not known).
    peak_bytes: the largest resident size.
    machine: processor, cores, versions. finished: whether it came to its end. day: of its end.
    """

    arguments: tuple[str, ...]
    seconds: float
    processor_seconds: float
    peak_bytes: int
    machine: str
    finished: bool
    day: str

    @property
    def command(self) -> str:
        """As it is typed."""
        return shlex.join(["python", *self.arguments])


def run(task: Task, root: pathlib.Path) -> bool:
    """Run a command that has not finished yet, with its output on the screen.

    Its cost is written beside what it leaves, and added to that of earlier attempts.

    Args:
      root: where it runs.

    Returns:
      Whether it ran; False: it had finished before.

    Raises:
      LoraError: it failed.
      KeyboardInterrupt: it was stopped; it goes on where it was when it is run again.
    """
    before = read(task.folder)
    if before is not None and before.arguments != task.arguments:
        before = None  # of another command, such as one with other settings
    if before is not None and before.finished:
        return False
    began = time.monotonic()
    status, usage = _wait(subprocess.Popen([sys.executable, *task.arguments], cwd=root))
    _write(
        task.folder,
        Cost(
            arguments=task.arguments,
            seconds=time.monotonic() - began + (before.seconds if before else 0.0),
            processor_seconds=usage.ru_utime
            + usage.ru_stime
            + (before.processor_seconds if before else 0.0),
            peak_bytes=max(
                usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024),
                before.peak_bytes if before else 0,
            ),
            machine=_machine(),
            finished=status == 0,
            day=datetime.date.today().isoformat(),
        ),
    )
    if status == 130:
        raise KeyboardInterrupt
    if status != 0:
        raise LoraError(
            f"`{shlex.join(['python', *task.arguments])}` ended with status {status}, and said "
            "why above. What is finished is kept: run the same command again when that is right"
        )
    return True


def _machine() -> str:
    """In a line; no device is asked, which would take its memory from the command."""
    versions = f"Python {platform.python_version()}, JAX {jax.__version__}"
    return f"{processor()}, {cores()} cores; {versions}"


def _wait(process: subprocess.Popen[bytes]) -> tuple[int, resource.struct_rusage]:
    """Its exit status, and what it used, however often Ctrl-C is pressed: it gets that too."""
    while True:
        try:
            _, ended, usage = os.wait4(process.pid, 0)
        except KeyboardInterrupt:
            continue
        process.returncode = os.waitstatus_to_exitcode(ended)
        return process.returncode, usage


def read(folder: pathlib.Path) -> Cost | None:
    """The cost that `run` has left in a folder.

    Raises:
      LoraError: it cannot be read.
    """
    file = folder / FILE
    if not file.is_file():
        return None
    try:
        return parsed(json.loads(file.read_text()))
    except (ValueError, TypeError, KeyError) as error:
        raise LoraError(
            f"{file} cannot be read: {error}; delete it, and its command is run again: what that "
            "has finished is kept"
        ) from error


def parsed(found: Any) -> Cost:
    """A cost's fields as values of JSON.

    Raises:
      TypeError, KeyError: they are something else.
    """
    return Cost(**{**found, "arguments": tuple(found["arguments"])})


def _write(folder: pathlib.Path, cost: Cost) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / FILE, dataclasses.asdict(cost))
