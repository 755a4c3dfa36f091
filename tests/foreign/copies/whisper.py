"""A small copy of Whisper in Flax: two convolutions, an encoder, and a decoder that attends to it.

It has the names of transformers' Flax model, which Whisper-JAX uses.
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from tests.cases import near_ones_and_zeros, normal

SIZE, HEADS = 8, 2


class Attention(nn.Module):
    """`k_proj` has no bias, as in Whisper."""

    @nn.compact
    def __call__(self, x: Any, others: Any, mask: Any = None) -> Any:
        def heads(name: str, x: Any) -> Any:
            y = nn.Dense(SIZE, use_bias=name != "k_proj", name=name)(x)
            return y.reshape(*y.shape[:2], HEADS, -1)

        k, v = (heads(name, others) for name in ("k_proj", "v_proj"))
        y = nn.dot_product_attention(heads("q_proj", x), k, v, mask=mask)
        return nn.Dense(SIZE, name="out_proj")(y.reshape(*x.shape[:2], -1))


class Layer(nn.Module):
    @nn.compact
    def __call__(self, x: Any, heard: Any = None, mask: Any = None) -> Any:
        y = nn.LayerNorm(name="self_attn_layer_norm")(x)
        x += Attention(name="self_attn")(y, y, mask)
        if heard is not None:
            y = nn.LayerNorm(name="encoder_attn_layer_norm")(x)
            x += Attention(name="encoder_attn")(y, heard)
        y = nn.LayerNorm(name="final_layer_norm")(x)
        return x + nn.Dense(SIZE, name="fc2")(nn.gelu(nn.Dense(12, name="fc1")(y)))


class Layers(nn.Module):
    @nn.compact
    def __call__(self, x: Any, *others: Any) -> Any:
        for i in range(2):
            x = Layer(name=str(i))(x, *others)
        return x


class Encoder(nn.Module):
    @nn.compact
    def __call__(self, features: Any) -> Any:
        x = nn.gelu(nn.Conv(SIZE, (3,), padding=1, name="conv1")(features))
        x = nn.gelu(nn.Conv(SIZE, (3,), strides=2, padding=1, name="conv2")(x))
        x += self.param("embed_positions", nn.initializers.normal(), x.shape[1:])[None]
        return nn.LayerNorm(name="layer_norm")(Layers(name="layers")(x))


class Decoder(nn.Module):
    @nn.compact
    def __call__(self, ids: Any, heard: Any) -> Any:
        table = nn.Embed(11, SIZE, name="embed_tokens")
        x = table(ids) + nn.Embed(5, SIZE, name="embed_positions")(jnp.arange(ids.shape[1]))[None]
        x = Layers(name="layers")(x, heard, nn.make_causal_mask(ids))
        return table.attend(nn.LayerNorm(name="layer_norm")(x))


class Model(nn.Module):
    @nn.compact
    def __call__(self, features: Any, ids: Any) -> Any:
        return Decoder(name="decoder")(ids, Encoder(name="encoder")(features))


class Whisper(nn.Module):
    """Logits [batch, text, vocabulary] of features [batch, frames, 4] and a text."""

    @nn.compact
    def __call__(self, features: Any, ids: Any) -> Any:
        return Model(name="model")(features, ids)


def create() -> tuple[Whisper, Any]:
    """The module and its parameters, drawn by NumPy."""
    model = Whisper()
    shapes = jax.eval_shape(model.init, jax.random.key(0), *example())
    return model, near_ones_and_zeros(shapes["params"])


def example() -> tuple[jax.Array, jax.Array]:
    """Features and texts."""
    return normal(1, 2, 6, 4), jnp.arange(8).reshape(2, 4)
