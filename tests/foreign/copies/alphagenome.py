"""A small copy of AlphaGenome's structure: a Haiku trunk with statistics, and heads by organism.

Parameters are float32 and products bfloat16, by a policy of jmp. The names are AlphaGenome's.
"""

from __future__ import annotations

from typing import Any

import haiku as hk
import jax
import jax.numpy as jnp
import jmp

from tests.cases import near_ones_and_zeros, normal
from tests.foreign.copies.attention import attend


class RMSBatchNorm(hk.Module):
    """Divides by the root of a moving average, which is Haiku state."""

    def __call__(self, x: Any, is_training: bool) -> Any:
        var = hk.get_state("var_ema", x.shape[-1:], jnp.float32, init=jnp.ones)
        if is_training:
            now = jnp.mean(jnp.square(x), axis=(0, 1), dtype=jnp.float32)
            var = 0.9 * var + 0.1 * jax.lax.stop_gradient(now)
            hk.set_state("var_ema", var)
        scale = hk.get_parameter("scale", x.shape[-1:], x.dtype, init=jnp.ones).astype(x.dtype)
        return x * scale * jax.lax.rsqrt(var + 1e-5).astype(x.dtype)


class StandardizedConv1D(hk.Module):
    """A convolution whose kernel is normalised before it is used."""

    def __call__(self, x: Any) -> Any:
        w = hk.get_parameter("w", (5, x.shape[-1], 8), x.dtype, init=jnp.ones)
        mean, var = w.mean((0, 1), keepdims=True), w.var((0, 1), keepdims=True)
        w = (w - mean) * jax.lax.rsqrt(var + 1e-4)
        return jax.lax.conv_general_dilated(
            x, w.astype(x.dtype), (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC")
        )


class MHABlock(hk.Module):
    """Two heads of queries share one of keys and values."""

    def __call__(self, x: Any, is_training: bool) -> Any:
        h = RMSBatchNorm()(x, is_training)
        q, k, v = (
            hk.Linear(size, with_bias=False, name=f"{name}_layer")(h)
            for name, size in (("q", 8), ("k", 4), ("v", 6))
        )
        y = attend(q.reshape(*q.shape[:2], 2, 4), k, v)
        return hk.Linear(x.shape[-1], name="linear_embedding")(y.reshape(*y.shape[:2], -1))


class MLPBlock(hk.Module):
    def __call__(self, x: Any, is_training: bool) -> Any:
        h = jax.nn.relu(hk.Linear(16)(RMSBatchNorm()(x, is_training)))
        return hk.Linear(x.shape[-1])(h)


class Tracks(hk.Module):
    """A head with a matrix for each organism, which every example looks up."""

    def __call__(self, x: Any, organism: Any) -> Any:
        w = hk.get_parameter("w", (2, x.shape[-1], 3), init=jnp.ones).astype(x.dtype)
        return jnp.einsum("b...i,bij->b...j", x, w[organism], preferred_element_type=jnp.float32)


class AlphaGenome(hk.Module):
    def __call__(self, dna: Any, organism: Any, is_training: bool) -> Any:
        x = hk.Conv1D(8, 5, name="dna_embedder")(dna)
        x += StandardizedConv1D()(jax.nn.gelu(x))
        x = hk.max_pool(x, (2, 1), (2, 1), "SAME")
        x += hk.Embed(2, 8)(organism)[:, None]
        for _ in range(2):
            x += MHABlock()(x, is_training)
            x += MLPBlock()(x, is_training)
        with hk.name_scope("head"):
            return Tracks("atac")(x, organism)


def transformed(compute: str = "bfloat16") -> hk.TransformedWithState:
    """Return tracks [batch, bins, tracks] of sequences [batch, bases, 4], as a Haiku function."""
    policy = jmp.get_policy(f"params=float32,compute={compute},output={compute}")

    def forward(dna: Any, organism: Any, is_training: bool = False) -> Any:
        with hk.mixed_precision.push_policy(AlphaGenome, policy):
            return AlphaGenome(name="alphagenome")(dna, organism, is_training)

    return hk.transform_with_state(forward)


def create() -> tuple[Any, Any]:
    """Parameters and state, drawn by NumPy, which compiles nothing."""
    shapes = jax.eval_shape(transformed().init, jax.random.key(0), *example())
    return near_ones_and_zeros(shapes[0]), jax.tree.map(lambda x: jnp.ones(x.shape), shapes[1])


def example() -> tuple[jax.Array, jax.Array]:
    """Sequences and their organisms."""
    return normal(1, 2, 16, 4), jnp.array([0, 1])
