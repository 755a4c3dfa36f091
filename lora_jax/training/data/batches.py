"""Batches and what there is to say about them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

import grain

from lora_jax.training.data.labels import Labels
from lora_jax.training.data.tokens import Cut

# A batch takes a fraction of a millisecond to make, less than handing it to another thread.
IN_THREAD = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)


@dataclasses.dataclass(frozen=True)
class Facts:
    """Numbers for a reader of the results."""

    source: str
    """The source's name."""
    split: str
    """The split."""
    examples: int
    """Examples in use."""
    batches: int
    """Batches of an epoch; of packed rows, as estimated from a sample."""
    tokens: int
    """Tokens of an epoch, without padding; of large sets, as estimated from a sample."""
    padding: float
    """Share of the batches' positions that hold padding."""
    cut: Cut
    """What `max_length` cost. Still grows while a large set is read."""
    classes: tuple[tuple[str, int], ...] = ()
    """Examples of each class."""
    notes: tuple[str, ...] = ()
    """What else to know, a sentence each."""

    def __str__(self) -> str:
        text = (
            f"{self.source} {self.split}: {self.examples:,} examples, {self.tokens:,} tokens, "
            f"{self.batches:,} batches an epoch, {self.padding:.1%} padding"
        )
        if self.classes:
            text += "; " + ", ".join(f"{name} {n:,}" for name, n in self.classes[:10])
        if self.cut.examples:
            text += (
                f"; max_length cut {self.cut.tokens:,} tokens off {self.cut.examples:,} examples"
            )
        if self.cut.dropped:
            text += f"; {self.cut.dropped:,} left out, with nothing to learn in them"
        return text


def describe(facts: Iterable[Facts]) -> str:
    """A line for each split, then the sources' notes."""
    facts = list(facts)
    notes = dict.fromkeys(note for fact in facts for note in fact.notes)
    return "\n".join([*map(str, facts), *notes])


@dataclasses.dataclass(frozen=True)
class Batches:
    """An iterable of batches (dictionaries of NumPy arrays).

    `iter` gives a Grain iterator. Its `get_state()` is a small JSON value, and after
    `set_state(state)` it goes on with the very batch that would have come next.
    """

    dataset: grain.IterDataset
    """The Grain data set."""
    facts: Facts
    """What there is to say about it."""
    labels: Labels | None = None
    """What the labels are; None without labels."""

    def __iter__(self) -> grain.DatasetIterator:
        return iter(self.dataset)
