"""Inspect a traced program, which is more reliable than timing it, and run it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from jax.extend import core

PRODUCTS = ("dot_general", "conv_general_dilated", "ragged_dot_general")


def equations(jaxpr: Any) -> Iterator[Any]:
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
    """The numbers of elements of the results of products in `f(*args)`."""
    traced = jax.make_jaxpr(f)(*args)
    return {eqn.outvars[0].aval.size for eqn in equations(traced) if eqn.primitive.name in PRODUCTS}


def compiled(f: Callable[..., Any], *args: Any) -> Any:
    """Return `f(*args)`, run as one program; without jit, each operation would be compiled."""
    leaves, tree = jax.tree.flatten(args)
    others: list[Any] = []
    found: Any = None

    def run(arrays: list[Any]) -> list[Any]:
        nonlocal others, found
        whole = [x if array is None else array for x, array in zip(leaves, arrays, strict=True)]
        others, found = jax.tree.flatten(f(*jax.tree.unflatten(tree, whole)))
        return [x if _is_array(x) else None for x in others]

    arrays = jax.jit(run)([x if _is_array(x) else None for x in leaves])
    pairs = zip(others, arrays, strict=True)
    return jax.tree.unflatten(found, [x if array is None else array for x, array in pairs])


def _is_array(x: Any) -> bool:
    return isinstance(x, jax.Array | np.ndarray)
