"""MiSS: a low-rank update whose first factor only adds up the shards of x."""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jax.typing import DTypeLike

from lora_jax.base import Array, Leaf, W
from lora_jax.spec import Target
from lora_jax.updates.factors import Factors
from lora_jax.updates.kind import Initializer, Kind


class Shared(NamedTuple):
    """The array of a MiSS target.

    Attributes:
      block: [*stack, rank, *outputs].
    """

    block: Leaf


class Miss(Kind):
    """Matrix shard sharing (MiSS, arXiv 2409.15371).

        W'[i] = W[i] + block[i % rank]

    The inputs, flattened in the target's order, are cut into shards of `rank`, which share one
    trained block. So the update is `a @ block`, with a[i, k] = (i % rank == k), and x a adds up the
    shards of x. `block` starts at zero. Nothing is drawn, and there is no alpha.

    >>> target = Target("w", (5, 2), (), (0,), (1,), rank=2, alpha=1.0, kind="miss")
    >>> Miss().delta(target, Shared(jnp.array([[1.0, 2.0], [3.0, 4.0]])))[:, 0]
    Array([1., 3., 1., 3., 1.], dtype=float32)
    """

    name = "miss"
    fields = Shared
    zero_at_first = "block"

    def axes(self, target: Target) -> Shared:
        return Shared((*target.stack, None, *target.outputs))

    def rank_limit(self, target: Target) -> tuple[int, str]:
        return target.fan_in, "the number of inputs"

    def init(
        self, key: Array, target: Target, dtype: DTypeLike, a_init: Initializer, w: W | None = None
    ) -> Shared:
        return Shared(jnp.zeros(target.b_shape, dtype))

    def factors(self, target: Target, parameters: Shared) -> Factors:
        block = jnp.asarray(parameters.block)
        shards = jnp.eye(target.rank, dtype=block.dtype)[jnp.arange(target.fan_in) % target.rank]
        ones = (1,) * len(target.stack)
        a = shards.reshape(*ones, *target.sizes(target.inputs), target.rank)
        return Factors(jnp.broadcast_to(a, target.a_shape), block)

    def scale(self, target: Target) -> float:
        return 1.0
