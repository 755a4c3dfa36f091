"""Operations that rearrange a weight: every array that has the axis is treated in the same way."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from lora_jax.primitives import jaxprs
from lora_jax.primitives.adapted_weight import AdaptedWeight, Ins, Outs, Value
from lora_jax.primitives.evaluator import Evaluator, Primitive, PrimitiveRule, Primitives
from lora_jax.primitives.jaxprs import Eqn, reshape_groups
from lora_jax.updates.named import Named, without

Changed = AdaptedWeight | list[Value] | None  # None: the rule does not apply
Change = Callable[[Evaluator, Eqn, AdaptedWeight], Changed]


def of_one(change: Change) -> PrimitiveRule:
    """Return the rule of an operation whose only input is one weight.

    Args:
      change: `change(evaluator, eqn, weight)` returns a weight, several, or None.
    """

    def rule(evaluator: Evaluator, eqn: Eqn, ins: Ins) -> Outs:
        out = change(evaluator, eqn, ins[0])
        return out if out is None or isinstance(out, list) else [out]

    return rule


def _on_w(evaluator: Evaluator, eqn: Eqn, v: AdaptedWeight) -> Changed:
    """Apply a cast, copy or sharding constraint to W only: factors keep dtype and placement."""
    if not jaxprs.is_float(eqn.outvars[0].aval.dtype):
        return None
    return v.map_w(lambda n: Named(jaxprs.binder(eqn)(n.array), n.names))


def _on_all(evaluator: Evaluator, eqn: Eqn, v: AdaptedWeight) -> Changed:
    """Apply `stop_gradient` or `name` to W and its update alike, as to the merged weight."""
    return v.map(lambda n: Named(jaxprs.binder(eqn)(n.array), n.names))


def _mul(evaluator: Evaluator, eqn: Eqn, ins: Ins) -> Outs:
    """Return `factor * W` from either side. Products of two weights are not handled."""
    side = 0 if isinstance(ins[0], AdaptedWeight) else 1
    v, factor = ins[side], ins[1 - side]
    divides = eqn.primitive.name == "div"
    if isinstance(factor, AdaptedWeight) or (divides and side == 1):
        return None
    factor = evaluator.compact(eqn, 1 - side, factor)
    out = _times(v, 1.0 / factor if divides else factor)
    return None if out is None else [out]


def _times(v: AdaptedWeight, factor: jax.Array) -> AdaptedWeight | None:
    """Return `factor * W`, where the factor is a scalar or has size 1 along some of W's axes."""
    update = v.update.times(Named(factor, v.names if jnp.ndim(factor) else ()))
    if update is None:
        return None
    moved = v.map_w(lambda n, f: Named(n.array * jnp.asarray(f, n.array.dtype), n.names), factor)
    return dataclasses.replace(moved, update=update)


def _transpose(evaluator: Evaluator, eqn: Eqn, v: AdaptedWeight) -> Changed:
    order = v.names_at(eqn.params["permutation"])
    return v.map_w(lambda n: n.moved(order))


def _along(v: AdaptedWeight, change: dict[int, Any], *operands: jax.Array) -> AdaptedWeight:
    """Change each axis that `change` names, in each array that has it.

    `change[name](x, axis, *operands)` returns the changed array.
    """

    def one(n: Named, *operands: jax.Array) -> Named:
        for axis, name in enumerate(n.names):
            if name in change:
                n = Named(change[name](n.array, axis, *operands), n.names)
        return n

    return v.map(one, *operands, along=tuple(change))


def _rev(evaluator: Evaluator, eqn: Eqn, v: AdaptedWeight) -> Changed:
    names = v.names_at(eqn.params["dimensions"])
    return _along(v, dict.fromkeys(names, lambda x, axis: lax.rev(x, (axis,))))


def _cut(start: int, stop: int, stride: int = 1) -> Callable[[Any, int], Any]:
    return lambda x, axis: lax.slice_in_dim(x, start, stop, stride, axis)


def _slice(evaluator: Evaluator, eqn: Eqn, v: AdaptedWeight) -> Changed:
    p = eqn.params
    strides = p["strides"] or (1,) * len(v.shape)
    cuts = zip(p["start_indices"], p["limit_indices"], strides, strict=True)
    every = zip(v.names, v.shape, cuts, strict=True)
    return _along(v, {name: _cut(*cut) for name, size, cut in every if cut != (0, size, 1)})


def _dynamic_slice(evaluator: Evaluator, eqn: Eqn, ins: Ins) -> Outs:
    v, *starts = ins
    if not isinstance(v, AdaptedWeight):
        return None

    def cut(i: int, size: int) -> Callable[..., Any]:
        return lambda x, axis, *starts: lax.dynamic_slice_in_dim(x, starts[i], size, axis)

    every = enumerate(zip(v.names, v.shape, eqn.params["slice_sizes"], strict=True))
    change = {name: cut(i, size) for i, (name, whole, size) in every if size != whole}
    return [_along(v, change, *starts)]


def _split(evaluator: Evaluator, eqn: Eqn, v: AdaptedWeight) -> Changed:
    name, ends = v.names[eqn.params["axis"]], itertools.accumulate(eqn.params["sizes"])
    bounds = itertools.pairwise((0, *map(int, ends)))
    return [_along(v, {name: _cut(*bound)}) for bound in bounds]


def _tile(evaluator: Evaluator, eqn: Eqn, v: AdaptedWeight) -> Changed:
    reps = zip(v.names, eqn.params["reps"], strict=True)
    repeat = lambda n: lambda x, axis: jnp.concatenate([x] * n, axis)  # noqa: E731
    return _along(v, {name: repeat(n) for name, n in reps if n != 1})


def _squeeze(evaluator: Evaluator, eqn: Eqn, v: AdaptedWeight) -> Changed:
    gone = v.names_at(eqn.params["dimensions"])
    out = v.map(lambda n: n.reduced(gone, lax.squeeze), along=gone)
    out = evaluator.lost(out, gone, "taken")
    rows, left = (any(u.update.role(n) == "input" for n in u.names) for u in (v, out))
    if left or not rows:
        return out
    evaluator.paths_read.add(v.path)  # one row was looked up: it is a value, not a weight
    return [out.merged()]


def _reduce_sum(evaluator: Evaluator, eqn: Eqn, v: AdaptedWeight) -> Changed:
    gone = v.names_at(eqn.params["axes"])
    if not v.update.sums({n: v.size(n) for n in gone}):
        return None  # a sum of products over layers or experts is not of low rank
    return evaluator.lost(v.map(lambda n: n.reduced(gone, jnp.sum)), gone, "summed")


def _broadcast(evaluator: Evaluator, eqn: Eqn, v: AdaptedWeight) -> Changed:
    shape = eqn.outvars[0].aval.shape
    names = list(evaluator.fresh(len(shape)))
    for i, j in enumerate(eqn.params["broadcast_dimensions"]):
        if shape[j] != v.shape[i] and v.update.role(v.names[i]):
            return None
        names[j] = v.names[i]
    return v.map_w(lambda n: Named(jaxprs.binder(eqn)(n.array), tuple(names)))


def _reshape(evaluator: Evaluator, eqn: Eqn, v: AdaptedWeight) -> Changed:
    new, update = eqn.outvars[0].aval.shape, v.update
    names: list[int] = list(evaluator.fresh(len(new)))
    for old_axes, new_axes in reshape_groups(v.shape, new):
        if len(old_axes) == len(new_axes) == 1:
            names[new_axes[0]] = v.names[old_axes[0]]
            continue
        old = v.names_at(old_axes)
        units = tuple(n for n in old if v.size(n) == 1)
        new_sizes = {names[j]: new[j] for j in new_axes if new[j] != 1}
        regrouped = evaluator.regrouped(update, without(old, units), units, new_sizes)
        if regrouped is None:
            return None
        update = regrouped
    moved = v.map_w(lambda n: Named(jaxprs.binder(eqn)(n.array), tuple(names)))
    return dataclasses.replace(moved, update=update)


def _all_gather(evaluator: Evaluator, eqn: Eqn, v: AdaptedWeight) -> Changed:
    """Gather W's shards along an axis inside a `shard_map`, and the factors' along theirs.

    An array without the axis is the same on every device.
    """
    p = eqn.params
    if not p["tiled"]:
        return None

    def gathered(x: jax.Array, axis: int) -> jax.Array:
        return eqn.primitive.bind(x, **{**p, "all_gather_dimension": axis})

    return _along(v, {v.names[p["all_gather_dimension"]]: gathered})


def _barrier(evaluator: Evaluator, eqn: Eqn, ins: Ins) -> Outs:
    return list(lax.optimization_barrier(ins))


def _device_put(evaluator: Evaluator, eqn: Eqn, ins: Ins) -> Outs:
    """Move each operand; of a base the codes, except where a sharding is meant for W's own axes."""

    def moved(i: int, v: Value) -> Value:
        def put(x: jax.Array) -> jax.Array:
            return eqn.primitive.bind(x, **{name: (p[i],) for name, p in eqn.params.items()})[0]

        if not isinstance(v, AdaptedWeight):
            return put(v)
        if isinstance(eqn.params["devices"][i], jax.sharding.NamedSharding):
            return v.map_w(lambda n: Named(put(n.array), n.names))
        return dataclasses.replace(v, weight=jax.tree.map(put, v.weight))

    return [moved(i, v) for i, v in enumerate(ins)]


_CASTS = ("convert_element_type", "reduce_precision", "copy", "copy_p", "sharding_constraint")
_VIEWS: dict[str, Change] = {
    **dict.fromkeys((*_CASTS, "pvary"), _on_w),
    **dict.fromkeys(("stop_gradient", "name"), _on_all),
    "all_gather": _all_gather,
    "neg": lambda evaluator, eqn, v: _times(v, jnp.float32(-1.0)),
    "transpose": _transpose,
    "rev": _rev,
    "slice": _slice,
    "split": _split,
    "tile": _tile,
    "squeeze": _squeeze,
    "reduce_sum": _reduce_sum,
    "broadcast_in_dim": _broadcast,
    "reshape": _reshape,
}
PRIMITIVES: Primitives = {
    **{name: Primitive(of_one(change), view=True) for name, change in _VIEWS.items()},
    **dict.fromkeys(("mul", "div"), Primitive(_mul, scales=True)),
    **dict.fromkeys(("add", "add_any"), Primitive(residual=True)),
    "select_n": Primitive(picks=True),
    "dynamic_slice": Primitive(_dynamic_slice, lookup=True),
    "optimization_barrier": Primitive(_barrier, each=True),
    "device_put": Primitive(_device_put, each=True),
}
