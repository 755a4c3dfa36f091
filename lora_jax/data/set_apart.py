"""A validation split for files that have none: some of the training examples, set apart."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lora_jax.data.source import DataSource, no_split
from lora_jax.data.status import tracked
from lora_jax.errors import DataError
from lora_jax.models.text.example import Example

MOST = 1_000  # examples that are set apart


class SetApart(DataSource):
    """A source whose training split is divided by a hash of each example.

    The division depends on what the examples say alone, neither on their order nor on a seed, and
    equal examples are on the same side.
    """

    def __init__(self, source: DataSource, train: str, validation: str, share: float) -> None:
        """Divide the split `train` of a source; `DataError` if that leaves nothing to train on."""
        self._source, self._train, self._validation = source, train, validation
        self.name, self.splits = source.name, (*source.splits, validation)
        rows = source.examples(train)
        marks = _marks(rows)
        wanted = min(MOST, max(1, round(share * len(rows))))
        self._apart = marks <= np.sort(marks)[wanted - 1]
        apart = int(self._apart.sum())
        if apart == len(rows):
            raise DataError(
                f"{source.name} has {len(rows)} training examples, all equal or only one: none can "
                f"be set apart for the split {validation!r}. Name a file for it, as in "
                "train=a.jsonl,validation=b.jsonl"
            )
        self.notes = (
            *source.notes,
            f"{source.name} has no split {validation!r}: {apart:,} of its {len(rows):,} examples "
            "were set apart for it, by a hash of what they say (data.eval_share)",
        )

    def examples(self, split: str) -> Sequence[Example]:
        if split not in self.splits:
            raise no_split(self, split)
        if split not in (self._train, self._validation):
            return self._source.examples(split)
        wanted = self._apart if split == self._validation else ~self._apart
        return _Some(self._source.examples(self._train), np.flatnonzero(wanted))

    def classes(self, field: str) -> tuple[str, ...] | None:
        return self._source.classes(field)


def _marks(rows: Sequence[Example]) -> NDArray[np.uint64]:
    """Return a number for each example, which depends on its content alone."""
    marks = np.zeros(len(rows), np.uint64)
    for number, row in enumerate(tracked(rows, "setting examples apart", len(rows))):
        text = json.dumps(dict(row), sort_keys=True, default=str).encode()
        marks[number] = int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big")
    return marks


class _Some(Sequence[Example]):
    """The rows at some places of a sequence."""

    def __init__(self, rows: Sequence[Example], places: NDArray[np.int64]) -> None:
        self._rows, self._places = rows, places

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, index: Any) -> Any:
        chosen = self._places[index]
        if isinstance(index, slice):
            return [self._rows[place] for place in chosen.tolist()]
        return self._rows[int(chosen)]
