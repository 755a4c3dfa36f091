"""The adapter tree: `{path: Factors(a, b)}`. It holds arrays and nothing else."""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lora_jax.errors import LoraError, listed, nearest
from lora_jax.layout import Layout, Target


class Factors(NamedTuple):
    """The two factors of one update `scale * a @ b`.

    a: [*stack, *inputs, rank], the paper's A transposed (it maps the input down);
    b: [*stack, rank, *outputs], the paper's B transposed (it maps up to the output).
    The axes are those of the target in the layout.
    """

    a: Any
    b: Any


Adapters = dict[str, Factors]


class Adapter(NamedTuple):
    """One adapter: everything that is saved, stacked or handed on together.

    layout: which parameters are adapted, and the roles of their axes.
    parameters: `{path: Factors(a, b)}`, in the layout's shapes.
    trainable: `{path: array}`, base parameters that were trained in full with the factors, such
      as a new head (PEFT's `modules_to_save`). Put them into the parameter tree with
      `lora_jax.paths.replace(params, adapter.trainable)`.

    It unpacks: `layout, adapters, trainable = lora_jax.restore(path)`. Where a function takes an
    `Adapter`, a plain tuple `(layout, adapters)` will do.
    """

    layout: Layout
    parameters: Adapters
    trainable: Mapping[str, Any] = {}


def factors_alone(adapter: Adapter, doing: str) -> Adapter:
    """Return the adapter, a plain tuple made one, if it has no trainable base parameters.

    Args:
      adapter: an `Adapter`, or a tuple of its first two or three fields.
      doing: what cannot be done with base parameters, for the message: "stacked".

    Raises:
      LoraError: it has some, which would be lost.
    """
    adapter = Adapter(*adapter)
    if adapter.trainable:
        raise LoraError(
            f"an adapter that also trained base parameters cannot be {doing}, since only factors "
            f"can:\n{listed(adapter.trainable)}\n"
            "Pass adapter._replace(trainable={}), and put these into the parameters yourself: "
            "lora_jax.paths.replace(params, adapter.trainable)"
        )
    return adapter


def init(
    key: jax.Array,
    layout: Layout,
    *,
    dtype: Any = jnp.float32,
    a_init: Callable[[jax.Array, Target, Any], jax.Array] | None = None,
) -> Adapters:
    """Fresh adapters: `a ~ N(0, 1/fan_in)`, `b = 0`, so that the first output is the base's.

    Args:
      key: a PRNG key. Each target draws from the key folded with its own path, so that adding
        a target does not change the others.
      layout: from `lora_jax.resolve`.
      dtype: of the factors. Keep float32 also over a bfloat16 base: the factors are the
        masters that the optimizer updates, and they are cast where they are used.
      a_init: `a_init(key, target, dtype) -> array of target.a_shape`, to draw `a` otherwise.

    Returns:
      `{path: Factors(a, b)}` in the layout's order.
    """
    a_init = a_init or gaussian
    out: Adapters = {}
    for target in layout.targets:
        a = a_init(jax.random.fold_in(key, zlib.crc32(target.path.encode())), target, dtype)
        out[target.path] = Factors(a, jnp.zeros(target.b_shape, dtype))
    return out


def gaussian(key: jax.Array, target: Target, dtype: Any) -> jax.Array:
    """N(0, 1/fan_in), fan_in being the product of the target's input axes."""
    return jax.random.normal(key, target.a_shape, dtype) / math.sqrt(target.fan_in)


def count(adapters: Any) -> int:
    """How many numbers an adapter tree (or any pytree of arrays) holds."""
    return sum(math.prod(jnp.shape(leaf)) for leaf in jax.tree.leaves(adapters))


def check(layout: Layout, adapters: Adapters) -> None:
    """Raise `LoraError` unless `adapters` are exactly the layout's targets in its shapes."""
    if not isinstance(adapters, dict):
        raise LoraError(
            f"adapters must be a dict of path -> Factors, got {type(adapters).__name__}; "
            "the argument order is g(params, adapters, ...) and merge(layout, params, adapters)"
        )
    wanted = {t.path for t in layout.targets}
    for path in adapters:
        if path not in wanted:
            raise LoraError(
                f"the adapters hold {path!r}, which the layout does not; nearest in the "
                f"layout:\n{listed(nearest(path, wanted))}\n"
                "Use the layout that was saved beside these adapters (lora_jax.restore)."
            )
    for target in layout.targets:
        if target.path not in adapters:
            raise LoraError(
                f"the layout adapts {target.path!r}, but the adapters have no factors for it; "
                "use lora_jax.init(key, layout) or the layout saved beside these adapters"
            )
        check_factors(target, adapters[target.path])


def check_factors(target: Target, factors: Factors) -> None:
    if not isinstance(factors, Factors):
        raise LoraError(
            f"{target.path!r}: expected Factors(a, b), got {type(factors).__name__}; "
            "lora_jax.restore and jax.tree.map keep the type"
        )
    got = (tuple(jnp.shape(factors.a)), tuple(jnp.shape(factors.b)))
    if got != (target.a_shape, target.b_shape):
        raise LoraError(
            f"{target.path!r}: the factors do not fit the layout.\n"
            f"  a: got {got[0]}, the layout has {target.a_shape}\n"
            f"  b: got {got[1]}, the layout has {target.b_shape}\n"
            f"The layout has rank {target.rank}; were the adapters made with another spec?"
        )


def wide_dtype(dtype: Any) -> Any:
    """The dtype in which the sum is formed: float32, or float64 over a float64 base."""
    return jnp.float64 if dtype == jnp.float64 else jnp.float32
