"""Operations that consume a weight: the base product, and the low-rank product added to it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax import lax

from lora_jax.primitives import axis_tracking, jaxprs, lowrank
from lora_jax.primitives.adapted_weight import (
    RANK,
    AdaptedWeight,
    Ins,
    Named,
    Names,
    Outs,
    einsum,
    fresh,
)


def _dot(interpreter: Any, eqn: Any, ins: Ins) -> Outs:
    """`dot_general` with the weight on either side, over any of its axes."""
    if all(isinstance(v, AdaptedWeight) for v in ins):
        return None
    side = 0 if isinstance(ins[0], AdaptedWeight) else 1
    v, other = ins[side], ins[1 - side]
    interpreter.read(v.target)
    base = jaxprs.bind(eqn, *(v.w.array, other) if side == 0 else (other, v.w.array))
    x, out = _named_operands(v, other, eqn.params["dimension_numbers"], side)
    return [lowrank.add(base, x, v, out, eqn.params["precision"])]


def _named_operands(v: AdaptedWeight, other: Any, dims: Any, side: int) -> tuple[Named, Names]:
    """The other operand named by the weight's axes, and the names of the output's axes."""
    contract, batch = dims
    w_contract, w_batch = contract[side], batch[side]
    x_contract, x_batch = contract[1 - side], batch[1 - side]
    names = list(fresh(other.ndim))
    for x_dims, w_dims in ((x_contract, w_contract), (x_batch, w_batch)):
        for i, j in zip(x_dims, w_dims, strict=True):
            names[i] = v.w.names[j]
    x_free = tuple(n for i, n in enumerate(names) if i not in (*x_contract, *x_batch))
    w_free = tuple(n for j, n in enumerate(v.w.names) if j not in (*w_contract, *w_batch))
    batch_names = v.names_at(w_batch)
    free = (*w_free, *x_free) if side == 0 else (*x_free, *w_free)
    return Named(other, tuple(names)), (*batch_names, *free)


def _conv(interpreter: Any, eqn: Any, ins: Ins) -> Outs:
    """A convolution with `rank` output channels, then a 1 x 1 one.

    With feature groups, output channel o belongs to group g and sees the inputs of g alone:
    `delta_o = sum_r conv_g(x, a_r) b[r, o]`. `a` is the same for every group, so it is repeated
    along the output channels and each group keeps its own `rank` channels.
    """
    x, v = ins
    dims, groups = eqn.params["dimension_numbers"], eqn.params["feature_group_count"]
    if not isinstance(v, AdaptedWeight) or isinstance(x, AdaptedWeight):
        return None
    out = v.w.names[dims.rhs_spec[0]]
    inputs = [n for n in v.w.names if n != out]
    if not v.is_output(out) or any(v.is_output(n) or v.is_stack(n) for n in inputs):
        return None
    interpreter.read(v.target)
    v = v.chosen()
    base = jaxprs.bind(eqn, x, v.w.array)
    kernel = _conv_kernel(v, out, groups).astype(x.dtype)
    h = jnp.moveaxis(jaxprs.bind(eqn, x, kernel), dims.out_spec[1], -1)
    rank, channels = v.b.array.shape
    h = _scaled(v, h.reshape(*h.shape[:-1], groups, v.a.size(RANK)))
    b = v.b.array.reshape(rank, groups, channels // groups).astype(h.dtype)
    y = jnp.einsum("...gr,rgo->...go", h, b, precision=_one(eqn.params["precision"]))
    y = jnp.moveaxis(y.reshape(*y.shape[:-2], channels), -1, dims.out_spec[1])
    return [base + y.astype(base.dtype)]


def _scaled(v: AdaptedWeight, h: Any) -> Any:
    """`x a` [..., rank] times the weight's scale, where no stack axis is left."""
    return v.scaled(Named(h, (*fresh(h.ndim - 1), RANK))).array


def _one(precision: Any) -> Any:
    return precision[0] if isinstance(precision, tuple) else precision


def _conv_kernel(v: AdaptedWeight, out: int, groups: int) -> Any:
    """`a` in the place of the kernel: rank for the output channels, once per feature group."""
    present = tuple(RANK if n == out else n for n in v.w.names if n == out or v.is_input(n))
    a = v.a.moved(present).array
    free = [i for i, n in enumerate(v.w.names) if v.is_free(n)]
    a = jnp.expand_dims(a, free)
    axis = v.w.names.index(out)
    return jnp.concatenate([a] * groups, axis=axis)


def _ragged_dot(interpreter: Any, eqn: Any, ins: Ins) -> Outs:
    """A bank of experts: rows in groups, each with its own weight and its own factors."""
    x, v, sizes = ins
    form = jaxprs.ragged_form(eqn)
    if isinstance(x, AdaptedWeight) or not isinstance(v, AdaptedWeight) or form is None:
        return None
    (group,), (contract,) = v.names_at(form.group), v.names_at(form.contract)
    (out,) = (n for n in v.w.names if n not in (group, contract))
    if not (v.is_stack(group) and v.is_input(contract) and v.is_output(out)):
        return None
    interpreter.read(v.target)
    v = v.chosen()
    base = jaxprs.bind(eqn, x, v.w.array, sizes)
    (x_contract,), _ = eqn.params["ragged_dot_dimension_numbers"].dot_dimension_numbers[0]
    rows = jnp.moveaxis(x, x_contract, -1)
    a = v.a.moved((group, contract, RANK)).array.astype(x.dtype)
    b = v.b.moved((group, RANK, out)).array.astype(x.dtype)
    h = lax.ragged_dot(rows, a, sizes, precision=eqn.params["precision"])
    y = lax.ragged_dot(_scaled(v, h), b, sizes, precision=eqn.params["precision"])
    return [base + y.astype(base.dtype)]


def _gather(interpreter: Any, eqn: Any, ins: Ins) -> Outs:
    """Rows looked up (an embedding), or some layers or experts chosen from a stack."""
    v, indices = ins
    if not isinstance(v, AdaptedWeight) or not axis_tracking.whole_rows(eqn):
        return None
    v = v.chosen()
    dn = eqn.params["dimension_numbers"]
    looked_up = v.names_at(dn.collapsed_slice_dims)
    if looked_up and all(v.is_stack(n) for n in looked_up) and not dn.operand_batching_dims:
        return [_chosen(v, eqn, indices)]
    rest = [n for n in v.w.names if n not in (*looked_up, *v.names_at(dn.operand_batching_dims))]
    rows = all(v.is_input(n) for n in looked_up) and all(v.is_output(n) for n in rest)
    if not rows or any(not v.is_stack(n) for n in v.names_at(dn.operand_batching_dims)):
        return None
    interpreter.read(v.target)
    return [_looked_up(v, eqn, indices, tuple(rest))]


def _looked_up(v: AdaptedWeight, eqn: Any, indices: Any, rest: Names) -> Any:
    """`W[i] + scale * a[i] @ b`: the same lookup in `a`, whose row has `rank` numbers."""
    base = jaxprs.bind(eqn, v.w.array, indices)
    dn = eqn.params["dimension_numbers"]
    h_names = list(fresh(base.ndim - len(dn.offset_dims)))
    for name, j in zip(
        v.names_at(dn.operand_batching_dims), dn.start_indices_batching_dims, strict=True
    ):
        h_names[j] = name
    h = _gather_like(v.a, v, eqn, indices, last=True)
    names = list(fresh(base.ndim))
    for name, j in zip(rest, dn.offset_dims, strict=True):
        names[j] = name
    batch_positions = [j for j in range(base.ndim) if j not in dn.offset_dims]
    for name, j in zip(h_names, batch_positions, strict=True):
        names[j] = name
    h = v.scaled(Named(h.astype(base.dtype), (*h_names, RANK)))
    return base + einsum(h, v.b.astype(base.dtype), tuple(names))


def _gather_like(factor: Named, v: AdaptedWeight, eqn: Any, indices: Any, last: bool) -> Any:
    """The gather of `eqn` on a factor: its axes that W's gather keeps whole come last, or first."""
    dn = eqn.params["dimension_numbers"]
    taken = (*v.names_at(dn.collapsed_slice_dims), *v.names_at(dn.operand_batching_dims))
    factor = factor.to_front(tuple(n for n in taken if n in factor.names))
    position = {n: i for i, n in enumerate(factor.names)}
    kept = [n for n in factor.names if n not in taken]
    batch_ndim = indices.ndim - 1
    offset = range(batch_ndim, batch_ndim + len(kept)) if last else range(len(kept))
    numbers = lax.GatherDimensionNumbers(
        offset_dims=tuple(offset),
        collapsed_slice_dims=tuple(
            sorted(position[n] for n in v.names_at(dn.collapsed_slice_dims))
        ),
        start_index_map=tuple(position[n] for n in v.names_at(dn.start_index_map)),
        operand_batching_dims=tuple(position[n] for n in v.names_at(dn.operand_batching_dims)),
        start_indices_batching_dims=dn.start_indices_batching_dims,
    )
    sizes = [1 if n in taken else factor.size(n) for n in factor.names]
    p = eqn.params
    return lax.gather(
        factor.array, indices, numbers, sizes,
        indices_are_sorted=p["indices_are_sorted"], unique_indices=p["unique_indices"],
        mode=p["mode"], fill_value=p["fill_value"],
    )  # fmt: skip


def _chosen(v: AdaptedWeight, eqn: Any, indices: Any) -> AdaptedWeight:
    """`W[layers]`: the weights (and factors) of some layers, with the index's axes as a stack."""
    dn = eqn.params["dimension_numbers"]
    w = jaxprs.bind(eqn, v.w.array, indices)
    taken = v.names_at(dn.collapsed_slice_dims)
    stack = fresh(w.ndim - len(dn.offset_dims))
    w_names: list[int] = [0] * w.ndim
    kept = [n for n in v.w.names if n not in taken]
    for name, j in zip(kept, dn.offset_dims, strict=True):
        w_names[j] = name
    for name, j in zip(stack, (j for j in range(w.ndim) if j not in dn.offset_dims), strict=True):
        w_names[j] = name

    def choose(factor: Named) -> Named:
        if factor is v.w or not any(n in factor.names for n in taken):
            return factor
        array = _gather_like(factor, v, eqn, indices, last=True)
        rest = tuple(n for n in factor.names if n not in taken)
        return Named(array, (*stack, *rest))

    return dataclasses.replace(v.map(choose), w=Named(w, tuple(w_names)))


RULES: dict[str, Callable[[Any, Any, Ins], Outs]] = {
    "dot_general": _dot,
    "conv_general_dilated": _conv,
    "ragged_dot_general": _ragged_dot,
    "gather": _gather,
}
