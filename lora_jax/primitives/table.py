"""The one table of primitives: `rule(evaluator, eqn, ins) -> outs` for each that takes a weight.

`ins` mixes arrays and `AdaptedWeight`s, with at least one weight; outputs may be either. A rule
returns None if it does not apply; the weight is then folded, or refused. The same rules run an
update (`lora_jax.adapt`) and find the roles of the axes (`lora_jax.resolve`).
"""

from __future__ import annotations

from lora_jax.primitives import control, joined, kernel, products, views
from lora_jax.primitives.adapted_weight import PrimitiveRule

RULES: dict[str, PrimitiveRule] = {
    **views.RULES,
    **joined.RULES,
    **products.RULES,
    **kernel.RULES,
    **control.RULES,
}


def register(
    rule: PrimitiveRule, *, primitive: str | None = None, function: str | None = None
) -> None:
    """Register a rule for a primitive, or for a function with a gradient rule of its own.

    Args:
      rule: `rule(evaluator, eqn, ins) -> outs`; `kernel.product` makes one for a kernel.
      primitive: the primitive's name, as a jaxpr shows it.
      function: the `__name__` of a function under `jax.custom_vjp`. Such a function cannot be
        entered, because its gradient rule would be lost, so it needs a rule by its name.
    """
    if primitive is not None:
        RULES[primitive] = rule
    if function is not None:
        control.FUNCTIONS[function] = rule
