"""Softmax attention: in one piece, in blocks of queries, or by the kernel of the platform."""

import functools

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike

from lora_jax.models import attention_kernels
from lora_jax.models.sight import Sight

BLOCK = 128  # queries of one block of a long text
LONG = 1024  # queries; from here on, their scores are not in memory all at once


def attend(
    query: Array,
    key: Array,
    value: Array,
    sight: Sight,
    drop: Array | None = None,
    past: tuple[Array, Array] | None = None,
    *,
    bias: Array | None = None,
    scale: float | None = None,
    cap: float | None = None,
) -> Array:
    """Return softmax(scale query key^T) value, with grouped heads: [B, T, N, H] in the dtype of
    `value`.

    The query is [B, T, N, H], key and value are [B, S, K, H], and query head n uses key head n //
    (N / K). Scores and softmax are in float32. A row that sees nothing stays finite.

    Fewer than `LONG` queries are attended to in one piece (`_whole`). More are computed by the
    kernel of the platform for which the program is lowered (`attention_kernels`), or where none
    takes the options, in blocks of queries (`_by_blocks`). The memory of both grows with the length
    and not with its square.

    Args:
      sight: which tokens each query may look at.
      drop: [B, N, T, S] factors by which the weights are multiplied (dropout), or None.
      past: keys [B, K, H, P] and values [B, K, P, H] of earlier tokens. The sight has them first:
        its S is then P + S. They are not concatenated with the others, which would copy them.
      bias: [B, N, T, S], added to the scores; it cannot be combined with `past`.
      scale: the factor of the scores. None: 1 / sqrt(H).
      cap: if given, scores are limited to (-cap, cap) by cap tanh(scores / cap), before the mask.
    """
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    whole = functools.partial(_whole, scale=scale, cap=cap)
    if past is not None or query.shape[1] < LONG:
        return whole(query, key, value, sight, drop, past, bias=bias)
    blocks = functools.partial(_by_blocks, scale=scale, cap=cap)
    if drop is not None or bias is not None:
        return blocks(query, key, value, sight, drop, bias)
    kernels = attention_kernels.fitting(query, key, sight, scale=scale, cap=cap)
    return jax.lax.platform_dependent(query, key, value, sight, default=blocks, **kernels)


def _whole(
    query: Array,
    key: Array,
    value: Array,
    sight: Sight,
    drop: Array | None = None,
    past: tuple[Array, Array] | None = None,
    *,
    bias: Array | None = None,
    scale: float,
    cap: float | None,
) -> Array:
    """Attend in one piece, with all scores in memory.

    These are plain batched products over (batch, key head): on a CPU they take 0.7 of the time of
    `jax.nn.dot_product_attention` in the forward pass and in the gradient. The query heads that
    share a key head are rows of one product, so keys are never repeated.
    """
    batch, length, heads, width = query.shape
    groups, before = key.shape[2], 0 if past is None else past[0].shape[-1]
    shape = (batch, groups, heads // groups, length, before + key.shape[1])
    rows = (query * scale).transpose(0, 2, 1, 3)
    rows = rows.reshape(batch, groups, heads // groups * length, width)
    scores = _product(rows, key.transpose(0, 2, 3, 1), jnp.float32)
    if past is not None:
        first = jnp.matmul(rows, past[0], preferred_element_type=jnp.float32)
        scores = jnp.concatenate([first, scores], axis=-1)
    scores = capped(scores.reshape(shape), cap)
    if bias is not None:
        scores = scores + bias.reshape(shape)
    mask = sight.mask(length, shape[-1])
    if mask is not None:
        scores = jnp.where(mask[:, :, None], scores, jnp.finfo(jnp.float32).min)
    weights = _softmax(scores)
    if drop is not None:
        weights = weights * drop.reshape(shape)
    weights = weights.astype(value.dtype).reshape(batch, groups, -1, shape[-1])
    mixed = _product(weights[..., before:], value.transpose(0, 2, 1, 3), value.dtype)
    if past is not None:
        mixed = mixed + jnp.matmul(weights[..., :before], past[1])
    return mixed.reshape(batch, heads, length, width).transpose(0, 2, 1, 3)


def _by_blocks(
    query: Array,
    key: Array,
    value: Array,
    sight: Sight,
    drop: Array | None = None,
    bias: Array | None = None,
    *,
    scale: float,
    cap: float | None,
) -> Array:
    """Attend in blocks of `BLOCK` queries, which are computed again for the gradient.

    A row never has more than N x BLOCK x S scores at once.
    """
    length, count = query.shape[1], -(-query.shape[1] // BLOCK)
    # The gradients of keys and values are sums over all blocks, which are formed in float32.
    wide = key.astype(jnp.float32), value.astype(jnp.float32)

    @jax.checkpoint
    def block(start: Array) -> Array:
        cut = functools.partial(jax.lax.dynamic_slice_in_dim, start_index=start, slice_size=BLOCK)
        keys, values = wide[0].astype(key.dtype), wide[1].astype(value.dtype)
        few = cut(query, axis=1)
        few_drop, few_bias = (None if x is None else cut(x, axis=2) for x in (drop, bias))
        seen = sight.block(start, BLOCK)
        return _whole(few, keys, values, seen, few_drop, bias=few_bias, scale=scale, cap=cap)

    # The last block overlaps the one before it if the length is not a multiple.
    mixed = jax.lax.map(block, jnp.minimum(jnp.arange(count) * BLOCK, length - BLOCK))
    rest = length - (count - 1) * BLOCK
    mixed = mixed.swapaxes(0, 1).reshape(query.shape[0], -1, *query.shape[2:])
    return jnp.concatenate([mixed[:, : length - rest], mixed[:, -rest:]], axis=1)


@functools.partial(jax.custom_jvp, nondiff_argnums=(2,))
def _product(x: Array, y: Array, dtype: DTypeLike) -> Array:
    """The product of x [B, K, T, M] and y [B, K, M, S].

    Its derivative along x is written with y transposed. So the gradient of x multiplies with a
    right-hand side [B, K, S, M], for which XLA's CPU compiler has a kernel as fast as that of the
    product itself; with y untransposed it takes 2 to 4 times as long.
    """
    return jnp.matmul(x, y, preferred_element_type=dtype)


@_product.defjvp
def _product_jvp(
    dtype: DTypeLike, primals: tuple[Array, Array], tangents: tuple[Array, Array]
) -> tuple[Array, Array]:
    (x, y), (dx, dy) = primals, tangents
    along_x = jnp.einsum("bktm,bksm->bkts", dx, y.swapaxes(-1, -2), preferred_element_type=dtype)
    return _product(x, y, dtype), along_x + _product(x, dy, dtype)


@jax.custom_jvp
def _softmax(x: Array) -> Array:
    """Softmax over the last axis; its derivative is in terms of the result, the only residual."""
    return jax.nn.softmax(x, axis=-1)


@_softmax.defjvp
def _softmax_jvp(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    y = _softmax(*primals)
    moved = y * tangents[0]
    return y, moved - y * moved.sum(axis=-1, keepdims=True)


def capped(x: Array, cap: float | None) -> Array:
    """Limit x to (-cap, cap) by cap tanh(x / cap); None leaves it as it is."""
    return x if cap is None else cap * jnp.tanh(x / cap)
