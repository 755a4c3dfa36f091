"""Measure the spread of rounding errors in the first step's gradient over 200 steps.

    python -m benchmarks.first_step

Adam divides a gradient by its own size, so its first step is the sign of each number, also of one
that is only rounding. The first 200 steps of configs/minilm_reviews.py (no dropout, rows of 48
tokens) are taken twice, with one difference:

- relative: each number of the first gradient is multiplied by 1 + 1e-7 n, with n from N(0, 1), as
  another order of summation does;
- absolute: 1e-7 n times the root mean square of the whole first gradient is added to each number of
  it, also to the exact zeros;
- four devices: one side is on one device, the other on four simulated ones (data 2 x fsdp 2). Then
  the order of summation differs in all steps.
- their order: both sides are on four devices, which the second one has in reversed order.

The table has, for B = 0 or A = 0 at the start and for settings of the optimizer: the distance of
the two updates `A B` over their size, after the first step and at the end, and the mean difference
of the losses of the last 20 steps over their mean.
"""

import argparse
import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import lora_jax
from benchmarks import commands, common
from lora_jax.cli import train as command_line
from lora_jax.training import mesh, optimizer, step
from lora_jax.training.config import Config, MeshConfig
from lora_jax.training.initial import initial

SETTINGS = {
    "eps 1e-8": {"warmup": 0.0},
    "eps 1e-5": {"warmup": 0.0, "eps": 1e-5},
    "warm-up 6 %": {"warmup": 0.06},
}
SCALE = 1e-7
Curve = tuple[np.ndarray, list[Any]]  # the losses, and the trained arrays after steps 1 and last


def perturbed(gradient: Any, relative: Any, absolute: Any) -> Any:
    """Return the gradient with noise; `relative` and `absolute` are its sizes."""
    leaves, tree = jax.tree.flatten(gradient)
    squares = sum(jnp.sum(jnp.square(x)) for x in leaves)
    scale = jnp.sqrt(squares / sum(x.size for x in leaves))
    keys = jax.random.split(jax.random.key(7), len(leaves))
    noise = [jax.random.normal(key, x.shape) for key, x in zip(keys, leaves, strict=True)]
    moved = [
        x * (1 + relative * n) + absolute * scale * n for x, n in zip(leaves, noise, strict=True)
    ]
    return jax.tree.unflatten(tree, moved)


class Training:
    """The steps of the run on some devices; one program serves all settings."""

    def __init__(self, config: Config, sizes: MeshConfig, devices: Sequence[Any]) -> None:
        self.grid = mesh.make(sizes, devices)
        with jax.set_mesh(self.grid):
            workload = config.workload(config)
            data = workload.train(mesh.shard_of(self.grid))
            self.place = mesh.place(workload, sizes, self.grid, next(data))
            rows = [next(data) for _ in range(config.steps)]
            params, key = workload.arrays(self.place.params), jax.random.key(config.seed)
            self.workload, self.layout, self.base, self.frozen, self.adapters, _ = initial(
                config, workload, params, self.place, rows[0], key
            )
            self.batches = [self.place.batch(row) for row in rows]
        self.config, self.key = config, key

        def take(state: Any, frozen: Any, batch: Any, hyper: Any, noise: Any) -> Any:
            usual = optimizer.adamw(hyper)

            def update(gradient: Any, state: Any, params: Any = None) -> Any:
                return usual.update(perturbed(gradient, *noise), state, params)

            tx = usual._replace(update=update)
            return step.train_step(self.workload, self.layout, tx, "stop")(state, frozen, batch)

        self._take = jax.jit(take)

    def run(
        self, start: str, settings: dict[str, float], relative: float = 0, absolute: float = 0
    ) -> Curve:
        """Take all steps. The noise is in the first gradient only."""
        config = dataclasses.replace(self.config.optimizer, **settings)  # type: ignore[arg-type]
        hyper = optimizer.hyper(config, self.config.steps)
        with jax.set_mesh(self.grid):
            adapters = lora_jax.init(self.key, self.layout)
            if start == "A = 0":
                adapters = {
                    path: type(f)(jnp.zeros_like(f.a), _gaussian(f.b, number))
                    for number, (path, f) in enumerate(adapters.items())
                }
            tx = optimizer.adamw(hyper)
            state = step.create(self.layout, self.base, tx, self.key, self.place, adapters=adapters)
            losses, kept = [], []
            for number, batch in enumerate(self.batches):
                sizes = np.array([relative, absolute], np.float32) * (number == 0)
                state, values = self._take(state, self.frozen, batch, hyper, sizes)
                losses.append(float(values["loss"]))  # waits: a CPU hangs with many steps under way
                if number in (0, len(self.batches) - 1):
                    kept.append(jax.device_get(state.trained["adapters"]))
        return np.array(losses), kept


def _gaussian(like: Any, seed: int) -> Any:
    rank = like.shape[-2]
    return jax.random.normal(jax.random.key(seed), like.shape, like.dtype) * rank**-0.5


def distance(one: Any, two: Any) -> float:
    """Return |A1 B1 - A2 B2| / |A1 B1| over all targets."""
    first, second = ([f.a @ f.b for f in side.values()] for side in (one, two))
    apart = sum(np.sum(np.square(x - y)) for x, y in zip(first, second, strict=True))
    return float(np.sqrt(apart / sum(np.sum(np.square(x)) for x in first)))


def row(start: str, name: str, kind: str, one: Curve, two: Curve) -> tuple[str, ...]:
    """Return a line of the table."""
    last = slice(-20, None)
    loss = np.mean(np.abs(one[0][last] - two[0][last])) / np.mean(one[0][last])
    apart = [distance(*pair) for pair in zip(one[1], two[1], strict=True)]
    return (start, name, kind, *(f"{x:.1e}" for x in apart), f"{loss:.1e}")


def main() -> None:
    parser = argparse.ArgumentParser(description="The spread of a first step's rounding errors.")
    parser.add_argument("--steps", type=int, default=200)
    asked = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 4)
    config = command_line.load("configs/minilm_reviews.py", commands.ROOT)[1]
    assert isinstance(config, Config)
    data = dataclasses.replace(config.data, max_length=48, buckets=(48,))  # type: ignore[attr-defined]
    config = dataclasses.replace(config, steps=asked.steps, data=data)  # type: ignore[call-arg]
    devices = jax.devices()
    alone = Training(config, MeshConfig(), devices[:1])
    four, reverse = (
        Training(config, MeshConfig(data=2, fsdp=2), d) for d in (devices, devices[::-1])
    )
    lines = []
    for start, name in itertools.product(("B = 0", "A = 0"), SETTINGS):
        first = alone.run(start, SETTINGS[name])
        divided = four.run(start, SETTINGS[name])
        pairs = {
            "relative": (first, alone.run(start, SETTINGS[name], relative=SCALE)),
            "absolute": (first, alone.run(start, SETTINGS[name], absolute=SCALE)),
            "four devices": (first, divided),
            "their order": (divided, reverse.run(start, SETTINGS[name])),
        }
        lines += [row(start, name, kind, *both) for kind, both in pairs.items()]
        print(*lines[-4:], sep="\n", flush=True)
    print(f"{common.hardware()}; {commands.load()}\n")
    header = ("at the start", "Adam", "difference", "A B, step 1", "A B, at the end", "loss")
    print(common.table(header, lines))


if __name__ == "__main__":
    main()
