"""Read fields of a Hugging Face `config.json` that all families have, and refuse others."""

from collections.abc import Mapping
from typing import Any

from lora_jax.errors import ModelConfigError

Json = Mapping[str, Any]
# Our sizes -> the names that most families give them.
_SIZES = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "mlp_size": "intermediate_size",
    "max_positions": "max_position_embeddings",
}
_ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
    "silu": "silu",
    "swish": "silu",
    "tanh": "tanh",
}
_LAYER_TYPES = ("full_attention", "sliding_attention")


def sizes(json: Json, **named: str) -> dict[str, Any]:
    """Return the sizes that all models have; `named` are those with names of the family's own."""
    return {ours: json[name] for ours, name in (_SIZES | named).items()}


def activation(json: Json, field: str, default: str, origin: str) -> str:
    """Return our name of the activation that the field names."""
    named = json.get(field) or default
    refuse(origin, field, named, named not in _ACTIVATIONS)
    return _ACTIVATIONS[named]


def special_ids(json: Json) -> dict[str, Any]:
    """Return the ids of padding, begin and end; if there are several ends, the first."""
    end = json.get("eos_token_id")
    return {
        "pad_id": json.get("pad_token_id"),
        "bos_id": json.get("bos_token_id"),
        "eos_id": end[0] if isinstance(end, list) else end,
    }


def sliding(types: list[str], origin: str) -> tuple[bool, ...]:
    """Return for each layer whether it has a window, from `layer_types`."""
    for kind in types:
        refuse(origin, "layer_types", kind, kind not in _LAYER_TYPES)
    return tuple(kind == "sliding_attention" for kind in types)


def refuse(origin: str, field: str, value: object, wrong: bool) -> None:
    """Raise a ModelConfigError that names the field if `wrong` is true."""
    if wrong:
        raise ModelConfigError(f"{origin}: {field} is {value!r}, which these models do not have")


def refuse_set(json: Json, origin: str, *fields: str) -> None:
    """Raise a ModelConfigError for the first of the fields that is set."""
    for field in fields:
        value = json.get(field)
        refuse(origin, field, value, bool(value))
