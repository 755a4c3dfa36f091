"""A model of your own: a small Flax network defined in this file, with its data and its loss.

Command:   python train.py --config configs/own_model.py
Hardware:  any CPU, about 10 seconds
Result:    a frozen random network learns sin(x + y) through adapters of rank 2 on its two inner
           layers and its head: the validation loss falls from 0.57 to below 0.005

`train.py` does not know this file. It calls `workload(config)`, which returns a `Workload` with the
function to train, its parameters and its batches. The frozen parameters here are random; with a
real model, `load` would read them from a checkpoint.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from lora_jax.data import Shard
from lora_jax.training.config import Config, LoraConfig, OptimizerConfig
from lora_jax.training.workload import Batch, Loss, Workload


@dataclasses.dataclass(frozen=True, kw_only=True)
class OwnConfig(Config):
    """A field that is added here can be set on the command line: `--width 32`."""

    width: int = 64
    """Hidden units of the network."""
    batch_size: int = 128
    """Points in a batch."""


class Network(nn.Module):
    """A network without LoRA; [B, 2] -> [B]."""

    width: int

    @nn.compact
    def __call__(self, x: Any) -> Any:
        for name in ("first", "second"):
            x = nn.tanh(nn.Dense(self.width, name=name)(x))
        return nn.Dense(1, name="head")(x)[:, 0]


class Points:
    """An iterator of random points and their targets. Batch i depends only on the seed and on i.

    It yields the rows of each batch that this process holds, as `shard` says.
    """

    def __init__(self, seed: int, size: int, shard: Shard) -> None:
        self.seed, self.size, self.shard, self.position = seed, size, shard, 0

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        random = np.random.default_rng((self.seed, self.position))
        self.position += 1
        x = random.uniform(-2, 2, (self.size, 2)).astype(np.float32)
        return self.shard.take({"x": x, "y": np.sin(x.sum(axis=1))})

    def get_state(self) -> dict[str, Any]:
        """Return the position in the data as JSON values, for a checkpoint."""
        return {"position": self.position}

    def set_state(self, state: dict[str, Any]) -> None:
        """Continue at the position that `get_state` returned."""
        self.position = state["position"]


def workload(config: OwnConfig) -> Workload:
    """Return the network, its data and its loss, for `train.py`."""
    network = Network(config.width)

    def apply(params: Any, batch: Any, *, train: bool, key: Any) -> Any:
        return network.apply({"params": params}, batch["x"])

    def loss(outputs: jax.Array, batch: Any) -> Loss:
        error = jnp.square(outputs - batch["y"])
        return Loss(error.sum(), jnp.float32(error.size), {"within_0.1": (error < 0.01).sum()})

    def load(shardings: Any) -> Any:
        return network.init(jax.random.key(17), jnp.zeros((1, 2)))["params"]

    return Workload(
        apply=apply,
        loss=loss,
        params=jax.eval_shape(load, None),
        load=load,
        trainable=("head/**",),
        train=lambda shard: Points(config.seed + 1, config.batch_size, shard),
        evaluation={"validation": lambda shard: [next(Points(0, 1024, shard))]},
        unit="points",
    )


config = OwnConfig(
    workload=workload,
    steps=500,
    evaluate_every=100,
    checkpoint_every=100,
    log_every=50,
    lora=LoraConfig(rank=2, alpha=4.0, targets=("{first,second}/kernel",)),
    optimizer=OptimizerConfig(learning_rate=1e-2, schedule="cosine"),
)
