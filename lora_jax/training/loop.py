"""The training loop of one run; `train.py` calls its parts in order."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax

from lora_jax.sharding import gathered
from lora_jax.system.console import Console
from lora_jax.training import metrics, reference_cache
from lora_jax.training.evaluation import merged_difference
from lora_jax.training.open_run import BatchLoss, Run
from lora_jax.training.profiler import Profiler
from lora_jax.training.progress import Display
from lora_jax.training.state import State, Trained
from lora_jax.training.step import (
    Compiled,
    compilation,
    evaluation_step,
    reference_step,
    train_step,
)


class Loop:
    """The steps of one run. As a context manager it closes the metrics and the display."""

    def __init__(
        self, run: Run, state: State, tx: optax.GradientTransformation, console: Console
    ) -> None:
        """Start at `state`, or at the newest checkpoint if there is one."""
        setup = run.setup
        # The state is donated, and the reference is the model as the run began.
        refers = setup.workload.reference is not None
        self._start = jax.tree.map(jnp.copy, state.trained) if refers else None
        self.run, self.state, self._delayed = run, run.resume(state), metrics.DelayedMetrics()
        config, workload, layout = setup.config, setup.workload, setup.layout
        self._display = Display(console, config.steps, run.start, config.log_every, workload.unit)
        run.open(self._display)
        self._profiler = Profiler(setup.path, config.profile, self._display.say)
        rate = config.adaptation.dropout
        step = train_step(workload, layout, tx, config.on_nonfinite, config.accumulate, rate=rate)
        batch_loss, notes, place = evaluation_step(workload, layout), run.notes, setup.place
        shown = [
            partial(self._display.compiling, f"the {name}")
            for name in ("step", "evaluation", "reference")
        ]
        options = compilation(self.state, place)
        self._frozen = gathered(setup.frozen)
        self._step = Compiled(step, notes.compiling("train"), shown[0], **options)
        self._refer = Compiled(reference_step(workload, layout), notes.compiling("train"), shown[2])
        self._known = reference_cache.opened(setup, self._start, self._display.say)
        self._referred_flops = 0.0  # of the reference of the last batch
        self._batch_loss = Compiled(
            batch_loss, notes.compiling("evaluate"), shown[1], out_shardings=place.whole
        )

    def __enter__(self) -> Loop:
        self._display.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._profiler.close()
        self._display.__exit__(*error)
        if self._known is not None:
            self._known.write()
        self.run.close()

    def steps(self) -> range:
        """The steps still to take, if the run does not stop early. Steps are numbered from 1."""
        last = self.run.start if self.run.is_over else self.run.setup.config.steps
        return range(self.run.start + 1, last + 1)

    def take(self, step: int) -> None:
        """Send step `step` to the device, and report an earlier one."""
        run = self.run
        with run.notes.clock("train"):
            rows = next(run.data)
            batch = self._referred(run.setup.place.batch(rows))
            arguments = (self.state, self._frozen, batch)
            counted = {}
            if run.setup.place.peak:
                counted["flops"] = self._step.flops(*arguments) + self._referred_flops
            self._profiler.begin(step, self._step.knows(batch), self._settle)
            with jax.profiler.StepTraceAnnotation("train", step_num=step):
                self.state, values = self._step(*arguments)
            taken = {"step": step, "units": run.count(rows), **counted}
            for line in self._delayed.push(taken, values):
                run.report(line)
        self._profiler.end(step, self.state)

    def evaluate_before(self) -> None:
        trained = self.state.trained
        self.run.evaluate_before(self.batch_loss(trained), trained=lambda: trained)

    def validate(self, step: int) -> None:
        """Evaluate on the validation split if there is one, and save the adapter if it is best."""
        self.settle()
        trained = self.state.trained
        self.run.validate(step, self.batch_loss(trained), lambda: trained)

    def checkpoint(self, step: int) -> None:
        """Write a checkpoint in the background, after every step up to this one is known good."""
        self.settle()
        if self._known is not None:
            self._known.write()
        self.run.checkpoint(step, self.state)

    def batch_loss(self, trained: Trained) -> BatchLoss:
        return lambda batch: self._batch_loss(trained, self._frozen, self._referred(batch))

    def merged_difference(self, trained: Trained, batch: Any) -> float:
        """Return the largest |merged - unmerged| output on a placed batch."""
        setup = self.run.setup
        compare = merged_difference(setup.workload, setup.layout)
        with self._display.compiling("the comparison with merged weights"):
            found = jax.jit(compare, out_shardings=setup.place.whole)(trained, setup.frozen, batch)
            return float(found)

    def _referred(self, batch: Any) -> Any:
        """Return a batch with what the reference says of it, if the loss has a reference."""
        self._referred_flops = 0.0
        if self._start is None:
            return batch
        known = self._known
        own = self._second_pass(batch) if known is None else known.values(batch, self._second_pass)
        return {**batch, "reference": jax.device_put(own, batch["reference"].sharding)}

    def _second_pass(self, batch: Any) -> jax.Array:
        arguments = (self._start, self._frozen, batch)
        if self.run.setup.place.peak:
            self._referred_flops = self._refer.flops(*arguments)
        own: jax.Array = self._refer(*arguments)
        return own

    def settle(self) -> None:
        """Report every step taken so far. This waits for the device."""
        with self.run.notes.clock("train"):
            self._settle()

    def _settle(self) -> None:
        for line in self._delayed.flush():
            self.run.report(line)
