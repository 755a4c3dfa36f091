"""A program, its parameters and arguments, and the register of all of them."""

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
    """Register a builder; it returns (f, params, args, targets[, extras])."""
    name = make.__name__

    @functools.cache
    def build() -> Case:
        f, params, args, targets, *rest = make()
        return Case(name, f, params, args, targets, **(rest[0] if rest else {}))

    REGISTRY[name] = build
    return build


def normal(seed: int, *shape: int) -> jax.Array:
    """Drawn by NumPy and put on the device, which compiles nothing; `jnp.asarray` compiles."""
    return jax.device_put(np.random.default_rng(seed).standard_normal(shape).astype(np.float32))


def near_ones_and_zeros(shapes: Any) -> Any:
    """Parameters for a model: norms' scales about one, the rest about zero, all of them random."""

    def draw(path: Any, leaf: Any) -> jax.Array:
        seed = sum(map(ord, jax.tree_util.keystr(path)))
        return 0.3 * normal(seed, *leaf.shape) + (getattr(path[-1], "key", "") == "scale")

    return jax.tree_util.tree_map_with_path(draw, shapes)
