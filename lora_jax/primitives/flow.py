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
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from lora_jax.primitives.adapted_weight import UNKNOWN, AdaptedWeight, Use
from lora_jax.primitives.evaluator import Primitive
from lora_jax.primitives.jaxprs import Aval, Eqn, operand_name, read, reshape_groups
from lora_jax.updates.named import Named, Names
from lora_jax.updates.update import Segment, Update, Zero

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


def parameter(path: str, shape: Sequence[int]) -> Flow:
    return Flow(frozenset((path,)), matrix=is_matrix(shape))


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


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Datum:
    """An array of the program under analysis, and what it depends on."""

    array: jax.Array
    flow: Flow = dataclasses.field(metadata={"static": True})


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Recorder(Zero):
    """An update that adds nothing and knows which parameter axes each name stands for.

    flow: what W depends on.
    paths: the parameters that W is made of.
    atoms: the atoms of each name.
    stacked, summed: the atoms of axes that W has lost.
    barrier: an operation without a rule that W has passed.
    lookup: the roles in a lookup, if W may be rows of a table.
    factors: sets of axes along which W was multiplied. The axes of a set must share one factor.
    picked: the axes that an index replaced with its own.
    """

    flow: Flow = dataclasses.field(metadata={"static": True})
    paths: frozenset[str] = dataclasses.field(metadata={"static": True})
    atoms: tuple[tuple[int, Atoms], ...] = dataclasses.field(metadata={"static": True})
    stacked: Atoms = dataclasses.field(default=NONE, metadata={"static": True})
    summed: Atoms = dataclasses.field(default=NONE, metadata={"static": True})
    barrier: str | None = dataclasses.field(default=None, metadata={"static": True})
    lookup: Any = dataclasses.field(default=None, metadata={"static": True})
    factors: tuple[Atoms, ...] = dataclasses.field(default=(), metadata={"static": True})
    picked: Atoms = dataclasses.field(default=NONE, metadata={"static": True})

    def of(self, names: Iterable[int]) -> Atoms:
        known = dict(self.atoms)
        return NONE.union(*(known.get(n, NONE) for n in names))

    def role(self, name: int) -> str | None:
        return UNKNOWN if self.of((name,)) else None

    def times(self, factor: Named) -> Update | None:
        """Accept a factor along some of the parameter's axes, and constant along another one."""
        along = [n for n in factor.names if factor.size(n) > 1]
        real = [n for n, atoms in self.atoms if atoms and n in factor.names]
        if along and (all(n in along for n in real) or any(n not in real for n in along)):
            return None
        return dataclasses.replace(self, factors=(*self.factors, self.of(along)))

    def join(self, parts: Sequence[Segment], name: int, size: int) -> Update | None:
        every = [p.update for p in parts]
        names = dict.fromkeys(n for u in every for n, _ in u.atoms)
        union = lambda which: NONE.union(*(getattr(u, which) for u in every))  # noqa: E731
        return Recorder(
            join([u.flow for u in every]),
            frozenset().union(*(u.paths for u in every)),
            tuple((n, NONE.union(*(u.of((n,)) for u in every))) for n in names),
            union("stacked"),
            union("summed"),
            next((u.barrier for u in every if u.barrier), None),
            factors=tuple(f for u in every for f in u.factors),
            picked=union("picked"),
        )

    def flow_along(self, names: Names) -> Flow:
        """Return the flow of W, whose axes have these names."""
        own = tuple(self.of((n,)) for n in names)
        every = [own, self.flow.axes] if len(self.flow.axes) == len(own) else [own]
        return dataclasses.replace(self.flow, axes=united(every))

    def lost(
        self,
        axes: Names,
        names: Names,
        how: str,
        into: Names,
        use: Use | None,
        shape: Sequence[int],
    ) -> Recorder:
        """Return the update after W has lost the axes `names`, which leaves `axes` of this shape.

        use: the lookup that takes a slice, if it is one. See `Evaluator.lost` for the others.
        """
        atoms = self.of(names)
        change: dict[str, Any] = {}
        if into:
            change["atoms"] = (*self.atoms, *((n, atoms) for n in into))
            change["picked"] = self.picked | atoms
        else:
            which = "summed" if how == "summed" else "stacked"
            change[which] = getattr(self, which) | atoms
        rest = tuple(n for n in axes if self.of((n,)))
        if use is not None and atoms and len(rest) == 1:
            # The rest is a row, until a product contracts it.
            change["lookup"] = self.lookup or self.meets(use, (), names, rest)
        change["flow"] = dataclasses.replace(self.flow, matrix=is_matrix(shape))
        return dataclasses.replace(self, **change)

    def meets(self, use: Use, stack: Names, inputs: Names, outputs: Names) -> Use:
        """Return the use that an operation makes of the weight, with the roles of these axes."""
        s, i = self.stacked | self.of(stack), self.of(inputs)
        o = self.summed | self.of(outputs)
        i, o = i - (s & self.picked), o - (s & self.picked)
        barrier = self.barrier
        if (s & i) or (s & o) or (i & o):
            s = i = o = NONE
        elif any(f & i and f & o for f in self.factors):
            barrier = "mul"
        return dataclasses.replace(use, stack=s, inputs=i, outputs=o, barrier=barrier)


class Flows:
    """The dependences of all values of a program, and the products and lookups among them.

    kernels, tables, partners: as in `analysis.Findings`.
    fed: the parameters whose product feeds another parameter's product.
    mixed: the output axes that some operation mixes with others.
    """

    def __init__(self) -> None:
        self.kernels: dict[str, str] = {}
        self.tables: dict[str, str] = {}
        self.partners: dict[str, Paths] = {}
        self.fed: Paths = RAW
        self.mixed: Atoms = NONE

    def meet(
        self, eqn: Eqn, known: Primitive, ins: Sequence[Any]
    ) -> tuple[list[Flow], list[Flow], Paths]:
        """Return the flows of the operands and of the outputs, and the unchanged parameters."""
        flows = [flow_of(v) for v in ins]
        pure = RAW.union(*(f.weights for f in flows if not f.moving))
        return flows, self.of(eqn, known, flows), pure

    def run(
        self, eqns: Sequence[Eqn], known: Sequence[Primitive], needed: Any, ins: Sequence[Any]
    ) -> dict[Any, Flow]:
        """Return the flow of each variable that some equations make of the variables `needed`."""
        found = dict(zip(needed, map(flow_of, ins), strict=True))
        for eqn, one in zip(eqns, known, strict=True):
            flows = self.of(eqn, one, read(found, eqn.invars, CONSTANT))
            found.update(zip(eqn.outvars, flows, strict=True))
        return found

    def feed(self, eqn: Eqn, weights: Iterable[str], ways: Iterable[Paths]) -> None:
        """Note a product of these parameters, and the parameters on the ways into it."""
        if new := [path for path in weights if path not in self.kernels]:
            self.kernels.update(dict.fromkeys(new, operand_name(eqn)))
        self.fed = self.fed.union(*ways)

    def of(self, eqn: Eqn, known: Primitive, ins: Sequence[Flow]) -> list[Flow]:
        """Return what the outputs of an equation depend on."""
        if known.operands:
            outs = [self._product(eqn, ins[: known.operands])] * len(eqn.outvars)
        elif known.lookup:
            outs = [self._lookup(eqn, *ins)]
        else:
            outs = step(eqn, known, ins)
        self.mixed = self.mixed.union(*(lost(eqn, ins, out) for out in outs[:1]))
        return [cut(out, v.aval) for out, v in zip(outs, eqn.outvars, strict=True)]

    def _product(self, eqn: Eqn, ins: Sequence[Flow]) -> Flow:
        out = join(ins, residual=False)
        pure = [f.weights for f in ins if f.weights and not f.moving]
        for side in pure:
            others = RAW.union(*(other for other in pure if other is not side))
            for path in side if others else ():
                self.partners[path] = self.partners.get(path, RAW) | others
        axes = multiplied(eqn, [f.axes for f in ins])
        weights = out.weights | (out.shifts if sum(f.moving for f in ins) > 1 else RAW)
        if not weights or not out.moving:
            return dataclasses.replace(out, axes=axes)
        self.feed(eqn, weights, out.ways)
        return Flow(moving=True, ways=frozenset((weights,)), axes=axes, shifts=out.shifts)

    def _lookup(self, eqn: Eqn, rows: Flow, *indices: Flow) -> Flow:
        """Treat rows picked by an argument as values, but matrices picked by one as weights."""
        sizes, dn = eqn.params["slice_sizes"], eqn.params.get("dimension_numbers")
        gone = () if dn is None else (*dn.collapsed_slice_dims, *dn.operand_batching_dims)
        kept = [n for i, n in enumerate(sizes) if n > 1 and i not in gone]
        if rows.moving or not rows.weights or len(kept) > 1 or not any(f.moving for f in indices):
            return resized(rows, eqn)
        for path in rows.weights:
            self.tables.setdefault(path, operand_name(eqn))
        return Flow(moving=True, ways=frozenset((ROWS,)))


def flow_of(value: Any) -> Flow:
    """Return what a value of the program under analysis depends on."""
    if isinstance(value, AdaptedWeight):
        along: Flow = value.update.flow_along(value.names)
        return along
    return value.flow if isinstance(value, Datum) else CONSTANT
