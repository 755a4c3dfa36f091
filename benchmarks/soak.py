"""Measure whether the memory and the open files of one long run grow.

    python -m benchmarks.soak --steps 100000
    python -m benchmarks.soak --steps 100000 --plot soak.png
    python -m benchmarks.soak --saves 1350

The run is `train.py` on the tiny network of configs/own_model.py. It writes a checkpoint every 500
steps, and evaluates and exports the best adapter every 1,000. Every 250 steps the benchmark reads
the resident memory and the open files of the process. The memory is what the process has allocated,
without the pages of files, which the kernel drops and brings back. Its slope is that of a straight
line through the means of blocks of readings. The first fifth of the run is left out, because
programs are compiled and caches fill in it. The standard error comes from how the blocks scatter
around the line.
"""

import argparse
import dataclasses
import gc
import math
import os
import pathlib
import tempfile
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import common
from configs import own_model
from lora_jax.checkpoint import storage
from lora_jax.system.console import Console, quiet_storage
from lora_jax.training import mesh, one_run
from lora_jax.training.checkpoints import steps_in
from lora_jax.training.config import MeshConfig, OptimizerConfig
from lora_jax.training.workload import Workload

EVERY, BLOCKS = 250, 40


def allocated() -> int:
    """Return the resident bytes that this process has allocated."""
    status = pathlib.Path("/proc/self/status").read_text()
    return int(status.partition("RssAnon:")[2].split()[0]) * 1024


@dataclasses.dataclass
class Readings:
    """Readings of the process: steps, bytes of resident memory, numbers of open files."""

    steps: list[int] = dataclasses.field(default_factory=list)
    bytes: list[int] = dataclasses.field(default_factory=list)
    files: list[int] = dataclasses.field(default_factory=list)

    def take(self, step: int) -> None:
        """Read the memory and the open files now."""
        self.steps.append(step)
        self.bytes.append(allocated())
        self.files.append(len(os.listdir("/proc/self/fd")))

    def without_first(self, share: float) -> "Readings":
        """Return the readings without this share of them, the first ones."""
        first = round(len(self.steps) * share)
        return Readings(self.steps[first:], self.bytes[first:], self.files[first:])


class Watched(own_model.Points):
    """The batches of the tiny network. The process is read when it asks for a batch."""

    readings: Readings

    def __next__(self) -> Any:
        if self.position % EVERY == 0:
            self.readings.take(self.position)
        return super().__next__()


def workload(config: own_model.OwnConfig) -> Workload:
    """Return the workload of configs/own_model.py with `Watched` batches."""
    made = own_model.workload(config)
    return dataclasses.replace(
        made, train=lambda shard: Watched(config.seed + 1, config.batch_size, shard)
    )


def soak(steps: int, checkpoint_every: int, path: pathlib.Path) -> Readings:
    """Train in this process, and return the readings."""
    config = dataclasses.replace(
        own_model.config,
        workload=workload,
        width=8,
        batch_size=8,
        steps=steps,
        checkpoint_every=checkpoint_every,
        evaluate_every=2 * checkpoint_every,
        log_every=max(steps // 20, 1),
        optimizer=OptimizerConfig(learning_rate=1e-3, schedule="constant"),
    )
    Watched.readings = readings = Readings()
    grid = mesh.make(MeshConfig(), jax.devices()[:1])
    with quiet_storage(), jax.set_mesh(grid):
        one_run.train(config, grid, path, Console())
    return readings  # not read at the end, where matplotlib is loaded to draw the curves


def saves(count: int, window: int = 150) -> list[int]:
    """Save eight small arrays `count` times; return the bytes that each save leaves, by window."""
    arrays = {f"x{i}": jnp.ones((4, 4)) for i in range(8)}
    left = []
    with quiet_storage(), tempfile.TemporaryDirectory() as folder:
        for _ in range(count // window):
            before = allocated()
            for _ in range(window):
                storage.write(storage.folder_at(folder) / "saved", {"arrays": arrays})
            gc.collect()
            left.append((allocated() - before) // window)
    return left


def slope(steps: list[int], values: list[int], blocks: int = BLOCKS) -> tuple[float, float]:
    """Return the slope per step and its standard error, of a line through the means of blocks.

    >>> slope([0, 1, 2, 3], [5, 7, 9, 11], blocks=4)
    (2.0, 0.0)
    """
    parts = np.array_split(np.array([steps, values], float), min(blocks, len(steps)), axis=1)
    x, y = np.array([part.mean(axis=1) for part in parts]).T
    x = x - x.mean()
    found = float(x @ y / (x @ x))
    rest = y - y.mean() - found * x
    return found, math.sqrt(float(rest @ rest) / max(len(x) - 2, 1) / float(x @ x))


def draw(readings: Readings, file: pathlib.Path) -> None:
    """Draw the memory and the open files over the steps."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3.2), layout="constrained")
    left = figure.subplots()
    left.plot(readings.steps, np.array(readings.bytes) / 2**20, linewidth=1)
    left.set(xlabel="step", ylabel="resident memory, MiB", ylim=(0, None))
    right = left.twinx()
    right.plot(readings.steps, readings.files, linewidth=1, color="tab:orange")
    right.set(ylabel="open files", ylim=(0, None))
    figure.savefig(file)


def main() -> None:
    """Print the slope of the memory, the open files and the bytes on disk."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=100_000)
    parser.add_argument("--checkpoint-every", type=int, default=500)
    parser.add_argument("--plot", type=pathlib.Path, default=pathlib.Path("soak.png"))
    parser.add_argument("--saves", type=int, help="only save, so many times")
    options = parser.parse_args()
    if options.saves:
        print(common.hardware())
        print(f"bytes for each save, by 150: {saves(options.saves)}")
        return
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        readings = soak(options.steps, options.checkpoint_every, pathlib.Path(folder))
        kept = steps_in(pathlib.Path(folder) / "checkpoints")
        saved = sum(p.stat().st_size for p in pathlib.Path(folder).glob("checkpoints/**/*"))
    warm = readings.without_first(1 / 5)
    draw(readings, options.plot)
    rows = [
        ["steps", f"{options.steps:,} in {time.monotonic() - began:,.0f} s"],
        ["checkpoints written / kept", f"{options.steps // options.checkpoint_every} / {kept}"],
        ["bytes of checkpoints on disk", f"{saved:,}"],
        ["resident memory, first / warm / last, MiB", mebibytes(readings, warm)],
        ["slope, bytes for 1,000 steps", growth(warm)],
        ["slope of the last half", growth(readings.without_first(1 / 2))],
        ["open files, warm / last / most", f"{warm.files[0]} / {warm.files[-1]} / {most(warm)}"],
        ["plot", str(options.plot)],
    ]
    print(common.hardware())
    print(common.table(["", "seen"], rows))


def mebibytes(readings: Readings, warm: Readings) -> str:
    """Format the memory at the first reading, after the warm-up, and at the last reading."""
    values = (readings.bytes[0], warm.bytes[0], readings.bytes[-1])
    return " / ".join(f"{value / 2**20:.1f}" for value in values)


def growth(readings: Readings) -> str:
    """Format the slope of the memory and its standard error, in bytes for 1,000 steps."""
    each, error = slope(readings.steps, readings.bytes)
    return f"{1000 * each:,.0f} +- {1000 * error:,.0f}"


def most(readings: Readings) -> int:
    """Return the largest number of open files."""
    return max(readings.files)


if __name__ == "__main__":
    main()
