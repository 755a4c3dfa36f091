"""A base, two kinds of update and a primitive with its rule, as another package would define them.

Nothing here is known to lora_jax. tests/test_extending.py walks them through every function.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from lora_jax.base import Base
from lora_jax.primitives import kernel
from lora_jax.updates import Bias, Factors, Gains, Kind


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Halves(Base):
    """A weight stored as one byte for each number, with a scale for each slice of its stack."""

    codes: Any  # int8 [*stack, *slice]
    scale: Any  # float32 [*stack]
    slice_ndim: int = dataclasses.field(metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.codes.shape)

    @property
    def dtype(self) -> Any:
        return self.scale.dtype

    def dense(self) -> Any:
        return self.codes * jnp.expand_dims(self.scale, range(-self.slice_ndim, 0))


def halves(w: Any, n_stack: int) -> Halves:
    axes = tuple(range(n_stack, w.ndim))
    scale = jnp.abs(w).max(axes) / 7
    codes = jnp.round(w / jnp.expand_dims(scale, axes)).astype(jnp.int8)
    return Halves(codes, scale, len(axes))


class Shifted(NamedTuple):
    """One number for each output."""

    shift: Any


class Vector(Kind):
    """A kind for vectors: `W' = W + 2 shift`."""

    name = "vector"
    fields = Shifted
    zero_at_first = "shift"
    roles = Bias.roles

    def axes(self, target: Any) -> Shifted:
        return Shifted((*target.stack, *target.outputs))

    def init(self, key: Any, target: Any, dtype: Any, a_init: Any, w: Any = None) -> Shifted:
        return Shifted(jnp.zeros(target.shape, dtype))

    def factors(self, target: Any, parameters: Shifted) -> None:
        return None

    def delta(self, target: Any, parameters: Shifted, dtype: Any = jnp.float32) -> Any:
        return 2 * jnp.asarray(parameters.shift, dtype)


class ScaledFactors(NamedTuple):
    """a [*stack, *inputs, rank], b [*stack, rank, *outputs], gain [*stack, *outputs]."""

    a: Any
    b: Any
    gain: Any


class Scaled(Kind):
    """A kind for matrices that is exactly factors: `W' = W + scale * (a @ b) * gain`."""

    name = "scaled"
    fields = ScaledFactors

    def axes(self, target: Any) -> ScaledFactors:
        stack, inputs, outputs = target.stack, target.inputs, target.outputs
        return ScaledFactors((*stack, *inputs, None), (*stack, None, *outputs), (*stack, *outputs))

    def init(self, key: Any, target: Any, dtype: Any, a_init: Any, w: Any = None) -> Any:
        shapes = self.shapes(target)
        a, b = a_init(key, target, dtype), jnp.zeros(shapes.b, dtype)
        return ScaledFactors(a, b, jnp.ones(shapes.gain, dtype))

    def factors(self, target: Any, parameters: ScaledFactors) -> Factors:
        gain = jnp.expand_dims(parameters.gain, len(target.stack))
        return Factors(parameters.a, parameters.b * gain)


class Rescaled(Scaled):
    """A kind that rescales: `W' = exp(l_in) (W + scale * a @ b)`, a gain of each input."""

    name = "rescaled"

    def axes(self, target: Any) -> ScaledFactors:
        return super().axes(target)._replace(gain=(*target.stack, *target.inputs))

    def factors(self, target: Any, parameters: ScaledFactors) -> Factors:
        return Factors(parameters.a, parameters.b)

    def gains(self, target: Any, parameters: ScaledFactors, w: Any, scale: Any = None) -> Gains:
        return Gains(inputs=jnp.exp(parameters.gain - 1))


def banked(x: Any, w: Any) -> Any:
    """Return `x[g] @ w[g]` for each group, as a primitive of its own."""
    return banked_p.bind(x, w)


def _run(x: Any, w: Any) -> Any:
    return jnp.einsum("gni,gio->gno", x, w)


banked_p = Primitive("my_bank")
banked_p.def_impl(_run)
banked_p.def_abstract_eval(lambda x, w: x.update(shape=(*x.shape[:2], w.shape[2])))
mlir.register_lowering(banked_p, mlir.lower_fun(_run, multiple_results=False))
ad.defbilinear(
    banked_p,
    lambda dy, x, w: jnp.einsum("gno,gio->gni", dy, w),
    lambda dy, x, w: jnp.einsum("gni,gno->gio", x, dy),
)
batching.primitive_batchers[banked_p] = lambda ins, dims: (jax.vmap(_run, dims)(*ins), 0)
bank_rule = kernel.product(
    banked,
    x=0,
    weight=1,
    stack=(0,),
    inputs=1,
    outputs=2,
    rows=lambda array, x: jnp.broadcast_to(array[:, None], (*x.shape[:2], array.shape[1])),
)
