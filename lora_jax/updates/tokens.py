"""Trained rows of an embedding: a difference for each chosen row."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from lora_jax.base import Array, Leaf, W
from lora_jax.errors import LoraError
from lora_jax.spec import Target
from lora_jax.updates.factors import Factors
from lora_jax.updates.kind import Initializer, Kind


class Rows(NamedTuple):
    """The array of a target whose rows are trained.

    Attributes:
      delta: [*stack, rows, *outputs], in the order of the rows.
    """

    delta: Leaf


class TrainedRows(Kind):
    """Trained rows: `W'[i] = W[i] + delta[k]` for the k-th of the chosen rows i; the rest stays.

    For the embeddings of a few tokens, new ones or old. A head that is tied to the embedding
    changes with it. The rows are the parts of the input axis: Rule("embed/embedding",
    kind="tokens", parts=row_parts([5, 9])). `delta` starts at zero. There is no rank and no alpha.
    The update has exact factors, of which the first is 1 where a row is chosen.

    >>> parts = row_parts([1, 3])
    >>> target = Target("w", (4, 2), (), (0,), (1,), 1, 1.0, kind="tokens", parts=parts)
    >>> TrainedRows().delta(target, Rows(jnp.array([[1.0, 2.0], [3.0, 4.0]])))[:, 0]
    Array([0., 1., 0., 3.], dtype=float32)
    """

    name = "tokens"
    fields = Rows
    has_parts = True
    zero_at_first = "delta"

    def axes(self, target: Target) -> Rows:
        return Rows((*target.stack, None, *target.outputs))

    def shapes(self, target: Target) -> Rows:
        count = sum(size for _, size in target.parts)
        return Rows((*target.sizes(target.stack), count, *target.sizes(target.outputs)))

    def rank_limit(self, target: Target) -> None:
        ends = [0, *(end for start, size in target.parts for end in (start, start + size))]
        if not target.parts or ends != sorted(ends) or ends[-1] > target.fan_in:
            raise LoraError(
                f"{target.path!r}: an update of the kind {self.name!r} says its rows, of which "
                f"there are {target.fan_in}, by Rule({target.path!r}, kind={self.name!r}, "
                f"parts=lora_jax.updates.row_parts([...])); got parts={target.parts}"
            )

    def init(
        self, key: Array, target: Target, dtype: DTypeLike, a_init: Initializer, w: W | None = None
    ) -> Rows:
        return Rows(jnp.zeros(self.shapes(target).delta, dtype))

    def factors(self, target: Target, parameters: Rows) -> Factors:
        delta, rows = jnp.asarray(parameters.delta), np.array(row_numbers(target))
        chosen = jnp.arange(target.fan_in)[:, None] == rows[None]
        shape = (*target.a_shape[:-1], len(rows))
        ones = chosen.astype(delta.dtype).reshape(shape[len(target.stack) :])
        return Factors(jnp.broadcast_to(ones, shape), delta)

    def scale(self, target: Target) -> float:
        return 1.0


def row_parts(rows: Iterable[int]) -> tuple[tuple[int, int], ...]:
    """Return rows as the `parts` of a rule, with neighbours together.

    Args:
      rows: their numbers, in any order.

    >>> row_parts([7, 2, 3])
    ((2, 2), (7, 1))
    """
    parts: list[tuple[int, int]] = []
    for i in sorted({*rows}):
        follows = bool(parts) and sum(parts[-1]) == i
        start, size = parts.pop() if follows else (i, 0)
        parts.append((start, size + 1))
    return tuple(parts)


def row_numbers(target: Target) -> list[int]:
    """Return the numbers of a target's rows, in the order of `delta`."""
    return [i for start, size in target.parts for i in range(start, start + size)]
