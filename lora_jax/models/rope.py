"""Rotary position embeddings in the half-split form (Su et al., arXiv 2104.09864).

The pair that position p rotates by the angle p * theta^(-2i/H) is (x[i], x[i + H/2]), as in Hugging
Face checkpoints. (GGUF files of the Llama architecture have the pairs (x[2i], x[2i+1]); their
loader reorders them.)
"""

import math

import jax.numpy as jnp
from jax import Array

from lora_jax.models.config import LongRope


def angles(
    positions: Array,
    rotated: int,
    theta: float,
    divisors: tuple[float, ...] | None = None,
    long: LongRope | None = None,
    amplitude: float = 1.0,
) -> tuple[Array, Array]:
    """Return the cosine and sine of every pair's angle, for positions [B or 1, T].

    They are float32 [B or 1, T, 1, R], in the form that `rotate` needs: each half is repeated, and
    the first half of the sine is negated.

    Args:
      rotated: R, the number of elements of a head that are rotated.
      divisors: R/2 numbers that the frequencies are divided by, or None.
      long: other divisors, used in a row with a position beyond its length (LongRoPE, arXiv
        2402.13753).
      amplitude: a factor of both results.
    """
    frequencies = theta ** (-jnp.arange(0, rotated, 2, dtype=jnp.float32) / rotated)
    each = frequencies if divisors is None else frequencies / jnp.asarray(divisors, jnp.float32)
    each = each[None, None, None]
    if long is not None:
        beyond = positions.max(axis=1)[:, None, None, None] >= long.length
        stretched = frequencies / jnp.asarray(long.divisors, jnp.float32)
        each = jnp.where(beyond, stretched[None, None, None], each)
    angle = positions.astype(jnp.float32)[:, :, None, None] * each
    cos, sin = jnp.cos(angle) * amplitude, jnp.sin(angle) * amplitude
    return jnp.concatenate([cos, cos], -1), jnp.concatenate([-sin, sin], -1)


def rotate(x: Array, turn: tuple[Array, Array]) -> Array:
    """Rotate the first R elements of each head of x [B, T, N, H] by `angles`, computed in
    float32."""
    cos, sin = turn
    rotated = cos.shape[-1]
    wide = x[..., :rotated].astype(jnp.float32)
    swapped = jnp.roll(wide, rotated // 2, axis=-1)
    turned = (wide * cos + swapped * sin).astype(x.dtype)
    return jnp.concatenate([turned, x[..., rotated:]], -1) if rotated < x.shape[-1] else turned


def linear_divisors(head_dim: int, factor: float) -> tuple[float, ...]:
    """Return divisors for position interpolation (arXiv 2306.15595): `factor` for every
    frequency."""
    return (float(factor),) * (head_dim // 2)


def llama3_divisors(
    head_dim: int,
    theta: float,
    *,
    factor: float,
    low: float,
    high: float,
    original_length: int,
) -> tuple[float, ...]:
    """Return Llama 3.1's divisors: `factor` for long waves, 1 for short ones, mixed in between.

    `low` and `high` are `low_freq_factor` and `high_freq_factor` of the published config,
    `original_length` is the context length of the pretraining.
    """
    divisors = []
    for index in range(0, head_dim, 2):
        wavelength = 2 * math.pi * theta ** (index / head_dim)
        kept = (original_length / wavelength - low) / (high - low)
        kept = min(max(kept, 0.0), 1.0)
        divisors.append(1.0 / ((1.0 - kept) / factor + kept))
    return tuple(divisors)
