"""The low-rank product `scale * (x a) b`, the hot spot, in the form that is fast in time.

Two things make it fast, and neither is in the FLOPs:

- Rows are flattened before the product. With activations left as [batch, length, in], the
  gradient of `a` contracts two axes at once, for which XLA (on CPU) transposes and copies its
  operands inside one fusion and recomputes what produced them; as plain matrices each product
  keeps its own kernel. Plain autodiff then does as well as a custom VJP, and forward mode and
  higher derivatives stay possible.
- It is one nested `jit`, so that JAX traces and differentiates it once for all weights of a
  shape; XLA inlines it.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from lora_jax.multi import segmented_matmul
from lora_jax.primitives.adapted_weight import (
    MEMBER,
    RANK,
    ROWS,
    TALLY,
    AdaptedWeight,
    Named,
    Names,
    einsum,
    scaled,
)
from lora_jax.primitives.gating import Gate

Scaling = Callable[[Named], Named]


def add(base: Any, x: Named, v: AdaptedWeight, out: Names, precision: Any) -> Any:
    """`base + scale * x a b`, never forming `a b`.

    Args:
      base: the product with W itself, its axes named `out`.
      x: the operand; it shares names with the axes of W that it is multiplied along.
      v: the weight; its factors are cast to x's dtype.
      out: names of the result's axes. A name of x or of the factors that is not in `out` is
        summed over; a name in none of them is an axis along which the update is constant.
      precision: of both products, as in `jax.lax.dot_general`.
    """
    if any(n not in x.names or n in out for n in v.a.names if v.is_input(n)):
        v.check_linear("a product with its transpose, or with a part of its inputs")
    if v.choice is not None:
        if _groups(x, v, out):
            return _add_grouped(base, x, v, out, precision)
        v = v.chosen()
    names = dict.fromkeys((*x.names, *v.a.names, *v.b.names, *out))
    canonical = {n: i if n >= 0 else n for i, n in enumerate((*names, MEMBER, TALLY))}
    x = x.renamed(canonical)
    v = v.map(lambda n: n if n is v.w else n.renamed(canonical))
    out = tuple(canonical[n] for n in out)
    how: Any = {"out": out, "scale": v.scale, "precision": precision}
    return _add(base, x, v.a, v.b, v.gain, v.gate, **how)


def _groups(x: Named, v: AdaptedWeight, out: Names) -> bool:
    """Whether it is a plain product of examples that are to be grouped by adapter."""
    a, b = (Named(n.array[0], n.names[1:]) if n.names[0] == MEMBER else None for n in (v.a, v.b))
    if v.choice is None or a is None or b is None or len(v.w.names) != 2:
        return False
    if not (_is_matrix_product(x, a, b, out) and set(out) == {*x.names, *b.names} - set(a.names)):
        return False
    rows = math.prod(x.size(n) for n in x.names if n in out)
    return segmented_matmul.pays(v.choice.examples, v.a.size(MEMBER), rows, v.a.size(RANK))


def _add_grouped(base: Any, x: Named, v: AdaptedWeight, out: Names, precision: Any) -> Any:
    assert v.choice is not None and v.gain is not None
    (inner,), (outer,) = ([n for n in f.names if n not in (MEMBER, RANK)] for f in (v.a, v.b))
    rows = tuple(n for n in x.names if n in out)
    dtype = x.array.dtype
    a, b = v.a.moved((MEMBER, inner, RANK)).astype(dtype), v.b.moved((MEMBER, RANK, outer))
    gain = v.gain.astype(dtype).array * v.scale
    matrix = _matrix(x, (), rows, (inner,))
    with jax.named_scope("lora"):
        y = segmented_matmul.product(
            matrix, a.array, b.astype(dtype).array, gain, v.choice.index, precision
        )
        named = Named(y.reshape(*map(x.size, rows), v.b.size(outer)), (*rows, outer))
        return base + named.moved(out).array.astype(base.dtype)


@functools.partial(jax.jit, static_argnames=("out", "scale", "precision"))
def _add(
    base: Any,
    x: Named,
    a: Named,
    b: Named,
    gain: Named | None,
    gate: Gate | None,
    *,
    out: Names,
    scale: float,
    precision: Any,
) -> Any:
    with jax.named_scope("lora"):
        a, b = a.astype(x.array.dtype), b.astype(x.array.dtype)
        first, second = _ordered(x, a, b, out)
        form = _matrix_form if _is_matrix_product(x, first, second, out) else _einsum_form
        y = form(x, first, second, out, lambda h: scaled(h, scale, gain, gate), precision)
        y = y.moved(tuple(n for n in out if n in y.names))
        constant = [i for i, n in enumerate(out) if n not in y.names]
        delta = jnp.expand_dims(y.array, constant).astype(base.dtype)
        return base + jnp.broadcast_to(delta, base.shape)


def _ordered(x: Named, a: Named, b: Named, out: Names) -> tuple[Named, Named]:
    """The factor that more of the contraction runs over comes first.

    That is `a`, but for products with the transpose (a tied embedding, `W.T @ x`): there `b`.
    """

    def contracted(factor: Named) -> int:
        return math.prod(factor.size(n) for n in factor.names if n in x.names and n not in out)

    return (a, b) if contracted(a) >= contracted(b) else (b, a)


def _is_matrix_product(x: Named, first: Named, second: Named, out: Names) -> bool:
    """Whether x contracts all of the first factor and none of the second, stack by stack."""
    shared = {n for n in first.names if n in second.names and n != RANK}
    contracted = {n for n in x.names if n not in out}
    return (
        {n for n in first.names if n not in shared} == {*contracted, RANK}
        and all(n in out and n not in x.names for n in second.names if n not in (*shared, RANK))
        and all(n in out and n in x.names for n in shared)
    )


def _matrix_form(
    x: Named, first: Named, second: Named, out: Names, scaling: Scaling, precision: Any
) -> Named:
    """With x as [*stack, rows, in], the factors as [*stack, in, rank] and [*stack, rank, out]."""
    stack = tuple(n for n in first.names if n in second.names and n != RANK)
    inputs = tuple(n for n in x.names if n not in out)
    rows = tuple(n for n in x.names if n not in (*stack, *inputs))
    outputs = tuple(n for n in second.names if n not in (*stack, RANK))
    h = jnp.matmul(
        _matrix(x, stack, rows, inputs),
        _matrix(first, stack, inputs, (RANK,)),
        precision=precision,
    )
    h = scaling(Named(h, (*stack, ROWS, RANK))).array
    y = jnp.matmul(h, _matrix(second, stack, (RANK,), outputs), precision=precision)
    sizes = [*map(x.size, (*stack, *rows)), *map(second.size, outputs)]
    return Named(y.reshape(sizes), (*stack, *rows, *outputs))


def _matrix(n: Named, stack: Names, left: Names, right: Names) -> Any:
    shape = (*map(n.size, stack), math.prod(map(n.size, left)), math.prod(map(n.size, right)))
    return n.moved((*stack, *left, *right)).array.reshape(shape)


def _einsum_form(
    x: Named, first: Named, second: Named, out: Names, scaling: Scaling, precision: Any
) -> Named:
    """Whatever else a program may do: contract over inputs and outputs, keep an input axis, ..."""
    later = {*second.names, *out}
    kept = tuple(n for n in dict.fromkeys((*x.names, *first.names)) if n in later)
    h = scaling(Named(einsum(x, first, kept, precision), kept))
    both = {*kept, *second.names}
    names = tuple(n for n in out if n in both)
    return Named(einsum(h, second, names, precision), names)
