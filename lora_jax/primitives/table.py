"""One rule per primitive that can take an adapted weight: `rule(interpreter, eqn, ins) -> outs`.

`ins` mixes arrays and `AdaptedWeight`s, at least one of these; so may the outputs. A rule
returns None where it does not apply, and the interpreter then folds or refuses.
"""

from __future__ import annotations

from lora_jax.primitives import control, products, views

RULES = {**views.RULES, **products.RULES, **control.RULES}
