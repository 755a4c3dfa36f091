"""Classify texts. Each text is padded to the shortest length of a batch that has room for it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lora_jax import models
from lora_jax.errors import LoraError, listed
from lora_jax.models.text.tokens import Encoder, TextOrPair, TextTruncation, padding_id
from lora_jax.serving.classifier import Classifier, ClassifierTask, check_head
from lora_jax.serving.jsonl import JsonLine
from lora_jax.serving.served_adapters import Served, ServedAdapter


def task_of(member: ServedAdapter) -> ClassifierTask:
    """Return the task of an adapter that `lora_jax.training.classification` trained."""
    about = member.about
    found: dict[str, Any] = {name: about.get(name) for name in ("labels", "text_fields", "lengths")}
    sound = (
        _all(str, found["labels"])
        and _all(str, found["text_fields"], 1)
        and len(found["text_fields"]) <= 2
        and _all(int, found["lengths"], 1)
        and found["lengths"] == sorted(found["lengths"])
        and found["lengths"][0] > 0
    )
    if not sound:
        raise LoraError(
            f"adapter {member.name!r} ({member.path}) does not say what it classifies: "
            f"{'it has ' + str(found)[:300] if any(found.values()) else 'nothing is said'}.\n"
            "Adapters that train.py exports say it; one that you save yourself says it by "
            'lora_jax.save(..., about={"labels": ["no", "yes"], "text_fields": ["text"], '
            '"lengths": [32, 64], "model": {"reference": ..., "pooling": "mean"}})'
        )
    task = ClassifierTask(*(tuple(found[name]) for name in ("labels", "text_fields", "lengths")))
    check_head(member, task)
    return task


def _all(kind: type[Any], values: Any, least: int = 0) -> bool:
    return (
        isinstance(values, list)
        and len(values) >= least
        and all(type(value) is kind for value in values)
    )


class TextClassifier(Classifier):
    """Computes the scores of texts, each with one of several adapters.

    Attributes:
      cut: counts of the texts and tokens that were cut off so far.
      tokens: the number of tokens so far, without padding.
    """

    unit = "texts"

    def __init__(self, served: Served, batch_size: int) -> None:
        """Read the tasks and the tokenizer; see `Classifier`."""
        tasks = tuple(task_of(member) for member in served.members)
        self.cut, self.tokens = TextTruncation(), 0
        self.lengths = sorted({length for task in tasks for length in task.lengths})
        _check_positions(served, self.lengths[-1])
        tokenizer = served.source.tokenizer()
        limits = {task.lengths[-1] for task in tasks}
        rows = served.config.vocab_size
        self._encoders = {limit: Encoder(tokenizer, limit, rows) for limit in limits}
        self._pad = padding_id(tokenizer)
        width = max(task.outputs for task in tasks)
        model = models.BertClassifier(served.config, width, _pooling(served.members))
        super().__init__(served, tasks, model, batch_size)

    def example_of(self, line: JsonLine, task: ClassifierTask) -> TextOrPair:
        """See `Classifier`. Numbers are read as text, as in training."""
        found = []
        for field in task.fields:
            value = line.get(field, object)
            if not isinstance(value, str | int | float):
                line.get(field, str)  # raises
            found.append(str(value))
        return found[0] if len(found) == 1 else (found[0], found[1])

    def prepare(self, adapters: Sequence[int], examples: Sequence[TextOrPair]) -> list[Any]:
        """Return the tokens of each text, cut to the limit of its adapter's task."""
        limits = [self.tasks[adapter].lengths[-1] for adapter in adapters]
        encoded: list[Any] = [None] * len(examples)
        for limit, encoder in self._encoders.items():
            for pair in (False, True):
                own = [
                    i
                    for i in range(len(examples))
                    if limits[i] == limit and isinstance(examples[i], tuple) == pair
                ]
                found = encoder.truncate([examples[i] for i in own], self.cut) if own else []
                for i, encoding in zip(own, found, strict=True):
                    encoded[i] = encoding
        self.tokens += sum(len(encoding.ids) for encoding in encoded)
        return encoded

    def length_of(self, row: Any) -> int:
        """See `Classifier`. The length is the number of tokens."""
        return len(row.ids)

    def arrays(self, rows: Sequence[Any]) -> tuple[NDArray[Any], ...]:
        """Return token ids, mask and token types, as in the batches of training."""
        longest = max(len(row.ids) for row in rows)
        shape = (len(rows), next(length for length in self.lengths if length >= longest))
        ids, types = np.full(shape, self._pad, np.int32), np.zeros(shape, np.int32)
        mask = np.zeros(shape, bool)
        for row, encoding in enumerate(rows):
            size = len(encoding.ids)
            ids[row, :size], types[row, :size] = encoding.ids, encoding.type_ids
            mask[row, :size] = True
        return ids, mask, types

    def facts(self, count: int) -> tuple[str, ...]:
        """See `Classifier`."""
        (said,), cut = super().facts(count), self.cut
        lost = f"{cut.examples:,} texts were too long and lost {cut.tokens:,} tokens"
        remarks = [*([lost] if cut.examples else []), *cut.remarks(count)]
        return (f"{said}, {self.tokens:,} tokens", *remarks)


def _pooling(members: Sequence[ServedAdapter]) -> str:
    """Return the pooling that all heads share."""
    said = {member.name: member.about.get("model", {}).get("pooling", "mean") for member in members}
    for name, pooling in said.items():
        if pooling not in list(models.bert.POOLINGS):  # a stranger's may be unhashable
            raise LoraError(f"adapter {name!r} says model.pooling is {str(pooling)[:80]!r}")
    if len(set(said.values())) > 1:
        lines = listed(f"{name}: {pooling}" for name, pooling in said.items())
        raise LoraError(
            f"the adapters cannot share a batch: their heads pool differently:\n{lines}\n"
            "predict with one kind at a time"
        )
    return next(iter(said.values()))


def _check_positions(served: Served, length: int) -> None:
    if length > served.config.max_positions:
        raise LoraError(
            f"an adapter takes texts of {length} tokens, but the base has positions for "
            f"{served.config.max_positions}; is it the base that it was trained on?"
        )
