"""Control flow with weights inside: the body is interpreted, and the construct stays the same."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec

from lora_jax.bases.weight import Deferred, Dense
from lora_jax.primitives import jaxprs
from lora_jax.primitives.adapted_weight import AdaptedWeight, Ins, Outs, Value
from lora_jax.primitives.evaluator import Evaluator, Primitive, Primitives
from lora_jax.primitives.jaxprs import Eqn, Program
from lora_jax.updates.named import Named


def _inline(evaluator: Evaluator, eqn: Eqn, ins: Ins) -> Outs:
    """Run a nested `jit` in place, with its output shardings as constraints."""
    outs = evaluator.evaluate(jaxprs.called(eqn), ins)
    shardings = eqn.params.get("out_shardings") or [None] * len(outs)
    return [
        lax.with_sharding_constraint(o, s) if isinstance(s, jax.sharding.Sharding) else o
        for o, s in zip(outs, shardings, strict=True)
    ]


def _custom_jvp(evaluator: Evaluator, eqn: Eqn, ins: Ins) -> Outs:
    """Keep the derivative rule of a function that has its own.

    With W = w + s a b, the tangent of W is `dw + s da b + s a db`, and the rule is linear in it.
    So its equations are interpreted for the weights (dw, da, b) and (0, a, db), and the results are
    added. `Update.tangents` gives the weights whose sum the derivative is.
    """
    for v in ins:
        if isinstance(v, AdaptedWeight):
            v.check_needs_no_input(f"{jaxprs.operand_name(eqn)} takes it")
    ins = _all_selected(ins)
    # Its equations and its rule's are evaluated several times, but count as one use of W.
    use = max((evaluator.next_use(v.path) for v in ins if isinstance(v, AdaptedWeight)), default=0)

    def evaluate(jaxpr: Program, ins: Ins) -> Ins:
        with evaluator.one_use(use):
            return [evaluator.leave(eqn, o) for o in evaluator.evaluate(jaxpr, ins)]

    @jax.custom_jvp
    def call(ins: Ins) -> list[Any]:
        return evaluate(jaxprs.called(eqn), ins)

    @call.defjvp
    def derivative(primals: Ins, tangents: Ins) -> tuple[Ins, Ins]:
        (ins,), (tangent_ins,) = primals, tangents
        rule, floating = jaxprs.jvp_of(eqn)
        parts = _parts([ins[i] for i in floating], [tangent_ins[i] for i in floating])
        results = [evaluate(rule, [*ins, *part]) for part in parts]
        n = len(results[0]) // 2  # the outputs, and then their tangents
        return results[0][:n], [_sum(each) for each in zip(*(r[n:] for r in results), strict=True)]

    return call(ins)


def _parts(ins: Ins, tangents: Ins) -> list[Ins]:
    """Split the tangents into a sum; part k has the k-th part of each weight's derivative."""
    split = [
        v.tangents(t) if isinstance(v, AdaptedWeight) else [t]
        for v, t in zip(ins, tangents, strict=True)
    ]
    nothing = [jax.tree.map(jnp.zeros_like, parts[0]) for parts in split]
    return [
        [parts[k] if k < len(parts) else none for parts, none in zip(split, nothing, strict=True)]
        for k in range(max(map(len, split)))
    ]


def _sum(tangents: Sequence[jax.Array]) -> jax.Array:
    """Return the sum of the tangents; an integer's tangent (float0) cannot be added."""
    return tangents[0] if tangents[0].dtype == jax.dtypes.float0 else sum(tangents[1:], tangents[0])


def _all_selected(ins: Ins) -> Ins:
    """Return each weight with its selected adapter, so that it holds no integer."""
    return [v.selected() if isinstance(v, AdaptedWeight) else v for v in ins]


def _remat(evaluator: Evaluator, eqn: Eqn, ins: Ins) -> Outs:
    p, jaxpr = eqn.params, jaxprs.called(eqn)
    body = functools.partial(evaluator.evaluate, jaxpr)
    outs = jax.checkpoint(body, prevent_cse=p["prevent_cse"], policy=p["policy"])(ins)
    same = zip(outs, jaxprs.sources(jaxpr, PASSING), strict=True)
    return [ins[i] if i is not None and isinstance(out, AdaptedWeight) else out for out, i in same]


def _scan(evaluator: Evaluator, eqn: Eqn, ins: Ins) -> Outs:
    """Slice stacked weights together with their factors, and close over constant ones."""
    n_consts, n_carry = jaxprs.scan_arity(eqn)
    jaxpr = eqn.params["jaxpr"]
    fixed, carry, xs = ins[:n_consts], ins[n_consts : n_consts + n_carry], ins[n_consts + n_carry :]
    same = jaxprs.sources(jaxpr, PASSING)
    moving, whole = _carried(evaluator, eqn, carry, same, n_consts)
    stacks: dict[Any, Any] = {
        i: x for i, x in enumerate(xs, n_consts + n_carry) if isinstance(x, AdaptedWeight)
    }
    given = [stacks.get(i) for i in same[n_carry:]]  # returned unchanged
    sliced = [_sliced(evaluator, eqn, x) for x in xs]

    def body(carry: list[Any], parts: list[Any]) -> tuple[list[Any], list[Any]]:
        xs = [of_part(part) for (_, of_part), part in zip(sliced, parts, strict=True)]
        outs = evaluator.evaluate(jaxpr, [*fixed, *whole(carry), *xs])
        ys = zip(outs[n_carry:], given, strict=True)
        return moving(outs[:n_carry]), [None if s else evaluator.leave(eqn, y) for y, s in ys]

    p = eqn.params
    carry, ys = evaluator.scan(
        body, moving(carry), [parts for parts, _ in sliced],
        length=p["length"], reverse=p["reverse"], unroll=p["unroll"],
    )  # fmt: skip
    return [*whole(carry), *(s or y for y, s in zip(ys, given, strict=True))]


def _sliced(evaluator: Evaluator, eqn: Eqn, x: Value) -> tuple[Any, Callable[[Any], Any]]:
    """Return the arrays of an operand that a scan slices, and a function from slices to its slice.

    Arrays of a weight without the scanned axis are the same for all slices: they are closed over.
    """
    if not isinstance(x, AdaptedWeight):
        return x, lambda part: part
    x, name = x.selected(), x.names[0]
    if isinstance(x.weight, Deferred) and name not in x.weight.leading(x.names):
        x = _dense(evaluator, eqn, x)
    arrays, tree = jax.tree.flatten(x.update, is_leaf=lambda n: isinstance(n, Named))
    moving = [n.to_front((name,)) if name in n.names else None for n in arrays]

    def of_part(part: Any) -> AdaptedWeight:
        weight, slices = part
        pairs = zip(arrays, slices, strict=True)
        every = [n if one is None else Named(one.array, one.names[1:]) for n, one in pairs]
        update = jax.tree.unflatten(tree, every)
        part = dataclasses.replace(x, weight=weight, names=x.names[1:], update=update)
        return evaluator.lost(part, (name,), "taken")

    return (x.weight, moving), of_part


def _while(evaluator: Evaluator, eqn: Eqn, ins: Ins) -> Outs:
    n_cond, n_body = eqn.params["cond_nconsts"], eqn.params["body_nconsts"]
    cond, jaxpr = eqn.params["cond_jaxpr"], eqn.params["body_jaxpr"]
    cond_fixed, fixed, carry = ins[:n_cond], ins[n_cond : n_cond + n_body], ins[n_cond + n_body :]
    same = jaxprs.sources(jaxpr, PASSING)
    moving, whole = _carried(evaluator, eqn, carry, same, n_body)

    def test(carry: Sequence[Any]) -> Any:
        return evaluator.evaluate(cond, [*cond_fixed, *whole(carry)])[0]

    def body(carry: Sequence[Any]) -> Sequence[Any]:
        return moving(evaluator.evaluate(jaxpr, [*fixed, *whole(carry)]))

    return whole(evaluator.while_loop(test, body, moving(carry)))


def _carried(
    evaluator: Evaluator, eqn: Eqn, carry: Ins, passed: Sequence[int | None], start: int
) -> tuple[Any, Any]:
    """Return two functions: from all carries of a loop to the moving ones, and back.

    The carries start at `start`. The carries that do not move are adapted weights that the body
    passes on unchanged (`passed`, from `jaxprs.sources`).
    """
    same = [i == start + j for j, i in enumerate(passed[: len(carry)])]
    pairs = zip(carry, same, strict=True)
    fixed = [v if keep and isinstance(v, AdaptedWeight) else None for v, keep in pairs]

    def moving(values: Sequence[Any]) -> list[Any]:
        pairs = zip(values, fixed, strict=True)
        return [evaluator.leave(eqn, v) for v, weight in pairs if weight is None]

    def whole(moving: Sequence[Any]) -> list[Any]:
        rest = iter(moving)
        return [next(rest) if weight is None else weight for weight in fixed]

    return moving, whole


def _cond(evaluator: Evaluator, eqn: Eqn, ins: Ins) -> Outs:
    index, *operands = ins
    branches, platforms = eqn.params["branches"], eqn.params.get("branches_platforms")

    def branch(closed: Program) -> Callable[[Ins], Ins]:
        return lambda ops: [evaluator.leave(eqn, o) for o in evaluator.evaluate(closed, ops)]

    def choose(branches: Sequence[Callable[[Ins], Ins]], operands: Ins) -> Ins:
        if not platforms:
            return lax.switch(evaluator.plain(eqn, index), branches, operands)
        of: dict[str, Any] = {}
        for run, names in zip(branches, platforms, strict=True):
            of.update(dict.fromkeys(names or ("default",), run))
        return lax.platform_dependent(operands, **of)

    return evaluator.branch(choose, list(map(branch, branches)), operands)


def _shard_map(evaluator: Evaluator, eqn: Eqn, ins: Ins) -> Outs:
    """Pass W, a and b in as three operands; an axis of a or b is sharded like that axis of W.

    Each device has the whole rank. If a product contracts over a sharded axis, x a is a partial sum
    just as x W is, and the update is linear. So the program's own `psum` of `x W + scale (x a) b`
    completes both.
    """
    ins = _all_selected(ins)
    ins = [_dense(evaluator, eqn, v) if isinstance(v, AdaptedWeight) else v for v in ins]
    in_specs = [
        _specs_of(v, spec) if isinstance(v, AdaptedWeight) else spec
        for v, spec in zip(ins, eqn.params["in_specs"], strict=True)
    ]

    def body(ins: Ins) -> list[Any]:
        return [evaluator.leave(eqn, o) for o in evaluator.evaluate(jaxprs.called(eqn), ins)]

    return jaxprs.shard_map(eqn, body, in_specs)(ins)


def _dense(evaluator: Evaluator, eqn: Eqn, v: AdaptedWeight) -> AdaptedWeight:
    """Return the weight as an array, which can be sliced anywhere."""
    evaluator.dequantise(eqn, v)
    return dataclasses.replace(v, weight=Dense(v.weight.dense()))


def _specs_of(v: AdaptedWeight, spec: PartitionSpec) -> AdaptedWeight:
    """Return the weight with PartitionSpecs in place of its arrays."""
    entries = dict(zip(v.names, spec, strict=False))
    if any(v.update.role(name) == "input" and entries[name] for name in entries):
        v.check_needs_no_input("a shard_map cuts the axis that its product contracts")

    def spec_of(n: Named) -> Named:
        return Named(PartitionSpec(*map(entries.get, n.names)), n.names)

    return dataclasses.replace(v, weight=Dense(spec), update=v.update.map(spec_of))


def _custom_vjp(evaluator: Evaluator, eqn: Eqn, ins: Ins) -> Outs:
    """Refuse a function with its own gradient rule, unless there is a rule by its name."""
    return list(evaluator.opaque(eqn, ins))


CALLS = ("jit", "pjit", "closed_call", "core_call")
REMATS = ("remat", "remat2", "checkpoint")
PASSING = (*CALLS, *REMATS)  # they may return an input unchanged
PRIMITIVES: Primitives = {
    **dict.fromkeys(CALLS, Primitive(_inline, body=True, view=True)),
    **dict.fromkeys(REMATS, Primitive(_remat, body=True, view=True)),
    "custom_jvp_call": Primitive(_custom_jvp, body=True, view=True),
    "custom_vjp_call": Primitive(_custom_vjp, body=True),
    "scan": Primitive(_scan, body=True),
    "while": Primitive(_while, body=True),
    "cond": Primitive(_cond, body=True),
    "shard_map": Primitive(_shard_map, body=True),
}
