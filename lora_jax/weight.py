"""An adapted weight on its way through a program: W beside its two factors, never their sum.

Every axis carries an integer name. An axis of W is

    stack    its name is in `w`, `a` and `b`      a slice has its own factors
    input    its name is in `w` and `a`
    output   its name is in `w` and `b`
    free     its name is in `w` alone             the update is constant along it (size 1, mostly)

so what an operation does to an axis of W, it does to each array that has the name. `a` and `b`
share the name RANK.
"""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import jax
import jax.numpy as jnp

from lora_jax.adapters import Factors
from lora_jax.layout import Target
from lora_jax.merge import wide_dtype

RANK = -1
_fresh = itertools.count()

Names = tuple[int, ...]


def fresh(n: int) -> Names:
    """`n` axis names that nothing else has."""
    return tuple(next(_fresh) for _ in range(n))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Named:
    """An array and the name of each of its axes."""

    array: Any
    names: Names = dataclasses.field(metadata={"static": True})

    def size(self, name: int) -> int:
        return int(self.array.shape[self.names.index(name)])

    def moved(self, names: Names) -> Named:
        """The same array with its axes in the order of `names`."""
        if names == self.names:
            return self
        return Named(jnp.transpose(self.array, [self.names.index(n) for n in names]), names)

    def to_front(self, names: Names) -> Named:
        return self.moved((*names, *(n for n in self.names if n not in names)))

    def renamed(self, new: dict[int, int]) -> Named:
        return Named(self.array, tuple(new[n] for n in self.names))

    def astype(self, dtype: Any) -> Named:
        return Named(jnp.asarray(self.array, dtype), self.names)


def einsum(left: Named, right: Named, out: Names, precision: Any = None) -> Any:
    """The product of two named arrays with axes `out`; names in neither `out` are summed."""
    letters = {n: i for i, n in enumerate(dict.fromkeys((*left.names, *right.names)))}
    lists = ([letters[n] for n in names] for names in (left.names, right.names, out))
    left_list, right_list, out_list = lists
    return jnp.einsum(left.array, left_list, right.array, right_list, out_list, precision=precision)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class AdaptedWeight:
    """W, a and b with named axes; the value that stands for `w + scale * a @ b`."""

    w: Named
    a: Named
    b: Named
    scale: float = dataclasses.field(metadata={"static": True})
    target: Target = dataclasses.field(metadata={"static": True})

    @staticmethod
    def start(target: Target, w: Any, factors: Factors) -> AdaptedWeight:
        names = fresh(len(target.shape))
        pick = lambda which: tuple(names[i] for i in which)  # noqa: E731
        stack = pick(target.stack)
        return AdaptedWeight(
            Named(w, names),
            Named(factors.a, (*stack, *pick(target.inputs), RANK)),
            Named(factors.b, (*stack, RANK, *pick(target.outputs))),
            target.scale,
            target,
        )

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.w.array.shape)

    def names_at(self, dims: Any) -> Names:
        return tuple(self.w.names[i] for i in dims)

    def is_stack(self, name: int) -> bool:
        return name in self.a.names and name in self.b.names and name != RANK

    def is_input(self, name: int) -> bool:
        return name in self.a.names and name not in self.b.names

    def is_output(self, name: int) -> bool:
        return name in self.b.names and name not in self.a.names

    def is_free(self, name: int) -> bool:
        return name not in self.a.names and name not in self.b.names

    def with_w(self, array: Any) -> AdaptedWeight:
        return dataclasses.replace(self, w=Named(array, self.w.names))

    def update(self) -> Any:
        """`scale * a @ b` in W's present shape and in float32; only `folded` and rows need it."""
        wide = wide_dtype(self.w.array.dtype)
        present = tuple(n for n in self.w.names if not self.is_free(n))
        delta = self.scale * einsum(
            self.a.astype(wide), self.b.astype(wide), present, precision="highest"
        )
        absent = [i for i, n in enumerate(self.w.names) if self.is_free(n)]
        return jnp.broadcast_to(jnp.expand_dims(delta, absent), self.shape)

    def folded(self) -> Any:
        """`w + scale * a @ b` as a plain array in W's dtype."""
        w = self.w.array
        delta = self.update()
        return (w.astype(delta.dtype) + delta).astype(w.dtype)
