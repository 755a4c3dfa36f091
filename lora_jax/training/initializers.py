"""Initial values of `a`. `b` begins at zero, so the first output is always that of the base.

All are of the same scale per column up to a constant, whatever the width of the input: what differs
is the distribution.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import jax

from lora_jax.target import Target
from lora_jax.updates.kind import TargetInitializer

InitName = Literal["gaussian", "uniform", "orthogonal"]


def uniform(key: jax.Array, target: Target, dtype: Any) -> jax.Array:
    """U(-s, s) with s = 1/sqrt(fan_in): loralib's and PEFT's kaiming_uniform_(a=sqrt(5)).

    A third of the variance of N(0, 1/fan_in).
    """
    bound = 1 / math.sqrt(target.fan_in)
    return jax.random.uniform(key, target.a_shape, dtype, -bound, bound)


def orthogonal(key: jax.Array, target: Target, dtype: Any) -> jax.Array:
    """Orthonormal columns: as long as those of N(0, 1/fan_in) on average, and at right angles.

    Of every slice of a stacked parameter its own.
    """
    stack = math.prod(target.sizes(target.stack))
    flat = jax.nn.initializers.orthogonal()
    keys = jax.random.split(key, stack)
    drawn = jax.vmap(lambda key: flat(key, (target.fan_in, target.rank), dtype))(keys)
    return drawn.reshape(target.a_shape)


INITIALIZERS: dict[InitName, TargetInitializer | None] = {
    "gaussian": None,  # `lora_jax.init`'s own
    "uniform": uniform,
    "orthogonal": orthogonal,
}
