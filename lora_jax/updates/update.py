"""The protocol of an update: what is added to W, on its way through a program with it."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax import lax

from lora_jax.named import Named, Names


@dataclasses.dataclass(frozen=True)
class Operation:
    """One operation that is linear in W, as its rule hands it to the update.

    x: the other operand, its axes named; where it is multiplied along an axis of W it has that
      axis's name. None: there is no such operand (a lookup).
    out: the names of the result's axes.
    base: `base(x)`, the operation with W itself; x is an array. A product also has
      `base(x, dtype)`, which gives its sums in that dtype, not rounded to that of the program.
    low_rank: `low_rank(y, x, update)` is y plus the operation with `update`, a `LowRank`, in W's
      place, in the form that is fast for this operation; x is named.
    sums: whether it is a product, of which the base may be asked for in another dtype.
    matrix: whether it is the plain product of a matrix, as `x @ w` is.
    spread: makes an array with a stack axis that neither x nor the result has (the group of each
      row in a ragged product) one with the rows instead; None: there is no such axis.
    use: the number of this use of W in the program (`Evaluator.consume`).
    drop: None, or what is done to x before the update sees it.
    """

    x: Named | None
    out: Names
    base: Callable[..., Any]
    low_rank: Callable[[Any, Any, Any], Any]
    matrix: bool = False
    sums: bool = False
    precision: Any = None
    spread: Callable[[Named], Named] | None = None
    use: int = 0
    drop: Callable[[Named], Named] | None = None

    @property
    def dropped(self) -> Named | None:
        """The operand x as the update sees it."""
        return self.x if self.x is None or self.drop is None else self.drop(self.x)


@dataclasses.dataclass(frozen=True)
class Part:
    """The update of one of several weights that are put together, and its place along the axis."""

    update: Any
    start: int
    size: int


class Update(abc.ABC):
    """What is added to W: `W + update`, never formed.

    An update is a registered pytree of `Named` arrays. An axis of W has

        the role stack    if every slice along it has an update of its own
        the role input    if the update's first factor has it
        the role output   if its second factor has it
        no role           if the update is constant along it (it is of size 1, mostly)
    """

    @abc.abstractmethod
    def map(self, fn: Callable[..., Named], *operands: Any) -> Update:
        """`fn` of each array: what is done to axes of W is done to those of the same name."""

    @abc.abstractmethod
    def role(self, name: int) -> str | None:
        """The role of an axis: "stack", "input", "output", or None."""

    @abc.abstractmethod
    def product(self, p: Operation) -> Any:
        """The whole of an operation: `p.base(x)` and what the update adds to it."""

    @abc.abstractmethod
    def merged(self, w: Named) -> Any:
        """`W + update` as an array with the axes of `w`, in w's dtype."""

    def chosen(self) -> Update:
        """The update with the one adapter that was chosen for it, where there are several."""
        return self

    def times(self, factor: Named) -> Update | None:
        """The update of `factor * W`; None: it is not of the same form."""
        del factor
        return None

    def renamed(self, new: dict[int, int]) -> Update:
        """The same update of the weight whose axes have other names."""
        return self.map(lambda n: n.renamed(new))

    def join(self, parts: Sequence[Part], name: int, size: int) -> Update | None:
        """The update of several weights put together along the axis `name`, in all of `size`.

        All parts have the same names. Where there is no part, a member has no update.
        """
        del parts, name, size
        return None

    def admits(self, stack: Names, inputs: Names, outputs: Names) -> bool:
        """Whether these axes have these roles, or none."""
        groups = (("stack", stack), ("input", inputs), ("output", outputs))
        return all(self.role(n) in (None, role) for role, names in groups for n in names)

    def chooses(self, taken: Names, rest: Names) -> bool:
        """Whether indexing the axes `taken` chooses parts of W, rather than looking up rows."""
        roles = {self.role(n) for n in taken}
        row = roles == {"input"} and all(self.role(n) in ("output", None) for n in rest)
        return len(roles) == 1 and not row

    def sums(self, sizes: dict[int, int]) -> bool:
        """Whether the update of `W.sum(names)` is that of W summed array by array; names: sizes."""
        roles = {n: self.role(n) for n in sizes}
        return all(r != "stack" and (r or sizes[n] == 1) for n, r in roles.items())

    def regroup(self, old: Names, units: Names, new: dict[int, int]) -> Update | None:
        """The axes `old`, in this order, reshaped into axes `new`, a size for each.

        units: axes of size 1 among the old ones, which come and go; `new` has none. The others
        must be of one role.
        """

        def one(n: Named) -> Named:
            n = n.reduced(units, lax.squeeze)
            if not any(x in n.names for x in old):
                return n
            n = n.to_front(old)
            rest = n.array.shape[len(old) :]
            return Named(n.array.reshape((*new.values(), *rest)), (*new, *n.names[len(old) :]))

        return self.map(one) if len({self.role(n) for n in old}) <= 1 else None

    def lost(self, names: Names, how: str, into: Names = ()) -> Update:
        """Note that W has lost axes: `how` is "taken" (a slice of them was chosen) or "summed".

        Only the update that finds the roles needs to know; it is called after `map`.
        """
        del names, how, into
        return self

    def check_linear(self, path: str, where: str) -> None:
        """Raise `LoraError` if the update depends on the operand that W is multiplied with."""
        del path, where

    @abc.abstractmethod
    def derivatives(self, w: Any, dw: Any, tangent: Any, none: Any) -> list[tuple[Any, Update]]:
        """The derivative of `W + update` as a sum of weights: pairs of a W and an update.

        Args:
          w, dw, none: W, its tangent, and no W at all (`held.Absent`), of the same shape.
          tangent: an update like this one, holding the tangents of its arrays.
        """


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Zero(Update):
    """Nothing is added: a quantised weight that no adapter adapts."""

    def map(self, fn: Callable[..., Named], *operands: Any) -> Update:
        del fn, operands
        return self

    def role(self, name: int) -> str | None:
        del name
        return None

    def product(self, p: Operation) -> Any:
        return p.base(None if p.x is None else p.x.array)

    def merged(self, w: Named) -> Any:
        return w.array

    def sums(self, sizes: dict[int, int]) -> bool:
        del sizes
        return True

    def chooses(self, taken: Names, rest: Names) -> bool:
        del taken
        return len(rest) > 1

    def regroup(self, old: Names, units: Names, new: dict[int, int]) -> Update | None:
        del old, units, new
        return self

    def join(self, parts: Sequence[Part], name: int, size: int) -> Update | None:
        del parts, name, size
        return self

    def times(self, factor: Named) -> Update | None:
        del factor
        return self

    def derivatives(self, w: Any, dw: Any, tangent: Any, none: Any) -> list[tuple[Any, Update]]:
        del w, tangent, none
        return [(dw, self)]
