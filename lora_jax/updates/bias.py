"""An update that is an array of the parameter's own shape, for biases."""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jax.typing import DTypeLike

from lora_jax.base import Array, Leaf, W
from lora_jax.spec import Target
from lora_jax.updates.kind import Initializer, Kind


class Shift(NamedTuple):
    """The array of a bias target.

    Attributes:
      delta: the difference, in the parameter's shape.
    """

    delta: Leaf


class Bias(Kind):
    """A full difference: `W' = W + delta`, for biases (BitFit, arXiv 2106.10199) and small vectors.

    It has no rank, no alpha and no factors: the program reads the sum in place of W. Every axis
    is an output (or a stack) axis. `delta` starts at zero.

    >>> target = Target("bias", (3,), (), (), (0,), rank=1, alpha=1.0, kind="bias")
    >>> Bias().merged(target, Shift(jnp.ones(3)), jnp.arange(3.0)).tolist()
    [1.0, 2.0, 3.0]
    """

    name = "bias"
    fields = Shift
    zero_at_first = "delta"

    def axes(self, target: Target) -> Shift:
        return Shift(tuple(range(len(target.shape))))

    def roles(
        self, shape: tuple[int, ...], stack: tuple[int, ...]
    ) -> tuple[tuple[int, ...], tuple[int, ...]]:
        return (), tuple(i for i in range(len(shape)) if i not in stack)

    def rank_limit(self, target: Target) -> None:
        return None

    def init(
        self, key: Array, target: Target, dtype: DTypeLike, a_init: Initializer, w: W | None = None
    ) -> Shift:
        return Shift(jnp.zeros(target.shape, dtype))

    def factors(self, target: Target, parameters: Shift) -> None:
        return None

    def scale(self, target: Target) -> float:
        return 1.0

    def delta(self, target: Target, parameters: Shift, dtype: DTypeLike = jnp.float32) -> Array:
        return jnp.asarray(parameters.delta, dtype)
