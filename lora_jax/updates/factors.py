"""The factors and gains of one update, as arrays of a target and with the names of W's axes."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp

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
    """The numbers that multiply each output and each input of `W + scale * a @ b`; None is 1.

    Attributes:
      outputs: [*stack, *outputs].
      inputs: [*stack, *inputs].
    """

    outputs: Leaf = None
    inputs: Leaf = None

    def sides(self, target: Target) -> list[tuple[Any, tuple[int, ...]]]:
        """Return the gains that are not 1, each with its axes of W without the stack.

        Args:
          target: from the layout.
        """
        both = zip(self, (target.outputs, target.inputs), strict=True)
        return [(gain, side) for gain, side in both if gain is not None]


def named(
    target: Target, factors: Factors, names: Names, several: Names = ()
) -> tuple[Named, Named]:
    """Return the factors with the names of W's axes; `several` are axes that come before these."""
    stack, inputs, outputs = (
        tuple(names[i] for i in axes) for axes in (target.stack, target.inputs, target.outputs)
    )
    a = Named(factors.a, (*several, *stack, *inputs, RANK))
    return a, Named(factors.b, (*several, *stack, RANK, *outputs))


def in_w_order(target: Target, values: Array, side: tuple[int, ...]) -> Array:
    """Return [*stack, *side] values with axes in W's order, and size 1 along the other axes."""
    axes = (*target.stack, *side)
    ordered = jnp.transpose(values, [axes.index(i) for i in sorted(axes)])
    return jnp.expand_dims(ordered, [i for i in range(len(target.shape)) if i not in axes])
