"""Compare a sweep of 16 runs of MiniLM as one program with 16 runs of train.py.

    python -m benchmarks.sweep                      the sweep, and 4 of its members alone
    python -m benchmarks.sweep --solo 16            the sweep, and all members alone
    python -m benchmarks.sweep --crossing           one step at several batch sizes

Every run is a command of `train.py`, which is printed: configs/sweep.py, and members alone, spread
over the sweep. For each of these it prints the gap between the parameters trained alone and in the
sweep: the norm of the difference relative to the whole and, in brackets, the largest difference of
a single number. The time of 16 separate runs is extrapolated from a few of them.

With --crossing only the step is timed: the step of 16 members together, with several numbers at
once, divided by 16 times the step of one alone, on random weights, at 24 tokens a row. Batching
pays while the ratio is below 1.
"""

import argparse
import functools
import pathlib
import tempfile
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import lora_jax
from benchmarks import commands, common
from lora_jax import models
from lora_jax.sweeps import memory_fit
from lora_jax.sweeps.step import Settings, group_step
from lora_jax.training import classification, optimizer, step
from lora_jax.training.config import OptimizerConfig
from lora_jax.training.sizes import in_units
from lora_jax.training.workload import Workload

CONFIG = "configs/sweep.py"
TARGETS = ("bert/encoder/layer_*/attention/{query,value}/kernel",)
RATES = np.geomspace(5e-4, 4e-3, 4)
RANKS = (1, 2, 4, 8)


def compare(steps: int, rows: int, solo: int) -> None:
    """Run the sweep and `solo` of its members alone, and print the comparison."""
    settings = {"steps": steps, "evaluate-every": steps, "checkpoint-every": steps}
    settings |= {"data.eval-limit": rows, "data.test-limit": rows}
    members = commands.members(CONFIG)
    chosen = [members[round(i)] for i in np.linspace(0, len(members) - 1, solo)]
    print(commands.load(), flush=True)
    with tempfile.TemporaryDirectory() as place:
        folder = pathlib.Path(place)
        options = [w for name, v in settings.items() for w in (f"--base.{name}", str(v))]
        sweep = commands.train("--config", CONFIG, "--run-dir", str(folder / "sweep"), *options)
        lines, alone = [], []
        for member in chosen:
            own = {**settings, "lora.rank": member.config.lora.rank}
            own |= {"optimizer.learning-rate": member.config.optimizer.learning_rate}
            options = [w for name, v in own.items() for w in (f"--{name}", str(v))]
            run = folder / member.name
            alone.append(
                commands.train("--config", f"{CONFIG}:base", "--run-dir", str(run), *options)
            )
            gap = commands.gap(run, folder / "sweep" / member.name)
            scores = [
                commands.summary(path / member.name)["after"]["test"]["accuracy"]
                for path in (folder, folder / "sweep")
            ]
            lines.append((member.name, str(gap), *(f"{x:.4f}" for x in scores)))
    print(f"\n{common.hardware()}\n{commands.load()}\n{steps} steps, {rows} rows of a split\n")
    titles = ("member", "gap: norm (largest)", "test accuracy alone", "in the sweep")
    print(common.table(titles, lines))
    share = len(members) / len(alone)
    seconds = [sum(s.seconds for s in alone) * share, sweep.seconds]
    processor = [sum(s.processor for s in alone) * share, sweep.processor]
    print("\n" + common.table(
        ("", "s", "processor s", "peak memory, MB"),
        [
            (f"{len(members)} runs ({len(alone)} measured)", f"{seconds[0]:.0f}",
             f"{processor[0]:.0f}", f"{max(s.bytes for s in alone) / 1e6:.0f} each"),
            ("the sweep", f"{seconds[1]:.0f}", f"{processor[1]:.0f}", f"{sweep.bytes / 1e6:.0f}"),
            ("ratio", f"{seconds[1] / seconds[0]:.2f}", f"{processor[1] / processor[0]:.2f}", ""),
        ],
    ))  # fmt: skip


def workload() -> Workload:
    """Return MiniLM with two classes and random weights."""
    model = models.BertClassifier(common.MINILM, 2, "mean")
    return Workload(
        apply=classification.apply_of(model),
        loss=classification.class_loss,
        params=common.normal(common.minilm().shapes, 0),
        train=lambda shard: iter(()),  # type: ignore[arg-type, return-value]
        trainable=("classifier/**",),
    )


def batch_of(rows: int, length: int) -> dict[str, jax.Array]:
    """Return a batch of random tokens without padding."""
    keys = jax.random.split(jax.random.key(rows), 2)
    return {
        "input_ids": jax.random.randint(keys[0], (rows, length), 0, common.MINILM.vocab_size),
        "mask": jnp.ones((rows, length), bool),
        "label": jax.random.randint(keys[1], (rows,), 0, 2),
        "weight": jnp.ones((rows,), jnp.float32),
    }


def steps(
    rows: int, length: int, seen: Workload, at_once: list[int]
) -> tuple[dict[str, Callable[[], Any]], list[float]]:
    """Return one step alone, one of all members for each `at_once`, and the bytes of the latter."""
    batch, key = batch_of(rows, length), jax.random.key(0)
    trainable, frozen = lora_jax.frozen.split(seen.params, seen.trainable)
    layouts = [
        lora_jax.resolve(
            lora_jax.LoraSpec(rank, 16.0, TARGETS), seen.apply, seen.params, batch,
            train=True, key=key,
        )
        for rank in RANKS
    ]  # fmt: skip
    pairs = [(layout, OptimizerConfig(learning_rate=r)) for layout in layouts for r in RATES]
    common_layout = lora_jax.multi.union(layouts)
    hypers = [optimizer.hyper(config, 1000) for _, config in pairs]
    scales = [{t.path: np.float32(t.scale) for t in layout.targets} for layout, _ in pairs]
    settings = [
        Settings(hyper, scale, np.bool_(False)) for hyper, scale in zip(hypers, scales, strict=True)
    ]
    stacked = jax.tree.map(lambda *xs: jnp.stack(xs), *settings)
    tx = optimizer.adamw(hypers[0])
    one = jax.jit(step.fresh(layouts[-1], tx, "gaussian"))(trainable, key)
    keys = jax.random.split(key, len(pairs))
    fresh = jax.vmap(step.fresh(common_layout, tx, "gaussian"), in_axes=(None, 0))
    many = jax.jit(fresh)(trainable, keys)
    rows_of_all = jax.tree.map(lambda x: jnp.stack([x] * len(pairs)), batch)
    alone = (
        jax.jit(step.train_step(seen, layouts[-1], tx, "stop")).lower(one, frozen, batch).compile()
    )
    arguments = (many, stacked, jnp.ones(len(pairs), bool), frozen, rows_of_all)
    runs: dict[str, Callable[[], Any]] = {"alone": functools.partial(alone, one, frozen, batch)}
    needed = []
    for size in at_once:
        together = jax.jit(group_step(seen, common_layout, at_once=size))
        compiled = together.lower(*arguments).compile()
        runs[str(size)] = functools.partial(compiled, *arguments)
        needed.append(memory_fit.of_step(compiled).bytes)
    return runs, needed


def crossing(batches: list[int], length: int, at_once: list[int], repeats: int) -> None:
    """Compare the step of all members with that of one, at several batch sizes."""
    seen, members = workload(), len(RANKS) * len(RATES)
    print(f"{common.hardware()}\n{commands.load()}\n", flush=True)
    lines = []
    for rows in batches:
        runs, needed = steps(rows, length, seen, at_once)
        seconds = common.interleaved(runs, repeats)
        separate = seconds["alone"] * members
        cells = [str(rows), f"{1e3 * seconds['alone']:.0f}"]
        for size, taken in zip(at_once, needed, strict=True):
            cells += [f"{seconds[str(size)] / separate:.2f}", in_units(taken)]
        lines.append(tuple(cells))
        print(lines[-1], flush=True)
    titles = ["rows of a member", "one alone, ms"]
    for size in at_once:
        titles += [f"{size} at once", "memory"]
    print(f"\n{length} tokens a row; {commands.load()}\n")
    print(common.table(tuple(titles), lines))


def main() -> None:
    parser = argparse.ArgumentParser(description="A sweep against separate runs.")
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--rows", type=int, default=512, help="rows evaluated of each split")
    parser.add_argument("--solo", type=int, default=4, help="members that also train alone")
    parser.add_argument("--crossing", action="store_true", help="time only the step")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32, 64])
    parser.add_argument("--length", type=int, default=24, help="tokens of a row, for --crossing")
    parser.add_argument("--at-once", type=int, nargs="+", default=[1, 2, 4, 8, 16])
    parser.add_argument("--repeats", type=int, default=5, help="for --crossing")
    args = parser.parse_args()
    if args.crossing:
        crossing(args.batches, args.length, args.at_once, args.repeats)
    else:
        compare(args.steps, args.rows, args.solo)


if __name__ == "__main__":
    main()
