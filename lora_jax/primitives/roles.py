"""How a traced function uses each parameter: which axes are stacked, input and output.

The program is evaluated with an update in each parameter's place that adds nothing and writes
down, at each operation that consumes it, which of the parameter's axes met which role:

    dot_general    contracted -> input     batch -> stack      free -> output
    convolution    window and channels in -> input             channels out -> output
    gather         the looked-up axis -> input                 the row -> output
    ragged_dot     contracted -> input     group -> stack      free -> output

So the rules that run a low-rank update are the ones that find the roles.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

import jax

from lora_jax.base import Base
from lora_jax.primitives import jaxprs
from lora_jax.primitives.adapted_weight import AdaptedWeight
from lora_jax.primitives.evaluator import Evaluator
from lora_jax.primitives.held import Dense
from lora_jax.primitives.named import Ins, Named, Names, without
from lora_jax.primitives.update import Part, Update, Zero

Atom = tuple[str, int]  # an axis of a parameter: its path and its number
Atoms = frozenset[Atom]
NONE: Atoms = frozenset()
PRODUCTS = ("conv_general_dilated", "ragged_dot_general", "dot_general", "custom_vjp_call")


@dataclasses.dataclass(frozen=True)
class Use:
    """One operation that consumes a parameter.

    stack, inputs, outputs are the parameter's own axes; where the operation has no low-rank rule,
    only stack is known. `barrier` names an operation with no low-rank rule between the parameter
    and this use (or this use itself); such a use exists only in merged form.

    An operation consumes all the parameters that a weight is made of; until it is asked for the
    use `of` one of them, the axes are atoms.
    """

    kind: str
    where: str
    stack: Any = ()
    inputs: Any = ()
    outputs: Any = ()
    barrier: str | None = None

    def of(self, path: str) -> Use:
        def own(atoms: Any) -> tuple[int, ...]:
            return tuple(sorted(axis for p, axis in atoms if p == path))

        roles = own(self.stack), own(self.inputs), own(self.outputs)
        return Use(self.kind, self.where, *roles, self.barrier)

    @property
    def is_product(self) -> bool:
        return self.kind in PRODUCTS and bool(self.inputs) and bool(self.outputs)

    @property
    def has_axes(self) -> bool:
        return self.kind in (*PRODUCTS, "gather") and bool(self.inputs) and bool(self.outputs)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Recorder(Zero):
    """An update that adds nothing, and knows which axes of which parameters each name stands for.

    atoms: of each name. stacked, summed: those of axes that W has lost. barrier: the operation
    without a rule that W has passed. lookup: the roles as of a lookup, where W may be its rows.
    factors: axes of which each set must be of one factor, because W was multiplied along them.
    picked: axes in whose place there are those of an index.
    """

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
        return "unknown" if self.of((name,)) else None

    def admits(self, stack: Names, inputs: Names, outputs: Names) -> bool:
        del stack, inputs, outputs
        return True

    def chooses(self, taken: Names, rest: Names) -> bool:
        del taken, rest
        return True

    def times(self, factor: Named) -> Update | None:
        """Only by a factor that is the same along some axis of the parameter: not an activation."""
        along = [n for n in factor.names if factor.size(n) > 1]
        real = [n for n, atoms in self.atoms if atoms and n in factor.names]
        if along and all(n in along for n in real):
            return None
        return dataclasses.replace(self, factors=(*self.factors, self.of(along)))

    def regroup(self, old: Names, units: Names, new: dict[int, int]) -> Update | None:
        atoms = self.of((*old, *units))
        return dataclasses.replace(self, atoms=(*self.atoms, *((n, atoms) for n in new)))

    def renamed(self, new: dict[int, int]) -> Update:
        atoms = tuple((new.get(n, n), found) for n, found in self.atoms)
        return dataclasses.replace(self, atoms=atoms)

    def join(self, parts: Sequence[Part], name: int, size: int) -> Update | None:
        del name, size
        every = [p.update for p in parts]
        names = dict.fromkeys(n for u in every for n, _ in u.atoms)
        union = lambda which: NONE.union(*(getattr(u, which) for u in every))  # noqa: E731
        return Recorder(
            frozenset().union(*(u.paths for u in every)),
            tuple((n, NONE.union(*(u.of((n,)) for u in every))) for n in names),
            union("stacked"),
            union("summed"),
            next((u.barrier for u in every if u.barrier), None),
            None,
            tuple(f for u in every for f in u.factors),
            union("picked"),
        )

    def lost(self, names: Names, how: str, into: Names = ()) -> Update:
        atoms = self.of(names)
        if into:
            more = tuple((n, atoms) for n in into)
            picked = self.picked | atoms
            return dataclasses.replace(self, atoms=(*self.atoms, *more), picked=picked)
        if how == "summed":
            return dataclasses.replace(self, summed=self.summed | atoms)
        return dataclasses.replace(self, stacked=self.stacked | atoms)

    def meets(self, eqn: Any, stack: Names, inputs: Names, outputs: Names) -> Use:
        """The use that an operation makes of the weight, these axes having these roles."""
        s, i = self.stacked | self.of(stack), self.of(inputs)
        o = self.summed | self.of(outputs)
        i, o = i - (s & self.picked), o - (s & self.picked)
        barrier = self.barrier
        if (s & i) or (s & o) or (i & o):
            s = i = o = NONE
        elif any(f & i and f & o for f in self.factors):
            barrier = "mul"
        return Use(eqn.primitive.name, jaxprs.where(eqn), s, i, o, barrier)


class Recording(Evaluator):
    """The evaluator that finds the roles; nothing that it computes is used."""

    def __init__(self, paths: Sequence[str]) -> None:
        super().__init__()
        self.uses: dict[str, dict[Use, None]] = {path: {} for path in paths}  # ordered sets

    def record(self, v: AdaptedWeight, met: Use) -> None:
        """Add the use to each of the weight's parameters."""
        update: Any = v.update
        if not (met.stack or met.inputs or met.outputs):  # a bias of a scanned layer
            met = dataclasses.replace(met, stack=update.stacked)
        for path in update.paths:
            self.uses[path].setdefault(met.of(path))

    def consume(
        self, eqn: Any, v: AdaptedWeight, stack: Names, inputs: Names, outputs: Names
    ) -> int:
        update: Any = v.update
        self.record(v, update.meets(eqn, stack, inputs, outputs))
        return 0

    def apply(self, eqn: Any, ins: list[Any]) -> Sequence[Any]:
        if eqn.primitive.name in ("mul", "div"):
            ins = self._without_factor(eqn, ins)
        if not self._goes_on(eqn, ins):
            ins = [self._settled(v) for v in ins]
            if not any(isinstance(v, AdaptedWeight) for v in ins):
                return jaxprs.run_one(eqn, ins)
        outs = super().apply(eqn, ins)
        if eqn.primitive.name in ("gather", "squeeze"):
            outs = [self._maybe_rows(eqn, ins[0], out) for out in outs]
        return outs

    def _without_factor(self, eqn: Any, ins: Ins) -> Ins:
        """A product of two parameters, of which the one with fewer axes scales the other."""
        if not all(isinstance(v, AdaptedWeight) for v in ins):
            return ins
        axes = [sum(v.size(n) > 1 and bool(v.update.of((n,))) for n in v.names) for v in ins]
        if axes[0] == axes[1]:
            return ins
        small = axes.index(min(axes))
        self.record(ins[small], Use(eqn.primitive.name, jaxprs.where(eqn)))
        return [v.merged() if i == small else v for i, v in enumerate(ins)]

    def _goes_on(self, eqn: Any, ins: Ins) -> bool:
        """Whether a row that was looked up may still be a part of a weight after this."""
        weights = [v for v in ins if isinstance(v, AdaptedWeight)]
        name = eqn.primitive.name
        return name in REARRANGE or (name == "dot_general" and len(weights) == 1)

    def _settled(self, v: Any) -> Any:
        """A looked-up row that goes on into something that no weight goes into: it is a value."""
        update: Any = v.update if isinstance(v, AdaptedWeight) else None
        if update is None or update.lookup is None:
            return v
        self.record(v, update.lookup)
        return v.merged()

    def _maybe_rows(self, eqn: Any, v: Any, out: Any) -> Any:
        """A part of a parameter with one axis left is a row, until a product contracts it."""
        if not isinstance(v, AdaptedWeight) or not isinstance(out, AdaptedWeight):
            return out
        update: Any = v.update
        rest = [n for n in out.names if n in v.names and update.of((n,))]
        gone = [n for n in v.names if n not in out.names and update.of((n,))]
        if len(rest) != 1 or not gone or update.lookup is not None:
            return out
        met = update.meets(eqn, (), tuple(gone), tuple(rest))
        after: Any = out.update
        after = dataclasses.replace(after, lookup=dataclasses.replace(met, kind="gather"))
        return dataclasses.replace(out, update=after)

    def opaque(self, eqn: Any, ins: list[Any]) -> Sequence[Any]:
        """An operation with no low-rank rule; a weight is followed on where it keeps its shape."""
        weights = [v for v in ins if isinstance(v, AdaptedWeight)]
        kind, name = eqn.primitive.name, jaxprs.operand_name(eqn)
        for v in weights:
            self.record(v, Use(kind, jaxprs.where(eqn), barrier=kind))
        if kind == "custom_vjp_call":  # entered to find the axes only
            behind = [_behind(v, name) for v in ins]
            jaxpr, consts = jaxprs.opened(eqn.params["call_jaxpr"])
            return [self._array(o) for o in self.evaluate(jaxpr, consts, behind)]
        outs = jaxprs.run_one(eqn, [self._array(v) for v in ins])
        if len(weights) != 1:
            return outs
        (v,) = weights
        return [
            dataclasses.replace(_behind(v, name), held=Dense(out))
            if getattr(out, "shape", None) == v.shape
            else out
            for out in outs
        ]

    def plain(self, eqn: Any, value: Any) -> Any:
        if isinstance(value, AdaptedWeight):
            value = self._settled(value)
        if isinstance(value, AdaptedWeight):
            kind = eqn.primitive.name
            self.record(value, Use(kind, jaxprs.where(eqn), barrier=kind))
        return self._array(value)

    def returned(self, value: Any) -> Any:
        value = self._settled(value)
        if isinstance(value, AdaptedWeight):
            self.record(value, Use("return", "the end of the function", barrier="return"))
        return self._array(value)

    def joins(self, ins: Ins) -> bool:
        return all(isinstance(v, AdaptedWeight) for v in ins)  # not one with an activation

    def with_one_weight(self, eqn: Any, ins: Ins) -> Any:
        """Both weights' roles are written down; `adapt` refuses if both turn out to be adapted."""
        if not all(isinstance(v, AdaptedWeight) for v in ins):
            return ins
        (_, contract), (_, batch) = eqn.params["dimension_numbers"]
        v = ins[1]
        stack, inputs = v.names_at(batch), v.names_at(contract)
        self.consume(eqn, v, stack, inputs, without(v.names, (*stack, *inputs)))
        return [ins[0], v.merged()]

    @staticmethod
    def _array(value: Any) -> Any:
        return value.merged() if isinstance(value, AdaptedWeight) else value


REARRANGE = (
    *("convert_element_type", "transpose", "reshape", "squeeze", "broadcast_in_dim", "copy"),
    *("sharding_constraint", "slice", "stop_gradient", "name", *jaxprs.CALLS),
)


def _behind(v: Any, barrier: str) -> Any:
    """The weight, behind an operation that has no rule."""
    if not isinstance(v, AdaptedWeight):
        return v
    update: Any = v.update
    return dataclasses.replace(v, update=dataclasses.replace(update, barrier=barrier))


def uses(traced: jaxprs.TracedCall) -> dict[str, tuple[Use, ...]]:
    """The uses of every parameter of a traced call, in the order of the program."""
    recording = Recording(traced.param_paths)

    def run(*ins: Any) -> list[Any]:
        values = list(ins)
        for i, path in enumerate(traced.param_paths):
            names = recording.fresh(ins[i].ndim)
            atoms = tuple((n, frozenset(((path, axis),))) for axis, n in enumerate(names))
            update = Recorder(frozenset((path,)), atoms)
            values[i] = AdaptedWeight(Dense(ins[i]), update, names, path, True)
        outs = recording.evaluate(traced.jaxpr, traced.consts, values)
        return [recording.returned(out) for out in outs]

    jax.eval_shape(run, *traced.avals)
    return {path: tuple(found) for path, found in recording.uses.items()}


def dequantised(traced: jaxprs.TracedCall) -> dict[str, str]:
    """Where an operation takes a base as one float array: its path, and the first such operation.

    The call is evaluated as `lora_jax.adapt` does it where nothing is adapted.
    """
    evaluator = Evaluator()

    def run(*ins: Any) -> list[Any]:
        values = list(ins)
        for i, path in enumerate(traced.param_paths):
            if isinstance(ins[i], Base):
                values[i] = AdaptedWeight.frozen(path, ins[i], evaluator.fresh(ins[i].ndim))
        outs = evaluator.evaluate(traced.jaxpr, traced.consts, values)
        return [evaluator.returned(out) for out in outs]

    if any(isinstance(x, Base) for x in traced.inputs):
        jax.eval_shape(run, *traced.inputs)
    return evaluator.dequantised
