"""The config of the runs in tests/formats/v1: configs/own_model.py, made smaller.

Once they are released it must keep describing them, so it changes only where an import moves.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from lora_jax.sweeps.sweep import SweepConfig
from lora_jax.training.config import Config, LoraConfig, OptimizerConfig
from lora_jax.training.workload import Loss, Workload


@dataclasses.dataclass(frozen=True, kw_only=True)
class SmallConfig(Config):
    """A run of a network of four hidden units."""

    width: int = 4


class Network(nn.Module):
    """A network from [B, 2] to [B]."""

    width: int

    @nn.compact
    def __call__(self, x: Any) -> Any:
        for name in ("first", "second"):
            x = nn.tanh(nn.Dense(self.width, name=name)(x))
        return nn.Dense(1, name="head")(x)[:, 0]


class Points:
    """Random points; batch i depends only on the seed and on i."""

    def __init__(self, seed: int, shard: Any) -> None:
        self.seed, self.shard, self.position = seed, shard, 0

    def __iter__(self) -> Points:
        return self

    def __next__(self) -> Any:
        random = np.random.default_rng((self.seed, self.position))
        self.position += 1
        x = random.uniform(-2, 2, (16, 2)).astype(np.float32)
        return self.shard.take({"x": x, "y": np.sin(x.sum(axis=1))})

    def get_state(self) -> dict[str, Any]:
        return {"position": self.position}

    def set_state(self, state: dict[str, Any]) -> None:
        self.position = state["position"]


def workload(config: SmallConfig) -> Workload:
    """The network, its data and its loss."""
    network = Network(config.width)

    def apply(params: Any, batch: Any, *, train: bool, key: Any) -> Any:
        return network.apply({"params": params}, batch["x"])

    def loss(outputs: jax.Array, batch: Any) -> Loss:
        error = jnp.square(outputs - batch["y"])
        return Loss(error.sum(), jnp.float32(error.size), {})

    def load(shardings: Any) -> Any:
        return network.init(jax.random.key(17), jnp.zeros((1, 2)))["params"]

    return Workload(
        apply=apply,
        loss=loss,
        params=jax.eval_shape(load, None),
        load=load,
        trainable=("head/**",),
        train=lambda shard: Points(config.seed + 1, shard),
        evaluation={"validation": lambda shard: [next(Points(0, shard))]},
        unit="points",
    )


config = SmallConfig(
    workload=workload,
    steps=8,
    evaluate_every=4,
    checkpoint_every=4,
    lora=LoraConfig(rank=2, alpha=4.0, targets=("{first,second}/kernel",)),
    optimizer=OptimizerConfig(learning_rate=1e-2),
)
sweep = SweepConfig(base=config, grid={"lora.rank": (1, 2)})
