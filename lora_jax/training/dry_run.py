"""A dry run: one step on real data, with its shapes, its memory and its time. It leaves no file."""

from __future__ import annotations

import pathlib
import time
from typing import Any

import jax

from lora_jax.system.console import Console, say, say_table
from lora_jax.training import mesh, one_run, step, summary
from lora_jax.training.config import Config
from lora_jax.training.sizes import in_units


def run(config: Config, console: Console) -> None:
    """Take the first step of a run, and print what it took. Nothing is written."""
    grid = mesh.make(config.mesh)
    with jax.set_mesh(grid):
        setup, _, example, state, tx, _ = one_run.opened(config, grid, pathlib.Path("-"), console)
        workload, place, sizes = setup.workload, setup.place, summary.sizes(setup, state)
        parts, rate = config.accumulate, config.adaptation.dropout
        one = step.train_step(workload, setup.layout, tx, config.on_nonfinite, parts, rate=rate)
        batch, began = place.batch(example), time.monotonic()
        one = step.with_reference(one, workload, setup.layout)
        jitted = jax.jit(one, **step.compilation(state, place))
        compiled = jitted.lower(state, setup.frozen, batch).compile()
        compiling, found = time.monotonic() - began, dict[str, float]()
        for _ in range(2):  # the first call has costs of its own, and the second one is timed
            start = time.monotonic()
            state, values = jax.block_until_ready(compiled(state, setup.frozen, batch))
            taken = time.monotonic() - start
            found = found or {name: float(value) for name, value in values.items()}
    targets, steps = len(setup.layout.targets), config.steps
    rows = [
        *((f"batch: {name}", f"{x.dtype}{list(x.shape)}") for name, x in batch.items()),
        ("adapters", f"{sizes['adapter_parameters']:,} numbers for {targets} parameters"),
        ("trained in full", f"{sizes['trainable_parameters']:,}"),
        ("base on each device", in_units(sizes["base_bytes_per_device"])),
        ("optimizer state", in_units(sizes["optimizer_bytes"])),
        ("memory of the step", _memory(compiled)),
        ("peak memory", in_units(summary.device_peak() or summary.peak_memory())),
        ("compiling", f"{compiling:.1f} s"),
        ("a step", f"{taken:.3g} s, so {steps:,} take {steps * taken / 60:.1f} min"),
        *((name.replace("_", " "), f"{value:.4g}") for name, value in found.items()),
    ]
    say(console, workload.facts(place.shard))
    say_table(console, rows, (0, 1))
    say(console, "A dry run: nothing is kept.")


def _memory(compiled: jax.stages.Compiled) -> str:
    """Return the bytes that the compiled step needs on each device, if the backend counts them."""
    sizes: Any = compiled.memory_analysis()
    if sizes is None:
        return "-"
    new = sizes.temp_size_in_bytes + sizes.output_size_in_bytes - sizes.alias_size_in_bytes
    return f"{in_units(sizes.argument_size_in_bytes + new)}, {in_units(new)} without its arguments"
