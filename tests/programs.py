"""What a traced program computes: the facts that the tests assert instead of times."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jax
from jax.extend import core

PRODUCTS = ("dot_general", "conv_general_dilated", "ragged_dot_general")


def equations(jaxpr: Any) -> Iterator[Any]:
    """All equations, those of nested jaxprs too."""
    jaxpr = getattr(jaxpr, "jaxpr", jaxpr)
    for eqn in jaxpr.eqns:
        yield eqn
        for inner in jax.tree.leaves(
            list(eqn.params.values()),
            is_leaf=lambda x: isinstance(x, core.Jaxpr | core.ClosedJaxpr),
        ):
            if isinstance(inner, core.Jaxpr | core.ClosedJaxpr):
                yield from equations(inner)


def product_sizes(f: Any, *args: Any) -> set[int]:
    """The numbers of elements that products in `f(*args)` have in their results."""
    traced = jax.make_jaxpr(f)(*args)
    return {eqn.outvars[0].aval.size for eqn in equations(traced) if eqn.primitive.name in PRODUCTS}
