"""The analysis of a traced call: one walk that finds all that `lora_jax.resolve` has to know.

The program is evaluated by the rules that run a low-rank update, with an update in place of each
parameter that adds nothing. At each operation that consumes the parameter, it records which of its
axes has which role:

    dot_general    contracted -> input     batch -> stack      free -> output
    convolution    window and channels in -> input             channels out -> output
    gather         the looked-up axis -> input                 the row -> output
    ragged_dot     contracted -> input     group -> stack      free -> output

The walk also follows what every value depends on (`flow.py`). The arrays are never computed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
from jax import lax

from lora_jax.bases.weight import Deferred, Dense, Weight
from lora_jax.primitives import flow, jaxprs, table
from lora_jax.primitives.adapted_weight import AdaptedWeight, Ins, Use
from lora_jax.primitives.evaluator import UNKNOWN, Evaluator, Primitive
from lora_jax.primitives.flow import RAW, Atoms, Datum, Flow, Flows, Paths, Recorder, flow_of
from lora_jax.primitives.jaxprs import Eqn
from lora_jax.updates.named import Names, without
from lora_jax.updates.update import Update


class Findings(NamedTuple):
    """The facts about the parameters of a traced call.

    uses: the uses of each parameter, in the order of the program.
    kernels, tables: `{path: where}`, the first product of each kernel, and the first lookup of
      each embedding.
    heads: the output heads.
    partners: for each parameter, the parameters that it is multiplied with on the weight side of a
      product.
    members: the output axes of parameters along which the rest of the program is a batch of its
      own: another weight has a slice for each, and no product sums over them.
    dequantised: the bases that some operation takes as one float array, and the first such
      operation.
    """

    uses: dict[str, tuple[Use, ...]]
    kernels: dict[str, str]
    tables: dict[str, str]
    heads: Paths
    partners: dict[str, Paths]
    members: Atoms
    dequantised: dict[str, str]


def analyse(traced: jaxprs.TracedCall) -> Findings:
    """Walk through a traced call; nothing is computed."""
    analysis = Analysis(traced.param_paths)
    heads = RAW

    def run(*ins: Any) -> None:
        nonlocal heads
        n = len(traced.param_paths)
        arguments = [Datum(x, flow.argument(x)) for x in ins[n:]]
        values: Ins = [*map(analysis.weight, traced.param_paths, ins), *arguments]
        outs = [flow_of(analysis.leave(None, out)) for out in analysis.evaluate(traced, values)]
        heads = RAW.union(*(way for out in outs if len(out.ways) == 1 for way in out.ways))

    jax.eval_shape(run, *traced.inputs)
    known = analysis.flows
    return Findings(
        {path: tuple(found) for path, found in analysis.uses.items()},
        known.kernels,
        known.tables,
        (heads - known.fed) & known.kernels.keys(),
        known.partners,
        analysis.batched - known.mixed,
        analysis.dequantised,
    )


class Analysis(Evaluator):
    """The evaluator that finds the roles and the dependences."""

    enters = True

    def __init__(self, paths: Sequence[str]) -> None:
        super().__init__(table.PRIMITIVES)
        self.uses: dict[str, dict[Use, None]] = {path: {} for path in paths}  # ordered sets
        self.flows = Flows()
        self.batched: Atoms = frozenset()  # the output axes that meet an axis of another weight
        self.dequantised: dict[str, str] = {}
        self._eqn: Eqn | None = None  # the present equation, outside of control flow
        self._known = UNKNOWN
        self._flows: list[Flow] = []  # of its operands

    def weight(self, path: str, w: Any) -> AdaptedWeight:
        shape = w.shape
        names = self.fresh(len(shape))
        atoms = tuple((n, frozenset(((path, axis),))) for axis, n in enumerate(names))
        update = Recorder(flow.parameter(path, shape), frozenset((path,)), atoms)
        return AdaptedWeight(Weight.of(w), update, names, path, True)

    # The rules report here.

    def record(self, v: AdaptedWeight, met: Use) -> None:
        """Add the use to each of the weight's parameters."""
        if not (met.stack or met.inputs or met.outputs):  # a bias of a scanned layer
            met = dataclasses.replace(met, stack=v.update.stacked)
        for path in v.update.paths:
            self.uses[path].setdefault(met.of(path))

    def consume(
        self, eqn: Eqn, v: AdaptedWeight, stack: Names, inputs: Names, outputs: Names
    ) -> int:
        known, where = self._known, jaxprs.where(eqn)
        use = Use(eqn.primitive.name, where, lookup=known.lookup, general=known.general)
        met = v.update.meets(use, stack, inputs, outputs)
        if not (v.update.barrier and v.update.flow.moving):
            self.record(v, met)
            return 0
        # It has met an argument. Where it met an activation that spans the result, it is a shift,
        # unless a product with another activation has outputs along it.
        whole = {path for path in v.update.paths if met.of(path).has_axes}
        for path in whole | v.update.flow.weights:
            self.uses[path].setdefault(met.of(path))
        if whole and sum(f.moving for f in self._flows) > 1:
            self.flows.feed(eqn, whole, [way for f in self._flows for way in f.ways])
        return 0

    def renamed(self, update: Any, new: dict[int, int]) -> Update:
        atoms = tuple((new.get(n, n), found) for n, found in update.atoms)
        return dataclasses.replace(update, atoms=atoms)

    def regrouped(self, update: Any, old: Names, units: Names, new: dict[int, int]) -> Update:
        atoms = update.of((*old, *units))
        return dataclasses.replace(update, atoms=(*update.atoms, *((n, atoms) for n in new)))

    def lost(self, v: AdaptedWeight, names: Names, how: str, into: Names = ()) -> AdaptedWeight:
        use: Use | None = None
        if how == "taken" and self._eqn is not None:
            use = Use(self._eqn.primitive.name, jaxprs.where(self._eqn), lookup=True)
        update = v.update.lost(v.names, names, how, into, use, v.weight.shape)
        return dataclasses.replace(v, update=update)

    def dequantise(self, eqn: Eqn | None, v: AdaptedWeight) -> None:
        if isinstance(v.weight, Deferred):
            self.dequantised.setdefault(v.path, jaxprs.operand_name(eqn))

    # One equation.

    def run_plain(
        self, eqns: Sequence[Eqn], known: Sequence[Primitive], needed: Any, kept: Any, ins: Ins
    ) -> list[Any]:
        arrays = jaxprs.run(eqns, needed, kept, [_array(v) for v in ins])
        flows = self.flows.run(eqns, known, needed, ins)
        return [Datum(x, flows[v]) for x, v in zip(arrays, kept, strict=True)]

    def apply(self, eqn: Eqn, known: Primitive, ins: Ins) -> Sequence[Any]:
        if known.body:
            assert known.rule is not None
            return known.rule(self, eqn, [v if known.view else self._settled(v) for v in ins]) or []
        flows, facts, pure = self.flows.meet(eqn, known, ins)
        before = self._eqn, self._known, self._flows
        self._eqn, self._known, self._flows = eqn, known, flows
        if known.general:
            self._meet(eqn, ins, flows)
        outs = self._apply(eqn, known, [_array(v) for v in ins])
        self._eqn, self._known, self._flows = before
        return [self._with(out, one, pure, known) for out, one in zip(outs, facts, strict=True)]

    def _apply(self, eqn: Eqn, known: Primitive, ins: Ins) -> Sequence[Any]:
        if known.scales and _count(ins) == 2:
            ins = self._without_factor(eqn, ins)
        if not known.view and not (known.general and _count(ins) == 1):
            ins = [_array(self._settled(v)) for v in ins]
        if known.general and _count(ins) == 2:
            ins = self._with_left_alone(eqn, *ins)
        if not _count(ins):
            return jaxprs.run_one(eqn, ins)
        if known.joins and _count(ins) < len(ins):  # a weight is joined with an activation
            return self.opaque(eqn, ins)
        return super().apply(eqn, known, ins)

    def _with(self, out: Any, facts: Flow, pure: Paths, known: Primitive) -> Any:
        """Return an output with what it depends on; a weight that its rule followed is itself."""
        if not isinstance(out, AdaptedWeight):
            return Datum(_array(out), facts)
        if out.update.barrier is None and not (known.lookup or known.each):
            weights = out.update.flow.weights | pure
            own = out.update.flow
            facts = dataclasses.replace(facts, weights=weights, moving=own.moving, ways=own.ways)
        return dataclasses.replace(out, update=dataclasses.replace(out.update, flow=facts))

    def _meet(self, eqn: Eqn, ins: Ins, flows: Sequence[Flow]) -> None:
        """Note which output axes of earlier weights are batch axes of a product with a weight."""
        pure = [k for k in (0, 1) if _count(ins[k : k + 1]) and not flows[k].moving]
        if len(pure) != 1 or not flows[1 - pure[0]].axes:
            return
        side, (_, batch) = pure[0], eqn.params["dimension_numbers"]
        for i, j in zip(batch[1 - side], batch[side], strict=True):
            if ins[side].update.of((ins[side].names[j],)):
                self.batched |= flows[1 - side].axes[i]

    def _without_factor(self, eqn: Eqn, ins: Ins) -> Ins:
        """Treat the parameter with fewer axes, in a product of two, as a factor of the other."""
        axes = [sum(v.size(n) > 1 and bool(v.update.of((n,))) for n in v.names) for v in ins]
        if axes[0] == axes[1]:
            return ins
        small = axes.index(min(axes))
        v, kind = ins[small], eqn.primitive.name
        cut = any(v.size(n) == 1 and v.update.of((n,)) for n in v.names)  # a slice of a matrix
        self.record(v, Use(kind, jaxprs.where(eqn), barrier=kind if cut else None))
        return [v.merged() if i == small else v for i, v in enumerate(ins)]

    def _with_left_alone(self, eqn: Eqn, left: AdaptedWeight, right: AdaptedWeight) -> Ins:
        """Record the roles of both weights; `adapt` refuses if both turn out to be adapted."""
        (_, contract), (_, batch) = eqn.params["dimension_numbers"]
        stack, inputs = right.names_at(batch), right.names_at(contract)
        self.consume(eqn, right, stack, inputs, without(right.names, (*stack, *inputs)))
        if isinstance(left.weight, Deferred):
            self.dequantise(eqn, right)
        return [left, right.merged()]

    def _settled(self, v: Any) -> Any:
        """Return a looked-up row as a plain value: the next operation does not take weights."""
        if not isinstance(v, AdaptedWeight) or v.update.lookup is None:
            return v
        self.record(v, v.update.lookup)
        return Datum(v.merged(), v.update.flow)

    def opaque(self, eqn: Eqn, ins: Ins) -> Sequence[Any]:
        """Run an operation without a low-rank rule, and follow a weight that keeps its shape."""
        arrays, name = [self.plain(eqn, v) for v in ins], jaxprs.operand_name(eqn)
        behind = [
            dataclasses.replace(v, update=dataclasses.replace(v.update, barrier=name))
            if isinstance(v, AdaptedWeight)
            else v
            for v in ins
        ]
        if self.primitive(eqn).body:  # it is entered only to find the axes
            return [self.leave(eqn, out) for out in self.evaluate(jaxprs.called(eqn), behind)]
        outs = jaxprs.run_one(eqn, arrays)
        weights = [v for v in behind if isinstance(v, AdaptedWeight)]
        pure = [v for v in weights if not v.update.flow.moving]
        followed = pure if len(pure) == 1 else weights
        if len(followed) != 1:
            return outs
        return [self._grown(followed[0], out) for out in outs]

    def _grown(self, v: AdaptedWeight, out: Any) -> Any:
        """Return the weight as an output of its shape, or of one that it was broadcast to."""
        shape = getattr(out, "shape", ())
        if len(shape) != len(v.shape) or any(
            n not in (1, m) for n, m in zip(v.shape, shape, strict=True)
        ):
            return out
        new = zip(v.names, v.shape, shape, strict=True)
        names = tuple(name if n == m else self.fresh(1)[0] for name, n, m in new)
        return dataclasses.replace(v, weight=Dense(out), names=names)

    def plain(self, eqn: Eqn | None, value: Any) -> Any:
        value = self._settled(value)
        if not isinstance(value, AdaptedWeight):
            return _array(value)
        name = "return" if eqn is None else eqn.primitive.name
        self.record(value, Use(name, jaxprs.where(eqn), barrier=name))
        self.dequantise(eqn, value)
        return value.merged()

    def leave(self, eqn: Eqn | None, value: Any) -> Any:
        return value if isinstance(value, Datum) else Datum(self.plain(eqn, value), flow_of(value))

    # Loops run until their carries hold everything that any iteration may bring.

    def scan(self, body: Callable[..., Any], carry: Any, xs: Any, **how: Any) -> tuple[Any, Any]:
        def first(x: Any) -> Any:
            one = jax.tree.map(_first, x)
            if not isinstance(x, Datum):
                return one
            whole = flow.is_matrix(one.array.shape)
            facts = dataclasses.replace(x.flow, matrix=whole, axes=x.flow.axes[1:])
            return dataclasses.replace(one, flow=facts)

        part = jax.tree.map(first, xs, is_leaf=lambda x: isinstance(x, Datum))
        _, (outs, ys) = _settle(lambda carry: body(carry, part), carry)
        return outs, jax.tree.map(lambda y: lax.broadcast(y, (how["length"],)), ys)

    def while_loop(self, test: Callable[..., Any], body: Callable[..., Any], carry: Any) -> Any:
        carry, _ = _settle(lambda carry: (body(carry), None), carry)
        test(carry)
        return carry

    def branch(self, choose: Callable[..., Any], branches: Sequence[Any], ins: Ins) -> Any:
        return [_joined(outs) for outs in zip(*(run(ins) for run in branches), strict=True)]


def _settle(run: Callable[[Any], Any], carry: list[Datum]) -> tuple[list[Datum], Any]:
    """Return the carries once one more iteration adds nothing to them, and its results."""
    while True:
        outs = run(carry)
        grown = [_joined(pair) for pair in zip(carry, outs[0], strict=True)]
        if [c.flow for c in grown] == [c.flow for c in carry]:
            return carry, outs
        carry = grown


def _joined(data: Sequence[Datum]) -> Datum:
    return Datum(data[0].array, flow.join([one.flow for one in data]))


def _first(x: jax.Array) -> jax.Array:
    return x[0] if x.shape[0] else lax.full_like(x, 0, shape=x.shape[1:])


def _array(value: Any) -> Any:
    return value.array if isinstance(value, Datum) else value


def _count(ins: Ins) -> int:
    return sum(isinstance(v, AdaptedWeight) for v in ins)
