"""A program with float16 in the place of bfloat16: the same sizes, on a compiler for CPUs.

XLA compiles bfloat16 for a CPU by widening it: products, loops and collectives become float32, and
whole stacks of weights are copied to float32 before a loop. No accelerator does that. float16 is as
wide as bfloat16, and what XLA makes of it on a CPU has the sizes that an accelerator's program has.
The program is compiled and never run, so the values that differ do not matter.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core

from lora_jax.primitives import jaxprs

HALF, BRAIN = np.dtype(np.float16), jnp.dtype(jnp.bfloat16)


def shapes(tree: Any) -> Any:
    """ShapeDtypeStructs with float16 for bfloat16; shardings stay."""
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, dtype(x.dtype), sharding=x.sharding), tree
    )


def dtype(given: Any) -> Any:
    """float16 for bfloat16, and any other dtype as it is."""
    return HALF if given == BRAIN else given


def halved(f: Callable[..., Any], *arguments: Any) -> Callable[..., Any] | None:
    """`f` traced on the shapes of `arguments`, as a function of the same with float16.

    It gives what `f` gives, a tree of the same structure. None where `f` has no bfloat16.
    """
    traced, out = jax.make_jaxpr(f, return_shape=True)(*arguments)
    jaxpr, consts = jaxprs.opened(traced)
    structure = jax.tree.structure(out)
    if not _has_brain(jaxpr):
        return None

    def half(*given: Any) -> Any:
        out = _run(jaxpr, [_array(c) for c in consts], jax.tree.leaves(given))
        return jax.tree.unflatten(structure, out)

    return half


def _has_brain(jaxpr: core.Jaxpr) -> bool:
    """Whether a value in it is bfloat16, at any depth."""
    for eqn in jaxpr.eqns:
        variables = (*eqn.invars, *eqn.outvars)
        inner = [p for value in eqn.params.values() for p in _programs(value)]
        if any(getattr(v.aval, "dtype", None) == BRAIN for v in variables) or any(
            _has_brain(jaxprs.opened(p)[0]) for p in inner
        ):
            return True
    return False


def _programs(value: Any) -> list[Any]:
    """The programs in a parameter of an equation."""
    several = value if isinstance(value, tuple | list) else (value,)
    return [v for v in several if isinstance(v, core.Jaxpr | core.ClosedJaxpr)]


def _run(jaxpr: core.Jaxpr, consts: Sequence[Any], ins: Sequence[Any]) -> list[Any]:
    """Evaluate the program, every equation with float16 in its parameters."""
    values = dict(zip((*jaxpr.constvars, *jaxpr.invars), (*consts, *ins), strict=True))
    read = lambda v: _literal(v) if isinstance(v, core.Literal) else values[v]  # noqa: E731
    for eqn in jaxpr.eqns:
        params = {name: _param(value) for name, value in eqn.params.items()}
        out = _apply(eqn, params, [read(v) for v in eqn.invars])
        values.update(zip(eqn.outvars, out, strict=True))
    return [read(v) for v in jaxpr.outvars]


def _apply(eqn: Any, params: dict[str, Any], given: list[Any]) -> list[Any]:
    """One equation on its own, as a piece of a program: higher-order ones need no rule then."""
    fresh = [core.Var(_aval(v.aval)) for v in eqn.invars]
    outs = [core.Var(_aval(v.aval)) for v in eqn.outvars]
    piece = eqn.replace(invars=fresh, outvars=outs, params=params)
    return jaxprs.run([piece], fresh, outs, given)


def _param(value: Any) -> Any:
    """A parameter of an equation; the programs in it are rewritten."""
    if _programs(value):
        several = isinstance(value, tuple | list)
        return type(value)(map(_program, value)) if several else _program(value)
    if value is jnp.bfloat16 or (isinstance(value, np.dtype) and value == BRAIN):
        return HALF
    return value


def _program(given: Any) -> Any:
    """A program inside an equation, traced again with float16."""
    jaxpr, consts = jaxprs.opened(given)
    avals: list[Any] = [v.aval for v in jaxpr.invars]
    inputs = [jax.ShapeDtypeStruct(x.shape, dtype(x.dtype)) for x in avals]
    constants = [_array(c) for c in consts]
    if isinstance(given, core.ClosedJaxpr):
        return jax.make_jaxpr(lambda *xs: _run(jaxpr, constants, xs))(*inputs)
    return jaxprs.opened(jax.make_jaxpr(lambda *xs: _run(jaxpr, constants, xs))(*inputs))[0]


def _aval(aval: Any) -> Any:
    return aval.update(dtype=HALF) if getattr(aval, "dtype", None) == BRAIN else aval


def _literal(v: core.Literal) -> Any:
    return _array(v.val)


def _array(x: Any) -> Any:
    if getattr(x, "dtype", None) != BRAIN:
        return x
    with np.errstate(over="ignore"):
        return np.asarray(x).astype(HALF)
