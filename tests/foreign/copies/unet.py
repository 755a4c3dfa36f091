"""A small copy of maxdiffusion's U-Net: residual blocks, attention to a text, and a skip.

It has the names of diffusers' Flax model, from which maxdiffusion's comes.
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from tests.cases import near_ones_and_zeros, normal


class Resnet(nn.Module):
    size: int

    @nn.compact
    def __call__(self, x: Any, time: Any) -> Any:
        y = nn.Conv(self.size, (3, 3), name="conv1")(nn.silu(nn.GroupNorm(2, name="norm1")(x)))
        y += nn.Dense(self.size, name="time_emb_proj")(nn.silu(time))[:, None, None]
        y = nn.Conv(self.size, (3, 3), name="conv2")(nn.silu(nn.GroupNorm(2, name="norm2")(y)))
        same = x.shape[-1] == self.size
        return y + (x if same else nn.Conv(self.size, (1, 1), name="conv_shortcut")(x))


class Attention(nn.Module):
    @nn.compact
    def __call__(self, x: Any, others: Any) -> Any:
        size = x.shape[-1]
        q, k, v = (
            nn.Dense(size, use_bias=False, name=name)(y).reshape(*y.shape[:2], 2, -1)
            for name, y in (("to_q", x), ("to_k", others), ("to_v", others))
        )
        y = nn.dot_product_attention(q, k, v).reshape(x.shape)
        return nn.Dense(size, name="to_out_0")(y)


class Block(nn.Module):
    @nn.compact
    def __call__(self, x: Any, text: Any) -> Any:
        y = nn.LayerNorm(name="norm1")(x)
        x += Attention(name="attn1")(y, y)
        x += Attention(name="attn2")(nn.LayerNorm(name="norm2")(x), text)
        y, gate = jnp.split(nn.Dense(16, name="net_0_proj")(nn.LayerNorm(name="norm3")(x)), 2, -1)
        return x + nn.Dense(x.shape[-1], name="net_2")(y * nn.gelu(gate))


class Transformer(nn.Module):
    @nn.compact
    def __call__(self, x: Any, text: Any) -> Any:
        size = x.shape[-1]
        y = nn.Conv(size, (1, 1), name="proj_in")(nn.GroupNorm(2, name="norm")(x))
        y = Block(name="transformer_blocks_0")(y.reshape(len(x), -1, size), text)
        return x + nn.Conv(size, (1, 1), name="proj_out")(y.reshape(x.shape))


class Stage(nn.Module):
    size: int
    attends: bool = True

    @nn.compact
    def __call__(self, x: Any, time: Any, text: Any) -> Any:
        x = Resnet(self.size, name="resnets_0")(x, time)
        return Transformer(name="attentions_0")(x, text) if self.attends else x


class UNet(nn.Module):
    """Noise [batch, height, width, 3] of latents, given a time and a text [batch, length, 6]."""

    @nn.compact
    def __call__(self, latents: Any, time: Any, text: Any) -> Any:
        waves = jnp.stack([jnp.sin(time), jnp.cos(time)], -1)
        time = nn.Dense(8, name="linear_1")(waves)
        time = nn.Dense(8, name="linear_2")(nn.silu(time))
        x = nn.Conv(4, (3, 3), name="conv_in")(latents)
        down = Stage(8, name="down_blocks_0")(x, time, text)
        x = nn.Conv(8, (3, 3), strides=2, name="downsample")(down)
        x = Stage(8, name="mid_block")(x, time, text)
        x = jax.image.resize(x, down.shape, "nearest")
        x = jnp.concatenate([x, down], -1)
        x = Stage(8, attends=False, name="up_blocks_0")(x, time, text)
        return nn.Conv(3, (3, 3), name="conv_out")(nn.silu(nn.GroupNorm(2, name="norm_out")(x)))


def create() -> tuple[UNet, Any]:
    """The module and its parameters, drawn by NumPy."""
    model = UNet()
    shapes = jax.eval_shape(model.init, jax.random.key(0), *example())
    return model, near_ones_and_zeros(shapes["params"])


def example() -> tuple[jax.Array, jax.Array, jax.Array]:
    """Latents, times and texts."""
    return normal(1, 2, 4, 4, 3), jnp.array([0.5, 2.0]), normal(2, 2, 3, 6)
