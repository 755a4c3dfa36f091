"""Softmax attention, and the masks of padded and of packed rows."""

import functools
import operator

import jax
import jax.numpy as jnp
from jax import Array


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
    """softmax(scale query key^T) value, over grouped heads.

    Plain batched products over (batch, key head): on a CPU they take 0.7 of the time of
    `jax.nn.dot_product_attention` in the forward pass and in the gradient. The query heads
    that share a key head are rows of one product, so keys are never repeated.

    Args:
        query: [B, T, N, H]; query head n reads key head n // (N / K).
        key, value: [B, S, K, H], K divides N.
        mask: bool, broadcastable to [B, 1, T, S]; True where a query may look. A row without
            any True attends to everything alike, and stays finite.
        drop: [B, N, T, S] factors that the weights are multiplied with (dropout), or None.
        past: keys [B, K, H, P] and values [B, K, P, H] from before, which the mask has first:
            its S is then P + S. They are not joined with the others, which would copy them.
        bias: [B, N, T, S], is added to the scores; goes with no past.
        scale: None: 1 / sqrt(H).
        cap: scores are squeezed into (-cap, cap), by cap tanh(scores / cap), before the mask.

    Returns:
        [B, T, N, H] in the dtype of `value`; scores and softmax are in float32.
    """
    batch, length, heads, width = query.shape
    groups, before = key.shape[2], 0 if past is None else past[0].shape[-1]
    shape = (batch, groups, heads // groups, length, before + key.shape[1])
    rows = (query * (width**-0.5 if scale is None else scale)).transpose(0, 2, 1, 3)
    rows = rows.reshape(batch, groups, heads // groups * length, width)
    scores = jnp.matmul(rows, key.transpose(0, 2, 3, 1), preferred_element_type=jnp.float32)
    if past is not None:
        first = jnp.matmul(rows, past[0], preferred_element_type=jnp.float32)
        scores = jnp.concatenate([first, scores], axis=-1)
    scores = capped(scores.reshape(shape), cap)
    if bias is not None:
        scores = scores + bias.reshape(shape)
    if mask is not None:
        scores = jnp.where(mask[:, :, None], scores, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1)
    if drop is not None:
        weights = weights * drop.reshape(shape)
    weights = weights.astype(value.dtype).reshape(batch, groups, -1, shape[-1])
    mixed = jnp.matmul(weights[..., before:], value.transpose(0, 2, 1, 3))
    if past is not None:
        mixed = mixed + jnp.matmul(weights[..., :before], past[1])
    return mixed.reshape(batch, heads, length, width).transpose(0, 2, 1, 3)


def capped(x: Array, cap: float | None) -> Array:
    """X squeezed into (-cap, cap); None leaves it as it is."""
    return x if cap is None else cap * jnp.tanh(x / cap)


def visible(
    length: int,
    mask: Array | None = None,
    segment_ids: Array | None = None,
    *,
    causal: bool = False,
    window: int | None = None,
) -> Array | None:
    """Who may look at whom: bool, broadcastable to [B, 1, T, T]; None when all may see all.

    Args:
        length: T.
        mask: [B, T]; True at real tokens, which alone are looked at.
        segment_ids: [B, T] int; a token sees its own segment only.
        causal: a token sees itself and the ones before it.
        window: a token sees itself, and at most window - 1 before it and, unless causal, as many
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
    """Positions that start anew with each segment: [B, T] ids of adjacent segments -> [B, T]."""
    index = jnp.broadcast_to(jnp.arange(segment_ids.shape[1]), segment_ids.shape)
    first = jnp.ones_like(segment_ids[:, :1], bool)
    starts = jnp.concatenate([first, segment_ids[:, 1:] != segment_ids[:, :-1]], axis=1)
    return index - jax.lax.cummax(jnp.where(starts, index, 0), axis=1)
