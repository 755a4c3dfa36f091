"""The model families: how the config of each is read, and the names of its stored tensors.

The configs are not left to transformers, which reads all of them, because it accepts fields that
the models of this package do not have; here each of those is an error.
"""

from collections.abc import Callable
from typing import NamedTuple

from lora_jax.errors import ModelConfigError
from lora_jax.models.config import BertConfig, StoredConfig, VitConfig
from lora_jax.models.weights import (
    decoder_names,
    encoder_names,
    field_kinds,
    hf_decoders,
    hf_encoders,
)
from lora_jax.models.weights.hf_fields import Json
from lora_jax.models.weights.tensor_names import TensorNames


class Family(NamedTuple):
    """A family: reads a `config.json`, and names the tensors."""

    parse: Callable[[Json, str], StoredConfig]
    names: TensorNames


_ROBERTA = Family(hf_encoders.bert, encoder_names.ROBERTA)
_GEMMA = Family(hf_decoders.gemma, decoder_names.GEMMA)
_LLAMA = Family(hf_decoders.llama, decoder_names.LLAMA)

FAMILIES = {  # by the `model_type` of a Hugging Face folder
    "bert": Family(hf_encoders.bert, encoder_names.BERT),
    **dict.fromkeys(("roberta", "xlm-roberta"), _ROBERTA),
    "deberta-v2": Family(hf_encoders.deberta, encoder_names.DEBERTA),
    "distilbert": Family(hf_encoders.distilbert, encoder_names.DISTILBERT),
    "modernbert": Family(hf_encoders.modernbert, encoder_names.MODERNBERT),
    "vit": Family(hf_encoders.vit, encoder_names.VIT),
    **dict.fromkeys(("gemma2", "gemma3_text"), _GEMMA),
    "gpt2": Family(hf_decoders.gpt2, decoder_names.GPT2),
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3"), _LLAMA),
    "mixtral": Family(hf_decoders.llama, decoder_names.MIXTRAL),
    "phi3": Family(hf_decoders.phi3, decoder_names.PHI3),
    "qwen3_moe": Family(hf_decoders.llama, decoder_names.QWEN3_MOE),
}


def parse(json: Json, origin: str) -> StoredConfig:
    """Return the config that a `config.json` (the file `origin`) describes.

    `ModelConfigError`: the architecture, or its variant, is not supported; a field is missing or
    has an impossible value.
    """
    field_kinds.check_hf(json, origin)
    kind = json.get("model_type")
    if kind not in FAMILIES:
        raise ModelConfigError(
            f"{origin}: model_type is {kind!r}; the loaders know {', '.join(sorted(FAMILIES))}"
        )
    with field_kinds.describing(origin, kind):
        return FAMILIES[kind].parse(json, origin)


def table_of(config: StoredConfig) -> TensorNames:
    """Return the table of names of the family that has these options."""
    if isinstance(config, VitConfig):
        return encoder_names.VIT
    if isinstance(config, BertConfig):
        if config.pre_norm is not None:
            return encoder_names.MODERNBERT
        if config.relative is not None:
            return encoder_names.DEBERTA
        if config.head_activation == "relu":
            return encoder_names.DISTILBERT
        return encoder_names.ROBERTA if config.position_offset else encoder_names.BERT
    if config.positions == "learned":
        return decoder_names.GPT2
    if config.post_norms:
        return decoder_names.GEMMA
    if config.fused:
        return decoder_names.PHI3
    if config.num_experts:
        return decoder_names.QWEN3_MOE if config.qk_norm else decoder_names.MIXTRAL
    return decoder_names.LLAMA
