"""How a traced function consumes each parameter: which axes are stacked, input and output.

The walk follows every parameter through the operations that only rearrange it (transpose,
reshape, slice, cast, the layer axis that a scan slices off, ...) to the operations that consume
it, and reads the axes' roles there:

    dot_general    contracted -> input     batch -> stack      free -> output
    convolution    window and channels in -> input             channels out -> output
    gather         the looked-up axis -> input                 the row -> output
    ragged_dot     contracted -> input     group -> stack      free -> output

Beside it the walk answers "which product does every way to an output pass last?", which is
what `"all-linear"` leaves out as the output head.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from lora_jax.primitives import jaxprs
from lora_jax.primitives.axis_tracking import (
    MIXED,
    NONE,
    NOTHING,
    REARRANGE,
    Atoms,
    Flow,
    Roles,
    View,
    join,
    roles,
    whole_rows,
)


@dataclasses.dataclass(frozen=True)
class Use:
    """One operation that consumes a parameter.

    stack, inputs, outputs are the parameter's own axes; where the operation has no low-rank rule,
    only stack is known. `barrier` names an operation with no low-rank rule between the parameter
    and this use (or this use itself); such a use exists only in merged form.
    """

    kind: str
    where: str
    stack: tuple[int, ...] = ()
    inputs: tuple[int, ...] = ()
    outputs: tuple[int, ...] = ()
    barrier: str | None = None

    @property
    def is_product(self) -> bool:
        return self.kind in PRODUCTS and bool(self.inputs) and bool(self.outputs)

    @property
    def has_axes(self) -> bool:
        return self.kind in (*PRODUCTS, "gather") and bool(self.inputs) and bool(self.outputs)


PRODUCTS = ("conv_general_dilated", "ragged_dot_general", "dot_general")


@dataclasses.dataclass(frozen=True)
class Usage:
    """The uses of every parameter (in program order), and the parameters that are output heads."""

    uses: dict[str, tuple[Use, ...]]
    heads: frozenset[str]


def usage(traced: jaxprs.TracedCall) -> Usage:
    """Walk a traced call; see the module docstring."""
    walker = _Walker({path: {} for path in traced.param_paths})
    n = len(traced.param_paths)
    flows = [
        Flow(View(path, tuple(frozenset((i,)) for i in range(len(shape)))))
        for path, shape in traced.param_shapes.items()
    ]
    flows += [NOTHING] * (len(traced.jaxpr.invars) - n)
    outs = walker.walk(traced.jaxpr, flows)
    for out in outs:
        if out.view is not None:
            use = Use("return", "the end of the function", barrier="return")
            walker.record(out.view, use)
    heads = frozenset(o.tail for o in outs if o.tail not in (None, MIXED))
    return Usage({path: tuple(uses) for path, uses in walker.uses.items()}, heads)


class _Walker:
    def __init__(self, uses: dict[str, dict[Use, None]]):
        self.uses = uses  # an ordered set per path

    def record(self, view: View, use: Use) -> None:
        if not (use.stack or use.inputs or use.outputs):  # a bias of a scanned layer
            use = dataclasses.replace(use, stack=tuple(sorted(view.stacked)))
        if view.barrier is not None:
            use = dataclasses.replace(use, barrier=view.barrier)
        self.uses[view.path].setdefault(use)

    def walk(self, jaxpr: Any, flows: Sequence[Flow]) -> list[Flow]:
        env = {v: f for v, f in zip(jaxpr.invars, flows, strict=True) if f is not NOTHING}

        def read(atom: Any) -> Flow:
            return NOTHING if jaxprs.is_literal(atom) else env.get(atom, NOTHING)

        for eqn in jaxpr.eqns:
            ins = [read(v) for v in eqn.invars]
            if all(f is NOTHING for f in ins):
                continue
            for v, out in zip(eqn.outvars, self.step(eqn, ins), strict=True):
                if out is not NOTHING:
                    env[v] = out
        return [read(v) for v in jaxpr.outvars]

    def step(self, eqn: Any, ins: list[Flow]) -> list[Flow]:
        name = eqn.primitive.name
        control = CONTROL.get(name)
        if control is not None:
            return control(self, eqn, ins)
        views = [f.view for f in ins if f.view is not None and f.view.dims]
        if not views:
            return [Flow(tail=join(ins))] * len(eqn.outvars)
        rearrange = REARRANGE.get(name)
        if rearrange is not None and len(views) == 1:
            moved = rearrange(views[0], eqn)
            if moved is not None:
                return moved if isinstance(moved, list) else [Flow(moved)]
        consume = CONSUME.get(name)
        if consume is not None:
            return [consume(self, eqn, ins)]
        return self.barrier(eqn, ins)

    def barrier(self, eqn: Any, ins: list[Flow]) -> list[Flow]:
        """An operation with no low-rank rule; followed on where it keeps the shape."""
        outs = []
        for flow in ins:
            if flow.view is not None:
                kind = eqn.primitive.name
                self.record(flow.view, Use(kind, jaxprs.where(eqn), barrier=kind))
        views = [f.view for f in ins if f.view is not None]
        for v in eqn.outvars:
            same = [w for w in views if len(w.dims) == v.aval.ndim]
            follow = len(views) == 1 and same and _shape_of(eqn, ins, same[0]) == v.aval.shape
            view = (
                dataclasses.replace(same[0], barrier=jaxprs.operand_name(eqn)) if follow else None
            )
            outs.append(Flow(view, join(ins)))
        return outs


def _shape_of(eqn: Any, ins: list[Flow], view: View) -> tuple[int, ...]:
    return next(v.aval.shape for v, f in zip(eqn.invars, ins, strict=True) if f.view is view)


# --- operations that consume a parameter: walker, eqn, ins -> flow -----------------------------


def _consumed(walker: _Walker, eqn: Any, view: View, roles: Roles) -> Flow:
    walker.record(view, Use(eqn.primitive.name, jaxprs.where(eqn), *roles))
    return Flow(tail=view.path)


def _dot(walker: _Walker, eqn: Any, ins: list[Flow]) -> Flow:
    contract, batch = eqn.params["dimension_numbers"]
    outs = [
        _consumed(walker, eqn, flow.view, roles(flow.view, batch[side], contract[side]))
        for side, flow in enumerate(ins)
        if flow.view is not None
    ]
    return Flow(tail=join(outs))


def _right_operand(walker: _Walker, eqn: Any, ins: list[Flow]) -> View | None:
    """The weight of a convolution or ragged product; a parameter on the left has no rule."""
    if ins[0].view is not None:
        kind = eqn.primitive.name
        walker.record(ins[0].view, Use(kind, jaxprs.where(eqn), barrier=kind))
    return ins[1].view


def _conv(walker: _Walker, eqn: Any, ins: list[Flow]) -> Flow:
    view = _right_operand(walker, eqn, ins)
    if view is None or eqn.params["batch_group_count"] != 1:
        return walker.barrier(eqn, [NOTHING, *ins[1:]])[0]
    out = eqn.params["dimension_numbers"].rhs_spec[0]
    inputs = [i for i in range(len(view.dims)) if i != out]
    return _consumed(walker, eqn, view, roles(view, (), inputs))


def _ragged_dot(walker: _Walker, eqn: Any, ins: list[Flow]) -> Flow:
    view = _right_operand(walker, eqn, ins)
    dims = jaxprs.ragged_form(eqn)
    if view is None or dims is None:
        return walker.barrier(eqn, [NOTHING, *ins[1:]])[0]
    return _consumed(walker, eqn, view, roles(view, dims.group, dims.contract))


def _squeeze(walker: _Walker, eqn: Any, ins: list[Flow]) -> Flow:
    """An axis indexed away: a layer of a stack, or, where one axis is left, a row looked up."""
    view, axes = ins[0].view, eqn.params["dimensions"]
    assert view is not None
    rest = [d for i, d in enumerate(view.dims) if i not in axes]
    gone = frozenset().union(*(view.dims[i] for i in axes))
    if gone and sum(bool(d) for d in rest) == 1:
        walker.record(view, Use("gather", jaxprs.where(eqn), *roles(view, (), axes)))
        return Flow(tail=view.path)
    return Flow(dataclasses.replace(view, dims=tuple(rest), stacked=view.stacked | gone))


def _gather(walker: _Walker, eqn: Any, ins: list[Flow]) -> Flow:
    """A row lookup, or the choice of one layer or expert of a stack (two axes or more left)."""
    view, dn = ins[0].view, eqn.params["dimension_numbers"]
    if view is None or not whole_rows(eqn):
        return walker.barrier(eqn, ins)[0]
    looked_up, batching = dn.collapsed_slice_dims, dn.operand_batching_dims
    rest = [i for i in range(len(view.dims)) if i not in (*looked_up, *batching)]
    if len(rest) < 2:
        return _consumed(walker, eqn, view, roles(view, batching, looked_up))
    gone = frozenset().union(*(view.dims[i] for i in (*looked_up, *batching)))
    dims: list[Atoms] = [NONE] * eqn.outvars[0].aval.ndim
    for i, j in zip(rest, dn.offset_dims, strict=True):
        dims[j] = view.dims[i]
    return Flow(dataclasses.replace(view, dims=tuple(dims), stacked=view.stacked | gone))


CONSUME: dict[str, Callable[[_Walker, Any, list[Flow]], Flow]] = {
    "dot_general": _dot,
    "conv_general_dilated": _conv,
    "ragged_dot_general": _ragged_dot,
    "gather": _gather,
    "squeeze": _squeeze,
}


# --- control flow: walker, eqn, ins -> flows ---------------------------------------------------


def _call(walker: _Walker, eqn: Any, ins: list[Flow]) -> list[Flow]:
    jaxpr, _ = jaxprs.called(eqn)
    return walker.walk(jaxpr, ins)


def _custom_vjp(walker: _Walker, eqn: Any, ins: list[Flow]) -> list[Flow]:
    """Entered only to find the axes: its own gradient rule forbids a low-rank operand."""
    name = jaxprs.operand_name(eqn)
    inside = []
    for flow in ins:
        if flow.view is not None:
            walker.record(flow.view, Use(eqn.primitive.name, jaxprs.where(eqn), barrier=name))
            flow = dataclasses.replace(flow, view=dataclasses.replace(flow.view, barrier=name))
        inside.append(flow)
    jaxpr, _ = jaxprs.opened(eqn.params["call_jaxpr"])
    return walker.walk(jaxpr, inside)


def _cond(walker: _Walker, eqn: Any, ins: list[Flow]) -> list[Flow]:
    branches = [walker.walk(jaxprs.opened(b)[0], ins[1:]) for b in eqn.params["branches"]]
    return [_plain(walker, eqn, *outs) for outs in zip(*branches, strict=True)]


def _plain(walker: _Walker, eqn: Any, *flows: Flow) -> Flow:
    for flow in flows:
        if flow.view is not None:
            name = eqn.primitive.name
            walker.record(flow.view, Use(name, jaxprs.where(eqn), barrier=name))
    return Flow(tail=join(flows))


def _scan(walker: _Walker, eqn: Any, ins: list[Flow]) -> list[Flow]:
    n_consts, n_carry = jaxprs.scan_arity(eqn)
    jaxpr, _ = jaxprs.opened(eqn.params["jaxpr"])
    xs = [_sliced(f) for f in ins[n_consts + n_carry :]]
    carry = ins[n_consts : n_consts + n_carry]

    def body(carry: list[Flow]) -> list[Flow]:
        return walker.walk(jaxpr, [*ins[:n_consts], *carry, *xs])

    invariant = jaxprs.invariant_carry(jaxpr, n_consts, n_carry)
    carry = _settle(walker, eqn, body, carry, invariant)
    ys = body(carry)[n_carry:]
    return [*carry, *(_plain(walker, eqn, y) for y in ys)]


def _sliced(flow: Flow) -> Flow:
    if flow.view is None:
        return flow
    view = flow.view
    stacked = view.stacked | view.dims[0]
    return Flow(dataclasses.replace(view, dims=view.dims[1:], stacked=stacked))


def _while(walker: _Walker, eqn: Any, ins: list[Flow]) -> list[Flow]:
    nc, nb = eqn.params["cond_nconsts"], eqn.params["body_nconsts"]
    cond, _ = jaxprs.opened(eqn.params["cond_jaxpr"])
    jaxpr, _ = jaxprs.opened(eqn.params["body_jaxpr"])
    carry = ins[nc + nb :]

    def body(carry: list[Flow]) -> list[Flow]:
        return walker.walk(jaxpr, [*ins[nc : nc + nb], *carry])

    invariant = jaxprs.invariant_carry(jaxpr, nb, len(carry))
    carry = _settle(walker, eqn, body, carry, invariant)
    walker.walk(cond, [*ins[:nc], *carry])
    return carry


def _settle(
    walker: _Walker,
    eqn: Any,
    body: Callable[[list[Flow]], list[Flow]],
    carry: list[Flow],
    invariant: Sequence[bool],
) -> list[Flow]:
    """Carries after any number of iterations: each is joined with itself until nothing changes."""
    carry = [
        f if keep else _plain(walker, eqn, f) for f, keep in zip(carry, invariant, strict=True)
    ]
    for _ in range(3):  # None -> one path -> MIXED: two steps reach the fixed point
        outs = body(carry)
        nxt = [
            old if keep else Flow(tail=join((old, _plain(walker, eqn, out))))
            for old, out, keep in zip(carry, outs, invariant, strict=False)
        ]
        if nxt == carry:
            break
        carry = nxt
    return carry


def _shard_map(walker: _Walker, eqn: Any, ins: list[Flow]) -> list[Flow]:
    form = jaxprs.shard_map_form(eqn)
    return [_plain(walker, eqn, out) for out in walker.walk(form.jaxpr, ins)]


CONTROL: dict[str, Callable[[_Walker, Any, list[Flow]], list[Flow]]] = {
    **dict.fromkeys(jaxprs.CALLS, _call),
    "custom_vjp_call": _custom_vjp,
    "cond": _cond,
    "scan": _scan,
    "while": _while,
    "shard_map": _shard_map,
    "optimization_barrier": lambda walker, eqn, ins: ins,
}
