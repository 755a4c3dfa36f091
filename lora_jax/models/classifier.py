"""The built-in models with a classification head."""

import dataclasses

import flax.linen as nn
import jax.numpy as jnp
from jax import Array

from lora_jax.models.bert import BertClassifier
from lora_jax.models.config import DecoderConfig, StoredConfig, VitConfig
from lora_jax.models.decoder import DecoderModel
from lora_jax.models.layers import by_rows, head_product
from lora_jax.models.vit import VitClassifier

LAST = "last"  # the pooling of a decoder's head: the hidden state of the last token


def classifier(config: StoredConfig, outputs: int, pooling: str) -> nn.Module:
    """Return the model of a config with a head of so many outputs; see `Head` for the pooling."""
    if isinstance(config, VitConfig):
        return VitClassifier(config, outputs)
    if isinstance(config, DecoderConfig):
        return DecoderClassifier(config, outputs)
    return BertClassifier(config, outputs, pooling)


def without_logits(config: DecoderConfig) -> DecoderConfig:
    """Return the config of a decoder that classifies: its parameters have no `lm_head`."""
    return dataclasses.replace(config, tied=True)


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
        decoder = DecoderModel(without_logits(self.config), name="decoder")
        hidden = decoder.hidden(input_ids, mask, deterministic=deterministic)
        at = jnp.full(hidden.shape[:1], hidden.shape[1] - 1)
        if mask is not None:
            at = at - jnp.argmax(mask[:, ::-1].astype(bool), axis=1)
        pooled = jnp.take_along_axis(hidden, at[:, None, None], axis=1)[:, 0]
        return _Head(self.config, self.num_classes, name="classifier")(pooled)


class _Head(nn.Module):
    config: DecoderConfig
    num_classes: int

    @nn.compact
    def __call__(self, pooled: Array) -> Array:
        pooled = by_rows(pooled.astype(jnp.float32))
        return head_product(self.config, self.num_classes, "out", bias=False)(pooled)
