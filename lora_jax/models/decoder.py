"""The decoder of all families: Llama (Touvron et al., arXiv 2302.13971), and others by its options.

The options are the fields of `lora_jax.models.DecoderConfig`.
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import flax.linen as nn
import jax.numpy as jnp
from jax import Array

from lora_jax.models import cache as caches
from lora_jax.models.attention import attend, capped
from lora_jax.models.cache import Cache, Fresh
from lora_jax.models.config import DecoderConfig, check_choice
from lora_jax.models.cross_entropy import chunked_cross_entropy
from lora_jax.models.experts import ExpertMlp
from lora_jax.models.layers import (
    ACTIVATIONS,
    INITIAL,
    NORMS,
    ClassifierHead,
    Embed,
    Mlp,
    by_rows,
    dense,
    heads,
    kept_weights,
    noisy,
    norm,
    partition,
    sharded,
    stack,
    tensor_axis,
)
from lora_jax.models.rope import angles, rotate
from lora_jax.models.sight import Sight, View, either, positions_in, visible

_BY_TOKENS = ("tensor", "fsdp")  # how logits are sharded over the vocabulary


class _Flow(NamedTuple):
    """The values that go from layer to layer; without a cache `fresh` is None."""

    x: Array
    fresh: Fresh | None = None


_Views = tuple[View | None, View | None]  # the view of each kind, see `DecoderConfig.kinds`


class _DecoderAttention(nn.Module):
    config: DecoderConfig
    deterministic: bool = True

    @nn.compact
    def __call__(self, flow: _Flow, view: View, cache: Cache | None) -> tuple[Array, Fresh | None]:
        config, (x, fresh) = self.config, flow
        counts = (config.num_heads, config.num_kv_heads, config.num_kv_heads)
        query, key, value = heads(
            config, x, counts, config.head_dim, "qkv", fused=config.fused, bias=config.qkv_bias
        )
        if config.qk_norm:
            query = norm(config, "q_norm", config.norm)(query)
            key = norm(config, "k_norm", config.norm)(key)
        if view.turn is not None:
            query, key = rotate(query, view.turn), rotate(key, view.turn)
        past = None
        if fresh is not None and cache is not None:
            past = cache.layer(fresh.at, like=key) if cache.capacity else None
            fresh = fresh.extended(key, value)
        scale, cap = config.attention_scale, config.attention_cap
        drop = kept_weights(config, x, self.deterministic)
        mixed = attend(query, key, value, view.sight, drop, past, scale=scale, cap=cap)
        mixed = mixed.reshape(*x.shape[:2], config.num_heads * config.head_dim)
        return dense(config, config.hidden_size, "o", bias=config.output_bias)(mixed), fresh


class _DecoderLayer(nn.Module):
    config: DecoderConfig
    deterministic: bool = True
    kind: int = 0

    @nn.compact
    def __call__(
        self, flow: _Flow, views: _Views, cache: Cache | None, kind: Array | None = None
    ) -> tuple[_Flow, None]:
        config, view, (one, other) = self.config, views[self.kind], views
        if kind is not None and one and other:  # one program for layers of both kinds
            view = either(kind == 0, one, other)
        assert view is not None

        drop = nn.Dropout(config.dropout, deterministic=self.deterministic)

        def after(name: str, x: Array) -> Array:
            return drop(norm(config, name, config.norm)(x) if config.post_norms else x)

        normed = flow._replace(x=norm(config, "attention_norm", config.norm)(flow.x))
        attention = _DecoderAttention(config, self.deterministic, name="attention")
        mixed, fresh = attention(normed, view, cache)
        x = by_rows(flow.x + after("attention_post_norm", mixed))
        if config.num_experts:
            mlp: nn.Module = ExpertMlp(config, name="mlp")
        else:
            mlp = Mlp(config, config.gated, config.fused, config.mlp_bias, name="mlp")
        wide = mlp(norm(config, "mlp_norm", config.norm)(x))
        return _Flow(by_rows(x + after("mlp_post_norm", wide)), fresh), None


class _DecoderHead(nn.Module):
    """An untied head: kernel [D, V], no bias."""

    config: DecoderConfig

    @nn.compact
    def __call__(self) -> Array:
        shape = (self.config.hidden_size, self.config.vocab_size)
        return self.param("kernel", INITIAL, shape, self.config.param_dtype)


class DecoderModel(nn.Module):
    """The decoder, which computes the logits of each next token from token ids.

    Parameters: `embed/embedding`, per layer `layers_0/attention/{q,k,v,o}`, `attention_norm`,
    `mlp/{gate,up,down}`, `mlp_norm` (with `scan_layers`: `layers/...`, stacked), `norm/scale` and,
    if the head is not tied, `lm_head/kernel`. Options add others: `attention/qkv`,
    `mlp/gate_up`, `mlp/{router,experts}`, `{attention,mlp}_post_norm`, `position/embedding`.

    Attributes:
      config: the config of the decoder.
    """

    config: DecoderConfig

    def __call__(
        self,
        input_ids: Array,
        mask: Array | None = None,
        segment_ids: Array | None = None,
        positions: Array | None = None,
        deterministic: bool = True,
    ) -> Array:
        """Compute the logits of each next token.

        Args:
          input_ids: int [B, T].
          mask: [B, T], True at real tokens. None: all tokens are real.
          segment_ids: int [B, T], for packed rows: a token sees only its own segment.
          positions: int [B, T], at least 0. None: counted from the start of the row (of each
            segment, in packed rows). Only differences within a segment matter.
          deterministic: False applies dropout as in the config, with the rng named "dropout".

        Returns:
          Logits, float32 [B, T, V].

        Raises:
          ValueError: the rows are too long, or a choice in the config is unknown.
        """
        positions, views = self._whole(input_ids, mask, segment_ids, positions)
        x, weight, _ = self._run(input_ids, positions, views, deterministic=deterministic)
        return self._logits(weight, x)

    def hidden(
        self, input_ids: Array, mask: Array | None = None, deterministic: bool = True
    ) -> Array:
        """Compute the inputs of the head.

        Args:
          input_ids: int [B, T].
          mask: as for the logits.
          deterministic: as for the logits.

        Returns:
          [B, T, D] in `config.dtype`.
        """
        positions, views = self._whole(input_ids, mask, None, None)
        return self._run(input_ids, positions, views, deterministic=deterministic)[0]

    def loss(
        self,
        input_ids: Array,
        targets: Array,
        segment_ids: Array | None = None,
        positions: Array | None = None,
        *,
        chunk: int,
        smoothing: float = 0.0,
        deterministic: bool = True,
    ) -> Array:
        """Compute the cross entropy of each target, without the logits of all tokens at once.

        Args:
          input_ids: int [B, T].
          targets: int [B, T], the next tokens.
          segment_ids: as for the logits.
          positions: as for the logits.
          chunk: the positions of a row whose logits exist at the same time.
          smoothing: the label smoothing; see `lora_jax.models.cross_entropy`.
          deterministic: as for the logits.

        Returns:
          The cross entropy, float32 [B, T].
        """
        positions, views = self._whole(input_ids, None, segment_ids, positions)
        x, weight, _ = self._run(input_ids, positions, views, deterministic=deterministic)
        size, tied = self.config.vocab_size, self.config.tied
        # Over `fsdp` either the weight is gathered for each chunk, or it is sharded by the
        # vocabulary and the chunk's tokens and their gradients move: the smaller of the two.
        few = 2 * input_ids.shape[0] * chunk <= size and partition((size,), _BY_TOKENS) is not None
        if few:
            weight = sharded(weight, *(() if tied else (None,)), _BY_TOKENS)

        def head(x: Array) -> Array:
            if not few:
                return self._logits(weight, x)
            return sharded(self._logits(weight, sharded(x, "data")), "data", None, _BY_TOKENS)

        return chunked_cross_entropy(head, x, targets, chunk, smoothing)

    def decode(
        self,
        input_ids: Array,
        cache: Cache,
        mask: Array | None = None,
        positions: Array | None = None,
        last: int | None = None,
    ) -> tuple[Array, Cache]:
        """Compute the logits of tokens that continue those in a cache.

        Args:
          input_ids: int [B, T].
          cache: the cache of earlier tokens (`lora_jax.models.cache`). Prompts are read with a
            cache of capacity 0.
          mask: [B, T], True at real tokens. None: all tokens are real.
          positions: int [B, T], -1 at padding. None: they continue the positions of the row.
          last: compute logits only for this many positions at the end. None: for all.

        Returns:
          Logits, float32 [B, T, V], and a cache of these T tokens only, which
          `lora_jax.models.cache.written` writes into the other.
        """
        positions, views = self._following(input_ids, mask, positions, cache)
        x, weight, fresh = self._run(input_ids, positions, views, cache, last)
        assert fresh is not None
        return self._logits(weight, x, few=True), Cache(fresh.keys, fresh.values, positions)

    @nn.compact
    def _run(
        self,
        input_ids: Array,
        positions: Array,
        views: _Views,
        cache: Cache | None = None,
        last: int | None = None,
        deterministic: bool = True,
    ) -> tuple[Array, Array, Fresh | None]:
        """Return the head's inputs, its weight, and the entries of the tokens for a cache."""
        config, fresh = self.config, None
        check_choice("norm", config.norm, NORMS)
        check_choice("activation", config.activation, ACTIVATIONS)
        if cache is not None:
            config = dataclasses.replace(config, remat="none")  # there is no backward pass
            fresh = Fresh.start(config, input_ids)
        embed = Embed(config, config.vocab_size, tensor_axis(config), name="embed")
        x = noisy(self, config, embed(input_ids), deterministic)
        if config.embedding_scale != 1.0:
            x = x * jnp.asarray(config.embedding_scale, x.dtype)
        if config.positions == "learned":
            rows = jnp.maximum(positions, 0)  # padding has -1, and no token looks at it
            x = x + Embed(config, config.max_positions, 1, name="position")(rows)
        x = nn.Dropout(config.dropout, deterministic=deterministic)(x)
        layers = stack(_DecoderLayer, config, "layers", config.kinds, deterministic=deterministic)
        x, fresh = layers(_Flow(by_rows(x), fresh), views, cache)
        if last is not None:
            x = x[:, -last:]
        x = norm(config, "norm", config.norm)(x)
        weight = embed.embedding if config.tied else _DecoderHead(config, name="lm_head")()
        return x, weight, fresh

    def _logits(self, weight: Array, x: Array, few: bool = False) -> Array:
        """Return the logits, float32 [B, T, V], of the head's inputs x; `few` rows at a time."""
        config = self.config
        kernel = weight.astype(config.dtype)
        if config.tied and few:
            # For few rows XLA's CPU compiler would transpose the whole table at every step, were it
            # the right-hand side.
            logits = jnp.einsum("vd,btd->vbt", kernel, x, preferred_element_type=jnp.float32)
            return capped(logits.transpose(1, 2, 0), config.logit_cap)
        equation = "btd,vd->btv" if config.tied else "btd,dv->btv"
        logits = jnp.einsum(equation, x, kernel, preferred_element_type=jnp.float32)
        return capped(logits, config.logit_cap)

    def _whole(
        self,
        input_ids: Array,
        mask: Array | None,
        segment_ids: Array | None,
        positions: Array | None,
    ) -> tuple[Array, _Views]:
        """Return the positions of whole rows, and the view of each kind of layer."""
        length, most = input_ids.shape[1], self.config.max_positions
        check_choice("positions", self.config.positions, {"rotary": 0, "learned": 1})
        if positions is None:
            positions = jnp.arange(length)[None]
            if segment_ids is not None:
                positions = positions_in(segment_ids)
            elif self.config.positions == "learned" and length > most:
                raise ValueError(
                    f"input_ids: {length} tokens in a row, but the model has positions for "
                    f"{most}; cut the rows shorter"
                )

        def sight(window: int | None) -> Sight:
            return visible(length, mask, segment_ids, causal=True, window=window)

        return positions, self._views(positions, sight)

    def _following(
        self,
        input_ids: Array,
        mask: Array | None,
        positions: Array | None,
        cache: Cache,
    ) -> tuple[Array, _Views]:
        """Return the positions of tokens that continue a cache, and the view of each layer kind."""
        if mask is None:
            mask = jnp.ones(input_ids.shape, bool)
        if positions is None:
            positions = caches.numbered(cache, mask)
        positions = jnp.where(mask.astype(bool), positions, -1).astype(jnp.int32)
        slots = jnp.concatenate([cache.positions, positions], axis=1)

        def sight(window: int | None) -> Sight:
            return Sight(positions, slots, slots >= 0, causal=True, window=window)

        return positions, self._views(positions, sight)

    def _views(self, positions: Array, sight: Callable[[int | None], Sight]) -> _Views:
        config = self.config

        def view(kind: int) -> View | None:
            if kind not in config.kinds:
                return None
            turn = self._turn(positions, local=kind == 1) if config.positions == "rotary" else None
            return View(turn, sight(config.sliding_window if kind else None))

        return view(0), view(1)

    def _turn(self, positions: Array, local: bool) -> tuple[Array, Array]:
        config = self.config
        if local and config.local_rope_theta is not None:
            return angles(positions, config.rotated, config.local_rope_theta)
        scaling = (config.rope_divisors, config.rope_long, config.rope_amplitude)
        return angles(positions, config.rotated, config.rope_theta, *scaling)


class DecoderClassifier(nn.Module):
    """A decoder with a head on its last token, as `LlamaForSequenceClassification` and others.

    Parameters: `decoder/...`, as in `DecoderModel` without `lm_head`, and `classifier/out/kernel`.

    Attributes:
      config: the config of the decoder.
      num_classes: the number of outputs of the head.
    """

    config: DecoderConfig
    num_classes: int

    @nn.compact
    def __call__(
        self,
        input_ids: Array,
        mask: Array | None = None,
        token_types: Array | None = None,
        deterministic: bool = True,
    ) -> Array:
        """Return the outputs, float32 [B, num_classes].

        Args:
          input_ids: int [B, T].
          mask: [B, T], True at real tokens, the last of which is read. None: all tokens are real.
          token_types: ignored; decoders have none.
          deterministic: as in `DecoderModel`.
        """
        decoder = DecoderModel(self.config.without_logits(), name="decoder")
        hidden = decoder.hidden(input_ids, mask, deterministic=deterministic)
        at = jnp.full(hidden.shape[:1], hidden.shape[1] - 1)
        if mask is not None:
            at = at - jnp.argmax(mask[:, ::-1].astype(bool), axis=1)
        pooled = jnp.take_along_axis(hidden, at[:, None, None], axis=1)[:, 0]
        return ClassifierHead(self.config, self.num_classes, False, name="classifier")(pooled)
