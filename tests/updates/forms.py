"""Targets of every kind and every arrangement of axes, and random arrays for them."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax import Target
from lora_jax.updates import kind_of

# Name -> (shape, stack, inputs, outputs).
FORMS = {
    "matrix": ((9, 8), (), (0,), (1,)),
    "transposed": ((6, 9), (), (1,), (0,)),
    "stacked": ((3, 8, 10), (0,), (1,), (2,)),
    "heads": ((2, 9, 3, 4), (2,), (1,), (0, 3)),  # stack in the middle, outputs apart
    "kernel": ((3, 2, 5, 8), (), (0, 1, 2), (3,)),
    "experts": ((2, 3, 6, 7), (0, 1), (2,), (3,)),
}
ADDITIVE = ("lora", "vera", "loha", "lokr", "miss")
RESCALING = ("ia3", "ia3_inputs", "oft", "oft_cayley")
KINDS = (*ADDITIVE, "dora", *RESCALING)


def rank_of(kind: str, fan_in: int) -> int:
    """Return 2, or for a kind with blocks of inputs the smallest divisor above 1."""
    return 3 if kind.startswith("oft") and fan_in % 2 else 2


TARGETS = [
    Target(form, *FORMS[form], rank=rank_of(kind, size), alpha=3.0, kind=kind)
    for form, size in zip(FORMS, (9, 9, 8, 9, 30, 6), strict=True)
    for kind in KINDS
]
PARTS = [
    Target("matrix", *FORMS["matrix"], 2, 3.0, parts=((0, 3), (5, 2))),
    Target("stacked", *FORMS["stacked"], 2, 3.0, parts=((2, 4),)),
    Target("heads", *FORMS["heads"], 2, 3.0, parts=((0, 2), (2, 2))),
    Target("heads", *FORMS["heads"], 2, 3.0, parts=((1, 1),), part_axis=0),
]


def name_of(target: Target) -> str:
    parts = f"-{target.parts}-{target.part_axis}" if target.parts else ""
    return f"{target.kind}-{target.path}{parts}"


def arrays(target: Target, seed: int = 0, dtype: Any = jnp.float32) -> Any:
    """Random arrays in the target's shapes, with magnitudes around one."""
    draw = np.random.default_rng(seed).standard_normal
    found = kind_of(target).fields(*map(draw, kind_of(target).shapes(target)))
    if target.kind == "dora":
        found = found._replace(magnitude=1 + 0.1 * found.magnitude)
    return jax.device_put(jax.tree.map(lambda x: x.astype(dtype), found))


def weight(target: Target, seed: int = 7, dtype: Any = jnp.float32) -> Any:
    drawn = np.random.default_rng(seed).standard_normal(target.shape)
    return jax.device_put(drawn.astype(dtype))


def in_order(target: Target, array: Any) -> np.ndarray:
    """Put an array [*stack, *inputs, *outputs] into the order of W's axes."""
    axes = (*target.stack, *target.inputs, *target.outputs)
    return np.transpose(np.asarray(array), [axes.index(i) for i in range(len(axes))])


def slices(target: Target, array: Any, before: int, after: int) -> np.ndarray:
    """[S, rows, columns]: the stack, the next `before` axes and the last `after` axes."""
    array = np.asarray(array, np.float64)
    n = len(target.stack)
    stack, rows = array.shape[:n], array.shape[n : n + before]
    columns = array.shape[n + before :]
    assert len(columns) == after
    sizes = [int(np.prod(s, dtype=int)) for s in (stack, rows, columns)]
    return array.reshape(sizes)


def as_kind(target: Target, kind: str) -> Target:
    return dataclasses.replace(target, kind=kind)
