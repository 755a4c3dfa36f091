"""Every kernel of a traced function, found by a walk that knows nothing of lora_jax.

A kernel is a parameter of two axes or more that takes part in the weight side of a product. A
product is an equation that multiplies and sums: `dot_general`, `conv_general_dilated`,
`ragged_dot_general`, and a lookup of rows (`gather`, `dynamic_slice`), which is the product with
one-hot rows. Its weight side is an operand computed from parameters and constants alone, where
another operand is computed from the function's arguments. What picks among values (indices, a
predicate, the index of a `cond`) decides which of them it is and does not become a part of them.

The walk is written from the documentation of JAX's primitives and shares no code with the package:
it follows dependence alone, so it loses no kernel behind an operation that has no rule.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.extend import core


class Value(NamedTuple):
    """What a value is computed from: parameters (by path), and whether arguments as well."""

    params: frozenset[str] = frozenset()
    data: bool = False


@dataclasses.dataclass
class Reference:
    """A mutable array inside a kernel (Pallas), and what has been written to it."""

    value: Value


CONSTANT, ARGUMENT = Value(), Value(data=True)
PRODUCTS = {"dot_general": 2, "conv_general_dilated": 2, "ragged_dot_general": 2}
PICKS = {"gather": (0,), "dynamic_slice": (0,), "dynamic_update_slice": (0, 1)}


def kernels(f: Callable[..., Any], params: Any, *args: Any, **kwargs: Any) -> dict[str, set[str]]:
    """Return the kernels of `f(params, *args, **kwargs)`: path -> names of their products."""
    keyed = jax.tree_util.tree_leaves_with_path(params)
    paths = [jax.tree_util.keystr(key, simple=True, separator="/") for key, _ in keyed]
    matrices = {path for path, (_, x) in zip(paths, keyed, strict=True) if np.ndim(x) >= 2}
    leaves, tree = jax.tree.flatten((args, kwargs))
    moving = [i for i, x in enumerate(leaves) if isinstance(x, jax.Array | np.ndarray)]

    def flat(arrays: Any, moved: Any) -> Any:
        whole = list(leaves)
        for i, x in zip(moving, moved, strict=True):
            whole[i] = x
        inner_args, inner_kwargs = jax.tree.unflatten(tree, whole)
        return f(
            jax.tree.unflatten(jax.tree.structure(params), arrays), *inner_args, **inner_kwargs
        )

    moved = [leaves[i] for i in moving]
    closed = jax.make_jaxpr(flat)([x for _, x in keyed], moved)
    walk = _Walk({})
    walk.jaxpr(closed, [*(Value(frozenset((p,))) for p in paths), *([ARGUMENT] * len(moved))])
    return {path: names for path, names in walk.found.items() if path in matrices}


def _join(values: Sequence[Any]) -> Value:
    values = [v.value if isinstance(v, Reference) else v for v in values]
    return Value(frozenset().union(*(v.params for v in values)), any(v.data for v in values))


class _Walk:
    def __init__(self, found: dict[str, set[str]]):
        self.found = found

    def jaxpr(self, jaxpr: Any, ins: Sequence[Any]) -> list[Any]:
        jaxpr = getattr(jaxpr, "jaxpr", jaxpr)
        env: dict[Any, Any] = dict.fromkeys(jaxpr.constvars, CONSTANT)
        env.update(zip(jaxpr.invars, ins, strict=True))

        def read(atom: Any) -> Any:
            return CONSTANT if isinstance(atom, core.Literal) else env[atom]

        for eqn in jaxpr.eqns:
            outs = self.equation(eqn, [read(v) for v in eqn.invars])
            env.update(zip(eqn.outvars, outs, strict=True))
        return [read(v) for v in jaxpr.outvars]

    def equation(self, eqn: Any, ins: list[Any]) -> list[Any]:
        name, p = eqn.primitive.name, eqn.params
        enter = getattr(self, f"_{name}", None)
        if enter is not None:
            return enter(eqn, ins)
        if name in PRODUCTS:
            self.product(name, ins[: PRODUCTS[name]])
            return [_join(ins[: PRODUCTS[name]])]
        if name in PICKS:
            return [self.pick(eqn, ins)]
        inner = [p[k] for k in ("jaxpr", "call_jaxpr", "fun_jaxpr") if k in p]
        if inner and len(getattr(inner[0], "jaxpr", inner[0]).invars) == len(ins):
            return self.jaxpr(inner[0], ins)
        return [_join(ins)] * len(eqn.outvars)

    def product(self, name: str, operands: Sequence[Value]) -> None:
        if any(v.data for v in operands):
            for v in operands:
                if not v.data:
                    self.record(name, v)

    def record(self, name: str, value: Value) -> None:
        for path in value.params:
            self.found.setdefault(path, set()).add(name)

    def pick(self, eqn: Any, ins: list[Any]) -> Value:
        """A choice by indices: of rows (a lookup, whose result is data), or of whole matrices."""
        which = PICKS[eqn.primitive.name]
        value = _join([ins[i] for i in which])
        by_data = any(v.data for i, v in enumerate(ins) if i not in which)
        if not by_data or value.data or not value.params or len(which) == 2:
            return value
        if eqn.primitive.name == "gather":
            dims, sizes = eqn.params["dimension_numbers"], eqn.params["slice_sizes"]
            gone = {*dims.collapsed_slice_dims, *dims.operand_batching_dims}
            kept = [n for i, n in enumerate(sizes) if i not in gone]
        else:
            kept = list(eqn.params["slice_sizes"])
        if sum(n > 1 for n in kept) >= 2:
            return value
        self.record(eqn.primitive.name, value)
        return value._replace(data=True)

    # --- choices and control flow ----------------------------------------------------------

    def _select_n(self, eqn: Any, ins: list[Any]) -> list[Any]:
        return [_join(ins[1:])]

    def _cond(self, eqn: Any, ins: list[Any]) -> list[Any]:
        branches = [self.jaxpr(b, ins[1:]) for b in eqn.params["branches"]]
        return [_join(outs) for outs in zip(*branches, strict=True)]

    def _scan(self, eqn: Any, ins: list[Any]) -> list[Any]:
        p = eqn.params
        if "num_consts" in p:
            fixed, n = p["num_consts"], p["num_carry"]
        else:
            consts, carry, _ = p["ft_in"].unpack()
            fixed, n = len(consts), len(carry)
        return self.loop(p["jaxpr"], ins[:fixed], ins[fixed : fixed + n], ins[fixed + n :])

    def _while(self, eqn: Any, ins: list[Any]) -> list[Any]:
        p = eqn.params
        test, fixed = p["cond_nconsts"], p["cond_nconsts"] + p["body_nconsts"]
        outs = self.loop(p["body_jaxpr"], ins[test:fixed], ins[fixed:], [])
        self.jaxpr(p["cond_jaxpr"], [*ins[:test], *outs])
        return outs

    def loop(self, body: Any, fixed: list[Any], carry: list[Any], xs: list[Any]) -> list[Any]:
        """Carries grow until an iteration adds nothing to them."""
        while True:
            outs = self.jaxpr(body, [*fixed, *carry, *xs])
            grown = [_join(pair) for pair in zip(carry, outs, strict=False)]
            if grown == [_join([c]) for c in carry]:
                return [*grown, *outs[len(carry) :]]
            carry = grown

    # --- kernels with mutable arrays -------------------------------------------------------

    def _pallas_call(self, eqn: Any, ins: list[Any]) -> list[Any]:
        invars = eqn.params["jaxpr"].invars
        operands = ins[len(ins) - min(len(ins), len(invars)) :]
        refs = [Reference(v) for v in operands]
        refs += [Reference(CONSTANT) for _ in invars[len(refs) :]]
        while True:  # one step of the grid may read what an earlier one wrote
            before = [r.value for r in refs]
            self.jaxpr(eqn.params["jaxpr"], refs)
            if before == [r.value for r in refs]:
                break
        return [r.value for r in refs[len(operands) : len(operands) + len(eqn.outvars)]]

    def _get(self, eqn: Any, ins: list[Any]) -> list[Any]:
        return [_join(ins[:1])]

    def _swap(self, eqn: Any, ins: list[Any]) -> list[Any]:
        before = _join(ins[:1])
        ins[0].value = _join(ins[:2])
        return [before] * len(eqn.outvars)

    _addupdate = _swap
