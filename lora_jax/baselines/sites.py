"""Paths of modules and patterns of parameters in the built-in models.

An encoder is the `bert` of a `models.BertClassifier`, a decoder is the whole tree.
"""

from __future__ import annotations

from typing import Any

from lora_jax.errors import LoraError
from lora_jax.models.config import BertConfig, BuiltInConfig

Tree = Any  # a pytree
ENCODER = "bert"
HEAD = "classifier/**"  # of an encoder; new, and so trained by every method


def layers(config: BuiltInConfig) -> tuple[str, ...]:
    """The path of each layer, the one nearest to the input first.

    Raises:
      LoraError: the layers are one scan, in which they are not to be told apart.
    """
    if config.scan_layers:
        raise LoraError(
            "the layers have to be told apart, and model.scan_layers rolls them into one; leave "
            "it at False"
        )
    before = f"{ENCODER}/encoder/layer_" if isinstance(config, BertConfig) else "layers_"
    return tuple(f"{before}{i}" for i in range(config.num_layers))


def biases(config: BuiltInConfig) -> str:
    """The pattern of all bias vectors, those of the norms too.

    Raises:
      LoraError: the model has none.
    """
    if not config.has_biases:
        raise LoraError(
            "this model has no bias vectors, so there is nothing to train; take another method, "
            "or a model with biases (Qwen2)"
        )
    return f"{ENCODER}/**/bias" if isinstance(config, BertConfig) else "**/bias"


def norms(config: BuiltInConfig) -> str:
    """The pattern of all layer norms' parameters; norms of queries and keys are not among them."""
    pattern = "**/{norm,attention_norm,mlp_norm,attention_post_norm,mlp_post_norm}/*"
    return f"{ENCODER}/{pattern}" if isinstance(config, BertConfig) else pattern
