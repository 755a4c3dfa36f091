"""The protocol of an update: the quantity added to W, on its way through a program with W."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from jax import lax
from jax.lax import PrecisionLike

from lora_jax.base import Array, wide_dtype
from lora_jax.errors import LoraError
from lora_jax.updates.named import Named, Names

AnyWeight: TypeAlias = Any  # W on its way through a program: a `bases.weight.Weight`
Pairs: TypeAlias = "list[tuple[AnyWeight, Update]]"


@dataclasses.dataclass(frozen=True)
class Operation:
    """One operation that is linear in W, as its rule passes it to the update.

    x: the other operand, with named axes. An axis that is multiplied along an axis of W has the
      same name. None: there is no other operand (a lookup).
    out: the names of the result's axes.
    base: `base(x)`, the operation with W itself; x is an array. A product also has
      `base(x, dtype)`, which returns its sums in that dtype without rounding to the program's.
    low_rank: `low_rank(y, x, update)` is y plus the operation with `update`, a `LowRank`, in place
      of W, in the form that is fast for this operation; x is named.
    dtype: the dtype of `base(x)`.
    matrix: whether it is the plain product with a matrix, as in `x @ w`.
    sums: whether it is a product, so that `base` takes a dtype.
    precision: the precision of the products, as in `jax.lax.dot_general`.
    spread: a function for an array with a stack axis that neither x nor the result has (the group
      of each row in a ragged product). It returns the array with the rows as axis instead. None:
      there is no such axis.
    use: the number of this use of W in the program (`Evaluator.consume`).
    drop: None, or a function that is applied to x before the update sees it.
    """

    x: Named | None
    out: Names
    base: Callable[..., Any]
    low_rank: Callable[[Any, Any, Any], Any]
    dtype: Any
    matrix: bool = False
    sums: bool = False
    precision: PrecisionLike = None
    spread: Callable[[Named], Named] | None = None
    use: int = 0
    drop: Callable[[Named], Named] | None = None

    @property
    def dropped(self) -> Named | None:
        """The operand x as the update sees it, after dropout."""
        return self.x if self.x is None or self.drop is None else self.drop(self.x)


@dataclasses.dataclass(frozen=True)
class Segment:
    """The update of one of several weights that are concatenated, and its place along the axis."""

    update: Any
    start: int
    size: int


class Update(abc.ABC):
    """The quantity added to W: `W + update`, which is never formed.

    An update is a registered pytree of `Named` arrays. An axis of W has

        the role stack    if every slice along it has an update of its own
        the role input    if the update's first factor has it
        the role output   if its second factor has it
        no role           if the update is constant along it (mostly an axis of size 1)
    """

    additive = True  # whether it is added to W, so that it is zero where its arrays are zero
    needs_input = ""  # for an update that depends on the x that W is multiplied with: the cure

    def map(self, fn: Callable[..., Named], *operands: Any) -> Update:
        """Return the update with `fn` applied to each array, as the program applies it to W."""
        is_named = lambda n: isinstance(n, Named)  # noqa: E731
        one = lambda n: fn(n, *operands) if is_named(n) else n  # noqa: E731
        moved: Update = jax.tree.map(one, self, is_leaf=is_named)
        return moved

    @abc.abstractmethod
    def role(self, name: int) -> str | None:
        """Return the role of an axis: "stack", "input", "output", or None."""

    @abc.abstractmethod
    def product(self, p: Operation) -> Array:
        """Return the result of an operation with `W + update`, given as `p.base` for W."""

    @abc.abstractmethod
    def merged(self, w: Named) -> Array:
        """Return `W + update` as an array with the axes of `w`, in w's dtype."""

    @abc.abstractmethod
    def tangents(self, w: AnyWeight, dw: AnyWeight, tangent: Any, none: AnyWeight) -> Pairs:
        """Return the derivative of `W + update` as a sum of weights: pairs of a W and an update.

        w, dw and none are W, its tangent and an absent W (`Absent`), all of the same shape;
        tangent is an update like this one, holding the tangents of its arrays.
        """

    def times(self, factor: Named) -> Update | None:
        """Return the update of `factor * W`, or None if that has another form."""
        real = tuple(n for n in factor.names if factor.size(n) > 1)
        roles = {self.role(n) for n in real}
        if not additive(self) or None in roles or roles >= {"input", "output"}:
            return None
        return Times(self, factor.reduced({*factor.names} - {*real}, lax.squeeze))

    def join(self, parts: Sequence[Segment], name: int, size: int) -> Update | None:
        """Return the update of several weights concatenated along the axis `name`, or None.

        All parts have the same names, and `size` is the whole size of the axis. A weight without a
        part has no update. By default it is the sum of the parts, each with zeros outside of its
        place.
        """
        roles = {p.update.role(name) for p in parts}
        if len(roles) > 1 or not all(additive(p.update) for p in parts):
            return None

        def in_place(p: Segment) -> Update:
            ends = {name: (p.start, size - p.start - p.size)}
            spread = lambda n: n.along(name, p.size) if None in roles else n  # noqa: E731
            placed: Update = p.update.map(lambda n: spread(n).padded(ends))
            return placed

        return Sum(tuple(map(in_place, parts)))

    def sums(self, sizes: dict[int, int]) -> bool:
        """Return whether the update of `W.sum(names)` is the update with each of its arrays summed.

        `sizes` maps the names of the summed axes to their sizes.
        """
        roles = {n: self.role(n) for n in sizes}
        return all(r != "stack" and (r or sizes[n] == 1) for n, r in roles.items())


@dataclasses.dataclass(frozen=True)
class Wrapper(Update):
    """An update around another one, which answers all that the wrapper does not change.

    inner: the update.
    """

    inner: Update

    def around(self, inner: Update) -> Update:
        """Return the same wrapper around another update."""
        return dataclasses.replace(self, inner=inner)

    def selected(self) -> Update:
        """Return the update of the one adapter that was selected, if there are several."""
        return self.around(selected(self.inner))

    def role(self, name: int) -> str | None:
        return self.inner.role(name)

    def product(self, p: Operation) -> Array:
        return self.inner.product(p)

    def merged(self, w: Named) -> Array:
        return self.inner.merged(w)

    def times(self, factor: Named) -> Update | None:
        inner = self.inner.times(factor)
        return None if inner is None else self.around(inner)

    def sums(self, sizes: dict[int, int]) -> bool:
        return self.inner.sums(sizes)

    def tangents(self, w: AnyWeight, dw: AnyWeight, tangent: Any, none: AnyWeight) -> Pairs:
        parts = self.inner.tangents(w, dw, tangent.inner, none)
        return [(w, self.around(update)) for w, update in parts]


def layers(update: Update) -> Iterator[Update]:
    """Yield an update and all updates inside of it."""
    yield update
    inner = (update.inner,) if isinstance(update, Wrapper) else getattr(update, "updates", ())
    for one in inner:
        yield from layers(one)


def additive(update: Update) -> bool:
    """Return whether the update is only added to W, so that several of them can be added up."""
    return all(one.additive for one in layers(update))


def selected(update: Update) -> Update:
    """Return the update of the one adapter that was selected, if there are several."""
    return update.selected() if isinstance(update, Wrapper) else update


def join(parts: Sequence[Segment], name: int, size: int) -> Update | None:
    """See `Update.join`. A part that rescales W, if there is one, does it for all."""
    if not parts:
        return Zero()
    return min(parts, key=lambda p: additive(p.update)).update.join(parts, name, size)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Zero(Update):
    """An update that adds nothing: for a quantised weight without an adapter."""

    def role(self, name: int) -> str | None:
        return None

    def product(self, p: Operation) -> Array:
        return p.base(None if p.x is None else p.x.array)

    def merged(self, w: Named) -> Array:
        return w.array

    def sums(self, sizes: dict[int, int]) -> bool:
        return True

    def times(self, factor: Named) -> Update | None:
        return self

    def tangents(self, w: AnyWeight, dw: AnyWeight, tangent: Any, none: AnyWeight) -> Pairs:
        return [(dw, self)]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Sum(Update):
    """Several updates of one weight, added up."""

    updates: tuple[Update, ...]

    def role(self, name: int) -> str | None:
        return self.updates[0].role(name)

    def product(self, p: Operation) -> Array:
        y = self.updates[0].product(p)
        for update in self.updates[1:]:
            y = update.product(dataclasses.replace(p, base=known(y)))
        return y

    def merged(self, w: Named) -> Array:
        whole = w.astype(wide_dtype(w.array.dtype))
        for update in self.updates:
            whole = Named(update.merged(whole), w.names)
        return whole.array.astype(w.array.dtype)

    def times(self, factor: Named) -> Update | None:
        every = [update.times(factor) for update in self.updates]
        known = tuple(update for update in every if update is not None)
        return Sum(known) if len(known) == len(every) else None

    def sums(self, sizes: dict[int, int]) -> bool:
        return all(update.sums(sizes) for update in self.updates)

    def tangents(self, w: AnyWeight, dw: AnyWeight, tangent: Any, none: AnyWeight) -> Pairs:
        first, *rest = zip(self.updates, tangent.updates, strict=True)
        found = first[0].tangents(w, dw, first[1], none)
        return [*found, *(x for u, t in rest for x in u.tangents(w, none, t, none))]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Times(Wrapper):
    """`factor * update`; the factor has axes of W with the roles stack and either input or output.

    The default of `Update.times`, for an update whose arrays cannot take the factor up.
    """

    factor: Named

    def product(self, p: Operation) -> Array:
        names, y = {*self.factor.names}, p.base(None if p.x is None else p.x.array)
        if names <= {*p.out}:
            nothing = dataclasses.replace(p, base=known(jnp.zeros_like(y)))
            return y + Named(self.inner.product(nothing), p.out).times(self.factor).array
        if p.x is None or not names <= {*p.x.names}:
            raise LoraError(
                f"a product sums over some axes of the factor of a {type(self.inner).__name__}, "
                "and not over others; give the update a `times` of its own"
            )
        return self.inner.product(dataclasses.replace(p, x=p.x.times(self.factor), base=known(y)))

    def merged(self, w: Named) -> Array:
        wide = wide_dtype(w.array.dtype)
        delta = Named(self.inner.merged(Named(jnp.zeros(w.array.shape, wide), w.names)), w.names)
        whole = w.array.astype(wide) + delta.times(self.factor).array
        return whole.astype(w.array.dtype)

    def sums(self, sizes: dict[int, int]) -> bool:
        return self.inner.sums(sizes) and not any(n in self.factor.names for n in sizes)

    def tangents(self, w: AnyWeight, dw: AnyWeight, tangent: Any, none: AnyWeight) -> Pairs:
        along = super().tangents(w, dw, tangent, none)
        return [*along, (none, Times(self.inner, tangent.factor))]


def known(y: Array) -> Callable[..., Any]:
    """Return the `base` of an operation whose result is known."""
    return lambda x, dtype=None: y if dtype is None else y.astype(dtype)
