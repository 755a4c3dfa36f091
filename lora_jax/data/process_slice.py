"""The rows of every global batch that one process holds."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from numpy.typing import NDArray

from lora_jax.errors import DataError

Batch = Mapping[str, NDArray[Any]]


@dataclasses.dataclass(frozen=True)
class Shard:
    """Some of `count` equal parts of a batch; the default is the whole batch.

    A part is a range of consecutive rows. The global batch does not depend on the number of parts.

    >>> Shard((1,), 2).rows(8).tolist()
    [4, 5, 6, 7]
    >>> Shard((0, 2), 4).rows(8).tolist()
    [0, 1, 4, 5]
    """

    parts: tuple[int, ...] = (0,)
    """The numbers of the parts, ascending."""
    count: int = 1
    """The number of all parts."""

    def __post_init__(self) -> None:
        known = self.parts and self.parts[0] >= 0 and self.parts[-1] < self.count
        if not known or list(self.parts) != sorted(set(self.parts)):
            raise DataError(f"there are no parts {self.parts} of {self.count}")

    @property
    def share(self) -> float:
        """The share of the rows that are in this shard."""
        return len(self.parts) / self.count

    def rows(self, total: int) -> NDArray[np.int64]:
        """Return the numbers of the rows of this shard in a global batch.

        Args:
          total: the number of rows of the batch.

        Returns:
          int64 [total * share].

        Raises:
          DataError: the rows cannot be divided evenly.
        """
        if total % self.count:
            up = -(-total // self.count) * self.count
            down = total - total % self.count
            raise DataError(
                f"a batch of {total} rows cannot be divided evenly into {self.count} parts, one "
                "for each of the devices that share it.\n"
                f"Set the batch size to {f'{down} or ' if down else ''}{up}."
            )
        size = total // self.count
        return np.concatenate([np.arange(part * size, (part + 1) * size) for part in self.parts])

    def take(self, batch: Batch) -> dict[str, NDArray[Any]]:
        """Return the rows of this shard from a whole batch.

        >>> Shard((1,), 2).take({"x": np.arange(4)})
        {'x': array([2, 3])}

        Args:
          batch: name -> array with the rows of the global batch as its first axis.

        Raises:
          DataError: the rows cannot be divided evenly.
        """
        return {name: array[self.rows(len(array))] for name, array in batch.items()}

    def most(self, n: int) -> int:
        """Return the largest `n` of all processes. Every process must call this, or all wait.

        Args:
          n: the number of this process.
        """
        if jax.process_count() == 1:
            return n
        return int(np.max(multihost_utils.process_allgather(np.int32(n))))
