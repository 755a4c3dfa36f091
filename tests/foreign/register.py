"""Small models of packages that we did not write, each as (f, params, args).

Sizes are the smallest that the packages accept. Each builder imports its own package, so a missing
package skips only its own models.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
import types
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from tests.cases import normal

os.environ.setdefault("KERAS_BACKEND", "jax")  # read when Keras is imported
Built = tuple[Callable[..., Any], Any, tuple[Any, ...]]
REGISTRY: dict[str, Callable[[], Built]] = {}

X = normal(1, 4, 6)
IMAGE = normal(2, 16, 16, 3)
IDS = jnp.arange(7) * 5 % 13
KEY = jax.random.key(0)


def model(package: str) -> Callable[[Callable[[Any], Built]], Callable[[], Built]]:
    """Register a builder, which gets the imported package."""

    def register(make: Callable[[Any], Built]) -> Callable[[], Built]:
        def build() -> Built:
            return make(pytest.importorskip(package, exc_type=ImportError))

        REGISTRY[make.__name__] = build
        return build

    return register


def without_init(*packages: str) -> None:
    """Make modules inside packages importable without running the packages' own `__init__`."""
    for name in packages:
        spec = importlib.util.find_spec(name)
        if spec is None or spec.submodule_search_locations is None:
            pytest.skip(f"{name} is not installed")
        if name not in sys.modules:
            bare = types.ModuleType(name)
            bare.__spec__ = spec
            bare.__path__ = list(spec.submodule_search_locations)
            sys.modules[name] = bare
