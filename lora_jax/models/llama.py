"""The Llama family of decoders (Touvron et al., arXiv 2302.13971, and its descendants)."""

import dataclasses
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

from lora_jax.models import cache as caches
from lora_jax.models.attention import attend, positions_in, visible
from lora_jax.models.cache import Cache, Fresh
from lora_jax.models.config import LlamaConfig
from lora_jax.models.cross_entropy import chunked_cross_entropy
from lora_jax.models.layers import INITIAL, Embed, by_rows, dense, stack, tensor_axis
from lora_jax.models.rope import angles, rotate

Turn = tuple[Array, Array]


class _Flow(NamedTuple):
    """What goes from layer to layer; without a cache `fresh` is None."""

    x: Array
    fresh: Fresh | None = None


def _norm(config: LlamaConfig, name: str) -> nn.RMSNorm:
    return nn.RMSNorm(
        epsilon=config.norm_eps, dtype=config.dtype, param_dtype=config.param_dtype, name=name
    )


class _LlamaAttention(nn.Module):
    config: LlamaConfig

    @nn.compact
    def __call__(
        self, flow: _Flow, turn: Turn, seen: Array | None, cache: Cache | None
    ) -> tuple[Array, Fresh | None]:
        config, (x, fresh) = self.config, flow

        def heads(name: str, count: int) -> Array:
            flat = dense(config, count * config.head_dim, name, bias=config.qkv_bias)(x)
            return flat.reshape(*x.shape[:2], count, config.head_dim)

        query = heads("q", config.num_heads)
        key = heads("k", config.num_kv_heads)
        value = heads("v", config.num_kv_heads)
        if config.qk_norm:
            query = _norm(config, "q_norm")(query)
            key = _norm(config, "k_norm")(key)
        query, key, past = rotate(query, turn), rotate(key, turn), None
        if fresh is not None and cache is not None:
            past = cache.layer(fresh.at, like=key) if cache.capacity else None
            fresh = fresh.extended(key, value)
        mixed = attend(query, key, value, seen, past=past)
        mixed = mixed.reshape(*x.shape[:2], config.num_heads * config.head_dim)
        return dense(config, config.hidden_size, "o", bias=config.output_bias)(mixed), fresh


class _LlamaMlp(nn.Module):
    config: LlamaConfig

    @nn.compact
    def __call__(self, x: Array) -> Array:
        config = self.config
        gate = jax.nn.silu(dense(config, config.mlp_size, "gate", bias=False)(x))
        up = dense(config, config.mlp_size, "up", bias=False)(x)
        return dense(config, config.hidden_size, "down", bias=False)(gate * up)


class _LlamaLayer(nn.Module):
    config: LlamaConfig

    @nn.compact
    def __call__(
        self, flow: _Flow, turn: Turn, seen: Array | None, cache: Cache | None
    ) -> tuple[_Flow, None]:
        normed = flow._replace(x=_norm(self.config, "attention_norm")(flow.x))
        mixed, fresh = _LlamaAttention(self.config, name="attention")(normed, turn, seen, cache)
        x = by_rows(flow.x + mixed)
        x = by_rows(x + _LlamaMlp(self.config, name="mlp")(_norm(self.config, "mlp_norm")(x)))
        return _Flow(x, fresh), None


class _LlamaHead(nn.Module):
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
        cache: Cache | None = None,
        last: int | None = None,
    ) -> Array | tuple[Array, Cache]:
        """Logits [B, T, V] in float32; with `targets`, the cross entropy [B, T] of each instead.

        With `cache` the tokens go on with the rows that are in it, and the result is
        (logits, new): a cache of these T tokens alone, to be written to the other by
        `lora_jax.models.cache.written`.

        Args:
            input_ids: [B, T] int.
            mask: [B, T], True at real tokens; None: all are.
            segment_ids: [B, T] int of packed rows: a token sees its own segment only.
            positions: [B, T] int from 0 up; None: counted from the start of the row (of each
                segment, in packed rows). Only differences within a segment matter. With a cache
                they go on with the row's, and are -1 at padding.
            targets: [B, T] int, the token that follows.
            chunk: with targets, the positions of a row whose logits exist at the same time.
            cache: from `lora_jax.models.cache`; prompts are read on one of capacity 0.
            last: how many positions from the end have their logits computed; None: all of them.

        Raises:
            ValueError: a cache together with segment_ids or targets.
        """
        config = self.config
        if cache is None:
            fresh = None
            turn, seen = self._whole(input_ids, mask, segment_ids, positions)
        else:
            if segment_ids is not None or targets is not None:
                raise ValueError("a cache goes with neither segment_ids nor targets")
            config = dataclasses.replace(config, remat="none")  # nothing is differentiated
            fresh = Fresh.start(config, input_ids)
            positions, turn, seen = self._following(input_ids, mask, positions, cache)
        embed = Embed(config, config.vocab_size, tensor_axis(config), name="embed")
        flow = _Flow(by_rows(embed(input_ids)), fresh)
        x, fresh = stack(_LlamaLayer, config, "layers")(flow, turn, seen, cache)
        if last is not None:
            x = x[:, -last:]
        x = _norm(config, "norm")(x)
        weight, form = (
            (embed.embedding, "btd,vd->btv")
            if config.tied
            else (_LlamaHead(config, name="lm_head")(), "btd,dv->btv")
        )

        def head(x: Array) -> Array:
            kernel = weight.astype(config.dtype)
            return jnp.einsum(form, x, kernel, preferred_element_type=jnp.float32)

        if fresh is not None and positions is not None:
            return head(x), Cache(fresh.keys, fresh.values, positions)
        return head(x) if targets is None else chunked_cross_entropy(head, x, targets, chunk)

    def _whole(
        self,
        input_ids: Array,
        mask: Array | None,
        segment_ids: Array | None,
        positions: Array | None,
    ) -> tuple[Turn, Array | None]:
        """The angles of whole rows, and who may look at whom in them."""
        length = input_ids.shape[1]
        if positions is None:
            positions = jnp.arange(length)[None]
            if segment_ids is not None:
                positions = positions_in(segment_ids)
        window = self.config.sliding_window
        seen = visible(length, mask, segment_ids, causal=True, window=window)
        return self._turn(positions), seen

    def _following(
        self,
        input_ids: Array,
        mask: Array | None,
        positions: Array | None,
        cache: Cache,
    ) -> tuple[Array, Turn, Array]:
        """Of tokens that go on with a cache: positions, angles, and what they may look at."""
        if mask is None:
            mask = jnp.ones(input_ids.shape, bool)
        if positions is None:
            positions = caches.numbered(cache, mask)
        positions = jnp.where(mask.astype(bool), positions, -1).astype(jnp.int32)
        slots = jnp.concatenate([cache.positions, positions], axis=1)
        seen = caches.visible_slots(positions, slots, self.config.sliding_window)
        return positions, self._turn(positions), seen

    def _turn(self, positions: Array) -> Turn:
        config = self.config
        return angles(positions, config.head_dim, config.rope_theta, config.rope_divisors)
