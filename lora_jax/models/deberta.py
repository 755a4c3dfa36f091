"""The parts that DeBERTa v2 and v3 add to BERT (He et al., arXiv 2006.03654, 2111.09543).

Disentangled attention: a score is the sum of content to content, content to relative position and
position to content. The positions are rows of one table of distances, which all layers share; large
distances share a row. The large models of v2 also add a convolution of the embeddings to the output
of the first layer.
"""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from lora_jax.models.config import BertConfig, Disentangled
from lora_jax.models.layers import ACTIVATIONS, INITIAL, norm


class Distances(NamedTuple):
    """The rows [2 * span, D] of the table, and the row of each pair [T, T] of tokens."""

    rows: Array
    of_pair: Array


class RelativePositions(nn.Module):
    """The table of distances: `embedding`, and a `norm` of it."""

    config: BertConfig
    relative: Disentangled

    @nn.compact
    def __call__(self, length: int) -> Distances:
        config, relative = self.config, self.relative
        shape = (2 * relative.span, config.hidden_size)
        rows = self.param("embedding", INITIAL, shape, config.param_dtype).astype(config.dtype)
        if relative.norm:
            rows = norm(config, "norm")(rows)
        place = jnp.arange(length)
        between = place[:, None] - place[None, :] + length - 1
        return Distances(rows, jnp.asarray(_row_of(relative, length))[between])


def _row_of(relative: Disentangled, length: int) -> np.ndarray:
    """Return the row of each distance from 1 - length to length - 1.

    Distances up to half of the buckets have a row each; beyond, the buckets are logarithmic. The
    rounding is that of float32, with which the published models were trained.
    """
    distance = np.arange(1 - length, length)
    if relative.buckets:
        half, far = relative.buckets // 2, np.float32(relative.distances - 1)
        size = np.maximum(np.abs(distance), half).astype(np.float32)
        scale = np.log(far / np.float32(half))
        wide = np.ceil(np.log(size / np.float32(half)) / scale * (half - 1)) + half
        near = np.abs(distance) <= half
        distance = np.where(near, distance, np.sign(distance) * wide.astype(np.int64))
    span = relative.span
    return np.clip(distance + span, 0, 2 * span - 1).astype(np.int32)


def position_scores(
    query: Array, key: Array, by_position: tuple[Array | None, Array | None], index: Array
) -> Array:
    """Return the unscaled scores of content to position and of position to content, float32 [B, N,
    T, T].

    Queries and keys are [B, T, N, H]; `by_position` has keys and queries [P, N, H] of the
    positions, or None for no such scores; `index` [T, T] is the row of each pair.
    """
    batch, length, heads, _ = query.shape
    shape = (batch, heads, length, length)
    total = jnp.zeros(shape, jnp.float32)
    for rows, positions in zip((query, key), by_position, strict=True):
        if positions is None:
            continue
        operands = ("btnh,pnh->bntp", rows, positions)
        each = jnp.einsum(*operands, preferred_element_type=jnp.float32)
        # A key takes the pairs in which it is the second token.
        which = jnp.broadcast_to((index if rows is query else index.T)[None, None], shape)
        found = jnp.take_along_axis(each, which, axis=-1)
        total = total + (found if rows is query else found.swapaxes(-1, -2))
    return total


class Convolved(NamedTuple):
    """The convolution that is added to the first layer's output, and the norm of the sum."""

    values: Array
    scale: Array
    bias: Array
    mask: Array

    def joined(self, x: Array, eps: float) -> Array:
        """Return the layer norm of the sum, zero at padding."""
        wide = (x + self.values).astype(jnp.float32)
        mean = wide.mean(-1, keepdims=True)
        wide = (wide - mean) * jax.lax.rsqrt(wide.var(-1, keepdims=True) + eps)
        wide = wide * self.scale[None, None] + self.bias[None, None]
        return jnp.where(self.mask, wide, 0.0).astype(x.dtype)


class Convolution(nn.Module):
    """A convolution of the embeddings along the row, and the parameters of the norm after it."""

    config: BertConfig
    relative: Disentangled
    deterministic: bool = True

    @nn.compact
    def __call__(self, x: Array, mask: Array | None) -> Convolved:
        config, relative = self.config, self.relative
        real = jnp.ones(x.shape[:2], bool) if mask is None else mask.astype(bool)
        real = real[:, :, None]
        values = nn.Conv(
            config.hidden_size,
            (relative.conv_size,),
            feature_group_count=relative.conv_groups,
            dtype=config.dtype,
            param_dtype=config.param_dtype,
            name="conv",
        )(jnp.where(real, x, 0))
        drop = nn.Dropout(config.dropout, deterministic=self.deterministic)
        values = ACTIVATIONS[relative.conv_activation](drop(jnp.where(real, values, 0)))
        shape, dtype = (config.hidden_size,), config.param_dtype
        scale = self.param("scale", nn.initializers.ones, shape, dtype)
        bias = self.param("bias", nn.initializers.zeros, shape, dtype)
        return Convolved(values, scale, bias, real)
