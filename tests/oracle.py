"""Find every kernel and output head of a traced function, without any code of lora_jax.

A kernel is a parameter of two axes or more that takes part in the weight side of a product. A
product is an equation that multiplies and sums: `dot_general`, `conv_general_dilated`,
`ragged_dot_general`, and a lookup of rows (`gather`, `dynamic_slice`), which is the product with
one-hot rows. The weight side is an operand computed from parameters and constants alone, in a
product whose other operand is computed from the function's arguments. An input that chooses among
values (indices, a predicate, the index of a `cond`) does not become a part of the chosen value.

A head is a kernel whose product feeds no other product of a parameter, and which is the last
product on every path to some output. Paths begin at arguments of floating dtype and end in
integers. A product ends all paths that reach it and begins a new one. Where paths meet, a path from
an argument that has passed no product counts only in a sum of equal shapes (a residual). Elsewhere
(a mask, the target of a loss) it does not count.

The walk is written from the documentation of JAX's primitives and shares no code with the package.
It follows dependence alone, so it also finds a kernel behind an operation that has no rule.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core

Way = frozenset[str]  # the parameters of the product or lookup that the path passed last
RAW: Way = frozenset()  # a path from an argument that has passed no product


class Value(NamedTuple):
    """The inputs of a value: parameters (by path), and whether it depends on arguments.

    ways: the last products on each path to it. spread: whether it has been broadcast.
    """

    params: frozenset[str] = frozenset()
    data: bool = False
    ways: frozenset[Way] = frozenset()
    spread: bool = False


@dataclasses.dataclass
class Reference:
    """A mutable array inside a kernel (Pallas), and the values written to it."""

    value: Value


class Found(NamedTuple):
    """Kernels with the names of their products, and the kernels that are output heads."""

    kernels: dict[str, set[str]]
    heads: set[str]


CONSTANT = Value()
PRODUCTS = {"dot_general": 2, "conv_general_dilated": 2, "ragged_dot_general": 2}
PICKS = {"gather": (0,), "dynamic_slice": (0,), "dynamic_update_slice": (0, 1)}
SUMS = ("add", "add_any")


def walk(f: Callable[..., Any], params: Any, *args: Any) -> Found:
    keyed = jax.tree_util.tree_leaves_with_path(params)
    paths = [jax.tree_util.keystr(key, simple=True, separator="/") for key, _ in keyed]
    matrices = {path for path, (_, x) in zip(paths, keyed, strict=True) if np.ndim(x) >= 2}
    leaves, tree = jax.tree.flatten(args)
    moving = [i for i, x in enumerate(leaves) if isinstance(x, jax.Array | np.ndarray)]

    def flat(arrays: Any, moved: Any) -> Any:
        whole = list(leaves)
        for i, x in zip(moving, moved, strict=True):
            whole[i] = x
        return f(jax.tree.unflatten(jax.tree.structure(params), arrays), *tree.unflatten(whole))

    moved = [leaves[i] for i in moving]
    closed = jax.make_jaxpr(flat)([x for _, x in keyed], moved)
    arguments = [_cut(Value(data=True, ways=frozenset((RAW,))), x) for x in moved]
    walker = _Walk()
    outs = walker.jaxpr(closed, [*(Value(frozenset((p,))) for p in paths), *arguments])
    last = {path for v in outs if len(v.ways) == 1 for path in next(iter(v.ways))}
    kernels = {path: names for path, names in walker.found.items() if path in matrices}
    return Found(kernels, last & set(kernels) - walker.fed)


def _cut(value: Value, x: Any) -> Value:
    floating = jnp.issubdtype(x.dtype, jnp.inexact)
    return value if floating else value._replace(ways=frozenset())


def _join(values: Sequence[Any], residual: bool = True) -> Value:
    values = [v.value if isinstance(v, Reference) else v for v in values]
    params = frozenset().union(*(v.params for v in values))
    ways = frozenset().union(*(v.ways for v in values))
    if not residual and len(ways) > 1:
        ways -= {RAW}
    moving = [v for v in values if v.data]
    return Value(params, bool(moving), ways, bool(moving) and all(v.spread for v in moving))


class _Walk:
    def __init__(self) -> None:
        self.found: dict[str, set[str]] = {}
        self.fed: set[str] = set()

    def jaxpr(self, jaxpr: Any, ins: Sequence[Any]) -> list[Any]:
        jaxpr = getattr(jaxpr, "jaxpr", jaxpr)
        env: dict[Any, Any] = dict.fromkeys(jaxpr.constvars, CONSTANT)
        env.update(zip(jaxpr.invars, ins, strict=True))

        def read(atom: Any) -> Any:
            return CONSTANT if isinstance(atom, core.Literal) else env[atom]

        for eqn in jaxpr.eqns:
            outs = self.equation(eqn, [read(v) for v in eqn.invars])
            for v, out in zip(eqn.outvars, outs, strict=True):
                plain = hasattr(v.aval, "dtype") and isinstance(out, Value)
                env[v] = _cut(out, v.aval) if plain else out
        return [read(v) for v in jaxpr.outvars]

    def equation(self, eqn: Any, ins: list[Any]) -> list[Any]:
        name, p = eqn.primitive.name, eqn.params
        enter = getattr(self, f"_{name}", None)
        if enter is not None:
            return enter(eqn, ins)
        if name in PRODUCTS:
            return [self.product(name, ins[: PRODUCTS[name]])]
        if name in PICKS:
            return [self.pick(eqn, ins)]
        inner = [p[k] for k in ("jaxpr", "call_jaxpr", "fun_jaxpr") if k in p]
        if inner and len(getattr(inner[0], "jaxpr", inner[0]).invars) == len(ins):
            return self.jaxpr(inner[0], ins)
        residual = name in SUMS and not any(v.spread for v in ins)
        return [_join(ins, residual)] * len(eqn.outvars)

    def product(self, name: str, operands: Sequence[Value]) -> Value:
        out = _join(operands, residual=False)
        weights = frozenset().union(*(v.params for v in operands if not v.data))
        if not out.data or not weights:
            return out
        for path in weights:
            self.found.setdefault(path, set()).add(name)
        self.fed |= frozenset().union(*out.ways)
        return Value(out.params, True, frozenset((weights,)))

    def pick(self, eqn: Any, ins: list[Any]) -> Value:
        """Handle a choice by indices: a lookup of rows gives data, one of matrices a weight."""
        name = eqn.primitive.name
        which = PICKS[name]
        value = _join([ins[i] for i in which])
        by_data = any(v.data for i, v in enumerate(ins) if i not in which)
        if not by_data or value.data or not value.params or len(which) == 2:
            return value
        kept = list(eqn.params["slice_sizes"])
        if name == "gather":
            dims = eqn.params["dimension_numbers"]
            gone = {*dims.collapsed_slice_dims, *dims.operand_batching_dims}
            kept = [n for i, n in enumerate(kept) if i not in gone]
        if sum(n > 1 for n in kept) >= 2:
            return value
        for path in value.params:
            self.found.setdefault(path, set()).add(name)
        looked_up = frozenset(f"rows of {path}" for path in value.params)
        return Value(value.params, True, frozenset((looked_up,)))

    def _broadcast_in_dim(self, eqn: Any, ins: list[Any]) -> list[Any]:
        grown = np.prod(eqn.invars[0].aval.shape) < np.prod(eqn.outvars[0].aval.shape)
        return [ins[0]._replace(spread=ins[0].spread or bool(grown))]

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
        carry, xs = ins[fixed : fixed + n], ins[fixed + n :]
        carry = self.settled(p["jaxpr"], ins[:fixed], carry, xs)
        return self.jaxpr(p["jaxpr"], [*ins[:fixed], *carry, *xs])

    def _while(self, eqn: Any, ins: list[Any]) -> list[Any]:
        p = eqn.params
        test, fixed = p["cond_nconsts"], p["cond_nconsts"] + p["body_nconsts"]
        outs = self.settled(p["body_jaxpr"], ins[test:fixed], ins[fixed:], [])
        self.jaxpr(p["cond_jaxpr"], [*ins[:test], *outs])
        return outs

    def settled(self, body: Any, fixed: list[Any], carry: list[Any], xs: list[Any]) -> list[Any]:
        """Return the carries of a loop, grown until one more iteration adds no input to them."""
        while True:
            outs = self.jaxpr(body, [*fixed, *carry, *xs])
            grown = [_join(pair) for pair in zip(carry, outs, strict=False)]
            if grown == carry:
                return grown
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
