"""DoRA: a low-rank update of the direction of each column of W, and a trained length."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from lora_jax.base import Array, Base, Leaf, W, dense, wide_dtype
from lora_jax.errors import LoraError
from lora_jax.spec import Target
from lora_jax.updates.factors import Factors, Gains, in_w_order
from lora_jax.updates.kind import Initializer, Kind


class Directed(NamedTuple):
    """The arrays of a DoRA target: the factors of the direction, and the length for each output.

    Attributes:
      a: [*stack, *inputs, rank].
      b: [*stack, rank, *outputs].
      magnitude: [*stack, *outputs].
    """

    a: Leaf
    b: Leaf
    magnitude: Leaf


class Dora(Kind):
    """Weight-decomposed low-rank adaptation (DoRA, arXiv 2402.09353).

        V = W + scale * a @ b        W' = magnitude / ||V|| * V

    The norm is taken over the inputs, one for each output (each column of W [in, out]). It is a
    constant in the backward pass (section 4.3 of the paper; PEFT does the same). `b` starts at zero
    and the magnitude at ||W||, so the first W' is W. An output whose V is zero is not rescaled.

    `gains` has magnitude / ||V|| by the factored formula, which never forms a @ b:

        ||V_j||^2 = ||W_j||^2 + 2 scale sum_k b_kj (W^T a)_jk + scale^2 sum_kl b_kj (a^T a)_kl b_lj

    It costs one product of W with `a`, as much as `rank` tokens of the base's forward pass, for a
    batch of any size. Sums are in float32. The slices of a stack are handled one by one, so a
    quantised or bfloat16 stack is never widened as a whole.

    >>> target = Target("w", (3, 2), (), (0,), (1,), 1, 1.0, kind="dora")
    >>> ones = lambda key, target, dtype: jnp.ones((3, 1))
    >>> w = jnp.array([[3.0, 0.0], [4.0, 0.0], [0.0, 1.0]])
    >>> dora = Dora()
    >>> start = dora.init(jax.random.key(0), target, jnp.float32, ones, w)
    >>> start.magnitude
    Array([5., 1.], dtype=float32)
    >>> dora.merged(target, start._replace(magnitude=jnp.array([10.0, 1.0])), w)[:, 0]
    Array([6., 8., 0.], dtype=float32)
    """

    name = "dora"
    fields = Directed

    def axes(self, target: Target) -> Directed:
        return Directed(
            (*target.stack, *target.inputs, None),
            (*target.stack, None, *target.outputs),
            (*target.stack, *target.outputs),
        )

    def init(
        self, key: Array, target: Target, dtype: DTypeLike, a_init: Initializer, w: W | None = None
    ) -> Directed:
        if w is None:
            raise LoraError(
                f"{target.path!r} is adapted by DoRA, whose magnitude begins at the norms of W; "
                "pass the parameters: lora_jax.init(key, layout, params=params)"
            )
        a, b = a_init(key, target, dtype), jnp.zeros(target.b_shape, dtype)
        norms = jnp.sqrt(_squared_norms(target, w, jnp.zeros_like(a), b, 1.0))
        return Directed(a, b, norms.astype(dtype))

    def from_factors(self, target: Target, factors: Factors, w: W) -> Directed:
        squares = _squared_norms(target, w, *factors, self.scale(target))
        return Directed(*factors, jnp.sqrt(squares).astype(factors.b.dtype))

    def factors(self, target: Target, parameters: Directed) -> Factors:
        return Factors(parameters.a, parameters.b)

    def gains(
        self,
        target: Target,
        parameters: Directed,
        w: W,
        scale: Array | float | None = None,
    ) -> Gains:
        w, a, b = jax.lax.stop_gradient((w, parameters.a, parameters.b))
        scale = self.scale(target) if scale is None else scale
        norms = jnp.sqrt(_squared_norms(target, w, a, b, scale))
        return Gains(_ratio(jnp.asarray(parameters.magnitude, norms.dtype), norms))

    def merged(self, target: Target, parameters: Directed, w: W) -> Array:
        w = jnp.asarray(dense(w))
        wide = wide_dtype(w.dtype)
        v = w.astype(wide) + self.delta(target, parameters, wide)
        norms = jnp.sqrt(jnp.sum(jnp.square(jnp.abs(v)), axis=target.inputs, keepdims=True))
        magnitude = jnp.asarray(parameters.magnitude, norms.dtype)
        magnitude = in_w_order(target, magnitude, target.outputs)
        return (_ratio(magnitude, jax.lax.stop_gradient(norms)) * v).astype(w.dtype)


def _ratio(magnitude: Array, norms: Array) -> Array:
    return jnp.where(norms > 0, magnitude / jnp.where(norms > 0, norms, 1), 1)


def _squared_norms(target: Target, w: W, a: Array, b: Array, scale: Array | float | None) -> Array:
    """Return `||W + scale * a @ b||^2` over the inputs, [*stack, *outputs], slice by slice."""
    n = len(target.stack)
    if not n:
        return _of_slice(target, dense(w), a, b, scale)
    stack = target.sizes(target.stack)
    if isinstance(w, Base) and target.stack != tuple(range(n)):
        w = dense(w)  # a base can be sliced only along its leading axes
    if not isinstance(w, Base):
        w = jnp.moveaxis(jnp.asarray(w), target.stack, range(n))

    def flat(x: Array) -> Array:
        return jnp.asarray(x).reshape(math.prod(stack), *x.shape[n:])

    norms = lambda one: _of_slice(target, dense(one[0]), one[1], one[2], scale)  # noqa: E731
    found = jax.lax.map(norms, jax.tree.map(flat, (w, a, b)))
    return found.reshape(*stack, *found.shape[1:])


def _of_slice(target: Target, w: W, a: Array, b: Array, scale: Array | float | None) -> Array:
    """Return the same for one slice of the stack, [*outputs]."""
    wide = wide_dtype(w.dtype)
    w, a, b, scale = (jnp.asarray(x, wide) for x in (w, a, b, scale))
    axes = tuple(i for i in range(len(target.shape)) if i not in target.stack)
    rank, other = len(target.shape), len(target.shape) + 1  # labels that are not axes of W
    inputs, outputs = target.inputs, target.outputs

    def einsum(*operands: Any) -> Array:
        return jnp.einsum(*operands, precision="highest")

    square = einsum(w, axes, w, axes, outputs)
    along = einsum(w, axes, a, (*inputs, rank), (rank, *outputs))
    gram = einsum(a, (*inputs, rank), a, (*inputs, other), (rank, other))
    twice = einsum(gram, (rank, other), b, (other, *outputs), (rank, *outputs))
    rest = jnp.sum(b * (2 * scale * along + scale**2 * twice), axis=0)
    return jnp.maximum(square + rest, 0)  # rounding may leave a small negative number
