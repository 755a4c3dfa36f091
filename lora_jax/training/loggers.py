"""Loggers: where the numbers of a run go, next to metrics.jsonl.

TensorBoard's events come with the package. Weights & Biases and MLflow are imported if `--log-to`
names them, and read their own environment variables (WANDB_PROJECT, MLFLOW_TRACKING_URI).
"""

from __future__ import annotations

import abc
import contextlib
import importlib
import logging
import os
import pathlib
import platform
import secrets
import time
from collections.abc import Callable, Mapping
from typing import Any

from flax.traverse_util import flatten_dict
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.record_writer import RecordWriter
from tensorboardX.summary import scalar

from lora_jax.errors import LoraError
from lora_jax.system import regular_files, whole_files

_log = logging.getLogger(__name__)

_FLUSH_SECONDS = 60
_AT_ONCE = 1000  # numbers that MLflow takes in one request
_KEPT = 20_000  # numbers that wait for a server that is away
_EXPERIMENT = "lora_jax"  # if the environment names no project


class Logger(abc.ABC):
    """An object that logs numbers by name and step. A step may come again after a kill."""

    @abc.abstractmethod
    def __init__(self, directory: pathlib.Path, step: int, settings: Mapping[str, Any]) -> None: ...
    @abc.abstractmethod
    def add(self, numbers: Mapping[str, float], step: int) -> None: ...
    def flush(self) -> None:  # noqa: B027
        """Write or send what is kept; W&B keeps its own files."""

    @abc.abstractmethod
    def close(self) -> None: ...


class Events(Logger):
    """A file of TensorBoard events that the calling thread writes.

    `tensorboardX.SummaryWriter` writes in another thread. On a full disk that thread dies, and the
    caller that adds the twelfth event afterwards waits for ever.
    """

    def __init__(self, directory: pathlib.Path, step: int, settings: Mapping[str, Any]) -> None:
        """Start a file in `directory`; events of steps after `step`, if it is not 0, are void."""
        host, number = platform.node() or "localhost", _next_number(directory)
        self._writer = RecordWriter(str(directory / f"events.out.tfevents.{number}.{host}"))
        self._flushed = time.monotonic()
        self._write(file_version="brain.Event:2")
        self._write(step=step + 1 if step else 0, session_log=SessionLog(status=SessionLog.START))

    def add(self, numbers: Mapping[str, float], step: int) -> None:
        """Append the numbers, and flush to disk if a minute has passed since the last flush."""
        for name, value in numbers.items():
            self._write(step=step, summary=scalar(name, value))
        if time.monotonic() - self._flushed > _FLUSH_SECONDS:
            self.flush()

    def _write(self, **fields: Any) -> None:
        self._writer.write(Event(wall_time=time.time(), **fields).SerializeToString())

    def flush(self) -> None:
        self._writer.flush()
        self._flushed = time.monotonic()

    def close(self) -> None:
        self._writer.close()


def _next_number(directory: pathlib.Path) -> int:
    """Return the time in seconds, but more than in the name of any file of events there is.

    TensorBoard reads the files by their names, and the clock may have been set back.
    """
    names = [path.name.split(".")[3] for path in directory.glob("events.out.tfevents.*.*")]
    return max([int(time.time()), *(int(name) + 1 for name in names if name.isdecimal())])


class WandB(Logger):
    """A run of Weights & Biases, which the run directory remembers by its id."""

    def __init__(self, directory: pathlib.Path, step: int, settings: Mapping[str, Any]) -> None:
        wandb: Any = importlib.import_module("wandb")
        own = _remembered(directory, "wandb", lambda: secrets.token_hex(4))
        project = None if "WANDB_PROJECT" in os.environ else _EXPERIMENT
        # A group has several runs in one process.
        kept = {"resume": "allow", "reinit": "create_new"}
        names = {"id": own, "name": directory.name, "project": project}
        try:
            self._run = wandb.init(config=dict(settings), **names, **kept)
        except wandb.errors.Error as error:
            raise LoraError(f"--log-to wandb: {error}; WANDB_MODE=offline needs no key") from error
        # W&B drops a step below the newest one; a run that goes on takes some steps again.
        self._run.define_metric("*", step_metric="step")

    def add(self, numbers: Mapping[str, float], step: int) -> None:
        """Log the numbers of a step; W&B sends them in a process of its own."""
        self._run.log({**numbers, "step": step})

    def close(self) -> None:
        """Wait until everything is sent."""
        self._run.finish()


class MLflow(Logger):
    """A run of MLflow, which the run directory remembers by its id."""

    def __init__(self, directory: pathlib.Path, step: int, settings: Mapping[str, Any]) -> None:
        mlflow: Any = importlib.import_module("mlflow")
        self._errors = (OSError, mlflow.exceptions.MlflowException)
        self._entities = mlflow.entities
        self._waiting: list[Any] = []

        def begin() -> str:
            name = os.environ.get("MLFLOW_EXPERIMENT_NAME", _EXPERIMENT)
            found = self._client.get_experiment_by_name(name)
            where = found.experiment_id if found else self._client.create_experiment(name)
            made: str = self._client.create_run(where, run_name=directory.name).info.run_id
            values = flatten_dict(dict(settings), sep=".").items()
            params = [self._entities.Param(name, str(value)[:500]) for name, value in values]
            self._client.log_batch(made, params=params[:100])
            return made

        try:
            self._client = mlflow.MlflowClient()
            self._id = _remembered(directory, "mlflow", begin)
        except self._errors as error:
            raise LoraError(f"--log-to mlflow (MLFLOW_TRACKING_URI): {error}") from error

    def add(self, numbers: Mapping[str, float], step: int) -> None:
        """Keep the numbers of a step until there are enough for a request."""
        now = int(time.time() * 1000)
        self._waiting += [self._entities.Metric(n, x, now, step) for n, x in numbers.items()]
        if len(self._waiting) > _AT_ONCE // 2:
            self.flush()

    def flush(self) -> None:
        try:
            while self._waiting:
                self._client.log_batch(self._id, metrics=self._waiting[:_AT_ONCE])
                del self._waiting[:_AT_ONCE]
        except self._errors as error:  # a server that is away must not end the run
            _log.warning("MLflow: %s; metrics.jsonl has every number", error)
            del self._waiting[:-_KEPT]

    def close(self) -> None:
        """Send what is kept, and end the run."""
        self.flush()
        with contextlib.suppress(*self._errors):  # `flush` has said it
            self._client.set_terminated(self._id)


def _remembered(directory: pathlib.Path, name: str, make: Callable[[], str]) -> str:
    """Return the id in `directory`/`name`.id, which `make` returns the first time."""
    file = directory / f"{name}.id"
    if not file.exists():
        whole_files.write(file, make().encode())
    return regular_files.read(file, LoraError).decode().strip()


# The names that `--log-to` takes.
KINDS: dict[str, type[Logger]] = {"tensorboard": Events, "wandb": WandB, "mlflow": MLflow}
