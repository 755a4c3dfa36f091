"""Arrays whose axes have names, so that one operation can be applied to all arrays of a weight.

A name is an integer. The evaluator hands the names out (`Evaluator.fresh`) and counts from 0 in
each trace, so that the same function traced twice gives the same jaxpr.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Collection
from typing import Any

import jax
import jax.numpy as jnp
from jax.lax import PrecisionLike
from jax.typing import DTypeLike

Names = tuple[int, ...]

# These names mean the same in all weights. Names from OTHER downwards are free for local use.
RANK, ROWS, MEMBER, EXTRA, BLOCK, ROW, COLUMN, OTHER = range(-1, -9, -1)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Named:
    """An array and the name of each of its axes."""

    array: Any
    names: Names = dataclasses.field(metadata={"static": True})

    def size(self, name: int) -> int:
        return int(self.array.shape[self.names.index(name)])

    def moved(self, names: Names) -> Named:
        """Return the same array with its axes in the order of `names`."""
        if names == self.names:
            return self
        return Named(jnp.transpose(self.array, [self.names.index(n) for n in names]), names)

    def to_front(self, names: Names) -> Named:
        return self.moved((*names, *(n for n in self.names if n not in names)))

    def aligned(self, names: Names) -> jax.Array:
        """Return the array with the axes `names`, ready to broadcast: a missing axis has size 1."""
        moved = self.moved(tuple(n for n in names if n in self.names))
        return jnp.expand_dims(moved.array, [i for i, n in enumerate(names) if n not in self.names])

    def renamed(self, new: dict[int, int]) -> Named:
        return Named(self.array, tuple(new.get(n, n) for n in self.names))

    def along(self, name: int, size: int) -> Named:
        """Return the array repeated along a new axis; unchanged if it has that axis already."""
        if name in self.names:
            return self
        return Named(jnp.broadcast_to(self.array, (size, *self.array.shape)), (name, *self.names))

    def padded(self, ends: dict[int, tuple[int, int]]) -> Named:
        """Return the array with `ends[name] = (before, after)` zeros along some of its axes."""
        return Named(jnp.pad(self.array, [ends.get(n, (0, 0)) for n in self.names]), self.names)

    def reduced(self, gone: Collection[int], fn: Callable[..., Any]) -> Named:
        """Return `fn(array, axes)`, where `fn` removes the axes of the array that are in `gone`."""
        axes = tuple(i for i, n in enumerate(self.names) if n in gone)
        return Named(fn(self.array, axes), without(self.names, gone))

    def astype(self, dtype: DTypeLike) -> Named:
        return Named(jnp.asarray(self.array, dtype), self.names)

    def matrix(self, stack: Names, left: Names, right: Names) -> jax.Array:
        """Return the array as [*stack, left, right]; the axes of each side become one."""
        sides = (math.prod(map(self.size, side)) for side in (left, right))
        shape = (*map(self.size, stack), *sides)
        return self.moved((*stack, *left, *right)).array.reshape(shape)

    def times(self, factor: Named) -> Named:
        """Return the product with a factor that has some of these axes, in this array's dtype."""
        return Named(self.array * factor.astype(self.array.dtype).aligned(self.names), self.names)


def einsum(left: Named, right: Named, out: Names, precision: PrecisionLike = None) -> jax.Array:
    """Return the product of two named arrays with the axes `out`, summed over all other names."""
    letters = {n: i for i, n in enumerate(dict.fromkeys((*left.names, *right.names)))}
    x, y, z = ([letters[n] for n in names] for names in (left.names, right.names, out))
    return jnp.einsum(left.array, x, right.array, y, z, precision=precision)


def wider(first: Any, second: Any) -> Any:
    """Return the dtype of a product of two dtypes, even where the user forbids promotion."""
    with jax.numpy_dtype_promotion("standard"):
        return jnp.promote_types(first, second)


def without(names: Names, gone: Collection[int]) -> Names:
    """Return the names that are not in `gone`, in the same order."""
    return tuple(n for n in names if n not in gone)
