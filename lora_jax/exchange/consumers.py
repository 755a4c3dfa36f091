"""The settings that tools which read PEFT folders refuse, misread or need (autumn 2026).

The rules change over time. Each is one function of the settings and the shapes of the tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

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
    rules = RULES[consumer]
    tables = [key for key in shapes if any(f".{name}." in f".{key}" for name in HEADS)]
    heads = [rules.heads.format(key) for key in tables[:1]]
    return (*_common(settings, shapes, rules.rslora), *heads, *rules.own(settings, shapes))


def notes(settings: Mapping[str, Any], tensors: Mapping[str, np.ndarray]) -> tuple[str, ...]:
    """Return the notes on a saved adapter: what a server needs, and which tools refuse it."""
    shapes = {key: x.shape for key, x in tensors.items()}
    found = [f"rank {largest_rank(settings)}: vLLM needs --max-lora-rank {vllm_rank(settings)}"]
    found = found if settings.get("peft_type", "LORA") == "LORA" else []
    users: dict[str, list[str]] = {}
    for consumer in RULES:
        for said in findings(consumer, settings, shapes):
            if not said.startswith("needs"):
                users.setdefault(said, []).append(consumer)
    return (*found, *(f"{', '.join(names)}: {said}" for said, names in users.items()))


class Consumer(NamedTuple):
    """A tool: what it says of use_rslora, of embeddings and heads, and of settings of its own."""

    rslora: str | None
    heads: str
    own: Callable[[Mapping[str, Any], Shapes], Iterator[str]]


def _vllm(settings: Mapping[str, Any], shapes: Shapes) -> Iterator[str]:
    rank = largest_rank(settings)
    if rank > VLLM_RANKS[-1]:
        yield f"refuses the rank {rank}: it has ranks up to {VLLM_RANKS[-1]}"
    elif rank > 16:
        yield f"needs --max-lora-rank {vllm_rank(settings)}: its default is 16"
    if settings.get("bias", "none") != "none":
        yield f"refuses bias={settings['bias']!r}"
    if settings.get("use_rslora") and any(".experts." in key for key in shapes):
        yield "misreads use_rslora for experts"
    if settings.get("target_parameters"):
        yield _PARAMETERS


def _sglang(settings: Mapping[str, Any], shapes: Shapes) -> Iterator[str]:
    yield f"needs --max-lora-rank {largest_rank(settings)} or above, if adapters are loaded later"
    targets = settings.get("target_modules") or []
    if isinstance(targets, str) or any("." in name for name in targets):
        yield "needs --lora-target-modules: target_modules are not last names alone"
    if settings.get("target_parameters"):
        yield _PARAMETERS


def _llama_cpp(settings: Mapping[str, Any], shapes: Shapes) -> Iterator[str]:
    yield "needs the base's config.json to convert it (--base)"


def _lorax(settings: Mapping[str, Any], shapes: Shapes) -> Iterator[str]:
    if largest_rank(settings) > 128:
        yield f"refuses the rank {largest_rank(settings)}: above 128"
    if settings.get("rank_pattern"):
        yield "refuses ranks that differ from layer to layer"
    if not settings.get("base_model_name_or_path"):
        yield "needs base_model_name_or_path"


def _ollama(settings: Mapping[str, Any], shapes: Shapes) -> Iterator[str]:
    alpha = settings.get("lora_alpha", 8)
    if not isinstance(alpha, int) or alpha < 0:
        yield f"refuses lora_alpha={alpha}: it reads an unsigned integer"
    yield "needs a base of the architecture llama or gemma2; for others a GGUF adapter"


_PARAMETERS = "misreads target_parameters in most versions; write a key for each expert"
_ALONE = "misreads use_rslora: it reads lora_alpha alone"
_UNCONVERTED = "refuses {}: it converts no embeddings and heads"
RULES = {
    "vllm": Consumer(None, "refuses {} unless its class of the model lists the module", _vllm),
    "sglang": Consumer(
        "misreads use_rslora: it scales by alpha / r",
        "refuses {} unless its pool of modules has the module",
        _sglang,
    ),
    "llama.cpp": Consumer(_ALONE, _UNCONVERTED, _llama_cpp),
    "lorax": Consumer(None, "misreads {}: it leaves out what its model has no adapter for", _lorax),
    "ollama": Consumer(_ALONE, _UNCONVERTED, _ollama),
}


def _common(settings: Mapping[str, Any], shapes: Shapes, rslora: str | None) -> Iterator[str]:
    """Yield the findings about parts of an adapter that no consumer reads."""
    if settings.get("peft_type", "LORA") != "LORA":
        yield f"refuses peft_type={settings['peft_type']}"
    if settings.get("use_dora"):
        yield "refuses use_dora"
    if settings.get("modules_to_save") not in OFF:
        yield f"refuses modules_to_save={settings['modules_to_save']}"
    if settings.get("use_rslora") and rslora:
        yield rslora
    if patterns := [p for p in ("rank_pattern", "alpha_pattern") if settings.get(p)]:
        yield f"misreads {' and '.join(patterns)}: it has one alpha for all modules"
    if settings.get("lora_bias"):
        yield "misreads lora_bias: the biases are not read"
    if settings.get("trainable_token_indices") not in OFF:
        yield "misreads trainable_token_indices"
    if convs := [key for key, shape in shapes.items() if ".lora_A" in key and len(shape) > 2]:
        yield f"refuses {convs[0]}: the factors of a convolution"


def largest_rank(settings: Mapping[str, Any]) -> int:
    """Return the largest rank of any module."""
    return max([settings.get("r") or 8, *(settings.get("rank_pattern") or {}).values()])


def vllm_rank(settings: Mapping[str, Any]) -> int:
    rank = largest_rank(settings)
    return next((r for r in VLLM_RANKS if r >= rank), rank)
