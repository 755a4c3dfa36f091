"""The key-value cache of a decoder, a plain argument and result of its call.

    logits, new = model.apply(variables, ids, mask, cache=cache)
    token = argmax(logits[:, -1])
    cache = written(cache, new, slot, after=token)

A model only reads a cache, and gives back the entries of its new tokens. Writing them is a step of
its own, for it happens to the whole batch at once and in place, whatever the model's rows are
mapped over (`jax.vmap` makes a scatter of a write, which copies the cache).

A cache has a fixed number of slots for each row, and every slot notes the position that its token
has in its own row: -1 for padding and for slots not yet written. A query looks at the slots with
positions from 0 to its own (no further back than the window), so padding may lie on either side.

Rows of unequal length are best padded on the left. All of them then end in the same slot: a step
of decoding writes one slot for the whole batch, where right-padded rows would need a scatter or
leave holes; and the logits that follow a prompt are those of its last slot.
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
        keys, values: with unrolled layers a tuple of [B, K, H, S] and of [B, K, S, H], one for each
            layer; with scanned layers one array [B, layers, K, H, S] and [B, layers, K, S, H]. So
            they are the right-hand sides of attention's two products as they lie: transposed, all
            of the cache would be copied at every step.
        positions: [B, S] int32, the position of the token in each slot; -1: nothing to look at.
    """

    keys: Store
    values: Store
    positions: Array

    @property
    def capacity(self) -> int:
        """S, the number of slots of a row."""
        return self.positions.shape[1]

    def layer(self, index: Array | int, like: Array) -> tuple[Array, Array]:
        """Keys [B, K, H, S] and values [B, K, S, H] of one layer, in the dtype of `like`."""
        return _of_layer(self.keys, index, like), _of_layer(self.values, index, like)


def _of_layer(store: Store, index: Array | int, like: Array) -> Array:
    if isinstance(store, tuple):
        assert isinstance(index, int)
        return store[index].astype(like.dtype)
    return jax.lax.dynamic_index_in_dim(store, index, axis=1, keepdims=False).astype(like.dtype)


def empty(config: LlamaConfig, rows: int, capacity: int, dtype: DTypeLike | None = None) -> Cache:
    """A cache of `capacity` slots for each of `rows` rows, nothing in it.

    Args:
        capacity: 0 where there is nothing to be remembered yet: prompts are read on it.
        dtype: of the keys and values; None: the dtype of the computation.
    """
    dtype = config.dtype if dtype is None else dtype
    heads, width = config.num_kv_heads, config.head_dim

    def store(*shape: int) -> Store:
        if config.scan_layers:
            return jnp.zeros((rows, config.num_layers, *shape), dtype)
        return tuple(jnp.zeros((rows, *shape), dtype) for _ in range(config.num_layers))

    keys, values = store(heads, width, capacity), store(heads, capacity, width)
    return Cache(keys, values, jnp.full((rows, capacity), -1, jnp.int32))


def written(cache: Cache, new: Cache, slot: Array | int, after: Array | None = None) -> Cache:
    """The cache with entries of T tokens in the slots `slot` to `slot + T` of all rows.

    Args:
        slot: `slot + T` may not go beyond the capacity.
        after: the tokens that were chosen by the logits (any int array >= 0 that depends on all
            that reads the cache). With it a cache that is donated to the program is written in
            place: the slot is made to depend on it, or XLA, which cannot tell that the reading
            comes first, would copy all of the cache before (an `optimization_barrier` is gone by
            the time it decides).
    """
    if after is not None:
        slot = slot + jnp.minimum(after.max(), 0)

    def put(into: Array, block: Array, axis: int) -> Array:
        block = block.astype(into.dtype)
        return jax.lax.dynamic_update_slice_in_dim(into, block, slot, into.ndim + axis)

    return Cache(
        jax.tree.map(lambda into, block: put(into, block, -1), cache.keys, new.keys),
        jax.tree.map(lambda into, block: put(into, block, -2), cache.values, new.values),
        put(cache.positions, new.positions, -1),
    )


class Fresh(NamedTuple):
    """The entries of new tokens, gathered on the way through the layers.

    Attributes:
        keys, values: as in a `Cache` of T slots; of unrolled layers those passed so far.
        at: the layer that it is at; a Python int in unrolled layers.
    """

    keys: Store
    values: Store
    at: Array | int

    @staticmethod
    def start(config: LlamaConfig, ids: Array) -> Fresh:
        """Before the first layer, of tokens [B, T]."""
        if not config.scan_layers:
            return Fresh((), (), 0)
        room = empty(config, ids.shape[0], ids.shape[1])
        return Fresh(room.keys, room.values, jnp.int32(0))

    def extended(self, key: Array, value: Array) -> Fresh:
        """With this layer's keys and values [B, T, K, H], at the next layer."""
        keys = self._put(self.keys, key.transpose(0, 2, 3, 1))
        values = self._put(self.values, value.transpose(0, 2, 1, 3))
        return Fresh(keys, values, self.at + 1)

    def _put(self, store: Store, block: Array) -> Store:
        if isinstance(store, tuple):
            return (*store, block)
        return jax.lax.dynamic_update_index_in_dim(store, block, self.at, axis=1)


def numbered(cache: Cache, mask: Array) -> Array:
    """The positions [B, T] of new tokens that go on with their rows; -1 where `mask` is False."""
    begin = cache.positions.max(axis=1, keepdims=True, initial=-1) + 1
    counted = begin + jnp.cumsum(mask.astype(jnp.int32), axis=1) - 1
    return jnp.where(mask.astype(bool), counted, -1)


def visible_slots(positions: Array, slots: Array, window: int | None) -> Array:
    """Who may look where: bool [B, 1, T, S].

    Args:
        positions: [B, T] of the queries; slots: [B, S], of what there is to look at.
        window: a token sees itself and at most window - 1 before it.
    """
    distance = positions[:, :, None] - slots[:, None, :]
    seen = (slots >= 0)[:, None, :] & (distance >= 0)
    if window is not None:
        seen = seen & (distance < window)
    return seen[:, None]
