"""LoRA: `W + scale * a @ b`, for the whole weight or for parts of a fused one."""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from lora_jax.base import Array, W
from lora_jax.errors import LoraError
from lora_jax.spec import Target
from lora_jax.updates.factors import Factors
from lora_jax.updates.kind import Initializer, Kind


class Lora(Kind):
    """Low-rank adaptation (arXiv 2106.09685): `W' = W + scale * a @ b`.

        a  [*stack, *inputs, rank]     drawn by `a_init`
        b  [*stack, rank, *outputs]    zero at the start

    **Parts.** A fused kernel [in, 3 d] computes q, k and v by one product. With the parts
    ((0, d), (2 d, d)) of its output axis, q and v have an update of their own and k has none, as
    with `MergedLinear(enable_lora=[True, False, True])` of Microsoft's loralib. For P parts

        a  [*stack, *inputs, P, rank]
        b  [*stack, rank, *outputs]    the output axis holds only the parts, one after the other

    and `factors` puts each part of `b` into rows of its own: rank P * rank, zero elsewhere.

    >>> target = Target("qkv", (4, 9), (), (0,), (1,), 2, 2.0, parts=((0, 3), (6, 3)))
    >>> lora = Lora()
    >>> lora.shapes(target)
    Factors(a=(4, 2, 2), b=(2, 6))
    >>> parameters = Factors(jnp.ones((4, 2, 2)), jnp.ones((2, 6)))
    >>> lora.factors(target, parameters).b.astype(int)
    Array([[1, 1, 1, 0, 0, 0, 0, 0, 0],
           [1, 1, 1, 0, 0, 0, 0, 0, 0],
           [0, 0, 0, 0, 0, 0, 1, 1, 1],
           [0, 0, 0, 0, 0, 0, 1, 1, 1]], dtype=int32)
    """

    name = "lora"
    fields = Factors
    has_parts = True

    def axes(self, target: Target) -> Factors:
        parts: tuple[None, ...] = (None,) if target.parts else ()
        # An axis that holds only the parts is not an axis of W, so it is not sharded like one.
        outputs = [None if target.parts and i == _part_axis(target) else i for i in target.outputs]
        return Factors(
            (*target.stack, *target.inputs, *parts, None), (*target.stack, None, *outputs)
        )

    def shapes(self, target: Target) -> Factors:
        if not target.parts:
            return Factors(target.a_shape, target.b_shape)
        *above, rank = target.a_shape
        b = list(target.b_shape)
        b[_part_position(target)] = sum(size for _, size in target.parts)
        return Factors((*above, len(target.parts), rank), tuple(b))

    def rank_limit(self, target: Target) -> tuple[int, str] | None:
        _check_parts(target)
        whole = super().rank_limit(target)
        parts = [target.fan_out // target.shape[_part_axis(target)] * n for _, n in target.parts]
        narrow = whole is not None and parts and min(parts) < whole[0]
        return (min(parts), "min(in, part)") if narrow else whole

    def init(
        self, key: Array, target: Target, dtype: DTypeLike, a_init: Initializer, w: W | None = None
    ) -> Factors:
        if target.parts:
            keys = jax.random.split(key, len(target.parts))
            a = jnp.stack([a_init(k, target, dtype) for k in keys], axis=-2)
        else:
            a = a_init(key, target, dtype)
        return Factors(a, jnp.zeros(self.shapes(target).b, dtype))

    def from_factors(self, target: Target, factors: Factors, w: W) -> Factors:
        return super().from_factors(target, factors, w) if target.parts else factors

    def factors(self, target: Target, parameters: Factors) -> Factors:
        if not target.parts:
            return parameters
        a, b = parameters
        axis, n_stack = _part_position(target), len(target.stack)
        size = target.shape[_part_axis(target)]
        ends = list(itertools.accumulate(length for _, length in target.parts))
        rows = []
        pieces = jnp.split(b, ends[:-1], axis)
        for part, (start, length) in zip(pieces, target.parts, strict=True):
            around = [(0, 0)] * b.ndim
            around[axis] = (start, size - start - length)
            rows.append(jnp.pad(part, around))
        rank = len(target.parts) * target.rank
        return Factors(a.reshape(*a.shape[:-2], rank), jnp.concatenate(rows, axis=n_stack))


def _part_axis(target: Target) -> int:
    """Return the axis of W that the parts slice."""
    return target.outputs[target.part_axis]


def _part_position(target: Target) -> int:
    """Return the axis of `b` that the parts slice."""
    return len(target.stack) + 1 + target.part_axis % len(target.outputs)


def _check_parts(target: Target) -> None:
    n, path, end = len(target.outputs), target.path, 0
    if target.parts and not -n <= target.part_axis < n:
        raise LoraError(
            f"{path!r}: part_axis {target.part_axis} is not an index into the output axes "
            f"{target.outputs}"
        )
    for start, length in target.parts:
        axis = target.outputs[target.part_axis]
        if start < end or length < 1 or start + length > target.shape[axis]:
            raise LoraError(
                f"{path!r}: the parts {target.parts} must be (start, size) slices of the output "
                f"axis {axis}, whose size is {target.shape[axis]}, in order and without overlap"
            )
        end = start + length
