"""Compare steps of the training loop with the bare compiled step, on the same batches.

    python -m benchmarks.loop
    python -m benchmarks.loop --configs configs/minilm_reviews.py --repeats 10 --profile

The loop is that of `train.py`: it takes the next batch from the data, sends it to the device, takes
the step and writes the metrics. The bare step has its batches on the device already and does
nothing else. Both take the same blocks of steps in turns, in one process. A block in which a batch
shape was compiled is not counted. The numbers are medians over the blocks, of wall-clock seconds
and of the process's CPU seconds (user and system, all threads). The ratios are medians of the
ratios of pairs of blocks. `--profile` prints how the host spends its time.
"""

import argparse
import cProfile
import dataclasses
import pathlib
import pstats
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax

import lora_jax
from benchmarks import commands, common
from lora_jax.cli import train as command_line
from lora_jax.system import program_cache
from lora_jax.system.console import Console
from lora_jax.training import initial, mesh, optimizer, step
from lora_jax.training.checkpoints import Checkpoints
from lora_jax.training.config import Config
from lora_jax.training.loop import Loop
from lora_jax.training.open_run import Run, Setup

CONFIGS = ("configs/minilm_reviews.py", "configs/smollm2_definitions.py")
ROOT = commands.ROOT


class Recorder:
    """The batches of a run; `rows` keeps every batch taken since it was last cleared."""

    def __init__(self, data: Any) -> None:
        self._data, self.rows = data, list[Any]()

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        self.rows.append(next(self._data))
        return self.rows[-1]

    def get_state(self) -> Any:
        """Return the position of the data."""
        return self._data.get_state()

    def set_state(self, state: Any) -> None:
        """Go to a position of the data."""
        self._data.set_state(state)


@dataclasses.dataclass
class Sides:
    """Both sides of one config.

    take: `Loop.take`.
    settle: waits for the loop.
    bare: takes steps on batches that are on the device.
    data: the batches that the loop has read.
    place: puts a batch on the device.
    compiling: returns the seconds that the loop has spent on compiling.
    """

    take: Callable[[int], None]
    settle: Callable[[], Any]
    bare: Callable[[list[Any]], None]
    data: Recorder
    place: Callable[[Any], Any]
    compiling: Callable[[], float]


def sides(config: Config, grid: Any, path: pathlib.Path, checkpoints: Checkpoints) -> Sides:
    """Build the loop as `train.py` does, and the compiled step that is timed without it."""
    workload = config.workload(config)
    data = Recorder(workload.train(mesh.shard_of(grid)))
    position = data.get_state()
    example = next(data)
    data.set_state(position)
    place = mesh.place(workload, config.mesh, grid, example)
    params = workload.arrays(place.params)
    key, lora = jax.random.key(config.seed), config.adaptation
    layout = lora_jax.resolve(lora.spec, workload.apply, params, example, train=True, key=key)
    workload, params, begun = initial.changed_base(lora, workload, layout, params, place, key)
    patterns = workload.trainable if lora.trainable is None else lora.trainable
    base, frozen = lora_jax.frozen.split(params, patterns)
    tx = optimizer.adamw(optimizer.hyper(config.optimizer, config.steps))
    weights = step.adapted_weights(layout, params)
    created = [step.create(layout, base, tx, key, place, lora.init, weights, begun) for _ in "ab"]
    identity = lora_jax.fingerprint(frozen)
    setup = Setup(config, workload, place, layout, frozen, identity, path, time.monotonic())
    loop = Loop(Run(setup, data, checkpoints), created[0], tx, Console(quiet=True))
    one = step.train_step(workload, layout, tx, config.on_nonfinite, config.accumulate)
    compiled, state = jax.jit(one, **step.compilation(created[1], place)), created[1]

    def bare(batches: list[Any]) -> None:
        nonlocal state
        for batch in batches:
            state, _ = compiled(state, frozen, batch)
        jax.block_until_ready(state)

    return Sides(
        loop.take,
        lambda: jax.block_until_ready(loop.state),
        bare,
        data,
        place.batch,
        lambda: loop.run.notes.seconds.get("compile", 0.0),
    )


def timed(run: Callable[[], Any], steps: int) -> tuple[float, float]:
    """Return the wall-clock and the CPU seconds of a step."""
    wall, cpu = time.perf_counter(), time.process_time()
    run()
    return (time.perf_counter() - wall) / steps, (time.process_time() - cpu) / steps


def compare(both: Sides, block: int, repeats: int, profile: cProfile.Profile | None) -> Any:
    """Return the medians of the times of the loop and of the bare step, and of their ratios."""
    taken, found = 0, list[Any]()

    def take() -> None:
        nonlocal taken
        for _ in range(block):
            taken += 1
            both.take(taken)
        both.settle()

    for repeat in range(repeats + 1):
        both.data.rows.clear()
        before = both.compiling()
        if profile is not None and repeat:
            profile.enable()
        loop = timed(take, block)
        if profile is not None:
            profile.disable()
        batches = [both.place(rows) for rows in both.data.rows]
        jax.block_until_ready(batches)
        if both.compiling() > before or not repeat:
            both.bare(batches)
            continue
        bare = timed(lambda batches=batches: both.bare(batches), block)  # type: ignore[misc]
        found.append((*loop, *bare, loop[0] / bare[0], loop[1] / bare[1]))
    return len(found), [statistics.median(each) for each in zip(*found, strict=True)]


def row(name: str, block: int, repeats: int, profile: cProfile.Profile | None) -> tuple[str, ...]:
    """Return a line of the table."""
    config = command_line.load(name, ROOT)[1]
    assert isinstance(config, Config)
    grid = mesh.make(config.mesh)
    with tempfile.TemporaryDirectory() as folder, jax.set_mesh(grid):
        path = pathlib.Path(folder)
        with Checkpoints(path / "checkpoints") as checkpoints:
            both = sides(config, grid, path, checkpoints)
            blocks, times = compare(both, block, repeats, profile)
    return (pathlib.Path(name).stem, f"{blocks} x {block}", *(f"{x:.3f}" for x in times))


def main() -> None:
    parser = argparse.ArgumentParser(description="A step of the loop / the bare step.")
    parser.add_argument("--configs", nargs="+", default=CONFIGS)
    parser.add_argument("--block", type=int, default=10, help="steps of a block")
    parser.add_argument("--repeats", type=int, default=10, help="blocks of each side")
    parser.add_argument("--profile", action="store_true")
    args = parser.parse_args()
    program_cache.enable(print)
    profile = cProfile.Profile() if args.profile else None
    lines = [row(name, args.block, args.repeats, profile) for name in args.configs]
    print(f"{common.hardware()}; {commands.load()}", end="\n\n")
    header = ("config", "blocks", "loop, s", "CPU s", "bare, s", "CPU s", "loop / bare", "CPU")
    print(common.table(header, lines))
    if profile is not None:
        pstats.Stats(profile).sort_stats("tottime").print_stats(25)


if __name__ == "__main__":
    main()
