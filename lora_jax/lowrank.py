"""The low-rank product `x a b`: the hot spot, in the form that is fast in time."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp


def product(x: Any, a: Any, b: Any, scale: float, precision: Any = None) -> Any:
    """`scale * (x a) b`.

    Args:
      x: [*batch, rows, in].
      a: [*batch, in, rank].
      b: [*batch, rank, out].

    Returns:
      [*batch, rows, out] in x's dtype; the factors are cast to it.
    """
    flat = functools.partial(_product, scale=scale, precision=precision)
    for _ in range(x.ndim - 2):
        flat = jax.vmap(flat)
    return flat(x, a.astype(x.dtype), b.astype(x.dtype))


@functools.partial(jax.jit, static_argnames=("scale", "precision"))
def _product(x: Any, a: Any, b: Any, *, scale: float, precision: Any) -> Any:
    h = jnp.matmul(x, a, precision=precision)
    return jnp.matmul(h * scale, b, precision=precision)
