"""Convert a Hugging Face `config.json` to a model config.

This is not left to transformers, which parses all of them, because it accepts fields that the
models of this package do not have; here each of those is an error.
"""

from collections.abc import Callable

from lora_jax.errors import ModelConfigError
from lora_jax.models.config import StoredConfig
from lora_jax.models.weights import field_kinds, hf_decoders, hf_encoders
from lora_jax.models.weights.hf_fields import Json

# The parser of each `model_type`; `names.HF` has the same keys.
_PARSERS: dict[str, Callable[[Json, str], StoredConfig]] = {
    "bert": hf_encoders.bert,
    "roberta": hf_encoders.bert,
    "xlm-roberta": hf_encoders.bert,
    "deberta-v2": hf_encoders.deberta,
    "distilbert": hf_encoders.distilbert,
    "gemma2": hf_decoders.gemma,
    "gemma3_text": hf_decoders.gemma,
    "gpt2": hf_decoders.gpt2,
    "llama": hf_decoders.llama,
    "mistral": hf_decoders.llama,
    "mixtral": hf_decoders.llama,
    "modernbert": hf_encoders.modernbert,
    "vit": hf_encoders.vit,
    "phi3": hf_decoders.phi3,
    "qwen2": hf_decoders.llama,
    "qwen3": hf_decoders.llama,
    "qwen3_moe": hf_decoders.llama,
}


def parse(json: Json, origin: str) -> StoredConfig:
    """Return the config that a `config.json` describes.

    Args:
      json: the contents of the file.
      origin: the file, for error messages.

    Raises:
      ModelConfigError: the architecture, or its variant, is not supported; a field is missing or
        has an impossible value.
    """
    field_kinds.check_hf(json, origin)
    kind = json.get("model_type")
    if kind not in _PARSERS:
        raise ModelConfigError(
            f"{origin}: model_type is {kind!r}; the loaders know {', '.join(sorted(_PARSERS))}"
        )
    with field_kinds.describing(origin, kind):
        return _PARSERS[kind](json, origin)
