"""Random first values of the factor `a`. `b` is zero, so the first output is the base's.

In all of them the columns have about the same length at any input width; only the distribution
differs. First values that depend on W or on its inputs are in `lora_jax.analysis`.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import jax

from lora_jax.errors import LoraError
from lora_jax.target import Target
from lora_jax.updates.kind import TargetInitializer

InitName = Literal["gaussian", "uniform", "orthogonal"]
ELSEWHERE = {
    "pissa": "lora_jax.init_from_base(layout, params, 'pissa'), which gives a new base too",
    "olora": "lora_jax.init_from_base(layout, params, 'olora'), which gives a new base too",
    "loftq": "lora_jax.init_from_base(layout, params, 'loftq'), which gives a new base too",
    "eva": "lora_jax.init_from_inputs(key, layout, f, params, batches), which needs real batches",
}


def gaussian(key: jax.Array, target: Target, dtype: Any) -> jax.Array:
    """Draw from N(0, 1/fan_in), where fan_in is the product of the target's input axes."""
    return jax.random.normal(key, target.a_shape, dtype) / math.sqrt(target.fan_in)


def uniform(key: jax.Array, target: Target, dtype: Any) -> jax.Array:
    """Draw from U(-s, s) with s = 1/sqrt(fan_in): kaiming_uniform_(a=sqrt(5)) of loralib and PEFT.

    Its variance is a third of that of N(0, 1/fan_in).
    """
    bound = 1 / math.sqrt(target.fan_in)
    return jax.random.uniform(key, target.a_shape, dtype, -bound, bound)


def orthogonal(key: jax.Array, target: Target, dtype: Any) -> jax.Array:
    """Draw orthonormal columns: at right angles, and on average as long as with N(0, 1/fan_in).

    Each slice of a stacked parameter has its own. (PEFT's "orthogonal" is another method: it
    draws `a` and `b` from one orthogonal matrix, so that `b` is not zero but `a b` is.)
    """
    stack = math.prod(target.sizes(target.stack))
    flat = jax.nn.initializers.orthogonal()
    keys = jax.random.split(key, stack)
    drawn = jax.vmap(lambda key: flat(key, (target.fan_in, target.rank), dtype))(keys)
    return drawn.reshape(target.a_shape)


INITIALIZERS: dict[str, TargetInitializer] = {
    "gaussian": gaussian,
    "uniform": uniform,
    "orthogonal": orthogonal,
}


def initializer(method: str | TargetInitializer) -> TargetInitializer:
    """Return the function that draws `a`, for a method given by name or as a function.

    Raises:
      LoraError: a name that is not in `INITIALIZERS`.
    """
    if not isinstance(method, str):
        return method
    if method not in INITIALIZERS:
        cure = ELSEWHERE.get(method, "a function (key, target, dtype) -> array of target.a_shape")
        raise LoraError(
            f"lora_jax.init has no method {method!r}; it has {', '.join(INITIALIZERS)}. Use {cure}"
        )
    return INITIALIZERS[method]
