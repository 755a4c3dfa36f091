"""Read the configs of decoders from a Hugging Face `config.json`."""

import math
from typing import Any

from lora_jax.models.config import DecoderConfig, LongRope
from lora_jax.models.rope import linear_divisors, llama3_divisors
from lora_jax.models.weights.hf_fields import (
    Json,
    activation,
    refuse,
    refuse_set,
    sizes,
    sliding,
    special_ids,
)


def llama(json: Json, origin: str) -> DecoderConfig:
    """Read Llama, Mistral, Mixtral, Qwen2, Qwen3 and Qwen3-MoE."""
    kind = json["model_type"]
    partial = json.get("partial_rotary_factor", 1.0)
    refuse(origin, "partial_rotary_factor", partial, partial != 1.0)
    biased = bool(json.get("attention_bias", False))
    return _decoder(
        json,
        activation=activation(json, "hidden_act", "silu", origin),
        qkv_bias=kind == "qwen2" or biased,
        output_bias=kind != "qwen2" and biased,
        mlp_bias=bool(json.get("mlp_bias", False)),
        qk_norm=kind in ("qwen3", "qwen3_moe"),
        **_rope(json, _head_dim(json), origin, 1e6 if kind == "mixtral" else 1e4),
        **_windows(json, origin),
        **_experts(json, origin),
    )


def gemma(json: Json, origin: str) -> DecoderConfig:
    """Read Gemma 2, and the text model of Gemma 3."""
    refuse_set(json, origin, "use_bidirectional_attention")
    third = json["model_type"] == "gemma3_text"
    biased, count = bool(json.get("attention_bias", False)), json["num_hidden_layers"]
    period = json.get("sliding_window_pattern", 6) if third else 2
    types = [
        "full_attention" if i % period == 0 else "sliding_attention" for i in range(1, count + 1)
    ]
    caps = (None, None) if third else (50.0, 30.0)
    return _decoder(
        json,
        norm="rms_plus_one",
        post_norms=True,
        activation=activation(json, "hidden_activation", "gelu_pytorch_tanh", origin),
        qkv_bias=biased,
        output_bias=biased,
        qk_norm=third,
        attention_scale=json.get("query_pre_attn_scalar", 256) ** -0.5,
        attention_cap=json.get("attn_logit_softcapping", caps[0]),
        logit_cap=json.get("final_logit_softcapping", caps[1]),
        embedding_scale=json["hidden_size"] ** 0.5,
        tied=bool(json.get("tie_word_embeddings", True)),
        **(_gemma3_rope if third else _rope)(json, _head_dim(json), origin),
        **_windowed(json.get("sliding_window"), json.get("layer_types") or types, origin),
    )


def _gemma3_rope(json: Json, head_dim: int, origin: str) -> dict[str, Any]:
    """Return the rope settings of layers that see all tokens, and theta of layers with a window."""
    both = json.get("rope_parameters") or {}
    if "full_attention" not in both:
        local = float(json.get("rope_local_base_freq", 1e4))
        return {**_rope(json, head_dim, origin, 1e6), "local_rope_theta": local}
    one = both.get("sliding_attention") or {}
    kind = one.get("rope_type", "default")
    refuse(origin, "rope_parameters.sliding_attention.rope_type", kind, kind != "default")
    whole = _rope({**json, "rope_parameters": both["full_attention"]}, head_dim, origin, 1e6)
    return {**whole, "local_rope_theta": float(one.get("rope_theta", 1e4))}


def phi3(json: Json, origin: str) -> DecoderConfig:
    """Read Phi-3, Phi-3.5, Phi-4 and Phi-4-mini."""
    refuse_set(json, origin, "attention_bias", "mlp_bias", "lm_head_bias")
    scaling = json.get("rope_parameters") or json.get("rope_scaling") or {}
    kind = scaling.get("rope_type") or scaling.get("type") or "default"
    partial = scaling.get("partial_rotary_factor") or json.get("partial_rotary_factor", 1.0)
    rotated = int(_head_dim(json) * partial)
    long = kind in ("longrope", "su", "yarn")  # Phi's files also call LongRoPE yarn
    return _decoder(
        json,
        fused=True,
        activation=activation(json, "hidden_act", "silu", origin),
        rotary_dim=rotated,
        sliding_window=json.get("sliding_window"),
        **(_long_rope(json, scaling) if long else _rope(json, rotated, origin)),
    )


def _long_rope(json: Json, scaling: Json) -> dict[str, Any]:
    most = json["max_position_embeddings"]
    length = (
        scaling.get("original_max_position_embeddings")
        or json.get("original_max_position_embeddings")
        or most
    )
    factor, amplitude = scaling.get("factor") or most / length, scaling.get("attention_factor")
    if amplitude is None:
        amplitude = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(length))
    return {
        "rope_theta": float(scaling.get("rope_theta") or json.get("rope_theta") or 1e4),
        "rope_divisors": tuple(map(float, scaling["short_factor"])),
        "rope_long": LongRope(length, tuple(map(float, scaling["long_factor"]))),
        "rope_amplitude": amplitude,
    }


def gpt2(json: Json, origin: str) -> DecoderConfig:
    refuse_set(json, origin, "add_cross_attention", "scale_attn_by_inverse_layer_idx")
    named = {"hidden_size": "n_embd", "num_layers": "n_layer", "num_heads": "n_head"}
    found = sizes(json, **named, mlp_size="n_embd", max_positions="n_positions")
    hidden, heads = found["hidden_size"], found["num_heads"]
    return DecoderConfig(
        **found | {"mlp_size": json.get("n_inner") or 4 * hidden},
        num_kv_heads=heads,
        head_dim=hidden // heads,
        norm="layer",
        norm_eps=json.get("layer_norm_epsilon", 1e-5),
        positions="learned",
        fused=True,
        qkv_bias=True,
        output_bias=True,
        mlp_bias=True,
        attention_scale=None if json.get("scale_attn_weights", True) else 1.0,
        activation=activation(json, "activation_function", "gelu_new", origin),
        gated=False,
        tied=bool(json.get("tie_word_embeddings", True)),
        **special_ids(json),
    )


def _decoder(json: Json, **own: Any) -> DecoderConfig:
    """Return the config with the fields that all descendants of Llama share, and `own`."""
    shared = {
        **sizes(json),
        **special_ids(json),
        "num_kv_heads": json.get("num_key_value_heads") or json["num_attention_heads"],
        "head_dim": _head_dim(json),
        "norm_eps": json.get("rms_norm_eps", 1e-6),
        "tied": bool(json.get("tie_word_embeddings", False)),
    }
    return DecoderConfig(**(shared | own))


def _head_dim(json: Json) -> int:
    return json.get("head_dim") or json["hidden_size"] // json["num_attention_heads"]


def _windows(json: Json, origin: str) -> dict[str, Any]:
    """Return the sliding window, and which layers have it."""
    window, count = json.get("sliding_window"), json["num_hidden_layers"]
    if json["model_type"] in ("mistral", "mixtral"):
        return {"sliding_window": window}
    if not window or not json.get("use_sliding_window", False):
        return {}
    first = 0 if json["model_type"] == "qwen3_moe" else json.get("max_window_layers", 0)
    types = ["sliding_attention" if i >= first else "full_attention" for i in range(count)]
    return _windowed(window, json.get("layer_types") or types, origin)


def _windowed(window: int | None, types: list[str], origin: str) -> dict[str, Any]:
    """Return the sliding window of layers with sliding attention; nothing if all are full."""
    each = sliding(types, origin)
    if window is None or not any(each):
        return {}
    return {"sliding_window": window, "windowed": None if all(each) else each}


def _experts(json: Json, origin: str) -> dict[str, Any]:
    """Return the number of experts, their width, and how they are weighted."""
    kind = json["model_type"]
    if kind not in ("mixtral", "qwen3_moe"):
        return {}
    mixtral = kind == "mixtral"
    step = json.get("decoder_sparse_step", 1)
    refuse(origin, "decoder_sparse_step", step, step != 1)
    refuse_set(json, origin, "mlp_only_layers")
    # transformers 5 has one name for both, and writes either.
    count = json.get("num_local_experts") or json.get("num_experts")
    return {
        "num_experts": count or (8 if mixtral else 128),
        "experts_per_token": json.get("num_experts_per_tok", 2 if mixtral else 8),
        "renormalised": mixtral or bool(json.get("norm_topk_prob", False)),
        "mlp_size": json["intermediate_size" if mixtral else "moe_intermediate_size"],
    }


def _rope(json: Json, rotated: int, origin: str, default: float = 1e4) -> dict[str, Any]:
    """Return theta and the divisors of the frequencies; `rope_parameters` is the newer spelling."""
    scaling = json.get("rope_parameters") or json.get("rope_scaling") or {}
    theta = float(scaling.get("rope_theta") or json.get("rope_theta") or default)
    kind = scaling.get("rope_type") or scaling.get("type") or "default"
    if kind == "default":
        return {"rope_theta": theta}
    if kind == "linear":
        return {"rope_theta": theta, "rope_divisors": linear_divisors(rotated, scaling["factor"])}
    refuse(origin, "rope type", kind, kind != "llama3")
    divisors = llama3_divisors(
        rotated,
        theta,
        factor=scaling["factor"],
        low=scaling["low_freq_factor"],
        high=scaling["high_freq_factor"],
        original_length=scaling["original_max_position_embeddings"],
    )
    return {"rope_theta": theta, "rope_divisors": divisors}
