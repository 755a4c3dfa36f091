"""Count the bytes of each weight of the base on one device: codes, scales, floats."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Sequence
from typing import Any

import jax

from lora_jax import paths
from lora_jax.base import is_base
from lora_jax.training.sizes import on_each_device

FLOATS = "floats"  # an array that is not part of a quantised weight


@dataclasses.dataclass(frozen=True)
class WeightBytes:
    """The bytes of one weight on one device.

    path, shape, dtype: as in the float array.
    kind: the name of the type of a quantised weight; `FLOATS` if it is not quantised.
    parts: field of the quantised weight ("codes", "scales") -> bytes; or `FLOATS` -> bytes.
    """

    path: str
    shape: tuple[int, ...]
    dtype: str
    kind: str
    parts: dict[str, int]


def weight_bytes(params: Any) -> tuple[WeightBytes, ...]:
    return tuple(_of(path, leaf) for path, leaf in paths.flatten(params).items())


def by_part(weights: Sequence[WeightBytes]) -> dict[str, int]:
    """Return the bytes of all weights by part: codes, scales, floats.

    >>> by_part([WeightBytes("w", (4, 2), "float32", FLOATS, {FLOATS: 32})])
    {'floats': 32}
    """
    found = Counter[str]()
    for weight in weights:
        found.update(weight.parts)
    return dict(found)


def _of(path: str, leaf: Any) -> WeightBytes:
    shape, dtype = tuple(leaf.shape), str(leaf.dtype)
    if not is_base(leaf):
        return WeightBytes(path, shape, dtype, FLOATS, {FLOATS: on_each_device(leaf)})
    parts = Counter[str]()
    for (field, *_), array in jax.tree_util.tree_leaves_with_path(leaf):
        parts[paths.path_of((field,))] += on_each_device(array)
    return WeightBytes(path, shape, dtype, type(leaf).__name__, dict(parts))
