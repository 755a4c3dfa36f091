"""Encoders whose layers begin with their norms: ModernBERT (arXiv 2412.13663), ViT (2010.11929)."""

import flax.linen as nn
import jax.numpy as jnp
from jax import Array

from lora_jax.models.attention import attend
from lora_jax.models.config import LayersConfig, PreNorm
from lora_jax.models.layers import (
    Mlp,
    by_rows,
    dense,
    heads,
    kept_weights,
    norm,
    stack,
)
from lora_jax.models.rope import angles, rotate
from lora_jax.models.sight import View, either, visible

LOCAL, FIRST = 1, 2  # bits of a layer's kind: it has a window; it has no first norm


class _Attention(nn.Module):
    config: LayersConfig
    options: PreNorm
    deterministic: bool

    @nn.compact
    def __call__(self, x: Array, view: View) -> Array:
        config, options = self.config, self.options
        count, width = config.num_heads, config.hidden_size // config.num_heads
        names = ("query", "key", "value")
        query, key, value = heads(
            config, x, (count,) * 3, width, names, fused=options.fused, bias=options.qkv_bias
        )
        if view.turn is not None:
            query, key = rotate(query, view.turn), rotate(key, view.turn)
        drop = kept_weights(config, x, self.deterministic)
        mixed = attend(query, key, value, view.sight, drop).reshape(x.shape)
        return dense(config, config.hidden_size, "output", bias=options.output_bias)(mixed)


class _Layer(nn.Module):
    config: LayersConfig
    options: PreNorm
    deterministic: bool = True
    kind: int = 0

    @nn.compact
    def __call__(
        self, x: Array, whole: View, local: View | None, kind: Array | None = None
    ) -> tuple[Array, None]:
        config, options = self.config, self.options
        drop = nn.Dropout(config.dropout, deterministic=self.deterministic)
        view, normed = whole, x
        if kind is not None or not self.kind & FIRST:
            normed = norm(config, "attention_norm", options.norm)(x)
        if kind is not None:  # one program for layers of all kinds
            normed = jnp.where((kind & FIRST) > 0, x, normed)
            if local is not None:
                view = either((kind & LOCAL) == 0, whole, local)
        elif self.kind & LOCAL and local is not None:
            view = local
        attention = _Attention(config, options, self.deterministic, name="attention")
        x = by_rows(x + drop(attention(normed, view)))
        rate = config.dropout if options.gated else 0.0
        mlp = Mlp(
            config, options.gated, True, options.mlp_bias, rate, self.deterministic, name="mlp"
        )
        return by_rows(x + drop(mlp(norm(config, "mlp_norm", options.norm)(x)))), None


class PreNormEncoder(nn.Module):
    """The layers, and the norm after the last layer.

    Parameters: per layer `layer_0/attention/{qkv or query,key,value, output}`, `attention_norm`,
    `mlp/{gate_up or up, down}`, `mlp_norm` (with `scan_layers`: `layers/...`, stacked), and `norm`.
    """

    config: LayersConfig
    options: PreNorm
    deterministic: bool = True

    @nn.compact
    def __call__(
        self, x: Array, mask: Array | None, segment_ids: Array | None, positions: Array | None
    ) -> Array:
        config, options, length = self.config, self.options, x.shape[1]

        def view(theta: float | None, window: int | None) -> View:
            width, turn = config.hidden_size // config.num_heads, None
            if theta is not None and positions is not None:
                turn = angles(positions, width, theta)
            return View(turn, visible(length, mask, segment_ids, window=window))

        windowed = options.windowed or (False,) * config.num_layers
        kinds = [LOCAL * local for local in windowed]
        kinds[0] |= 0 if options.first_norm else FIRST
        local = view(options.local_rope_theta, options.window) if any(windowed) else None
        layers = stack(
            *(_Layer, config, "layer", kinds), options=options, deterministic=self.deterministic
        )
        return norm(config, "norm", options.norm)(layers(x, view(options.rope_theta, None), local))
