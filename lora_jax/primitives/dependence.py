"""Which values of a traced call depend on which: output heads, and the weights of every product.

The roles of axes leave two questions open, both about "all-linear":

- Which parameter is an **output head**? Its product feeds no other parameter's product, and it is
  the last product on every path to some output. Paths start at arguments of a floating dtype and
  end in integers and predicates; a product ends all paths into it and starts a new one. A path
  from an argument that has passed no product counts, where it meets others, only in a sum of equal
  shapes: that is a residual, `h + down(h)`. Elsewhere it is a mask, or the target of a loss.
- Which parameters are **kernels** at all? Those from which an operand of some product is computed,
  alone or with other parameters, through any operations. So a kernel whose roles are unknown still
  has a name, and is reported rather than left out without a word.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp

from lora_jax.primitives import jaxprs

Paths = frozenset[str]
RAW: Paths = frozenset()  # the way from an argument, before any product
ROWS: Paths = frozenset(("\0rows",))  # the way from a lookup
# The number of operands of each product. An opaque call may multiply any of its operands.
PRODUCTS = {"dot_general": 2, "conv_general_dilated": 2, "ragged_dot_general": 2}
OPAQUE = ("pallas_call", "ffi_call", "custom_call", "pure_callback")


@dataclasses.dataclass(frozen=True)
class Flow:
    """The facts about one value of the program.

    weights: the parameters that it is computed from, if it is computed from parameters alone.
    moving: whether it depends on an argument that is not a parameter.
    ways: for each way to it, the parameters of the last product on that way.
    spread: whether all of its moving inputs have been broadcast.
    """

    weights: Paths = frozenset()
    moving: bool = False
    ways: frozenset[Paths] = frozenset()
    spread: bool = False


class Dependence:
    """A walk through a traced call; see the module docstring.

    heads: the output heads.
    kernels, tables: `{path: where}`, the first product of each kernel, and the first lookup of
      each embedding.
    partners: for each parameter, the parameters that it is multiplied with on the weight side of a
      product.
    fed: the parameters whose product feeds another parameter's product.
    """

    def __init__(self, traced: jaxprs.TracedCall) -> None:
        self.kernels: dict[str, str] = {}
        self.tables: dict[str, str] = {}
        self.partners: dict[str, Paths] = {}
        self.fed: Paths = RAW
        arguments = traced.jaxpr.invars[len(traced.param_paths) :]
        flows = [Flow(weights=frozenset((path,))) for path in traced.param_paths]
        flows += [_cut(Flow(moving=True, ways=frozenset((RAW,))), v.aval) for v in arguments]
        outs = self.walk(traced, flows)
        last = RAW.union(*(way for out in outs if len(out.ways) == 1 for way in out.ways))
        self.heads = (last - self.fed) & self.kernels.keys()

    def walk(self, closed: Any, flows: Sequence[Flow]) -> list[Flow]:
        jaxpr, _ = jaxprs.opened(closed)
        env = dict(zip(jaxpr.invars, flows, strict=True))

        def read(atom: Any) -> Flow:
            return Flow() if jaxprs.is_literal(atom) else env.get(atom, Flow())

        for eqn in jaxpr.eqns:
            outs = self.step(eqn, [read(v) for v in eqn.invars])
            for v, out in zip(eqn.outvars, outs, strict=True):
                env[v] = _cut(out, v.aval)
        return [read(v) for v in jaxpr.outvars]

    def step(self, eqn: Any, ins: list[Flow]) -> list[Flow]:
        name = eqn.primitive.name
        if name == "scan":
            return self._loop(eqn.params["jaxpr"], ins, *jaxprs.scan_arity(eqn))[1]
        if name == "while":
            n, fixed = eqn.params["cond_nconsts"], eqn.params["body_nconsts"]
            body, carries = eqn.params["body_jaxpr"], len(ins) - n - fixed
            carry = self._loop(body, ins[n:], fixed, carries)[0][fixed:]
            self.walk(eqn.params["cond_jaxpr"], [*ins[:n], *carry])
            return carry
        if name == "cond":
            branches = [self.walk(b, ins[1:]) for b in eqn.params["branches"]]
            return [_join(outs) for outs in zip(*branches, strict=True)]
        if name in jaxprs.BODIES:
            with jaxprs.origin(eqn):
                return self.walk(jaxprs.called(eqn), ins)
        if name in PRODUCTS or name in OPAQUE:
            return [self._product(eqn, ins[: PRODUCTS.get(name)])] * len(eqn.outvars)
        if name in ("gather", "dynamic_slice"):
            return [self._lookup(eqn, *ins)]
        if name == "select_n":
            return [_join(ins[1:])]
        if name == "broadcast_in_dim":
            grown = eqn.outvars[0].aval.size > eqn.invars[0].aval.size
            return [dataclasses.replace(ins[0], spread=ins[0].spread or grown)]
        residual = name in ("add", "add_any") and not any(f.spread for f in ins)
        return [_join(ins, residual)] * len(eqn.outvars)

    def _product(self, eqn: Any, ins: list[Flow]) -> Flow:
        out = _join(ins, residual=False)
        sides = [f.weights for f in ins if f.weights]
        for side in sides:
            others = RAW.union(*(other for other in sides if other is not side))
            for path in side if others else ():
                self.partners[path] = self.partners.get(path, RAW) | others
        if not sides or not out.moving:
            return out
        paths = RAW.union(*sides)
        for path in paths:
            self.kernels.setdefault(path, jaxprs.operand_name(eqn))
        self.fed = self.fed.union(*out.ways)
        return Flow(moving=True, ways=frozenset((paths,)))

    def _lookup(self, eqn: Any, table: Flow, *indices: Flow) -> Flow:
        """Treat rows picked by an argument as values, but matrices picked by one as weights."""
        sizes, dn = eqn.params["slice_sizes"], eqn.params.get("dimension_numbers")
        gone = () if dn is None else (*dn.collapsed_slice_dims, *dn.operand_batching_dims)
        kept = [n for i, n in enumerate(sizes) if n > 1 and i not in gone]
        if not table.weights or len(kept) > 1 or not any(f.moving for f in indices):
            return table
        for path in table.weights:
            self.tables.setdefault(path, jaxprs.operand_name(eqn))
        return Flow(moving=True, ways=frozenset((ROWS,)))

    def _loop(
        self, body: Any, ins: list[Flow], start: int, n: int
    ) -> tuple[list[Flow], list[Flow]]:
        """Return the inputs and outputs of a loop's body, which has `n` carries from `start` on.

        The carries hold everything that any iteration may bring: they grow until one more adds
        nothing.
        """
        while True:
            outs = self.walk(body, ins)
            carry = ins[start : start + n]
            grown = [_join(pair) for pair in zip(carry, outs, strict=False)]
            if grown == carry:
                return ins, outs
            ins = [*ins[:start], *grown, *ins[start + n :]]


def _cut(flow: Flow, aval: Any) -> Flow:
    """Drop the ways to a value whose dtype is not floating: an integer, a predicate or a key."""
    dtype = getattr(aval, "dtype", None)
    floating = dtype is not None and jnp.issubdtype(dtype, jnp.inexact)
    return flow if floating or not flow.ways else dataclasses.replace(flow, ways=frozenset())


def _join(flows: Sequence[Flow], residual: bool = True) -> Flow:
    """Return the flow of a value that is computed from all of these."""
    ways: frozenset[Paths] = frozenset().union(*(f.ways for f in flows))
    if not residual and len(ways) > 1:
        ways -= {RAW}
    moving = [f for f in flows if f.moving]
    weights = RAW if moving else RAW.union(*(f.weights for f in flows))
    return Flow(weights, bool(moving), ways, bool(moving) and all(f.spread for f in moving))
