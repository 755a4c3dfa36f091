"""Classify texts. Each text is padded to the shortest length of a batch that has room for it."""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
from numpy.typing import NDArray

from lora_jax import models
from lora_jax.checkpoint.saved_adapter import SavedAdapter
from lora_jax.errors import LoraError, listed
from lora_jax.models.text.tokens import Encoder, TextOrPair, TextTruncation, padded, padding_id
from lora_jax.models.weights.stored import LAST
from lora_jax.serving.classifier import Classifier, ClassifierTask, are_all
from lora_jax.serving.jsonl import JsonLine
from lora_jax.serving.served_adapters import Served


class TextClassifier(Classifier):
    """Computes the scores of texts, each with one of several adapters.

    Attributes:
      cut: counts of the texts and tokens that were cut off so far.
      tokens: the number of tokens so far, without padding.
    """

    unit = "texts"

    @staticmethod
    def task_of(member: SavedAdapter) -> ClassifierTask:
        """See `Classifier`. `lora_jax.training.classification` writes such notes."""
        names = ("labels", "text_fields", "lengths")
        found: dict[str, Any] = {name: member.about.get(name) for name in names}
        sound = (
            are_all(str, found["labels"])
            and are_all(str, found["text_fields"], 1)
            and len(found["text_fields"]) <= 2
            and are_all(int, found["lengths"], 1)
            and found["lengths"] == sorted(found["lengths"])
            and found["lengths"][0] > 0
        )
        if not sound:
            raise LoraError(
                f"adapter {member.name!r} ({member.folder}) does not say what it classifies: "
                f"{'it has ' + str(found)[:300] if any(found.values()) else 'nothing is said'}.\n"
                "Adapters that train.py exports say it; one that you save yourself says it by "
                'lora_jax.save(..., about={"labels": ["no", "yes"], "text_fields": ["text"], '
                '"lengths": [32, 64], "model": {"reference": ..., "pooling": "mean"}})'
            )
        return ClassifierTask(*(tuple(found[name]) for name in names))

    def prepare_model(self, served: Served, width: int) -> nn.Module:
        self.cut, self.tokens = TextTruncation(), 0
        self.lengths = sorted({n for task in self.tasks.values() for n in task.lengths})
        if self.lengths[-1] > served.config.max_positions:
            raise LoraError(
                f"an adapter takes texts of {self.lengths[-1]} tokens, but the base has positions "
                f"for {served.config.max_positions}; is it the base that it was trained on?"
            )
        tokenizer, rows = served.source.tokenizer(), served.config.vocab_size
        self._encoder = functools.cache(lambda limit: Encoder(tokenizer, limit, rows))
        self._pad, self._pooling = padding_id(tokenizer), _pooling(served.members)
        return models.classifier(served.config, models.Head(self._pooling, width))

    def add(self, i: int, member: SavedAdapter) -> None:
        if (own := _pooling([member])) != self._pooling:
            raise LoraError(
                f"the head of adapter {member.name!r} pools by {own!r}, and the others by "
                f"{self._pooling!r}"
            )
        super().add(i, member)

    def example_of(self, line: JsonLine, task: ClassifierTask) -> TextOrPair:
        """Return the text of a line; numbers are read as text, as in training."""
        found = []
        for field in task.fields:
            value = line.get(field, object)
            if not isinstance(value, str | int | float):
                line.get(field, str)  # raises
            found.append(str(value))
        return found[0] if len(found) == 1 else (found[0], found[1])

    def prepare(self, adapters: Sequence[int], examples: Sequence[TextOrPair]) -> list[Any]:
        """Return the tokens of each text, cut to the limit of its adapter's task."""
        alike = defaultdict[tuple[int, bool], list[int]](list)
        for i, (adapter, example) in enumerate(zip(adapters, examples, strict=True)):
            alike[self.tasks[adapter].lengths[-1], isinstance(example, tuple)].append(i)
        encoded: list[Any] = [None] * len(examples)
        for (limit, _), own in alike.items():
            found = self._encoder(limit).truncate([examples[i] for i in own], self.cut)
            for i, encoding in zip(own, found, strict=True):
                encoded[i] = encoding
        self.tokens += sum(len(encoding.ids) for encoding in encoded)
        return encoded

    def length_of(self, row: Any) -> int:
        return next(length for length in self.lengths if length >= len(row.ids))

    def arrays(self, rows: Sequence[Any]) -> tuple[NDArray[Any], ...]:
        """Return token ids, mask and token types, as in the batches of training."""
        length = max(map(self.length_of, rows))
        return padded([(row.ids, row.type_ids) for row in rows], length, self._pad)

    def blank(self, length: int) -> tuple[NDArray[Any], ...]:
        return padded([([0], [0])], length, self._pad)

    def facts(self, count: int) -> tuple[str, ...]:
        (said,), cut = super().facts(count), self.cut
        lost = f"{cut.examples:,} texts were too long and lost {cut.tokens:,} tokens"
        remarks = [*([lost] if cut.examples else []), *cut.remarks(count)]
        return (f"{said}, {self.tokens:,} tokens", *remarks)


def _pooling(members: Sequence[SavedAdapter]) -> str:
    """Return the pooling that all heads share."""
    said = {member.name: member.model.get("pooling", "mean") for member in members}
    for name, pooling in said.items():
        known = [*models.bert.POOLINGS, LAST]
        if pooling not in known:  # a stranger's may be unhashable
            raise LoraError(f"adapter {name!r} says model.pooling is {str(pooling)[:80]!r}")
    if len(set(said.values())) > 1:
        lines = listed(f"{name}: {pooling}" for name, pooling in said.items())
        raise LoraError(
            f"the adapters cannot share a batch: their heads pool differently:\n{lines}\n"
            "predict with one kind at a time"
        )
    return next(iter(said.values()))
