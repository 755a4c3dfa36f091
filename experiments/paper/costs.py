"""Run the commands of an experiment, and record the cost of each."""

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
from lora_jax.system.whole_files import write_json
from measuring.timing import cores, processor

FILE = "cost.json"  # in the folder of the command


@dataclasses.dataclass(frozen=True)
class Cost:
    """The cost of a command, added up over all times that it was started.

    arguments: the arguments after `python`.
    seconds: the time from start to end.
    processor_seconds: the processor time of all cores together; NaN if it is not known.
    peak_bytes: the peak resident memory.
    machine: processor, cores and versions.
    finished: whether it has finished.
    day: the day on which it ended.
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
        """The command as it is typed."""
        return shlex.join(["python", *self.arguments])


def run(task: Task, root: pathlib.Path) -> bool:
    """Run a command unless it has finished before, with its output on the screen.

    Its cost is written to its folder, and the cost of earlier attempts is added.
    """
    before = read(task.folder)
    if before is not None and before.arguments != task.arguments:
        before = None  # the cost of another command, such as one with other settings
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
            f"`{shlex.join(['python', *task.arguments])}` ended with status {status}; its message "
            "is above. Correct the cause and run the same command again: finished runs are kept"
        )
    return True


def _machine() -> str:
    """Describe the machine in a line. No device is opened, because it would take memory."""
    versions = f"Python {platform.python_version()}, JAX {jax.__version__}"
    return f"{processor()}, {cores()} cores; {versions}"


def _wait(process: subprocess.Popen[bytes]) -> tuple[int, resource.struct_rusage]:
    """Return the exit status and the usage. Ctrl-C goes to the child and does not end the wait."""
    while True:
        try:
            _, ended, usage = os.wait4(process.pid, 0)
        except KeyboardInterrupt:
            continue
        process.returncode = os.waitstatus_to_exitcode(ended)
        return process.returncode, usage


def read(folder: pathlib.Path) -> Cost | None:
    """Read the cost that `run` has written to a folder; None if there is none."""
    file = folder / FILE
    if not file.is_file():
        return None
    try:
        return parsed(json.loads(file.read_text()))
    except (ValueError, TypeError, KeyError) as error:
        raise LoraError(
            f"{file} cannot be read: {error}; delete it, and its command is run again: the runs "
            "that it has finished are kept"
        ) from error


def parsed(found: Any) -> Cost:
    """Read a cost from JSON values."""
    return Cost(**{**found, "arguments": tuple(found["arguments"])})


def _write(folder: pathlib.Path, cost: Cost) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / FILE, dataclasses.asdict(cost))
