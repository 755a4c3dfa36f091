"""The learning-rate schedule and AdamW, composed from optax, with their settings as data.

Optax's own schedules branch in Python on the kind and the numbers of steps, so they cannot be
traced. Here the settings are an argument and not part of the program: runs of any settings share
one compiled step, and a `jax.vmap` over `Hyper` trains many of them at once (`lora_jax.groups`).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from lora_jax import labels
from lora_jax.training.config import NO_DECAY, OptimizerConfig

KINDS = ("linear", "cosine", "constant")
OTHER = "other"  # every label that is not in NO_DECAY


class Hyper(NamedTuple):
    """Settings of the optimizer: scalars of NumPy or traced ones, or [N] of each for N runs.

    All are float32 but `kind`: Adam computes 1 - b2, which in float32 is 5e-5 away from what a
    Python float gives for 0.999. A run alone and the same one in a group have to agree on it.

    peak: the largest learning rate.
    head: what the parameters trained in full have in the place of 1 times the rate.
    loraplus: what B has in the place of 1 times the rate.
    rise: steps of the warm-up.
    steps: of the whole run.
    kind: int32, the place in `KINDS` of the decay after the warm-up.
    weight_decay: label (`NO_DECAY` and `OTHER`) -> decoupled weight decay.
    clip: largest global norm of the gradient; infinity where it is not clipped.
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
    """The settings of a run of so many steps."""
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
    """The learning rate of step `count`, from 0: a rise in a line, then the decay over the rest.

    With `linear` and `cosine` it would reach zero at step `hyper.steps`, the first not taken.

    Args:
      hyper, count: scalars, or arrays of one shape.
      library: `jax.numpy`; or `numpy`, where the numbers are on the host.
    """
    # The first step must move: step i of the rise has (i + 1) / (rise + 1) of the peak.
    rising = (count + 1) / (hyper.rise + 1)
    rest = library.maximum(hyper.steps - hyper.rise, 1)
    gone = library.clip((count - hyper.rise) / rest, 0, 1)
    linear, cosine = 1 - gone, (1 + library.cos(np.float32(np.pi) * gone)) / 2
    falling = library.where(hyper.kind == 0, linear, library.where(hyper.kind == 1, cosine, 1))
    return hyper.peak * library.where(count < hyper.rise, rising, falling)


def adamw(hyper: Hyper) -> optax.GradientTransformation:
    """AdamW over the trained tree `{"adapters": ..., "base": ...}`, after a clip by global norm.

    The base parameters in that tree are the few trained in full; the frozen ones are
    not in it, so they have neither gradient nor state here. The state has one structure whatever
    `hyper` says.

    Args:
      hyper: scalars, which may be traced.
    """
    return optax.chain(
        _clip(hyper.clip),
        optax.chain(
            optax.scale_by_adam(hyper.b1, hyper.b2, hyper.eps),
            optax.stateless(lambda updates, params: _decayed(hyper, updates, params)),
            optax.scale_by_learning_rate(lambda count: rate(hyper, count)),
        ),
        # It masks nothing: a mask is part of the state's structure in checkpoints written so far.
        optax.masked(
            optax.stateless(lambda updates, _: _rated(hyper, updates)),
            {"adapters": True, "base": True},
        ),
    )


def _decayed(hyper: Hyper, updates: Any, params: Any) -> Any:
    """The updates with each array's own weight decay."""

    def one(update: Any, param: Any, label: str) -> Any:
        return update + hyper.weight_decay.get(label, hyper.weight_decay[OTHER]) * param

    return jax.tree.map(one, updates, params, labels.labels(params))


def _rated(hyper: Hyper, updates: Any) -> Any:
    """The updates at the rates of their own: of B, and of the parameters trained in full."""
    adapters, base = updates["adapters"], updates["base"]
    by_label = lambda u, label: u * hyper.loraplus if label == "b" else u  # noqa: E731
    return {
        "adapters": jax.tree.map(by_label, adapters, labels.labels(adapters)),
        "base": jax.tree.map(lambda u: u * hyper.head, base),
    }


def _clip(largest: Any) -> optax.GradientTransformation:
    """`optax.clip_by_global_norm`, which takes no float32 bound for gradients in bfloat16."""

    def clipped(updates: Any, _: Any) -> Any:
        norm = optax.tree.norm(updates)
        factor = jnp.where(norm < largest, 1, largest / norm)
        return jax.tree.map(lambda g: g * factor.astype(g.dtype), updates)

    return optax.stateless(clipped)
