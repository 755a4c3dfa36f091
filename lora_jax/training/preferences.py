"""The workload of a decoder that learns which answers are better (DPO and its kin, KTO).

The reference is the same frozen base with the adapter as the run begins: no adapter, or the adapter
of `--from`. A second forward pass computes its log-probabilities, so there is one copy of the base.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax import models
from lora_jax.data.preferences import preferences as batches_of
from lora_jax.paths import Tree
from lora_jax.training import causal_lm, pretrained, samples, text
from lora_jax.training.config import incidental, require
from lora_jax.training.preference_losses import FREE, JUDGED, Answers, LossName, Strength, loss_of
from lora_jax.training.pretrained import Pretrained
from lora_jax.training.text import TextConfig
from lora_jax.training.workload import Loss, Workload, check_select

_CHUNK = 128  # positions of a row whose logits exist at the same time


@dataclasses.dataclass(frozen=True, kw_only=True)
class PreferenceConfig(TextConfig):
    """A run that trains a decoder on pairs of answers, or on answers that are judged (kto)."""

    _bounds: ClassVar = {
        "in [0, 1)": ("smoothing",),
        "at least 0": ("desirable_weight", "undesirable_weight"),
    }

    preference: LossName = "sigmoid"
    """The loss of a pair; see `lora_jax.training.preference_losses`."""
    beta: float = 0.1
    """The factor of log-ratios in rewards: with a small one the model may go far from the
    reference."""
    smoothing: float = 0.0
    """The share of pairs that are taken to be the wrong way round (sigmoid and robust)."""
    gamma: float = 0.5
    """The margin of simpo."""
    desirable_weight: float = 1.0
    """The weight of good answers in kto."""
    undesirable_weight: float = 1.0
    """The weight of bad answers in kto."""
    cached_reference: bool = incidental(True)
    """Keep the log-probabilities by the reference on disk, in the user's cache, where other epochs,
    evaluations and runs find them. Otherwise they are computed for each batch."""

    @property
    def group_key(self) -> tuple[Any, ...]:
        """See `Config`. Members of a group also share the loss, but not its numbers."""
        return (*super().group_key, self.preference)

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.beta > 0, "beta", self.beta, "above 0")
        robust = self.preference != "robust" or self.smoothing < 0.5
        require(robust, "smoothing", self.smoothing, "below 0.5 for robust")
        several = self.preference not in JUDGED or self.data.batch_size > 1
        require(several, "data.batch_size", self.data.batch_size, "above 1 for kto")


def preferences(config: PreferenceConfig) -> Workload:
    """Make the workload of a decoder that learns from pairs of answers."""
    source, model_config, method = text.opened(
        config, models.DecoderConfig, "preferences are learned by a decoder"
    )
    select = config.select or "loss"
    judged = config.preference in JUDGED
    count = functools.partial(scores, "kl" if judged else "rewards/accuracies")
    check_select(select, ["loss", *count({}, 0.0), *samples.functions(config.samples)])
    words = causal_lm.words_of(source, config.data.template, config.day)
    model, chunk = models.DecoderModel(model_config), config.model.loss_chunk or _CHUNK
    rows, length = config.data.batch_size, config.data.lengths[-1]
    shapes: dict[str, Any] = dict.fromkeys(("input_ids", "targets"), ((rows, 2, length), jnp.int32))
    shapes |= {"loss_weight": ((rows, 2, length), jnp.float32), "weight": ((rows,), jnp.float32)}
    shapes |= {"reference": ((rows, 2), jnp.float32), "index": ((rows,), jnp.int32)}
    shapes |= {"good": ((rows,), jnp.float32)} if judged else {}

    def apply(params: Tree, batch: Any, *, train: bool, key: Any) -> Any:
        more: dict[str, Any] = {"chunk": chunk, "method": model.loss}
        more |= pretrained.dropout(model.config, train, key)

        def side(ids: jax.Array, targets: jax.Array) -> jax.Array:
            flat, wanted = (x.reshape(-1, x.shape[-1]) for x in (ids, targets))
            each: jax.Array = method.apply(model, params, flat, targets=wanted, **more)
            return each.reshape(targets.shape)

        ids, targets = batch["input_ids"], batch["targets"]
        if not (judged and train):
            return side(ids, targets)
        # Answers to other prompts only measure: nothing is kept for a backward pass over them.
        own, other = (side(ids[:, i], targets[:, i]) for i in range(2))
        return jnp.stack([own, jax.lax.stop_gradient(other)], axis=1)

    return pretrained.workload(
        config,
        Pretrained(source, model_config, method=method),
        lambda: pretrained.open_batches(
            config, functools.partial(batches_of, config.data, words(), judged=judged)
        ),
        {},
        join=lambda workloads: workloads[0],
        marks={name: np.float32(value) for name, value in _strength(config).items()},
        of_data=functools.partial(causal_lm.about_data, config, source),
        apply=apply,
        loss=functools.partial(loss, config),
        reference=None if config.preference in FREE else log_probabilities,
        reference_program=f"{model_config} {chunk} {method}" if config.cached_reference else None,
        example={name: jax.ShapeDtypeStruct(*shape) for name, shape in shapes.items()},
        scores=count,
        select=select,
        better="lower" if select in ("loss", "kl") else "higher",
        size=lambda batch: int(batch["weight"].sum()),
        unit="answers" if judged else "pairs",
        samples=samples.samples_of(config, words, model_config),
    )


def log_probabilities(outputs: jax.Array, batch: Any) -> jax.Array:
    """Return the log-probability of each answer, [B, 2] float32, from its tokens' cross entropy."""
    return -jnp.sum(outputs * batch["loss_weight"], axis=-1)


def loss(config: PreferenceConfig, outputs: jax.Array, batch: Any) -> Loss:
    """Return the loss of the pairs or answers, and the sums for the scores.

    Numbers of the loss that are in the batch, as members of a group have them, are the ones taken.
    """
    by = Strength(**{name: batch.get(name, own) for name, own in _strength(config).items()})
    absolute, weight = log_probabilities(outputs, batch), batch["weight"]
    ratio = absolute if config.preference in FREE else absolute - batch["reference"]
    tokens, count = jnp.maximum(jnp.sum(batch["loss_weight"], axis=-1), 1), jnp.sum(weight)
    rewards = by.beta * (ratio / tokens if config.preference in FREE else ratio)
    chosen, rejected = ratio.T
    if config.preference in JUDGED:
        far = jnp.sum(rejected * weight) / jnp.maximum(count, 1)
        rejected = jnp.broadcast_to(jax.lax.stop_gradient(jax.nn.relu(far)), chosen.shape)
        good = batch["good"]
        sides = {"chosen": (0, weight * good), "rejected": (0, weight * (1 - good))}
        sums = {"kl": jnp.sum(rejected * weight)}
    else:
        good, sides = 1.0, {"chosen": (0, weight), "rejected": (1, weight)}
        better = (rewards[:, 0] > rewards[:, 1]).astype(jnp.float32)
        sums = {"rewards/accuracies": jnp.sum(better * weight)}
    for name, (column, own) in sides.items():
        sums[name] = jnp.sum(own)
        sums[f"rewards/{name}"] = jnp.sum(rewards[:, column] * own)
        sums[f"logps/{name}"] = jnp.sum(absolute[:, column] * own)
    answers = Answers(chosen, rejected, tokens[:, 0], tokens[:, 1], good)
    total = jnp.sum(loss_of(config.preference, answers, by) * weight)
    return Loss(total, count, sums)


def _strength(config: PreferenceConfig) -> dict[str, float]:
    weights = {"desirable": config.desirable_weight, "undesirable": config.undesirable_weight}
    return {"beta": config.beta, "smoothing": config.smoothing, "gamma": config.gamma, **weights}


def scores(last: str, sums: Any, weight: float) -> dict[str, float]:
    """Return the scores of a split by TRL's names: rewards are beta times log-ratios.

    `last` is the score that not every loss has: the share of pairs in the right order, or kl.
    """

    def both(what: str) -> dict[str, float]:
        names = ("chosen", "rejected")
        return {f"{what}/{n}": sums.get(f"{what}/{n}", 0.0) / max(sums.get(n, 0), 1) for n in names}

    rewards = both("rewards")
    margins = {"rewards/margins": rewards["rewards/chosen"] - rewards["rewards/rejected"]}
    more = {last: sums.get(last, 0.0) / max(weight, 1e-9)}
    return rewards | margins | more | both("logps")
