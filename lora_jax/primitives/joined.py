"""Weights that are concatenated or padded before one product, such as a fused q, k, v."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax

from lora_jax.bases.weight import Dense, Weight
from lora_jax.primitives.adapted_weight import AdaptedWeight, Ins, Outs
from lora_jax.primitives.evaluator import Evaluator, Primitive, Primitives
from lora_jax.primitives.jaxprs import Eqn
from lora_jax.updates.update import Segment, Zero, join


def _concatenate(evaluator: Evaluator, eqn: Eqn, ins: Ins) -> Outs:
    whole = _join(evaluator, ins, eqn.params["dimension"])
    return None if whole is None else [whole]


def _stack(evaluator: Evaluator, eqn: Eqn, ins: Ins) -> Outs:
    axis = eqn.params["axis"]

    def same(*arrays: jax.Array) -> jax.Array:
        return lax.concatenate([jnp.expand_dims(x, axis) for x in arrays], axis)

    return evaluator.through(same, eqn, ins)


def _join(evaluator: Evaluator, ins: Ins, axis: int) -> AdaptedWeight | None:
    """Return one weight in which each member has its own update along its part of the axis."""
    ins = [v.selected() if isinstance(v, AdaptedWeight) else v for v in ins]
    weights = [v for v in ins if isinstance(v, AdaptedWeight)]
    names, start = weights[0].names, 0
    parts: list[Segment] = []
    for v in ins:
        size = int(v.shape[axis])
        if isinstance(v, AdaptedWeight) and type(v.update) is not Zero:
            renamed = evaluator.renamed(v.update, dict(zip(v.names, names, strict=True)))
            parts.append(Segment(renamed, start, size))
        start += size
    update = join(parts, names[axis], start)
    if update is None:
        return None
    for v in weights:
        evaluator.paths_read.add(v.path)
    whole = Weight.join(
        [v.weight if isinstance(v, AdaptedWeight) else Dense(v) for v in ins],
        lambda *arrays: jnp.concatenate(arrays, axis),
    )
    fold = all(v.fold for v in weights)
    return dataclasses.replace(weights[0], weight=whole, update=update, fold=fold)


def _pad(evaluator: Evaluator, eqn: Eqn, ins: Ins) -> Outs:
    """Join a weight with constants."""
    v, value = ins
    config = eqn.params["padding_config"]
    if isinstance(value, AdaptedWeight) or any(min(ends) < 0 or ends[2] for ends in config):
        return None
    for axis, (low, high, _) in enumerate(config):
        before, after = (
            jnp.full((*v.shape[:axis], n, *v.shape[axis + 1 :]), value) for n in (low, high)
        )
        v = _join(evaluator, [before, v, after], axis) if low or high else v
        if v is None:
            return None
    return [v]


PRIMITIVES: Primitives = {
    "concatenate": Primitive(_concatenate, joins=True),
    "stack": Primitive(_stack),
    "pad": Primitive(_pad),
}
