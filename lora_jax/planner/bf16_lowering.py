"""Rewrite a traced function with float16 in place of bfloat16, to compile it for a CPU.

XLA compiles bfloat16 for a CPU by widening it: products, loops and collectives become float32, and
whole stacks of weights are copied to float32 before a loop. No accelerator does that. float16 has
the same width as bfloat16, and XLA's program with it on a CPU has the sizes of an accelerator's
program. A product with a float32 result is rewritten to a float16 one that is cast, because XLA
would make float32 copies of its operands on a CPU. The program is compiled but never run, so its
values do not matter.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core

from lora_jax.primitives import jaxprs

FLOAT16, BFLOAT16 = np.dtype(np.float16), jnp.dtype(jnp.bfloat16)


def shapes(tree: Any) -> Any:
    """Return ShapeDtypeStructs with float16 in place of bfloat16 and the same shardings."""

    def shape(x: Any) -> jax.ShapeDtypeStruct:
        dtype = FLOAT16 if x.dtype == BFLOAT16 else x.dtype
        return jax.ShapeDtypeStruct(x.shape, dtype, sharding=x.sharding)

    return jax.tree.map(shape, tree)


def in_float16(f: Callable[..., Any], *arguments: Any) -> Callable[..., Any] | None:
    """Trace `f` on the shapes of `arguments`, and return it as a function of float16."""
    traced, out = jax.make_jaxpr(f, return_shape=True)(*arguments)
    rewriter = _Rewriter()
    jaxpr, consts = rewriter.opened(traced)
    if not rewriter.found:
        return None

    def call(*given: Any) -> Any:
        flat = jax.core.eval_jaxpr(jaxpr, consts, *jax.tree.leaves(given))
        return jax.tree.unflatten(jax.tree.structure(out), flat)

    return call


class _Rewriter:
    """Copies jaxprs at any depth with float16 in place of bfloat16, without evaluating anything.

    found: whether there was any bfloat16.
    """

    def __init__(self) -> None:
        self.found = False

    def opened(self, given: Any) -> tuple[core.Jaxpr, list[Any]]:
        jaxpr, consts = jaxprs.opened(given)
        variables: dict[Any, Any] = {}

        def variable(v: Any) -> Any:
            if isinstance(v, core.Literal):
                return core.Literal(self.value(v.val), self.aval(v.aval))
            if v not in variables:
                variables[v] = core.Var(self.aval(v.aval))
            return variables[v]

        each = lambda vs: [variable(v) for v in vs]  # noqa: E731
        eqns = []
        for e in jaxpr.eqns:
            new = e.replace(
                invars=each(e.invars),
                outvars=each(e.outvars),
                params={name: self.param(value) for name, value in _of_cpu(e.params).items()},
            )
            eqns += _narrowed(new)
        new = jaxpr.replace(
            constvars=each(jaxpr.constvars),
            invars=each(jaxpr.invars),
            outvars=each(jaxpr.outvars),
            eqns=eqns,
        )
        return new, [self.value(c) for c in consts]

    def param(self, value: Any) -> Any:
        """Rewrite a parameter of an equation: a jaxpr, several, a dtype, or anything else."""
        if isinstance(value, tuple | list) and any(isinstance(v, _JAXPRS) for v in value):
            return type(value)(map(self.param, value))
        if isinstance(value, core.ClosedJaxpr):
            jaxpr, consts = self.opened(value)
            return value.replace(jaxpr=jaxpr, consts=consts)
        if isinstance(value, core.Jaxpr):
            return self.opened(value)[0]
        if value is jnp.bfloat16 or (isinstance(value, np.dtype) and value == BFLOAT16):
            return FLOAT16
        return value

    def aval(self, aval: Any) -> Any:
        if getattr(aval, "dtype", None) != BFLOAT16:
            return aval
        self.found = True
        return aval.update(dtype=FLOAT16)

    def value(self, x: Any) -> Any:
        if getattr(x, "dtype", None) != BFLOAT16:
            return x
        with np.errstate(over="ignore"):
            return np.asarray(x).astype(FLOAT16)


def _of_cpu(params: dict[str, Any]) -> dict[str, Any]:
    """Put the branch that a CPU takes in place of the branches of other platforms."""
    platforms = params.get("branches_platforms")
    if platforms is None:
        return params
    taken = next(i for i, names in enumerate(platforms) if names is None or "cpu" in names)
    return {**params, "branches": (params["branches"][taken],) * len(platforms)}


def _narrowed(eqn: Any) -> list[Any]:
    """Rewrite a product of float16 operands with a float32 result to one with a float16 result."""
    narrow = all(v.aval.dtype == FLOAT16 for v in eqn.invars)
    if "preferred_element_type" not in eqn.params or not narrow:
        return [eqn]
    (out,) = eqn.outvars
    if out.aval.dtype == FLOAT16:
        return [eqn]
    short = core.Var(out.aval.update(dtype=FLOAT16))
    (cast,) = jax.make_jaxpr(lambda x: x.astype(out.aval.dtype))(short.aval).eqns
    return [
        eqn.replace(outvars=[short], params={**eqn.params, "preferred_element_type": FLOAT16}),
        cast.replace(invars=[short], outvars=[out]),
    ]


_JAXPRS = (core.Jaxpr, core.ClosedJaxpr)
