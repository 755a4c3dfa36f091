"""The experts of a mixture as one low-rank update, weighted token by token by a router."""

from __future__ import annotations

import dataclasses

import jax

from lora_jax.errors import LoraError
from lora_jax.updates.gating import Gate, counted, gates, tally
from lora_jax.updates.lowrank import LowRank
from lora_jax.updates.named import MEMBER, RANK, Named, without


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Gated(LowRank):
    """All experts of a mixture as one update, weighted for each token by a router.

    The router's columns are the last columns of `a`, so a program applies to them all that it
    applies to `a`. Such an update depends on x, so it needs products with all of x's inputs.
    """

    gate: Gate | None = None

    def middle(self, h: Named) -> Named:
        """Return `x a` for all experts, each weighted by its gate from the router's columns."""
        assert self.gate is not None
        gate = self.gate
        h = h.moved((*without(h.names, (RANK,)), RANK))
        rank = h.array.shape[-1] - gate.n
        weights = Named(gates(h.array[..., rank:], gate.top), (*h.names[:-1], MEMBER))
        if gate.probe is not None:
            weights = counted(weights, MEMBER, gate.probe, lambda rows: tally(rows, gate.top))
        parts = h.array[..., :rank].reshape(*weights.array.shape, rank // gate.n)
        weighted = parts * weights.array[..., None].astype(parts.dtype)
        return super().middle(Named(weighted.reshape(*h.array.shape[:-1], rank), h.names))

    def check_linear(self, path: str, where: str) -> None:
        raise LoraError(
            f"{path!r}: {where}, where a router per token has no whole input to route by. Leave "
            "it out of the targets, or use weights per example: moe.mix"
        )
