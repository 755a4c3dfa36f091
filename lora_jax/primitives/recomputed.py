"""A linear function of x with a weight that is formed where it is used, and never kept.

    product(fn, known, x) = fn(known, x)        linear in x

JAX would keep what the transpose of a product needs, the dequantised W. This primitive keeps
`known` (the codes and scales) alone: its transpose is itself, with the two directions swapped.
(`jax.custom_vjp` has no forward mode, `jax.custom_derivatives.linear_call` no `vmap`.)
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

Arrays = tuple[Any, ...]
Linear = Callable[[Arrays, Any], Any]  # (known, x) -> y


@dataclasses.dataclass(frozen=True)
class Directions:
    """The function and its transpose, `back(known, dy)`."""

    there: Linear
    back: Linear

    def swapped(self) -> Directions:
        return Directions(self.back, self.there)


def product(fn: Callable[[Any, Any], Any], known: Any, x: Any) -> Any:
    """`fn(known, x)`, linear in the array x; `known` is a pytree of arrays."""
    leaves, treedef = jax.tree.flatten(known)
    like = jax.ShapeDtypeStruct(x.shape, x.dtype)

    def there(leaves: Arrays, x: Any) -> Any:
        return fn(jax.tree.unflatten(treedef, _after(leaves, x)), x)

    def back(leaves: Arrays, dy: Any) -> Any:
        known = jax.tree.unflatten(treedef, _after(leaves, dy))
        (dx,) = jax.linear_transpose(lambda x: fn(known, x), like)(dy)
        return dx

    return _product.bind(*leaves, x, ways=Directions(there, back))


def _after(known: Arrays, x: Any) -> Arrays:
    """The same arrays, which XLA may not think to be at hand before `x` is.

    Otherwise it sees that both passes form the same W, forms it once, and keeps it; or it forms
    the weights of all layers first. XLA's CPU compiler looks through a barrier; there, a zero is
    added that it cannot know to be one.
    """

    def barrier(known: Arrays, x: Any) -> Any:
        return lax.optimization_barrier((known, x))[0]

    def add_zero(known: Arrays, x: Any) -> Any:
        one = x[(0,) * x.ndim]
        zero = (one * 0).astype(jnp.int32)  # also of infinity, whose product is not a number
        return tuple(x + zero.astype(x.dtype) for x in known)

    return lax.platform_dependent(tuple(known), x, cpu=add_zero, default=barrier)


_product = Primitive("recomputed_product")


def _run(*args: Any, ways: Directions) -> Any:
    return ways.there(args[:-1], args[-1])


def _shape(*args: Any, ways: Directions) -> Any:
    out = jax.eval_shape(functools.partial(_run, ways=ways), *args)
    return jax.core.ShapedArray(out.shape, out.dtype)


def _jvp(primals: Sequence[Any], tangents: Sequence[Any], *, ways: Directions) -> Any:
    *known, x = primals
    *dknown, dx = tangents
    parts = [] if isinstance(dx, ad.Zero) else [_product.bind(*known, dx, ways=ways)]
    moving = [i for i, t in enumerate(dknown) if not isinstance(t, ad.Zero)]
    if moving:  # something that W was multiplied with is trained too

        def of_moving(*values: Any) -> Any:
            leaves = list(known)
            for i, value in zip(moving, values, strict=True):
                leaves[i] = value
            return ways.there(tuple(leaves), x)

        here, along = [known[i] for i in moving], [dknown[i] for i in moving]
        parts.append(jax.jvp(of_moving, here, along)[1])
    return _product.bind(*primals, ways=ways), sum(parts[1:], parts[0])


def _transpose(dy: Any, *args: Any, ways: Directions) -> list[Any]:
    *known, x = args
    if isinstance(dy, ad.Zero):
        return [None] * len(known) + [ad.Zero(x.aval)]
    return [None] * len(known) + [_product.bind(*known, dy, ways=ways.swapped())]


def _batch(args: Sequence[Any], dims: Sequence[Any], *, ways: Directions) -> tuple[Any, int]:
    *known_dims, x_dim = dims
    axis_size = next(a.shape[d] for a, d in zip(args, dims, strict=True) if d is not None)
    *known, x = args
    x = jnp.broadcast_to(x, (axis_size, *x.shape)) if x_dim is None else jnp.moveaxis(x, x_dim, 0)
    in_axes = (tuple(known_dims), 0)
    over = Directions(jax.vmap(ways.there, in_axes), jax.vmap(ways.back, in_axes))
    return _product.bind(*known, x, ways=over), 0


_product.def_impl(lambda *args, ways: jax.jit(functools.partial(_run, ways=ways))(*args))
_product.def_abstract_eval(_shape)
mlir.register_lowering(_product, mlir.lower_fun(_run, multiple_results=False))
ad.primitive_jvps[_product] = _jvp
ad.primitive_transposes[_product] = _transpose
batching.primitive_batchers[_product] = _batch
