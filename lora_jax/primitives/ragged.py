"""`ragged_dot`: a bank of experts, its rows in groups, each with its own weight and factors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from lora_jax.primitives import jaxprs
from lora_jax.primitives.adapted_weight import AdaptedWeight
from lora_jax.primitives.lowrank import LowRank
from lora_jax.primitives.named import OTHER, RANK, Ins, Named, Outs, without
from lora_jax.primitives.update import Operation

Dot = Callable[[Any, Any, Any], Any]  # (x, w [groups, ...], sizes [groups])


def ragged_dot(evaluator: Any, eqn: Any, ins: Ins) -> Outs:
    """The rule of `ragged_dot_general`; without an adapted weight too, in a mixed batch."""
    x, v, sizes = ins
    form = jaxprs.ragged_form(eqn)
    if form is None or (isinstance(x, AdaptedWeight) and not isinstance(v, AdaptedWeight)):
        return None
    x = evaluator.plain(eqn, x)  # rows that a norm has scaled count as its weight in `roles`
    (x_contract,), _ = eqn.params["ragged_dot_dimension_numbers"].dot_dimension_numbers[0]
    many = batched if evaluator.per_example else lambda dot, rows: dot

    def plain(dtype: Any = None) -> Dot:
        return many(lambda x, w, n: jaxprs.bind(eqn, x, w, n, dtype=dtype), 1 - x_contract)

    if not isinstance(v, AdaptedWeight):
        return [plain()(x, v, sizes)]
    (group,), (contract,) = v.names_at(form.group), v.names_at(form.contract)
    (outer,) = without(v.names, (group, contract))
    if not v.update.admits((group,), (contract,), (outer,)):
        return None
    use = evaluator.consume(eqn, v, (group,), (contract,), (outer,))
    v = v.chosen()
    precision, rows = eqn.params["precision"], evaluator.fresh(1)
    names = (*rows, contract) if x_contract == 1 else (contract, *rows)
    small = many(lambda x, w, sizes: lax.ragged_dot(x, w, sizes, precision=precision), 0)

    def low_rank(y: Any, x: Named, update: LowRank) -> Any:
        a = update.a.moved((group, contract, RANK)).array.astype(x.array.dtype)
        b = update.b.moved((group, RANK, outer)).array.astype(x.array.dtype)
        h = Named(small(x.moved((*rows, contract)).array, a, sizes), (OTHER, RANK))
        d = small(update.middle(h).array, b, sizes)
        return y + d.astype(y.dtype)

    # A function with a batching rule of its own cannot be transposed before it is batched.
    apply = v.held.use if evaluator.per_example else v.held.product

    def base(x: Any, dtype: Any = None) -> Any:
        return apply(lambda w, x, sizes: plain(dtype)(x, w, sizes), x, sizes)

    def spread(n: Named) -> Named:
        """One row of the array for each row of x, that of its group."""
        n = n.to_front((group,))
        length = x.shape[names.index(rows[0])]
        array = jnp.repeat(n.array, sizes, axis=0, total_repeat_length=length)
        return Named(array, (*rows, *n.names[1:]))

    named, out = Named(x, names), (*rows, outer)
    p = Operation(named, out, base, low_rank, sums=True, use=use, spread=spread)
    return [v.update.product(p)]


def batched(dot: Dot, rows: int) -> Dot:
    """A `ragged_dot` that a `vmap` can take: JAX batches none whose weight all examples share.

    The rows of all examples (axis `rows` of x) are put in the order of their groups, and are rows
    of one product. It can be differentiated once it is under the `vmap`.
    """
    call = jax.custom_batching.custom_vmap(dot)

    @call.def_vmap
    def rule(n: int, is_batched: list[bool], *ins: Any) -> tuple[Any, bool]:
        every = (
            v if yes else jnp.broadcast_to(v, (n, *v.shape))
            for v, yes in zip(ins, (is_batched[0], True, is_batched[2]), strict=True)
        )
        x, w, sizes = every
        if is_batched[1]:
            return jax.vmap(dot)(x, w, sizes), True
        x = jnp.moveaxis(x, 1 + rows, 1)
        numbers = jnp.arange(x.shape[1])
        group = jax.vmap(lambda s: jnp.searchsorted(jnp.cumsum(s), numbers, side="right"))(sizes)
        order = jnp.argsort(group.ravel(), stable=True)
        flat = x.reshape(-1, x.shape[2])[order]
        y = dot(jnp.moveaxis(flat, 0, rows), w, sizes.sum(0, dtype=sizes.dtype))
        y = jnp.zeros_like(y).at[order].set(y, unique_indices=True)
        return y.reshape(n, -1, y.shape[1]), True

    return call


RULES: dict[str, Callable[[Any, Any, Ins], Outs]] = {"ragged_dot_general": ragged_dot}
