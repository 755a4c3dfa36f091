"""One run, from its config to its summary. `train.py` and `lora_jax.training.run` call this.

It reads top to bottom: the model and the data, the trained parameters, the steps, the results.
"""

from __future__ import annotations

import pathlib
import time
from typing import NamedTuple

import jax
import optax

from lora_jax.checkpoint.fingerprint import fingerprint
from lora_jax.system.console import Console, say
from lora_jax.training import (
    config_file,
    directory,
    initial,
    mesh,
    optimizer,
    processes,
    step,
    summary,
)
from lora_jax.training.checkpoints import Checkpoints
from lora_jax.training.config import Config
from lora_jax.training.loop import Loop
from lora_jax.training.open_run import Evaluated, Run, Setup
from lora_jax.training.state import State
from lora_jax.training.workload import Batch, BatchIterator


class Opened(NamedTuple):
    """A run before its first step; `earlier` is a text about the adapter that it begins with."""

    setup: Setup
    data: BatchIterator
    example: Batch
    state: State
    tx: optax.GradientTransformation
    earlier: str


def run(
    name: str, config: Config, console: Console, evaluated: Evaluated | None = None
) -> summary.Summary:
    """Train a run in its own directory, unless it is finished, and return its summary."""
    with directory.enter(name, config) as path:
        finished = processes.by_first(lambda: directory.summary(path))
        if finished is not None:
            say(console, f"{path} is finished; --fresh deletes it and starts again.")
            return finished
        config = directory.dated(path, config)
        grid = mesh.make(config.mesh)
        with jax.set_mesh(grid):
            return train(config, grid, path, console, evaluated)


def opened(config: Config, grid: jax.sharding.Mesh, path: pathlib.Path, console: Console) -> Opened:
    """Load the model and the data, place them, and make the state before the first step."""
    began = time.monotonic()
    say(console, mesh.described(grid))

    # ---- the model and the data, and their placement
    workload = config_file.workload_of(config)
    data = workload.train(mesh.shard_of(grid))
    position = data.get_state()
    example = next(data)
    data.set_state(position)
    place = mesh.place(workload, config.mesh, grid, example)
    rows = max((round(len(x) / place.shard.share) for x in example.values() if x.ndim), default=0)
    if rows:
        say(console, mesh.divided(rows, config.accumulate, place))
    params = workload.arrays(place.params)

    # ---- the trained parameters: adapters of the targets, and a few base parameters in full
    key = jax.random.key(config.seed)
    first = initial.initial(config, workload, params, place, example, key)
    workload, layout, base, frozen, adapters, earlier = first
    tx = optimizer.adamw(optimizer.hyper(config.optimizer, config.steps))
    weights, init = step.adapted_weights(layout, frozen), config.adaptation.init
    state = step.create(layout, base, tx, key, place, init, weights, adapters)
    identity = fingerprint(frozen)
    setup = Setup(config, workload, place, layout, frozen, identity, path, began)
    return Opened(setup, data, example, state, tx, earlier)


def train(
    config: Config,
    grid: jax.sharding.Mesh,
    path: pathlib.Path,
    console: Console,
    evaluated: Evaluated | None = None,
) -> summary.Summary:
    """Train one run in the directory `path`, from the beginning or from its last checkpoint."""
    setup, data, example, state, tx, earlier = opened(config, grid, path, console)
    with (
        processes.Preemption() as preemption,
        Checkpoints(path / "checkpoints", report=lambda text: say(console, text)) as checkpoints,
        Loop(Run(setup, data, checkpoints, evaluated), state, tx, console) as loop,
    ):
        loop.run.notes.add("open", time.monotonic() - setup.began)
        say(console, summary.opening(loop.run, loop.state))
        if earlier:
            say(console, earlier)
        if loop.run.start == 0:
            loop.evaluate_before()
        for n in loop.steps():
            loop.take(n)
            if n % config.evaluate_every == 0 or n == config.steps:
                loop.validate(n)
            stop, over = preemption.asked(n), loop.run.is_over
            if stop or over or n % config.checkpoint_every == 0 or n == config.steps:
                loop.checkpoint(n)
            if stop:
                raise processes.Preempted(f"step {n}")
            if over:
                break

        # ---- the results
        loop.settle()
        return summary.conclude(
            loop.run, loop.state, loop.batch_loss, loop.merged_difference, example
        )
