"""An update that changes nothing and sums the second moment x^T x of the inputs of a weight."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from lora_jax.errors import LoraError
from lora_jax.updates.gating import counted
from lora_jax.updates.lowrank import LowRank
from lora_jax.updates.named import MEMBER, RANK, TALLY, Named, Names


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Moments(LowRank):
    """A low-rank update whose `a` is the identity of the inputs, and whose `b` is zero.

    So `x a`, which every rule passes to `middle`, is x itself as the weight sees it: rows
    [rows, in], the patches of a convolution, the rows of an expert. The sum of x^T x comes back as
    the gradient of `probe`, [*stack, in, in]; see `lora_jax.updates.gating.counted`.
    """

    probe: Named | None = None

    def middle(self, h: Named) -> Named:
        assert self.probe is not None
        return counted(h, RANK, self.probe, _square)

    def check_linear(self, path: str, where: str) -> None:
        raise LoraError(
            f"{path!r}: {where}, where the inputs of the weight cannot be seen. Leave it out of "
            "the layout, and begin it with lora_jax.init"
        )


def moments(shape: tuple[int, ...], probe: Any, stack: Names, inputs: Names, outputs: Names) -> Any:
    """Return the update of a weight with the axes [*stack, *inputs, *outputs].

    Args:
      shape: their sizes.
      probe: float32 zeros [*stack, in, in].
      stack, inputs, outputs: their names.
    """
    n, m = len(stack), len(stack) + len(inputs)
    fan_in = math.prod(shape[n:m])
    unit = jnp.eye(fan_in, dtype=jnp.bfloat16).reshape(*shape[n:m], fan_in)  # 0 and 1 are exact
    a = Named(jnp.broadcast_to(unit, (*shape[:m], fan_in)), (*stack, *inputs, RANK))
    b = jnp.zeros((*shape[:n], fan_in, *shape[m:]), jnp.bfloat16)
    return Moments(
        a, Named(b, (*stack, RANK, *outputs)), probe=Named(probe, (*stack, TALLY, MEMBER))
    )


def _square(rows: Any) -> Any:
    """Return rows^T rows in float32, from [*stack, rows, in]."""
    return jnp.einsum(
        "...ri,...rj->...ij", rows, rows, precision="highest", preferred_element_type=jnp.float32
    )
