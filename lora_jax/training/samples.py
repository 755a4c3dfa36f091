"""Texts that a decoder writes during a run: answers to a few questions of the validation split.

They are written greedily before the first step and at each evaluation, and compared with the
answers of the examples. The texts of before and of the best adapter go into summary.json and the
report; the scores into metrics.jsonl, with the scores of the validation split.
"""

from __future__ import annotations

import dataclasses
import functools
import operator
import re
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import Any, NamedTuple

import jax
import numpy as np

from lora_jax.adapters import Adapter
from lora_jax.data.catalogue import open_data
from lora_jax.data.config import DataConfig
from lora_jax.data.example_reader import Reader, Words, form_of
from lora_jax.data.forms import Continued, answers
from lora_jax.layout import Layout
from lora_jax.models import DecoderConfig
from lora_jax.models.text.example import place_of
from lora_jax.models.text.tokens import TextTruncation
from lora_jax.multi.stack import BASE, stack
from lora_jax.serving.generation import Decoder
from lora_jax.serving.jobs import Prompt
from lora_jax.training.config import require
from lora_jax.training.text import SamplesConfig, TextConfig


class Question(NamedTuple):
    """A question, the answer that its example gives, and the tokens that the model reads."""

    asked: str
    expected: str
    prompt: Prompt


class Samples:
    """Writes the answers; its programs are compiled once in a run."""

    def __init__(
        self, config: TextConfig, words: Callable[[], Words], model: DecoderConfig
    ) -> None:
        """Nothing is read before the first call."""
        self._config, self._words, self._model = config, words, model
        self._decoder: Decoder | None = None

    def __call__(
        self, layout: Layout, params: Any, adapters: Any
    ) -> tuple[list[dict[str, str]], dict[str, float]]:
        """Return what the base `params` with `adapters` answers, and the mean scores."""
        settings, data = self._config.samples, self._config.data
        stacked = stack([Adapter(layout, adapters)]) if layout.targets else ()
        if self._decoder is None:
            rows, room = min(8, settings.prompts), data.max_length + settings.new_tokens
            self._decoder = Decoder(self._model, params, *stacked, rows=rows, capacity=room)
        self._decoder.put(params, *stacked[1:])
        who = 0 if stacked else BASE
        prompts = [dataclasses.replace(q.prompt, adapter=who) for q in self._questions]
        tokens: list[list[int]] = [[] for _ in prompts]
        for piece in self._decoder.read(self._decoder.submit(prompts, settings.new_tokens)):
            if piece.token is not None:
                tokens[piece.row].append(piece.token)
        self._decoder.put({})  # between evaluations it holds nothing
        texts = map(str.strip, self._words().tokenizer.decode_batch(tokens))
        found = [
            {"asked": q.asked, "expected": q.expected, "text": text}
            for q, text in zip(self._questions, texts, strict=True)
        ]
        return found, {
            name: float(np.mean([score(one["text"], one["expected"]) for one in found]))
            for name, score in functions(settings).items()
        }

    @functools.cached_property
    def _questions(self) -> list[Question]:
        count = self._config.samples.prompts
        found = list(islice(questions(self._config.data, self._words()), count))
        expected = "0: no validation example has a question before its answer"
        require(bool(found), "samples.prompts", count, expected)
        return found


def samples_of(
    config: TextConfig, words: Callable[[], Words], model: DecoderConfig
) -> Samples | None:
    """Return what writes the samples of a run; None if it has none."""
    count, plain = config.samples.prompts, config.adaptation is config.lora
    expected = "0 with several processes or another method than LoRA"
    require(not count or (plain and jax.process_count() == 1), "samples.prompts", count, expected)
    return Samples(config, words, model) if count else None


def questions(data: DataConfig, words: Words) -> Iterator[Question]:
    """Yield the validation examples that have a question, without the last answer."""
    source = open_data(data, set_apart=True)
    where = f"{source.name}, split {data.eval_split!r}"
    examples: Sequence[Any] = source.examples(data.eval_split)
    last = dataclasses.replace(data, train_on="last")
    form = form_of(last, examples[0], where)
    reader = Reader(last, words, form, where)
    added = words.tokenizer.get_added_tokens_decoder()
    for example in examples:
        said, *_ = answers(form.of(example, where))
        ((ids, marks),) = reader.whole([said], [place_of(example, where)], TextTruncation())
        learned = np.flatnonzero(marks)
        if len(ids) > data.max_length or not len(learned) or learned[0] == 0:
            continue
        answer = ids[learned].tolist()
        ends = [token for token in answer if token in added and added[token].special][-1:]
        if isinstance(said, Continued):
            asked, ends = said.prompt, answer[-1:] if data.eos != "" else []
        else:
            message = said.messages[said.answers("last")[0] - 1]
            asked = str(message.get("content", message))
        if model_end := words.end:
            ends.append(words.tokenizer.token_to_id(model_end))
        text = words.tokenizer.decode([token for token in answer if token not in ends])
        yield Question(asked, text.strip(), Prompt(ids[: learned[0]].tolist(), BASE, ends))


def functions(settings: SamplesConfig) -> dict[str, Callable[[str, str], float]]:
    """Return what scores a text against the expected one, by name; none if there are no samples."""
    if not settings.prompts:
        return {}
    own = {} if settings.score is None else {settings.score.__name__: settings.score}
    return {"exact_match": operator.eq, "rouge_l": rouge_l, **own}


def rouge_l(text: str, expected: str) -> float:
    """Return ROUGE-L (F1), from the longest common subsequence of words in lower case.

    >>> rouge_l("The cat sat.", "the black cat sat down")
    0.75
    """
    ours, theirs = (re.findall(r"[^\W_]+", one.lower()) for one in (text, expected))
    longest = [0] * (len(theirs) + 1)  # of the words so far and the first words of the other
    for word in ours:
        diagonal = 0
        for i, other in enumerate(theirs, 1):
            above = longest[i]
            longest[i] = diagonal + 1 if word == other else max(above, longest[i - 1])
            diagonal = above
    return 2 * longest[-1] / max(len(ours) + len(theirs), 1)
