"""Operations that consume a weight: each passes its product to the weight's update.

A rule says three things: how the axes of its operands are named, the operation with W itself
(`base`), and the operation with a low-rank update in place of W (`low_rank`).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

from lora_jax.primitives import jaxprs
from lora_jax.primitives.adapted_weight import AdaptedWeight, Ins, Outs
from lora_jax.primitives.evaluator import EVERY, Evaluator, Primitive, Primitives
from lora_jax.primitives.jaxprs import Eqn
from lora_jax.updates import lowrank
from lora_jax.updates.lowrank import LowRank
from lora_jax.updates.named import RANK, Named, Names, einsum, wider, without
from lora_jax.updates.update import Operation, Zero


def _dot(evaluator: Evaluator, eqn: Eqn, ins: Ins) -> Outs:
    """Apply `dot_general`, with the weight on either side and over any of its axes."""
    both = [i for i, v in enumerate(ins) if isinstance(v, AdaptedWeight)]
    if len(both) == 2:  # one without an adapter, or one that may be folded, becomes an array
        spare = [i for i in both if isinstance(ins[i].update, Zero) or ins[i].fold]
        if not spare:
            return None
        ins = [evaluator.plain(eqn, v) if i == spare[-1] else v for i, v in enumerate(ins)]
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
    apart = [n for n in v.names if n not in x.names or n in out]
    if any(v.update.role(n) == "input" for n in apart):
        v.check_needs_no_input("a product with its transpose, or with a part of its inputs")

    def base(x: jax.Array, dtype: DTypeLike | None = None) -> jax.Array:
        dot = jaxprs.binder(eqn, dtype)
        return v.weight.product(dot if side == 0 else lambda w, x: dot(x, w), x)

    def low_rank(y: jax.Array, x: Named, update: LowRank) -> jax.Array:
        x = x.astype(wider(x.array.dtype, eqn.invars[side].aval.dtype))
        return lowrank.add(y, x, update, out, precision)

    is_matrix = len(v.names) == 2
    dtype = eqn.outvars[0].aval.dtype
    p = Operation(x, out, base, low_rank, dtype, is_matrix, sums=True, precision=precision, use=use)
    return [v.update.product(p)]


def _conv(evaluator: Evaluator, eqn: Eqn, ins: Ins) -> Outs:
    """Apply a convolution with `rank` output channels, then a 1 x 1 one.

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
    if eqn.params["batch_group_count"] != 1 or not v.admits((), inputs, (channel,)):
        return None
    x = evaluator.plain(eqn, x)
    use = evaluator.consume(eqn, v, (), inputs, (channel,))
    v = v.selected()
    out = list(evaluator.fresh(x.ndim))
    out[dims.out_spec[1]] = channel

    def low_rank(y: jax.Array, x: Named, update: LowRank) -> jax.Array:
        order = tuple(RANK if n == channel else n for n in v.names)
        kernel = [update.a.aligned(order).astype(x.array.dtype)] * groups
        h = jaxprs.binder(eqn)(x.array, jnp.concatenate(kernel, axis=order.index(RANK)))
        h = jnp.moveaxis(h, dims.out_spec[1], -1)
        h = h.reshape(*h.shape[:-1], groups, update.a.size(RANK))
        h = update.scaled(Named(h, (*evaluator.fresh(h.ndim - 1), RANK))).array
        rank, channels = update.b.moved((RANK, channel)).array.shape
        b = update.b.moved((RANK, channel)).array.reshape(rank, groups, channels // groups)
        precision = eqn.params["precision"]
        precision = precision[0] if isinstance(precision, tuple) else precision
        d = jnp.einsum("...gr,rgo->...go", h, b.astype(h.dtype), precision=precision)
        d = jnp.moveaxis(d.reshape(*d.shape[:-2], channels), -1, dims.out_spec[1])
        return y + d.astype(y.dtype)

    def base(x: jax.Array, dtype: DTypeLike | None = None) -> jax.Array:
        conv = jaxprs.binder(eqn, dtype)
        return v.weight.product(lambda w, x: conv(x, w), x)

    x = Named(x, evaluator.fresh(x.ndim))
    dtype = eqn.outvars[0].aval.dtype
    return [v.update.product(Operation(x, tuple(out), base, low_rank, dtype, sums=True, use=use))]


def _gather(evaluator: Evaluator, eqn: Eqn, ins: Ins) -> Outs:
    """Look up rows (an embedding), or choose layers, experts or columns of a weight.

    A row is `W[i] + scale * a[i] @ b`; the row of `a` has `rank` elements. If the indexed axis has
    another role (`W[layers]`, `W[:, columns]`), parts are chosen from each array that has it.
    """
    v, indices = ins
    if not isinstance(v, AdaptedWeight):
        return None
    if not _whole_rows(eqn):
        return _collapsed(evaluator, eqn, ins)
    v = v.selected()
    dn, ndim = eqn.params["dimension_numbers"], eqn.outvars[0].aval.ndim
    taken, batching = v.names_at(dn.collapsed_slice_dims), v.names_at(dn.operand_batching_dims)
    rest = without(v.names, (*taken, *batching))
    out = list(evaluator.fresh(ndim))
    rows = without(tuple(range(ndim)), dn.offset_dims)
    for j, name in zip(dn.offset_dims, rest, strict=True):
        out[j] = name
    for k, name in zip(dn.start_indices_batching_dims, batching, strict=True):
        out[rows[k]] = name
    names = tuple(out)

    def take(n: Named, indices: jax.Array) -> Named:
        return _take(n, indices, v.names, eqn, names)

    if not batching and v.picks_parts(taken, rest):
        if len(rest) < 2:  # without an adapter it is a lookup
            evaluator.dequantise(eqn, v)
        moved = v.map(take, indices, along=taken).map_w(lambda n: n.moved(names))
        return [evaluator.lost(moved, taken, "taken", into=tuple(out[j] for j in rows))]
    if not v.admits(batching, taken, rest):
        return None
    evaluator.consume(eqn, v, batching, taken, rest)
    evaluator.dequantise(eqn, v)

    def low_rank(y: jax.Array, x: None, update: LowRank) -> jax.Array:
        h = update.scaled(take(update.a, indices).astype(y.dtype))
        return y + einsum(h, update.b.astype(y.dtype), names)

    base = lambda x: v.weight.use(lambda w, i: jaxprs.binder(eqn)(w, i), indices)  # noqa: E731
    return [v.update.product(Operation(None, names, base, low_rank, eqn.outvars[0].aval.dtype))]


def _take(n: Named, indices: jax.Array, names: Names, eqn: Eqn, out: Names) -> Named:
    """Apply the gather of `eqn`, from W's `names` to `out`, to an array with some of W's axes.

    The array gets the missing axes with size 1; axes that W does not have come last. In the result,
    the axes of the indices come first.
    """
    p, dn = eqn.params, eqn.params["dimension_numbers"]
    taken = (*dn.collapsed_slice_dims, *dn.operand_batching_dims)
    if not any(names[i] in n.names for i in taken):
        return n
    own = without(n.names, names)
    array = n.aligned((*names, *own))
    ends = range(len(out), len(out) + len(own))
    y = lax.gather(
        array, indices, dn._replace(offset_dims=(*dn.offset_dims, *ends)),
        [1 if i in taken else size for i, size in enumerate(array.shape)],
        indices_are_sorted=p["indices_are_sorted"], unique_indices=p["unique_indices"],
        mode=p["mode"], fill_value=p["fill_value"],
    )  # fmt: skip
    new = Named(y, (*out, *own)).reduced(without(names, n.names), jnp.squeeze)
    return new.to_front(tuple(name for j, name in enumerate(out) if j not in dn.offset_dims))


def _whole_rows(eqn: Eqn) -> bool:
    """Return whether a gather takes single indices of some axes and the whole of the others."""
    dn, shape = eqn.params["dimension_numbers"], eqn.invars[0].aval.shape
    taken = (*dn.collapsed_slice_dims, *dn.operand_batching_dims)
    sizes = eqn.params["slice_sizes"]
    return set(dn.start_index_map) <= set(taken) and all(
        sizes[i] == n for i, n in enumerate(shape) if i not in taken
    )


def _collapsed(evaluator: Evaluator, eqn: Eqn, ins: Ins) -> Outs:
    """Remove indexed axes that stay with size 1 (`vmap` of `table[i]`), and put them back after.

    An index into an axis that is taken whole has no effect: it is clamped to 0.
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

    def same(w: jax.Array, indices: jax.Array) -> jax.Array:
        return jnp.expand_dims(eqn.primitive.bind(w, indices[..., jnp.array(used)], **p), back)

    return evaluator.through(same, eqn, ins)


_OPAQUE = ("pallas_call", "ffi_call", "custom_call", "pure_callback")  # they may multiply
PRIMITIVES: Primitives = {
    "dot_general": Primitive(_dot, operands=2, general=True),
    "conv_general_dilated": Primitive(_conv, operands=2),
    "gather": Primitive(_gather, lookup=True),
    **dict.fromkeys(_OPAQUE, Primitive(operands=EVERY)),
}
