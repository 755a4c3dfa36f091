"""The low-rank product of a mixed batch, with its examples grouped by adapter.

There are two ways to compute `x_i a_k b_k` for every example i and its adapter k:

- gather: each example fetches its own copy of the factors, and the products are batched over the
  examples. This moves `B r (in + out)` numbers. If an example has many rows (tokens), that is
  little compared with x. If it has one row, it is most of the time: 1,024 single tokens with 4
  adapters.
- grouped: the examples are sorted by adapter and split into blocks of `BLOCK`, each of one adapter.
  Blocks that are not full are padded with zeros, so there are at most `B / BLOCK + min(n, B)`. The
  factors are fetched once for each block, and the examples are moved there and back.

`pays` compares the numbers that the two move; that is the whole rule. On CPU it picked the faster
way at every shape of `benchmarks/mixed.py`. (`jax.lax.ragged_dot` is not a third way: outside of
TPUs, XLA multiplies every row with every group.)

Sorting needs all examples at once, but the interpreted program sees only one (it is under a
`vmap`). So the product has its own batching rule.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_batching import custom_vmap

BLOCK = 8


def blocks(examples: int, adapters: int) -> int:
    """Return the largest possible number of blocks."""
    return -(-examples // BLOCK) + min(adapters, examples)


def pays(examples: int, adapters: int, rows: int, rank: int) -> bool:
    """Return whether grouping moves less than gathering, for examples of `rows` rows each.

    It saves the factors of `examples - blocks` examples, which are `rank` numbers for each input
    and output, and moves every row twice.

    >>> pays(1024, 64, rows=1, rank=8), pays(64, 64, rows=32, rank=8), pays(256, 1000, 1, 8)
    (True, False, False)
    """
    return rank * (examples - blocks(examples, adapters)) > 2 * rows * examples


def product(x: Any, a: Any, b: Any, gain: Any, index: Any, precision: Any) -> Any:
    """Return `gain[index] * x a[index] b[index]`; grouped by index under a vmap over x and index.

    x [rows, in]; a [n, in, rank], b [n, rank, out] and gain [n] of all adapters; index [] int, NaN
    if it is out of range. The result is [rows, out].
    """

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

    return call(x, a, b, gain, index)


def _gain(gain: Any, index: Any) -> Any:
    """Return the gain, or NaN for an index out of range."""
    return gain.at[index].get(mode="fill", fill_value=jnp.nan)


def _grouped(x: Any, a: Any, b: Any, gain: Any, ids: Any, precision: Any) -> Any:
    """Return [B, rows, out] from x [B, rows, in] and ids [B]."""
    count, rows, width = x.shape
    adapters = len(a)
    gains = _gain(gain, ids)
    ids = ids.clip(0, adapters - 1)
    order = jnp.argsort(ids)
    members = jnp.bincount(ids, length=adapters)
    full = -(-members // BLOCK)  # blocks of each adapter
    ends = jnp.cumsum(full)
    # An example's place in the blocks: after the earlier examples of the same adapter.
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
