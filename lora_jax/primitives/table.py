"""The one table: all that is known of each primitive that takes an adapted weight.

A rule is `rule(evaluator, eqn, ins) -> outs`. `ins` mixes arrays and `AdaptedWeight`s, with at
least one weight; outputs may be either. It returns None if it does not apply; the weight is then
folded, or refused. The same rules run an update (`lora_jax.adapt`) and find the roles of the axes
(`lora_jax.resolve`).
"""

from __future__ import annotations

from lora_jax.primitives import control, joined, kernel, products, views
from lora_jax.primitives.evaluator import EVERY, Primitive, PrimitiveRule

PRIMITIVES: dict[str, Primitive] = {
    **views.PRIMITIVES,
    **joined.PRIMITIVES,
    **products.PRIMITIVES,
    **kernel.PRIMITIVES,
    **control.PRIMITIVES,
}


def register(
    rule: PrimitiveRule,
    *,
    primitive: str | None = None,
    function: str | None = None,
    product: bool = True,
) -> None:
    """Register a rule for a primitive, or for a function with a gradient rule of its own.

    Args:
      rule: `rule(evaluator, eqn, ins) -> outs`; `kernel.product` makes one for a kernel.
      primitive: the primitive's name, as a jaxpr shows it.
      function: the `__name__` of a function under `jax.custom_vjp`. Such a function cannot be
        entered, because its gradient rule would be lost, so it needs a rule by its name.
      product: whether it multiplies, so that "all-linear" takes its weight or says why not. False:
        it only rearranges a weight.
    """
    known = Primitive(rule, operands=EVERY if product else 0)
    if primitive is not None:
        PRIMITIVES[primitive] = known
    if function is not None:
        PRIMITIVES[f"custom_vjp_call {function}"] = known
