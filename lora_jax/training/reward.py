"""The workload of a reward model: a decoder with one output, which gives better answers more.

A pair of answers is a choice between two, with the probability of the better one by their rewards
(Bradley and Terry): `sigmoid(r_chosen - r_rejected)`.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from lora_jax import models
from lora_jax.data.preferences import preferences as batches_of
from lora_jax.models.weights.stored import LAST
from lora_jax.paths import Tree
from lora_jax.training import causal_lm, classification, pretrained, text
from lora_jax.training.config import require
from lora_jax.training.pretrained import Pretrained
from lora_jax.training.text import TextConfig
from lora_jax.training.workload import Loss, Workload, check_select, ratios


@dataclasses.dataclass(frozen=True, kw_only=True)
class RewardConfig(TextConfig):
    """A run that trains a reward model on pairs of answers."""

    _bounds: ClassVar = {"at least 0": ("center",)}

    center: float = 0.0
    """The factor of (r_chosen + r_rejected)^2 in the loss, which keeps rewards around zero
    (TRL: center_rewards_coefficient)."""


def reward(config: RewardConfig) -> Workload:
    """Make the workload of a decoder with one output that learns from pairs of answers."""
    source, model_config, method = text.opened(
        config, models.DecoderConfig, "rewards are given by a decoder"
    )
    count = config.samples.prompts
    require(count == 0, "samples.prompts", count, "0 for a reward model")
    select = config.select or "accuracy"
    check_select(select, ["loss", *_SCORES])
    words = causal_lm.words_of(source, config.data.template, config.day)
    model_config, head = model_config.without_logits(), models.Head(LAST, 1)
    of_row = classification.apply_of(models.classifier(model_config, head), method)
    rows, length = config.data.batch_size, config.data.lengths[-1]
    shape = (rows, 2, length)
    shapes: dict[str, Any] = {"input_ids": (shape, jnp.int32), "mask": (shape, jnp.bool)}
    shapes |= {"weight": ((rows,), jnp.float32), "index": ((rows,), jnp.int32)}

    def apply(params: Tree, batch: Any, *, train: bool, key: Any) -> Any:
        flat = {name: batch[name].reshape(-1, batch[name].shape[-1]) for name in _INPUTS}
        outputs: jax.Array = of_row(params, flat, train=train, key=key)
        return outputs.reshape(-1, 2)

    return pretrained.workload(
        config,
        Pretrained(source, model_config, head, method),
        lambda: pretrained.open_batches(
            config, functools.partial(batches_of, config.data, words(), whole=True)
        ),
        {"labels": (), "text_fields": ("text",), "lengths": config.data.lengths},
        join=lambda workloads: workloads[0],
        apply=apply,
        loss=functools.partial(loss, config.center),
        example={name: jax.ShapeDtypeStruct(*one) for name, one in shapes.items()},
        scores=ratios,
        select=select,
        better="lower" if select == "loss" else "higher",
        size=lambda batch: int(batch["weight"].sum()),
        unit="pairs",
    )


_INPUTS = ("input_ids", "mask")
_SCORES = ("accuracy", "margin", "mean_reward")  # TRL's names


def loss(center: float, rewards: jax.Array, batch: Any) -> Loss:
    """Return the loss of the pairs by their rewards [B, 2], the better answer first."""
    weight, (chosen, rejected) = batch["weight"], rewards.T
    each = -jax.nn.log_sigmoid(chosen - rejected) + center * jnp.square(chosen + rejected)
    found = ((chosen > rejected).astype(jnp.float32), chosen - rejected, rewards.mean(axis=1))
    sums = {name: jnp.sum(x * weight) for name, x in zip(_SCORES, found, strict=True)}
    return Loss(jnp.sum(each * weight), jnp.sum(weight), sums)
