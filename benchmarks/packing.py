"""Packed rows against one conversation in a row: trained tokens a second, and the loss.

    python -m experiments.conversations --out words
    python -m benchmarks.packing words/conversations.jsonl [--steps 60] [--batch-size 8]

Two runs of configs/smollm2_conversations.py, of which one packs its rows, take their steps in turn
on the same machine. The run that does not pack has more rows in a batch, so that both see as many
conversations in a step; the last column compares their losses on the same validation split.
"""

import argparse
import dataclasses
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np

from benchmarks import commands, common
from configs.smollm2_conversations import config as CONFIG
from lora_jax.system.console import Console
from lora_jax.training import evaluation, mesh, one_run
from lora_jax.training.step import Compiled, compilation, evaluation_step, train_step
from lora_jax.training.text import SamplesConfig, TextConfig


class Trained:
    """A run, its steps and their times."""

    def __init__(self, config: TextConfig, grid: Any, folder: str) -> None:
        self.setup, self._data, _, self._state, tx, _ = one_run.opened(
            config, grid, Path(folder), Console(quiet=True)
        )
        workload, layout = self.setup.workload, self.setup.layout
        options = compilation(self._state, self.setup.place)
        step = train_step(workload, layout, tx, "stop", 1, rate=0.0)
        self._step = Compiled(step, lambda seconds: None, **options)
        self._loss = jax.jit(evaluation_step(workload, layout))
        self.seconds, self.tokens, self.learned, self.rows = list[float](), 0, 0.0, 0

    def take(self) -> None:
        """Take one step."""
        batch = next(self._data)
        placed, began = self.setup.place.batch(batch), time.monotonic()
        self._state, values = self._step(self._state, self.setup.frozen, placed)
        jax.block_until_ready(values)
        self.seconds.append(time.monotonic() - began)
        self.tokens += int((batch["segment_ids"] > 0).sum())
        self.learned += float(batch["loss_weight"].sum())
        self.rows += int(batch["segment_ids"].max(-1).sum())

    def conversations(self, steps: int) -> int:
        """Count the conversations of the first steps."""
        position = self._data.get_state()
        count = sum(int(next(self._data)["segment_ids"].max(-1).sum()) for _ in range(steps))
        self._data.set_state(position)
        return count

    def loss(self) -> float:
        """Return the loss of the validation split."""
        by = lambda batch: self._loss(self._state.trained, self.setup.frozen, batch)  # noqa: E731
        workload, place = self.setup.workload, self.setup.place
        batches = workload.evaluation["validation"](place.shard)
        return evaluation.evaluate(by, workload, place, batches)[0]["loss"]

    def row(self, name: str, before: float) -> list[str]:
        """Return the row of the table. The first step, which compiles, has no time."""
        steps = len(self.seconds)
        each = float(np.median(self.seconds[1:]))
        return [
            name, f"{steps}", f"{self.rows}", f"{each:.2f}", f"{self.tokens / steps / each:,.0f}",
            f"{self.learned / steps / each:,.0f}", f"{before:.3f} -> {self.loss():.3f}",
        ]  # fmt: skip


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--batch-size", type=int, default=8)
    asked = parser.parse_args()
    grid = mesh.make(CONFIG.mesh)
    with tempfile.TemporaryDirectory() as folder, jax.set_mesh(grid):

        def run(pack: bool, rows: int) -> Trained:
            more = {"source": asked.file, "pack": pack, "batch_size": rows}
            data = dataclasses.replace(CONFIG.data, **more)
            samples = SamplesConfig()
            config = dataclasses.replace(CONFIG, data=data, steps=asked.steps, samples=samples)
            return Trained(config, grid, folder)

        packed = run(True, asked.batch_size)
        alone = run(False, round(packed.conversations(asked.steps) / asked.steps))
        before = packed.loss()
        for _ in range(asked.steps):
            alone.take()
            packed.take()
        rows = [packed.row("packed", before), alone.row("one in a row", before)]
    print(f"{common.hardware()}; {commands.load()}\n")
    names = ["rows", "steps", "conversations", "s a step", "tokens/s", "trained tokens/s", "loss"]
    print(common.table(names, rows))


if __name__ == "__main__":
    main()
