"""Several adapters on their way through a program: one of them selected, or all of them mixed.

`adapt` knows no form of several adapters by name. Each derives from `Choice` and says which part of
it differs from one example to the next (`choice`), and which updates such a part stands for.
"""

from __future__ import annotations

import abc
import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from lora_jax.adapters import Adapters
from lora_jax.layout import Layout
from lora_jax.multi import per_example, segmented_matmul
from lora_jax.spec import Target
from lora_jax.transform import Several, UpdateOf, single
from lora_jax.updates.factors import Gains, named
from lora_jax.updates.gating import Gated
from lora_jax.updates.kind import gained, gains_of, kind_of
from lora_jax.updates.lowrank import LowRank, is_matrix_product
from lora_jax.updates.named import EXTRA, MEMBER, RANK, Named, Names, without
from lora_jax.updates.update import Operation, Update, Wrapper, selected


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Stack:
    """n adapters in the shapes of a common layout, and the base as the last; arrays only.

    Attributes:
      factors: `{path: Factors(a [n + 1, *stack, *inputs, rank], b [n + 1, *stack, rank,
        *outputs])}`; DoRA's `Directed` has magnitudes [n + 1, *stack, *outputs] too.
      scales: `{path: [n + 1] float32}`.
      size: n, without the base.
    """

    factors: Adapters
    scales: dict[str, Any]
    size: int = dataclasses.field(metadata={"static": True})


class Choice(Several):
    """Adapters chosen among many, in a form that `adapt` takes in place of one adapter."""

    @property
    def per_example(self) -> bool:
        """Whether each example has a choice of its own."""
        return False

    def choice(self, layout: Layout) -> Any:
        """Return the choice: a pytree, with a leading axis of examples if `per_example`.

        Args:
          layout: the layout that was passed to `adapt`.
        """
        return None

    @abc.abstractmethod
    def updates(self, layout: Layout, choice: Any) -> UpdateOf:
        """Return the updates that the choice of one example, or of all examples, stands for.

        Args:
          layout: the layout that was passed to `adapt`.
          choice: from `choice`; if `per_example`, the entry of one example.
        """

    def run(
        self, layout: Layout, run: Callable[..., Any], args: Any, kwargs: Any, axes: tuple[Any, Any]
    ) -> Any:
        def one(choice: Any, *args: Any, **kwargs: Any) -> Any:
            return run(self.updates(layout, choice), self.per_example, *args, **kwargs)

        choice = self.choice(layout)
        if not self.per_example:
            return one(choice, *args, **kwargs)
        return per_example.each(one, choice, args, kwargs, *axes)


@dataclasses.dataclass(frozen=True)
class Around(Choice):
    """Adapters whose updates are changed on their way.

    Attributes:
      adapters: one adapter tree, or another form of adapters that `adapt` takes.
    """

    adapters: Any

    @property
    def per_example(self) -> bool:
        """Whether each example has an adapter of its own."""
        return isinstance(self.adapters, Choice) and self.adapters.per_example

    def choice(self, layout: Layout) -> Any:
        return self.adapters.choice(layout) if isinstance(self.adapters, Choice) else None

    def updates(self, layout: Layout, choice: Any) -> UpdateOf:
        if isinstance(self.adapters, Choice):
            return self.adapters.updates(layout, choice)
        return single(layout, self.adapters)


@dataclasses.dataclass(frozen=True)
class Mixed:
    """The updates of several adapters; an `UpdateOf`.

    factors: `{path: Factors(a [*stack, *inputs, rank], b [*stack, rank, *outputs])}`. The rank is
      that of all mixed adapters together.
    gains: `{path: [] or [rank]}`, the factor of each rank: scales times weights.
    gates: `{path: {experts, top, probe}}`, for a router per token (`updates.gating.Gated`). The
      last columns of `a` are then the router's.
    index, examples: [] int, the number of the adapter of one of so many examples. Every array then
      has a leading axis of adapters. None: there is one.
    """

    factors: Adapters
    gains: dict[str, Any]
    gates: dict[str, Any] = dataclasses.field(default_factory=dict)
    index: Any = None
    examples: int = 0

    def __call__(self, target: Target, w: Any, names: Names) -> Update | jax.Array:
        kind, parameters = kind_of(target), self.factors[target.path]
        several = () if self.index is None else (MEMBER,)
        each = (lambda fn: fn) if self.index is None else jax.vmap
        factors = each(functools.partial(kind.factors, target))(parameters)
        if factors is None:
            return kind.merged(target, parameters, w)
        scale, gain = kind.scale(target), self.gains[target.path]
        a, b = named(target, factors, names, several)
        update = self._low_rank(target, names)(
            a, b, scale, Named(gain, several or (RANK,) * jnp.ndim(gain))
        )

        def rescaling(parameters: Any, gain: Any) -> Gains:
            found = gains_of(target, parameters, w, gain * scale)
            ones = lambda x: None if x is None else jnp.where(gain == 0, jnp.ones_like(x), x)  # noqa: E731
            # Arrays of zeros stand for no adapter, and their rotation is none.
            return found._replace(outputs=ones(found.outputs), inputs=ones(found.inputs))

        if kind.rescales:
            update = gained(update, target, each(rescaling)(parameters, gain), names, several)
        return update if self.index is None else Selected(update, self.index, self.examples)

    def _low_rank(self, target: Target, names: Names) -> Callable[..., Update]:
        if target.path not in self.gates:
            return LowRank
        gate = dict(self.gates[target.path])
        if gate["probe"] is not None:
            stack = tuple(names[i] for i in target.stack)
            gate["probe"] = Named(gate["probe"], (*stack, EXTRA, MEMBER))
        return functools.partial(Gated, **gate)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Selected(Wrapper):
    """One of several updates, by a number: in a mixed batch each example has its own.

    All arrays of `inner` have the axis MEMBER.

    index: [] int along MEMBER; a number out of range gives NaN.
    examples: the number of examples that run under one `vmap`, each with an index of its own.
    """

    index: Any
    examples: int = dataclasses.field(metadata={"static": True})

    def selected(self) -> Update:
        def take(n: Named) -> Named:
            if MEMBER not in n.names:
                return n
            axis = n.names.index(MEMBER)
            array = jnp.take(n.array, self.index, axis=axis, mode="fill", fill_value=jnp.nan)
            return Named(array, without(n.names, (MEMBER,)))

        return selected(self.inner.map(take))

    def product(self, p: Operation) -> Any:
        u = self.inner
        if type(u) is LowRank and p.x is not None and self._groups(u, p.x, p):
            return self._grouped(u, p)
        return self.selected().product(p)

    def merged(self, w: Named) -> Any:
        return self.selected().merged(w)

    def _groups(self, u: LowRank, x: Named, p: Operation) -> bool:
        """Return whether this is a plain product whose examples should be grouped by adapter."""
        if not p.matrix or u.a.names[0] != MEMBER or u.b.names[0] != MEMBER:
            return False
        a, b = (Named(n.array[0], n.names[1:]) for n in (u.a, u.b))
        whole = set(p.out) == {*x.names, *b.names} - set(a.names)
        if not (whole and is_matrix_product(x, a, b, p.out)):
            return False
        rows = math.prod(x.size(n) for n in x.names if n in p.out)
        return segmented_matmul.pays(self.examples, u.a.size(MEMBER), rows, u.a.size(RANK))

    def _grouped(self, u: LowRank, p: Operation) -> Any:
        x = p.dropped
        assert u.gain is not None and p.x is not None and x is not None
        base = p.base(p.x.array)
        (inner,), (outer,) = (without(f.names, (MEMBER, RANK)) for f in (u.a, u.b))
        rows = tuple(n for n in x.names if n in p.out)
        dtype = x.array.dtype
        a, b = u.a.moved((MEMBER, inner, RANK)).astype(dtype), u.b.moved((MEMBER, RANK, outer))
        gain = u.gain.astype(dtype).array * u.scale
        with jax.named_scope("lora"):
            y = segmented_matmul.product(
                x.matrix((), rows, (inner,)), a.array, b.astype(dtype).array, gain, self.index,
                p.precision,
            )  # fmt: skip
            named = Named(y.reshape(*map(x.size, rows), u.b.size(outer)), (*rows, outer))
            return base + named.moved(p.out).array.astype(base.dtype)
