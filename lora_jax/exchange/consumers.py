"""The settings that tools which read PEFT folders refuse, misread or need (autumn 2026).

The rules change over time. Each is one function of the settings and the shapes of the tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from lora_jax.errors import LoraError
from lora_jax.exchange.peft_config import OFF

Shapes = Mapping[str, tuple[int, ...]]
VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
HEADS = ("embed_tokens", "lm_head", "wte", "word_embeddings")


def findings(consumer: str, settings: Mapping[str, Any], shapes: Shapes) -> tuple[str, ...]:
    """Return a sentence for each setting that a consumer refuses, misreads or needs."""
    if consumer not in RULES:
        raise LoraError(f"no rules of {consumer!r} are known; there are {', '.join(RULES)}")
    return tuple(RULES[consumer](settings, shapes))


def notes(settings: Mapping[str, Any], tensors: Mapping[str, np.ndarray]) -> tuple[str, ...]:
    """Return the notes on a saved adapter: what a server needs, and which tools refuse it."""
    shapes = {key: x.shape for key, x in tensors.items()}
    found = [f"rank {largest_rank(settings)}: vLLM needs --max-lora-rank {_vllm_rank(settings)}"]
    for consumer in RULES:
        wrong = [x for x in findings(consumer, settings, shapes) if not x.startswith("needs")]
        found += [f"{consumer} {x}" for x in wrong]
    return tuple(found)


def _vllm(settings: Mapping[str, Any], shapes: Shapes) -> list[str]:
    found = _common(settings, shapes, rslora=None)
    rank = largest_rank(settings)
    if rank > VLLM_RANKS[-1]:
        found.append(f"refuses the rank {rank}: it has ranks up to {VLLM_RANKS[-1]}")
    elif rank > 16:
        found.append(f"needs --max-lora-rank {_vllm_rank(settings)}: its default is 16")
    if settings.get("bias", "none") != "none":
        found.append(f"refuses bias={settings['bias']!r}")
    if settings.get("use_rslora") and any(".experts." in key for key in shapes):
        found.append("misreads use_rslora for experts")
    found += _heads(shapes, "refuses", " unless its class of the model lists the module")
    if settings.get("target_parameters"):
        found.append("misreads target_parameters in most versions; write a key for each expert")
    return found


def _sglang(settings: Mapping[str, Any], shapes: Shapes) -> list[str]:
    found = _common(settings, shapes, rslora="misreads use_rslora: it scales by alpha / r")
    found.append(
        f"needs --max-lora-rank {largest_rank(settings)} or above, if adapters are loaded later"
    )
    targets = settings.get("target_modules") or []
    if isinstance(targets, str) or any("." in name for name in targets):
        found.append("needs --lora-target-modules: target_modules are not last names alone")
    if settings.get("target_parameters"):
        found.append("misreads target_parameters in most versions; write a key for each expert")
    found += _heads(shapes, "refuses", " unless its pool of modules has the module")
    return found


def _llama_cpp(settings: Mapping[str, Any], shapes: Shapes) -> list[str]:
    found = _common(settings, shapes, rslora="misreads use_rslora: it reads lora_alpha alone")
    found += _heads(shapes, "refuses", ": it converts no embeddings and heads")
    found.append("needs the base's config.json to convert it (--base)")
    return found


def _lorax(settings: Mapping[str, Any], shapes: Shapes) -> list[str]:
    found = _common(settings, shapes, rslora=None)
    if largest_rank(settings) > 128:
        found.append(f"refuses the rank {largest_rank(settings)}: above 128")
    if settings.get("rank_pattern"):
        found.append("refuses ranks that differ from layer to layer")
    found += _heads(shapes, "misreads", ": it leaves out what its model has no adapter for")
    if not settings.get("base_model_name_or_path"):
        found.append("needs base_model_name_or_path")
    return found


def _ollama(settings: Mapping[str, Any], shapes: Shapes) -> list[str]:
    found = _common(settings, shapes, rslora="misreads use_rslora: it reads lora_alpha alone")
    alpha = settings.get("lora_alpha", 8)
    if not isinstance(alpha, int) or alpha < 0:
        found.append(f"refuses lora_alpha={alpha}: it reads an unsigned integer")
    found += _heads(shapes, "refuses", ": it converts no embeddings and heads")
    found.append("needs a base of the architecture llama or gemma2; for others a GGUF adapter")
    return found


RULES: dict[str, Callable[[Mapping[str, Any], Shapes], list[str]]] = {
    "vllm": _vllm,
    "sglang": _sglang,
    "llama.cpp": _llama_cpp,
    "lorax": _lorax,
    "ollama": _ollama,
}


def _common(settings: Mapping[str, Any], shapes: Shapes, *, rslora: str | None) -> list[str]:
    """Return the findings about parts of an adapter that no consumer reads."""
    found = []
    if settings.get("use_dora"):
        found.append("refuses use_dora")
    if settings.get("modules_to_save") not in OFF:
        found.append(f"refuses modules_to_save={settings['modules_to_save']}")
    if settings.get("use_rslora") and rslora:
        found.append(rslora)
    if patterns := [p for p in ("rank_pattern", "alpha_pattern") if settings.get(p)]:
        found.append(f"misreads {' and '.join(patterns)}: it has one alpha for all modules")
    if settings.get("lora_bias"):
        found.append("misreads lora_bias: the biases are not read")
    if settings.get("trainable_token_indices") not in OFF:
        found.append("misreads trainable_token_indices")
    if convs := [key for key, shape in shapes.items() if ".lora_A" in key and len(shape) > 2]:
        found.append(f"refuses {convs[0]}: the factors of a convolution")
    return found


def largest_rank(settings: Mapping[str, Any]) -> int:
    """Return the largest rank of any module."""
    return max([settings.get("r") or 8, *(settings.get("rank_pattern") or {}).values()])


def _vllm_rank(settings: Mapping[str, Any]) -> int:
    rank = largest_rank(settings)
    return next((r for r in VLLM_RANKS if r >= rank), rank)


def _heads(shapes: Shapes, verb: str, why: str) -> list[str]:
    """Return the finding about the first embedding or output head; [] if there is none."""
    tables = [key for key in shapes if any(f".{name}." in f".{key}" for name in HEADS)]
    return [f"{verb} {key}{why}" for key in tables[:1]]
