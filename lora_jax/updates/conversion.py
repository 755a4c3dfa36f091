"""An update in another form: as plain factors of a higher rank, exactly, or of one slice of W."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp

from lora_jax.errors import LoraError
from lora_jax.spec import LoraSpec
from lora_jax.target import Target
from lora_jax.updates.kind import Factors, kind_of


def as_factors(target: Target, parameters: Any) -> tuple[Target, Factors]:
    """Return the target with a plain low-rank update, and the factors of that update.

    Raises:
      LoraError: DoRA (its update depends on W), or a bias (it has no factors).
    """
    kind = kind_of(target)
    factors = kind.factors(target, parameters)
    if factors is parameters and not kind.rescales:
        return dataclasses.replace(target, kind=LoraSpec.kind), parameters
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


def sliced(target: Target, parameters: Any, index: tuple[int, ...]) -> tuple[Target, Any]:
    """Return the update of `W[index]`, for any kind: the target of the slice, and its arrays.

    Args:
      target: from the layout.
      parameters: its arrays, `adapters[target.path]`.
      index: a number for each of the leading axes of W, all of which must be stack axes.

    Raises:
      LoraError: a leading axis is not a stack axis, so that its slices share factors.

    >>> import jax.numpy as jnp
    >>> from lora_jax.updates import Factors
    >>> target = Target("w", (5, 4, 3), (0,), (1,), (2,), rank=2, alpha=1.0)
    >>> one, parameters = sliced(target, Factors(jnp.ones((5, 4, 2)), jnp.ones((5, 2, 3))), (1,))
    >>> one.shape, parameters.a.shape
    ((4, 3), (4, 2))
    """
    lead = len(index)
    if not set(range(lead)) <= set(target.stack):
        raise LoraError(
            f"{target.path!r}: the axes {list(range(lead))} are to be taken apart, but of "
            f"{target.shape} only {list(target.stack)} are stack axes"
        )
    kind = kind_of(target)

    def take(x: Any, along: tuple[int | None, ...]) -> Any:
        return x[tuple(slice(None) if i is None or i >= lead else index[i] for i in along)]

    def shifted(axes: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(i - lead for i in axes if i >= lead)

    one = dataclasses.replace(
        target,
        shape=target.shape[lead:],
        stack=shifted(target.stack),
        inputs=shifted(target.inputs),
        outputs=shifted(target.outputs),
    )
    arrays = map(take, parameters, kind.axes(target))
    return one, kind.fields(*arrays)
