"""Control flow that a weight enters: the body is interpreted, the construct stays what it was."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec

from lora_jax.bases.held import Deferred, Dense
from lora_jax.named import Ins, Named, Outs
from lora_jax.primitives import jaxprs
from lora_jax.primitives.adapted_weight import AdaptedWeight


def _inline(evaluator: Any, eqn: Any, ins: Ins) -> Outs:
    """A nested `jit`: its equations, as if written in place.

    A nested jit's output shardings, where it has any, are kept as constraints.
    """
    jaxpr, consts = jaxprs.called(eqn)
    outs = evaluator.evaluate(jaxpr, consts, ins)
    shardings = eqn.params.get("out_shardings", ())
    if not any(isinstance(s, jax.sharding.Sharding) for s in shardings):
        return outs
    return [
        lax.with_sharding_constraint(o, s) if isinstance(s, jax.sharding.Sharding) else o
        for o, s in zip(outs, shardings, strict=True)
    ]


def _custom_jvp(evaluator: Any, eqn: Any, ins: Ins) -> Outs:
    """A function with its own derivative rule keeps that rule.

    With W = w + s a b the tangent of W is `dw + s da b + s a db`, and the rule is linear in it:
    its equations are interpreted for the weights (dw, da, b) and (0, a, db), and the answers are
    added. Every update says of which such weights its derivative is the sum.
    """
    jaxpr, consts = jaxprs.called(eqn)
    for v in ins:
        if isinstance(v, AdaptedWeight):
            v.check_linear(f"{jaxprs.operand_name(eqn)} takes it")
    ins = _all_chosen(ins)
    # Its equations and those of its rule are evaluated several times, and mean one use of W.
    use = max((evaluator.next_use(v.path) for v in ins if isinstance(v, AdaptedWeight)), default=0)

    def evaluate(jaxpr: Any, consts: Any, ins: Ins) -> list[Any]:
        with evaluator.one_use(use):
            return [evaluator.plain(eqn, o) for o in evaluator.evaluate(jaxpr, consts, ins)]

    @jax.custom_jvp
    def call(ins: Ins) -> list[Any]:
        return evaluate(jaxpr, consts, ins)

    @call.defjvp
    def derivative(primals: Any, tangents: Any) -> Any:
        (ins,), (tangent_ins,) = primals, tangents
        rule, rule_consts, floating = jaxprs.jvp_of(eqn)

        def push(tangents: Ins) -> tuple[list[Any], list[Any]]:
            outs = evaluate(rule, rule_consts, [*ins, *tangents])
            return outs[: len(outs) // 2], outs[len(outs) // 2 :]

        outs, total = None, None
        for part in _parts([ins[i] for i in floating], [tangent_ins[i] for i in floating]):
            outs, moved = push(part)
            total = moved if total is None else list(map(_sum, total, moved))
        return outs, total

    return call(ins)


def _parts(ins: Ins, tangents: Ins) -> list[Ins]:
    """The tangents as a sum: in the k-th part each weight has the k-th part of its derivative."""
    split = [
        v.derivatives(t) if isinstance(v, AdaptedWeight) else [t]
        for v, t in zip(ins, tangents, strict=True)
    ]
    nothing = [jax.tree.map(jnp.zeros_like, parts[0]) for parts in split]
    return [
        [parts[k] if k < len(parts) else none for parts, none in zip(split, nothing, strict=True)]
        for k in range(max(map(len, split)))
    ]


def _sum(x: Any, y: Any) -> Any:
    """The sum of two tangents; that of an integer has no value to be added."""
    return x if x.dtype == jax.dtypes.float0 else x + y


def _all_chosen(ins: Ins) -> Ins:
    """Each weight with the one adapter that was chosen for it, which has no integer in it."""
    return [v.chosen() if isinstance(v, AdaptedWeight) else v for v in ins]


def _remat(evaluator: Any, eqn: Any, ins: Ins) -> Outs:
    jaxpr, consts = jaxprs.called(eqn)

    def body(ins: Ins) -> list[Any]:
        return evaluator.evaluate(jaxpr, consts, ins)

    p = eqn.params
    outs = jax.checkpoint(body, prevent_cse=p["prevent_cse"], policy=p["policy"])(ins)
    same = zip(outs, jaxprs.forwarded(jaxpr), strict=True)
    return [ins[i] if i is not None and isinstance(out, AdaptedWeight) else out for out, i in same]


def _scan(evaluator: Any, eqn: Any, ins: Ins) -> Outs:
    """Stacked weights are sliced with their factors; constant ones are closed over."""
    n_consts, n_carry = jaxprs.scan_arity(eqn)
    jaxpr, consts = jaxprs.opened(eqn.params["jaxpr"])
    fixed, carry, xs = ins[:n_consts], ins[n_consts : n_consts + n_carry], ins[n_consts + n_carry :]
    loop = _Carry(evaluator, eqn, carry, jaxprs.invariant_carry(jaxpr, n_consts, n_carry))
    leading = [_leading(evaluator, eqn, x) for x in xs]
    sliced, whole = zip(*leading, strict=True) if xs else ((), ())
    same = jaxprs.forwarded(jaxpr)[n_carry:]  # these are the stacks themselves
    stacks = [None] * (n_consts + n_carry) + [
        x if isinstance(x, AdaptedWeight) else None for x in xs
    ]
    given = [None if i is None else stacks[i] for i in same]

    def body(moving: list[Any], xs: list[Any]) -> tuple[list[Any], list[Any]]:
        xs = list(map(_sliced, xs, whole))
        outs = evaluator.evaluate(jaxpr, consts, [*fixed, *loop.whole(moving), *xs])
        rest = zip(outs[n_carry:], given, strict=True)
        ys = [evaluator.plain(eqn, y) if stack is None else None for y, stack in rest]
        return loop.moving(outs[:n_carry]), ys

    p = eqn.params
    moving, ys = lax.scan(
        body, loop.moving(carry), list(sliced),
        length=p["length"], reverse=p["reverse"], unroll=p["unroll"],
    )  # fmt: skip
    ys = [y if stack is None else stack for y, stack in zip(ys, given, strict=True)]
    return [*loop.whole(moving), *ys]


def _leading(evaluator: Any, eqn: Any, x: Any) -> tuple[Any, list[Named | None]]:
    """A weight as a scan slices it, and those of its arrays that have no scanned axis.

    The latter are the same for all slices: they are closed over, and an empty array is scanned.
    """
    if not isinstance(x, AdaptedWeight):
        return x, []
    x, whole = x.chosen(), []
    name, length = x.names[0], x.shape[0]

    def first(n: Named) -> Named:
        whole.append(None if name in n.names else n)
        return n.to_front((name,)) if name in n.names else Named(jnp.zeros((length, 0)), (name,))

    if isinstance(x.held, Deferred) and name not in x.held.leading(x.names):
        x = _dense(evaluator, eqn, x)
    return dataclasses.replace(x, update=x.update.map(first)), whole


def _sliced(x: Any, whole: list[Named | None]) -> Any:
    """Inside the scan the arrays have lost their leading axis; so do the names."""
    if not isinstance(x, AdaptedWeight):
        return x
    arrays = iter(whole)

    def one(n: Named) -> Named:
        same = next(arrays)
        return Named(n.array, n.names[1:]) if same is None else same

    update = x.update.map(one).lost(x.names[:1], "taken")
    return dataclasses.replace(x, names=x.names[1:], update=update)


def _while(evaluator: Any, eqn: Any, ins: Ins) -> Outs:
    n_cond, n_body = eqn.params["cond_nconsts"], eqn.params["body_nconsts"]
    cond, cond_consts = jaxprs.opened(eqn.params["cond_jaxpr"])
    jaxpr, consts = jaxprs.opened(eqn.params["body_jaxpr"])
    cond_fixed, fixed, carry = ins[:n_cond], ins[n_cond : n_cond + n_body], ins[n_cond + n_body :]
    loop = _Carry(evaluator, eqn, carry, jaxprs.invariant_carry(jaxpr, n_body, len(carry)))

    def test(moving: Sequence[Any]) -> Any:
        return evaluator.evaluate(cond, cond_consts, [*cond_fixed, *loop.whole(moving)])[0]

    def body(moving: Sequence[Any]) -> Sequence[Any]:
        return loop.moving(evaluator.evaluate(jaxpr, consts, [*fixed, *loop.whole(moving)]))

    return loop.whole(lax.while_loop(test, body, loop.moving(carry)))


class _Carry:
    """The carries of a loop, less the adapted weights that the body hands on unchanged."""

    def __init__(self, evaluator: Any, eqn: Any, carry: Ins, invariant: Sequence[bool]):
        self.evaluator, self.eqn = evaluator, eqn
        self.fixed = [
            v if keep and isinstance(v, AdaptedWeight) else None
            for v, keep in zip(carry, invariant, strict=True)
        ]

    def moving(self, values: Sequence[Any]) -> list[Any]:
        return [
            self.evaluator.plain(self.eqn, v)
            for v, fixed in zip(values, self.fixed, strict=True)
            if fixed is None
        ]

    def whole(self, moving: Sequence[Any]) -> list[Any]:
        rest = iter(moving)
        return [next(rest) if fixed is None else fixed for fixed in self.fixed]


def _cond(evaluator: Any, eqn: Any, ins: Ins) -> Outs:
    index, *operands = ins
    branches, platforms = eqn.params["branches"], eqn.params.get("branches_platforms")

    def branch(closed: Any) -> Callable[[Ins], list[Any]]:
        jaxpr, consts = jaxprs.opened(closed)
        return lambda ops: [evaluator.plain(eqn, o) for o in evaluator.evaluate(jaxpr, consts, ops)]

    if isinstance(index, AdaptedWeight):
        return None
    if not platforms:
        return lax.switch(index, list(map(branch, branches)), operands)
    of: dict[str, Any] = {}
    for closed, names in zip(branches, platforms, strict=True):
        of.update(dict.fromkeys(names or ("default",), branch(closed)))
    return lax.platform_dependent(operands, **of)


def _shard_map(evaluator: Any, eqn: Any, ins: Ins) -> Outs:
    """W, a and b go in as three operands; an axis of a or b is cut as the same axis of W is.

    The rank is whole on every device. Where a product contracts over an axis that is cut, x a is
    as partial as x W is, and being linear the update joins the same sum: the program's own `psum`
    of `x W + scale (x a) b` makes both whole.
    """
    form = jaxprs.shard_map_form(eqn)
    ins = _all_chosen(ins)
    ins = [_dense(evaluator, eqn, v) if isinstance(v, AdaptedWeight) else v for v in ins]
    in_specs = [
        _specs_of(v, spec) if isinstance(v, AdaptedWeight) else spec
        for v, spec in zip(ins, form.in_specs, strict=True)
    ]

    def body(ins: Ins) -> list[Any]:
        outs = evaluator.evaluate(form.jaxpr, form.consts, ins)
        return [evaluator.plain(eqn, o) for o in outs]

    return form.call(body, in_specs)(ins)


def _dense(evaluator: Any, eqn: Any, v: AdaptedWeight) -> AdaptedWeight:
    """The weight as an array, which can be cut anywhere."""
    evaluator.dequantise(eqn, v)
    return dataclasses.replace(v, held=Dense(v.held.dense()))


def _specs_of(v: AdaptedWeight, spec: PartitionSpec) -> AdaptedWeight:
    """The weight with PartitionSpecs in the place of its arrays."""
    entries = dict(zip(v.names, spec, strict=False))
    if any(v.update.role(name) == "input" and entries[name] for name in entries):
        v.check_linear("a shard_map cuts the axis that its product contracts")

    def spec_of(n: Named) -> Named:
        return Named(PartitionSpec(*map(entries.get, n.names)), n.names)

    return dataclasses.replace(v, held=Dense(spec), update=v.update.map(spec_of))


def _custom_vjp(evaluator: Any, eqn: Any, ins: Ins) -> Outs:
    """A function with its own gradient rule: only a rule registered for it by name applies."""
    rule = FUNCTIONS.get(jaxprs.function_name(eqn))
    return evaluator.opaque(eqn, ins) if rule is None else rule(evaluator, eqn, ins)


FUNCTIONS: dict[str, Callable[[Any, Any, Ins], Outs]] = {}  # see `table.register`


RULES: dict[str, Callable[[Any, Any, Ins], Outs]] = {
    **{name: _inline for name in jaxprs.CALLS if name not in jaxprs.REMATS},
    **dict.fromkeys(jaxprs.REMATS, _remat),
    "custom_jvp_call": _custom_jvp,
    "custom_vjp_call": _custom_vjp,
    "scan": _scan,
    "while": _while,
    "cond": _cond,
    "shard_map": _shard_map,
    "optimization_barrier": lambda evaluator, eqn, ins: lax.optimization_barrier(ins),
}
