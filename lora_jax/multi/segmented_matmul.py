"""The low-rank product of a mixed batch, its examples grouped by adapter.

Two ways lead to `x_i a_k b_k` for every example i and its adapter k:

- gather: each example brings its own copy of the factors, and the products are batched over the
  examples. It moves `B r (in + out)` numbers, which is nothing beside x where an example has many
  rows (tokens), and most of the time where it has one: 1,024 single tokens with 4 adapters.
- grouped: the examples are sorted by adapter and cut into blocks of `BLOCK`, each of one adapter
  (blocks that are not full are filled with zeros, so there are at most `B / BLOCK + min(n, B)`);
  the factors are brought once for each block, and the examples are moved there and back.

`pays` compares what the two move; that is the whole rule. On CPU it picked the faster one at every
shape of `benchmarks/mixed.py`. (`jax.lax.ragged_dot` is no third way: outside of TPUs XLA
multiplies every row with every group.)

Sorting needs all examples at once, and the program that is interpreted sees one (it is under a
`vmap`): so the product has its own rule for being batched.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_batching import custom_vmap

BLOCK = 8


def blocks(examples: int, adapters: int) -> int:
    """How many blocks there are at most."""
    return -(-examples // BLOCK) + min(adapters, examples)


def pays(examples: int, adapters: int, rows: int, rank: int) -> bool:
    """Whether grouping moves less than gathering, for examples of so many rows each.

    It saves the factors of `examples - blocks` examples, rank numbers for each input and output,
    and moves every row twice.

    >>> pays(1024, 64, rows=1, rank=8), pays(64, 64, rows=32, rank=8), pays(256, 1000, 1, 8)
    (True, False, False)
    """
    return rank * (examples - blocks(examples, adapters)) > 2 * rows * examples


def product(x: Any, a: Any, b: Any, gain: Any, index: Any, precision: Any) -> Any:
    """`gain[index] * x a[index] b[index]`; grouped by index under a vmap over x and index.

    Args:
      x: [rows, in].
      a, b, gain: [n, in, rank], [n, rank, out] and [n], of all adapters.
      index: [] int; one that is none gives NaN.

    Returns:
      [rows, out].
    """
    return _product(precision)(x, a, b, gain, index)


@functools.cache
def _product(precision: Any) -> Callable[..., Any]:
    """One function for each precision, which is no array."""

    def plain(x: Any, a: Any, b: Any, gain: Any, index: Any) -> Any:
        h = jnp.matmul(x, a[index], precision=precision) * _gain(gain, index)
        return jnp.matmul(h, b[index], precision=precision)

    call = custom_vmap(plain)

    @call.def_vmap
    def batched(size: int, divided: list[bool], *operands: Any) -> tuple[Any, bool]:
        if divided == [True, False, False, False, True]:
            x, a, b, gain, ids = operands
            return _grouped(x, a, b, gain, ids, precision), True
        axes = [0 if is_divided else None for is_divided in divided]
        return jax.vmap(plain, in_axes=axes, axis_size=size)(*operands), True

    return call


def _gain(gain: Any, index: Any) -> Any:
    """NaN for an index that is none."""
    return gain.at[index].get(mode="fill", fill_value=jnp.nan)


def _grouped(x: Any, a: Any, b: Any, gain: Any, ids: Any, precision: Any) -> Any:
    """[B, rows, out] of x [B, rows, in] and ids [B]."""
    count, rows, width = x.shape
    adapters = len(a)
    gains = _gain(gain, ids)
    ids = ids.clip(0, adapters - 1)
    order = jnp.argsort(ids)
    members = jnp.bincount(ids, length=adapters)
    full = -(-members // BLOCK)  # blocks of each adapter
    ends = jnp.cumsum(full)
    # Where in the blocks each example goes: behind those of its adapter that come before it.
    within = jnp.arange(count) - (jnp.cumsum(members) - members)[ids[order]]
    place = (ends - full)[ids[order]] * BLOCK + within
    number = blocks(count, adapters)
    spread = jnp.zeros((number * BLOCK, rows, width), x.dtype)
    spread = spread.at[place].set(x[order], unique_indices=True)
    owner = jnp.searchsorted(ends, jnp.arange(number), side="right").clip(0, adapters - 1)
    h = jnp.matmul(spread.reshape(number, BLOCK * rows, width), a[owner], precision=precision)
    y = jnp.matmul(h, b[owner], precision=precision)
    back = jnp.zeros(count, place.dtype).at[order].set(place, unique_indices=True)
    return y.reshape(number * BLOCK, rows, -1)[back] * gains[:, None, None]
