"""The files of a Hugging Face folder other than weights: configuration, tokenizer, templates."""

from __future__ import annotations

import functools
import json
import os
import pathlib
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from lora_jax import paths
from lora_jax.errors import LoraError
from lora_jax.models.config import DecoderConfig
from lora_jax.models.weights.families import parse
from lora_jax.models.weights.folder import Folder
from lora_jax.models.weights.stored import LAST
from lora_jax.serving.served_adapters import Served
from lora_jax.system import regular_files
from lora_jax.system.whole_files import FileWriter

# model_type -> transformers' class for a decoder, or for an encoder with a classification head.
ARCHITECTURES = {
    "bert": "BertForSequenceClassification",
    "roberta": "RobertaForSequenceClassification",
    "xlm-roberta": "XLMRobertaForSequenceClassification",
    "deberta-v2": "DebertaV2ForSequenceClassification",
    "distilbert": "DistilBertForSequenceClassification",
    "modernbert": "ModernBertForSequenceClassification",
    "vit": "ViTForImageClassification",
    "gemma2": "Gemma2ForCausalLM",
    "gemma3_text": "Gemma3ForCausalLM",
    "gpt2": "GPT2LMHeadModel",
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "mixtral": "MixtralForCausalLM",
    "phi3": "Phi3ForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
}
# Files that are copied from a Hugging Face folder unchanged. No code, and no weights.
_COMPANIONS = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.txt", "vocab.json", "merges.txt", "tokenizer.model", "spm.model"),
    *("chat_template.jinja", "generation_config.json", "preprocessor_config.json"),
)


def writers(run: Served, dtype: np.dtype) -> dict[str, FileWriter]:
    """Return {name: writer} of each file other than the weights; config.json is the last."""
    config = config_json(run, dtype)
    found = _companions(run)
    if run.head is None and "generation_config.json" not in found:
        ids = {k: config[k] for k in _IDS if config.get(k) is not None}
        found["generation_config.json"] = _json({"_from_model_config": True, **ids})
    return {**found, "config.json": _json(config)}


_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


def config_json(run: Served, dtype: np.dtype) -> dict[str, Any]:
    """Return config.json: the base's own, with the class of the model, its labels and dtype."""
    source = run.source
    own = dict(source.json) if isinstance(source, Folder) else _of_gguf(run)
    for key in ("quantization_config", "auto_map", "dtype", "_name_or_path"):
        own.pop(key, None)
    kind = own["model_type"]
    own |= {"architectures": [_architecture(run, kind)], "torch_dtype": str(dtype)}
    return own if run.head is None else own | _of_head(run, kind)


def _architecture(run: Served, kind: str) -> str:
    """Return transformers' class for a model with or without a head."""
    if run.head is None or not isinstance(run.config, DecoderConfig):
        return ARCHITECTURES[kind]
    return re.sub("(ForCausalLM|LMHeadModel)$", "ForSequenceClassification", ARCHITECTURES[kind])


def check_head(run: Served, merged: bool) -> None:
    """Raise `LoraError` unless transformers computes the head, by our config.json or the base's."""
    source: Any = run.source
    head = run.head
    assert head is not None
    if head.pooling == LAST:
        return
    kind = source.json["model_type"]
    wanted = "cls" if kind == "vit" else "roberta_head"
    if head.pooling != wanted:
        raise LoraError(
            f"{run.member.folder} was trained with model.pooling {head.pooling!r}, and "
            f"{ARCHITECTURES[kind]} has no such head: its own is {wanted!r}.\nTrain with "
            f"--model.pooling {wanted} to export it with its head. Of this run, `--format peft "
            "--no-head` writes the adapter of the encoder alone, `--format orbax` copies all, and "
            "`lora-jax predict` runs it"
        )
    whole = paths.flatten({"classifier": run.shapes["classifier"]})
    if frozen := [path for path in whole if path not in run.member.trainable]:
        raise LoraError(
            f"{run.member.folder} has no {frozen[0]!r} with its adapter, since that part of the "
            "head was not trained in full. Train with --lora.trainable 'classifier/**' to export it"
        )
    if not merged and (pooled := source.json.get("classifier_pooling", "cls")) != "cls":
        raise LoraError(
            f"{run.reference} has classifier_pooling {pooled!r} in its config.json, with "
            "which PEFT opens it, and this run's head reads the first token. Use --format hf: it "
            "writes a config.json of its own"
        )


def _of_head(run: Served, kind: str) -> dict[str, Any]:
    check_head(run, merged=True)
    pooled = {"classifier_pooling": "cls"} if kind == "modernbert" else {}
    if not run.member.labels:
        return {"num_labels": 1, "problem_type": "regression", **pooled}
    return {
        "id2label": {str(i): name for i, name in enumerate(run.member.labels)},
        "label2id": {name: i for i, name in enumerate(run.member.labels)},
        "problem_type": "single_label_classification",
        **pooled,
    }


def _of_gguf(run: Served) -> dict[str, Any]:
    """Return the configuration of a GGUF file in Hugging Face's terms, and check it."""
    config = run.config
    kind = "qwen3" if config.qk_norm else "qwen2" if config.qkv_bias else "llama"
    found: dict[str, Any] = {
        "model_type": "mistral" if kind == "llama" and config.sliding_window else kind,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "intermediate_size": config.mlp_size,
        "max_position_embeddings": config.max_positions,
        "hidden_act": "silu",
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        "sliding_window": config.sliding_window,
        "tie_word_embeddings": config.tied,
        "bos_token_id": config.bos_id,
        "eos_token_id": config.eos_id,
        "pad_token_id": config.pad_id,
    }
    divisors = config.rope_divisors or (1.0,)
    if len(set(divisors)) == 1 and divisors[0] != 1.0:
        found["rope_scaling"] = {"rope_type": "linear", "factor": divisors[0]}
    origin = str(run.source.path)
    if parse(found, origin) != run.source.config:
        raise LoraError(
            f"{origin} is of a variant that config.json was not written for: it says\n"
            f"{run.source.config}\nand the words found for it mean\n{parse(found, origin)}\n"
            "Train on the Hugging Face folder of this model to export it as one"
        )
    return found


def _companions(run: Served) -> dict[str, FileWriter]:
    source = run.source
    if isinstance(source, Folder):
        there = {name: source.path / name for name in _COMPANIONS}
        return {
            name: functools.partial(_copy, path)
            for name, path in there.items()
            if os.path.lexists(path)  # a link that leads nowhere is an error
        }
    tokenizer, config = source.tokenizer(), run.config
    ids = {"bos_token": config.bos_id, "eos_token": config.eos_id, "pad_token": config.pad_id}
    settings: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": config.max_positions,
        "clean_up_tokenization_spaces": False,
        **{key: tokenizer.id_to_token(i) for key, i in ids.items() if i is not None},
    }
    found: dict[str, FileWriter] = {
        "tokenizer.json": lambda path: tokenizer.save(str(path)),
        "tokenizer_config.json": _json(settings),
    }
    if source.chat_template is not None:
        template = source.chat_template
        found["chat_template.jinja"] = lambda path: path.write_text(template, encoding="utf-8")
    return found


def _copy(path: pathlib.Path, to: pathlib.Path) -> None:
    to.write_bytes(regular_files.read(path, LoraError))


def _json(value: Mapping[str, Any]) -> FileWriter:
    text = json.dumps(value, indent=2, ensure_ascii=False) + "\n"
    return lambda path: path.write_text(text, encoding="utf-8")
