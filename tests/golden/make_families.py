"""Write golden_models/ of the other families: tiny random models, and transformers' results.

    pip install torch transformers
    python tests/golden/make_families.py [name ...]

There is one folder for each set of options in a family's config.json that our models distinguish.
Every parameter is random, norms and biases included, so that a lost parameter is noticed. A folder
depends only on its name, so that others can be added later. The present ones were written with
torch 2.13.0 and transformers 5.24.0; other versions give the same within rounding.
"""

import json
import shutil
import sys
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import transformers as hf

HERE = Path(__file__).parent / "golden_models"
LENGTH = 11
SIZES = {
    "vocab_size": 19,
    "hidden_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 10,
    "max_position_embeddings": 16,
}
DECODER = {**SIZES, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
GPT2 = {"vocab_size": 19, "n_embd": 12, "n_layer": 2, "n_head": 2, "n_positions": 16}
GPT2 |= {"bos_token_id": 1, "eos_token_id": 2}
GEMMA = {**DECODER, "num_key_value_heads": 1, "head_dim": 8, "query_pre_attn_scalar": 5}
GEMMA |= {"sliding_window": 4}
PHI = {**DECODER, "hidden_size": 16, "num_key_value_heads": 1}
MIXTURE = {**DECODER, "num_key_value_heads": 1, "head_dim": 8, "num_experts_per_tok": 2}
LONG = {
    "rope_type": "longrope",
    "rope_theta": 50.0,
    "partial_rotary_factor": 0.5,
    "short_factor": [1.0, 1.5],
    "long_factor": [1.5, 4.0],
    "original_max_position_embeddings": 8,
}
DEBERTA = {**SIZES, "num_labels": 3, "relative_attention": True, "pos_att_type": ["p2c", "c2p"]}
MODERN = {**SIZES, "num_labels": 3, "local_attention": 4, "bos_token_id": 1, "eos_token_id": 2}
MODERN |= {
    "rope_parameters": {
        "full_attention": {"rope_type": "default", "rope_theta": 100.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 10.0},
    }
}
VIT = {name: SIZES[name] for name in SIZES if name.endswith(("size", "layers", "heads"))}
VIT |= {"image_size": 8, "patch_size": 4, "num_labels": 3}
DISTIL = {"vocab_size": 19, "dim": 12, "n_layers": 2, "n_heads": 2, "hidden_dim": 10}
DISTIL |= {"max_position_embeddings": 16, "num_labels": 3}

MODELS: dict[str, Callable[[], hf.PreTrainedModel]] = {
    "deberta_v2": lambda: hf.DebertaV2ForSequenceClassification(
        hf.DebertaV2Config(
            **DEBERTA,
            share_att_key=False,
            max_relative_positions=6,
            conv_kernel_size=3,
            conv_act="gelu",
            pooler_hidden_act="tanh",
        )
    ),
    "deberta_v3": lambda: hf.DebertaV2ForSequenceClassification(
        hf.DebertaV2Config(
            **DEBERTA,
            share_att_key=True,
            position_buckets=4,
            norm_rel_ebd="layer_norm",
            position_biased_input=False,
            type_vocab_size=0,
        )
    ),
    "distilbert": lambda: hf.DistilBertForSequenceClassification(hf.DistilBertConfig(**DISTIL)),
    "modernbert": lambda: hf.ModernBertForSequenceClassification(
        hf.ModernBertConfig(**MODERN, pad_token_id=0)
    ),
    "modernbert_biased": lambda: hf.ModernBertForSequenceClassification(
        hf.ModernBertConfig(
            **MODERN,
            pad_token_id=0,
            attention_bias=True,
            mlp_bias=True,
            norm_bias=True,
            classifier_bias=True,
            classifier_activation="relu",
            layer_types=["sliding_attention", "full_attention"],
        )
    ),
    "vit": lambda: hf.ViTForImageClassification(hf.ViTConfig(**VIT)),
    "vit_oblong": lambda: hf.ViTForImageClassification(
        hf.ViTConfig(
            **VIT | {"image_size": [4, 9], "patch_size": [2, 3], "num_channels": 1},
            qkv_bias=False,
            hidden_act="relu",
        )
    ),
    "gpt2": lambda: hf.GPT2LMHeadModel(hf.GPT2Config(**GPT2)),
    "gpt2_unscaled": lambda: hf.GPT2LMHeadModel(
        hf.GPT2Config(
            **GPT2,
            n_inner=10,
            activation_function="relu",
            scale_attn_weights=False,
            tie_word_embeddings=False,
        )
    ),
    "gemma2": lambda: hf.Gemma2ForCausalLM(
        hf.Gemma2Config(**GEMMA, attn_logit_softcapping=3.0, final_logit_softcapping=2.0)
    ),
    "gemma2_biased": lambda: hf.Gemma2ForCausalLM(
        hf.Gemma2Config(
            **GEMMA,
            attn_logit_softcapping=None,
            final_logit_softcapping=None,
            attention_bias=True,
            layer_types=["full_attention", "full_attention"],
            hidden_activation="gelu",
        )
    ),
    "gemma3": lambda: hf.Gemma3ForCausalLM(
        hf.Gemma3TextConfig(
            **GEMMA,
            layer_types=["sliding_attention", "full_attention"],
            rope_parameters={
                "sliding_attention": {"rope_type": "default", "rope_theta": 10.0},
                "full_attention": {"rope_type": "linear", "rope_theta": 100.0, "factor": 3.0},
            },
        )
    ),
    "phi3": lambda: hf.Phi3ForCausalLM(hf.Phi3Config(**PHI, sliding_window=4)),
    "phi3_long": lambda: hf.Phi3ForCausalLM(
        hf.Phi3Config(
            **PHI,
            rope_parameters=LONG,
            original_max_position_embeddings=8,
            tie_word_embeddings=True,
        )
    ),
    "mixtral": lambda: hf.MixtralForCausalLM(
        hf.MixtralConfig(**MIXTURE, num_local_experts=3, sliding_window=4)
    ),
    "qwen3_moe": lambda: hf.Qwen3MoeForCausalLM(
        hf.Qwen3MoeConfig(**MIXTURE, num_experts=4, moe_intermediate_size=6, norm_topk_prob=True)
    ),
    "qwen3_moe_biased": lambda: hf.Qwen3MoeForCausalLM(
        hf.Qwen3MoeConfig(
            **MIXTURE,
            num_experts=3,
            moe_intermediate_size=6,
            attention_bias=True,
            use_sliding_window=True,
            sliding_window=4,
            tie_word_embeddings=True,
        )
    ),
}


def main() -> None:
    for name in sys.argv[1:] or MODELS:
        torch.manual_seed(zlib.crc32(name.encode()))
        write(name, MODELS[name]())


def write(name: str, model: hf.PreTrainedModel) -> None:
    model.eval().requires_grad_(False)
    model.config._attn_implementation = model.config._experts_implementation = "eager"
    for path, value in model.named_parameters():
        norm = "norm" in path.lower() or ".ln_" in path
        around_one = norm and path.endswith("weight") and "gemma" not in name  # Gemma has 1 + w
        centre = 1.0 if around_one else 0.0
        value.copy_(centre + 0.3 * torch.randn_like(value))
    folder = HERE / name
    shutil.rmtree(folder, ignore_errors=True)
    model.save_pretrained(folder)
    (folder / "generation_config.json").unlink(missing_ok=True)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config, indent=1, sort_keys=True) + "\n")
    np.savez_compressed(folder / "expected.npz", **expected(model))


def expected(model: hf.PreTrainedModel) -> dict[str, np.ndarray]:
    """Inputs (two rows, the second one shorter), logits, and hidden states of an encoder."""
    if model.main_input_name == "pixel_values":
        config = model.config
        size = config.image_size if isinstance(config.image_size, list) else [config.image_size] * 2
        pixels = torch.randn(2, config.num_channels, *size)
        found = {"pixels": pixels, "logits": model(pixels).logits}
        found["hidden"] = model.base_model(pixels).last_hidden_state
        return {key: value.numpy() for key, value in found.items()}
    ids = torch.randint(3, SIZES["vocab_size"], (2, LENGTH))
    mask = torch.ones_like(ids)
    mask[1, LENGTH - 3 :] = 0
    logits = model(input_ids=ids, attention_mask=mask).logits
    found = {"input_ids": ids, "attention_mask": mask, "logits": logits}
    if type(model).__name__.endswith("ForSequenceClassification"):
        found["hidden"] = model.base_model(ids, attention_mask=mask).last_hidden_state
    if "long_factor" in (getattr(model.config, "rope_parameters", None) or {}):
        found["short"] = model(input_ids=ids[:, : LONG["original_max_position_embeddings"]]).logits
    return {key: value.numpy() for key, value in found.items()}


if __name__ == "__main__":
    main()
