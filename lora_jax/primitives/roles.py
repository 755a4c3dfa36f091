"""The uses that a traced function makes of each parameter, with the roles of its axes.

The program is evaluated with an update in place of each parameter that adds nothing. At each
operation that consumes the parameter, the update records which of its axes has which role:

    dot_general    contracted -> input     batch -> stack      free -> output
    convolution    window and channels in -> input             channels out -> output
    gather         the looked-up axis -> input                 the row -> output
    ragged_dot     contracted -> input     group -> stack      free -> output

So the same rules run a low-rank update and find the roles.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax

from lora_jax.base import is_base
from lora_jax.bases.weight import Dense
from lora_jax.primitives import jaxprs
from lora_jax.primitives.adapted_weight import AdaptedWeight, Ins
from lora_jax.primitives.evaluator import Evaluator
from lora_jax.updates.named import Names, without
from lora_jax.updates.recorder import Recorder, Use


class Recording(Evaluator):
    """The evaluator that finds the roles. The values that it computes are not used."""

    def __init__(self, paths: Sequence[str]) -> None:
        super().__init__()
        self.uses: dict[str, dict[Use, None]] = {path: {} for path in paths}  # ordered sets

    def record(self, v: Any, met: Use) -> None:
        """Add the use to each of the weight's parameters."""
        if not (met.stack or met.inputs or met.outputs):  # a bias of a scanned layer
            met = dataclasses.replace(met, stack=v.update.stacked)
        for path in v.update.paths:
            self.uses[path].setdefault(met.of(path))

    def consume(self, eqn: Any, v: Any, stack: Names, inputs: Names, outputs: Names) -> int:
        kind, where = eqn.primitive.name, jaxprs.where(eqn)
        self.record(v, v.update.meets(kind, where, stack, inputs, outputs))
        return 0

    def lost(self, v: AdaptedWeight, names: Names, how: str, into: Names = ()) -> AdaptedWeight:
        update, atoms = v.update, v.update.of(names)
        if into:
            change = {"atoms": (*update.atoms, *((n, atoms) for n in into))}
            change["picked"] = update.picked | atoms
        elif how == "summed":
            change = {"summed": update.summed | atoms}
        else:
            change = {"stacked": update.stacked | atoms}
        return dataclasses.replace(v, update=dataclasses.replace(update, **change))

    def apply(self, eqn: Any, ins: Ins) -> Sequence[Any]:
        name = eqn.primitive.name
        if name in ("mul", "div") and _weights(ins) == 2:
            ins = self._without_factor(eqn, ins)
        if name not in REARRANGE and (name, _weights(ins)) != ("dot_general", 1):
            ins = [self._settled(v) for v in ins]
        if name == "dot_general" and _weights(ins) == 2:
            ins = self._with_left_alone(eqn, *ins)
        if not _weights(ins):
            return jaxprs.run_one(eqn, ins)
        if name == "concatenate" and _weights(ins) < len(ins):
            return self.opaque(eqn, ins)  # a weight is concatenated with an activation
        outs = super().apply(eqn, ins)
        if name in ("gather", "squeeze"):
            outs = [self._maybe_rows(eqn, ins[0], out) for out in outs]
        return outs

    def _without_factor(self, eqn: Any, ins: Ins) -> Ins:
        """Treat the parameter with fewer axes, in a product of two, as a factor of the other."""
        axes = [sum(v.size(n) > 1 and bool(v.update.of((n,))) for n in v.names) for v in ins]
        if axes[0] == axes[1]:
            return ins
        small = axes.index(min(axes))
        self.record(ins[small], Use(eqn.primitive.name, jaxprs.where(eqn)))
        return [v.merged() if i == small else v for i, v in enumerate(ins)]

    def _with_left_alone(self, eqn: Any, left: Any, right: Any) -> Ins:
        """Record the roles of both weights; `adapt` refuses if both turn out to be adapted."""
        (_, contract), (_, batch) = eqn.params["dimension_numbers"]
        stack, inputs = right.names_at(batch), right.names_at(contract)
        self.consume(eqn, right, stack, inputs, without(right.names, (*stack, *inputs)))
        return [left, right.merged()]

    def _settled(self, v: Any) -> Any:
        """Return a looked-up row as a plain value: the next operation does not take weights."""
        if not isinstance(v, AdaptedWeight) or v.update.lookup is None:
            return v
        self.record(v, v.update.lookup)
        return v.merged()

    def _maybe_rows(self, eqn: Any, v: Any, out: Any) -> Any:
        """Treat a part of a parameter with one axis left as a row, until a product contracts it."""
        if not isinstance(v, AdaptedWeight) or not isinstance(out, AdaptedWeight):
            return out
        known = [n for n in v.names if v.update.of((n,))]
        rest = tuple(n for n in known if n in out.names)
        if len(rest) != 1 or rest == tuple(known) or v.update.lookup is not None:
            return out
        met = v.update.meets("gather", jaxprs.where(eqn), (), without(tuple(known), rest), rest)
        return dataclasses.replace(out, update=dataclasses.replace(out.update, lookup=met))

    def opaque(self, eqn: Any, ins: list[Any]) -> Sequence[Any]:
        """Run an operation without a low-rank rule, and follow a weight that keeps its shape."""
        arrays, name = [self.plain(eqn, v) for v in ins], jaxprs.operand_name(eqn)
        behind = [
            dataclasses.replace(v, update=dataclasses.replace(v.update, barrier=name))
            if isinstance(v, AdaptedWeight)
            else v
            for v in ins
        ]
        if eqn.primitive.name == "custom_vjp_call":  # entered only to find the axes
            return [self.plain(eqn, out) for out in self.evaluate(jaxprs.called(eqn), behind)]
        outs = jaxprs.run_one(eqn, arrays)
        if _weights(ins) != 1:
            return outs
        (v,) = (v for v in behind if isinstance(v, AdaptedWeight))
        same = [getattr(out, "shape", None) == v.shape for out in outs]
        return [
            dataclasses.replace(v, weight=Dense(out)) if follows else out
            for out, follows in zip(outs, same, strict=True)
        ]

    def plain(self, eqn: Any, value: Any) -> Any:
        value = self._settled(value)
        if not isinstance(value, AdaptedWeight):
            return value
        kind = "return" if eqn is None else eqn.primitive.name
        self.record(value, Use(kind, jaxprs.where(eqn), barrier=kind))
        return value.merged()


REARRANGE = (  # a row that was looked up may still be a part of a weight after these
    *("convert_element_type", "transpose", "reshape", "squeeze", "broadcast_in_dim", "copy"),
    *("sharding_constraint", "slice", "stop_gradient", "name", *jaxprs.CALLS),
)


def _weights(ins: Ins) -> int:
    return sum(isinstance(v, AdaptedWeight) for v in ins)


def uses(traced: jaxprs.TracedCall) -> dict[str, tuple[Use, ...]]:
    """Return the uses of every parameter of a traced call, in the order of the program."""
    recording = Recording(traced.param_paths)

    def weight(path: str, w: Any) -> AdaptedWeight:
        names = recording.fresh(w.ndim)
        atoms = tuple((n, frozenset(((path, axis),))) for axis, n in enumerate(names))
        return AdaptedWeight(Dense(w), Recorder(frozenset((path,)), atoms), names, path, True)

    jax.eval_shape(lambda *ins: recording.run(traced, ins, weight), *traced.avals)
    return {path: tuple(found) for path, found in recording.uses.items()}


def dequantised(traced: jaxprs.TracedCall) -> dict[str, str]:
    """Return the bases that some operation takes as one float array: path -> first such operation.

    The call is evaluated as by `lora_jax.adapt` without any adapter.
    """
    evaluator = Evaluator()
    if any(map(is_base, traced.inputs)):
        jax.eval_shape(lambda *ins: evaluator.run(traced, ins, evaluator.frozen), *traced.inputs)
    return evaluator.dequantised
