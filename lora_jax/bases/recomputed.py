"""A linear function of x with a weight that is formed where it is used, and never kept.

    product(fn, known, x) = fn(known, x)        linear in x

JAX would keep the array that the transpose of a product needs: the dequantised W. This primitive
keeps only `known` (the codes and scales). Its transpose is the same primitive with the two
directions swapped. (`jax.custom_vjp` has no forward mode, and
`jax.custom_derivatives.linear_call` no `vmap`.)
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import Primitive, jaxpr_as_fun
from jax.interpreters import ad, batching, mlir

Arrays = tuple[Any, ...]


def product(fn: Callable[[Any, Any], Any], known: Any, x: Any) -> Any:
    """Return `fn(known, x)`, linear in the array x; `known` is a pytree of arrays."""
    leaves, treedef = jax.tree.flatten(known)

    def there(*args: Any) -> Any:
        *leaves, x = args
        return fn(jax.tree.unflatten(treedef, _after(tuple(leaves), x)), x)

    def back(*args: Any) -> Any:
        *leaves, dy = args
        known = jax.tree.unflatten(treedef, _after(tuple(leaves), dy))
        # The transpose by `vjp`, which also honours a custom gradient rule. It is linear: any x.
        (dx,) = jax.vjp(lambda x: fn(known, x), jnp.zeros(x.shape, x.dtype))[1](dy)
        return dx

    return _bind(there, back, leaves, x)


def _bind(there: Callable[..., Any], back: Callable[..., Any], known: Sequence[Any], x: Any) -> Any:
    """Bind the primitive with both directions traced: `there(*known, x)` and `back(*known, dy)`."""
    shapes = [_like(leaf) for leaf in known]
    forward = jax.make_jaxpr(there)(*shapes, _like(x))
    (out,) = forward.out_avals
    backward = jax.make_jaxpr(back)(*shapes, _like(out))
    return _product.bind(*known, x, there=forward, back=backward)


def _like(x: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(jnp.shape(x), x.dtype)


def _after(known: Arrays, x: Any) -> Arrays:
    """Return the same arrays, in such a way that XLA cannot use them before `x` is ready.

    Otherwise XLA sees that both passes form the same W, forms it once, and keeps it; or it forms
    the weights of all layers first. XLA's CPU compiler ignores a barrier, so on a CPU we add a zero
    that XLA cannot recognise as one.
    """

    def barrier(known: Arrays, x: Any) -> Any:
        return lax.optimization_barrier((known, x))[0]

    def add_zero(known: Arrays, x: Any) -> Any:
        one = x[(0,) * x.ndim]
        zero = (one * 0).astype(jnp.int32)  # infinity * 0 is NaN, and becomes 0 as an integer
        return tuple(x + zero.astype(x.dtype) for x in known)

    return lax.platform_dependent(known, x, cpu=add_zero, default=barrier)


_product = Primitive("recomputed_product")


def _call(program: Any) -> Callable[..., Any]:
    return lambda *args: jaxpr_as_fun(program)(*args)[0]


def _run(*args: Any, there: Any, back: Any) -> Any:
    del back
    return _call(there)(*args)


def _jvp(primals: Sequence[Any], tangents: Sequence[Any], *, there: Any, back: Any) -> Any:
    *known, x = primals
    *dknown, dx = tangents
    bind = functools.partial(_product.bind, there=there, back=back)
    parts = [] if isinstance(dx, ad.Zero) else [bind(*known, dx)]
    moving = [i for i, t in enumerate(dknown) if not isinstance(t, ad.Zero)]
    if moving:  # an array that W was multiplied with is trained too

        def of_moving(*values: Any) -> Any:
            leaves = list(known)
            for i, value in zip(moving, values, strict=True):
                leaves[i] = value
            return _call(there)(*leaves, x)

        here, along = [known[i] for i in moving], [dknown[i] for i in moving]
        parts.append(jax.jvp(of_moving, here, along)[1])
    return bind(*primals), sum(parts[1:], parts[0])


def _transpose(dy: Any, *args: Any, there: Any, back: Any) -> list[Any]:
    *known, x = args
    if isinstance(dy, ad.Zero):
        return [None] * len(known) + [ad.Zero(x.aval)]
    return [None] * len(known) + [_product.bind(*known, dy, there=back, back=there)]


def _batch(args: Sequence[Any], dims: Sequence[Any], *, there: Any, back: Any) -> tuple[Any, int]:
    *known_dims, x_dim = dims
    size = next(a.shape[d] for a, d in zip(args, dims, strict=True) if d is not None)
    *known, x = args
    x = jnp.broadcast_to(x, (size, *x.shape)) if x_dim is None else jnp.moveaxis(x, x_dim, 0)
    in_axes = (*known_dims, 0)
    over, under = (jax.vmap(_call(program), in_axes) for program in (there, back))
    return _bind(over, under, known, x), 0


_product.def_impl(
    lambda *args, there, back: jax.jit(functools.partial(_run, there=there, back=back))(*args)
)
_product.def_abstract_eval(lambda *args, there, back: there.out_avals[0])
mlir.register_lowering(_product, mlir.lower_fun(_run, multiple_results=False))
ad.primitive_jvps[_product] = _jvp
ad.primitive_transposes[_product] = _transpose
batching.primitive_batchers[_product] = _batch
