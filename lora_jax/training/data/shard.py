"""The rows of every global batch that one process holds."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import jax
import numpy as np
from jax.experimental import multihost_utils
from numpy.typing import NDArray

from lora_jax.training.data.errors import DataError

Batch = Mapping[str, NDArray[np.generic]]


@dataclasses.dataclass(frozen=True)
class Shard:
    """Part `index` of `count` equal parts; the default is the whole.

    A global batch is the same whatever the number of parts, and the parts lie in it in their order.

    >>> Shard(1, 2).rows(8)
    slice(4, 8, None)
    """

    index: int = 0
    """Which part."""
    count: int = 1
    """Parts in all."""

    def __post_init__(self) -> None:
        if not 0 <= self.index < self.count:
            raise DataError(f"there is no part {self.index} of {self.count}")

    def rows(self, total: int) -> slice:
        """The rows of this part in a global batch of `total` rows.

        Raises:
            DataError: `total` rows cannot be dealt out evenly.
        """
        if total % self.count:
            up = -(-total // self.count) * self.count
            down = total - total % self.count
            raise DataError(
                f"a batch of {total} rows cannot be dealt out evenly to {self.count} parts, one "
                "for each process.\n"
                f"Set the batch size to {f'{down} or ' if down else ''}{up}."
            )
        size = total // self.count
        return slice(self.index * size, (self.index + 1) * size)

    def take(self, batch: Batch) -> dict[str, NDArray[np.generic]]:
        """The rows of this part, of arrays that all have the global batch as their first axis.

        >>> Shard(1, 2).take({"x": np.arange(4)})
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
