"""The learning-rate schedule and AdamW, built from optax, with their settings as arrays.

Optax's schedules branch in Python on the kind and the number of steps, so these cannot be traced.
Here the settings are an argument of the compiled program: runs with different settings share one
compiled step, and `jax.vmap` over `Hyper` trains many runs at once (`lora_jax.sweeps`).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from lora_jax.paths import path_of
from lora_jax.training.config import NO_DECAY, OptimizerConfig
from lora_jax.updates.kind import is_parameters

KINDS = ("linear", "cosine", "constant")
OTHER = "other"  # the label of every array whose label is not in NO_DECAY


class Hyper(NamedTuple):
    """The settings of the optimizer: NumPy or traced scalars, or arrays [N] for N runs.

    All but `kind` are float32. Adam computes 1 - b2, which in float32 differs by 5e-5 from the
    Python float for 0.999, and a run alone must agree with the same run in a group.

    peak: the largest learning rate.
    head: factor of the learning rate of parameters trained in full.
    loraplus: factor of the learning rate of B.
    rise: number of warm-up steps.
    kind: int32, the index in `KINDS` of the decay after the warm-up.
    weight_decay: label (`NO_DECAY` and `OTHER`) -> decoupled weight decay.
    clip: largest global norm of the gradient; infinity if gradients are not clipped.
    """

    peak: Any
    head: Any
    loraplus: Any
    rise: Any
    steps: Any
    kind: Any
    weight_decay: Any
    clip: Any
    b1: Any
    b2: Any
    eps: Any


def hyper(config: OptimizerConfig, steps: int) -> Hyper:
    values: dict[str, float] = {
        "peak": config.learning_rate,
        "head": (config.head_learning_rate or config.learning_rate) / config.learning_rate,
        "loraplus": config.loraplus_lr_ratio,
        "rise": round(config.warmup * steps),
        "steps": steps,
        "clip": np.inf if config.clip is None else config.clip,
        "b1": config.b1,
        "b2": config.b2,
        "eps": config.eps,
    }
    decays = {
        label: np.float32(0 if label in config.no_decay else config.weight_decay)
        for label in (*NO_DECAY, OTHER)
    }
    kind = np.int32(KINDS.index(config.schedule))
    scalars = {name: np.float32(value) for name, value in values.items()}
    return Hyper(kind=kind, weight_decay=decays, **scalars)


def rate(hyper: Hyper, count: Any, library: Any = jnp) -> Any:
    """Return the learning rate of a step: linear warm-up, then decay over the remaining steps.

    With `linear` and `cosine` it reaches zero at step `hyper.steps`, which is never taken. `count`
    is the step, from 0. With `library` NumPy it is computed on the host.
    """
    # The first step must not have rate 0, so step i of the warm-up has (i + 1) / (rise + 1) of it.
    rising = (count + 1) / (hyper.rise + 1)
    rest = library.maximum(hyper.steps - hyper.rise, 1)
    gone = library.clip((count - hyper.rise) / rest, 0, 1)
    linear, cosine = 1 - gone, (1 + library.cos(np.float32(np.pi) * gone)) / 2
    falling = library.where(hyper.kind == 0, linear, library.where(hyper.kind == 1, cosine, 1))
    return hyper.peak * library.where(count < hyper.rise, rising, falling)


def adamw(hyper: Hyper) -> optax.GradientTransformation:
    """Return AdamW for the trained tree `{"adapters": ..., "base": ...}`, with gradient clipping.

    "base" holds only the parameters trained in full. Frozen parameters are not in the tree, so they
    have no gradient and no state. The structure of the state does not depend on `hyper`.
    """
    return optax.chain(
        _clip(hyper.clip),
        optax.chain(
            optax.scale_by_adam(hyper.b1, hyper.b2, hyper.eps),
            optax.stateless(lambda updates, params: _decayed(hyper, updates, params)),
            optax.scale_by_learning_rate(lambda count: rate(hyper, count)),
        ),
        optax.stateless(lambda updates, _: _rated(hyper, updates)),
    )


def labels(trained: Any) -> Any:
    """Return a tree like `trained` with a label in place of each array.

    An array of an adapter is labelled by its field: "a", "b", "magnitude" (DoRA), and so on. The
    difference that the kind "bias" trains is labelled "bias". A base parameter is a "bias" if that
    is the last name in its path; a "norm" if some name in its path contains "norm" or its last name
    is "scale"; and a "weight" otherwise.

    >>> from lora_jax.updates import Factors
    >>> labels({"q/kernel": Factors(a=jnp.ones((8, 2)), b=jnp.ones((2, 4)))})
    {'q/kernel': Factors(a='a', b='b')}
    >>> labels({"head/kernel": 0, "head/bias": 0, "layer_norm/scale": 0})
    {'head/bias': 'bias', 'head/kernel': 'weight', 'layer_norm/scale': 'norm'}
    """

    def label(path: Any, leaf: Any) -> Any:
        if is_parameters(leaf):
            return type(leaf)(*("bias" if name == "delta" else name for name in leaf._fields))
        names = path_of(path).split("/")
        if names[-1] == "bias":
            return "bias"
        norm = names[-1] == "scale" or any("norm" in name.lower() for name in names)
        return "norm" if norm else "weight"

    return jax.tree_util.tree_map_with_path(label, trained, is_leaf=is_parameters)


def _decayed(hyper: Hyper, updates: Any, params: Any) -> Any:
    """Add the weight decay of each array to its update."""

    def one(update: Any, param: Any, label: str) -> Any:
        return update + hyper.weight_decay.get(label, hyper.weight_decay[OTHER]) * param

    return jax.tree.map(one, updates, params, labels(params))


def _rated(hyper: Hyper, updates: Any) -> Any:
    """Multiply the updates of B, and of parameters trained in full, by their own factors."""
    adapters, base = updates["adapters"], updates["base"]
    by_label = lambda u, label: u * hyper.loraplus if label == "b" else u  # noqa: E731
    return {
        "adapters": jax.tree.map(by_label, adapters, labels(adapters)),
        "base": jax.tree.map(lambda u: u * hyper.head, base),
    }


def _clip(largest: Any) -> optax.GradientTransformation:
    """Clip by global norm. `optax.clip_by_global_norm` fails with a float32 bound in bfloat16."""

    def clipped(updates: Any, _: Any) -> Any:
        norm = optax.tree.norm(updates)
        factor = jnp.where(norm < largest, 1, largest / norm)
        return jax.tree.map(lambda g: g * factor.astype(g.dtype), updates)

    return optax.stateless(clipped)
