"""Losses of answers: DPO, its kin and KTO, with a reference, and ORPO and SimPO without one.

With c and r the sums over the answer's tokens of log p - log p_reference, for the better (c) and
the worse answer (r), D = c - r, S(x) = -log sigmoid(x), s = sigmoid, e the smoothing, n the number
of tokens of an answer:

| loss      | of one pair                                            | with c = r = 0 |
|-----------|--------------------------------------------------------|----------------|
| sigmoid   | (1-e) S(beta D) + e S(-beta D)                         | ln 2           |
| robust    | [(1-e) S(beta D) - e S(-beta D)] / (1-2e)              | ln 2           |
| hinge     | max(0, 1 - beta D)                                     | 1              |
| ipo       | (c/n+ - r/n- - 1/(2 beta))^2                           | 1/(4 beta^2)   |
| apo_zero  | 1 - s(beta c) + s(beta r)                              | 1              |
| nca_pair  | S(beta c) + S(-beta c)/2 + S(-beta r)/2                | 2 ln 2         |

kto takes one answer that is judged by itself, with the log-ratio c, and z, the largest of 0 and the
mean log-ratio of the batch's prompts with answers to other prompts, which has no gradient. It is
wD (1 - s(beta (c - z))) for a good answer and wU (1 - s(beta (z - c))) for a bad one: wD/2 and wU/2
with c = z = 0.

orpo and simpo take no reference: with a the mean log-probability of an answer's tokens, they are
-a+ + beta S(l), l = logit(exp a+) - logit(exp a-), and S(beta (a+ - a-) - gamma).

Sources: DPO, arXiv 2305.18290; cDPO and robust, 2403.00409; IPO, 2310.12036; APO, 2408.06266; NCA,
2402.05369; KTO, 2402.01306; ORPO, 2403.07691; SimPO, 2405.14734; the names are TRL's.
"""

from __future__ import annotations

import dataclasses
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

LossName = Literal[
    "sigmoid", "robust", "hinge", "ipo", "apo_zero", "nca_pair", "kto", "orpo", "simpo"
]
FREE = ("orpo", "simpo")  # they take no reference
JUDGED = ("kto",)  # they take answers that are judged by themselves


class Answers(NamedTuple):
    """Two answers to each of B prompts.

    chosen, rejected: [B] float32, the log-probability of the whole answer, without that by the
        reference if the loss has one. For kto these are the answer's, and z.
    chosen_tokens, rejected_tokens: [B] float32, the number of its tokens.
    good: [B] float32, 1 if an answer that is judged by itself is good, and 0 if it is bad.
    """

    chosen: jax.Array
    rejected: jax.Array
    chosen_tokens: jax.Array
    rejected_tokens: jax.Array
    good: jax.Array | float = 1.0

    @property
    def means(self) -> tuple[jax.Array, jax.Array]:
        """The values of a token of each answer, on average."""
        return self.chosen / self.chosen_tokens, self.rejected / self.rejected_tokens


@dataclasses.dataclass(frozen=True)
class Strength:
    """The numbers of a loss: beta, the smoothing e, gamma of simpo, and wD and wU of kto."""

    beta: float = 0.1
    smoothing: float = 0.0
    gamma: float = 0.5
    desirable: float = 1.0
    undesirable: float = 1.0


def _s(x: jax.Array) -> jax.Array:
    return -jax.nn.log_sigmoid(x)


def loss_of(name: LossName, x: Answers, by: Strength) -> jax.Array:
    """Return the loss of each pair or answer, [B], by the formulas of the table above."""
    chosen, rejected = by.beta * x.chosen, by.beta * x.rejected
    margin, e = by.beta * (x.chosen - x.rejected), by.smoothing
    up, down = x.means
    match name:
        case "sigmoid":
            return (1 - e) * _s(margin) + e * _s(-margin)
        case "robust":
            return ((1 - e) * _s(margin) - e * _s(-margin)) / (1 - 2 * e)
        case "hinge":
            return jax.nn.relu(1 - margin)
        case "ipo":
            return (up - down - 1 / (2 * by.beta)) ** 2
        case "apo_zero":
            return 1 - jax.nn.sigmoid(chosen) + jax.nn.sigmoid(rejected)
        case "nca_pair":
            return _s(chosen) + _s(-chosen) / 2 + _s(-rejected) / 2
        case "kto":
            raised = by.desirable * jax.nn.sigmoid(-margin)
            lowered = by.undesirable * jax.nn.sigmoid(margin)
            return jnp.where(jnp.asarray(x.good) > 0, raised, lowered)
        case "orpo":
            odds = (up - down) - (log1mexp(up) - log1mexp(down))
            return -up + by.beta * _s(odds)
        case "simpo":
            return _s(by.beta * (up - down) - by.gamma)


def log1mexp(x: jax.Array) -> jax.Array:
    """Return log(1 - exp(x)) for x < 0, exact near 0 and far from it.

    >>> float(log1mexp(jnp.float32(-1e-3))).__round__(3)
    -6.908
    """
    x = jnp.minimum(x, -jnp.finfo(x.dtype).tiny)
    near = x > -0.6931472  # ln 2: there 1 - exp(x) loses digits
    return jnp.where(
        near,
        jnp.log(-jnp.expm1(jnp.where(near, x, -0.5))),
        jnp.log1p(-jnp.exp(jnp.where(near, -1.0, x))),
    )
