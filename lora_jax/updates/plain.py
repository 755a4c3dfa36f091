"""Plain low-rank factors of any additive update, exactly: `scale * a @ b` of a higher rank."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp

from lora_jax.errors import LoraError
from lora_jax.target import Target
from lora_jax.updates.kind import Factors, kind_of


def plain(target: Target, parameters: Any) -> tuple[Target, Factors]:
    """Return the target with a plain low-rank update, and the factors of that update.

    Raises:
      LoraError: DoRA (its update depends on W), or a bias (it has no factors).
    """
    if target.kind == "lora" and not target.parts:
        return target, parameters
    kind = kind_of(target)
    factors = kind.factors(target, parameters)
    if factors is None or kind.rescales:
        why = "has no factors" if factors is None else "rescales W itself"
        raise LoraError(
            f"{target.path!r}: an update of the kind {target.kind!r} {why}, so it cannot be "
            "written as plain LoRA factors. Use the adapter alone (lora_jax.adapt), or merge it"
        )
    scale, rank = kind.scale(target), factors.a.shape[-1]
    limit = min(target.fan_in, target.fan_out)
    if rank > limit:
        factors = _of_full_rank(target, factors)
    lora = target.plain(min(rank, limit))
    return dataclasses.replace(lora, alpha=scale * lora.rank), factors


def _of_full_rank(target: Target, factors: Factors) -> Factors:
    """Return factors of the same product, one of which is an identity."""
    stack = target.sizes(target.stack)
    a = factors.a.reshape(*stack, target.fan_in, -1)
    b = factors.b.reshape(*stack, a.shape[-1], target.fan_out)
    limit = min(target.fan_in, target.fan_out)
    product = jnp.matmul(a, b, precision="highest")
    unit = jnp.broadcast_to(jnp.eye(limit, dtype=product.dtype), (*stack, limit, limit))
    a, b = (unit, product) if limit == target.fan_in else (product, unit)
    return Factors(
        a.reshape(*target.a_shape[:-1], limit),
        b.reshape(*stack, limit, *target.sizes(target.outputs)),
    )
