"""W on its way through a program: an array, or a base that is dequantised where it is used.

A quantised base is never rearranged. The operations that a program applies to it (a transpose, a
cast, a slice) are kept as a list of steps. A product runs `fn(steps(base.dense()), x)`, and the
forward and the backward pass each dequantise the base for themselves: only x and the codes are
kept between them. JAX would keep the array that the transpose of a product needs, the dequantised
W. So a primitive stands for the product, whose transpose is the same primitive with the two
directions swapped. (`jax.custom_vjp` has no forward mode, and
`jax.custom_derivatives.linear_call` no `vmap`.)
"""

from __future__ import annotations

import abc
import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend.core import ClosedJaxpr, Primitive, jaxpr_as_fun
from jax.interpreters import ad, batching, mlir

from lora_jax.base import Array, Base, Leaf
from lora_jax.updates.named import OTHER, Named, Names

Arrays = tuple[Array, ...]
Function = Callable[..., Any]
Move = Callable[..., Named]  # (named array, *operands) -> named array


class Weight(abc.ABC):
    """The protocol of W on its way through a program; the names of its axes are the caller's."""

    @property
    @abc.abstractmethod
    def shape(self) -> tuple[int, ...]: ...

    @property
    @abc.abstractmethod
    def dtype(self) -> np.dtype: ...

    @abc.abstractmethod
    def dense(self) -> Array:
        """Return W as one array."""

    @abc.abstractmethod
    def use(self, fn: Function, *operands: Array) -> Any:
        """Return `fn(W, *operands)`."""

    def product(self, fn: Function, x: Array, *rest: Array) -> Array:
        """Return `fn(W, x, *rest)`, which is linear in x."""
        return self.use(fn, x, *rest)

    @abc.abstractmethod
    def move(
        self, names: Names, fn: Move, *operands: Array, along: Names = ()
    ) -> tuple[Weight, Names]:
        """Return W after `fn`, and the names of its axes; `fn` touches only the axes `along`."""

    @staticmethod
    def of(w: Array | Base) -> Weight:
        """Return W in the form in which a program takes it.

        No gradient flows into the codes and scales of a base.
        """
        return Deferred(jax.tree.map(lax.stop_gradient, w)) if isinstance(w, Base) else Dense(w)

    @staticmethod
    def join(parts: Sequence[Weight], fn: Function) -> Weight:
        """Return `fn` of several weights: an array if all of them are arrays, else deferred."""
        if all(isinstance(p, Dense) for p in parts):
            return Dense(fn(*(p.dense() for p in parts)))
        return Deferred(Joined(tuple(parts), fn))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Dense(Weight):
    """A weight that is one array."""

    array: Leaf

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.array.shape)

    @property
    def dtype(self) -> np.dtype:
        return self.array.dtype

    def dense(self) -> Array:
        return self.array

    def use(self, fn: Function, *operands: Array) -> Any:
        return fn(self.array, *operands)

    def move(
        self, names: Names, fn: Move, *operands: Array, along: Names = ()
    ) -> tuple[Weight, Names]:
        moved = fn(Named(self.array, names), *operands)
        return Dense(moved.array), moved.names


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Absent(Weight):
    """An absent W: in the part of a derivative that goes along the update only."""

    like: jax.ShapeDtypeStruct = dataclasses.field(metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.like.shape)

    @property
    def dtype(self) -> np.dtype:
        return self.like.dtype

    def dense(self) -> Array:
        return jnp.zeros(self.shape, self.dtype)

    def use(self, fn: Function, *operands: Array) -> Any:
        out = jax.eval_shape(fn, self.like, *operands)
        return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), out)

    def move(
        self, names: Names, fn: Move, *operands: Array, along: Names = ()
    ) -> tuple[Weight, Names]:
        out = jax.eval_shape(lambda w: fn(Named(w, names), *operands), self.like)
        return Absent(out.array), out.names


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Step:
    """One operation that a program applies to W before it uses it."""

    fn: Function = dataclasses.field(metadata={"static": True})
    out: jax.ShapeDtypeStruct = dataclasses.field(
        metadata={"static": True}
    )  # the shape and dtype of its result
    operands: Arrays = ()


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Deferred(Weight):
    """A base (or weights that are put together), and the steps that make the weight out of it."""

    source: Base | Joined
    steps: tuple[Step, ...] = ()

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.steps[-1].out.shape if self.steps else self.source.shape)

    @property
    def dtype(self) -> np.dtype:
        return self.steps[-1].out.dtype if self.steps else self.source.dtype

    def dense(self) -> Array:
        w = self.source.dense()
        for step in self.steps:
            w = step.fn(w, *step.operands)
        return w

    def use(self, fn: Function, *operands: Array) -> Any:
        """Return `fn(W, *operands)`; the forward and the backward pass each form W."""
        return jax.checkpoint(lambda weight, operands: fn(weight.dense(), *operands))(
            self, operands
        )

    def product(self, fn: Function, x: Array, *rest: Array) -> Array:
        return recomputed(lambda known, x: fn(known[0].dense(), x, *known[1]), (self, rest), x)

    def move(
        self, names: Names, fn: Move, *operands: Array, along: Names = ()
    ) -> tuple[Weight, Names]:
        out = jax.eval_shape(lambda w: fn(Named(w, names), *operands), shaped(self))
        leading = self.leading(names)
        if along and all(n in leading for n in along):

            def one(x: Array) -> Leaf:
                rest = tuple(OTHER - i for i in range(jnp.ndim(x) - len(leading)))
                return fn(Named(x, (*leading, *rest)), *operands).array

            return Deferred(jax.tree.map(one, self.source)), out.names
        step = Step(lambda w, *ops: fn(Named(w, names), *ops).array, out.array, operands)
        return dataclasses.replace(self, steps=(*self.steps, step)), out.names

    def leading(self, names: Names) -> Names:
        """Return the names of the axes that the base's arrays share, along which it is sliced."""
        if self.steps or not isinstance(self.source, Base):
            return ()
        return names[: self.source.stack_ndim()]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Joined:
    """Several weights put together, some of them quantised; the source of a `Deferred`."""

    parts: tuple[Weight, ...]
    fn: Function = dataclasses.field(metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(jax.eval_shape(self.fn, *map(shaped, self.parts)).shape)

    @property
    def dtype(self) -> np.dtype:
        return jax.eval_shape(self.fn, *map(shaped, self.parts)).dtype

    def dense(self) -> Array:
        return self.fn(*(p.dense() for p in self.parts))


def shaped(x: Array | Weight | Base) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype)


def recomputed(fn: Callable[[Any, Any], Any], known: Leaf, x: Array) -> Array:
    """Return `fn(known, x)`, linear in the array x; `known` is a pytree of arrays."""
    leaves, treedef = jax.tree.flatten(known)

    def forward(*args: Array) -> Array:
        *leaves, x = args
        return fn(jax.tree.unflatten(treedef, _after(tuple(leaves), x)), x)

    def backward(*args: Array) -> Array:
        *leaves, dy = args
        known = jax.tree.unflatten(treedef, _after(tuple(leaves), dy))
        # The transpose by `vjp`, which also honours a custom gradient rule. It is linear: any x.
        (dx,) = jax.vjp(lambda x: fn(known, x), jnp.zeros(x.shape, x.dtype))[1](dy)
        return dx

    return _bind(forward, backward, leaves, x)


def _bind(forward: Function, backward: Function, known: Sequence[Array], x: Array) -> Array:
    """Bind the primitive, with `forward(*known, x)` and `backward(*known, dy)` traced."""
    shapes = list(map(shaped, known))
    one = jax.make_jaxpr(forward)(*shapes, shaped(x))
    other = jax.make_jaxpr(backward)(*shapes, shaped(one.out_avals[0]))
    return _product.bind(*known, x, forward=one, backward=other)


def _after(known: Arrays, x: Array) -> Arrays:
    """Return the same arrays, in such a way that XLA cannot use them before `x` is ready.

    Otherwise XLA sees that both passes form the same W, forms it once, and keeps it; or it forms
    the weights of all layers first. XLA's CPU compiler ignores a barrier, so on a CPU we add a zero
    that XLA cannot recognise as one.
    """

    def barrier(known: Arrays, x: Array) -> Arrays:
        return lax.optimization_barrier((known, x))[0]

    def add_zero(known: Arrays, x: Array) -> Arrays:
        one = x[(0,) * x.ndim]
        zero = (one * 0).astype(jnp.int32)  # infinity * 0 is NaN, and becomes 0 as an integer
        return tuple(x + zero.astype(x.dtype) for x in known)

    return lax.platform_dependent(known, x, cpu=add_zero, default=barrier)


_product = Primitive("recomputed_product")


def _call(program: ClosedJaxpr) -> Function:
    return lambda *args: jaxpr_as_fun(program)(*args)[0]


def _run(*args: Array, forward: ClosedJaxpr, backward: ClosedJaxpr) -> Array:
    return _call(forward)(*args)


def _jvp(
    primals: Any, tangents: Any, *, forward: ClosedJaxpr, backward: ClosedJaxpr
) -> tuple[Array, Array]:
    *known, x = primals
    *dknown, dx = tangents
    bind = functools.partial(_product.bind, forward=forward, backward=backward)
    parts = [] if isinstance(dx, ad.Zero) else [bind(*known, dx)]
    moving = [i for i, t in enumerate(dknown) if not isinstance(t, ad.Zero)]
    if moving:  # an array that W was multiplied with is trained too

        def of_moving(*values: Array) -> Array:
            leaves = list(known)
            for i, value in zip(moving, values, strict=True):
                leaves[i] = value
            return _call(forward)(*leaves, x)

        here, along = [known[i] for i in moving], [dknown[i] for i in moving]
        parts.append(jax.jvp(of_moving, here, along)[1])
    return bind(*primals), sum(parts[1:], parts[0])


def _transpose(dy: Array, *args: Array, forward: ClosedJaxpr, backward: ClosedJaxpr) -> list[Any]:
    *known, x = args
    if isinstance(dy, ad.Zero):
        return [None] * len(known) + [ad.Zero(x.aval)]
    return [None] * len(known) + [_product.bind(*known, dy, forward=backward, backward=forward)]


def _batch(args: Any, dims: Any, *, forward: ClosedJaxpr, backward: ClosedJaxpr) -> tuple[Any, int]:
    *known_dims, x_dim = dims
    size = next(a.shape[d] for a, d in zip(args, dims, strict=True) if d is not None)
    *known, x = args
    x = jnp.broadcast_to(x, (size, *x.shape)) if x_dim is None else jnp.moveaxis(x, x_dim, 0)
    in_axes = (*known_dims, 0)
    over, under = (jax.vmap(_call(program), in_axes) for program in (forward, backward))
    return _bind(over, under, known, x), 0


_product.def_impl(lambda *args, **programs: jax.jit(functools.partial(_run, **programs))(*args))
_product.def_abstract_eval(lambda *args, forward, backward: forward.out_avals[0])
mlir.register_lowering(_product, mlir.lower_fun(_run, multiple_results=False))
ad.primitive_jvps[_product] = _jvp
ad.primitive_transposes[_product] = _transpose
batching.primitive_batchers[_product] = _batch
