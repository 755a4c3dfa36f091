"""The protocol of a frozen weight that is not one dense array."""

from __future__ import annotations

import abc
import math
from typing import Any

import jax.numpy as jnp


class Base(abc.ABC):
    """A frozen weight as it stands in the parameter tree, in the place of an array.

    Every function of the library takes it for the array `dense()` gives. A new kind of base is a
    frozen dataclass that derives from `Base`, registered as a pytree
    (`jax.tree_util.register_dataclass`), with

        shape, dtype   of the float array that it stands for, known without computing anything
        dense()        that array

    Three rules make everything else work without another line:

    - The arrays inside have the weight's leading axes (stacked layers, experts) as their own
      leading axes, and the static fields describe one slice alone. `shape` reads the leading axes
      off the arrays. So slicing every array slices the weight: `lax.scan`, `vmap` and
      `jax.tree.map(lambda x: x[i], base)` need to know nothing.
    - The constructor checks nothing, because JAX also fills the fields with shapes, placements
      and tracers. What can be wrong is checked by the function that makes the base.
    - `dense()` is written in `jax.numpy` and has no side effect. `lora_jax.adapt` calls it once in
      the forward and once in the backward pass, so that no dense copy is kept between them.
    """

    @property
    @abc.abstractmethod
    def shape(self) -> tuple[int, ...]:
        """The shape of the float array."""

    @property
    @abc.abstractmethod
    def dtype(self) -> Any:
        """The dtype of the float array."""

    @abc.abstractmethod
    def dense(self) -> Any:
        """Return the weight as a float array of `shape` and `dtype`."""

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def size(self) -> int:
        return math.prod(self.shape)


def is_base(x: Any) -> bool:
    """Whether a node of a parameter tree is a base; `jax.tree` functions take it as `is_leaf`."""
    return isinstance(x, Base)


def dense(w: Any) -> Any:
    """Return the weight as a plain array: what `Base.dense` gives, or the array itself."""
    return w.dense() if isinstance(w, Base) else w


def wide_dtype(dtype: Any) -> Any:
    """The dtype in which a sum with W is formed: float32, or W's own where that is wider."""
    if jnp.issubdtype(dtype, jnp.complexfloating) or dtype == jnp.float64:
        return dtype
    return jnp.float32
