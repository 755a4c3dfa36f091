"""The Llama family of decoders (Touvron et al., arXiv 2302.13971, and its descendants)."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

from lora_jax.models.attention import attend, positions_in, visible
from lora_jax.models.config import LlamaConfig
from lora_jax.models.cross_entropy import chunked_cross_entropy
from lora_jax.models.layers import INITIAL, Embed, by_rows, dense, stack, tensor_axis
from lora_jax.models.rope import angles, rotate

Turn = tuple[Array, Array]


def _norm(config: LlamaConfig, name: str) -> nn.RMSNorm:
    return nn.RMSNorm(
        epsilon=config.norm_eps, dtype=config.dtype, param_dtype=config.param_dtype, name=name
    )


class _Attention(nn.Module):
    config: LlamaConfig

    @nn.compact
    def __call__(self, x: Array, turn: Turn, seen: Array | None) -> Array:
        config = self.config

        def heads(name: str, count: int) -> Array:
            flat = dense(config, count * config.head_dim, name, bias=config.qkv_bias)(x)
            return flat.reshape(*x.shape[:2], count, config.head_dim)

        query = heads("q", config.num_heads)
        key = heads("k", config.num_kv_heads)
        value = heads("v", config.num_kv_heads)
        if config.qk_norm:
            query = _norm(config, "q_norm")(query)
            key = _norm(config, "k_norm")(key)
        mixed = attend(rotate(query, turn), rotate(key, turn), value, seen)
        mixed = mixed.reshape(*x.shape[:2], config.num_heads * config.head_dim)
        return dense(config, config.hidden_size, "o", bias=config.output_bias)(mixed)


class _Mlp(nn.Module):
    config: LlamaConfig

    @nn.compact
    def __call__(self, x: Array) -> Array:
        config = self.config
        gate = jax.nn.silu(dense(config, config.mlp_size, "gate", bias=False)(x))
        up = dense(config, config.mlp_size, "up", bias=False)(x)
        return dense(config, config.hidden_size, "down", bias=False)(gate * up)


class _Layer(nn.Module):
    config: LlamaConfig

    @nn.compact
    def __call__(self, x: Array, turn: Turn, seen: Array | None) -> tuple[Array, None]:
        normed = _norm(self.config, "attention_norm")(x)
        x = by_rows(x + _Attention(self.config, name="attention")(normed, turn, seen))
        x = by_rows(x + _Mlp(self.config, name="mlp")(_norm(self.config, "mlp_norm")(x)))
        return x, None


class _Head(nn.Module):
    """An untied head: kernel [D, V], no bias."""

    config: LlamaConfig

    @nn.compact
    def __call__(self) -> Array:
        shape = (self.config.hidden_size, self.config.vocab_size)
        return self.param("kernel", INITIAL, shape, self.config.param_dtype)


class Llama(nn.Module):
    """The decoder: token ids to the logits of each next token.

    Parameters: `embed/embedding`, per layer `layers_0/attention/{q,k,v,o}`, `attention_norm`,
    `mlp/{gate,up,down}`, `mlp_norm` (with `scan_layers`: `layers/...`, stacked), `norm/scale`
    and, where the head is not tied, `lm_head/kernel`.
    """

    config: LlamaConfig

    @nn.compact
    def __call__(
        self,
        input_ids: Array,
        mask: Array | None = None,
        segment_ids: Array | None = None,
        positions: Array | None = None,
        targets: Array | None = None,
        chunk: int = 0,
    ) -> Array:
        """Logits [B, T, V] in float32; with `targets`, the cross entropy [B, T] of each instead.

        Args:
            input_ids: [B, T] int.
            mask: [B, T], True at real tokens; None: all are.
            segment_ids: [B, T] int of packed rows: a token sees its own segment only.
            positions: [B, T] int from 0 up; None: counted from the start of the row (of each
                segment, in packed rows). Only differences within a segment matter.
            targets: [B, T] int, the token that follows.
            chunk: with targets, the positions of a row whose logits exist at the same time.
        """
        config = self.config
        length = input_ids.shape[1]
        if positions is None:
            positions = jnp.arange(length)[None]
            if segment_ids is not None:
                positions = positions_in(segment_ids)
        turn = angles(positions, config.head_dim, config.rope_theta, config.rope_divisors)
        window = config.sliding_window
        seen = visible(length, mask, segment_ids, causal=True, window=window)
        embed = Embed(config, config.vocab_size, tensor_axis(config), name="embed")
        x = stack(_Layer, config, "layers")(by_rows(embed(input_ids)), turn, seen)
        x = _norm(config, "norm")(x)
        weight, form = (
            (embed.embedding, "btd,vd->btv")
            if config.tied
            else (_Head(config, name="lm_head")(), "btd,dv->btv")
        )

        def head(x: Array) -> Array:
            kernel = weight.astype(config.dtype)
            return jnp.einsum(form, x, kernel, preferred_element_type=jnp.float32)

        return head(x) if targets is None else chunked_cross_entropy(head, x, targets, chunk)
