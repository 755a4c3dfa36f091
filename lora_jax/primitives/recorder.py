"""An update that adds nothing and records which parameter axes the axes of W come from."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

import jax

from lora_jax.primitives.adapted_weight import UNKNOWN
from lora_jax.primitives.flow import NONE, Atoms, Flow, join
from lora_jax.updates.named import Named, Names
from lora_jax.updates.update import Segment, Update, Zero


@dataclasses.dataclass(frozen=True)
class Use:
    """One operation that consumes a parameter.

    An operation consumes all the parameters that a weight is made of. Until `of` asks for the use
    of one of them, the axes are atoms.

    kind, where: the name of the operation, and its place in the program.
    stack, inputs, outputs: the parameter's own axes. If the operation has no low-rank rule, only
      stack is known.
    barrier: the name of an operation without a low-rank rule between the parameter and this use, or
      of this use itself. Such a use exists only in merged form.
    lookup, general: what is known of the operation (`evaluator.Primitive`).
    """

    kind: str
    where: str
    stack: Any = ()
    inputs: Any = ()
    outputs: Any = ()
    barrier: str | None = None
    lookup: bool = False
    general: bool = False

    def of(self, path: str) -> Use:
        def own(atoms: Any) -> tuple[int, ...]:
            return tuple(sorted(axis for p, axis in atoms if p == path))

        return dataclasses.replace(
            self, stack=own(self.stack), inputs=own(self.inputs), outputs=own(self.outputs)
        )

    def covers(self, shape: tuple[int, ...]) -> bool:
        """Return whether each axis of the parameter has exactly one role."""
        return sorted((*self.stack, *self.inputs, *self.outputs)) == list(range(len(shape)))

    @property
    def has_axes(self) -> bool:
        return bool(self.inputs) and bool(self.outputs)

    @property
    def is_product(self) -> bool:
        return self.has_axes and not self.lookup


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
