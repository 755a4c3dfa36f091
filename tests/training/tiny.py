"""Tiny random models in Hugging Face's layout, and made-up data, both written to a folder."""

from __future__ import annotations

import json
import pathlib
import shutil
from typing import Any

import numpy as np
import safetensors.numpy
import tokenizers
from tokenizers import models as kinds
from tokenizers import pre_tokenizers, processors

from lora_jax import models, paths
from lora_jax.models.weights import families

CHAT = pathlib.Path(__file__).parents[1] / "golden" / "golden_chat"
WORDS = [f"word{i}" for i in range(40)]
SPECIAL = ["<s>", "<pad>", "</s>", "<unk>"]

ROBERTA = {
    "model_type": "roberta",
    "vocab_size": len(SPECIAL) + len(WORDS),
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 66,
    "type_vocab_size": 1,
    "pad_token_id": 1,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "layer_norm_eps": 1e-5,
}
LLAMA = {
    "model_type": "llama",
    "vocab_size": len(SPECIAL) + len(WORDS),
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "intermediate_size": 32,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "hidden_act": "silu",
}
GPT2 = {
    "model_type": "gpt2",
    "vocab_size": len(SPECIAL) + len(WORDS),
    "n_embd": 16,
    "n_layer": 2,
    "n_head": 2,
    "n_positions": 64,
}
DEBERTA = {
    "model_type": "deberta-v2",
    "vocab_size": len(SPECIAL) + len(WORDS),
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 64,
    "type_vocab_size": 0,
    "pad_token_id": 1,
    "relative_attention": True,
    "position_buckets": 8,
    "norm_rel_ebd": "layer_norm",
    "share_att_key": True,
    "pos_att_type": "p2c|c2p",
    "conv_kernel_size": 3,
    "conv_act": "gelu",
    "position_biased_input": False,
}
GEMMA3 = {
    **LLAMA,
    "model_type": "gemma3_text",
    "sliding_window": 8,
    "sliding_window_pattern": 2,
    "query_pre_attn_scalar": 8,
}
VIT = {
    "model_type": "vit",
    "image_size": 16,
    "patch_size": 4,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "hidden_act": "gelu",
}
PIXELS = {"image_processor_type": "ViTImageProcessor", "size": {"height": 16, "width": 16}}
QWEN3_MOE = {
    **LLAMA,
    "model_type": "qwen3_moe",
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
}


def write_model(folder: pathlib.Path, description: dict[str, Any]) -> pathlib.Path:
    """Write a model with random weights, of the family that its description names."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(description))
    if description["model_type"] == "vit":
        (folder / "preprocessor_config.json").write_text(json.dumps(PIXELS))
    tokenizer(pair=description["model_type"] in ("roberta", "deberta-v2")).save(
        str(folder / "tokenizer.json")
    )
    config: Any = families.parse(description, "tiny")
    shapes = paths.flatten(models.shapes(config))
    table = families.FAMILIES[description["model_type"]].names
    random, tensors = np.random.default_rng(0), {}
    for row in table.rows:
        for layer in range(config.num_layers if row.layered else 1):
            path = row.path.format(layer=layer)
            if path not in shapes:
                continue
            # Gemma's norms multiply with 1 + scale.
            around_one = path.endswith("/scale") and "gemma" not in description["model_type"]
            mean, shape = 1.0 if around_one else 0.0, shapes[path].shape
            for expert in range(config.num_experts if row.of_experts else 1):
                one = shape[1:] if row.of_experts else shape
                value = random.normal(mean, 0.3, one).astype(np.float32)
                turned = value.T if row.transposed else value
                name = row.hf.format(layer=layer, expert=expert)
                tensors[name] = np.ascontiguousarray(turned)
    safetensors.numpy.save_file(tensors, folder / "model.safetensors")
    return folder


def write_chat(folder: pathlib.Path, count: int = 60) -> dict[str, str]:
    """Write a decoder with a chat template, and conversations and pairs; return their places."""
    base = write_model(
        folder / "base", {**LLAMA, "vocab_size": 400, "max_position_embeddings": 128}
    )
    shutil.copy(CHAT / "tokenizer.json", base)
    shutil.copy(CHAT / "chatml.jinja", base / "chat_template.jinja")
    (base / "tokenizer_config.json").write_text('{"eos_token": "</s>"}')
    random, chats, pairs = np.random.default_rng(0), [], []
    for _ in range(count):
        one, other = random.choice(WORDS, 2, replace=False).tolist()
        turns = [("user", f"say {one}"), ("assistant", one)] * int(random.integers(1, 3))
        chats.append({"messages": [{"role": who, "content": text} for who, text in turns]})
        prompt, *said = (
            [{"role": who, "content": text}]
            for who, text in (
                ("user", f"say {one}"),
                ("assistant", one),
                ("assistant", f"{other} {other}"),
            )
        )
        pairs.append({"prompt": prompt, "chosen": said[0], "rejected": said[1]})
    found = {"base": str(base)}
    for name, rows in {"chats": chats, "pairs": pairs}.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        found[name] = str(folder / f"{name}.jsonl")
    return found


def tokenizer(pair: bool) -> tokenizers.Tokenizer:
    """Return a tokenizer with one token for each word."""
    vocabulary = {word: i for i, word in enumerate([*SPECIAL, *WORDS])}
    made = tokenizers.Tokenizer(kinds.WordLevel(vocabulary, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.add_special_tokens(SPECIAL)
    if pair:
        made.post_processor = processors.TemplateProcessing(
            single="<s> $A </s>",
            pair="<s> $A </s> </s> $B </s>",
            special_tokens=[("<s>", 0), ("</s>", 2)],
        )
    made.enable_padding(pad_id=1, pad_token="<pad>")
    return made


def write_examples(folder: pathlib.Path, fields: tuple[str, ...], label: Any) -> str:
    """Write {split}.jsonl with texts of three kinds, and return the name of the source."""
    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(1)
    for split, count in (("train", 96), ("validation", 40)):
        lines = []
        for i in range(count):
            texts = [random.choice(WORDS[i % 3 : 12 : 3], random.integers(3, 9)) for _ in fields]
            example = {f: " ".join(t) for f, t in zip(fields, texts, strict=True)}
            lines.append(json.dumps({**example, "label": label(i % 3)}))
        (folder / f"{split}.jsonl").write_text("\n".join(lines) + "\n")
    return str(folder / "{split}.jsonl")
