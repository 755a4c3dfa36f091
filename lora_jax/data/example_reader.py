"""From examples in one of the forms to tokens, and a mark on each token that is to be learned."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence

import numpy as np
from numpy.typing import NDArray
from tokenizers import Encoding, Tokenizer

from lora_jax.data import forms
from lora_jax.data.config import DataConfig
from lora_jax.data.forms import Continued, Form, Said
from lora_jax.errors import DataError, nearest
from lora_jax.models.text.chat_template import ChatTemplate, Rendered
from lora_jax.models.text.conversation import Conversation, escaped
from lora_jax.models.text.example import Example, place_of
from lora_jax.models.text.templates import Template
from lora_jax.models.text.tokens import Encoder, TextTruncation, TokenRow


@dataclasses.dataclass(frozen=True)
class Words:
    """The tokenizer of a model, and the rest that turns examples into tokens.

    tokenizer: makes the tokens. Special tokens that its post-processor puts before a text are kept
        if no chat template writes them; those after it are not.
    vocabulary: rows of the model's embedding; a token beyond them is an error. None: no check.
    template: opens the model's chat template. None: only texts can be read.
    end: the token that ends a text; None if the model names none.
    """

    tokenizer: Tokenizer
    vocabulary: int | None = None
    template: Callable[[], ChatTemplate] | None = None
    end: str | None = None


def form_of(config: DataConfig, first: Example, where: str) -> Form:
    """Return the form of a source's examples, by the config or by the first of them."""
    if config.prompt is not None:
        return _of_templates(config, config.prompt, where)
    return forms.FORMS[config.form] if config.form != "auto" else forms.form_of(first, where)


def _of_templates(config: DataConfig, text: str, where: str) -> Form:
    prompt, answer = Template(text, "prompt"), Template(config.answer, "answer")

    def read(example: Example, place: str) -> Continued:
        asked = prompt.fill(example, where)
        if not answer.text:
            return Continued("", asked)
        return Continued(asked, answer.fill(example, where))

    return Form("fields", (), read)


class Reader:
    """Turns examples into tokens and marks; the mark is 1 on a token that is to be learned."""

    def __init__(self, config: DataConfig, words: Words, form: Form, where: str) -> None:
        """Check the end token; the template is opened at the first conversation."""
        self.where, self._config, self._words, self._form = where, config, words, form
        # A row has `max_length` inputs, and the last token of an example is only a target.
        self._encoder = Encoder(words.tokenizer, config.max_length + 1, words.vocabulary)
        added = words.tokenizer.get_added_tokens_decoder().values()
        self._control = tuple(token.content for token in added if token.special)
        self._added = tuple(token.content for token in added)

    def rows(self, examples: Sequence[Example], truncation: TextTruncation) -> Iterator[TokenRow]:
        """Yield a row for each example, which is empty if there is nothing to learn.

        Counts of cut and dropped examples are added to `truncation`.
        """
        said = [self._form.of(example, self.where) for example in examples]
        places = [place_of(example, self.where) for example in examples]
        for row in self.whole(said, places, truncation):
            yield self.within(row, truncation)

    def whole(
        self, said: Sequence[Said], places: Sequence[str], truncation: TextTruncation
    ) -> list[TokenRow]:
        """Return the whole row of each conversation or continued text."""
        for one, place in zip(said, places, strict=True):
            if not isinstance(one, Conversation | Continued):
                raise DataError(
                    f"{place}: examples of the form {self._form.name!r} say which answer is "
                    "better, and this workload learns texts. Write the better ones into a file "
                    "of prompt and completion."
                )
        plain = [i for i, one in enumerate(said) if isinstance(one, Continued)]
        chats = [i for i, one in enumerate(said) if isinstance(one, Conversation)]
        rows = dict(zip(plain, self._continued([said[i] for i in plain], truncation), strict=True))
        pairs = [(said[i], places[i]) for i in chats]
        rows |= zip(chats, self._conversations(pairs, truncation), strict=True)
        return [rows[i] for i in range(len(said))]

    def _continued(self, said: Sequence[Said], truncation: TextTruncation) -> Iterator[TokenRow]:
        pairs = [(one.prompt, one.answer) for one in said if isinstance(one, Continued)]
        if not pairs:
            return
        truncation.see(pairs)
        start, end = self._encoder.start, self._end()
        asked, answers = (self._encoder.plain(texts) for texts in zip(*pairs, strict=True))
        for prompt, answer in zip(asked, answers, strict=True):
            ids = np.array([*start, *prompt, *answer, *end], np.int32)
            marks = np.ones(len(ids), np.uint8)
            marks[: len(start) + (0 if self._config.train_on == "all" else len(prompt))] = 0
            yield ids, marks

    def _conversations(
        self, said: Sequence[tuple[Said, str]], truncation: TextTruncation
    ) -> Iterator[TokenRow]:
        if not said:
            return
        rendered = []
        for one, place in said:
            assert isinstance(one, Conversation)
            one, count = escaped(one, self._control)
            truncation.escaped += count
            answers = one.answers(self._config.train_on)
            example = self._template.example(one.messages, one.tools, answers, place)
            rendered.append(example)
        encodings = self._encoder.with_offsets([found.text for found in rendered])
        self._check_prefixes(rendered, encodings, [place for _, place in said])
        for found, encoding in zip(rendered, encodings, strict=True):
            yield np.array(encoding.ids, np.int32), self._marks(found, encoding, truncation)

    def _marks(
        self, found: Rendered, encoding: Encoding, truncation: TextTruncation
    ) -> NDArray[np.uint8]:
        """Mark every token that overlaps an answer, with the token that ends its turn."""
        if self._config.train_on == "all":
            return np.ones(len(encoding.ids), np.uint8)
        offsets = np.array(encoding.offsets, np.int64).reshape(-1, 2)
        marks = np.zeros(len(offsets), bool)
        for start, end in found.spans:
            text = found.text[start:end].rstrip()
            closed = text.endswith(self._added)
            truncation.open_ended += not closed
            last = start + len(text) if closed and found.prefixes else end
            marks |= (offsets[:, 1] > start) & (offsets[:, 0] < last)
        return marks.astype(np.uint8)

    def _check_prefixes(
        self, rendered: Sequence[Rendered], encodings: Sequence[Encoding], places: Sequence[str]
    ) -> None:
        """Raise unless what the model reads before an answer are the first tokens of the whole."""
        starts = [(i, p) for i, found in enumerate(rendered) for p in found.prefixes[::2]]
        for (i, text), tokens in zip(
            starts, self._encoder.plain([text for _, text in starts]), strict=True
        ):
            if encodings[i].ids[: len(tokens)] != tokens:
                raise DataError(
                    f"{places[i]}: the tokens before an answer change with the answer, by "
                    f"{self._template.where}: the tokenizer joins {text[-12:]!r} with what "
                    "comes next.\nGive a template whose answers begin after a control token or a "
                    "new line (data.template)."
                )

    @functools.cached_property
    def _template(self) -> ChatTemplate:
        assert self._words.template is not None, "conversations need Words with a template"
        return self._words.template()

    def within(self, row: TokenRow, truncation: TextTruncation) -> TokenRow:
        ids, marks = row
        limit = self._encoder.max_length
        if len(ids) > limit:
            if self._config.overlong == "drop":
                truncation.overlong += 1
                return ids[:0], marks[:0]
            truncation.examples += 1
            truncation.tokens += len(ids) - limit
            truncation.learned += int(marks[limit:].sum())
            ids, marks = ids[:limit], marks[:limit]
        if not marks[1:].any():  # the first token is never a target
            truncation.dropped += 1
            return ids[:0], marks[:0]
        return ids, marks

    def _end(self) -> list[int]:
        tokenizer, eos = self._words.tokenizer, self._config.eos
        eos = self._words.end if eos is None else eos
        special = self._control
        if eos is None:
            raise DataError(
                "data.eos must name the token that ends an example, or be empty for none: the "
                "model names none.\n"
                f"  this tokenizer's special tokens: {', '.join(special[:20])}"
            )
        if not eos:
            return []
        found = tokenizer.token_to_id(eos)
        if found is None:
            raise DataError(
                f"data.eos {eos!r} is not in the tokenizer's vocabulary.\n"
                f"  nearest: {', '.join(nearest(eos, special or tokenizer.get_vocab()))}"
            )
        self._encoder.check([[found]])
        return [found]
