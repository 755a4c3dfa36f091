"""Activated LoRA: `W + scale * a @ b` for some tokens of a program, and W for the others."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from lora_jax.base import Array, Parameters, W
from lora_jax.errors import LoraError
from lora_jax.spec import Target
from lora_jax.updates.lora import Lora
from lora_jax.updates.named import OTHER, Named
from lora_jax.updates.update import Operation, Wrapper, known

CURE = "pass lora_jax.multi.activated(adapters, active) in the place of the adapters"


class Alora(Lora):
    """Activated LoRA (arXiv 2504.12397): LoRA that is on from an invocation on.

        y_t = x_t (W + scale * a @ b)    if active_t
        y_t = x_t W                      for the tokens before

    The arrays are LoRA's. Keys and values of the tokens before are the base's, so all adapters
    share them. `lora_jax.multi.activated` says which tokens are active; without it, `adapt` refuses
    such a target. No single weight means the same, so `merge` refuses it too.
    """

    name = "alora"
    has_parts = False
    activated = True

    def merged(self, target: Target, parameters: Parameters, w: W) -> Array:
        raise LoraError(
            f"{target.path!r}: an update of the kind 'alora' is on for some tokens only, so no "
            f"merged weight equals it. Use lora_jax.adapt, and {CURE}"
        )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class OnTokens(Wrapper):
    """An update that is added for some rows of x only.

    active: bool [*tokens], for x [*tokens, ...]; an array without axes is for all tokens. The names
      of the tokens' axes are OTHER and below.
    """

    active: Named

    needs_input = "and the update is on for some tokens only"

    @staticmethod
    def start(inner: Wrapper | Any, active: Any) -> OnTokens:
        return OnTokens(inner, Named(active, tuple(range(OTHER, OTHER - jnp.ndim(active), -1))))

    def product(self, p: Operation) -> Array:
        y = p.base(None if p.x is None else p.x.array)
        tokens = tuple(n for n in self.active.names if n <= OTHER)
        seen = (p.out if p.x is None else p.x.names)[: len(tokens)]
        shape, result = [self.active.size(n) for n in tokens], Named(y, p.out)
        if not {*seen} <= {*p.out} or [result.size(n) for n in seen] != shape:
            x = y.shape if p.x is None else p.x.array.shape
            raise LoraError(
                f"the active tokens have the shape {shape}, and a weight is multiplied with an "
                f"array of the shape {list(x)}, which does not begin with these axes"
            )
        active = self.active.renamed(dict(zip(tokens, seen, strict=True))).aligned(p.out)
        return jnp.where(active, self.inner.product(dataclasses.replace(p, base=known(y))), y)
