"""GRPO (arXiv 2402.03300): advantages within a group of answers, and a clipped loss."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp


class Rules(NamedTuple):
    """The choices of the loss.

    clip: a ratio of new to old probability counts up to 1 + clip and down to 1 - clip.
    kl: the weight of the divergence from the base without an adapter.
    divide: whether advantages are divided by the standard deviation of their group (Dr. GRPO,
      arXiv 2503.20783, does not).
    aggregation: the mean over answers of the mean over their tokens, as in GRPO, or the mean over
      all tokens (DAPO, arXiv 2503.14476).
    """

    clip: float = 0.2
    kl: float = 0.0
    divide: bool = True
    aggregation: Literal["rows", "tokens"] = "tokens"


def advantages(rewards: Any, divide: bool = True) -> Any:
    """Return rewards minus the mean of their group, [..., groups, answers]."""
    centred = rewards - rewards.mean(-1, keepdims=True)
    return centred / (rewards.std(-1, keepdims=True) + 1e-4) if divide else centred


def loss(new: Any, old: Any, base: Any, advantage: Any, mask: Any, rules: Rules) -> Any:
    """Return the loss of one policy.

    `new`, `old` and `base` are log probabilities [B, T] by the policy, by the one that wrote the
    tokens, and by the base; `advantage` is [B], and `mask` [B, T]. The divergence is estimated as
    exp(d) - d - 1 for d = base - new, which is never negative.
    """
    ratio = jnp.exp(new - old)
    clipped = jnp.clip(ratio, 1 - rules.clip, 1 + rules.clip)
    gain = jnp.minimum(ratio * advantage[:, None], clipped * advantage[:, None])
    apart = base - new
    each = rules.kl * (jnp.exp(apart) - apart - 1) - gain
    if rules.aggregation == "tokens":
        return (each * mask).sum() / jnp.maximum(mask.sum(), 1)
    return jnp.mean((each * mask).sum(-1) / jnp.maximum(mask.sum(-1), 1))


def scores(logits: Any, ids: Any) -> tuple[Any, Any]:
    """Return the log probability of each token after the first, and the entropy, [B, T - 1]."""
    every = jax.nn.log_softmax(logits[:, :-1].astype(jnp.float32))
    chosen = jnp.take_along_axis(every, ids[:, 1:, None], axis=-1)[..., 0]
    return chosen, -(jnp.exp(every) * every).sum(-1)
