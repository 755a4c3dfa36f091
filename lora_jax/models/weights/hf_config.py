"""Convert a Hugging Face `config.json` to a model configuration.

Written here because the library that parses all of them, transformers, accepts fields that the
models of this package do not have; here each of those is an error.
"""

from collections.abc import Mapping
from typing import Any

from lora_jax.models.config import BertConfig, BuiltInConfig, LlamaConfig
from lora_jax.models.errors import ModelConfigError
from lora_jax.models.rope import linear_divisors, llama3_divisors
from lora_jax.models.weights.names import HF

_ACTIVATIONS = {"gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh"}
_ACTIVATIONS["relu"] = "relu"
Json = Mapping[str, Any]


def parse(json: Json, origin: str) -> BuiltInConfig:
    """The configuration that a `config.json` describes.

    Raises:
        ModelConfigError: an architecture, or a variant of one, that is not supported; or a field
            that is not there.
    """
    kind = json.get("model_type")
    if kind not in HF:
        raise ModelConfigError(
            f"{origin}: model_type is {kind!r}; the loaders know {', '.join(sorted(HF))}"
        )
    try:
        if kind in ("bert", "roberta", "xlm-roberta"):
            return _bert(json, origin)
        return _llama(json, origin)
    except KeyError as error:
        raise ModelConfigError(f"{origin}: no field {error}, which {kind} needs") from error


def _bert(json: Json, origin: str) -> BertConfig:
    position = json.get("position_embedding_type", "absolute")
    _refuse(origin, "position_embedding_type", position, position not in ("absolute", None))
    _refuse(origin, "is_decoder", True, json.get("is_decoder", False))
    activation = json.get("hidden_act", "gelu")
    _refuse(origin, "hidden_act", activation, activation not in _ACTIVATIONS)
    pad_id = json.get("pad_token_id") or 0
    # RoBERTa's table has rows for the padding token and the ones before it, which no text uses.
    offset = 0
    if json["model_type"] != "bert":
        pad_id = json.get("pad_token_id", 1)
        offset = pad_id + 1
    return BertConfig(
        vocab_size=json["vocab_size"],
        hidden_size=json["hidden_size"],
        num_layers=json["num_hidden_layers"],
        num_heads=json["num_attention_heads"],
        mlp_size=json["intermediate_size"],
        max_positions=json["max_position_embeddings"] - offset,
        num_token_types=json.get("type_vocab_size", 2),
        norm_eps=json.get("layer_norm_eps", 1e-12),
        activation=_ACTIVATIONS[activation],
        position_offset=offset,
        pad_id=pad_id,
        bos_id=json.get("bos_token_id"),
        eos_id=_first(json.get("eos_token_id")),
        dropout=json.get("hidden_dropout_prob", 0.1),
        attention_dropout=json.get("attention_probs_dropout_prob", 0.1),
    )


def _llama(json: Json, origin: str) -> LlamaConfig:
    kind = json["model_type"]
    activation = json.get("hidden_act", "silu")
    _refuse(origin, "hidden_act", activation, activation not in ("silu", "swish"))
    _refuse(origin, "mlp_bias", True, json.get("mlp_bias", False))
    partial = json.get("partial_rotary_factor", 1.0)
    _refuse(origin, "partial_rotary_factor", partial, partial != 1.0)
    heads = json["num_attention_heads"]
    head_dim = json.get("head_dim") or json["hidden_size"] // heads
    theta, divisors = _rope(json, head_dim, origin)
    biased = bool(json.get("attention_bias", False))
    return LlamaConfig(
        vocab_size=json["vocab_size"],
        hidden_size=json["hidden_size"],
        num_layers=json["num_hidden_layers"],
        num_heads=heads,
        num_kv_heads=json.get("num_key_value_heads") or heads,
        head_dim=head_dim,
        mlp_size=json["intermediate_size"],
        max_positions=json["max_position_embeddings"],
        norm_eps=json.get("rms_norm_eps", 1e-6),
        rope_theta=theta,
        rope_divisors=divisors,
        qkv_bias=kind == "qwen2" or biased,
        output_bias=kind != "qwen2" and biased,
        qk_norm=kind == "qwen3",
        tied=bool(json.get("tie_word_embeddings", False)),
        sliding_window=_window(json, origin),
        pad_id=json.get("pad_token_id"),
        bos_id=json.get("bos_token_id"),
        eos_id=_first(json.get("eos_token_id")),
    )


def _window(json: Json, origin: str) -> int | None:
    """The sliding window that every layer has; None where none has one."""
    window = json.get("sliding_window")
    if json["model_type"] == "mistral":
        return window
    if not window or not json.get("use_sliding_window", False):
        return None
    first = json.get("max_window_layers", 0)
    if first >= json["num_hidden_layers"]:
        return None
    _refuse(origin, "max_window_layers", f"{first} (layers differ)", first > 0)
    return window


def _rope(json: Json, head_dim: int, origin: str) -> tuple[float, tuple[float, ...] | None]:
    """Theta and the frequencies' divisors, in either spelling (`rope_parameters` is newer)."""
    scaling = json.get("rope_parameters") or json.get("rope_scaling") or {}
    theta = scaling.get("rope_theta") or json.get("rope_theta") or 10000.0
    kind = scaling.get("rope_type") or scaling.get("type") or "default"
    if kind == "default":
        return float(theta), None
    if kind == "linear":
        return float(theta), linear_divisors(head_dim, scaling["factor"])
    _refuse(origin, "rope type", kind, kind != "llama3")
    return float(theta), llama3_divisors(
        head_dim,
        theta,
        factor=scaling["factor"],
        low=scaling["low_freq_factor"],
        high=scaling["high_freq_factor"],
        original_length=scaling["original_max_position_embeddings"],
    )


def _first(ids: int | list[int] | None) -> int | None:
    """One id where the file lists several that end a text."""
    return ids[0] if isinstance(ids, list) else ids


def _refuse(origin: str, field: str, value: object, wrong: bool) -> None:
    if wrong:
        raise ModelConfigError(f"{origin}: {field} is {value!r}, which these models do not have")
