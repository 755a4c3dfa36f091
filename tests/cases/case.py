"""A program with its parameters and arguments, and the registry of all programs."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

B, T = 3, 5  # examples, tokens


@dataclasses.dataclass(frozen=True)
class Case:
    name: str
    f: Callable[..., Any]  # f(params, *args, **kwargs) -> a tree of arrays
    params: Any
    args: tuple[Any, ...]
    targets: tuple[str, ...]
    kwargs: dict[str, Any] = dataclasses.field(default_factory=dict)
    reverse: bool = True  # reverse-mode differentiable (a while_loop is not)
    batched: bool = True  # JAX can vmap the function over its weights alone


REGISTRY: dict[str, Callable[[], Case]] = {}


def case(make: Callable[[], Any]) -> Callable[[], Case]:
    """Register a builder, which returns (f, params, args, targets[, extras])."""
    name = make.__name__

    @functools.cache
    def build() -> Case:
        f, params, args, targets, *rest = make()
        return Case(name, f, params, args, targets, **(rest[0] if rest else {}))

    REGISTRY[name] = build
    return build


def normal(seed: int, *shape: int) -> jax.Array:
    """Draw by NumPy and put on the device, which compiles nothing; `jnp.asarray` would compile."""
    return jax.device_put(np.random.default_rng(seed).standard_normal(shape).astype(np.float32))


def near_ones_and_zeros(shapes: Any) -> Any:
    """Draw a model's parameters at random: scales of norms around one, the others around zero."""

    def draw(path: Any, leaf: Any) -> jax.Array:
        seed = sum(map(ord, jax.tree_util.keystr(path)))
        return 0.3 * normal(seed, *leaf.shape) + (getattr(path[-1], "key", "") == "scale")

    return jax.tree_util.tree_map_with_path(draw, shapes)
