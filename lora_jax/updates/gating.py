"""Gates from a router's logits, and the experts of a mixture as one update weighted by gates."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from lora_jax.base import Array
from lora_jax.updates.lowrank import LowRank
from lora_jax.updates.named import MEMBER, RANK, Named, without


def gates(logits: Array, top: int | None = None) -> Array:
    """Return `softmax(logits)` along the last axis; with `top`, over the `top` largest logits only.

    The other entries are then 0, and the chosen ones are divided by their sum.

    Args:
      logits: [..., n], any float dtype. The work is done in float32.
      top: the number of experts for each row, from 1 to n. None: all of them.

    Returns:
      [..., n] in float32; each row sums to 1.

    >>> gates(jnp.array([0.0, 0.0, -100.0])).tolist()
    [0.5, 0.5, 0.0]
    >>> gates(jnp.array([2.0, 0.0, 1.0]), top=1).tolist()
    [1.0, 0.0, 0.0]
    """
    logits = jnp.asarray(logits, jnp.float32)
    if top is not None:
        logits = jnp.where(_best(logits, top), logits, -jnp.inf)
    return jax.nn.softmax(logits, axis=-1)


def tally(gates: Any, top: int | None) -> Array:
    """Map [..., rows, n] to [..., 2, n]: sums over rows of the choices / top, and of the gates."""
    best = _best(gates, top or 1).astype(gates.dtype) / (top or 1)
    return jnp.stack([best.sum(-2), gates.sum(-2)], axis=-2)


def _best(values: Array, top: int) -> Array:
    """Return whether each entry is among the `top` largest of its row; ties go to the first."""
    _, best = lax.top_k(lax.stop_gradient(values), top)
    return jax.nn.one_hot(best, values.shape[-1], dtype=jnp.bool_).any(-2)


def counted(value: Named, last: int, probe: Named, count: Callable[[Any], Any]) -> Named:
    """Return `value` unchanged; the "gradient" of `probe` is `count(rows)`, summed over all uses.

    A `scan` or `checkpoint` returns only the values that it was written to return, but cotangents
    always come back. The cotangent of the probe is summed over all places that read the probe, and
    a scan that slices the probe stacks it. `last` is the name of the axis along a row; the probe
    has W's stack axes and the two axes of a count; `count` maps [*stack, rows, last] to counts.
    """
    stack = tuple(n for n in probe.names[:-2] if n in value.names)
    # A ragged product mixes the rows of all slices; then each slice gets the whole sum.
    whole = probe.reduced(without(probe.names[:-2], stack), jnp.sum)
    front = value.moved((*stack, *without(value.names, (*stack, last)), last))
    rows = front.array.reshape(*map(front.size, stack), -1, front.size(last))
    array = _counted(rows, whole.array, count).reshape(front.array.shape)
    return Named(array, front.names).moved(value.names)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _counted(rows: Array, probe: Array, count: Callable[[Any], Any]) -> Array:
    return rows


_counted.defvjp(
    lambda rows, probe, count: (rows, rows),
    lambda count, rows, cotangent: (cotangent, count(rows)),
)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Gated(LowRank):
    """All experts of a mixture as one low-rank update, weighted for each token by a router.

    The router's logits are x times the last `experts` columns of `a`, so one product multiplies x
    with the factors of all experts and with the router, and a program applies to the router all
    that it applies to `a`. Such an update depends on x, so it needs products with all of x's
    inputs.

    top: the number of experts for each token; None: all of them.
    probe: None, or zeros to count with (see `counted`).
    """

    experts: int = dataclasses.field(default=1, metadata={"static": True})
    top: int | None = dataclasses.field(default=None, metadata={"static": True})
    probe: Named | None = None

    needs_input = (
        "where a router per token has no whole input to route by. Leave it out of the targets, or "
        "use weights per example: moe.mix"
    )

    def scaled(self, h: Named) -> Named:
        """Return `x a` for all experts, each weighted by its gate from the router's columns."""
        h = h.moved((*without(h.names, (RANK,)), RANK))
        rank = h.array.shape[-1] - self.experts
        weights = Named(gates(h.array[..., rank:], self.top), (*h.names[:-1], MEMBER))
        if self.probe is not None:
            weights = counted(weights, MEMBER, self.probe, lambda rows: tally(rows, self.top))
        parts = h.array[..., :rank].reshape(*weights.array.shape, rank // self.experts)
        weighted = parts * weights.array[..., None].astype(parts.dtype)
        return super().scaled(Named(weighted.reshape(*h.array.shape[:-1], rank), h.names))
