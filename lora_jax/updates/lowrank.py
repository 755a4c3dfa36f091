"""The low-rank update `scale * a @ b`, and its product: the hot spot of the library.

Three things make it fast, and FLOPs show none of them:

- Rows are flattened before the product. With activations as [batch, length, in], the gradient of
  `a` contracts two axes at once. XLA on CPU then transposes and copies its operands inside one
  fusion, and recomputes the values that they come from. As plain matrices, each product keeps its
  own kernel. Plain autodiff is then as fast as a custom VJP, and forward mode and higher
  derivatives stay possible.
- The first factor is transposed, and then scaled. XLA on CPU then forms its gradient as [rank, in],
  in half of the time that [in, rank] takes. Without the scale in between, XLA would cancel the
  transposition.
- It is one nested `jit`, so that JAX traces and differentiates it once for all weights of a
  shape; XLA inlines it.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.lax import PrecisionLike

from lora_jax.base import Array, wide_dtype
from lora_jax.errors import LoraError
from lora_jax.updates.named import RANK, ROWS, Named, Names, einsum, wider
from lora_jax.updates.update import AnyWeight, Operation, Pairs, Segment, Update, Wrapper, join


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LowRank(Update):
    """`scale * (a * gain) @ b`.

    a: axes of W with the roles stack and input, and RANK.
    b: axes of W with the roles stack and output, and RANK.
    scale: a static number.
    gain: None, or an array that multiplies each rank: with axes RANK or stack, or with none.
    """

    a: Named
    b: Named
    scale: float = dataclasses.field(default=1.0, metadata={"static": True})
    gain: Named | None = None

    def role(self, name: int) -> str | None:
        in_a, in_b = name in self.a.names, name in self.b.names
        return "stack" if in_a and in_b else "input" if in_a else "output" if in_b else None

    def scaled(self, h: Named) -> Named:
        """Return `h`, the product `x a`, times the scale and the gain. `h` has the gain's axes."""
        array = h.array * self.scale
        if self.gain is not None:
            array = array * self.gain.astype(array.dtype).aligned(h.names)
        return Named(array, h.names)

    def product(self, p: Operation) -> Array:
        y = p.base(None if p.x is None else p.x.array)
        return p.low_rank(y, p.dropped, self) if self.a.size(RANK) else y

    def merged(self, w: Named) -> Array:
        wide = wide_dtype(w.array.dtype)
        present = tuple(n for n in w.names if self.role(n))
        a = self.scaled(self.a.astype(wide))
        delta = Named(einsum(a, self.b.astype(wide), present, precision="highest"), present)
        return (w.array.astype(wide) + delta.aligned(w.names)).astype(w.array.dtype)

    def times(self, factor: Named) -> Update | None:
        real = tuple(n for n in factor.names if factor.size(n) > 1)
        factor = Named(factor.array.reshape([factor.size(n) for n in real]), real)
        if set(real) <= set(self.b.names):
            return dataclasses.replace(self, b=self.b.times(factor))
        if set(real) <= set(self.a.names):
            return dataclasses.replace(self, a=self.a.times(factor))
        return super().times(factor)

    def join(self, parts: Sequence[Segment], name: int, size: int) -> Update | None:
        """Return the parts' factors, each padded with zeros outside its place.

        If one factor has the axis, the ranks are concatenated. If both or neither have it, no two
        parts overlap, and one rank serves all of them.
        """
        roles = {p.update.role(name) for p in parts}
        apart = len(roles) == 1 and bool(roles & {"input", "output"})
        plain = all(type(p.update) is LowRank for p in parts)
        if not plain or (not apart and roles & {"input", "output"}):
            return super().join(parts, name, size)
        rank = max(p.update.a.size(RANK) for p in parts)

        def factors(p: Segment) -> tuple[Named, Named]:
            ends, pair = {name: (p.start, size - p.start - p.size)}, (p.update.a, p.update.b)
            if not apart:
                ends[RANK] = (0, rank - pair[0].size(RANK))
                pair = (pair[0].along(name, p.size), pair[1].along(name, p.size))
            return p.update.scaled(pair[0]).padded(ends), pair[1].padded(ends)

        a, b = (_put_together(ns, apart) for ns in zip(*map(factors, parts), strict=True))
        if a is None or b is None:
            return super().join(parts, name, size)
        return LowRank(a, b)

    def tangents(self, w: AnyWeight, dw: AnyWeight, tangent: Any, none: AnyWeight) -> Pairs:
        names = ("a", "b") if self.gain is None else ("a", "b", "gain")
        along = [dataclasses.replace(self, **{n: getattr(tangent, n)}) for n in names]
        return list(zip((dw, *[none] * (len(names) - 1)), along, strict=True))


def _put_together(factors: Sequence[Named], apart: bool) -> Named | None:
    """Return one factor for several with the same axes: ranks concatenated, or the sum."""
    names = factors[0].names
    if any({*n.names} != {*names} for n in factors):
        return None
    arrays = [n.moved(names).array for n in factors]
    return Named(
        jnp.concatenate(arrays, names.index(RANK)) if apart else sum(arrays[1:], arrays[0]), names
    )


def add(base: Array, x: Named, update: LowRank, out: Names, precision: PrecisionLike) -> Array:
    """Return `base + scale * x a b` without forming `a b`.

    The axes of `base` are named `out`. x shares names with the axes of W that it is multiplied
    along. A name of x or of the factors that is not in `out` is summed over. A name that only `out`
    has is an axis along which the update is constant. The factors are cast to x's dtype.
    """
    names = dict.fromkeys((*x.names, *update.a.names, *update.b.names, *out))
    canonical = dict(zip([n for n in names if n >= 0], range(len(names)), strict=False))
    moved = update.map(Named.renamed, canonical)
    out = tuple(canonical.get(n, n) for n in out)
    return _add(base, x.renamed(canonical), moved, out=out, precision=precision)


@functools.partial(jax.jit, static_argnames=("out", "precision"))
def _add(base: Array, x: Named, update: Any, *, out: Names, precision: PrecisionLike) -> Array:
    with jax.named_scope("lora"):
        a, b = update.a.astype(x.array.dtype), update.b.astype(x.array.dtype)
        first, second = _ordered(x, a, b, out)
        form = _matrix_form if is_matrix_product(x, first, second, out) else _einsum_form
        y = form(x, first, second, out, update, precision)
        y = y.moved(tuple(n for n in out if n in y.names))
        constant = [i for i, n in enumerate(out) if n not in y.names]
        delta = jnp.expand_dims(y.array, constant).astype(base.dtype)
        return base + jnp.broadcast_to(delta, base.shape)


def _ordered(x: Named, a: Named, b: Named, out: Names) -> tuple[Named, Named]:
    """Return the two factors, first the one that more of the contraction runs over.

    That is `a`, except for products with the transpose (a tied embedding, `W.T @ x`).
    """

    def contracted(factor: Named) -> int:
        return math.prod(factor.size(n) for n in factor.names if n in x.names and n not in out)

    return (a, b) if contracted(a) >= contracted(b) else (b, a)


def is_matrix_product(x: Named, first: Named, second: Named, out: Names) -> bool:
    """Return whether x contracts all of the first factor and none of the second, slice by slice."""
    shared = {n for n in first.names if n in second.names and n != RANK}
    contracted = {n for n in x.names if n not in out}
    return (
        {n for n in first.names if n not in shared} == {*contracted, RANK}
        and all(n in out and n not in x.names for n in second.names if n not in (*shared, RANK))
        and all(n in out and n in x.names for n in shared)
    )


def _matrix_form(
    x: Named, first: Named, second: Named, out: Names, update: LowRank, precision: PrecisionLike
) -> Named:
    """Compute x as [*stack, rows, in] times [*stack, in, rank] times [*stack, rank, out]."""
    stack = tuple(n for n in first.names if n in second.names and n != RANK)
    inputs = tuple(n for n in x.names if n not in out)
    rows = tuple(n for n in x.names if n not in (*stack, *inputs))
    outputs = tuple(n for n in second.names if n not in (*stack, RANK))
    left, right = x.matrix(stack, rows, inputs), first.matrix(stack, (RANK,), inputs)
    h = jnp.einsum("...ni,...ri->...nr", left, right * update.scale, precision=precision)
    unscaled = dataclasses.replace(update, scale=1.0)
    h = unscaled.scaled(Named(h, (*stack, ROWS, RANK))).array
    y = jnp.matmul(h, second.matrix(stack, (RANK,), outputs), precision=precision)
    sizes = [*map(x.size, (*stack, *rows)), *map(second.size, outputs)]
    return Named(y.reshape(sizes), (*stack, *rows, *outputs))


def _einsum_form(
    x: Named, first: Named, second: Named, out: Names, update: LowRank, precision: PrecisionLike
) -> Named:
    """Compute any other product: over inputs and outputs, with an input axis kept, and so on."""
    later = {*second.names, *out}
    kept = tuple(n for n in dict.fromkeys((*x.names, *first.names)) if n in later)
    h = update.scaled(Named(einsum(x, first, kept, precision), kept))
    both = {*kept, *second.names}
    names = tuple(n for n in out if n in both)
    return Named(einsum(h, second, names, precision), names)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Gained(Wrapper):
    """`gain * (W + update)`: one number for each output (DoRA's magnitude / norm), or each input.

    gain: has all axes of W with the role stack and those with the role input or output, no others.
    """

    gain: Named

    additive = False

    def product(self, p: Operation) -> Array:
        """Multiply x by the gain along contracted axes, or the result along the others.

        The product and the gain are in float32. A trained gain is within a few thousandths of 1,
        and multiplying a bfloat16 number by it would round back to the same number.
        """
        x, gain = p.x, self.gain if p.spread is None else p.spread(self.gain)
        if any(n not in p.out for n in gain.names):
            if x is None or any(n not in x.names for n in gain.names):
                raise LoraError(
                    "a product sums over some axes of a weight that its adapter rescales (DoRA's "
                    "magnitude, a gain of (IA)3), and not over others, or over places that share "
                    "no input, or looks up rows; the gain cannot follow. Use another kind of "
                    "update for this weight"
                )
            wide = x.astype(wider(x.array.dtype, jnp.float32)).times(gain)
            scaled = Named(wide.array.astype(x.array.dtype), x.names)
            return self.inner.product(dataclasses.replace(p, x=scaled))
        wide = wider(p.dtype, jnp.float32)

        def base(x: Array) -> Array:
            return p.base(x, wide) if p.sums else p.base(x).astype(wide)

        y = self.inner.product(dataclasses.replace(p, base=base, dtype=wide))
        return Named(y, p.out).times(gain).array.astype(p.dtype)

    def merged(self, w: Named) -> Array:
        whole = Named(self.inner.merged(w.astype(jnp.float32)), w.names)
        return whole.times(self.gain).array.astype(w.array.dtype)

    def join(self, parts: Sequence[Segment], name: int, size: int) -> Update | None:
        gained = [p for p in parts if isinstance(p.update, Gained)]
        bare = lambda u: u.inner if isinstance(u, Gained) else u  # noqa: E731
        whole = join([dataclasses.replace(p, update=bare(p.update)) for p in parts], name, size)
        sides = {p.update.role(name) for p in parts} & {"input", "output"}
        if whole is None or (sides and any(name not in p.update.gain.names for p in gained)):
            return None
        one = {n: self.gain.size(n) for n in self.gain.names if n != name}
        if any({*p.update.gain.names} - {name} != {*one} for p in gained):
            return None
        ones = Named(jnp.ones((*one.values(), size), self.gain.array.dtype), (*one, name))
        for p in gained:
            gain = p.update.gain.aligned(ones.names)
            ones = Named(ones.array.at[..., p.start : p.start + p.size].set(gain), ones.names)
        return Gained(whole, ones)

    def sums(self, sizes: dict[int, int]) -> bool:
        return self.inner.sums(sizes) and not any(n in self.gain.names for n in sizes)

    def tangents(self, w: AnyWeight, dw: AnyWeight, tangent: Any, none: AnyWeight) -> Pairs:
        along = super().tangents(w, dw, tangent, none)
        return [*along, (w, Gained(self.inner, tangent.gain))]
