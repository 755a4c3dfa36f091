"""Rotary position embeddings in the half-split form (Su et al., arXiv 2104.09864).

The pair that position p turns by the angle p * theta^(-2i/H) is (x[i], x[i + H/2]), as Hugging
Face checkpoints have it. (GGUF files of the Llama architecture keep the pairs (x[2i], x[2i+1]):
their loader undoes that.)
"""

import math

import jax.numpy as jnp
from jax import Array


def angles(
    positions: Array, head_dim: int, theta: float, divisors: tuple[float, ...] | None = None
) -> tuple[Array, Array]:
    """The cosine and sine of every pair's angle.

    Args:
        positions: [B or 1, T] int.
        head_dim: H; divisors: H/2 numbers that the frequencies are divided by, or None.

    Returns:
        Two float32 arrays [B or 1, T, 1, H], each half repeated, the first half of sin negated:
        the form that `rotate` uses.
    """
    frequencies = theta ** (-jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
    if divisors is not None:
        frequencies = frequencies / jnp.asarray(divisors, jnp.float32)
    angle = positions.astype(jnp.float32)[:, :, None, None] * frequencies[None, None, None]
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    return jnp.concatenate([cos, cos], -1), jnp.concatenate([-sin, sin], -1)


def rotate(x: Array, turn: tuple[Array, Array]) -> Array:
    """Turn x [B, T, N, H] by `angles`; computed in float32, returned in the dtype of x."""
    cos, sin = turn
    wide = x.astype(jnp.float32)
    swapped = jnp.roll(wide, x.shape[-1] // 2, axis=-1)
    return (wide * cos + swapped * sin).astype(x.dtype)


def linear_divisors(head_dim: int, factor: float) -> tuple[float, ...]:
    """Position interpolation (arXiv 2306.15595): every frequency divided by `factor`."""
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
    """Llama 3.1's scaling: long waves are stretched by `factor`, short ones kept, in between mixed.

    Args:
        low, high: `low_freq_factor` and `high_freq_factor` of the published configuration.
        original_length: the context length that the model was pretrained with.
    """
    divisors = []
    for index in range(0, head_dim, 2):
        wavelength = 2 * math.pi * theta ** (index / head_dim)
        kept = (original_length / wavelength - low) / (high - low)
        kept = min(max(kept, 0.0), 1.0)
        divisors.append(1.0 / ((1.0 - kept) / factor + kept))
    return tuple(divisors)
