"""An adapted weight on its way through a program (W and its update), and a use that it meets."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax

from lora_jax.bases.weight import Absent, Deferred, Weight, shaped
from lora_jax.errors import LoraError
from lora_jax.updates.named import Named, Names
from lora_jax.updates.update import Zero, layers, selected

UNKNOWN = "unknown"  # the role of an axis while the roles are being found
Ins = list[Any]  # the inputs of one equation: arrays and adapted weights
Outs = list[Any] | None  # None: the rule does not apply


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class AdaptedWeight:
    """The value that stands for `W + update` in a program.

    Every axis of W has a name, and the arrays of the update that have the same axis have the same
    name for it. So an operation on an axis of W is applied to every array with that name.

    weight: W, an array or a base that is dequantised where it is used.
    update: the `Update` that is added to it.
    names: the names of W's axes.
    path: the path of W in the parameter tree.
    fold: whether `W + update` may be formed.
    """

    weight: Weight
    update: Any
    names: Names = dataclasses.field(metadata={"static": True})
    path: str = dataclasses.field(metadata={"static": True})
    fold: bool = dataclasses.field(metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.weight.shape)

    def size(self, name: int) -> int:
        return self.shape[self.names.index(name)]

    def names_at(self, dims: Any) -> Names:
        return tuple(self.names[i] for i in dims)

    def map(self, fn: Callable[..., Named], *operands: Any, along: Names = ()) -> AdaptedWeight:
        """Apply `fn` to W and to each array of the update.

        If `fn` slices, `along` names the only axes that it touches. If these are stack axes of a
        quantised base, the base is sliced without being dequantised.
        """
        return dataclasses.replace(
            self.map_w(fn, *operands, along=along), update=self.update.map(fn, *operands)
        )

    def map_w(self, fn: Callable[..., Named], *operands: Any, along: Names = ()) -> AdaptedWeight:
        """Apply `fn` to W only, and keep the update."""
        weight, names = self.weight.move(self.names, fn, *operands, along=along)
        return dataclasses.replace(self, weight=weight, names=names)

    def admits(self, stack: Names, inputs: Names, outputs: Names) -> bool:
        """Return whether these axes have these roles, or none."""
        groups = (("stack", stack), ("input", inputs), ("output", outputs))
        role = self.update.role
        return all(role(n) in (None, UNKNOWN, own) for own, names in groups for n in names)

    def picks_parts(self, taken: Names, rest: Names) -> bool:
        """Return whether indexing the axes `taken` picks parts of W (or else looks up rows)."""
        if type(self.update) is Zero:
            return len(rest) > 1
        roles = {self.update.role(n) for n in taken}
        row = roles == {"input"} and all(self.update.role(n) in ("output", None) for n in rest)
        return UNKNOWN in roles or (len(roles) == 1 and not row)

    def selected(self) -> AdaptedWeight:
        """Return the weight with the one adapter that was selected for it."""
        update = selected(self.update)
        return self if update is self.update else dataclasses.replace(self, update=update)

    def check_needs_no_input(self, where: str) -> None:
        """Raise `LoraError` if the update depends on the operand that W is multiplied with."""
        for update in layers(self.update):
            if update.needs_input:
                raise LoraError(f"{self.path!r}: {where}, {update.needs_input}")

    def merged(self) -> jax.Array:
        """Return `W + update` as a plain array in W's dtype; only folds and single rows need it."""
        self.check_needs_no_input("W + scale * a @ b itself is asked for")
        names = self.names
        return self.weight.use(lambda w, update: update.merged(Named(w, names)), self.update)

    def tangents(self, tangent: AdaptedWeight) -> list[AdaptedWeight]:
        """Return the derivative of the weight, as weights whose sum it is."""
        none = Absent(shaped(self.weight))
        dw = none if isinstance(self.weight, Deferred) else tangent.weight  # codes have no tangent
        parts = self.update.tangents(self.weight, dw, tangent.update, none)
        return [dataclasses.replace(self, weight=w, update=update) for w, update in parts]


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


Value = jax.Array | AdaptedWeight
