"""W itself on its way through a program: an array, or a base that is dequantised where it is used.

A quantised base is never rearranged. The operations that a program applies to it (a transpose, a
cast, a slice) are kept as a list of steps. A product runs `fn(steps(base.dense()), x)`, and the
forward and the backward pass each dequantise the base for themselves (`recomputed.py`): only x and
the codes are kept between them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from lora_jax.base import Base
from lora_jax.bases import recomputed
from lora_jax.updates.named import OTHER, Named, Names

Move = Callable[..., Named]  # (named array, *operands) -> named array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Dense:
    """A weight that is one array."""

    array: Any

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.array.shape)

    @property
    def dtype(self) -> Any:
        return self.array.dtype

    def dense(self) -> Any:
        return self.array

    def use(self, fn: Callable[..., Any], *operands: Any) -> Any:
        """Return `fn(W, *operands)`."""
        return fn(self.array, *operands)

    product = use

    def move(self, names: Names, fn: Move, *operands: Any, along: Names = ()) -> tuple[Any, Names]:
        """Return W after `fn`, and the names of its axes."""
        del along
        moved = fn(Named(self.array, names), *operands)
        return Dense(moved.array), moved.names


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Step:
    """One operation that a program applies to W before it uses it."""

    fn: Callable[..., Any] = dataclasses.field(metadata={"static": True})
    out: Any = dataclasses.field(metadata={"static": True})  # the shape and dtype of its result
    operands: tuple[Any, ...] = ()


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Deferred:
    """A base, and the steps that make the current weight out of it."""

    source: Any
    steps: tuple[Step, ...] = ()

    @staticmethod
    def start(base: Base) -> Deferred:
        """Return a base as the program's input; no gradient flows into its codes and scales."""
        return Deferred(jax.tree.map(lax.stop_gradient, base))

    @property
    def _now(self) -> Any:
        return self.steps[-1].out if self.steps else self.source

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self._now.shape)

    @property
    def dtype(self) -> Any:
        return self._now.dtype

    def dense(self) -> Any:
        w = self.source.dense()
        for step in self.steps:
            w = step.fn(w, *step.operands)
        return w

    def use(self, fn: Callable[..., Any], *operands: Any) -> Any:
        """Return `fn(W, *operands)`; the forward and the backward pass each form W."""
        return jax.checkpoint(lambda held, operands: fn(held.dense(), *operands))(self, operands)

    def product(self, fn: Callable[..., Any], x: Any, *rest: Any) -> Any:
        """Return `fn(W, x, *rest)`, which is linear in x."""
        return recomputed.product(
            lambda known, x: fn(known[0].dense(), x, *known[1]), (self, rest), x
        )

    def move(self, names: Names, fn: Move, *operands: Any, along: Names = ()) -> tuple[Any, Names]:
        """Return W after `fn`, and the names of its axes; `fn` touches only the axes `along`."""
        out = jax.eval_shape(
            lambda w: fn(Named(w, names), *operands), jax.ShapeDtypeStruct(self.shape, self.dtype)
        )
        if along and all(n in self.leading(names) for n in along):
            return Deferred(self._of_arrays(names, lambda n: fn(n, *operands))), out.names
        step = Step(lambda w, *ops: fn(Named(w, names), *ops).array, out.array, operands)
        return dataclasses.replace(self, steps=(*self.steps, step)), out.names

    def leading(self, names: Names) -> Names:
        """Return the names of the axes that the base's arrays share, along which it is sliced."""
        if self.steps or not isinstance(self.source, Base):
            return ()
        return names[: stack_ndim(self.source)]

    def _of_arrays(self, names: Names, fn: Callable[[Named], Named]) -> Any:
        leading = self.leading(names)

        def one(x: Any) -> Any:
            rest = tuple(OTHER - i for i in range(jnp.ndim(x) - len(leading)))
            return fn(Named(x, (*leading, *rest))).array

        return jax.tree.map(one, self.source)


def stack_ndim(base: Base) -> int:
    """Return the number of leading axes that a base shares with all of its arrays."""
    now, count = jax.tree.map(lambda x: jax.ShapeDtypeStruct(jnp.shape(x), x.dtype), base), 0
    while all(x.shape for x in jax.tree.leaves(now)):
        less = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), now)
        if len(less.shape) == len(now.shape):
            break
        now, count = less, count + 1
    return count


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Absent:
    """An absent W: in the part of a derivative that goes along the update only."""

    shape: tuple[int, ...] = dataclasses.field(metadata={"static": True})
    dtype: Any = dataclasses.field(metadata={"static": True})

    def dense(self) -> Any:
        return jnp.zeros(self.shape, self.dtype)

    def use(self, fn: Callable[..., Any], *operands: Any) -> Any:
        out = jax.eval_shape(fn, jax.ShapeDtypeStruct(self.shape, self.dtype), *operands)
        return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), out)

    product = use

    def move(self, names: Names, fn: Move, *operands: Any, along: Names = ()) -> tuple[Any, Names]:
        del along
        w = jax.ShapeDtypeStruct(self.shape, self.dtype)
        out = jax.eval_shape(lambda w: fn(Named(w, names), *operands), w)
        return Absent(tuple(out.array.shape), out.array.dtype), out.names


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Joined:
    """Several weights put together, some of them quantised; the source of a `Deferred`."""

    parts: tuple[Any, ...]
    fn: Callable[..., Any] = dataclasses.field(metadata={"static": True})

    @property
    def _out(self) -> Any:
        parts = [jax.ShapeDtypeStruct(p.shape, p.dtype) for p in self.parts]
        return jax.eval_shape(self.fn, *parts)

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self._out.shape)

    @property
    def dtype(self) -> Any:
        return self._out.dtype

    def dense(self) -> Any:
        return self.fn(*(p.dense() for p in self.parts))


def held(w: Any) -> Dense | Deferred:
    """Return W in the form in which a program takes it."""
    return Deferred.start(w) if isinstance(w, Base) else Dense(w)


def join(parts: list[Any], fn: Callable[..., Any]) -> Dense | Deferred:
    """Return `fn` of several weights: an array if all of them are arrays, else deferred."""
    if all(isinstance(p, Dense) for p in parts):
        return Dense(fn(*(p.array for p in parts)))
    return Deferred(Joined(tuple(parts), fn))
