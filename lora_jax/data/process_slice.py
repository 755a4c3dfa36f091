"""The rows of every global batch that one process holds."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from numpy.typing import NDArray

from lora_jax.data.errors import DataError

Batch = Mapping[str, NDArray[Any]]


@dataclasses.dataclass(frozen=True)
class Shard:
    """Some of `count` equal parts of a batch, one after the other in it; the default is the whole.

    A global batch is the same whatever the number of parts.

    >>> Shard((1,), 2).rows(8).tolist()
    [4, 5, 6, 7]
    >>> Shard((0, 2), 4).rows(8).tolist()
    [0, 1, 4, 5]
    """

    parts: tuple[int, ...] = (0,)
    """Which parts, in ascending order."""
    count: int = 1
    """Parts in all."""

    def __post_init__(self) -> None:
        known = self.parts and self.parts[0] >= 0 and self.parts[-1] < self.count
        if not known or list(self.parts) != sorted(set(self.parts)):
            raise DataError(f"there are no parts {self.parts} of {self.count}")

    @property
    def share(self) -> float:
        """Of the rows, how many are in this shard."""
        return len(self.parts) / self.count

    def rows(self, total: int) -> NDArray[np.int64]:
        """The numbers of the rows of this shard in a global batch of `total` rows.

        Raises:
            DataError: `total` rows cannot be dealt out evenly.
        """
        if total % self.count:
            up = -(-total // self.count) * self.count
            down = total - total % self.count
            raise DataError(
                f"a batch of {total} rows cannot be dealt out evenly in {self.count} parts, one "
                "for each of the devices that divide it.\n"
                f"Set the batch size to {f'{down} or ' if down else ''}{up}."
            )
        size = total // self.count
        return np.concatenate([np.arange(part * size, (part + 1) * size) for part in self.parts])

    def take(self, batch: Batch) -> dict[str, NDArray[Any]]:
        """The rows of this shard, of arrays that all have the global batch as their first axis.

        >>> Shard((1,), 2).take({"x": np.arange(4)})
        {'x': array([2, 3])}

        Raises:
            DataError: the rows cannot be dealt out evenly.
        """
        return {name: array[self.rows(len(array))] for name, array in batch.items()}

    def most(self, n: int) -> int:
        """The largest `n` that any process gives. Every process must call it, or all wait."""
        if jax.process_count() == 1:
            return n
        return int(np.max(multihost_utils.process_allgather(np.int32(n))))
