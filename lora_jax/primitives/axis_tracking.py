"""A parameter on its way through a program: which of its axes are behind those of a value."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from lora_jax.primitives import jaxprs

Atoms = frozenset[int]  # original axes of the parameter that one axis of a view consists of
NONE: Atoms = frozenset()


@dataclasses.dataclass(frozen=True)
class View:
    """A parameter on its way: the original axes behind each axis of the present value."""

    path: str
    dims: tuple[Atoms, ...]
    stacked: Atoms = NONE  # axes taken off by a scan or an index: the layer axis
    summed: Atoms = NONE
    barrier: str | None = None

    def with_dims(self, dims: Sequence[Atoms]) -> View:
        return dataclasses.replace(self, dims=tuple(dims))


@dataclasses.dataclass(frozen=True)
class Flow:
    """What is known of a value: the parameter it is a view of, and the product it last passed.

    `tail` is None (no product yet), the path of the one parameter whose product all ways to
    this value passed last, or MIXED.
    """

    view: View | None = None
    tail: str | None = None


MIXED = "\0mixed"
NOTHING = Flow()


def join(flows: Sequence[Flow]) -> str | None:
    """The tail of a value computed from all of `flows`."""
    tails = {f.tail for f in flows if f.tail is not None}
    return None if not tails else tails.pop() if len(tails) == 1 else MIXED


class Roles(NamedTuple):
    stack: tuple[int, ...] = ()
    inputs: tuple[int, ...] = ()
    outputs: tuple[int, ...] = ()


def roles(view: View, stack: Sequence[int], inputs: Sequence[int]) -> Roles:
    """Original axes by role, given the view's stack and input axes; none where roles collide."""
    s = frozenset().union(view.stacked, *(view.dims[i] for i in stack))
    i = frozenset().union(*(view.dims[i] for i in inputs))
    rest = [d for d in range(len(view.dims)) if d not in (*stack, *inputs)]
    o = frozenset().union(view.summed, *(view.dims[d] for d in rest))
    if (s & i) or (s & o) or (i & o):
        return Roles()
    return Roles(tuple(sorted(s)), tuple(sorted(i)), tuple(sorted(o)))


def whole_rows(eqn: Any) -> bool:
    """Whether a gather takes single indices of some axes and all of the others."""
    dn, shape = eqn.params["dimension_numbers"], eqn.invars[0].aval.shape
    taken = (*dn.collapsed_slice_dims, *dn.operand_batching_dims)
    sizes = eqn.params["slice_sizes"]
    return all(sizes[i] == n for i, n in enumerate(shape) if i not in taken)


# Operations that only rearrange a parameter: (view, eqn) -> the new view (or flows), or None where
# the operation does more than that.


def _same(view: View, eqn: Any) -> View | None:
    del eqn
    return view


def _cast(view: View, eqn: Any) -> View | None:
    return view if jaxprs.is_float(eqn.outvars[0].aval.dtype) else None


def _scaled(view: View, eqn: Any) -> View | None:
    return view if min(v.aval.ndim for v in eqn.invars) == 0 else None


def _transpose(view: View, eqn: Any) -> View:
    return view.with_dims([view.dims[i] for i in eqn.params["permutation"]])


def _reshape(view: View, eqn: Any) -> View | None:
    old, new = eqn.invars[0].aval.shape, eqn.outvars[0].aval.shape
    dims: list[Atoms] = [NONE] * len(new)
    for from_axes, to_axes in reshape_groups(old, new):
        atoms = frozenset().union(*(view.dims[i] for i in from_axes))
        for j in to_axes:
            dims[j] = atoms if new[j] != 1 or len(from_axes) == len(to_axes) == 1 else NONE
    return view.with_dims(dims)


def reshape_groups(
    old: Sequence[int], new: Sequence[int]
) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """The smallest groups of axes of equal size that a reshape maps to each other, in order.

    >>> reshape_groups((4, 6), (4, 2, 3))
    [((0,), (0,)), ((1,), (1, 2))]
    >>> reshape_groups((2, 1, 3), (6,))
    [((0, 1, 2), (0,))]
    """
    groups, i, j = [], 0, 0
    while i < len(old) or j < len(new):
        i0, j0 = i, j
        if i < len(old) and j < len(new):
            i, j = i + 1, j + 1
            while (p := math.prod(old[i0:i])) != (q := math.prod(new[j0:j])):
                i, j = (i + 1, j) if p < q else (i, j + 1)
        else:  # only axes of size 1 are left on one side
            i, j = len(old), len(new)
        groups.append((tuple(range(i0, i)), tuple(range(j0, j))))
    return groups


def _broadcast(view: View, eqn: Any) -> View | None:
    old, new = eqn.invars[0].aval.shape, eqn.outvars[0].aval.shape
    dims: list[Atoms] = [NONE] * len(new)
    for i, j in enumerate(eqn.params["broadcast_dimensions"]):
        if old[i] != new[j] and view.dims[i]:
            return None
        dims[j] = view.dims[i]
    return view.with_dims(dims)


def _reduce_sum(view: View, eqn: Any) -> View:
    gone = frozenset().union(*(view.dims[i] for i in eqn.params["axes"]))
    dims = [d for i, d in enumerate(view.dims) if i not in eqn.params["axes"]]
    return dataclasses.replace(view, dims=tuple(dims), summed=view.summed | gone)


def _split(view: View, eqn: Any) -> list[Flow]:
    return [Flow(view)] * len(eqn.outvars)


def _all_gather(view: View, eqn: Any) -> View | None:
    return view if eqn.params["tiled"] else None


REARRANGE: dict[str, Callable[[View, Any], View | list[Flow] | None]] = {
    "convert_element_type": _cast,
    "reduce_precision": _same,
    "copy": _same,
    "copy_p": _same,
    "stop_gradient": _same,
    "sharding_constraint": _same,
    "pvary": _same,
    "all_gather": _all_gather,
    "name": _same,
    "neg": _same,
    "rev": _same,
    "slice": _same,
    "dynamic_slice": _same,
    "mul": _scaled,
    "div": _scaled,
    "transpose": _transpose,
    "reshape": _reshape,
    "broadcast_in_dim": _broadcast,
    "reduce_sum": _reduce_sum,
    "split": _split,
}
