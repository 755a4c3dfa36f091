"""The factors and gains of one update, as arrays of a target and with the names of W's axes."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax.typing import DTypeLike

from lora_jax.base import Array, Leaf
from lora_jax.spec import Target
from lora_jax.updates.named import RANK, Named, Names


class Factors(NamedTuple):
    """The two factors of one update `scale * a @ b`, with the axes of the target.

    Attributes:
      a: [*stack, *inputs, rank], the paper's A transposed: it maps the input down.
      b: [*stack, rank, *outputs], the paper's B transposed: it maps up to the output.
    """

    a: Leaf
    b: Leaf


class Gains(NamedTuple):
    """The matrices that multiply `W + scale * a @ b` from either side; None is 1.

    A rotation comes first.

    Attributes:
      outputs: [*stack, *outputs], a number for each output.
      inputs: [*stack, *inputs], a number for each input.
      rotation: [*stack, blocks, size, size], a block-diagonal matrix along the inputs, flattened.
    """

    outputs: Leaf = None
    inputs: Leaf = None
    rotation: Leaf = None

    def sides(self, target: Target) -> list[tuple[Any, tuple[int, ...]]]:
        """Return the numbers that are not 1, each with its axes of W without the stack.

        Args:
          target: from the layout.
        """
        both = ((self.outputs, target.outputs), (self.inputs, target.inputs))
        return [(gain, side) for gain, side in both if gain is not None]


def no_factors(target: Target, dtype: DTypeLike) -> Factors:
    """Return factors of rank 0, for an update that only multiplies W."""
    a, b = (*target.a_shape[:-1], 0), (*target.sizes(target.stack), 0)
    return Factors(jnp.zeros(a, dtype), jnp.zeros((*b, *target.sizes(target.outputs)), dtype))


def named(
    target: Target, factors: Factors, names: Names, several: Names = ()
) -> tuple[Named, Named]:
    """Return the factors with the names of W's axes; `several` are axes that come before these."""
    stack, inputs, outputs = (
        tuple(names[i] for i in axes) for axes in (target.stack, target.inputs, target.outputs)
    )
    a = Named(factors.a, (*several, *stack, *inputs, RANK))
    return a, Named(factors.b, (*several, *stack, RANK, *outputs))


def rotated(target: Target, w: Array, blocks: Array) -> Array:
    """Return `R W`: W with its inputs multiplied by the blocks [*stack, blocks, size, size]."""
    order = (*target.stack, *target.inputs, *target.outputs)
    whole = jnp.transpose(w, order)
    rows = whole.reshape(*blocks.shape[:-1], target.fan_out)
    turned = jnp.matmul(blocks, rows, precision="highest").reshape(whole.shape)
    return jnp.transpose(turned, [order.index(i) for i in range(len(order))])


def in_w_order(target: Target, values: Array, side: tuple[int, ...]) -> Array:
    """Return [*stack, *side] values with axes in W's order, and size 1 along the other axes."""
    axes = (*target.stack, *side)
    ordered = jnp.transpose(values, [axes.index(i) for i in sorted(axes)])
    return jnp.expand_dims(ordered, [i for i in range(len(target.shape)) if i not in axes])
