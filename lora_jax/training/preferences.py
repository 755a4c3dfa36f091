"""The workload of a decoder that learns which of two answers is better (DPO and its kin).

The reference is the same frozen base with the adapter as the run begins: no adapter, or the adapter
of `--from`. A second forward pass computes its log-probabilities, so there is one copy of the base.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp

from lora_jax import models
from lora_jax.data.example_reader import Words
from lora_jax.data.preferences import preferences as batches_of
from lora_jax.training import causal_lm, pretrained, samples, text
from lora_jax.training.config import require
from lora_jax.training.preference_losses import FREE, LOSSES, Answers, Strength
from lora_jax.training.pretrained import Pretrained, RunBatches
from lora_jax.training.text import TextConfig
from lora_jax.training.workload import Loss, Workload, check_select

Tree = Any  # a pytree

_CHUNK = 128  # positions of a row whose logits exist at the same time
LossName = Literal["sigmoid", "robust", "hinge", "ipo", "apo_zero", "nca_pair", "orpo", "simpo"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class PreferenceConfig(TextConfig):
    """A run that trains a decoder on pairs of answers."""

    _bounds: ClassVar = {"in [0, 1)": ("smoothing",)}

    preference: LossName = "sigmoid"
    """The loss of a pair; see `lora_jax.training.preference_losses`."""
    beta: float = 0.1
    """The factor of log-ratios in rewards: with a small one the model may go far from the
    reference."""
    smoothing: float = 0.0
    """The share of pairs that are taken to be the wrong way round (sigmoid and robust)."""
    gamma: float = 0.5
    """The margin of simpo."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.beta > 0, "beta", self.beta, "above 0")
        robust = self.preference != "robust" or self.smoothing < 0.5
        require(robust, "smoothing", self.smoothing, "below 0.5 for robust")


def preferences(config: PreferenceConfig) -> Workload:
    """Make the workload of a decoder that learns from pairs of answers."""
    source = pretrained.open_model(
        config.model.reference, models.DecoderConfig, "preferences are learned by a decoder"
    )
    text.check_positions(config, source.config)
    model_config = config.model.apply_to(source.config)
    method = config.method_for(model_config, config.data.max_length)
    select = config.select or "loss"
    check_select(select, ["loss", *scores({}, 0.0), *samples.functions(config.samples)])
    words = causal_lm.words_of(source, config.data.template, config.day)
    model = models.DecoderModel(model_config)
    rows, length = config.data.batch_size, config.data.lengths[-1]
    shapes: dict[str, Any] = dict.fromkeys(("input_ids", "targets"), ((rows, 2, length), jnp.int32))
    shapes |= {"loss_weight": ((rows, 2, length), jnp.float32), "weight": ((rows,), jnp.float32)}
    shapes |= {"reference": ((rows, 2), jnp.float32), "index": ((rows,), jnp.int32)}

    def apply(params: Tree, batch: Any, *, train: bool, key: Any) -> Any:
        ids, targets = (batch[n].reshape(-1, batch[n].shape[-1]) for n in ("input_ids", "targets"))
        chunk = config.model.loss_chunk or _CHUNK
        more = {"targets": targets, "chunk": chunk, "method": model.loss}
        more |= pretrained.dropout(model.config, train, key)
        each: jax.Array = method.apply(model, params, ids, **more)
        return each.reshape(batch["targets"].shape)

    return pretrained.workload(
        config,
        Pretrained(source, model_config, method=method),
        functools.partial(_open_data, config, words),
        text.about(config, method),
        functools.partial(method.fresh, config.seed),
        of_data=functools.partial(causal_lm.about_data, config, source),
        apply=apply,
        loss=functools.partial(loss, config),
        reference=None if config.preference in FREE else log_probabilities,
        example={name: jax.ShapeDtypeStruct(*shape) for name, shape in shapes.items()},
        scores=scores,
        select=select,
        better="lower" if select == "loss" else "higher",
        size=lambda batch: int(batch["weight"].sum()),
        unit="pairs",
        samples=samples.samples_of(config, words, model_config, method),
    )


def log_probabilities(outputs: jax.Array, batch: Any) -> jax.Array:
    """Return the log-probability of each answer, [B, 2] float32, from its tokens' cross entropy."""
    return -jnp.sum(outputs * batch["loss_weight"], axis=-1)


def loss(config: PreferenceConfig, outputs: jax.Array, batch: Any) -> Loss:
    """Return the loss of the pairs, and the sums for the scores."""
    absolute = log_probabilities(outputs, batch)
    ratio = absolute if config.preference in FREE else absolute - batch["reference"]
    tokens = jnp.maximum(jnp.sum(batch["loss_weight"], axis=-1), 1)
    answers = Answers(ratio[:, 0], ratio[:, 1], tokens[:, 0], tokens[:, 1])
    by = Strength(config.beta, config.smoothing, config.gamma)
    weight = batch["weight"]
    chosen, rejected = answers.means if config.preference in FREE else answers[:2]
    values = {
        "rewards/chosen": config.beta * chosen,
        "rewards/rejected": config.beta * rejected,
        "rewards/margins": config.beta * (chosen - rejected),
        "rewards/accuracies": (chosen > rejected).astype(jnp.float32),
        "logps/chosen": absolute[:, 0],
        "logps/rejected": absolute[:, 1],
    }
    total = jnp.sum(LOSSES[config.preference](answers, by) * weight)
    sums = {name: jnp.sum(value * weight) for name, value in values.items()}
    return Loss(total, jnp.sum(weight), sums)


def scores(sums: Any, weight: float) -> dict[str, float]:
    """Return the scores of a split by TRL's names: rewards are beta times log-ratios."""
    sides = ("rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies")
    names = (*sides, "logps/chosen", "logps/rejected")
    return {name: sums.get(name, 0.0) / max(weight, 1e-9) for name in names}


def _open_data(config: PreferenceConfig, words: Words) -> RunBatches:
    return pretrained.open_batches(config, functools.partial(batches_of, config.data, words))
