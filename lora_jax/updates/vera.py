"""VeRA: one random pair of factors that is never trained, and two trained vectors per target."""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from lora_jax.base import Array, Leaf, W
from lora_jax.spec import Target
from lora_jax.updates.factors import Factors
from lora_jax.updates.kind import Initializer, Kind

FIRST_RANK_VALUE = 0.1  # first value of lambda_d, as in PEFT


class Vectors(NamedTuple):
    """The arrays of a VeRA target: the vectors that the frozen pair is multiplied with.

    Attributes:
      lambda_d: [*stack, rank].
      lambda_b: [*stack, *outputs].
    """

    lambda_d: Leaf
    lambda_b: Leaf


class Vera(Kind):
    """Vector-based random matrix adaptation (VeRA, arXiv 2310.11454).

        W' = W + A diag(lambda_d) B diag(lambda_b)      A [in, rank], B [rank, out]

    A and B are random, frozen, and the same for all targets: a target takes the first `in` rows of
    A and the first `out` columns of B. They are neither stored nor saved. `noise`, a fixed integer
    hash, computes them from their indices and gives the same numbers on every machine for ever, so
    an adapter consists of its two vectors. A and B have PEFT's Kaiming-uniform bounds, sqrt(6
    / in) and sqrt(6 / rank), with the target's own `in` (PEFT takes the largest of the model).
    lambda_d starts at 0.1 and lambda_b at 0. There is no alpha: the scale is 1.

    The two vectors are multiplied into B, so that no gradient of A is computed.

    >>> target = Target("w", (6, 4), (), (0,), (1,), rank=3, alpha=1.0, kind="vera")
    >>> vera = Vera()
    >>> vera.shapes(target)
    Vectors(lambda_d=(3,), lambda_b=(4,))
    >>> jax.tree.map(jnp.shape, vera.factors(target, Vectors(jnp.ones(3), jnp.ones(4))))
    Factors(a=(6, 3), b=(3, 4))
    """

    name = "vera"
    fields = Vectors
    zero_at_first = "lambda_b"

    def axes(self, target: Target) -> Vectors:
        return Vectors((*target.stack, None), (*target.stack, *target.outputs))

    def rank_limit(self, target: Target) -> None:
        return None  # each rank adds one trained number

    def init(
        self, key: Array, target: Target, dtype: DTypeLike, a_init: Initializer, w: W | None = None
    ) -> Vectors:
        lambda_d, lambda_b = self.shapes(target)
        return Vectors(jnp.full(lambda_d, FIRST_RANK_VALUE, dtype), jnp.zeros(lambda_b, dtype))

    def factors(self, target: Target, parameters: Vectors) -> Factors:
        lambda_d, lambda_b = (jnp.asarray(x) for x in parameters)
        a, b = frozen_pair(target, lambda_b.dtype)
        stack, inputs = target.sizes(target.stack), target.sizes(target.inputs)
        outputs = target.sizes(target.outputs)
        ones = (1,) * len(stack)
        a = jnp.broadcast_to(a.reshape(*ones, *inputs, target.rank), target.a_shape)
        d = lambda_d.reshape(*stack, target.rank, *(1 for _ in outputs)).astype(b.dtype)
        each_output = lambda_b[(slice(None),) * len(stack) + (None,)]
        return Factors(a, b.reshape(*ones, target.rank, *outputs) * d * each_output)

    def scale(self, target: Target) -> float:
        return 1.0


def frozen_pair(target: Target, dtype: DTypeLike) -> Factors:
    """Return A [in, rank] and B [rank, out] of a target, which all slices of its stack share."""
    fan_in, rank, fan_out = target.fan_in, target.rank, target.fan_out
    a = noise(1, fan_in, rank) * math.sqrt(6 / fan_in)
    b = noise(2, fan_out, rank).T * math.sqrt(6 / rank)
    return Factors(a.astype(dtype), b.astype(dtype))


def noise(stream: int, rows: int, columns: int) -> jax.Array:
    """Return [rows, columns] float32 numbers that look uniform on [-1, 1).

    Each number is the upper 24 bits of murmur3's 32-bit finalizer, applied to its two indices: once
    for the column and once for the row. So a larger array begins with the same numbers.

    >>> noise(1, 2, 2)
    Array([[ 0.33002794, -0.11746907],
           [-0.13247204,  0.64417577]], dtype=float32)
    """
    column = _mixed(jnp.arange(columns, dtype=jnp.uint32) + jnp.uint32(stream * 0x9E3779B9 % 2**32))
    bits = _mixed(column[None, :] ^ jnp.arange(rows, dtype=jnp.uint32)[:, None])
    return (bits >> 8).astype(jnp.float32) * 2.0**-23 - 1


def _mixed(x: Array) -> Array:
    """Return murmur3's fmix32 of uint32."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)
