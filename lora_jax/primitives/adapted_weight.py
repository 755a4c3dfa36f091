"""An adapted weight on its way through a program: W and its update, never their sum."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax

from lora_jax.bases.held import Absent, Deferred
from lora_jax.updates.named import Named, Names

Ins = list[Any]  # the inputs of one equation: arrays and adapted weights
Outs = list[Any] | None  # None: the rule does not apply


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class AdaptedWeight:
    """The value that stands for `W + update` in a program.

    Every axis of W has a name, and the arrays of the update that have the same axis have the same
    name for it. So an operation on an axis of W is applied to every array with that name.

    held: W, an array or a base that is dequantised where it is used (`held.py`).
    update: the `Update` that is added to it.
    names: the names of W's axes.
    path: the path of W in the parameter tree.
    fold: whether `W + update` may be formed.
    """

    held: Any
    update: Any
    names: Names = dataclasses.field(metadata={"static": True})
    path: str = dataclasses.field(metadata={"static": True})
    fold: bool = dataclasses.field(metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.held.shape)

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
        held, names = self.held.move(self.names, fn, *operands, along=along)
        return dataclasses.replace(self, held=held, names=names)

    def chosen(self) -> AdaptedWeight:
        """Return the weight with the one adapter that was chosen for it."""
        return dataclasses.replace(self, update=self.update.chosen())

    def merged(self) -> Any:
        """Return `W + update` as a plain array in W's dtype; only folds and single rows need it."""
        self.update.check_linear(self.path, "W + scale * a @ b itself is asked for")
        names = self.names
        return self.held.use(lambda w, update: update.merged(Named(w, names)), self.update)

    def derivatives(self, tangent: AdaptedWeight) -> list[AdaptedWeight]:
        """Return the derivative of the weight, as weights whose sum it is."""
        none = Absent(self.shape, self.held.dtype)
        dw = none if isinstance(self.held, Deferred) else tangent.held  # codes have no tangent
        parts = self.update.derivatives(self.held, dw, tangent.update, none)
        return [dataclasses.replace(self, held=w, update=update) for w, update in parts]


Value = jax.Array | AdaptedWeight
