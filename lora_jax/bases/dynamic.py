"""Scales in 8 bits: double quantisation, or nested statistics in bitsandbytes."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax.base import Base

BLOCK = 256  # the number of scales that share a scale


@dataclasses.dataclass(frozen=True)
class Dynamic(Base):
    """Float32 scales as 8-bit codes of a dynamic map (arXiv 1511.04561).

    `scale[i] = table[codes[i]] * scales[i // 256] + offset`, over a slice's scales in order.

    Attributes:
      codes: uint8 [*lead, rows, blocks].
      scales: float32 [*lead, ceil(rows * blocks / 256)].
      offset: float32 [*lead], the mean of the scales before they were quantised.
      table: float32 [*lead, 256]. A file has its own.
    """

    codes: jax.Array
    scales: jax.Array
    offset: jax.Array
    table: jax.Array

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.codes.shape)

    @property
    def dtype(self) -> np.dtype:
        return jnp.dtype(jnp.float32)

    def dense(self) -> jax.Array:
        *lead, rows, blocks = self.codes.shape
        codes = self.codes.reshape(*lead, rows * blocks)
        values = jax.lax.platform_dependent(self.table, codes, default=_gathered, tpu=selected)
        scales = jnp.repeat(self.scales, BLOCK, axis=-1)[..., : rows * blocks]
        return (values * scales + self.offset[..., None]).reshape(self.shape)


jax.tree_util.register_dataclass(Dynamic, ["codes", "scales", "offset", "table"], [])


def _gathered(table: jax.Array, codes: jax.Array) -> jax.Array:
    return jnp.take_along_axis(table, codes.astype(jnp.int32), axis=-1, mode="promise_in_bounds")


def selected(table: jax.Array, codes: jax.Array) -> jax.Array:
    """Look up float32 [*lead, 256] at codes [*lead, n] without a gather.

    A TPU gathers numbers one by one. It fuses this sum, of one entry and 255 zeros, into one pass
    over the codes.
    """
    entry = jnp.expand_dims(jnp.arange(256, dtype=codes.dtype), (*range(codes.ndim - 1), -1))
    found = jnp.where(codes[..., None, :] == entry, table[..., None], jnp.float32(0))
    return jnp.sum(found, axis=-2)


def quantise(scales: jax.Array) -> Dynamic:
    """Quantise the scales of one slice, float32 [rows, blocks].

    A scale gets the code of the nearest entry of the table; a tie takes the lower entry. This is
    the rule of the bitsandbytes kernels for GPUs, which wrote the published checkpoints. Its kernel
    for CPUs looks up a rounded value, and differs in a few codes out of a hundred.
    """
    offset = jnp.mean(scales)
    flat = (scales - offset).reshape(-1)
    groups = -(-flat.size // BLOCK)
    blocks = jnp.pad(flat, (0, groups * BLOCK - flat.size)).reshape(groups, BLOCK)
    absmax = jnp.max(jnp.abs(blocks), axis=1)
    table = jnp.asarray(dynamic_map())
    scaled = jnp.clip(blocks * reciprocal(absmax)[:, None], -1, 1)
    # `left` counts only the midpoints below, so a tie takes the lower entry.
    middles = (table[:-1] + table[1:]) * np.float32(0.5)
    codes = jnp.searchsorted(middles, scaled, side="left").astype(jnp.uint8)
    return Dynamic(codes.reshape(-1)[: flat.size].reshape(scales.shape), absmax, offset, table)


def reciprocal(absmax: jax.Array) -> jax.Array:
    """Return 1 / absmax, or 0 for a block whose largest number is zero or too small to invert."""
    tiny = np.finfo(np.float32).tiny
    return jnp.where(absmax < tiny, jnp.zeros_like(absmax), 1 / jnp.maximum(absmax, tiny))


@functools.cache
def dynamic_map() -> np.ndarray:
    """Return the 256 signed values of bitsandbytes' `create_dynamic_map`, sorted.

    There are seven decades from 1e-6 to 1. Decade i has 2**i values of each sign, evenly spaced
    over the upper nine tenths of the decade. 0 and 1 complete the table.
    """
    values = [0.0, 1.0]
    for decade in range(7):
        edges = _linspace(2**decade + 1)
        means = (edges[:-1] + edges[1:]) / np.float32(2)
        scaled = np.float32(10.0 ** (decade - 6)) * means
        values += [*scaled.tolist(), *(-scaled).tolist()]
    return np.array(sorted(values), np.float32)


def _linspace(steps: int) -> np.ndarray:
    """Return values from 0.1 to 1 as torch computes them: from both ends, each rounded once."""
    start, end = np.float32(0.1), np.float32(1)
    step = np.float64((end - start) / np.float32(steps - 1))
    index = np.arange(steps)
    forward, backward = start + step * index, end - step * (steps - 1 - index)
    return np.where(index < steps // 2, forward, backward).astype(np.float32)
