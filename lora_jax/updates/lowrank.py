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

from lora_jax.base import wide_dtype
from lora_jax.updates.named import RANK, ROWS, Named, Names, einsum
from lora_jax.updates.update import Operation, Part, Update


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

    def middle(self, h: Named) -> Named:
        """Return `h`, the product `x a`, times the scale and the gain. `h` has the gain's axes."""
        array = h.array * self.scale
        if self.gain is not None:
            array = array * self.gain.astype(array.dtype).among(h.names)
        return Named(array, h.names)

    def product(self, p: Operation) -> Any:
        return p.low_rank(p.base(None if p.x is None else p.x.array), p.dropped, self)

    def merged(self, w: Named) -> Any:
        wide = wide_dtype(w.array.dtype)
        present = tuple(n for n in w.names if self.role(n))
        a = self.middle(self.a.astype(wide))
        delta = Named(einsum(a, self.b.astype(wide), present, precision="highest"), present)
        return (w.array.astype(wide) + delta.among(w.names)).astype(w.array.dtype)

    def times(self, factor: Named) -> Update | None:
        real = tuple(n for n in factor.names if factor.size(n) > 1)
        factor = Named(factor.array.reshape([factor.size(n) for n in real]), real)
        if set(real) <= set(self.b.names):
            return dataclasses.replace(self, b=self.b.times(factor))
        if set(real) <= set(self.a.names):
            return dataclasses.replace(self, a=self.a.times(factor))
        return None

    def join(self, parts: Sequence[Part], name: int, size: int) -> Update | None:
        """Return the parts' factors, each padded with zeros outside its place.

        If one factor has the axis, the ranks are concatenated. If both or neither have it, no two
        parts overlap, and one rank serves all of them.
        """
        roles = {p.update.role(name) for p in parts}
        apart = len(roles) == 1 and bool(roles & {"input", "output"})
        if any(type(p.update) is not LowRank for p in parts) or (
            not apart and roles & {"input", "output"}
        ):
            return None
        rank = max(p.update.a.size(RANK) for p in parts)

        def factors(p: Part) -> tuple[Named, Named]:
            ends, pair = {name: (p.start, size - p.start - p.size)}, (p.update.a, p.update.b)
            if not apart:
                ends[RANK] = (0, rank - pair[0].size(RANK))
                pair = (pair[0].along(name, p.size), pair[1].along(name, p.size))
            return p.update.middle(pair[0]).padded(ends), pair[1].padded(ends)

        a, b = (_put_together(ns, apart) for ns in zip(*map(factors, parts), strict=True))
        return None if a is None or b is None else LowRank(a, b)

    def derivatives(self, w: Any, dw: Any, tangent: Any, none: Any) -> list[tuple[Any, Update]]:
        parts: list[tuple[Any, Update]] = [
            (dw, dataclasses.replace(self, a=tangent.a)),
            (none, dataclasses.replace(self, b=tangent.b)),
        ]
        if self.gain is not None:
            parts.append((none, dataclasses.replace(self, gain=tangent.gain)))
        return parts


def _put_together(factors: Sequence[Named], apart: bool) -> Named | None:
    """Return one factor for several with the same axes: ranks concatenated, or the sum."""
    names = factors[0].names
    if any({*n.names} != {*names} for n in factors):
        return None
    arrays = [n.moved(names).array for n in factors]
    return Named(jnp.concatenate(arrays, names.index(RANK)) if apart else sum(arrays), names)


def add(base: Any, x: Named, update: LowRank, out: Names, precision: Any) -> Any:
    """Return `base + scale * x a b` without forming `a b`.

    Args:
      base: the product with W itself, whose axes are named `out`.
      x: the operand. It shares names with the axes of W that it is multiplied along.
      update: the update; its factors are cast to x's dtype.
      out: names of the result's axes. A name of x or of the factors that is not in `out` is
        summed over. A name that only `out` has is an axis along which the update is constant.
      precision: of both products, as in `jax.lax.dot_general`.
    """
    names = dict.fromkeys((*x.names, *update.a.names, *update.b.names, *out))
    canonical = dict(zip([n for n in names if n >= 0], range(len(names)), strict=False))
    moved = update.map(lambda n: n.renamed(canonical))
    out = tuple(canonical.get(n, n) for n in out)
    return _add(base, x.renamed(canonical), moved, out=out, precision=precision)


@functools.partial(jax.jit, static_argnames=("out", "precision"))
def _add(base: Any, x: Named, update: Any, *, out: Names, precision: Any) -> Any:
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
    x: Named, first: Named, second: Named, out: Names, update: LowRank, precision: Any
) -> Named:
    """Compute x as [*stack, rows, in] times [*stack, in, rank] times [*stack, rank, out]."""
    stack = tuple(n for n in first.names if n in second.names and n != RANK)
    inputs = tuple(n for n in x.names if n not in out)
    rows = tuple(n for n in x.names if n not in (*stack, *inputs))
    outputs = tuple(n for n in second.names if n not in (*stack, RANK))
    left, right = x.matrix(stack, rows, inputs), first.matrix(stack, (RANK,), inputs)
    h = jnp.einsum("...ni,...ri->...nr", left, right * update.scale, precision=precision)
    unscaled = dataclasses.replace(update, scale=1.0)
    h = unscaled.middle(Named(h, (*stack, ROWS, RANK))).array
    y = jnp.matmul(h, second.matrix(stack, (RANK,), outputs), precision=precision)
    sizes = [*map(x.size, (*stack, *rows)), *map(second.size, outputs)]
    return Named(y.reshape(sizes), (*stack, *rows, *outputs))


def _einsum_form(
    x: Named, first: Named, second: Named, out: Names, update: LowRank, precision: Any
) -> Named:
    """Compute any other product: over inputs and outputs, with an input axis kept, and so on."""
    later = {*second.names, *out}
    kept = tuple(n for n in dict.fromkeys((*x.names, *first.names)) if n in later)
    h = update.middle(Named(einsum(x, first, kept, precision), kept))
    both = {*kept, *second.names}
    names = tuple(n for n in out if n in both)
    return Named(einsum(h, second, names, precision), names)
