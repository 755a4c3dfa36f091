"""Pad the batches of all members for one step to one shape, and stack them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from lora_jax.training.config import ConfigError
from lora_jax.training.mesh import BATCH, Placement, check_rows
from lora_jax.training.workload import Batch


def together(names: Sequence[str], batches: Sequence[Batch | None]) -> dict[str, np.ndarray]:
    """Pad every batch with zeros at the end to the largest shape, and stack them.

    A zero is padding in every array of a batch: mask 0, weight 0, segment 0. A batch that is None,
    for a member that takes no step, becomes all zeros.

    >>> together(["a", "b", "c"], [{"x": np.ones(2)}, {"x": np.ones(3)}, None])["x"].tolist()
    [[1.0, 1.0, 0.0], [1.0, 1.0, 1.0], [0.0, 0.0, 0.0]]
    """
    present = [(name, b) for name, b in zip(names, batches, strict=True) if b is not None]
    forms = {name: {k: (str(x.dtype), np.ndim(x)) for k, x in b.items()} for name, b in present}
    first, wanted = next(iter(forms.items()))
    for name, form in forms.items():
        for entry in dict.fromkeys([*wanted, *form]):
            if form.get(entry) != wanted.get(entry):
                raise ConfigError(
                    f"the batches of {first!r} and {name!r} differ in the entry {entry!r}: "
                    f"{_text(wanted.get(entry))}, and {_text(form.get(entry))}; the members of a "
                    "group must have batches of one kind, which may differ only in length"
                )
    return {entry: _filled([None if b is None else b[entry] for b in batches]) for entry in wanted}


def _text(form: tuple[str, int] | None) -> str:
    return "missing" if form is None else f"{form[0]} with {form[1]} axes"


def _filled(arrays: Sequence[np.ndarray | None]) -> np.ndarray:
    known = [np.asarray(x) for x in arrays if x is not None]
    shape = np.max([x.shape for x in known], axis=0).astype(int) if known[0].ndim else ()
    out = np.zeros((len(arrays), *shape), known[0].dtype)
    for i, x in enumerate(arrays):
        if x is not None:
            part: tuple[Any, ...] = (i, *map(slice, np.shape(x)))
            out[part] = x
    return out


def placed(place: Placement, rows: Mapping[str, np.ndarray]) -> dict[str, jax.Array]:
    """Place stacked batches on the devices: each device has its rows of every member's batch."""
    out = {}
    for name, value in rows.items():
        if value.ndim > 1:
            check_rows(name, value.shape[1], place.parts)
            spec = P(None, *BATCH)
        else:
            spec = P()
        out[name] = jax.device_put(value, NamedSharding(place.mesh, spec))
    return out
