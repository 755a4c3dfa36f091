"""Operations that rearrange a weight: each array that has the axis is treated alike."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
from jax import lax

from lora_jax.named import Ins, Named, Outs, without
from lora_jax.primitives import jaxprs
from lora_jax.primitives.adapted_weight import AdaptedWeight


def _only(ins: Ins) -> AdaptedWeight | None:
    """The one adapted weight among the inputs, if it is one."""
    weights = [v for v in ins if isinstance(v, AdaptedWeight)]
    return weights[0] if len(weights) == 1 else None


def _on_w(evaluator: Any, eqn: Any, ins: Ins) -> Outs:
    """Casts, copies, sharding constraints: the factors keep their own dtype and placement."""
    del evaluator
    v = _only(ins)
    if v is None or not jaxprs.is_float(eqn.outvars[0].aval.dtype):
        return None
    return [v.map_w(lambda n: Named(jaxprs.bind(eqn, n.array), n.names))]


def _on_all(evaluator: Any, eqn: Any, ins: Ins) -> Outs:
    """`stop_gradient` and `name`: W and its update alike, as the merged weight would be."""
    del evaluator
    v = _only(ins)
    return None if v is None else [v.map(lambda n: Named(jaxprs.bind(eqn, n.array), n.names))]


def _neg(evaluator: Any, eqn: Any, ins: Ins) -> Outs:
    del evaluator, eqn
    v = _only(ins)
    return None if v is None else _times(v, jnp.float32(-1.0))


def _mul(evaluator: Any, eqn: Any, ins: Ins) -> Outs:
    v = _only(ins)
    if v is None:
        return None
    side = 0 if ins[0] is v else 1
    return _times(v, evaluator.compact(eqn, 1 - side, ins[1 - side]))


def _div(evaluator: Any, eqn: Any, ins: Ins) -> Outs:
    v = _only(ins)
    if v is None or ins[0] is not v:
        return None
    return _times(v, 1.0 / evaluator.compact(eqn, 1, ins[1]))


def _times(v: AdaptedWeight, factor: Any) -> Outs:
    """`factor * W`; the factor is a scalar, or of size 1 along some of W's axes."""
    named = Named(factor, v.names if jnp.ndim(factor) else ())
    update = v.update.times(named)
    if update is None:
        return None
    moved = v.map_w(lambda n, f: Named(n.array * jnp.asarray(f, n.array.dtype), n.names), factor)
    return [dataclasses.replace(moved, update=update)]


def _transpose(evaluator: Any, eqn: Any, ins: Ins) -> Outs:
    del evaluator
    order = ins[0].names_at(eqn.params["permutation"])
    return [ins[0].map_w(lambda n: n.moved(order))]


def _along(v: AdaptedWeight, change: dict[int, Callable[[Any, int], Any]]) -> AdaptedWeight:
    """Each axis that `change` names changed, in each array that has it: `change[name](x, axis)`."""

    def one(n: Named) -> Named:
        for axis, name in enumerate(n.names):
            if name in change:
                n = Named(change[name](n.array, axis), n.names)
        return n

    return v.map(one, along=tuple(change))


def _rev(evaluator: Any, eqn: Any, ins: Ins) -> Outs:
    del evaluator
    names = ins[0].names_at(eqn.params["dimensions"])
    return [_along(ins[0], dict.fromkeys(names, lambda x, axis: lax.rev(x, (axis,))))]


def _cut(start: int, stop: int, stride: int = 1) -> Callable[[Any, int], Any]:
    return lambda x, axis: lax.slice_in_dim(x, start, stop, stride, axis)


def _slice(evaluator: Any, eqn: Any, ins: Ins) -> Outs:
    del evaluator
    v, p = ins[0], eqn.params
    strides = p["strides"] or (1,) * len(v.shape)
    cuts = zip(p["start_indices"], p["limit_indices"], strides, strict=True)
    every = zip(v.names, v.shape, cuts, strict=True)
    return [_along(v, {name: _cut(*cut) for name, size, cut in every if cut != (0, size, 1)})]


def _dynamic_slice(evaluator: Any, eqn: Any, ins: Ins) -> Outs:
    del evaluator
    v, *starts = ins
    if not isinstance(v, AdaptedWeight):
        return None
    sizes = dict(zip(v.names, eqn.params["slice_sizes"], strict=True))
    cut_names = tuple(n for n, size in zip(v.names, v.shape, strict=True) if sizes[n] != size)
    place = {n: i for i, n in enumerate(v.names)}

    def cut(n: Named, *starts: Any) -> Named:
        for i, name in enumerate(n.names):
            if name in cut_names:
                start, size = starts[place[name]], sizes[name]
                n = Named(lax.dynamic_slice_in_dim(n.array, start, size, axis=i), n.names)
        return n

    return [v.map(cut, *starts, along=cut_names)]


def _split(evaluator: Any, eqn: Any, ins: Ins) -> Outs:
    del evaluator
    name, ends = ins[0].names[eqn.params["axis"]], itertools.accumulate(eqn.params["sizes"])
    bounds = itertools.pairwise((0, *map(int, ends)))
    return [_along(ins[0], {name: _cut(*bound)}) for bound in bounds]


def _tile(evaluator: Any, eqn: Any, ins: Ins) -> Outs:
    del evaluator
    reps = zip(ins[0].names, eqn.params["reps"], strict=True)
    repeat = lambda n: lambda x, axis: jnp.concatenate([x] * n, axis)  # noqa: E731
    return [_along(ins[0], {name: repeat(n) for name, n in reps if n != 1})]


def _squeeze(evaluator: Any, eqn: Any, ins: Ins) -> Outs:
    v = ins[0]
    gone = v.names_at(eqn.params["dimensions"])
    rows = any(v.update.role(n) == "input" for n in v.names)

    def squeeze(n: Named) -> Named:
        dims = [i for i, x in enumerate(n.names) if x in gone]
        return Named(lax.squeeze(n.array, dims), without(n.names, gone))

    out = v.map(squeeze, along=gone).lost(gone, "taken")
    if rows and not any(out.update.role(n) == "input" for n in out.names):
        evaluator.read(v)  # one row looked up: no longer a weight but a value
        return [out.merged()]
    return [out]


def _reduce_sum(evaluator: Any, eqn: Any, ins: Ins) -> Outs:
    del evaluator
    v = ins[0]
    gone = v.names_at(eqn.params["axes"])
    if not v.update.sums({n: v.size(n) for n in gone}):
        return None  # a sum of products over layers or experts is not of low rank

    def total(n: Named) -> Named:
        dims = tuple(i for i, x in enumerate(n.names) if x in gone)
        return Named(n.array.sum(dims), without(n.names, gone))

    return [v.map(total).lost(gone, "summed")]


def _broadcast(evaluator: Any, eqn: Any, ins: Ins) -> Outs:
    v, *dynamic = ins
    shape = eqn.outvars[0].aval.shape
    names = list(evaluator.fresh(len(shape)))
    for i, j in enumerate(eqn.params["broadcast_dimensions"]):
        name = v.names[i]
        if shape[j] != v.shape[i] and v.update.role(name):
            return None
        names[j] = name
    if dynamic:
        return None
    return [v.map_w(lambda n: Named(jaxprs.bind(eqn, n.array), tuple(names)))]


def _reshape(evaluator: Any, eqn: Any, ins: Ins) -> Outs:
    v, new = ins[0], eqn.outvars[0].aval.shape
    update: Any = v.update
    names: list[int] = list(evaluator.fresh(len(new)))
    for old_axes, new_axes in reshape_groups(v.shape, new):
        if len(old_axes) == len(new_axes) == 1:
            names[new_axes[0]] = v.names[old_axes[0]]
            continue
        old = v.names_at(old_axes)
        units = tuple(n for n in old if v.size(n) == 1)
        new_sizes = {names[j]: new[j] for j in new_axes if new[j] != 1}
        update = update.regroup(without(old, units), units, new_sizes)
        if update is None:
            return None
    moved = v.map_w(lambda n: Named(jaxprs.bind(eqn, n.array), tuple(names)))
    return [dataclasses.replace(moved, update=update)]


def reshape_groups(
    old: Sequence[int], new: Sequence[int]
) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """The smallest groups of axes of equal size that a reshape maps to each other, in order.

    >>> reshape_groups((4, 6), (4, 2, 3))
    [((0,), (0,)), ((1,), (1, 2))]
    >>> reshape_groups((2, 1, 3), (6,))
    [((0, 1, 2), (0,))]
    """
    groups: list[Any] = []
    i = j = 0
    while i < len(old) or j < len(new):
        i0, j0 = i, j
        if i < len(old) and j < len(new):
            i, j = i + 1, j + 1
            while (p := math.prod(old[i0:i])) != (q := math.prod(new[j0:j])):
                i, j = (i + 1, j) if p < q else (i, j + 1)
        else:  # only axes of size 1 are left on one side: they join the last group
            i, j = len(old), len(new)
            i0, j0 = (axes[0] for axes in groups.pop()) if groups else (i0, j0)
        groups.append((tuple(range(i0, i)), tuple(range(j0, j))))
    return groups


def _all_gather(evaluator: Any, eqn: Any, ins: Ins) -> Outs:
    """Inside a `shard_map`: W's parts put together along an axis, and the factors' along theirs."""
    del evaluator
    v, p = ins[0], eqn.params
    if not p["tiled"]:
        return None
    name = v.names[p["all_gather_dimension"]]

    def gathered(n: Named) -> Named:
        if name not in n.names:
            return n  # the same on every device of the axis
        rest = {**p, "all_gather_dimension": n.names.index(name)}
        return Named(eqn.primitive.bind(n.array, **rest), n.names)

    return [v.map(gathered)]


RULES: dict[str, Callable[[Any, Any, Ins], Outs]] = {
    "convert_element_type": _on_w,
    "reduce_precision": _on_w,
    "copy": _on_w,
    "copy_p": _on_w,
    "sharding_constraint": _on_w,
    "pvary": _on_w,
    "all_gather": _all_gather,
    "stop_gradient": _on_all,
    "name": _on_all,
    "neg": _neg,
    "mul": _mul,
    "div": _div,
    "transpose": _transpose,
    "rev": _rev,
    "slice": _slice,
    "dynamic_slice": _dynamic_slice,
    "split": _split,
    "tile": _tile,
    "squeeze": _squeeze,
    "reduce_sum": _reduce_sum,
    "broadcast_in_dim": _broadcast,
    "reshape": _reshape,
}
