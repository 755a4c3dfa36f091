"""The dependences of a value of a program: the parameters in it, and the products on the way to it.

Two questions about "all-linear" are answered by it:

- Which parameter is an **output head**? Its product feeds no other parameter's product, and it is
  the last product on every path to some output. Paths start at arguments of a floating dtype and
  end in integers and predicates; a product ends all paths into it and starts a new one. A path
  from an argument that has passed no product counts, where it meets others, only in a sum of equal
  shapes: that is a residual, `h + down(h)`. Elsewhere it is a mask, or the target of a loss.
- Which parameters are **kernels** at all? Those from which an operand of some product is computed,
  alone, with other parameters or with arguments, through any operations. A bias, or a gain, of an
  activation is not one: the activation spans the whole result, and comes from a product itself.
  (If the two have the same shape, it is one if the result is multiplied with another activation.)
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import jax.numpy as jnp

from lora_jax.primitives.evaluator import Primitive
from lora_jax.primitives.jaxprs import Aval, Eqn, reshape_groups

Paths = frozenset[str]
Atom = tuple[str, int]  # an axis of a parameter: the path and the number of the axis
Atoms = frozenset[Atom]
Origins = tuple[Atoms, ...]
NONE: Atoms = frozenset()
RAW: Paths = frozenset()  # the way from an argument, before any product
ROWS: Paths = frozenset(("\0rows",))  # the way from a lookup


@dataclasses.dataclass(frozen=True)
class Flow:
    """The facts about one value of the program.

    weights: the parameters that it is computed from. If it moves, the ones that arguments changed.
    moving: whether it depends on an argument that is not a parameter.
    ways: for each way to it, the parameters of the last product on that way.
    shifts: the parameters that were added to an activation of their own shape, before any product.
    spread: whether all of its moving inputs have been broadcast.
    matrix: whether it has two axes or more, not counting broadcast axes and axes of size 1.
    axes: for each of its axes, the output axes of parameters that it is; () if that is lost.
    """

    weights: Paths = frozenset()
    moving: bool = False
    ways: frozenset[Paths] = frozenset()
    spread: bool = False
    matrix: bool = False
    axes: Origins = ()
    shifts: Paths = frozenset()


CONSTANT = Flow()


def argument(aval: Aval) -> Flow:
    return cut(Flow(moving=True, ways=frozenset((RAW,))), aval)


def parameter(path: str, aval: Aval) -> Flow:
    return Flow(frozenset((path,)), matrix=is_matrix(aval.shape))


def is_matrix(shape: Sequence[int]) -> bool:
    return sum(n > 1 for n in shape) > 1


def cut(flow: Flow, aval: Aval) -> Flow:
    """Drop the ways to a value whose dtype is not floating: an integer, a predicate or a key."""
    dtype = getattr(aval, "dtype", None)
    floating = dtype is not None and jnp.issubdtype(dtype, jnp.inexact)
    return flow if floating or not flow.ways else dataclasses.replace(flow, ways=frozenset())


def join(flows: Sequence[Flow], residual: bool = True) -> Flow:
    """Return the flow of a value that is computed from all of these."""
    ways: frozenset[Paths] = frozenset().union(*(f.ways for f in flows))
    if not residual and len(ways) > 1:
        ways -= {RAW}
    moving = [f for f in flows if f.moving]
    weights = RAW.union(*(f.weights for f in flows))
    matrix = any(f.matrix for f in flows)
    spread = all(f.spread for f in moving) and bool(moving)
    axes, shifts = united([f.axes for f in flows]), RAW.union(*(f.shifts for f in flows))
    return Flow(weights, bool(moving), ways, spread, matrix, axes, shifts)


def united(every: Sequence[Origins]) -> Origins:
    """Return the axes of a value that is computed element by element."""
    known = [axes for axes in every if axes]
    if len({len(axes) for axes in known}) != 1:
        return ()
    return tuple(NONE.union(*atoms) for atoms in zip(*known, strict=True))


def moved(eqn: Eqn, axes: Origins) -> Origins:
    """Return the axes after an operation with one operand, so far as its parameters tell them."""
    params, old, new = eqn.params, eqn.invars[0].aval.shape, eqn.outvars[0].aval.shape
    out = [NONE] * len(new)
    if len(axes) != len(old):
        return ()
    if "permutation" in params:
        pairs = list(zip(params["permutation"], range(len(new)), strict=True))
    elif "broadcast_dimensions" in params:
        pairs = list(enumerate(params["broadcast_dimensions"]))
    elif "new_sizes" in params:
        pairs = [(i[0], j[0]) for i, j in reshape_groups(old, new) if len(i) == len(j) == 1]
    elif len(new) < len(old) and ("axes" in params or "dimensions" in params):
        gone: Sequence[int] = params["axes" if "axes" in params else "dimensions"]
        pairs = [(i, j) for j, i in enumerate(free(axes, gone))]
    else:
        return axes if len(new) == len(old) else ()
    for i, j in pairs:
        out[j] = axes[i]
    return tuple(out)


def multiplied(eqn: Eqn, axes: Sequence[Origins]) -> Origins:
    """Return the axes of a product of two values: batch, then the free ones of either."""
    dims = eqn.params.get("dimension_numbers")
    if not (isinstance(dims, tuple) and len(dims) == 2):
        return ()
    contract, batch = dims
    sizes = [len(v.aval.shape) for v in eqn.invars]
    each = [a if len(a) == n else (NONE,) * n for a, n in zip(axes, sizes, strict=True)]
    shared = tuple(each[0][i] | each[1][j] for i, j in zip(*batch, strict=True))
    gone = [(*contract[k], *batch[k]) for k in (0, 1)]
    return (*shared, *(own[i] for k, own in enumerate(each) for i in free(own, gone[k])))


def free(axes: Origins, gone: Sequence[int]) -> list[int]:
    return [i for i in range(len(axes)) if i not in gone]


def lost(eqn: Eqn, ins: Sequence[Flow], out: Flow) -> Atoms:
    """Return the axes that an operation has mixed with others; the axes of a sum are only gone."""
    if "axes" in eqn.params or "dimensions" in eqn.params:
        return NONE
    return NONE.union(*(a for f in ins for a in f.axes)).difference(*out.axes)


def step(eqn: Eqn, known: Primitive, flows: Sequence[Flow]) -> list[Flow]:
    """Return the flows of the outputs of an equation that is neither a product nor a lookup."""
    if known.each:
        return list(flows)
    avals = [v.aval for v in eqn.invars]
    if known.picks:
        flows, avals = flows[1:], avals[1:]
    out = eqn.outvars[0].aval if eqn.outvars else avals[0]
    size = _size(out)
    kept = [_met(f, i, flows, avals, size) for i, f in enumerate(flows)]
    whole = resized(join(kept, known.residual and not any(f.spread for f in flows)), eqn)
    if len(avals) == 1:
        grown = known.view and size > _size(avals[0])
        whole = dataclasses.replace(
            whole, axes=moved(eqn, flows[0].axes), spread=flows[0].spread or grown
        )
    if len(whole.axes) != len(out.shape):
        whole = dataclasses.replace(whole, axes=())
    return [cut(whole, v.aval) for v in eqn.outvars]


def resized(flow: Flow, eqn: Eqn) -> Flow:
    """Return the flow of a value that is smaller than the operands, so that it may be a vector."""
    out = eqn.outvars[0].aval if eqn.outvars else eqn.invars[0].aval
    smaller = max((_size(v.aval) for v in eqn.invars), default=0) > _size(out)
    return dataclasses.replace(flow, matrix=is_matrix(out.shape)) if smaller else flow


def _met(f: Flow, at: int, flows: Sequence[Flow], avals: Sequence[Aval], size: int) -> Flow:
    """Return the flow of an operand where it meets the others: parameters may become a shift."""
    others = [(o, a) for i, (o, a) in enumerate(zip(flows, avals, strict=True)) if i != at]
    moving = [(o, a) for o, a in others if o.moving]
    if f.moving or not moving:
        return f
    activation = any(not o.spread and _size(a) == size and o.ways - {RAW} for o, a in moving)
    if f.matrix and not activation:
        return f
    own = f.matrix and not f.spread and _size(avals[at]) == size
    return dataclasses.replace(f, weights=RAW, shifts=f.weights if own else RAW)


def _size(aval: Aval) -> int:
    return math.prod(getattr(aval, "shape", ()))
