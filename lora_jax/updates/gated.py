"""The experts of a mixture as one low-rank update, weighted token by token by a router."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax

from lora_jax.errors import LoraError
from lora_jax.named import MEMBER, RANK, Named, without
from lora_jax.updates.gating import Gate, counted, gates
from lora_jax.updates.lowrank import LowRank
from lora_jax.updates.update import Update


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Gated(LowRank):
    """All experts of a mixture as one update, weighted for each token by a router.

    The router's columns are the last columns of `a`, so a program applies to them all that it
    applies to `a`. Such an update depends on x, so it needs products with all of x's inputs.
    """

    gate: Gate | None = None

    def map(self, fn: Callable[..., Named], *operands: Any) -> Update:
        moved: Any = super().map(fn, *operands)
        if self.gate is None or self.gate.probe is None:
            return moved
        probe = fn(self.gate.probe, *operands)
        return dataclasses.replace(moved, gate=dataclasses.replace(self.gate, probe=probe))

    def middle(self, h: Named) -> Named:
        """Return `x a` for all experts, each weighted by its gate from the router's columns."""
        assert self.gate is not None
        gate = self.gate
        h = h.moved((*without(h.names, (RANK,)), RANK))
        rank = h.array.shape[-1] - gate.n
        weights = gates(h.array[..., rank:], gate.top)
        if gate.probe is not None:
            weights = _counted(Named(weights, (*h.names[:-1], MEMBER)), gate)
        parts = h.array[..., :rank].reshape(*weights.shape, rank // gate.n)
        weighted = parts * weights[..., None].astype(parts.dtype)
        return super().middle(Named(weighted.reshape(*h.array.shape[:-1], rank), h.names))

    def check_linear(self, path: str, where: str) -> None:
        raise LoraError(
            f"{path!r}: {where}, where a router per token has no whole input to route by. Leave "
            "it out of the targets, or use weights per example: moe.mix"
        )


def _counted(weights: Named, gate: Gate) -> Any:
    """Return the gates unchanged and count them for each slice of the probe's stack."""
    front = weights.to_front(tuple(n for n in gate.probe.names if n in weights.names[:-1]))
    stack = front.array.shape[: len(gate.probe.names) - 2]
    rows = front.array.reshape(*stack, -1, gate.n)
    array = counted(rows, gate.probe.array, gate.top).reshape(front.array.shape)
    return Named(array, front.names).moved(weights.names).array
