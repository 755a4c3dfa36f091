"""Batches, their iterators, and the facts about a split."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Protocol

import grain

from lora_jax.data.labels import Labels
from lora_jax.data.process_slice import Batch, Shard
from lora_jax.models.text.tokens import TextTruncation

# A batch is made in a fraction of a millisecond, faster than it could be handed to another thread.
IN_THREAD = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
WHOLE = Shard()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Facts:
    """Numbers about a split, for readers of the results."""

    source: str
    """The name of the source."""
    split: str
    """The name of the split."""
    examples: int
    """Examples in use; for packed rows, without examples that have nothing to learn."""
    batches: int
    """Batches of an epoch; for packed rows without end, estimated from a sample."""
    classes: tuple[tuple[str, int], ...] = ()
    """Name and number of examples of each class."""
    notes: tuple[str, ...] = ()
    """Other facts, each a sentence."""

    def __str__(self) -> str:
        text = f"{self.source} {self.split}: {self.examples:,} examples, {self._numbers}"
        if self.classes:
            text += "; " + ", ".join(f"{name} {n:,}" for name, n in self.classes[:10])
        return text

    @property
    def _numbers(self) -> str:
        return f"{self.batches:,} batches an epoch"


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextFacts(Facts):
    """Numbers about a split of texts."""

    tokens: int
    """Tokens of an epoch, without padding; for large sets, estimated from a sample."""
    padding: float
    """Share of the batches' positions that are padding."""
    truncation: TextTruncation
    """The losses by `max_length`; for large sets, estimated from a sample."""

    def __str__(self) -> str:
        text, lost = super().__str__(), self.truncation
        if lost.examples:
            text += f"; max_length cut {lost.tokens:,} tokens off {lost.examples:,} examples"
            text += f", of which {lost.learned:,} were to be learned" if lost.learned else ""
        if lost.dropped:
            text += f"; {lost.dropped:,} left out, with nothing to learn in them"
        return "; ".join([text, *lost.remarks(self.examples + lost.dropped)])

    @property
    def _numbers(self) -> str:
        batches = super()._numbers
        return f"{self.tokens:,} tokens, {batches}, {self.padding:.1%} padding"


def describe(facts: Iterable[Facts]) -> str:
    """Return a line for each split, followed by the notes of the sources.

    Args:
      facts: the facts of each split.
    """
    facts = list(facts)
    notes = dict.fromkeys(note for fact in facts for note in fact.notes)
    return "\n".join([*map(str, facts), *notes])


class BatchIterator(Protocol):
    """An iterator over batches (name -> NumPy array) that can be moved to any position."""

    def __next__(self) -> Batch: ...
    def __iter__(self) -> Iterator[Batch]: ...

    def get_state(self) -> dict[str, Any]:
        """Return a small JSON value. The states of all shards, merged by union, form one state."""
        ...

    def set_state(self, state: dict[str, Any]) -> None:
        """Continue with the batch that would have come next, with any division into shards."""
        ...


# A function that returns an iterator before the first batch of a shard, and facts from that shard.
ShardBatches = tuple[Callable[[], BatchIterator], Facts]


@dataclasses.dataclass(frozen=True)
class Batches:
    """Batches whose rows are divided among processes.

    They do not depend on the number of shards: the rows of all shards, one below the other, are the
    rows of the whole batch. Every shard has the same number of batches.
    """

    part: Callable[[Shard], ShardBatches]
    """Reads a shard. It is called once for each shard."""
    labels: Labels | None = None
    """The labels; None if there are none."""

    def iterator(self, shard: Shard = WHOLE) -> BatchIterator:
        """Return an iterator over the rows of `shard` of every batch.

        Every process must call this, in the same order as for other batches, or all wait.

        Args:
          shard: the rows of this process.

        Raises:
          DataError: the rows cannot be divided evenly, or the data cannot be used.
        """
        begin, _ = self.part(shard)
        return begin()

    def facts(self, shard: Shard = WHOLE) -> Facts:
        """Return facts about the split. This waits for no other process.

        Args:
          shard: the part of every batch that is read.
        """
        _, facts = self.part(shard)
        return facts

    def __iter__(self) -> BatchIterator:
        return self.iterator()
