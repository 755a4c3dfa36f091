"""Encoders: BERT (arXiv 1810.04805), RoBERTa (1907.11692), DistilBERT (1910.01108), and
DeBERTa v2 and v3 with the parts in `lora_jax.models.deberta`."""

import dataclasses

import flax.linen as nn
import jax.numpy as jnp
from jax import Array

from lora_jax.models.attention import attend
from lora_jax.models.config import BertConfig, check_choice
from lora_jax.models.deberta import (
    Convolution,
    Convolved,
    Distances,
    RelativePositions,
    position_scores,
)
from lora_jax.models.layers import (
    ACTIVATIONS,
    Embed,
    Mlp,
    by_rows,
    dense,
    head_product,
    kept_weights,
    noisy,
    norm,
    stack,
    tensor_axis,
)
from lora_jax.models.pre_norm import PreNormEncoder
from lora_jax.models.sight import Sight, positions_in, visible

POOLINGS = {
    "mean": "the mean of the hidden states of the real tokens, then one product",
    "cls": "the hidden state of the first token, then one product",
    "roberta_head": "product, activation, product on the first token, as RoBERTa and others",
}


def _drop(config: BertConfig, deterministic: bool) -> nn.Dropout:
    return nn.Dropout(config.dropout, deterministic=deterministic)


class _BertAttention(nn.Module):
    config: BertConfig
    deterministic: bool = True

    @nn.compact
    def __call__(self, x: Array, sight: Sight, distances: Distances | None) -> Array:
        config, bias = self.config, None
        products = {name: self._product(name) for name in ("query", "key", "value")}
        query, key, value = (self._heads(product(x)) for product in products.values())
        scale = query.shape[-1] ** -0.5
        if config.relative is not None and distances is not None:
            scale = (query.shape[-1] * (1 + len(config.relative.kinds))) ** -0.5
            rows = _drop(config, self.deterministic)(distances.rows)
            by_position = []
            for kind, name in (("c2p", "key"), ("p2c", "query")):
                shared = config.relative.shared
                product = products[name] if shared else self._product(f"position_{name}")
                wanted = kind in config.relative.kinds
                by_position.append(self._heads(product(rows)) if wanted else None)
            keys, queries = by_position
            bias = scale * position_scores(query, key, (keys, queries), distances.of_pair)
        drop = kept_weights(config, x, self.deterministic)
        mixed = attend(query, key, value, sight, drop, bias=bias, scale=scale).reshape(x.shape)
        return self._product("output")(mixed)

    def _product(self, name: str) -> nn.Dense:
        return dense(self.config, self.config.hidden_size, name, bias=True)

    def _heads(self, x: Array) -> Array:
        return x.reshape(*x.shape[:-1], self.config.num_heads, -1)


class _BertLayer(nn.Module):
    config: BertConfig
    deterministic: bool = True
    kind: int = 0  # 1: the first layer, if a convolution is added to its output

    @nn.compact
    def __call__(
        self,
        x: Array,
        sight: Sight,
        distances: Distances | None = None,
        convolved: Convolved | None = None,
        kind: Array | None = None,
    ) -> tuple[Array, None]:
        config, drop = self.config, _drop(self.config, self.deterministic)
        attention = _BertAttention(config, self.deterministic, name="attention")
        mixed = attention(x, sight, distances)
        x = by_rows(norm(config, "attention_norm")(x + drop(mixed)))
        x = by_rows(norm(config, "mlp_norm")(x + drop(Mlp(config, name="mlp")(x))))
        if convolved is not None and (kind is not None or self.kind):
            first = convolved.joined(x, config.norm_eps)
            x = first if kind is None else jnp.where(kind == 1, first, x)
        return x, None


class _Encoder(nn.Module):
    config: BertConfig
    deterministic: bool = True

    @nn.compact
    def __call__(self, x: Array, sight: Sight, mask: Array | None) -> Array:
        config, relative = self.config, self.config.relative
        distances, convolved, kinds = None, None, None
        if relative is not None:
            distances = RelativePositions(config, relative, name="relative")(x.shape[1])
            if relative.conv_size:
                convolution = Convolution(config, relative, self.deterministic, name="convolution")
                convolved = convolution(x, mask)
                kinds = (1,) + (0,) * (config.num_layers - 1)
        layers = stack(_BertLayer, config, "layer", kinds, deterministic=self.deterministic)
        return layers(x, sight, distances, convolved)


class _Embeddings(nn.Module):
    config: BertConfig
    deterministic: bool = True

    @nn.compact
    def __call__(self, input_ids: Array, positions: Array, token_types: Array | None) -> Array:
        config = self.config
        x = Embed(config, config.vocab_size, tensor_axis(config), name="word")(input_ids)
        x = noisy(self, config, x, self.deterministic)
        if config.absolute_positions:
            rows = config.max_positions + config.position_offset
            x = x + Embed(config, rows, 1, name="position")(positions + config.position_offset)
        if config.num_token_types:
            types = jnp.zeros((1, 1), jnp.int32) if token_types is None else token_types
            x = x + Embed(config, config.num_token_types, 1, name="token_type")(types)
        kind = "layer" if config.pre_norm is None else config.pre_norm.norm
        x = norm(config, "norm", kind)(by_rows(x))
        return _drop(config, self.deterministic)(x)


class Bert(nn.Module):
    """The encoder of texts, which computes hidden states from token ids.

    Parameters: `embeddings/{word,position,token_type}/embedding`, `embeddings/norm`, and per
    layer `encoder/layer_0/attention/{query,key,value,output}`, `attention_norm`,
    `mlp/{up,down}`, `mlp_norm` (with `scan_layers`: `encoder/layers/...`, stacked). DeBERTa also
    has `encoder/{relative,convolution}` and `attention/position_{query,key}`. The parameters of
    ModernBERT are listed in `lora_jax.models.pre_norm`.

    Attributes:
      config: the config of the encoder.
    """

    config: BertConfig

    @nn.compact
    def __call__(
        self,
        input_ids: Array,
        mask: Array | None = None,
        token_types: Array | None = None,
        segment_ids: Array | None = None,
        positions: Array | None = None,
        deterministic: bool = True,
    ) -> Array:
        """Compute the hidden states.

        Args:
          input_ids: [B, T] int.
          mask: [B, T], True at real tokens. None: all tokens are real.
          token_types: [B, T] int. None: all 0.
          segment_ids: [B, T] int, for packed rows: a token sees only its own segment.
          positions: [B, T] int, at least 0. None: counted from the start of the row (of each
            segment, in packed rows; only real tokens, for RoBERTa).
          deterministic: False applies dropout as in `config`, with the rng named "dropout".

        Returns:
          [B, T, D] in `config.dtype`.

        Raises:
          ValueError: T is longer than `config.max_positions`, or the activation is unknown.
        """
        config = self.config
        check_choice("activation", config.activation, ACTIVATIONS)
        length = input_ids.shape[1]
        if positions is None:
            if length > config.max_positions:
                raise ValueError(
                    f"input_ids: {length} tokens in a row, but the model has positions for "
                    f"{config.max_positions}; cut the rows shorter"
                )
            positions = _positions(config, length, mask, segment_ids)
        x = _Embeddings(config, deterministic, name="embeddings")(input_ids, positions, token_types)
        if config.relative is not None and config.relative.conv_size and segment_ids is not None:
            raise ValueError("segment_ids: the convolution of this model reaches into neighbours")
        if config.pre_norm is not None:
            encoder = PreNormEncoder(config, config.pre_norm, deterministic, name="encoder")
            return encoder(x, mask, segment_ids, positions)
        sight = visible(length, mask, segment_ids)
        return _Encoder(config, deterministic, name="encoder")(x, sight, mask)


def _positions(
    config: BertConfig, length: int, mask: Array | None, segment_ids: Array | None
) -> Array:
    if segment_ids is not None:
        return positions_in(segment_ids)
    if mask is not None and config.position_offset:
        # RoBERTa counts only real tokens, which matters for rows padded on the left.
        return jnp.maximum(jnp.cumsum(mask.astype(jnp.int32), axis=1) - 1, 0)
    return jnp.arange(length)[None]


class _BertHead(nn.Module):
    """The classification head, computed in float32 for every dtype of the encoder."""

    config: BertConfig
    num_classes: int
    pooling: str
    deterministic: bool = True

    @nn.compact
    def __call__(self, hidden: Array, mask: Array | None) -> Array:
        config = self.config
        hidden = hidden.astype(jnp.float32)
        if self.pooling != "mean":
            pooled = hidden[:, 0]
        elif mask is None:
            pooled = hidden.mean(axis=1)
        else:
            real = mask.astype(jnp.float32)[:, :, None]
            # A row that only fills the batch has no real token; its mean is 0, not 0 / 0.
            pooled = (hidden * real).sum(axis=1) / jnp.maximum(real.sum(axis=1), 1.0)
        rate = config.dropout if config.head_dropout is None else config.head_dropout
        drop = nn.Dropout(rate, deterministic=self.deterministic)
        pooled = by_rows(pooled)
        if self.pooling == "roberta_head":
            pooled = drop(pooled) if config.pooler_dropout else pooled
            dense = head_product(config, config.hidden_size, "dense", bias=config.head_bias)
            pooled = by_rows(ACTIVATIONS[config.head_activation](dense(pooled)))
            if config.head_norm and config.pre_norm is not None:
                whole = dataclasses.replace(config, dtype=jnp.float32)
                pooled = norm(whole, "norm", config.pre_norm.norm)(pooled)
        return head_product(config, self.num_classes, "out")(drop(pooled))


class BertClassifier(nn.Module):
    """The encoder with a classification head; parameters `bert/...` and `classifier/...`.

    Attributes:
      config: the config of the encoder.
      num_classes: the number of classes; 1 for regression.
      pooling: one of `POOLINGS`. The head has `out/{kernel,bias}`, and with `"roberta_head"` also
        `dense/{kernel,bias}`.
    """

    config: BertConfig
    num_classes: int
    pooling: str = "mean"

    @nn.compact
    def __call__(
        self,
        input_ids: Array,
        mask: Array | None = None,
        token_types: Array | None = None,
        deterministic: bool = True,
    ) -> Array:
        """Return the logits, float32 [B, num_classes]. The arguments are the same as in `Bert`."""
        check_choice("pooling", self.pooling, POOLINGS)
        check_choice("head_activation", self.config.head_activation, ACTIVATIONS)
        encoder = Bert(self.config, name="bert")
        hidden = encoder(input_ids, mask, token_types, deterministic=deterministic)
        head = _BertHead(
            self.config, self.num_classes, self.pooling, deterministic, name="classifier"
        )
        return head(hidden, mask)
