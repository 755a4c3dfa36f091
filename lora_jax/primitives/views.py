"""Operations that rearrange a weight: each array that has the axis is treated alike."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
from jax import lax

from lora_jax.primitives import axis_tracking, jaxprs
from lora_jax.primitives.adapted_weight import AdaptedWeight, Ins, Named, Names, Outs, fresh


def _only(ins: Ins) -> AdaptedWeight | None:
    """The one adapted weight among the inputs, if it is one."""
    weights = [v for v in ins if isinstance(v, AdaptedWeight)]
    return weights[0] if len(weights) == 1 else None


def _on_w(interpreter: Any, eqn: Any, ins: Ins) -> Outs:
    """Casts, copies, sharding constraints: the factors keep their own dtype and placement."""
    del interpreter
    v = _only(ins)
    if v is None or not jaxprs.is_float(eqn.outvars[0].aval.dtype):
        return None
    return [v.with_w(jaxprs.bind(eqn, v.w.array))]


def _on_all(interpreter: Any, eqn: Any, ins: Ins) -> Outs:
    """`stop_gradient` and `name`: W, a and b alike, as the merged weight would be."""
    del interpreter
    v = _only(ins)
    if v is None:
        return None
    return [v.map(lambda n: Named(jaxprs.bind(eqn, n.array), n.names))]


def _neg(interpreter: Any, eqn: Any, ins: Ins) -> Outs:
    del interpreter, eqn
    v = _only(ins)
    return None if v is None else [_times(v, -1.0)]


def _mul(interpreter: Any, eqn: Any, ins: Ins) -> Outs:
    del interpreter, eqn
    v = _only(ins)
    other = ins[1] if ins[0] is v else ins[0]
    return None if v is None or jnp.ndim(other) else [_times(v, other)]


def _div(interpreter: Any, eqn: Any, ins: Ins) -> Outs:
    del interpreter, eqn
    v = _only(ins)
    if v is None or ins[0] is not v or jnp.ndim(ins[1]):
        return None
    return [_times(v, 1.0 / ins[1])]


def _times(v: AdaptedWeight, factor: Any) -> AdaptedWeight:
    """A scalar multiple: (c W, a, c b)."""
    scaled = (Named(n.array * jnp.asarray(factor, n.array.dtype), n.names) for n in (v.w, v.b))
    w, b = scaled
    return dataclasses.replace(v, w=w, b=b)


def _transpose(interpreter: Any, eqn: Any, ins: Ins) -> Outs:
    del interpreter
    v = ins[0]
    return [dataclasses.replace(v, w=v.w.moved(v.names_at(eqn.params["permutation"])))]


def _rev(interpreter: Any, eqn: Any, ins: Ins) -> Outs:
    del interpreter
    v = ins[0]
    names = v.names_at(eqn.params["dimensions"])

    def rev(n: Named) -> Named:
        return Named(lax.rev(n.array, [i for i, x in enumerate(n.names) if x in names]), n.names)

    return [v.map(rev)]


def _slice(interpreter: Any, eqn: Any, ins: Ins) -> Outs:
    del interpreter
    v, p = ins[0], eqn.params
    strides = p["strides"] or (1,) * len(v.shape)
    cuts = dict(
        zip(
            v.w.names,
            zip(p["start_indices"], p["limit_indices"], strides, strict=True),
            strict=True,
        )
    )

    def cut(n: Named) -> Named:
        if not n.names:
            return n
        whole = [cuts.get(x, (0, size, 1)) for x, size in zip(n.names, n.array.shape, strict=True)]
        return Named(lax.slice(n.array, *zip(*whole, strict=True)), n.names)

    return [v.map(cut)]


def _dynamic_slice(interpreter: Any, eqn: Any, ins: Ins) -> Outs:
    del interpreter
    v, *starts = ins
    if not isinstance(v, AdaptedWeight):
        return None
    at = dict(zip(v.w.names, zip(starts, eqn.params["slice_sizes"], strict=True), strict=True))

    def cut(n: Named) -> Named:
        if not n.names:
            return n
        whole = [at.get(x, (0, size)) for x, size in zip(n.names, n.array.shape, strict=True)]
        begin, sizes = zip(*whole, strict=True)
        starts = [jnp.asarray(b, jnp.int32) for b in begin]
        return Named(lax.dynamic_slice(n.array, starts, sizes), n.names)

    return [v.map(cut)]


def _split(interpreter: Any, eqn: Any, ins: Ins) -> Outs:
    del interpreter
    v, axis = ins[0], eqn.params["axis"]
    name, outs, start = v.w.names[axis], [], 0
    for size in eqn.params["sizes"]:

        def cut(n: Named, start: int = start, size: int = int(size)) -> Named:
            if name not in n.names:
                return n
            i = n.names.index(name)
            return Named(lax.slice_in_dim(n.array, start, start + size, axis=i), n.names)

        outs.append(v.map(cut))
        start += int(size)
    return outs


def _squeeze(interpreter: Any, eqn: Any, ins: Ins) -> Outs:
    v = ins[0]
    gone = v.names_at(eqn.params["dimensions"])
    rows = any(v.is_input(n) for n in v.w.names)

    def squeeze(n: Named) -> Named:
        dims = [i for i, x in enumerate(n.names) if x in gone]
        return Named(lax.squeeze(n.array, dims), tuple(x for x in n.names if x not in gone))

    out = v.map(squeeze)
    if rows and not any(out.is_input(n) for n in out.w.names):
        interpreter.read(v.target)  # one row looked up: no longer a weight but a value
        return [out.folded()]
    return [out]


def _reduce_sum(interpreter: Any, eqn: Any, ins: Ins) -> Outs:
    del interpreter
    v = ins[0]
    gone = v.names_at(eqn.params["axes"])
    if any(v.is_stack(n) for n in gone):
        return None  # a sum of products over layers or experts is not of low rank

    def total(n: Named) -> Named:
        dims = tuple(i for i, x in enumerate(n.names) if x in gone)
        return Named(n.array.sum(dims), tuple(x for x in n.names if x not in gone))

    copies = math.prod(v.w.size(n) for n in gone if v.is_free(n))
    return [v.map(total)] if copies == 1 else None


def _broadcast(interpreter: Any, eqn: Any, ins: Ins) -> Outs:
    del interpreter
    v, *dynamic = ins
    shape = eqn.outvars[0].aval.shape
    names = list(fresh(len(shape)))
    for i, j in enumerate(eqn.params["broadcast_dimensions"]):
        name = v.w.names[i]
        if shape[j] != v.shape[i] and not v.is_free(name):
            return None
        names[j] = name
    if dynamic:
        return None
    w = Named(jaxprs.bind(eqn, v.w.array), tuple(names))
    return [dataclasses.replace(v, w=w)]


def _reshape(interpreter: Any, eqn: Any, ins: Ins) -> Outs:
    del interpreter
    v, new = ins[0], eqn.outvars[0].aval.shape
    names: list[int] = list(fresh(len(new)))
    for old_axes, new_axes in axis_tracking.reshape_groups(v.shape, new):
        sizes = [new[j] for j in new_axes]
        if len(old_axes) == len(new_axes) == 1:
            names[new_axes[0]] = v.w.names[old_axes[0]]
        elif (moved := _regroup(v, v.names_at(old_axes), sizes)) is not None:
            v, regrouped = moved
            for j, name in zip(new_axes, regrouped, strict=True):
                names[j] = name
        else:
            return None
    w = Named(jaxprs.bind(eqn, ins[0].w.array), tuple(names))
    return [dataclasses.replace(v, w=w)]


def _regroup(
    v: AdaptedWeight, old: Names, sizes: Sequence[int]
) -> tuple[AdaptedWeight, Names] | None:
    """Merge or split the axes `old` of the factors into axes of `sizes`, all of one role."""
    real = [n for n in old if v.w.size(n) != 1]
    roles = {(n in v.a.names, n in v.b.names) for n in real}
    if len(roles) > 1:
        return None
    new = fresh(len(sizes))
    units = {n for n in old if n not in real}

    def regroup(n: Named) -> Named:
        drop = [i for i, x in enumerate(n.names) if x in units]
        n = Named(lax.squeeze(n.array, drop), tuple(x for x in n.names if x not in units))
        if not real or real[0] not in n.names:
            return n
        n = n.to_front(tuple(real))
        rest = n.names[len(real) :]
        return Named(n.array.reshape((*sizes, *n.array.shape[len(real) :])), (*new, *rest))

    moved = v.map(lambda n: n if n is v.w else regroup(n))
    return moved, new


def _all_gather(interpreter: Any, eqn: Any, ins: Ins) -> Outs:
    """Inside a `shard_map`: W's parts put together along an axis, and the factors' along theirs."""
    del interpreter
    v, p = ins[0], eqn.params
    if not p["tiled"]:
        return None
    name = v.w.names[p["all_gather_dimension"]]

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
    "squeeze": _squeeze,
    "reduce_sum": _reduce_sum,
    "broadcast_in_dim": _broadcast,
    "reshape": _reshape,
}
