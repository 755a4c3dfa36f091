"""The learning-rate schedule and AdamW, composed from optax."""

from __future__ import annotations

import optax

from lora_jax.training.config import OptimizerConfig


def schedule(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """Step -> learning rate: a linear rise over the warm-up, then the decay over the rest.

    With `linear` and `cosine` the rate would reach zero at step `steps`, the first not taken.
    """
    peak = config.learning_rate
    rise = round(config.warmup * steps)
    rest = max(steps - rise, 1)
    decay = {
        "linear": optax.linear_schedule(peak, 0.0, rest),
        "cosine": optax.cosine_decay_schedule(peak, rest),
        "constant": optax.constant_schedule(peak),
    }[config.schedule]
    # The first step must move: step i of the rise has (i + 1) / (rise + 1) of the peak.
    warmup = optax.linear_schedule(peak / (rise + 1), peak, max(rise, 1))
    return optax.join_schedules([warmup, decay], [rise])


def optimizer(config: OptimizerConfig, steps: int) -> optax.GradientTransformation:
    """AdamW over the trained tree `{"adapters": ..., "base": ...}`, after a clip by global norm.

    The base parameters in that tree are the few trained beside the adapters; the frozen ones are
    not in it, so they have neither gradient nor state here.
    """
    adamw = optax.adamw(
        schedule(config, steps), config.b1, config.b2, config.eps, weight_decay=config.weight_decay
    )
    parts = [adamw] if config.clip is None else [optax.clip_by_global_norm(config.clip), adamw]
    if config.head_learning_rate is not None:
        ratio = config.head_learning_rate / config.learning_rate
        # Where this mask is False the update passes through as it is, which is what is meant here.
        parts.append(optax.masked(optax.scale(ratio), {"adapters": False, "base": True}))
    return optax.chain(*parts)
