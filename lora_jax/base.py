"""The protocol of a frozen weight that is not one dense array, and the form of quantised ones."""

from __future__ import annotations

import abc
import dataclasses
import math
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

# The names that the core gives to types of arguments.
Array: TypeAlias = jax.Array
Leaf: TypeAlias = Any  # an array, or what stands for one in its tree: a shape, axes, a placement
Parameters: TypeAlias = Any  # the NamedTuple of arrays of a kind of update


class Base(abc.ABC):
    """A frozen weight that stands in the parameter tree in the place of an array.

    Every function of the library treats it as the array that `dense()` returns. A new kind of base
    is a frozen dataclass that derives from `Base`, is registered as a pytree
    (`jax.tree_util.register_dataclass`), and has

        shape, dtype   of the float array that it stands for, known without computing anything
        dense()        that array

    Three rules make everything else work without more code:

    - The arrays inside have the weight's leading axes (stacked layers, experts) as their own
      leading axes, and the static fields describe a single slice. `shape` reads the leading axes
      off the arrays. So slicing every array slices the weight, and `lax.scan`, `vmap` and
      `jax.tree.map(lambda x: x[i], base)` work on it as they work on arrays.
    - The constructor checks nothing, because JAX also fills the fields with shapes, placements
      and tracers. The function that makes the base checks its input.
    - `dense()` is written in `jax.numpy` and has no side effect. `lora_jax.adapt` calls it once in
      the forward and once in the backward pass, so that no dense copy is kept between them.
    """

    @property
    @abc.abstractmethod
    def shape(self) -> tuple[int, ...]:
        """The shape of the float array."""

    @property
    @abc.abstractmethod
    def dtype(self) -> np.dtype:
        """The dtype of the float array."""

    @abc.abstractmethod
    def dense(self) -> Array:
        """Return the weight as a float array of `shape` and `dtype`."""

    def stack_ndim(self) -> int:
        """Return the number of leading axes that the weight shares with all of its arrays."""
        leaves, tree = jax.tree.flatten(self)
        shapes, count = [tuple(x.shape) for x in leaves], 0
        ndim = len(self.shape)
        while all(shapes):
            shapes = [shape[1:] for shape in shapes]
            less = map(jax.ShapeDtypeStruct, shapes, (x.dtype for x in leaves))
            if len(jax.tree.unflatten(tree, less).shape) != ndim - count - 1:
                break
            count += 1
        return count

    @property
    def ndim(self) -> int:
        """The number of axes of the float array."""
        return len(self.shape)

    @property
    def size(self) -> int:
        """The number of elements of the float array."""
        return math.prod(self.shape)


W: TypeAlias = Array | Base  # W as the caller has it


@dataclasses.dataclass(frozen=True)
class QuantisedMatrix(Base):
    """A weight whose slices are stored as matrices [rows, columns], in the order of a file.

    A slice is W without its leading stack axes (layers, experts). It is stored with its output axes
    first and its input axes last, as torch stores [out, in], because the blocks that share a scale
    run along the inputs. Codes are not rearranged: `dense()` computes the floats in that order and
    then transposes them to W's own axes.

    A subclass adds its arrays: first the codes, [*lead, rows, columns].

    Attributes:
      sizes: the sizes of the axes of one slice in the stored order, outputs before inputs.
      order: axis i of W's slice is axis `order[i]` of the stored order.
      float_dtype: the name of W's dtype.
    """

    sizes: tuple[int, ...]
    order: tuple[int, ...]
    float_dtype: str

    @property
    def lead(self) -> tuple[int, ...]:
        """The sizes of the leading stack axes, read off the codes: the first array."""
        return tuple(jax.tree.leaves(self)[0].shape[:-2])

    @abc.abstractmethod
    def numbers(self) -> jax.Array:
        """Return the float32 values, [*lead, ...], with a slice's numbers in the stored order."""

    @property
    def shape(self) -> tuple[int, ...]:
        return (*self.lead, *map(self.sizes.__getitem__, self.order))

    @property
    def dtype(self) -> np.dtype:
        return jnp.dtype(self.float_dtype)

    def dense(self) -> Array:
        lead, dtype = self.lead, self.dtype
        n = len(lead)
        axes = (*range(n), *(n + axis for axis in self.order))
        return self.numbers().astype(dtype).reshape(*lead, *self.sizes).transpose(axes)


def is_base(x: Any) -> bool:
    """Return whether a node of a parameter tree is a base; pass it as `is_leaf` to `jax.tree`.

    Args:
      x: a node.
    """
    return isinstance(x, Base)


def dense(w: Array | Base) -> Array:
    """Return the weight as a plain array: the result of `Base.dense`, or the array itself.

    Args:
      w: an array or a base.
    """
    return w.dense() if isinstance(w, Base) else w


def wide_dtype(dtype: DTypeLike) -> np.dtype:
    """Return the dtype in which sums with W are formed: float32, or W's dtype if it is wider.

    Args:
      dtype: the dtype of W.
    """
    if jnp.issubdtype(dtype, jnp.complexfloating) or dtype == jnp.float64:
        return jnp.dtype(dtype)
    return jnp.dtype(jnp.float32)
