"""The one table of primitives: `rule(evaluator, eqn, ins) -> outs` for each that takes a weight.

`ins` mixes arrays and `AdaptedWeight`s, at least one of these; so may the outputs. A rule
returns None where it does not apply; the weight is then folded, or refused.
"""

from __future__ import annotations

from lora_jax.primitives import control, joined, products, ragged, views

RULES = {**views.RULES, **joined.RULES, **products.RULES, **ragged.RULES, **control.RULES}
