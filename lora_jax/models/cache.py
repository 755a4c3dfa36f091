"""What a decoder remembers of the tokens it has read: keys and values, as plain arguments.

A cache has a fixed number of slots for each row. A call writes its T tokens to the slots
`slot` to `slot + T` of all rows, and every slot notes the position that its token has in its own
row: -1 for padding and for slots not yet written. A query looks at the slots with positions from
0 to its own (no further back than the window), so padding may lie on either side, or between.

Rows of unequal length are best padded on the left. All of them then end in the same slot: a step
of decoding writes to one slot for the whole batch, in place, where right-padded rows would need a
scatter or leave holes; and the logits that follow a prompt are those of its last slot.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike

from lora_jax.models.config import LlamaConfig

Store = Array | tuple[Array, ...]


class Cache(NamedTuple):
    """Keys (turned to their positions) and values of a batch; every array has the rows first.

    Attributes:
        keys, values: with unrolled layers a tuple of [B, K, S, H], one for each; with scanned
            layers one array [B, layers, K, S, H].
        positions: [B, S] int32, the position of the token in each slot; -1: nothing to look at.
    """

    keys: Store
    values: Store
    positions: Array

    @property
    def capacity(self) -> int:
        """S, the number of slots of a row."""
        return self.positions.shape[1]


class Past(NamedTuple):
    """The cache on its way through the layers.

    Attributes:
        keys, values: as in `Cache`.
        layer: the one that it is at; a Python int in unrolled layers.
        slot: the first one that this call writes to.
    """

    keys: Store
    values: Store
    layer: Array | int
    slot: Array | int

    def extended(self, key: Array, value: Array, span: int) -> tuple[Past, Array, Array]:
        """With this layer's new keys and values; and what it has in its first slots.

        Args:
            key, value: [B, T, K, H].
            span: how many slots are looked at; keys and values [B, span, K, H] of them come back.
        """
        keys, all_keys = self._write(self.keys, key, span)
        values, all_values = self._write(self.values, value, span)
        return Past(keys, values, self.layer + 1, self.slot), all_keys, all_values

    def _write(self, store: Store, new: Array, span: int) -> tuple[Store, Array]:
        if isinstance(store, tuple):
            assert isinstance(self.layer, int)
            block = new.transpose(0, 2, 1, 3).astype(store[0].dtype)
            layer = jax.lax.dynamic_update_slice_in_dim(store[self.layer], block, self.slot, 2)
            store = (*store[: self.layer], layer, *store[self.layer + 1 :])
        else:
            block = new.transpose(0, 2, 1, 3)[:, None].astype(store.dtype)
            store = jax.lax.dynamic_update_slice(store, block, (0, self.layer, 0, self.slot, 0))
            layer = jax.lax.dynamic_index_in_dim(store, self.layer, axis=1, keepdims=False)
        return store, layer[:, :, :span].transpose(0, 2, 1, 3).astype(new.dtype)


def empty(config: LlamaConfig, rows: int, capacity: int, dtype: DTypeLike | None = None) -> Cache:
    """A cache of `capacity` slots for each of `rows` rows, nothing in it.

    Args:
        dtype: of the keys and values; None: the dtype of the computation.
    """
    dtype = config.dtype if dtype is None else dtype
    shape = (config.num_kv_heads, capacity, config.head_dim)

    def store() -> Store:
        if config.scan_layers:
            return jnp.zeros((rows, config.num_layers, *shape), dtype)
        return tuple(jnp.zeros((rows, *shape), dtype) for _ in range(config.num_layers))

    return Cache(store(), store(), jnp.full((rows, capacity), -1, jnp.int32))


def reach(cache: Cache, slot: Array | int, length: int) -> int:
    """How many slots have anything in them, as far as that is known while tracing."""
    return slot + length if isinstance(slot, int) else cache.capacity


def numbered(cache: Cache, mask: Array) -> Array:
    """The positions [B, T] of new tokens that go on with their rows; -1 where `mask` is False."""
    begin = cache.positions.max(axis=1, keepdims=True) + 1
    counted = begin + jnp.cumsum(mask.astype(jnp.int32), axis=1) - 1
    return jnp.where(mask.astype(bool), counted, -1)


def visible_slots(positions: Array, stored: Array, window: int | None) -> Array:
    """Who may look where: bool [B, 1, T, S].

    Args:
        positions: [B, T] of the queries; stored: [B, S] of the slots.
        window: a token sees itself and at most window - 1 before it.
    """
    distance = positions[:, :, None] - stored[:, None, :]
    seen = (stored >= 0)[:, None, :] & (distance >= 0)
    if window is not None:
        seen = seen & (distance < window)
    return seen[:, None]
