"""A run without its steps: metrics, notes, evaluations, exports and checkpoints.

Everything that a later step or the summary depends on is either in the `State` on the device or in
the `Notes` here, and both go into every checkpoint. Who takes the steps holds the state, and hands
it over where it is to be written.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import pathlib
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol

import numpy as np

from lora_jax.checkpoint.fingerprint import Fingerprint, check_base
from lora_jax.errors import LoraError
from lora_jax.layout import Layout
from lora_jax.training import export, metrics, optimizer, processes
from lora_jax.training.checkpoints import Checkpoints
from lora_jax.training.config import Config
from lora_jax.training.config_json import to_dict
from lora_jax.training.evaluation import evaluate
from lora_jax.training.mesh import Placement
from lora_jax.training.state import State, Trained
from lora_jax.training.workload import Batch, BatchIterator, Loss, Workload, check_select

Tree = Any  # a pytree
BatchLoss = Callable[[Any], Loss]  # of a batch on the devices, with some trained parameters


class NonFiniteError(LoraError):
    """A loss or gradient that is not finite; the message names the step."""


class Screen(Protocol):
    """Who shows the lines of the record."""

    def step(self, line: dict[str, Any]) -> None: ...
    def evaluation(self, line: dict[str, Any], note: str = "") -> None: ...


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
    layout: Layout
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

    def compiling(self, within: str) -> Callable[[float], None]:
        """Tells the notes of seconds that were spent on compiling, and not on `within`."""

        def report(seconds: float) -> None:
            self.add("compile", seconds)
            self.add(within, -seconds)

        return report

    def add(self, name: str, seconds: float) -> None:
        """Count `seconds` as spent on `name`."""
        self.seconds[name] = self.seconds.get(name, 0.0) + seconds


class Run:
    """One run under way, but for its steps."""

    def __init__(self, setup: Setup, data: BatchIterator, checkpoints: Checkpoints) -> None:
        self.setup, self.data, self.checkpoints, self.notes = setup, data, checkpoints, Notes()
        self.start = 0
        self._skipped, self._earlier, self._length = 0, 0.0, 0
        self._hyper = optimizer.hyper(setup.config.optimizer, setup.config.steps)
        self._record: metrics.Record | None = None  # of a process that does not write
        self._screen: Screen | None = None

    def begin(self, state: State) -> State:
        """The state to go on from: the newest checkpoint's, or `state` where there is none.

        Args:
          state: before the first step; where there is a checkpoint, its shapes and shardings do.
        """
        if self.checkpoints.latest is not None:
            state = self._restore(state)
        self.start, self._skipped = int(state.step), int(state.skipped)
        return state

    def open(self, screen: Screen) -> None:
        """Open the record, cut to where the run goes on, and show its lines on `screen`."""
        self._screen = screen
        if processes.first():
            self._record = metrics.Record(self.setup.path, self._length, self.start)

    def close(self) -> None:
        """Put the record on disk and close it."""
        if self._record is not None:
            self._record.close()

    @property
    def seconds(self) -> float:
        """Spent on the run so far, by the processes before this one too."""
        return self._earlier + time.monotonic() - self.setup.began

    def count(self, rows: Batch) -> int:
        """Note the units of a training batch; how many they are."""
        # Other processes hold as many rows, and about as many units, as this one.
        units = round(self.setup.workload.size(rows) / self.setup.place.shard.share)
        self.notes.units += units
        return units

    def report(self, values: dict[str, Any]) -> None:
        """Write and show one step; stop at one that is not finite.

        Args:
          values: "step", "units", and the step's metrics, on the host.

        Raises:
          NonFiniteError: the step is not finite, and the config says to stop there.
        """
        applied = values["step"] - 1 - self._skipped
        self._skipped += not values["finite"]
        rate = float(optimizer.rate(self._hyper, applied, np))
        line = {"learning_rate": rate, **values, "skipped": self._skipped}
        self._write(line)
        if not values["finite"] and self.setup.config.on_nonfinite == "stop":
            self._sync()
            raise NonFiniteError(self._nonfinite(values))
        if self._screen is not None:
            self._screen.step(line)

    def evaluate(
        self, step: int, split: str, batch_loss: BatchLoss, note: str = ""
    ) -> dict[str, float]:
        """Return the numbers on `split`, after writing and showing them."""
        with self.notes.clock("evaluate"):
            workload, place = self.setup.workload, self.setup.place
            batches = workload.evaluation[split](place.shard)
            numbers = evaluate(batch_loss, workload, place, batches)
        return self._evaluated(step, split, numbers, note)

    def _evaluated(
        self, step: int, split: str, numbers: dict[str, float], note: str
    ) -> dict[str, float]:
        line = {"step": step, "split": split, **numbers}
        self._write(line)
        if self._screen is not None:
            self._screen.evaluation(line, note)
        return numbers

    def evaluate_before(
        self, batch_loss: BatchLoss, known: Mapping[str, dict[str, float]] | None = None
    ) -> None:
        """The numbers of the model as it is, before the first step, on every split.

        Args:
          known: the numbers, where they are known without an evaluation.
        """
        for split in self.setup.workload.evaluation:
            note = "  (before)"
            if known is None:
                self.notes.before[split] = self.evaluate(0, split, batch_loss, note)
            else:
                self.notes.before[split] = self._evaluated(0, split, known[split], note)
            if split == "validation":
                check_select(self.setup.workload.select, self.notes.before[split])

    def validate(self, step: int, batch_loss: BatchLoss, trained: Callable[[], Trained]) -> None:
        """Evaluate on the validation split if there is one, and keep the adapter if it is best.

        Args:
          trained: gives the parameters that `batch_loss` uses, in the run's own shapes.
        """
        if "validation" not in self.setup.workload.evaluation:
            return
        numbers = self.evaluate(step, "validation", batch_loss)
        self.notes.last = numbers
        # One decision for all: where it differed, one process would save and wait for the others.
        if processes.by_first(lambda: self._is_better(numbers)):
            self.notes.best = {"step": step, **numbers}
            self.export("best", trained())

    def evaluate_best(self, step: int, batch_loss: BatchLoss) -> dict[str, dict[str, float]]:
        """The numbers of the exported best adapter on the splits that did not pick it."""
        splits = [name for name in self.setup.workload.evaluation if name != "validation"]
        return {
            split: self.evaluate(step, split, batch_loss, "  (best adapter)") for split in splits
        }

    def checkpoint(self, step: int, state: State) -> None:
        """Write a checkpoint in the background; every step up to this one is known good."""
        with self.notes.clock("checkpoint"):
            notes = {
                "run": dataclasses.asdict(self.notes),
                "seconds": self.seconds,
                "data": processes.union(processes.gather(self.data.get_state())),
                "record_bytes": self._sync(),
                "config": to_dict(self.setup.config),
                "layout": self.setup.layout.to_json(),
                "fingerprint": self.setup.fingerprint,
            }
            self.checkpoints.save(step, state, notes)

    def export(self, name: str, trained: Trained) -> None:
        """Write the adapter alone, as `name`."""
        setup = self.setup
        about = setup.workload.about
        export.save(setup.path, name, setup.layout, trained, setup.fingerprint, about)

    def best(self, like: Trained) -> Trained:
        """The best adapter as it was exported; the last one where nothing picked a best.

        Args:
          like: trained parameters of the run, which say where they are to lie.
        """
        where = self.setup.place.trained(self.setup.layout, like["base"])
        return export.load(self.setup.path, "best" if self.notes.best else "last", where)

    def _restore(self, like: State) -> State:
        """Go to the newest checkpoint."""
        state, notes = self.checkpoints.restore(like)
        saved = Layout.from_json(notes["layout"])
        if set(saved.targets) != set(self.setup.layout.targets):  # in any order
            raise LoraError(
                f"the checkpoint in {self.setup.path} was written for another layout:\n"
                f"{saved}\nthis run resolves\n"
                f"{self.setup.layout}\nstart afresh with --fresh"
            )
        allow = self.setup.config.allow_other_base
        check_base(notes["fingerprint"], self.setup.fingerprint, allow, str(self.setup.path))
        self.data.set_state(notes["data"])
        self.notes = Notes(**notes["run"])
        self._earlier, self._length = notes["seconds"], notes["record_bytes"]
        return state

    def _write(self, line: dict[str, Any]) -> None:
        if self._record is not None:
            self._record.write(line)

    def _sync(self) -> int:
        """Put the record on disk; its length in bytes."""
        return 0 if self._record is None else self._record.sync()

    def _nonfinite(self, values: dict[str, Any]) -> str:
        kept = self.checkpoints.latest
        kept_text = "no checkpoint was written yet" if kept is None else f"step {kept} is kept"
        return (
            f"step {values['step']} is not finite: loss {values['loss']}, gradient norm "
            f"{values['gradient_norm']}. It changed nothing; as to checkpoints, {kept_text}. Lower "
            "--optimizer.learning-rate, or go on past such steps with --on-nonfinite skip"
        )

    def _is_better(self, numbers: dict[str, float]) -> bool:
        name = self.setup.workload.select
        check_select(name, numbers)
        sign = 1 if self.setup.workload.better == "higher" else -1
        best = -math.inf if self.notes.best is None else sign * self.notes.best[name]
        return sign * numbers[name] > best  # never true of a NaN
