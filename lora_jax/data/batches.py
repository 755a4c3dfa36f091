"""Batches, their iterators, and the facts about a split."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Protocol

import grain

from lora_jax.data.labels import Labels
from lora_jax.data.process_slice import Batch, Shard
from lora_jax.data.tokens import TextTruncation

# A batch takes a fraction of a millisecond to make, less than handing it to another thread.
IN_THREAD = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
WHOLE = Shard()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Facts:
    """Numbers for a reader of the results."""

    source: str
    """The source's name."""
    split: str
    """The split."""
    examples: int
    """Examples in use; of packed rows, without those left out."""
    batches: int
    """Batches of an epoch; of packed rows without end, as estimated from a sample."""
    classes: tuple[tuple[str, int], ...] = ()
    """Examples of each class."""
    notes: tuple[str, ...] = ()
    """What else to know, a sentence each."""

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
    """Those of texts."""

    tokens: int
    """Tokens of an epoch, without padding; of large sets, as estimated from a sample."""
    padding: float
    """Share of the batches' positions that hold padding."""
    truncation: TextTruncation
    """What `max_length` cost; of large sets, as estimated from a sample."""

    def __str__(self) -> str:
        text, lost = super().__str__(), self.truncation
        if lost.examples:
            text += f"; max_length cut {lost.tokens:,} tokens off {lost.examples:,} examples"
        if lost.dropped:
            text += f"; {lost.dropped:,} left out, with nothing to learn in them"
        return text

    @property
    def _numbers(self) -> str:
        batches = super()._numbers
        return f"{self.tokens:,} tokens, {batches}, {self.padding:.1%} padding"


def describe(facts: Iterable[Facts]) -> str:
    """A line for each split, then the sources' notes."""
    facts = list(facts)
    notes = dict.fromkeys(note for fact in facts for note in fact.notes)
    return "\n".join([*map(str, facts), *notes])


class BatchIterator(Protocol):
    """Goes through batches (entry -> NumPy array), and can be put anywhere among them."""

    def __next__(self) -> Batch: ...
    def __iter__(self) -> Iterator[Batch]: ...

    def get_state(self) -> dict[str, Any]:
        """A small JSON value. Those of all shards, merged by union, are the state of the whole."""
        ...

    def set_state(self, state: dict[str, Any]) -> None:
        """Go on with the very batch that would have come next, whatever shards saved the state."""
        ...


# What gives an iterator before the first batch of a shard, and what the shard shows of the split.
ShardBatches = tuple[Callable[[], BatchIterator], Facts]


@dataclasses.dataclass(frozen=True)
class Batches:
    """Batches whose rows are dealt out to processes.

    They are the same whatever the number of shards: the rows of all shards, one below the other,
    are the rows of the whole. Every shard has as many batches as every other.
    """

    part: Callable[[Shard], ShardBatches]
    """Reads a shard, once."""
    labels: Labels | None = None
    """What the labels are; None without labels."""

    def iterator(self, shard: Shard = WHOLE) -> BatchIterator:
        """An iterator over the rows of `shard` of every batch.

        Every process must ask for it, in the same order as for other batches, or all wait.

        Raises:
            DataError: the rows cannot be dealt out evenly, or the data cannot be used.
        """
        begin, _ = self.part(shard)
        return begin()

    def facts(self, shard: Shard = WHOLE) -> Facts:
        """What there is to say about the split, as far as `shard` shows it; waits for nobody."""
        _, facts = self.part(shard)
        return facts

    def __iter__(self) -> BatchIterator:
        return self.iterator()
