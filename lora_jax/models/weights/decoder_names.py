"""The names of the tensors of decoders; see `names`."""

from lora_jax.models.weights.tensor_names import (
    TensorName,
    TensorNames,
    conv1d,
    layer_norm,
    linear,
    of_layers,
    scale,
)

_HEADS = {"last": (TensorName("classifier/out/kernel", "score.weight"),)}

LLAMA = TensorNames(
    rows=(
        TensorName("embed/embedding", "embed_tokens.weight", "token_embd.weight"),
        *of_layers(
            *("layers_{layer}/", "layers.{layer}.", "blk.{layer}."),
            *linear("attention/q", "self_attn.q_proj", "attn_q"),
            *linear("attention/k", "self_attn.k_proj", "attn_k"),
            *linear("attention/v", "self_attn.v_proj", "attn_v"),
            *linear("attention/o", "self_attn.o_proj", "attn_output"),
            scale("attention/q_norm", "self_attn.q_norm", "attn_q_norm"),
            scale("attention/k_norm", "self_attn.k_norm", "attn_k_norm"),
            scale("attention_norm", "input_layernorm", "attn_norm"),
            *linear("mlp/gate", "mlp.gate_proj", "ffn_gate"),
            *linear("mlp/up", "mlp.up_proj", "ffn_up"),
            *linear("mlp/down", "mlp.down_proj", "ffn_down"),
            scale("mlp_norm", "post_attention_layernorm", "ffn_norm"),
        ),
        scale("norm", "norm", "output_norm"),
        TensorName("lm_head/kernel", "lm_head.weight", "output.weight"),
    ),
    heads=_HEADS,
    prefix="model.",
    # rope_freqs holds the divisors of the frequencies, which are read into the config.
    skipped=(
        *("*.self_attn.rotary_emb.inv_freq", "rotary_emb.inv_freq", "rope_freqs.weight"),
        "score.weight",
    ),
)


def _as_llama(*within: TensorName, skipped: tuple[str, ...] = ()) -> TensorNames:
    """Return the names of a decoder named as Llama, with q, k, v, o and `within` in a layer."""
    return TensorNames(
        rows=(
            TensorName("embed/embedding", "embed_tokens.weight"),
            *of_layers(
                *("layers_{layer}/", "layers.{layer}.", ""),
                *(row for x in "qkvo" for row in linear(f"attention/{x}", f"self_attn.{x}_proj")),
                scale("attention_norm", "input_layernorm"),
                *within,
            ),
            scale("norm", "norm"),
            TensorName("lm_head/kernel", "lm_head.weight"),
        ),
        heads=_HEADS,
        prefix="model.",
        skipped=(*skipped, "score.weight"),
    )


_GATED = tuple(row for x in ("gate", "up", "down") for row in linear(f"mlp/{x}", f"mlp.{x}_proj"))
_QK_NORMS = tuple(scale(f"attention/{x}_norm", f"self_attn.{x}_norm") for x in "qk")
_MLP_NORM = scale("mlp_norm", "post_attention_layernorm")  # in spite of its name, before the MLP
_INV_FREQ = ("*.self_attn.rotary_emb.inv_freq", "rotary_emb.inv_freq")


def _experts(router: str, experts: str, **names: str) -> tuple[TensorName, ...]:
    """Return the names of a router, and of the products of each expert."""
    each = {f"mlp/experts/{ours}/kernel": f"{experts}.{{expert}}.{x}" for ours, x in names.items()}
    every = {"mlp/router/kernel": router, **each}
    return tuple(TensorName(path, f"{hf}.weight") for path, hf in every.items())


GEMMA = _as_llama(
    *_GATED,
    *_QK_NORMS,  # only Gemma 3 has these
    scale("attention_post_norm", "post_attention_layernorm"),
    scale("mlp_norm", "pre_feedforward_layernorm"),
    scale("mlp_post_norm", "post_feedforward_layernorm"),
)
PHI3 = _as_llama(
    *linear("attention/qkv", "self_attn.qkv_proj"),
    *linear("mlp/gate_up", "mlp.gate_up_proj"),
    *linear("mlp/down", "mlp.down_proj"),
    _MLP_NORM,
    skipped=_INV_FREQ,
)
MIXTRAL = _as_llama(
    *_experts(
        *("block_sparse_moe.gate", "block_sparse_moe.experts"), gate="w1", down="w2", up="w3"
    ),
    _MLP_NORM,
    skipped=_INV_FREQ,
)
QWEN3_MOE = _as_llama(
    *_QK_NORMS,
    *_experts("mlp.gate", "mlp.experts", gate="gate_proj", up="up_proj", down="down_proj"),
    _MLP_NORM,
)

GPT2 = TensorNames(
    rows=(
        TensorName("embed/embedding", "wte.weight"),
        TensorName("position/embedding", "wpe.weight"),
        *of_layers(
            *("layers_{layer}/", "h.{layer}.", ""),
            *layer_norm("attention_norm", "ln_1"),
            *conv1d("attention/qkv", "attn.c_attn"),
            *conv1d("attention/o", "attn.c_proj"),
            *layer_norm("mlp_norm", "ln_2"),
            *conv1d("mlp/up", "mlp.c_fc"),
            *conv1d("mlp/down", "mlp.c_proj"),
        ),
        *layer_norm("norm", "ln_f"),
        TensorName("lm_head/kernel", "lm_head.weight"),
    ),
    heads=_HEADS,
    prefix="transformer.",
    # The first two are the causal mask, in old files.
    skipped=("h.*.attn.bias", "h.*.attn.masked_bias", "score.weight"),
)
