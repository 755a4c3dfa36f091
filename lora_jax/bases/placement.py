"""The placement of a quantised weight's arrays, given the placement of the weight."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, TypeVar

import jax
from jax.sharding import PartitionSpec

from lora_jax.base import Array, QuantisedMatrix
from lora_jax.errors import LoraError

B = TypeVar("B", bound=QuantisedMatrix)


def names_of(entry: Any) -> tuple[str, ...]:
    """Return the mesh axes of one entry of a PartitionSpec: None, a name, or a tuple of names."""
    return () if entry is None else entry if isinstance(entry, tuple) else (entry,)


def placed(base: B, spec: PartitionSpec, mesh: Mapping[str, int], path: str) -> B:
    """Return the base with a `PartitionSpec` in place of each array (or shape).

    An axis of W is an axis of the stored matrix, or the first of several that the matrix flattens
    into one. A shard of W and its codes and scales are on the same device. An array that is too
    small to be sharded (one scale per output, the statistics of double quantisation) is replicated.
    Shards that would split a block, or an axis that is not contiguous in the storage, are errors.
    """
    lead = len(base.lead)
    entries = [*spec, *[None] * (base.ndim - len(spec))]
    stored = [entries[lead + base.order.index(axis)] for axis in range(len(base.sizes))]
    rows, columns = _rows(base)
    row, column = (_merged(base, stored, axes, path) for axes in (rows, columns))

    widest = [max(sizes) for sizes in zip(*_matrices(base), strict=True)]

    def one(x: Array) -> PartitionSpec:
        matrix = x.shape[lead : lead + 2]
        if len(matrix) < 2:
            return PartitionSpec(*entries[:lead])
        cut = []
        for entry, size, most in zip((row, column), matrix, widest, strict=True):
            cut.append(entry if size == most or size > 1 else None)
            _check_whole(base, cut[-1], size, mesh, path)
        return PartitionSpec(*entries[:lead], *cut)

    return jax.tree.map(one, base)


def _rows(base: QuantisedMatrix) -> tuple[range, range]:
    """Return the stored axes of the matrix's rows, and the stored axes of its columns."""
    rows = max(size for size, _ in _matrices(base))
    count = 0
    while math.prod(base.sizes[:count]) < rows:
        count += 1
    return range(count), range(count, len(base.sizes))


def _matrices(base: QuantisedMatrix) -> list[tuple[int, int]]:
    """Return the rows and columns (or blocks) of each array that has both."""
    lead = len(base.lead)
    arrays = [x for x in jax.tree.leaves(base) if len(x.shape) >= lead + 2]
    return [(x.shape[lead], x.shape[lead + 1]) for x in arrays]


def _merged(base: QuantisedMatrix, stored: list[Any], axes: range, path: str) -> Any:
    """Return the mesh axes that shard several stored axes which are one axis of the matrix."""
    wide = [axis for axis in axes if base.sizes[axis] > 1]
    if any(stored[axis] is not None for axis in wide[1:]):
        raise LoraError(
            f"{path!r} is stored as a matrix in which its axes of sizes "
            f"{[base.sizes[axis] for axis in wide]} are one; only the first of them can be cut "
            "into shards that are contiguous. Shard that one, or none of them"
        )
    return stored[wide[0]] if wide else None


def _check_whole(
    base: QuantisedMatrix, entry: Any, size: int, mesh: Mapping[str, int], path: str
) -> None:
    """Raise `LoraError` if sharding `size` rows, or blocks, would split one of them."""
    names = names_of(entry)
    shards = math.prod(mesh[name] for name in names)
    if size % shards:
        fit = [n for n in range(1, size + 1) if size % n == 0]
        raise LoraError(
            f"{path!r}: {shards} shards over {' and '.join(names)} would cut a block: "
            f"{type(base).__name__} has {size} rows or blocks there. "
            f"{', '.join(map(str, fit[-12:]))} shards would do"
        )
