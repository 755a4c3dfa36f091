"""An adapted weight on its way through a program: W beside its update, never their sum."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax

from lora_jax.bases.held import Absent, Deferred
from lora_jax.named import Named, Names

Ins = list[Any]  # of one equation, adapted weights among them
Outs = list[Any] | None  # None: the rule does not apply
PrimitiveRule = Callable[[Any, Any, Ins], Outs]  # (evaluator, eqn, ins)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class AdaptedWeight:
    """The value that stands for `W + update` in a program.

    Every axis of W has a name, and the arrays of the update that have the same axis have the same
    name for it. So what an operation does to an axis of W, it does to each array with that name.

    held: W, an array or a base that is dequantised where it is used (`held.py`).
    update: what is added to it, an `Update`.
    names: of W's axes.
    path: of W in the parameter tree; fold: whether `W + update` may be formed.
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
        """`fn` of W and of each array of the update.

        `along`: the axes that `fn` touches, where it slices them; a quantised base is then
        sliced as it is if these are its stack.
        """
        return dataclasses.replace(
            self.map_w(fn, *operands, along=along), update=self.update.map(fn, *operands)
        )

    def map_w(self, fn: Callable[..., Named], *operands: Any, along: Names = ()) -> AdaptedWeight:
        """`fn` of W alone, the update being as it was."""
        held, names = self.held.move(self.names, fn, *operands, along=along)
        return dataclasses.replace(self, held=held, names=names)

    def lost(self, names: Names, how: str, into: Names = ()) -> AdaptedWeight:
        """See `Update.lost`."""
        return dataclasses.replace(self, update=self.update.lost(names, how, into))

    def chosen(self) -> AdaptedWeight:
        """The weight with the one adapter that was chosen for it."""
        return dataclasses.replace(self, update=self.update.chosen())

    def merged(self) -> Any:
        """`W + update` as a plain array in W's dtype; only folds and single rows need it."""
        self.update.check_linear(self.path, "W + scale * a @ b itself is asked for")
        names = self.names
        return self.held.use(lambda w, update: update.merged(Named(w, names)), self.update)

    def derivatives(self, tangent: AdaptedWeight) -> list[AdaptedWeight]:
        """The derivative of the weight, as weights whose sum it is."""
        none = Absent(self.shape, self.held.dtype)
        dw = none if isinstance(self.held, Deferred) else tangent.held  # codes do not move
        parts = self.update.derivatives(self.held, dw, tangent.update, none)
        return [dataclasses.replace(self, held=w, update=update) for w, update in parts]
