"""The sizes of parameters: their number, and their bytes on each device."""

from __future__ import annotations

import math
from typing import Any

import jax

from lora_jax import paths
from lora_jax.base import is_base
from lora_jax.bases.quantise import bytes_of


def is_quantised(params: Any) -> bool:
    return any(map(is_base, paths.flatten(params).values()))


def parameters(params: Any) -> int:
    """Count the parameters of a tree; a quantised weight counts as its floats."""
    return sum(math.prod(leaf.shape) for leaf in paths.flatten(params).values())


def on_each_device(tree: Any) -> int:
    """Return the bytes of a tree's arrays on one device; every device has as many."""

    def part(x: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(x.sharding.shard_shape(x.shape), x.dtype)

    return bytes_of(jax.tree.map(part, tree))


def in_units(number: float, unit: str = "B") -> str:
    """Format a number of bytes, or of another unit, with a decimal prefix.

    >>> in_units(999), in_units(1_234_567), in_units(2.541e17, "FLOP")
    ('999 B', '1.23 MB', '254.10 PFLOP')
    """
    for prefix in ("", "k", "M", "G", "T"):
        if abs(number) < 1000:
            return f"{number:.2f} {prefix}{unit}" if prefix else f"{number:.0f} {unit}"
        number /= 1000
    return f"{number:.2f} P{unit}"
