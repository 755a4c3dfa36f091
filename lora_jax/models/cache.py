"""The key-value cache of a decoder, which is a plain argument and result of its call.

    logits, new = model.apply(variables, ids, mask, cache=cache)
    token = argmax(logits[:, -1])
    cache = written(cache, new, slot, after=token)

A model only reads a cache and returns the entries of its new tokens. They are written in a separate
step, because that can be done in place for the whole batch, even if the model is mapped over rows
(`jax.vmap` turns a write into a scatter, which copies the cache).

A cache has a fixed number of slots for each row. Every slot stores the position of its token in the
row, which is -1 for padding and for slots that have not been written. A query looks at slots with
positions from 0 to its own (and no further back than the window), so padding may be on either side.

Rows of different lengths are best padded on the left. Then all of them end in the same slot: a
decoding step writes one slot for the whole batch, where right-padded rows would need a scatter or
leave gaps. The next token of a prompt then follows from the logits of its last slot.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike

from lora_jax.models.config import DecoderConfig

Store = Array | tuple[Array, ...]


class Cache(NamedTuple):
    """Keys (rotated by their positions) and values of a batch; every array has the rows first.

    Attributes:
      keys: with unrolled layers a tuple of [B, K, H, S], one for each layer; with scanned layers
        one array [B, layers, K, H, S]. These are the right-hand sides of the first product of
        attention as they are: otherwise every step would transpose, and copy, the whole cache.
      values: the same for the second product, [B, K, S, H] or [B, layers, K, S, H].
      positions: [B, S] int32, the position of the token in each slot; -1 if there is none.
    """

    keys: Store
    values: Store
    positions: Array

    @property
    def capacity(self) -> int:
        """S, the number of slots of a row."""
        return self.positions.shape[1]

    def layer(self, index: Array | int, like: Array) -> tuple[Array, Array]:
        """Return keys [B, K, H, S] and values [B, K, S, H] of a layer, in the dtype of `like`."""
        return _of_layer(self.keys, index, like), _of_layer(self.values, index, like)


def _of_layer(store: Store, index: Array | int, like: Array) -> Array:
    if isinstance(store, tuple):
        assert isinstance(index, int)
        return store[index].astype(like.dtype)
    return jax.lax.dynamic_index_in_dim(store, index, axis=1, keepdims=False).astype(like.dtype)


def empty(config: DecoderConfig, rows: int, capacity: int, dtype: DTypeLike | None = None) -> Cache:
    """Return an empty cache, whose positions are all -1.

    With a capacity of 0, prompts can be read: there is nothing before them. A dtype of None is that
    of the computation.
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
    """Write the entries of T new tokens into the slots `slot` to `slot + T` of all rows.

    `after` are the tokens that were chosen from the logits (any int array >= 0 that depends on
    everything that reads the cache). With it, a cache that is donated to the program is written in
    place. The slot is made to depend on `after`; otherwise XLA, which cannot tell that the reads
    come first, would copy the whole cache before the write (it removes an `optimization_barrier`
    before it decides).
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


def with_rows(cache: Cache, own: Cache, places: Array, shift: Array) -> Cache:
    """Replace the rows `places` of a cache by other ones of the same capacity.

    Their slots are rotated by `shift`, so that they end where the next step writes (a query finds
    tokens by their positions). A place that the cache does not have is left out.
    """

    def put(into: Array, rows: Array, axis: int) -> Array:
        turned = jnp.roll(rows.astype(into.dtype), shift, axis)
        return into.at[places].set(turned, mode="drop")

    return Cache(
        jax.tree.map(lambda into, rows: put(into, rows, -1), cache.keys, own.keys),
        jax.tree.map(lambda into, rows: put(into, rows, -2), cache.values, own.values),
        put(cache.positions, own.positions, -1),
    )


class Fresh(NamedTuple):
    """The entries of new tokens, collected layer by layer: a `Cache` of T slots, or with unrolled
    layers the entries of the layers so far. `at` is the current layer; a Python int in unrolled
    layers."""

    keys: Store
    values: Store
    at: Array | int

    @staticmethod
    def start(config: DecoderConfig, ids: Array) -> Fresh:
        """Return the entries before the first layer, for tokens [B, T]."""
        if not config.scan_layers:
            return Fresh((), (), 0)
        room = empty(config, ids.shape[0], ids.shape[1])
        return Fresh(room.keys, room.values, jnp.int32(0))

    def extended(self, key: Array, value: Array) -> Fresh:
        """Add a layer's keys and values [B, T, K, H], and go to the next layer."""
        keys = self._put(self.keys, key.transpose(0, 2, 3, 1))
        values = self._put(self.values, value.transpose(0, 2, 1, 3))
        return Fresh(keys, values, self.at + 1)

    def _put(self, store: Store, block: Array) -> Store:
        if isinstance(store, tuple):
            return (*store, block)
        return jax.lax.dynamic_update_index_in_dim(store, block, self.at, axis=1)


def numbered(cache: Cache, mask: Array) -> Array:
    """Return the positions [B, T] of tokens that continue their rows; -1 where `mask` is False."""
    begin = cache.positions.max(axis=1, keepdims=True, initial=-1) + 1
    counted = begin + jnp.cumsum(mask.astype(jnp.int32), axis=1) - 1
    return jnp.where(mask.astype(bool), counted, -1)
