"""The form that all quantised weights share: a slice is a matrix of codes, one row per output."""

from __future__ import annotations

import abc
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax.base import Base


@dataclasses.dataclass(frozen=True)
class QuantisedMatrix(Base):
    """A weight whose slices are stored as matrices [rows, columns], in the order of a file.

    A slice is W without its leading stack axes (layers, experts). It is stored with its output axes
    first and its input axes last, as torch stores [out, in], because the blocks that share a scale
    run along the inputs. Codes are not rearranged: `dense()` computes the floats in that order and
    then transposes them to W's own axes.

    Attributes:
      sizes: the sizes of the axes of one slice in the stored order, outputs before inputs.
      order: axis i of W's slice is axis `order[i]` of the stored order.
      float_dtype: the name of W's dtype.
    """

    sizes: tuple[int, ...]
    order: tuple[int, ...]
    float_dtype: str

    @property
    @abc.abstractmethod
    def lead(self) -> tuple[int, ...]:
        """The sizes of the leading stack axes, read off the arrays."""

    @abc.abstractmethod
    def numbers(self) -> jax.Array:
        """Return the float32 values, [*lead, ...], with a slice's numbers in the stored order."""

    @property
    def shape(self) -> tuple[int, ...]:
        return (*self.lead, *(self.sizes[axis] for axis in self.order))

    @property
    def dtype(self) -> np.dtype:
        return jnp.dtype(self.float_dtype)

    def dense(self) -> jax.Array:
        stored = self.numbers().astype(self.dtype).reshape(*self.lead, *self.sizes)
        lead = len(self.lead)
        return jnp.transpose(stored, (*range(lead), *(lead + axis for axis in self.order)))
