"""What a value of a program depends on: the parameters in it, and the products on the way to it.

Two questions about "all-linear" are answered by it:

- Which parameter is an **output head**? Its product feeds no other parameter's product, and it is
  the last product on every path to some output. Paths start at arguments of a floating dtype and
  end in integers and predicates; a product ends all paths into it and starts a new one. A path
  from an argument that has passed no product counts, where it meets others, only in a sum of equal
  shapes: that is a residual, `h + down(h)`. Elsewhere it is a mask, or the target of a loss.
- Which parameters are **kernels** at all? Those from which an operand of some product is computed,
  alone, with other parameters or with arguments, through any operations. A bias, or a gain, of an
  activation is not one: the activation spans the whole result, and comes from a product itself.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import jax.numpy as jnp

from lora_jax.primitives.evaluator import Primitive
from lora_jax.primitives.jaxprs import Aval, Eqn

Paths = frozenset[str]
RAW: Paths = frozenset()  # the way from an argument, before any product
ROWS: Paths = frozenset(("\0rows",))  # the way from a lookup


@dataclasses.dataclass(frozen=True)
class Flow:
    """The facts about one value of the program.

    weights: the parameters that it is computed from. If it moves, those that arguments changed.
    moving: whether it depends on an argument that is not a parameter.
    ways: for each way to it, the parameters of the last product on that way.
    spread: whether all of its moving inputs have been broadcast.
    matrix: whether it has two axes or more, not counting those of size 1 and the broadcast ones.
    """

    weights: Paths = frozenset()
    moving: bool = False
    ways: frozenset[Paths] = frozenset()
    spread: bool = False
    matrix: bool = False


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
    return Flow(weights, bool(moving), ways, all(f.spread for f in moving) and bool(moving), matrix)


def step(eqn: Eqn, known: Primitive, flows: Sequence[Flow]) -> list[Flow]:
    """Return the flows of the outputs of an equation that is neither a product nor a lookup."""
    if known.each:
        return list(flows)
    avals = [v.aval for v in eqn.invars]
    if known.picks:
        flows, avals = flows[1:], avals[1:]
    out = eqn.outvars[0].aval if eqn.outvars else avals[0]
    size, grown = _size(out), known.view and _size(out) > _size(avals[0])
    if grown:
        flows = [dataclasses.replace(f, spread=True) for f in flows]
    kept = [
        f if f.moving or not _is_shift(f, i, flows, avals, size)
        else dataclasses.replace(f, weights=RAW)
        for i, f in enumerate(flows)
    ]  # fmt: skip
    whole = resized(join(kept, known.residual and not any(f.spread for f in flows)), eqn)
    return [cut(whole, v.aval) for v in eqn.outvars]


def resized(flow: Flow, eqn: Eqn) -> Flow:
    """Return the flow of a value that is smaller than the operands, so that it may be a vector."""
    out = eqn.outvars[0].aval if eqn.outvars else eqn.invars[0].aval
    smaller = max((_size(v.aval) for v in eqn.invars), default=0) > _size(out)
    return dataclasses.replace(flow, matrix=is_matrix(out.shape)) if smaller else flow


def _is_shift(f: Flow, at: int, flows: Sequence[Flow], avals: Sequence[Aval], size: int) -> bool:
    """Return whether parameters meet an activation here, or are vectors that meet arguments."""
    others = [(o, a) for i, (o, a) in enumerate(zip(flows, avals, strict=True)) if i != at]
    moving = [(o, a) for o, a in others if o.moving]
    whole = (not o.spread and _size(a) == size and o.ways - {RAW} for o, a in moving)
    return bool(moving) and (not f.matrix or any(whole))


def _size(aval: Aval) -> int:
    return math.prod(getattr(aval, "shape", ()))
