"""Paths of modules and patterns of parameters in the built-in models.

An encoder is the subtree `bert` of a `models.BertClassifier`, a decoder is the whole tree.
"""

from __future__ import annotations

from typing import Any

from lora_jax.errors import LoraError
from lora_jax.models.config import BertConfig, BuiltInConfig

Tree = Any  # a pytree
ENCODER = "bert"


def layers(config: BuiltInConfig) -> tuple[str, ...]:
    """Return the path of each layer, starting at the input."""
    if config.scan_layers:
        raise LoraError(
            "single layers are needed, and model.scan_layers stacks them into one scan; leave it "
            "at False"
        )
    before = f"{ENCODER}/encoder/layer_" if isinstance(config, BertConfig) else "layers_"
    return tuple(f"{before}{i}" for i in range(config.num_layers))


def biases(config: BuiltInConfig) -> str:
    """Return the pattern of all bias vectors, also in norms."""
    if not config.has_biases:
        raise LoraError(
            "this model has no bias vectors, so there is nothing to train; take another method, "
            "or a model with biases (Qwen2)"
        )
    return f"{ENCODER}/**/bias" if isinstance(config, BertConfig) else "**/bias"


def norms(config: BuiltInConfig) -> str:
    """Return the pattern of the parameters of all norms except q/k norms."""
    pattern = "**/{norm,attention_norm,mlp_norm,attention_post_norm,mlp_post_norm}/*"
    return f"{ENCODER}/{pattern}" if isinstance(config, BertConfig) else pattern
