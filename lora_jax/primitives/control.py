"""Control flow that a weight enters: the body is interpreted, the construct stays what it was."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec

from lora_jax.primitives import jaxprs
from lora_jax.primitives.adapted_weight import AdaptedWeight, Ins, Named, Outs


def _inline(interpreter: Any, eqn: Any, ins: Ins) -> Outs:
    """A nested `jit`: its equations, as if written in place.

    A nested jit's output shardings, where it has any, are kept as constraints.
    """
    jaxpr, consts = jaxprs.called(eqn)
    outs = interpreter.evaluate(jaxpr, consts, ins)
    shardings = eqn.params.get("out_shardings", ())
    if not any(isinstance(s, jax.sharding.Sharding) for s in shardings):
        return outs
    return [
        lax.with_sharding_constraint(o, s) if isinstance(s, jax.sharding.Sharding) else o
        for o, s in zip(outs, shardings, strict=True)
    ]


def _custom_jvp(interpreter: Any, eqn: Any, ins: Ins) -> Outs:
    """A function with its own derivative rule keeps that rule.

    With W = w + s a b the tangent of W is `dw + s da b + s a db`, and the rule is linear in it:
    its equations are interpreted for the two low-rank weights (dw, da, b) and (0, a, db), and
    the two answers are added. Where the scale is data (a gain), it has a third part, (0, a, b)
    with the gain's tangent.
    """
    jaxpr, consts = jaxprs.called(eqn)
    for v in ins:
        if isinstance(v, AdaptedWeight):
            v.check_linear(f"{jaxprs.operand_name(eqn)} takes it")
    ins = _all_chosen(ins)

    @jax.custom_jvp
    def call(ins: Ins) -> list[Any]:
        return [interpreter.plain(eqn, o) for o in interpreter.evaluate(jaxpr, consts, ins)]

    @call.defjvp
    def derivative(primals: Any, tangents: Any) -> Any:
        (ins,), (tangent_ins,) = primals, tangents
        rule, rule_consts, floating = jaxprs.jvp_of(eqn)

        def push(tangents: Ins) -> list[Any]:
            outs = interpreter.evaluate(rule, rule_consts, [*ins, *tangents])
            return [interpreter.plain(eqn, o) for o in outs]

        pairs = [(ins[i], tangent_ins[i]) for i in floating]
        gains = any(isinstance(v, AdaptedWeight) and v.gain is not None for v in ins)
        outs = push([_along_a(*p) for p in pairs])
        n = len(outs) // 2
        total = outs[n:]
        for part in ("b", "gain") if gains else ("b",):
            more = push([_along(part, *p) for p in pairs])[n:]
            total = [x + y for x, y in zip(total, more, strict=True)]
        return outs[:n], total

    return call(ins)


def _all_chosen(ins: Ins) -> Ins:
    """Each weight with the one adapter that was chosen for it, which has no integer in it."""
    return [v.chosen() if isinstance(v, AdaptedWeight) else v for v in ins]


def _along_a(value: Any, tangent: Any) -> Any:
    """The part `dw + s da b` of a weight's tangent; all of any other tangent."""
    if not isinstance(value, AdaptedWeight):
        return tangent
    return dataclasses.replace(value, w=tangent.w, a=tangent.a)


def _along(part: str, value: Any, tangent: Any) -> Any:
    """The part of a weight's tangent that `b` or `gain` brings; nothing of any other tangent."""
    if not isinstance(value, AdaptedWeight):
        return jnp.zeros_like(tangent)
    w = Named(jnp.zeros_like(tangent.w.array), value.w.names)
    if part == "gain" and value.gain is None:
        b = Named(jnp.zeros_like(value.b.array), value.b.names)
        return dataclasses.replace(value, w=w, b=b)
    return dataclasses.replace(value, w=w, **{part: tangent.gain if part == "gain" else tangent.b})


def _remat(interpreter: Any, eqn: Any, ins: Ins) -> Outs:
    jaxpr, consts = jaxprs.called(eqn)

    def body(ins: Ins) -> list[Any]:
        return interpreter.evaluate(jaxpr, consts, ins)

    p = eqn.params
    return jax.checkpoint(body, prevent_cse=p["prevent_cse"], policy=p["policy"])(ins)


def _scan(interpreter: Any, eqn: Any, ins: Ins) -> Outs:
    """Stacked weights are sliced with their factors; constant ones are closed over."""
    n_consts, n_carry = jaxprs.scan_arity(eqn)
    jaxpr, consts = jaxprs.opened(eqn.params["jaxpr"])
    fixed, carry, xs = ins[:n_consts], ins[n_consts : n_consts + n_carry], ins[n_consts + n_carry :]
    loop = _Carry(interpreter, eqn, carry, jaxprs.invariant_carry(jaxpr, n_consts, n_carry))
    sliced = [_leading(interpreter, eqn, x) for x in xs]

    def body(moving: list[Any], xs: list[Any]) -> tuple[list[Any], list[Any]]:
        xs = [_slice_names(x) for x in xs]
        outs = interpreter.evaluate(jaxpr, consts, [*fixed, *loop.whole(moving), *xs])
        ys = [interpreter.plain(eqn, y) for y in outs[n_carry:]]
        return loop.moving(outs[:n_carry]), ys

    p = eqn.params
    moving, ys = lax.scan(
        body, loop.moving(carry), sliced,
        length=p["length"], reverse=p["reverse"], unroll=p["unroll"],
    )  # fmt: skip
    return [*loop.whole(moving), *ys]


def _leading(interpreter: Any, eqn: Any, x: Any) -> Any:
    """A weight with its scanned axis first in all three arrays; folded where that has no sense."""
    if not isinstance(x, AdaptedWeight):
        return x
    name = x.w.names[0]
    if not x.is_stack(name):
        return interpreter.plain(eqn, x)
    x = x.chosen()
    gain = x.gain
    if gain is not None and name not in gain.names:  # the same for every slice
        length = x.w.array.shape[0]
        array = jnp.broadcast_to(gain.array, (length, *gain.array.shape))
        gain = Named(array, (name, *gain.names))
    return dataclasses.replace(x, gain=gain).map(lambda n: n.to_front((name,)))


def _slice_names(x: Any) -> Any:
    """Inside the scan the arrays have lost their leading axis; so do the names."""
    if not isinstance(x, AdaptedWeight):
        return x
    return x.map(lambda n: Named(n.array, n.names[1:]))


def _while(interpreter: Any, eqn: Any, ins: Ins) -> Outs:
    n_cond, n_body = eqn.params["cond_nconsts"], eqn.params["body_nconsts"]
    cond, cond_consts = jaxprs.opened(eqn.params["cond_jaxpr"])
    jaxpr, consts = jaxprs.opened(eqn.params["body_jaxpr"])
    cond_fixed, fixed, carry = ins[:n_cond], ins[n_cond : n_cond + n_body], ins[n_cond + n_body :]
    loop = _Carry(interpreter, eqn, carry, jaxprs.invariant_carry(jaxpr, n_body, len(carry)))

    def test(moving: Sequence[Any]) -> Any:
        return interpreter.evaluate(cond, cond_consts, [*cond_fixed, *loop.whole(moving)])[0]

    def body(moving: Sequence[Any]) -> Sequence[Any]:
        return loop.moving(interpreter.evaluate(jaxpr, consts, [*fixed, *loop.whole(moving)]))

    return loop.whole(lax.while_loop(test, body, loop.moving(carry)))


class _Carry:
    """The carries of a loop, less the adapted weights that the body hands on unchanged."""

    def __init__(self, interpreter: Any, eqn: Any, carry: Ins, invariant: Sequence[bool]):
        self.interpreter, self.eqn = interpreter, eqn
        self.fixed = [
            v if keep and isinstance(v, AdaptedWeight) else None
            for v, keep in zip(carry, invariant, strict=True)
        ]

    def moving(self, values: Sequence[Any]) -> list[Any]:
        return [
            self.interpreter.plain(self.eqn, v)
            for v, fixed in zip(values, self.fixed, strict=True)
            if fixed is None
        ]

    def whole(self, moving: Sequence[Any]) -> list[Any]:
        rest = iter(moving)
        return [next(rest) if fixed is None else fixed for fixed in self.fixed]


def _cond(interpreter: Any, eqn: Any, ins: Ins) -> Outs:
    index, *operands = ins

    def branch(closed: Any) -> Callable[[Ins], list[Any]]:
        jaxpr, consts = jaxprs.opened(closed)
        return lambda ops: [
            interpreter.plain(eqn, o) for o in interpreter.evaluate(jaxpr, consts, ops)
        ]

    if isinstance(index, AdaptedWeight):
        return None
    return lax.switch(index, [branch(b) for b in eqn.params["branches"]], operands)


def _shard_map(interpreter: Any, eqn: Any, ins: Ins) -> Outs:
    """W, a and b go in as three operands; an axis of a or b is cut as the same axis of W is.

    The rank is whole on every device. Where a product contracts over an axis that is cut, x a is
    as partial as x W is, and being linear the update joins the same sum: the program's own `psum`
    of `x W + scale (x a) b` makes both whole.
    """
    form = jaxprs.shard_map_form(eqn)
    ins = _all_chosen(ins)
    in_specs = [
        _specs_of(v, spec) if isinstance(v, AdaptedWeight) else spec
        for v, spec in zip(ins, form.in_specs, strict=True)
    ]

    def body(ins: Ins) -> list[Any]:
        outs = interpreter.evaluate(form.jaxpr, form.consts, ins)
        return [interpreter.plain(eqn, o) for o in outs]

    return form.call(body, in_specs)(ins)


def _specs_of(v: AdaptedWeight, spec: PartitionSpec) -> AdaptedWeight:
    """The weight with PartitionSpecs in the place of its arrays."""
    entries = dict(zip(v.w.names, spec, strict=False))
    if any(v.is_input(name) and entries[name] for name in entries):
        v.check_linear("a shard_map cuts the axis that its product contracts")
    return v.map(lambda n: Named(PartitionSpec(*map(entries.get, n.names)), n.names))


RULES: dict[str, Callable[[Any, Any, Ins], Outs]] = {
    **{name: _inline for name in jaxprs.CALLS if name not in jaxprs.REMATS},
    **dict.fromkeys(jaxprs.REMATS, _remat),
    "custom_jvp_call": _custom_jvp,
    "scan": _scan,
    "while": _while,
    "cond": _cond,
    "shard_map": _shard_map,
    "optimization_barrier": lambda interpreter, eqn, ins: lax.optimization_barrier(ins),
}
