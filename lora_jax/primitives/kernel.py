"""Kernels that multiply: each is called on W, and on each factor of an update in place of W.

`ragged_dot` is one: a bank of experts. Its rows come in groups, and each group has its own weight
and factors.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

from lora_jax.primitives.adapted_weight import AdaptedWeight, Ins, Outs
from lora_jax.primitives.evaluator import Evaluator, Primitive, PrimitiveRule, Primitives
from lora_jax.primitives.jaxprs import Eqn
from lora_jax.updates.lowrank import LowRank
from lora_jax.updates.named import RANK, Named, without
from lora_jax.updates.update import Operation

Dot = Callable[..., Any]  # (x [rows, in], w [groups, in, out], sizes [groups])


def product(
    call: Callable[..., Any],
    *,
    x: int,
    weight: int,
    stack: tuple[int, ...],
    inputs: int,
    outputs: int,
    rows: Callable[..., Any] | None = None,
    sums: bool = False,
) -> PrimitiveRule:
    """Return the rule of a kernel that is linear in an array x [..., in] and in a weight.

    Args:
      call: the kernel, `call(*operands) -> [..., out]`, for weights of any two sizes in and out.
      x, weight: the positions of these two operands.
      stack, inputs, outputs: the axes of the weight. The last axis of x is multiplied along
        `inputs`; `outputs` becomes the last axis of the result.
      rows: `rows(array, x, *others)` returns [..., n] from an array [*stack, n]: the slice that
        belongs to each row of x (the group of a grouped product). Only an update with an output
        gain (DoRA) needs it.
      sums: whether `call` also takes `dtype`, the dtype of the result and of the sums.

    >>> from lora_jax.primitives import kernel, table
    >>> rule = kernel.product(my_gmm, x=0, weight=1, stack=(0,), inputs=1,
    ...                       outputs=2)  # doctest: +SKIP
    >>> table.register(rule, function="my_gmm")  # doctest: +SKIP
    """

    def run(w: jax.Array, x_array: jax.Array, *others: jax.Array, **dtype: Any) -> jax.Array:
        rest, named = iter(others), {x: x_array, weight: w}
        operands = (named[i] if i in named else next(rest) for i in range(len(others) + 2))
        return call(*operands, **dtype)

    def rule(evaluator: Evaluator, eqn: Eqn, ins: Ins) -> Outs:
        v = ins[weight]
        if not isinstance(v, AdaptedWeight):
            return None
        s, (i,), (o,) = v.names_at(stack), v.names_at((inputs,)), v.names_at((outputs,))
        if not v.admits(s, (i,), (o,)):
            return None
        operand = evaluator.plain(eqn, ins[x])  # x may be a weight too: rows times a norm's
        use = evaluator.consume(eqn, v, s, (i,), (o,))
        v = v.selected()
        free = evaluator.fresh(operand.ndim - 1)
        rest = tuple(value for place, value in enumerate(ins) if place not in (x, weight))
        # A function with a batching rule of its own cannot be transposed before it is batched.
        apply = v.weight.use if evaluator.per_example else v.weight.product

        def base(array: jax.Array, dtype: DTypeLike | None = None) -> jax.Array:
            more: dict[str, Any] = {} if dtype is None else {"dtype": dtype}
            return apply(functools.partial(run, **more), array, *rest)

        def low_rank(y: jax.Array, named: Named, update: LowRank) -> jax.Array:
            dtype = named.array.dtype
            a = update.a.moved(tuple(RANK if n == o else n for n in v.names)).astype(dtype)
            b = update.b.moved(tuple(RANK if n == i else n for n in v.names)).astype(dtype)
            h = update.scaled(Named(run(a.array, named.array, *rest), (*free, RANK))).astype(dtype)
            return y + run(b.array, h.array, *rest).astype(y.dtype)

        def spread(n: Named) -> Named:
            assert rows is not None
            array = rows(n.to_front(s).array, operand, *rest)
            return Named(array, (*free, *without(n.names, s)))

        named, each = Named(operand, (*free, i)), None if rows is None else spread
        operation = Operation(
            named, (*free, o), base, low_rank, eqn.outvars[0].aval.dtype,
            sums=sums, use=use, spread=each,
        )  # fmt: skip
        return [v.update.product(operation)]

    return rule


def ragged_dot(evaluator: Evaluator, eqn: Eqn, ins: Ins) -> Outs:
    """Apply the rule of `ragged_dot_general`; a mixed batch needs it without a weight too."""
    x, v, sizes = ins
    p, dims = eqn.params, eqn.params["ragged_dot_dimension_numbers"]
    (x_in, w_in), (batch, _) = dims.dot_dimension_numbers
    ragged_inputs = dims.lhs_ragged_dimensions[0] in x_in
    alone = isinstance(x, AdaptedWeight) and not isinstance(v, AdaptedWeight)
    if alone or batch or ragged_inputs or p.get("group_offset"):
        return None
    x = evaluator.plain(eqn, x)
    order = (*dims.rhs_group_dimensions, *w_in)
    order = (*order, *without((0, 1, 2), order))
    x = x.T if x_in == (0,) else x

    def dot(
        x: jax.Array, w: jax.Array, sizes: jax.Array, dtype: DTypeLike | None = None
    ) -> jax.Array:
        dtype = p["preferred_element_type"] if dtype is None else dtype
        one = functools.partial(
            lax.ragged_dot, precision=p["precision"], preferred_element_type=dtype
        )
        return (batched(one) if evaluator.per_example else one)(x, w, sizes)

    if not isinstance(v, AdaptedWeight):
        return [dot(x, jnp.transpose(v, order), sizes)]
    names = v.names_at(order)
    v = v if names == v.names else v.map_w(lambda n: n.moved(names))
    rule = product(
        dot, x=0, weight=1, stack=(0,), inputs=1, outputs=2, sums=True,
        rows=lambda array, x, sizes: jnp.repeat(array, sizes, 0, total_repeat_length=len(x)),
    )  # fmt: skip
    return rule(evaluator, eqn, [x, v, sizes])


def batched(dot: Dot) -> Dot:
    """Return a `ragged_dot` that `vmap` accepts; JAX cannot batch one with a shared weight.

    The rows of all examples are sorted by group, and become the rows of one product. It can be
    differentiated once it is under the `vmap`.
    """
    call = jax.custom_batching.custom_vmap(dot)

    @call.def_vmap
    def rule(n: int, is_batched: list[bool], *ins: jax.Array) -> tuple[jax.Array, bool]:
        x, w, sizes = (
            v if yes else jnp.broadcast_to(v, (n, *v.shape))
            for v, yes in zip(ins, (is_batched[0], True, is_batched[2]), strict=True)
        )
        if is_batched[1]:
            return jax.vmap(dot)(x, w, sizes), True
        numbers = jnp.arange(x.shape[1])
        group = jax.vmap(lambda s: jnp.searchsorted(jnp.cumsum(s), numbers, side="right"))(sizes)
        order = jnp.argsort(group.ravel(), stable=True)
        y = dot(x.reshape(-1, x.shape[2])[order], w, sizes.sum(0, dtype=sizes.dtype))
        y = jnp.zeros_like(y).at[order].set(y, unique_indices=True)
        return y.reshape(n, -1, y.shape[1]), True

    return call


PRIMITIVES: Primitives = {"ragged_dot_general": Primitive(ragged_dot, operands=2)}
