"""The one table of primitives: `rule(evaluator, eqn, ins) -> outs` for each that takes a weight.

`ins` mixes arrays and `AdaptedWeight`s, at least one of these; so may the outputs. A rule
returns None where it does not apply; the weight is then folded, or refused. The same rules run an
update (`lora_jax.adapt`) and find the roles of the axes (`lora_jax.resolve`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lora_jax.named import RANK, Ins, Named, Outs
from lora_jax.primitives import control, joined, products, ragged, views
from lora_jax.primitives.adapted_weight import AdaptedWeight
from lora_jax.updates.lowrank import LowRank
from lora_jax.updates.update import Operation

PrimitiveRule = Callable[[Any, Any, Ins], Outs]
RULES: dict[str, PrimitiveRule] = {
    **views.RULES,
    **joined.RULES,
    **products.RULES,
    **ragged.RULES,
    **control.RULES,
}


def register(
    rule: PrimitiveRule, *, primitive: str | None = None, function: str | None = None
) -> None:
    """Make a rule known for a primitive, or for a function with a gradient rule of its own.

    Args:
      rule: `rule(evaluator, eqn, ins) -> outs`; `product` makes one for a kernel that multiplies.
      primitive: its name, as a jaxpr shows it.
      function: the `__name__` of a function under `jax.custom_vjp`. Such a function cannot be
        entered, because its gradient rule would be lost, so it needs a rule by its name.
    """
    if primitive is not None:
        RULES[primitive] = rule
    if function is not None:
        control.FUNCTIONS[function] = rule


def product(
    call: Callable[..., Any],
    *,
    x: int,
    weight: int,
    stack: tuple[int, ...],
    inputs: int,
    outputs: int,
    rows: Callable[..., Any] | None = None,
) -> PrimitiveRule:
    """Return the rule of a kernel that is linear in an array x [..., in] and in a weight.

    The kernel itself is called three times: on W, and on `a` and `b` in W's place.

    Args:
      call: the kernel, `call(*operands) -> [..., out]`, for weights of any two sizes in and out.
      x, weight: which operands these are.
      stack, inputs, outputs: the axes of the weight; `inputs` is what the last axis of x meets,
        `outputs` becomes the last axis of the result.
      rows: `rows(array, x, *others)` gives [..., n] from an array [*stack, n]: the slice that each
        row of x meets (the group of a grouped product). Only an update with an output gain
        (DoRA) needs it.

    >>> from lora_jax.primitives.table import product, register
    >>> register(product(my_gmm, x=0, weight=1, stack=(0,), inputs=1, outputs=2),
    ...          function="my_gmm")  # doctest: +SKIP
    """

    def rule(evaluator: Any, eqn: Any, ins: Ins) -> Outs:
        v, operand = ins[weight], ins[x]
        if not isinstance(v, AdaptedWeight) or isinstance(operand, AdaptedWeight):
            return None
        s, (i,), (o,) = v.names_at(stack), v.names_at((inputs,)), v.names_at((outputs,))
        if not v.update.admits(s, (i,), (o,)):
            return None
        use = evaluator.consume(eqn, v, s, (i,), (o,))
        v = v.chosen()
        free = evaluator.fresh(operand.ndim - 1)

        def run(w: Any, x_array: Any, *others: Any) -> Any:
            operands = list(others)
            for place, value in sorted(((x, x_array), (weight, w))):
                operands.insert(place, value)
            return call(*operands)

        def low_rank(y: Any, named: Named, update: LowRank) -> Any:
            a = update.a.moved(tuple(RANK if n == o else n for n in v.names))
            b = update.b.moved(tuple(RANK if n == i else n for n in v.names))
            h = run(a.array.astype(named.array.dtype), named.array, *rest)
            h = update.middle(Named(h, (*free, RANK))).array
            return y + run(b.array.astype(h.dtype), h, *rest).astype(y.dtype)

        rest = tuple(value for place, value in enumerate(ins) if place not in (x, weight))
        base = lambda array: v.held.product(run, array, *rest)  # noqa: E731
        spread = None
        if rows is not None:

            def spread(n: Named) -> Named:
                array = rows(n.to_front(s).array, operand, *rest)
                return Named(array, (*free, *(name for name in n.names if name not in s)))

        named = Named(operand, (*free, i))
        operation = Operation(named, (*free, o), base, low_rank, use=use, spread=spread)
        return [v.update.product(operation)]

    return rule
