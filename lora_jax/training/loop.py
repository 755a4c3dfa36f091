"""A run under way: it takes steps, evaluates, keeps the best adapter and writes checkpoints.

`train.py` says in which order. Everything that a later step or the summary depends on is either in
the `State` on the device or in the `Notes` here, and both go into every checkpoint.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import pathlib
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
import optax
from rich.console import Console

import lora_jax
from lora_jax.fingerprint import Fingerprint, check_base
from lora_jax.training import export, metrics, optimizer, processes
from lora_jax.training.checkpoints import Checkpoints
from lora_jax.training.config import Config, to_dict
from lora_jax.training.evaluation import evaluate
from lora_jax.training.mesh import Placement
from lora_jax.training.progress import Display
from lora_jax.training.step import State, compilation, evaluation_step, train_step
from lora_jax.training.workload import TrainIterator, Workload

Tree = Any  # a pytree


class NonFiniteError(lora_jax.LoraError):
    """A loss or gradient that is not finite; the message names the step."""


@dataclasses.dataclass(frozen=True)
class Setup:
    """What does not change while a run goes.

    place: where the arrays lie.
    frozen: the base parameters, with None where one is trained (`lora_jax.frozen.split`).
    fingerprint: of `frozen`; adapters and checkpoints carry it.
    path: of the run directory.
    began: `time.monotonic()` when this process began the run.
    """

    config: Config
    workload: Workload
    place: Placement
    layout: lora_jax.Layout
    tx: optax.GradientTransformation
    frozen: Tree
    fingerprint: Fingerprint
    path: pathlib.Path
    began: float


@dataclasses.dataclass
class Notes:
    """What a run remembers besides its arrays; JSON values only.

    before: split -> numbers of the model as it was at step 0.
    best: {"step", numbers of the validation split} of the best adapter so far.
    last: the numbers of the newest evaluation on the validation split.
    units: what `Workload.size` has counted so far.
    seconds: spent so far, by what on.
    """

    before: dict[str, dict[str, float]] = dataclasses.field(default_factory=dict)
    best: dict[str, float] | None = None
    last: dict[str, float] | None = None
    units: int = 0
    seconds: dict[str, float] = dataclasses.field(default_factory=dict)

    @contextlib.contextmanager
    def clock(self, name: str) -> Iterator[None]:
        """Count the time of the block as spent on `name`."""
        start = time.monotonic()
        try:
            yield
        finally:
            self.add(name, time.monotonic() - start)

    def add(self, name: str, seconds: float) -> None:
        """Count `seconds` as spent on `name`."""
        self.seconds[name] = self.seconds.get(name, 0.0) + seconds


class Compiled:
    """A jitted function whose first call for each batch shape is counted as compiling."""

    def __init__(
        self, function: Callable[..., Any], notes: Notes, within: str, **options: Any
    ) -> None:
        self._call = jax.jit(function, **options)
        self._notes, self._within, self._seen = notes, within, set[Any]()

    def __call__(self, *arguments: Any) -> Any:
        """The last argument is the batch; the time of a first call is taken off `within`."""
        shapes = tuple((name, value.shape) for name, value in sorted(arguments[-1].items()))
        if shapes in self._seen:
            return self._call(*arguments)
        self._seen.add(shapes)
        start = time.monotonic()
        out = self._call(*arguments)
        seconds = time.monotonic() - start
        self._notes.add("compile", seconds)
        self._notes.add(self._within, -seconds)
        return out


class Loop:
    """One run under way; a context manager that closes the record and the display."""

    def __init__(
        self,
        setup: Setup,
        state: State,
        data: TrainIterator,
        checkpoints: Checkpoints,
        console: Console,
    ) -> None:
        """Begin at `state`, or at the newest checkpoint if there is one."""
        self.setup, self.state, self.notes = setup, state, Notes()
        self._data, self._checkpoints = data, checkpoints
        self._late, length = metrics.Late(), 0
        self._earlier = 0.0
        if checkpoints.latest is not None:
            length = self._restore()
        self.start = int(self.state.step)
        config, workload = setup.config, setup.workload
        self._record = (
            metrics.Record(setup.path, length, self.start)
            if processes.first()
            else metrics.Unwritten()
        )
        self._display = Display(console, config.steps, self.start, config.log_every, workload.unit)
        self._hyper = optimizer.hyper(config.optimizer, config.steps)
        layout, whole = setup.layout, setup.place.whole
        step = train_step(workload, layout, setup.tx, config.on_nonfinite, config.accumulate)
        judge = evaluation_step(workload, layout)
        self._step = Compiled(step, self.notes, "train", **compilation(self.state, setup.place))
        self._judge = Compiled(judge, self.notes, "evaluate", out_shardings=whole)
        self._skipped = int(self.state.skipped)

    def __enter__(self) -> Loop:
        self._display.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._display.__exit__(*error)
        self._record.close()

    @property
    def seconds(self) -> float:
        """Spent on the run so far, by the processes before this one too."""
        return self._earlier + time.monotonic() - self.setup.began

    def steps(self) -> range:
        """The steps still to take; step n is the n-th, counted from one."""
        return range(self.start + 1, self.setup.config.steps + 1)

    def take(self, step: int) -> None:
        """Send step `step` to the device, and report an earlier one."""
        with self.notes.clock("train"):
            rows = next(self._data)
            batch = self.setup.place.batch(rows)
            self.state, values = self._step(self.state, self.setup.frozen, batch)
            # Other processes hold as many rows, and about as many units, as this one.
            units = round(self.setup.workload.size(rows) / self.setup.place.shard.share)
            self.notes.units += units
            for line in self._late.push({"step": step, "units": units}, values):
                self._report(line)

    def evaluate(self, step: int, split: str, *, note: str = "") -> dict[str, float]:
        """The numbers of the present parameters on `split`, written and shown."""
        self._settle()
        return self._evaluate(step, split, self.state.trained, note)

    def judge_best(self, step: int, trained: Any) -> dict[str, dict[str, float]]:
        """The numbers of the exported best adapter on the splits that did not pick it."""
        splits = [name for name in self.setup.workload.evaluation if name != "validation"]
        note = "  (best adapter)"
        return {split: self._evaluate(step, split, trained, note) for split in splits}

    def evaluate_before(self) -> None:
        """The numbers of the model as it is, before the first step, on every split."""
        for split in self.setup.workload.evaluation:
            self.notes.before[split] = self.evaluate(0, split, note="  (before)")

    def validate(self, step: int) -> None:
        """Evaluate on the validation split if there is one, and keep the adapter if it is best."""
        if "validation" not in self.setup.workload.evaluation:
            return
        numbers = self.evaluate(step, "validation")
        self.notes.last = numbers
        # One decision for all: where it differed, one process would save and wait for the others.
        if processes.by_first(lambda: self._is_better(numbers)):
            self.notes.best = {"step": step, **numbers}
            self._export("best")

    def checkpoint(self, step: int) -> None:
        """Write a checkpoint in the background, once every step up to this one is known good."""
        self._settle()
        with self.notes.clock("checkpoint"):
            notes = {
                "run": dataclasses.asdict(self.notes),
                "seconds": self.seconds,
                "data": processes.union(processes.gather(self._data.get_state())),
                "record_bytes": self._record.sync(),
                "config": to_dict(self.setup.config),
                "layout": self.setup.layout.to_json(),
                "fingerprint": self.setup.fingerprint,
            }
            self._checkpoints.save(step, self.state, notes)

    def finish(self) -> None:
        """Wait for the last step and keep the last adapter."""
        self._settle()
        self._export("last")

    def _export(self, name: str) -> None:
        setup = self.setup
        trained, about = self.state.trained, setup.workload.about
        export.save(setup.path, name, setup.layout, trained, setup.fingerprint, about)

    def _restore(self) -> int:
        """Go to the newest checkpoint; the length of the record there."""
        self.state, notes = self._checkpoints.restore(self.state)
        if notes["layout"] != self.setup.layout.to_json():
            raise lora_jax.LoraError(
                f"the checkpoint in {self.setup.path} was written for another layout:\n"
                f"{lora_jax.Layout.from_json(notes['layout'])}\nthis run resolves\n"
                f"{self.setup.layout}\nstart afresh with --fresh"
            )
        allow = self.setup.config.allow_other_base
        check_base(notes["fingerprint"], self.setup.fingerprint, allow, str(self.setup.path))
        self._data.set_state(notes["data"])
        self.notes = Notes(**notes["run"])
        self._earlier = notes["seconds"]
        return notes["record_bytes"]

    def _settle(self) -> None:
        """Report every step taken so far, which waits for the device."""
        with self.notes.clock("train"):
            for line in self._late.flush():
                self._report(line)

    def _report(self, values: dict[str, Any]) -> None:
        """Write and show one step; stop at one that is not finite."""
        applied = values["step"] - 1 - self._skipped
        self._skipped += not values["finite"]
        rate = float(optimizer.rate(self._hyper, applied, np))
        line = {"learning_rate": rate, **values, "skipped": self._skipped}
        self._record.write({name: _json(value) for name, value in line.items()})
        if not values["finite"] and self.setup.config.on_nonfinite == "stop":
            self._record.sync()
            raise NonFiniteError(self._nonfinite(values))
        self._display.step(line)

    def _nonfinite(self, values: dict[str, Any]) -> str:
        kept = self._checkpoints.latest
        kept_text = "no checkpoint was written yet" if kept is None else f"step {kept} is kept"
        return (
            f"step {values['step']} is not finite: loss {values['loss']}, gradient norm "
            f"{values['gradient_norm']}. It changed nothing; as to checkpoints, {kept_text}. Lower "
            "--optimizer.learning-rate, or go on past such steps with --on-nonfinite skip"
        )

    def _evaluate(self, step: int, split: str, trained: Any, note: str) -> dict[str, float]:
        with self.notes.clock("evaluate"):
            workload, place = self.setup.workload, self.setup.place
            batches = workload.evaluation[split](place.shard)
            numbers = evaluate(self._judge, workload, place, batches, trained, self.setup.frozen)
        line = {"step": step, "split": split, **numbers}
        self._record.write({name: _json(value) for name, value in line.items()})
        self._display.evaluation(line, note)
        return numbers

    def _is_better(self, numbers: dict[str, float]) -> bool:
        name = self.setup.workload.select
        if name not in numbers:
            raise lora_jax.LoraError(
                f"the workload picks the best adapter by {name!r}, but an evaluation gives "
                f"{list(numbers)}; set Workload.select to one of them"
            )
        sign = 1 if self.setup.workload.better == "higher" else -1
        best = -math.inf if self.notes.best is None else sign * self.notes.best[name]
        return sign * numbers[name] > best  # never true of a NaN


def _json(value: Any) -> Any:
    """JSON has no NaN and no infinity."""
    return None if isinstance(value, float) and not math.isfinite(value) else value
