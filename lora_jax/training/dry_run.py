"""A dry run: one step on real data, with its shapes, its memory and its time. It leaves no file."""

from __future__ import annotations

import pathlib
import time
from typing import Any

import jax
import numpy as np

from lora_jax.adapters import count
from lora_jax.system.console import Console, say, say_table
from lora_jax.training import mesh, step, summary
from lora_jax.training.config import Config
from lora_jax.training.one_run import Opened, opened
from lora_jax.training.sizes import bytes_of, in_units, on_each_device


def run(config: Config, console: Console) -> None:
    """Take the first step of a run, and print what it took. Nothing is written."""
    grid = mesh.make(config.mesh)
    with jax.set_mesh(grid):
        ready = opened(config, grid, pathlib.Path("a dry run"), console)
        setup, place = ready.setup, ready.setup.place
        say(console, setup.workload.facts(place.shard))
        parts, rate = config.accumulate, config.adaptation.dropout
        one = step.train_step(
            setup.workload, setup.layout, ready.tx, config.on_nonfinite, parts, rate=rate
        )
        began, batch = time.monotonic(), place.batch(ready.example)
        jitted = jax.jit(one, **step.compilation(ready.state, place))
        compiled = jitted.lower(ready.state, setup.frozen, batch).compile()
        compiling, state, found = time.monotonic() - began, ready.state, dict[str, float]()
        sizes = _sizes(ready)
        for _ in range(2):  # the first call has costs of its own, and the second one is timed
            start = time.monotonic()
            state, values = jax.block_until_ready(compiled(state, setup.frozen, batch))
            found = found or {name: float(value) for name, value in values.items()}
        taken = time.monotonic() - start
    steps, whole = config.steps, _long(taken * config.steps)
    rows = [
        *((f"batch: {name}", f"{x.dtype}{list(x.shape)}") for name, x in batch.items()),
        *sizes,
        *_memory(compiled),
        ("peak memory", in_units(summary.device_peak() or summary.peak_memory())),
        ("compiling", f"{compiling:.1f} s"),
        (
            "first step",
            f"{taken:.3g} s; {steps:,} of them take {whole}",
        ),
        ("loss", f"{found['loss']:.4f}"),
        ("gradient norm", f"{found['gradient_norm']:.4f}"),
    ]
    say_table(console, rows, (0, 1))
    finite = "" if found["finite"] else " The loss or the gradient is not finite."
    say(console, f"A dry run: nothing is kept.{finite}")


def _sizes(ready: Opened) -> list[tuple[str, str]]:
    """Return the sizes of the arrays, before the step takes their memory."""
    trained, frozen = ready.state.trained, ready.setup.frozen
    whole = on_each_device(frozen) + on_each_device(trained["base"])
    targets = len(ready.setup.layout.targets)
    return [
        ("adapters", f"{count(trained['adapters']):,} numbers for {targets} parameters"),
        ("trained in full", f"{count(trained['base']):,}"),
        ("base on each device", in_units(whole)),
        ("optimizer state", in_units(bytes_of(ready.state.optimizer))),
    ]


def _memory(compiled: jax.stages.Compiled) -> list[tuple[str, str]]:
    """Return the bytes that the compiled step needs on each device, if the backend counts them."""
    sizes: Any = compiled.memory_analysis()
    if sizes is None:
        return []
    new = sizes.temp_size_in_bytes + sizes.output_size_in_bytes - sizes.alias_size_in_bytes
    whole = in_units(sizes.argument_size_in_bytes + new)
    return [("memory of the step", whole), ("without its arguments", in_units(new))]


def _long(seconds: float) -> str:
    """Return a time in the unit that fits.

    >>> _long(30.0), _long(600.0), _long(36000.0)
    ('30 s', '10 min', '10.0 h')
    """
    unit = int(np.searchsorted([120, 7200], seconds, side="right"))
    return (f"{seconds:.0f} s", f"{seconds / 60:.0f} min", f"{seconds / 3600:.1f} h")[unit]
