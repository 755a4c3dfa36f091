"""The definition: `W + scale * a @ b`. `lora_jax.adapt` is the fast path equal to it."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp

from lora_jax import paths
from lora_jax.adapters import Adapters, Factors, check, wide_dtype
from lora_jax.layout import Layout, Target


def merge(layout: Layout, params: Any, adapters: Adapters) -> Any:
    """The parameters with every update added: `W + (alpha / rank) * a @ b`.

    The sum is formed in float32 (or in W's dtype where that is wider) and rounded once to W's
    dtype. There is no unmerge: subtracting does not restore a low-precision W, so keep the base.

    Args:
      layout: from `lora_jax.resolve` or `lora_jax.restore`.
      params: the base parameters, a pytree; not changed.
      adapters: `{path: Factors(a, b)}`.

    Returns:
      A pytree like `params`, same shapes and dtypes.

    Raises:
      LoraError: the layout does not fit the parameters, or the adapters the layout.

    >>> import jax, lora_jax
    >>> params = {"w": jnp.ones((4, 3))}
    >>> f = lambda params, x: x @ params["w"]
    >>> layout = lora_jax.resolve(lora_jax.LoraSpec(1, 1.0, ("w",)), f, params, jnp.ones((2, 4)))
    >>> merged = merge(layout, params, {"w": Factors(jnp.ones((4, 1)), 2 * jnp.ones((1, 3)))})
    >>> merged["w"][0]
    Array([3., 3., 3.], dtype=float32)
    """
    leaves = paths.flatten(params)
    layout.check_params(leaves)
    check(layout, adapters)
    return paths.replace(
        params, {t.path: merge_one(t, leaves[t.path], adapters[t.path]) for t in layout.targets}
    )


def merge_one(target: Target, w: Any, factors: Factors) -> Any:
    """`W + scale * a @ b` of one target; see `delta` for the axes."""
    w = jnp.asarray(w)
    wide = wide_dtype(w.dtype)
    return (w.astype(wide) + delta(target, factors, wide)).astype(w.dtype)


def delta(target: Target, factors: Factors, dtype: Any = jnp.float32) -> Any:
    """The update `scale * a @ b`, its axes in W's order.

    `a` [*stack, *inputs, rank] and `b` [*stack, rank, *outputs] are contracted over the rank,
    stack axis by stack axis, and the axes [*stack, *inputs, *outputs] go back to W's order.
    """
    rank_axis = len(target.shape)  # a label that no axis of W has
    return target.scale * jnp.einsum(
        jnp.asarray(factors.a, dtype),
        (*target.stack, *target.inputs, rank_axis),
        jnp.asarray(factors.b, dtype),
        (*target.stack, rank_axis, *target.outputs),
        tuple(range(len(target.shape))),
        precision="highest",
    )
