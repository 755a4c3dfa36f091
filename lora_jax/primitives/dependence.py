"""What depends on what in a traced function: output heads, and the weight side of every product.

Two questions that the roles of axes do not answer, both of them about "all-linear":

- Which parameter is an **output head**? One whose product feeds no other parameter's product, and
  which every way to some output passes last. A residual way counts as a way: in `h + down(h)` the
  sum did not have to pass `down`.
- Which parameters are **kernels** at all? Those that some product's operand is computed from,
  alone or with other parameters, whatever operations lie between. A kernel that the roles do not
  know then has a name to be reported by, and is not left out without a word.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from lora_jax.primitives import jaxprs

NO_PATHS: frozenset[str] = frozenset()
MIXED = "\0mixed"
PRODUCTS = ("dot_general", "conv_general_dilated", "ragged_dot_general")


@dataclasses.dataclass(frozen=True)
class Flow:
    """What is known of a value.

    weights: the parameters that it is computed from, if from parameters alone.
    tail: None (no product yet), the parameter whose product all ways to this value passed last,
      or MIXED.
    past: the parameters whose products it depends on.
    moving: whether it depends on an argument that is no parameter.
    """

    weights: frozenset[str] = NO_PATHS
    tail: str | None = None
    past: frozenset[str] = NO_PATHS
    moving: bool = False


NOTHING = Flow()


@dataclasses.dataclass(frozen=True)
class Dependence:
    """heads: the output heads. kernels: `{path: where}`, the first product of each kernel."""

    heads: frozenset[str]
    kernels: dict[str, str]


def dependence(traced: jaxprs.TracedCall) -> Dependence:
    """Walk a traced call; see the module docstring."""
    walker = _Walker()
    n = len(traced.param_paths)
    flows = [Flow(weights=frozenset((path,))) for path in traced.param_paths]
    flows += [Flow(moving=True)] * (len(traced.jaxpr.invars) - n)
    outs = walker.walk(traced.jaxpr, flows)
    tails = {out.tail for out in outs} - {None, MIXED} - walker.fed
    return Dependence(frozenset(t for t in tails if t is not None), walker.kernels)


class _Walker:
    def __init__(self) -> None:
        self.fed: set[str] = set()  # parameters whose product feeds another parameter's
        self.kernels: dict[str, str] = {}

    def walk(self, jaxpr: Any, flows: Sequence[Flow]) -> list[Flow]:
        env = dict(zip(jaxpr.invars, flows, strict=True))

        def read(atom: Any) -> Flow:
            return NOTHING if jaxprs.is_literal(atom) else env.get(atom, NOTHING)

        for eqn in jaxpr.eqns:
            ins = [read(v) for v in eqn.invars]
            env.update(zip(eqn.outvars, self.step(eqn, ins), strict=True))
        return [read(v) for v in jaxpr.outvars]

    def step(self, eqn: Any, ins: list[Flow]) -> list[Flow]:
        name = eqn.primitive.name
        if name == "scan":
            return self._scan(eqn, ins)
        if name == "while":
            return self._while(eqn, ins)
        if name == "cond":
            branches = [self.walk(jaxprs.opened(b)[0], ins[1:]) for b in eqn.params["branches"]]
            return [_join([ins[0], *outs]) for outs in zip(*branches, strict=True)]
        if name == "shard_map":
            return self.walk(jaxprs.shard_map_form(eqn).jaxpr, ins)
        inner = jaxprs.inner(eqn)
        if inner is not None:
            return self.walk(inner, ins)
        if name in PRODUCTS or _is_opaque(eqn):
            return [self._product(eqn, ins)] * len(eqn.outvars)
        if name == "gather" and ins[0].weights and not ins[0].moving:
            table = dataclasses.replace(ins[0], weights=NO_PATHS) if ins[1].moving else ins[0]
            return [_join([table, ins[1]])]
        if name in ("add", "sub", "add_any"):
            return [_sum(eqn, ins)]
        return [_join(ins)] * len(eqn.outvars)

    def _product(self, eqn: Any, ins: list[Flow]) -> Flow:
        sides = [f for f in ins if f.weights]
        others = [f for f in ins if not f.weights]
        if not sides or not any(f.moving or f.past for f in others):
            return _join(ins)
        paths = frozenset().union(*(f.weights for f in sides))
        past = frozenset().union(*(f.past for f in others))
        for path in paths:
            self.kernels.setdefault(path, jaxprs.operand_name(eqn))
        self.fed |= past
        tail = next(iter(paths)) if len(paths) == 1 else MIXED
        return Flow(tail=tail, past=past | paths, moving=True)

    def _scan(self, eqn: Any, ins: list[Flow]) -> list[Flow]:
        n_consts, n_carry = jaxprs.scan_arity(eqn)
        jaxpr, _ = jaxprs.opened(eqn.params["jaxpr"])
        consts, xs = ins[:n_consts], ins[n_consts + n_carry :]
        carry = ins[n_consts : n_consts + n_carry]
        while True:
            outs = self.walk(jaxpr, [*consts, *carry, *xs])
            settled = [_join([old, new]) for old, new in zip(carry, outs, strict=False)]
            if settled == carry:
                return outs[:n_carry] + outs[n_carry:]
            carry = settled

    def _while(self, eqn: Any, ins: list[Flow]) -> list[Flow]:
        nc, nb = eqn.params["cond_nconsts"], eqn.params["body_nconsts"]
        jaxpr, _ = jaxprs.opened(eqn.params["body_jaxpr"])
        cond, _ = jaxprs.opened(eqn.params["cond_jaxpr"])
        carry = ins[nc + nb :]
        while True:
            outs = self.walk(jaxpr, [*ins[nc : nc + nb], *carry])
            settled = [_join([old, new]) for old, new in zip(carry, outs, strict=True)]
            if settled == carry:
                break
            carry = settled
        self.walk(cond, [*ins[:nc], *carry])
        return carry


def _is_opaque(eqn: Any) -> bool:
    """Whether it is a kernel of which nothing is known."""
    return eqn.primitive.name in ("pallas_call", "ffi_call", "custom_call", "pure_callback")


def _join(flows: Sequence[Flow]) -> Flow:
    """The flow of a value computed from all of these."""
    moving = any(f.moving for f in flows)
    past = NO_PATHS.union(*(f.past for f in flows))
    tails = {f.tail for f in flows if f.tail is not None}
    tail = None if not tails else tails.pop() if len(tails) == 1 else MIXED
    plain = moving or past
    weights = NO_PATHS if plain else NO_PATHS.union(*(f.weights for f in flows))
    return Flow(weights, tail, past, moving)


def _sum(eqn: Any, ins: list[Flow]) -> Flow:
    """A sum, of which one part may be a way that passed no product: a residual way."""
    out = _join(ins)
    shapes = [getattr(v.aval, "shape", ()) for v in eqn.invars]
    floats = all(jaxprs.is_float(v.aval.dtype) for v in eqn.invars)
    residual = any(f.moving and f.tail is None for f in ins) and shapes[0] == shapes[1] != ()
    if floats and residual and out.tail is not None:
        return dataclasses.replace(out, tail=MIXED)
    return out
