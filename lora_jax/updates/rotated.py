"""An update that rotates W along its inputs: `R (W + update)`, with R block-diagonal."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import numpy as np
from jax.lax import PrecisionLike
from jax.sharding import PartitionSpec

from lora_jax.base import Array, wide_dtype
from lora_jax.errors import LoraError
from lora_jax.updates.named import BLOCK, COLUMN, ROW, Named, Names, einsum, without
from lora_jax.updates.update import AnyWeight, Operation, Pairs, Update, Wrapper


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rotated(Wrapper):
    """`R (W + update)`: x is multiplied by R, and then by W.

    R follows all that the program does to W's outputs and stack, and a reshape of its inputs. It
    cannot follow a slice or another order of the inputs, since a row of `R W` is made of other rows
    of W.

    blocks: the blocks of R, with W's stack axes and BLOCK, ROW, COLUMN.
    inputs, sizes: the names and sizes of W's input axes. R takes them flattened in this order.
    """

    blocks: Named
    inputs: Names = dataclasses.field(metadata={"static": True})
    sizes: tuple[int, ...] = dataclasses.field(metadata={"static": True})

    additive = False

    def map(self, fn: Any, *operands: Any) -> Rotated:
        order = np.arange(math.prod(self.sizes))
        with jax.ensure_compile_time_eval():
            moved = fn(Named(order.reshape(self.sizes), self.inputs), *operands)
        if isinstance(moved.array, PartitionSpec):
            kept, sizes = not any(moved.array), self.sizes
        else:
            known, sizes = not isinstance(moved.array, jax.core.Tracer), moved.array.shape
            kept = known and np.array_equal(np.ravel(moved.array), order)
        if not kept:
            raise _refused("the program slices, shards or rearranges the inputs")
        new: Any = super().map(fn, *operands)
        return Rotated(new.inner, new.blocks, moved.names, tuple(sizes))

    def product(self, p: Operation) -> Array:
        inputs, before = {*self.inputs}, {*(() if p.x is None else p.x.names)}
        blocks = self.blocks if p.spread is None else self._spread(p)
        if p.x is not None and inputs <= before and not inputs & {*p.out}:
            x = self._turned(p.x, blocks, (ROW, COLUMN), p.precision)
            return self.inner.product(dataclasses.replace(p, x=x))
        if inputs <= {*p.out} and not inputs & before:  # a product with the transpose
            y = Named(self.inner.product(p), p.out)
            return self._turned(y, blocks, (COLUMN, ROW), p.precision).array
        raise _refused("a lookup, a convolution or a product over a part of the inputs is taken")

    def _spread(self, p: Operation) -> Named:
        """Return the blocks with the rows of a grouped product in place of the groups."""
        assert p.spread is not None
        own = without(self.blocks.names, (BLOCK, ROW, COLUMN))
        sizes = tuple(map(self.blocks.size, (BLOCK, ROW, COLUMN)))
        flat = self.blocks.array.reshape(*map(self.blocks.size, own), math.prod(sizes))
        rows = p.spread(Named(flat, (*own, BLOCK)))
        array = rows.array.reshape(*rows.array.shape[:-1], *sizes)
        return Named(array, (*rows.names, ROW, COLUMN))

    def _turned(
        self, x: Named, blocks: Named, along: tuple[int, int], precision: PrecisionLike
    ) -> Named:
        """Return x with its inputs multiplied along the first axis of each block."""
        rest = without(x.names, self.inputs)
        if not {*blocks.names} <= {*rest, BLOCK, ROW, COLUMN}:
            raise _refused("all slices of a stack are given one x")
        moved, wide = x.moved((*rest, *self.inputs)), wide_dtype(x.array.dtype)
        shape = moved.array.shape
        split = moved.array.reshape(*shape[: len(rest)], blocks.size(BLOCK), blocks.size(ROW))
        split = Named(split.astype(wide), (*rest, BLOCK, along[0]))
        with jax.named_scope("lora"):
            y = einsum(split, blocks.astype(wide), (*rest, BLOCK, along[1]), precision)
        return Named(y.reshape(shape), moved.names).moved(x.names).astype(x.array.dtype)

    def merged(self, w: Named) -> Array:
        whole = Named(self.inner.merged(w.astype(wide_dtype(w.array.dtype))), w.names)
        turned = self._turned(whole, self.blocks, (COLUMN, ROW), "highest")
        return turned.array.astype(w.array.dtype)

    def times(self, factor: Named) -> Update | None:
        along = any(factor.size(n) > 1 for n in factor.names if n in self.inputs)
        return None if along else super().times(factor)

    def sums(self, sizes: dict[int, int]) -> bool:
        return self.inner.sums(sizes) and not any(n in self.inputs for n in sizes)

    def tangents(self, w: AnyWeight, dw: AnyWeight, tangent: Any, none: AnyWeight) -> Pairs:
        along = super().tangents(w, dw, tangent, none)
        return [*along, (w, dataclasses.replace(self, blocks=tangent.blocks))]


def _refused(what: str) -> LoraError:
    return LoraError(
        f"{what} of a weight that its adapter rotates (OFT), and the rotation needs all inputs in "
        "their order. Use another kind of update for this weight"
    )
