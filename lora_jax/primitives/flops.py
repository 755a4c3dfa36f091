"""The FLOPs of the products of a traced program.

They are not counted in the compiled program, whose custom kernels hide theirs. Every multiply-add
counts as 2. What rematerialisation computes again does not count, as is usual for the model FLOPs
utilisation. Of the branches for several platforms the largest counts, which is the plain form of
attention.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from jax.extend.core import ClosedJaxpr, Jaxpr

RECOMPUTED = "rematted_computation"  # the scope in which JAX puts what it computes again


def of_products(program: Any) -> float:
    """Return the FLOPs of all products of a jaxpr; a loop of unknown length counts once.

    >>> import jax, jax.numpy as jnp
    >>> layers = lambda x, w: jax.lax.scan(lambda x, w: (x @ w, None), x, w)[0]
    >>> of_products(jax.make_jaxpr(layers)(jnp.ones((2, 4)), jnp.ones((3, 4, 4)))) == 3 * 2 * 32
    True
    """
    return sum(map(_of_equation, getattr(program, "jaxpr", program).eqns))


def _of_equation(eqn: Any) -> float:
    kind, params = eqn.primitive.name, eqn.params
    if RECOMPUTED in str(eqn.source_info.name_stack):
        return 0.0
    if kind == "dot_general":
        return _of_dot(eqn, params["dimension_numbers"])
    if kind == "ragged_dot_general":  # each row meets the weight of one group
        ragged = params["ragged_dot_dimension_numbers"]
        return _of_dot(eqn, ragged.dot_dimension_numbers, tuple(ragged.rhs_group_dimensions))
    if kind == "conv_general_dilated":
        kernel, outputs = eqn.invars[1].aval, params["dimension_numbers"].rhs_spec[0]
        return 2.0 * eqn.outvars[0].aval.size * kernel.size / kernel.shape[outputs]
    if kind == "pallas_call":  # its body is of one block; a plain form is in another branch
        return 0.0
    inner = [of_products(body) for body in _bodies(params)]
    if kind == "cond":
        return max(inner)
    if kind == "shard_map":  # its body is of one device
        return sum(inner) * math.prod(params["mesh"].shape[a] for a in params["manual_axes"])
    return sum(inner) * params.get("length", 1) if kind == "scan" else sum(inner)


def _of_dot(eqn: Any, dimensions: Any, groups: tuple[int, ...] = ()) -> float:
    (_, contracted), (_, batch) = dimensions
    left, right = (atom.aval for atom in eqn.invars[:2])
    shared = {*contracted, *batch, *groups}
    return 2.0 * left.size * math.prod(n for i, n in enumerate(right.shape) if i not in shared)


def _bodies(params: dict[str, Any]) -> Iterator[Any]:
    """Yield the jaxprs among the parameters of an equation."""
    for value in params.values():
        for body in value if isinstance(value, tuple | list) else (value,):
            if isinstance(body, Jaxpr | ClosedJaxpr):
                yield body
