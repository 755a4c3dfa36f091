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
from collections.abc import Sequence
from typing import Any

import jax

from lora_jax.base import Base
from lora_jax.bases.held import Dense
from lora_jax.named import Ins, Names, without
from lora_jax.primitives import jaxprs
from lora_jax.primitives.adapted_weight import AdaptedWeight
from lora_jax.primitives.evaluator import Evaluator
from lora_jax.updates.recorder import Recorder, Use


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
        self.record(v, update.meets(eqn.primitive.name, jaxprs.where(eqn), stack, inputs, outputs))
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
        met = update.meets("gather", jaxprs.where(eqn), (), tuple(gone), tuple(rest))
        after: Any = out.update
        after = dataclasses.replace(after, lookup=met)
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
