"""Softmax attention, and the masks of padded and of packed rows."""

import functools
import operator
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike

BLOCK = 128  # queries of one block of a long text
LONG = 4096  # queries; above this they are computed block by block


def attend(
    query: Array,
    key: Array,
    value: Array,
    mask: Array | None,
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
    (N / K). These are plain batched products over (batch, key head): on a CPU they take 0.7 of the
    time of `jax.nn.dot_product_attention` in the forward pass and in the gradient. The query heads
    that share a key head are rows of one product, so keys are never repeated. Scores and softmax
    are in float32.

    More than `LONG` queries are computed in blocks of `BLOCK`, and again for the gradient. So a
    row never has more than N x BLOCK x S scores at once. Their memory grows with the length and not
    with its square; the mask, which the caller forms, still grows with the square.

    Args:
      mask: bool, broadcastable to [B, 1, T, S]; True where a query may look. A row without any
        True attends equally to everything, and stays finite.
      drop: [B, N, T, S] factors by which the weights are multiplied (dropout), or None.
      past: keys [B, K, H, P] and values [B, K, P, H] of earlier tokens. The mask has them first:
        its S is then P + S. They are not concatenated with the others, which would copy them.
      bias: [B, N, T, S], added to the scores; it cannot be combined with `past`.
      scale: the factor of the scores. None: 1 / sqrt(H).
      cap: if given, scores are limited to (-cap, cap) by cap tanh(scores / cap), before the mask.
    """
    if past is None and query.shape[1] > LONG:
        few = functools.partial(attend, scale=scale, cap=cap)
        return _by_blocks(few, query, key, value, mask, drop, bias)
    batch, length, heads, width = query.shape
    groups, before = key.shape[2], 0 if past is None else past[0].shape[-1]
    shape = (batch, groups, heads // groups, length, before + key.shape[1])
    rows = (query * (width**-0.5 if scale is None else scale)).transpose(0, 2, 1, 3)
    rows = rows.reshape(batch, groups, heads // groups * length, width)
    scores = _product(rows, key.transpose(0, 2, 3, 1), jnp.float32)
    if past is not None:
        first = jnp.matmul(rows, past[0], preferred_element_type=jnp.float32)
        scores = jnp.concatenate([first, scores], axis=-1)
    scores = capped(scores.reshape(shape), cap)
    if bias is not None:
        scores = scores + bias.reshape(shape)
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
    few: Callable[..., Array],
    query: Array,
    key: Array,
    value: Array,
    mask: Array | None,
    drop: Array | None,
    bias: Array | None,
) -> Array:
    """Return the attention of all queries, of which `few` computes `BLOCK` at a time."""
    length, count = query.shape[1], -(-query.shape[1] // BLOCK)
    # The gradients of keys and values are sums over all blocks, which are formed in float32.
    wide = key.astype(jnp.float32), value.astype(jnp.float32)

    @jax.checkpoint
    def block(start: Array) -> Array:
        def rows(x: Array | None, axis: int) -> Array | None:
            if x is None or x.shape[axis] == 1:
                return x
            return jax.lax.dynamic_slice_in_dim(x, start, BLOCK, axis)

        keys, values = wide[0].astype(key.dtype), wide[1].astype(value.dtype)
        return few(rows(query, 1), keys, values, rows(mask, 2), rows(drop, 2), bias=rows(bias, 2))

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


def visible(
    length: int,
    mask: Array | None = None,
    segment_ids: Array | None = None,
    *,
    causal: bool = False,
    window: int | None = None,
) -> Array | None:
    """Return the attention mask of rows: bool, broadcastable to [B, 1, T, T]; None if all see all.

    Only real tokens (`mask` [B, T]) of the same segment (`segment_ids` [B, T]) are seen. With a
    window a token sees itself, at most window - 1 tokens before it and, unless causal, as many
    after it.
    """
    parts = []
    distance = jnp.arange(length)[:, None] - jnp.arange(length)[None, :]
    if causal:
        parts.append((distance >= 0)[None, None])
    if window is not None and window < length:
        distance = distance if causal else jnp.abs(distance)
        parts.append((distance < window)[None, None])
    if mask is not None:
        parts.append(mask.astype(bool)[:, None, None, :])
    if segment_ids is not None:
        parts.append((segment_ids[:, :, None] == segment_ids[:, None, :])[:, None])
    return functools.reduce(operator.and_, parts) if parts else None


def positions_in(segment_ids: Array) -> Array:
    """Return positions [B, T] that restart with each segment; equal ids must be adjacent."""
    index = jnp.broadcast_to(jnp.arange(segment_ids.shape[1]), segment_ids.shape)
    first = jnp.ones_like(segment_ids[:, :1], bool)
    starts = jnp.concatenate([first, segment_ids[:, 1:] != segment_ids[:, :-1]], axis=1)
    return index - jax.lax.cummax(jnp.where(starts, index, 0), axis=1)
