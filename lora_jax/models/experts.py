"""A mixture of experts (Shazeer et al., arXiv 1701.06538), which sends each token to a few of them.

The tokens are sorted by their experts, so that the rows of each expert are one block of a
`jax.lax.ragged_dot`: no token is dropped, and no expert computes a token that was not sent to it.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

from lora_jax.models.config import DecoderConfig
from lora_jax.models.layers import ACTIVATIONS, INITIAL, dense


class _Bank(nn.Module):
    """The kernels [E, in, out] of one product of all experts."""

    config: DecoderConfig
    features: int

    @nn.compact
    def __call__(self, x: Array, sizes: Array) -> Array:
        """Multiply rows [R, in] to [R, out]; the first sizes[0] rows belong to expert 0."""
        config = self.config
        shape = (config.num_experts, x.shape[-1], self.features)
        kernel = self.param("kernel", INITIAL, shape, config.param_dtype)
        return jax.lax.ragged_dot(x, kernel.astype(x.dtype), sizes)


class _Experts(nn.Module):
    config: DecoderConfig

    @nn.compact
    def __call__(self, x: Array, sizes: Array) -> Array:
        config = self.config
        gate = _Bank(config, config.mlp_size, name="gate")(x, sizes)
        up = _Bank(config, config.mlp_size, name="up")(x, sizes)
        wide = ACTIVATIONS[config.activation](gate) * up
        return _Bank(config, config.hidden_size, name="down")(wide, sizes)


class ExpertMlp(nn.Module):
    """The router and the experts, which replace an MLP: `router/kernel` [D, E] and
    `experts/{gate,up,down}/kernel` [E, in, out]."""

    config: DecoderConfig

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Map [B, T, D] to [B, T, D]."""
        config, many = self.config, self.config.experts_per_token
        tokens = x.reshape(-1, x.shape[-1])
        logits = dense(config, config.num_experts, "router", bias=False)(tokens)
        shares = jax.nn.softmax(logits.astype(jnp.float32), axis=-1)
        weights, chosen = jax.lax.top_k(shares, many)
        if config.renormalised:
            weights = weights / weights.sum(axis=-1, keepdims=True)
        chosen = chosen.reshape(-1)
        order = jnp.argsort(chosen)
        sizes = (chosen[:, None] == jnp.arange(config.num_experts)[None]).sum(
            axis=0, dtype=jnp.int32
        )
        rows = _Experts(config, name="experts")(tokens[order // many], sizes)
        each = rows[jnp.argsort(order)].reshape(*weights.shape, -1)
        mixed = (each * weights[..., None].astype(each.dtype)).sum(axis=1)
        return mixed.reshape(x.shape)
