"""One run without its steps: metrics, notes, evaluations, exports and checkpoints.

Everything that a later step or the summary depends on is either in the `State` on the device or in
its `Notes`, and both go into every checkpoint. The caller takes the steps and holds the state;
it passes the state to the methods that write it.
"""

from __future__ import annotations

import dataclasses
import math
import pathlib
import time
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import numpy as np

from lora_jax.checkpoint.fingerprint import Fingerprint, check_base
from lora_jax.errors import LoraError, listed
from lora_jax.frozen import join
from lora_jax.layout import Layout
from lora_jax.paths import Tree
from lora_jax.training import continuation, directory, export, metrics, optimizer, processes
from lora_jax.training.checkpoints import Checkpoints
from lora_jax.training.config import Config
from lora_jax.training.config_json import changes, to_dict
from lora_jax.training.evaluation import evaluate
from lora_jax.training.mesh import Placement
from lora_jax.training.notes import Notes
from lora_jax.training.state import State, Trained
from lora_jax.training.workload import Batch, BatchIterator, Loss, Workload, check_select

Evaluated = Callable[[int, str, dict[str, float]], object]  # step, split, scores
BatchLoss = Callable[[Any], Loss]  # batch on the devices -> loss, with fixed trained parameters


class NonFiniteError(LoraError):
    """A loss or gradient is not finite; the message names the step."""


class Screen(Protocol):
    """An object that shows the lines of metrics.jsonl."""

    def step(self, line: dict[str, Any]) -> None: ...
    def evaluation(self, line: dict[str, Any], note: str = "") -> None: ...


@dataclasses.dataclass(frozen=True)
class Setup:
    """The values of a run that never change.

    frozen: the base parameters, with None in place of trained ones (`lora_jax.frozen.split`).
    fingerprint: that of `frozen`; adapters and checkpoints contain it.
    began: `time.monotonic()` when this process started the run.
    """

    config: Config
    workload: Workload
    place: Placement
    layout: Layout
    frozen: Tree
    fingerprint: Fingerprint
    path: pathlib.Path
    began: float


class Run:
    """A run in progress, without its steps."""

    def __init__(
        self,
        setup: Setup,
        data: BatchIterator,
        checkpoints: Checkpoints,
        evaluated: Evaluated | None = None,
    ) -> None:
        """Start at step 0; `evaluated` is called after each evaluation."""
        self.setup, self.data, self.checkpoints, self.notes = setup, data, checkpoints, Notes()
        self._callback = evaluated
        self.start, self.changed = 0, ""  # `changed` says what is new since the checkpoint
        self._skipped, self._earlier, self._length = 0, 0.0, 0
        self._hyper = optimizer.hyper(setup.config.optimizer, setup.config.steps)
        self._record: metrics.Record | None = None  # stays None in a process that does not write
        self._screen: Screen | None = None
        # The FLOPs and the seconds of all steps, at each of the last ones.
        self._recent = deque[tuple[float, float]](maxlen=11)
        self._written: list[dict[str, str]] = []  # the newest samples
        self._confusion: list[list[float]] | None = None  # of the newest evaluation

    def resume(self, state: State) -> State:
        """Return the state of the newest checkpoint, or `state` if there is no checkpoint."""
        if self.checkpoints.latest is not None:
            state = self._restore(state)
        self.start, self._skipped = int(state.step), int(state.skipped)
        return state

    def open(self, screen: Screen) -> None:
        """Open metrics.jsonl, cut to where the run continues, and show its lines on `screen`."""
        self._screen = screen
        if processes.first():
            config, path = self.setup.config, self.setup.path
            settings = to_dict(config)
            self._record = metrics.Record(path, self._length, self.start, config.log_to, settings)

    def close(self) -> None:
        if self._record is not None:
            self._record.close()

    @property
    def seconds(self) -> float:
        """Seconds spent on the run so far, by earlier processes too."""
        return self._earlier + time.monotonic() - self.setup.began

    def count(self, rows: Batch) -> int:
        """Add the units of a training batch to the notes, and return their number."""
        # Other processes hold as many rows as this one, and about as many units.
        units = round(self.setup.workload.size(rows) / self.setup.place.shard.share)
        self.notes.units += units
        return units

    def report(self, values: dict[str, Any]) -> None:
        """Write and show one step. Stop at a step that is not finite."""
        self.notes.flops += (done := values.pop("flops", 0.0))
        if done:
            self._recent.append((self.notes.flops, self.notes.seconds.get("train", 0.0)))
            flops, spent = np.subtract(self._recent[-1], self._recent[0]).tolist()
            speed = flops / spent if spent > 0 else math.nan
            values["mfu"] = speed / self.setup.place.peak
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
        self,
        step: int,
        split: str,
        batch_loss: BatchLoss,
        note: str = "",
        trained: Callable[[], Trained] | None = None,
    ) -> dict[str, float]:
        """Evaluate a split, and samples by `trained`; write, show and return the scores."""
        with self.notes.clock("evaluate"):
            workload, place = self.setup.workload, self.setup.place
            batches = workload.evaluation[split](place.shard)
            numbers, sums = evaluate(batch_loss, workload, place, batches)
            self._confusion = sums.get("confusion")
            if workload.samples is not None and trained is not None:
                own = trained()
                params = join(own["base"], self.setup.frozen)
                self._written, scores = workload.samples(self.setup.layout, params, own["adapters"])
                numbers |= scores
        return self._evaluated(step, split, numbers, note)

    def _evaluated(
        self, step: int, split: str, numbers: dict[str, float], note: str
    ) -> dict[str, float]:
        line = {"step": step, "split": split, **numbers}
        self._write(line)
        if self._screen is not None:
            self._screen.evaluation(line, note)
        if self._callback is not None:
            self._callback(step, split, numbers)
        return numbers

    def evaluate_before(
        self,
        batch_loss: BatchLoss,
        known: Mapping[str, dict[str, float]] | None = None,
        trained: Callable[[], Trained] | None = None,
    ) -> None:
        """Evaluate every split before the first step, and samples by `trained`."""
        for split in self.setup.workload.evaluation:
            note = "  (before)"
            if known is None:
                by = trained if split == "validation" else None
                self.notes.before[split] = self.evaluate(0, split, batch_loss, note, by)
            else:
                self.notes.before[split] = self._evaluated(0, split, known[split], note)
            if split == "validation":
                check_select(self.setup.workload.select, self.notes.before[split])
                self.notes.samples = [dict(sample) for sample in self._written]
                for sample in self.notes.samples:
                    sample["before"] = sample.pop("text")

    def validate(self, step: int, batch_loss: BatchLoss, trained: Callable[[], Trained]) -> None:
        """Evaluate on the validation split if there is one, and save the adapter if it is best.

        `trained` returns the parameters that `batch_loss` uses, in the run's own shapes.
        """
        if "validation" not in self.setup.workload.evaluation:
            return
        numbers = self.evaluate(step, "validation", batch_loss, trained=trained)
        self.notes.last = numbers
        # Process 0 decides for all: if they differed, one would save and wait for the others.
        better = processes.by_first(lambda: self._is_better(numbers))
        self.notes.without_best = 0 if better else self.notes.without_best + 1
        if better:
            self.notes.best = {"step": step, **numbers}
            for sample, new in zip(self.notes.samples, self._written, strict=True):
                sample["after"] = new["text"]
            self._keep_confusion("validation")
            self.export("best", trained())

    @property
    def is_over(self) -> bool:
        """Whether the run stops early: `patience` evaluations have brought no new best adapter."""
        patience = self.setup.config.patience
        return patience is not None and self.notes.without_best >= patience

    def evaluate_best(self, step: int, batch_loss: BatchLoss) -> dict[str, dict[str, float]]:
        """Evaluate the exported best adapter on the splits that did not pick it."""
        found = {}
        for split in self.setup.workload.evaluation:
            if split != "validation":
                found[split] = self.evaluate(step, split, batch_loss, "  (best adapter)")
                self._keep_confusion(split)
        return found

    def _keep_confusion(self, split: str) -> None:
        if self._confusion is not None:
            self.notes.confusion[split] = self._confusion

    def checkpoint(self, step: int, state: State) -> None:
        """Write a checkpoint in the background. Every step up to this one is known good."""
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
        setup, about = self.setup, self.setup.workload.about
        with self.notes.clock("checkpoint"):
            export.save(setup.path, name, setup.layout, trained, setup.fingerprint, about)

    def finish(self, summary: directory.Summary) -> None:
        """Write the summary, which marks the run as finished: it is never opened again.

        So the checkpoint and every line of the record must be on disk before.
        """
        self.checkpoints.wait()
        self._sync()
        processes.by_first(lambda: directory.finish(self.setup.path, summary))

    def best(self, like: Trained) -> Trained:
        """Return the exported best adapter, or the last one if no evaluation picked a best."""
        where = self.setup.place.trained(self.setup.layout, like["base"])
        return export.load(self.setup.path, "best" if self.notes.best else "last", where)

    def _restore(self, like: State) -> State:
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
        self.notes = Notes(**notes["run"])
        self._go_on(notes, int(state.step), int(state.skipped))
        self._earlier, self._length = notes["seconds"], notes["record_bytes"]
        return state

    def _go_on(self, notes: dict[str, Any], step: int, skipped: int) -> None:
        """Move the data to its position, and note which settings have changed since."""
        saved, config = notes["config"], self.setup.config
        batches = continuation.batches_before(saved, config, step + self.notes.shift)
        if batches is None:
            self.data.set_state(notes["data"])
        else:
            self.notes.shift = batches - step
            for _ in range(batches):
                next(self.data)
        if changed := changes(saved, config):
            self.notes.history.append({"step": step, "changed": changed})
            rates = continuation.rates(saved, config, step - skipped)
            self.changed = f"Changed after step {step:,}:\n{listed(changed, 20)}\n{rates}"
            if self.is_over:
                self.notes.without_best = 0

    def _write(self, line: dict[str, Any]) -> None:
        if self._record is not None:
            self._record.write(line)

    def _sync(self) -> int:
        """Flush metrics.jsonl to disk, and return its length in bytes."""
        return 0 if self._record is None else self._record.sync()

    def _nonfinite(self, values: dict[str, Any]) -> str:
        kept = self.checkpoints.latest
        said = "no checkpoint was written yet"
        if kept is not None:
            said = f"the checkpoint of step {kept} is kept"
        return (
            f"step {values['step']} is not finite: loss {values['loss']}, gradient norm "
            f"{values['gradient_norm']}. It changed nothing; {said}. Lower "
            "--optimizer.learning-rate, or skip such steps with --on-nonfinite skip"
        )

    def _is_better(self, numbers: dict[str, float]) -> bool:
        name = self.setup.workload.select
        check_select(name, numbers)
        sign, best = (1 if self.setup.workload.better == "higher" else -1), self.notes.best
        # The loss breaks ties: the first step with an accuracy of 1 is not the best for ever.
        rank = lambda scores: (sign * scores[name], -scores["loss"])  # noqa: E731
        found: tuple[float, float] = rank(numbers)
        if best is None:
            return found[0] > -math.inf  # false for a NaN
        return found > rank(best)
