"""Pairs of answers, of which the first is better, and judged answers, in padded batches."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from lora_jax.data.batches import Batches
from lora_jax.data.catalogue import open_data
from lora_jax.data.config import DataConfig
from lora_jax.data.epochs import Epochs, TokenTable
from lora_jax.data.example_reader import Reader, Words, form_of
from lora_jax.data.forms import Judged, Preference
from lora_jax.data.labels import Labels
from lora_jax.data.status import tracked
from lora_jax.errors import DataError
from lora_jax.models.text.example import Example, place_of
from lora_jax.models.text.tokens import TextTruncation, TokenRow, chunks, collect, padding_id


def preferences(
    config: DataConfig,
    words: Words,
    split: str,
    batch_size: int,
    *,
    shuffle: bool = False,
    seed: int = 0,
    epochs: int | None = 1,
    set_apart: bool = False,
    judged: bool = False,
    whole: bool = False,
) -> Batches:
    """Make batches of B pairs, the better answer first, of T tokens.

        input_ids    [B, 2, T] int32
        targets      [B, 2, T] int32    the next token
        loss_weight  [B, 2, T] float32  1 if the target belongs to the answer, else 0
        reference    [B, 2]    float32  zeros: the log-probabilities by the reference go here
        weight       [B]       float32  1, or 0 for a pair that only fills the batch
        index        [B]       int32    the number of the pair in the split

    The answers are the assistant's messages after the prompt. A pair of which one answer has
    nothing left to learn within `config.max_length` is left out, and counted.

    With `judged` each answer is an example of its own, the first of two. The second is its prompt
    with the answer before it in the batch. `good`, [B] float32, is 1 for a good answer, else 0.

    With `whole` there are no targets: a row ends with the last token of its answer.

        input_ids    [B, 2, T] int32
        mask         [B, 2, T] bool     True up to the last token of the answer
        weight, index                   as above

    The other arguments are as for `lora_jax.data.language_modelling`. `DataError`: the examples are
    neither pairs nor judged answers as `judged` says.
    """
    source = open_data(config, set_apart)
    examples = source.examples(split)
    some = examples[: min(len(examples), config.limit(split) or len(examples))]
    where = f"{source.name}, split {split!r}"
    form = form_of(config, some[0], where)
    learned = ("preference", "judged") if judged else ("preference",)
    if not form.name.startswith(learned):
        hint = " (--preference kto learns from them)" if form.name.startswith("judged") else ""
        raise DataError(
            f"{place_of(some[0], where)}: the example has the form {form.name!r}{hint}; "
            "preferences are learned from pairs with the fields chosen and rejected, and perhaps "
            f"prompt{', and by kto also from answers with a label' if judged else ''}"
        )
    truncation = TextTruncation()
    reader = Reader(config, words, form, where)
    found = list[tuple[TokenRow, bool]]()
    for chunk in chunks(tracked(some, f"tokenising {split}", len(some)), 200):
        found += _answers(reader, [form.of(e, where) for e in chunk], chunk, where, truncation)
    if not found:
        raise DataError(f"{where}: no example has all its answers within data.max_length")
    rows, good = zip(*found, strict=True)
    tokens = collect(rows)
    longest = tokens.lengths.reshape(-1, 1 if judged else 2).max(1) - (not whole)
    table = PairTable(
        epochs=Epochs(
            np.searchsorted(config.lengths, longest), batch_size, seed if shuffle else None, epochs
        ),
        labels=Labels(()),
        tokens=tokens,
        buckets=config.lengths,
        pad=padding_id(words.tokenizer),
        good=np.array(good, np.float32) if judged else None,
        whole=whole,
    )
    facts = table.facts(source, split, truncation)
    return dataclasses.replace(table.batches(facts), labels=None)


def _answers(
    reader: Reader,
    examples: Sequence[Preference | Judged],
    rows: Sequence[Example],
    where: str,
    truncation: TextTruncation,
) -> list[tuple[TokenRow, bool]]:
    """Return the answers of each example whose answers are all within the limit, and judgements."""
    flat = [answer for example in examples for answer in example.judged]
    places = [place_of(r, where) for r, e in zip(rows, examples, strict=True) for _ in e.judged]
    whole = iter(reader.whole([said for said, _ in flat], places, truncation))
    kept = []
    for example in examples:
        own = [(reader.within(next(whole), truncation), good) for _, good in example.judged]
        kept += own if all(len(ids) for (ids, _), _ in own) else []
    return kept


@dataclasses.dataclass(frozen=True, kw_only=True)
class PairTable(TokenTable):
    """The tokenised answers: rows 2 i and 2 i + 1 are the better and the worse answer of pair i.

    With `good` each row is an example of its own.
    """

    sides: ClassVar[int] = 2

    good: NDArray[np.float32] | None = None
    whole: bool = False

    def columns(
        self, epoch: int, chosen: NDArray[np.int64], rows: NDArray[np.int64]
    ) -> dict[str, NDArray[Any]]:
        shape = (len(rows), 2, self.length(chosen))
        if self.whole:
            return self._whole(rows, shape)
        ids, targets = np.full(shape, self.pad, np.int32), np.full(shape, self.pad, np.int32)
        marks = np.zeros(shape, np.float32)
        for i, example in enumerate(rows.tolist()):
            for side, (own, learned) in enumerate(self._sides(chosen, example)):
                own, learned = own[: shape[2] + 1], learned[: shape[2] + 1]
                size = len(own) - 1
                ids[i, side, :size], targets[i, side, :size] = own[:-1], own[1:]
                marks[i, side, :size] = learned[1:]
        reference = np.zeros((len(rows), 2), np.float32)
        found = {"input_ids": ids, "targets": targets, "loss_weight": marks, "reference": reference}
        return found if self.good is None else {**found, "good": self.good[rows]}

    def _whole(self, rows: NDArray[np.int64], shape: tuple[int, ...]) -> dict[str, NDArray[Any]]:
        ids, mask = np.full(shape, self.pad, np.int32), np.zeros(shape, bool)
        for i, side in np.ndindex(shape[:2]):
            own, learned = self.tokens[2 * int(rows[i]) + side]
            size = int(np.flatnonzero(learned[: shape[2]])[-1]) + 1
            ids[i, side, :size], mask[i, side, :size] = own[:size], True
        return {"input_ids": ids, "mask": mask}

    def length(self, chosen: NDArray[np.int64]) -> int:
        if self.good is None:
            return super().length(chosen)
        asked, whole = self._asked[chosen], self.tokens.lengths[chosen]
        needed = max(whole.max(), (asked + np.roll(whole - asked, 1)).max()) - 1
        return self.buckets[min(np.searchsorted(self.buckets, needed), len(self.buckets) - 1)]

    def _sides(self, chosen: NDArray[np.int64], example: int) -> tuple[TokenRow, TokenRow]:
        """Return the two answers of an example of the batch that has those `chosen`."""
        if self.good is None:
            return self.tokens[2 * example], self.tokens[2 * example + 1]
        other = int(chosen[np.flatnonzero(chosen == example)[0] - 1])
        own, before = self.tokens[example], self.tokens[other]
        asked, cut = self._asked[example], self._asked[other]
        ids = np.concatenate([own[0][:asked], before[0][cut:]])
        return own, (ids, np.concatenate([own[1][:asked], before[1][cut:]]))

    @functools.cached_property
    def _asked(self) -> NDArray[np.int64]:
        """The number of tokens of each row before the first that is learned."""
        return np.array([np.argmax(marks[1:]) + 1 for _, marks in self.tokens], np.int64)
