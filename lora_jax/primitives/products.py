"""Operations that consume a weight: each hands its product to the weight's update.

A rule says three things: how the axes of its operands are named, the operation with W itself
(`base`), and the operation with a low-rank update in W's place (`low_rank`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax import lax

from lora_jax.primitives import jaxprs, lowrank
from lora_jax.primitives.adapted_weight import AdaptedWeight
from lora_jax.primitives.lowrank import LowRank
from lora_jax.primitives.named import RANK, Ins, Named, Names, Outs, einsum, wider, without
from lora_jax.primitives.update import Operation


def _dot(evaluator: Any, eqn: Any, ins: Ins) -> Outs:
    """`dot_general` with the weight on either side, over any of its axes."""
    one = evaluator.with_one_weight(eqn, ins)
    if one is None:
        return None
    ins = one
    side = 0 if isinstance(ins[0], AdaptedWeight) else 1
    v, other = ins[side], ins[1 - side]
    (contract, batch), precision = eqn.params["dimension_numbers"], eqn.params["precision"]
    names = list(evaluator.fresh(other.ndim))
    for x_dims, w_dims in ((contract[1 - side], contract[side]), (batch[1 - side], batch[side])):
        for i, j in zip(x_dims, w_dims, strict=True):
            names[i] = v.names[j]
    inputs, stack = v.names_at(contract[side]), v.names_at(batch[side])
    w_free = without(v.names, (*inputs, *stack))
    x_free = without(tuple(names), (*inputs, *stack))
    out = (*stack, *((*w_free, *x_free) if side == 0 else (*x_free, *w_free)))
    use = evaluator.consume(eqn, v, stack, inputs, w_free)
    x = Named(other, tuple(names))
    if any(n not in x.names or n in out for n in v.names if v.update.role(n) == "input"):
        v.check_linear("a product with its transpose, or with a part of its inputs")

    def base(x: Any, dtype: Any = None) -> Any:
        ends = (lambda w, x: (w, x)) if side == 0 else (lambda w, x: (x, w))
        return v.held.product(lambda w, x: jaxprs.bind(eqn, *ends(w, x), dtype=dtype), x)

    def low_rank(y: Any, x: Named, update: LowRank) -> Any:
        x = x.astype(wider(x.array.dtype, v.held.dtype))
        return lowrank.add(y, x, update, out, precision)

    is_matrix = len(v.names) == 2
    p = Operation(x, out, base, low_rank, is_matrix, sums=True, precision=precision, use=use)
    return [v.update.product(p)]


def _conv(evaluator: Any, eqn: Any, ins: Ins) -> Outs:
    """A convolution with `rank` output channels, then a 1 x 1 one.

    With feature groups, output channel o belongs to group g and sees the inputs of g alone:
    `delta_o = sum_r conv_g(x, a_r) b[r, o]`. `a` is the same for every group, so it is repeated
    along the output channels and each group keeps its own `rank` channels.
    """
    x, v = ins
    dims, groups = eqn.params["dimension_numbers"], eqn.params["feature_group_count"]
    if not isinstance(v, AdaptedWeight):
        return None
    channel = v.names[dims.rhs_spec[0]]
    inputs = without(v.names, (channel,))
    if eqn.params["batch_group_count"] != 1 or not v.update.admits((), inputs, (channel,)):
        return None
    x = evaluator.plain(eqn, x)
    use = evaluator.consume(eqn, v, (), inputs, (channel,))
    v = v.chosen()
    out = list(evaluator.fresh(x.ndim))
    out[dims.out_spec[1]] = channel

    def low_rank(y: Any, x: Named, update: LowRank) -> Any:
        kernel = _conv_kernel(v.names, update.a, channel, groups).astype(x.array.dtype)
        h = jnp.moveaxis(jaxprs.bind(eqn, x.array, kernel), dims.out_spec[1], -1)
        h = _middle(update, h.reshape(*h.shape[:-1], groups, update.a.size(RANK)))
        rank, channels = update.b.moved((RANK, channel)).array.shape
        b = update.b.moved((RANK, channel)).array.reshape(rank, groups, channels // groups)
        precision = eqn.params["precision"]
        precision = precision[0] if isinstance(precision, tuple) else precision
        d = jnp.einsum("...gr,rgo->...go", h, b.astype(h.dtype), precision=precision)
        d = jnp.moveaxis(d.reshape(*d.shape[:-2], channels), -1, dims.out_spec[1])
        return y + d.astype(y.dtype)

    def base(x: Any, dtype: Any = None) -> Any:
        return v.held.product(lambda w, x: jaxprs.bind(eqn, x, w, dtype=dtype), x)

    x = Named(x, evaluator.fresh(x.ndim))
    return [v.update.product(Operation(x, tuple(out), base, low_rank, sums=True, use=use))]


def _middle(update: LowRank, h: Any) -> Any:
    """`x a` [..., rank] times the update's scale, where no stack axis is left."""
    # Any names will do that are not the update's own.
    return update.middle(Named(h, (*range(10**6, 10**6 + h.ndim - 1), RANK))).array


def _conv_kernel(names: Names, a: Named, channel: int, groups: int) -> Any:
    """`a` in the place of the kernel: rank for the output channels, once per feature group."""
    order = tuple(RANK if n == channel else n for n in names)
    array = a.among(order)
    return jnp.concatenate([array] * groups, axis=names.index(channel))


def _gather(evaluator: Any, eqn: Any, ins: Ins) -> Outs:
    """Rows looked up (an embedding), or some layers, experts or columns chosen from a weight."""
    v, indices = ins
    if not isinstance(v, AdaptedWeight):
        return None
    if not _whole_rows(eqn):
        return _collapsed(evaluator, eqn, ins)
    v = v.chosen()
    dn = eqn.params["dimension_numbers"]
    looked_up, batching = (
        v.names_at(dn.collapsed_slice_dims),
        v.names_at(dn.operand_batching_dims),
    )
    rest = without(v.names, (*looked_up, *batching))
    if not batching and v.update.chooses(looked_up, rest):
        return [_chosen(evaluator, v, eqn, indices)]
    if not v.update.admits(batching, looked_up, rest):
        return None
    evaluator.consume(eqn, v, batching, looked_up, rest)
    return [_looked_up(evaluator, v, eqn, indices, rest)]


def _whole_rows(eqn: Any) -> bool:
    """Whether a gather takes single indices of some axes and all of the others."""
    dn, shape = eqn.params["dimension_numbers"], eqn.invars[0].aval.shape
    taken = (*dn.collapsed_slice_dims, *dn.operand_batching_dims)
    sizes = eqn.params["slice_sizes"]
    return set(dn.start_index_map) <= set(taken) and all(
        sizes[i] == n for i, n in enumerate(shape) if i not in taken
    )


def _collapsed(evaluator: Any, eqn: Any, ins: Ins) -> Outs:
    """Indices of axes that stay with size 1 (`vmap` of `table[i]`): the axes go, and come back.

    An index of an axis that is taken whole says nothing: it is clamped to 0.
    """
    dn, p = eqn.params["dimension_numbers"], dict(eqn.params)
    shape, sizes = eqn.invars[0].aval.shape, p["slice_sizes"]
    kept = without(tuple(range(len(shape))), (*dn.collapsed_slice_dims, *dn.operand_batching_dims))
    single = [i for i in kept if i in dn.start_index_map and sizes[i] == 1]
    clamped = p["mode"] != lax.GatherScatterMode.FILL_OR_DROP
    if not clamped or any(sizes[i] != shape[i] for i in kept if i not in single):
        return None
    back = [dn.offset_dims[kept.index(i)] for i in single]
    offset = without(dn.offset_dims, back)
    collapsed = tuple(sorted((*dn.collapsed_slice_dims, *single)))
    used = [k for k, i in enumerate(dn.start_index_map) if i in collapsed]
    p["dimension_numbers"] = dn._replace(
        offset_dims=tuple(j - sum(b < j for b in back) for j in offset),
        collapsed_slice_dims=collapsed,
        start_index_map=tuple(dn.start_index_map[k] for k in used),
    )

    def same(w: Any, indices: Any) -> Any:
        return jnp.expand_dims(eqn.primitive.bind(w, indices[..., jnp.array(used)], **p), back)

    return evaluator.through(same, eqn, ins)


def _looked_up(evaluator: Any, v: AdaptedWeight, eqn: Any, indices: Any, rest: Names) -> Any:
    """`W[i] + scale * a[i] @ b`: the same lookup in `a`, whose row has `rank` numbers."""
    dn = eqn.params["dimension_numbers"]
    ndim = eqn.outvars[0].aval.ndim
    h_names = list(evaluator.fresh(ndim - len(dn.offset_dims)))
    batching = v.names_at(dn.operand_batching_dims)
    for name, j in zip(batching, dn.start_indices_batching_dims, strict=True):
        h_names[j] = name
    rows, out = iter(h_names), [0] * ndim
    for name, j in zip(rest, dn.offset_dims, strict=True):
        out[j] = name
    out = [name if j in dn.offset_dims else next(rows) for j, name in enumerate(out)]

    def low_rank(y: Any, x: Any, update: LowRank) -> Any:
        del x
        h = _gather_like(update.a, v.names, eqn, indices).astype(y.dtype)
        h = update.middle(Named(h, (*h_names, RANK)))
        return y + einsum(h, update.b.astype(y.dtype), tuple(out))

    base = lambda _: v.held.use(lambda w, i: jaxprs.bind(eqn, w, i), indices)  # noqa: E731
    return v.update.product(Operation(None, tuple(out), base, low_rank))


def _gather_like(factor: Named, names: Names, eqn: Any, indices: Any) -> Any:
    """The gather of `eqn` on a factor: its axes that W's gather keeps whole come last."""
    dn = eqn.params["dimension_numbers"]
    at = lambda dims: tuple(names[i] for i in dims)  # noqa: E731
    taken = (*at(dn.collapsed_slice_dims), *at(dn.operand_batching_dims))
    factor = factor.to_front(tuple(n for n in taken if n in factor.names))
    position = {n: i for i, n in enumerate(factor.names)}
    kept = without(factor.names, taken)
    batch_ndim = indices.ndim - 1
    numbers = lax.GatherDimensionNumbers(
        offset_dims=tuple(range(batch_ndim, batch_ndim + len(kept))),
        collapsed_slice_dims=tuple(sorted(position[n] for n in at(dn.collapsed_slice_dims))),
        start_index_map=tuple(position[n] for n in at(dn.start_index_map)),
        operand_batching_dims=tuple(position[n] for n in at(dn.operand_batching_dims)),
        start_indices_batching_dims=dn.start_indices_batching_dims,
    )
    sizes = [1 if n in taken else factor.size(n) for n in factor.names]
    p = eqn.params
    return lax.gather(
        factor.array, indices, numbers, sizes,
        indices_are_sorted=p["indices_are_sorted"], unique_indices=p["unique_indices"],
        mode=p["mode"], fill_value=p["fill_value"],
    )  # fmt: skip


def _chosen(evaluator: Any, v: AdaptedWeight, eqn: Any, indices: Any) -> AdaptedWeight:
    """`W[layers]`: the weights (and factors) of some layers, with the index's axes in their place.

    Also `W[:, columns]`: whatever role the axis has, it is chosen from each array that has it.
    """
    dn = eqn.params["dimension_numbers"]
    ndim = eqn.outvars[0].aval.ndim
    taken = v.names_at(dn.collapsed_slice_dims)
    new = evaluator.fresh(ndim - len(dn.offset_dims))
    kept, names, fresh = iter(without(v.names, taken)), [0] * ndim, iter(new)
    names = [next(kept) if j in dn.offset_dims else next(fresh) for j in range(ndim)]

    def choose(n: Named, indices: Any) -> Named:
        if not any(name in n.names for name in taken):
            return n
        array = _gather_like(n, v.names, eqn, indices)
        return Named(array, (*new, *without(n.names, taken)))

    moved = v.map(choose, indices, along=taken)
    return moved.map_w(lambda n: n.moved(tuple(names))).lost(taken, "taken", into=new)


RULES: dict[str, Callable[[Any, Any, Ins], Outs]] = {
    "dot_general": _dot,
    "conv_general_dilated": _conv,
    "gather": _gather,
}
