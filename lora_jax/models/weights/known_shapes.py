"""The shapes of well-known models, for plans: `shape:llama3-8b`. There are no weights.

The numbers are from the config.json that the makers publish with each model.
"""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import Any, NoReturn

from lora_jax.errors import ModelReferenceError, nearest
from lora_jax.models.config import StoredConfig
from lora_jax.models.weights.assemble import Source
from lora_jax.models.weights.families import parse

_FIELDS = (
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim", "vocab_size", "max_position_embeddings", "rope_theta",
    "tie_word_embeddings",
)  # fmt: skip
_LLAMA3 = {"rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
           "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}}  # fmt: skip
_SMALL3 = {"rope_scaling": {**_LLAMA3["rope_scaling"], "factor": 32.0}}
_SHAPES: dict[str, tuple[str, tuple[Any, ...], dict[str, Any]]] = {
    "smollm2-135m": ("llama", (576, 1536, 30, 9, 3, 64, 49152, 8192, 1e5, True), {}),
    "tinyllama-1.1b": ("llama", (2048, 5632, 22, 32, 4, 64, 32000, 2048, 1e4, False), {}),
    "llama2-7b": ("llama", (4096, 11008, 32, 32, 32, 128, 32000, 4096, 1e4, False), {}),
    "llama2-13b": ("llama", (5120, 13824, 40, 40, 40, 128, 32000, 4096, 1e4, False), {}),
    "llama2-70b": ("llama", (8192, 28672, 80, 64, 8, 128, 32000, 4096, 1e4, False), {}),
    "llama3-8b": ("llama", (4096, 14336, 32, 32, 8, 128, 128256, 8192, 5e5, False), {}),
    "llama3-70b": ("llama", (8192, 28672, 80, 64, 8, 128, 128256, 8192, 5e5, False), {}),
    "llama3.1-405b": ("llama", (16384, 53248, 126, 128, 8, 128, 128256, 131072, 5e5, False),
                      _LLAMA3),
    "llama3.2-1b": ("llama", (2048, 8192, 16, 32, 8, 64, 128256, 131072, 5e5, True), _SMALL3),
    "llama3.2-3b": ("llama", (3072, 8192, 28, 24, 8, 128, 128256, 131072, 5e5, True), _SMALL3),
    "mistral-7b": ("mistral", (4096, 14336, 32, 32, 8, 128, 32768, 32768, 1e6, False), {}),
    "mixtral-8x7b": ("mixtral", (4096, 14336, 32, 32, 8, 128, 32000, 32768, 1e6, False),
                     {"num_local_experts": 8, "num_experts_per_tok": 2}),
    "qwen2.5-7b": ("qwen2", (3584, 18944, 28, 28, 4, 128, 152064, 131072, 1e6, False), {}),
    "qwen2.5-32b": ("qwen2", (5120, 27648, 64, 40, 8, 128, 152064, 131072, 1e6, False), {}),
    "qwen3-8b": ("qwen3", (4096, 12288, 36, 32, 8, 128, 151936, 40960, 1e6, False), {}),
    "qwen3-32b": ("qwen3", (5120, 25600, 64, 64, 8, 128, 151936, 40960, 1e6, False), {}),
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class KnownShape(Source):
    """The shape of a model, by its name in place of a path. Weights and tokenizer are an error."""

    path: Path

    def __post_init__(self) -> None:
        name = str(self.path)
        if name not in _SHAPES:
            (near,) = nearest(name, _SHAPES, 1)
            raise ModelReferenceError(
                f"shape:{name}: no shape of this name is known; nearest: {near}\n"
                f"There are {', '.join(_SHAPES)}; any other model is planned from a folder with "
                "its config.json"
            )

    @functools.cached_property
    def config(self) -> StoredConfig:
        """The config of the model."""
        kind, sizes, more = _SHAPES[str(self.path)]
        published = {"model_type": kind, "hidden_act": "silu", "rms_norm_eps": 1e-5, **more}
        fields = dict(zip(_FIELDS, sizes, strict=True))
        return parse({**published, **fields}, f"shape:{self.path}")

    def tokenizer(self) -> NoReturn:
        """Raise `ModelReferenceError`."""
        raise ModelReferenceError(
            f"shape:{self.path} is a shape without weights and tokenizer: it can only be planned "
            "(--plan)"
        )

    def stored(self, config: StoredConfig | None = None) -> NoReturn:
        """Raise `ModelReferenceError`."""
        self.tokenizer()
