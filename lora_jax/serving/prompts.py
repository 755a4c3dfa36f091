"""Read prompts from lines of text or JSONL, and turn them into tokens for a decoder."""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from tokenizers import Tokenizer

from lora_jax.checkpoint.saved_adapter import SavedAdapter
from lora_jax.errors import DataError, LoraError, nearest
from lora_jax.models.text.chat_template import ChatTemplate, end_of_turn
from lora_jax.models.text.conversation import conversation, escaped
from lora_jax.models.text.templates import Template
from lora_jax.models.text.tokens import Encoder
from lora_jax.models.weights import chat_files
from lora_jax.multi.stack import BASE
from lora_jax.serving import jsonl
from lora_jax.serving.jobs import Prompt
from lora_jax.serving.jsonl import JsonLine, LineError
from lora_jax.serving.served_adapters import BASE_NAME, Served

FIELD = "prompt"


@dataclasses.dataclass(frozen=True)
class Request:
    """One prompt for one adapter.

    name: the name of the adapter, or "base".
    prompt: its tokens, the number of its adapter, and its stop tokens.
    size: bytes of its line, for a progress bar; 0 for all but the last request of a line.
    error: why its line cannot be used; then only its fields and its size count.
    """

    name: str
    text: str
    prompt: Prompt
    fields: Mapping[str, Any]
    size: int = 0
    error: str = ""


def read(path: str, *, keep_broken: bool = False) -> Iterator[JsonLine | str]:
    """Read JSONL objects or plain lines, each of which is a prompt; "-" is stdin.

    The input is JSONL if its first character, after white space, is an opening brace. Empty lines
    are skipped. With `keep_broken`, a line that cannot be read is yielded with its fault.
    """
    name = "stdin" if path == jsonl.STANDARD else path
    with jsonl.opened(path, "rb") as file:
        raw: bytes = file.read()
    if raw.lstrip(b"\xef\xbb\xbf \t\r\n")[:1] == b"{":
        yield from jsonl.objects(io.BytesIO(raw), name, keep_broken)
        return
    for number, line in enumerate(raw.splitlines(), 1):
        where = f"{name}, line {number}"
        try:
            text = line.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            fault = LineError(f"{where} is not UTF-8 ({error.reason})")
            if not keep_broken:
                raise fault from None
            yield JsonLine({}, where, len(line) + 1, fault)
            continue
        if text.strip():
            yield text


class Prompts:
    """Turns texts and lines into requests.

    templates: name -> prompt template of each adapter that was trained on one with fields.
    chats: name -> chat template of each adapter that was trained on conversations, and of the base
        if it has one.
    """

    def __init__(
        self, served: Served, stop: Sequence[str] = (), base_too: bool = False, chat: bool = True
    ) -> None:
        """Find the stop tokens of each adapter: its `eos` of training, the model's, and `stop`.

        Each text in `stop` is one token. With `base_too`, a plain text is also for the base.
        Without `chat`, no prompt is put into a chat template.
        """
        tokenizer = served.source.tokenizer()
        self._served, self._room = served, served.config.max_positions
        self._encoder = Encoder(tokenizer, self._room, served.config.vocab_size)
        common = {_stop_id(tokenizer, text) for text in stop} | {served.config.eos_id} - {None}
        added = tokenizer.get_added_tokens_decoder().values()
        self._added = [token.content for token in added]
        self._control = tuple(token.content for token in added if token.special)
        self.tokenizer, self._chat = tokenizer, chat
        self.templates, self.chats = dict[str, Template](), dict[str, ChatTemplate]()
        if chat and served.source.chat_template is not None:
            self.chats[BASE_NAME] = chat_files.open_template(served.source)
        self._common, self._stops = common, {BASE_NAME: common}
        self._end(BASE_NAME)
        for member in served.members:
            self.add(member)
        self._base_too = base_too

    def add(self, member: SavedAdapter) -> None:
        """Find the template of an adapter and its stop tokens."""
        name, about, source = member.name, member.about, self._served.source
        self.templates.pop(name, None)
        self.chats.pop(name, None)
        if (template := _template(member)) is not None:
            self.templates[name] = template
        if self._chat and about.get("chat") is True:
            own, base = about.get("template"), self.chats.get(BASE_NAME)
            if isinstance(own, str):
                base = ChatTemplate(own, source.special_tokens, str(member.folder))
            self.chats[name] = base or chat_files.open_template(source)
        self._stops[name] = self._common | _end_ids(self.tokenizer, member)
        self._end(name)

    def _end(self, name: str) -> None:
        """Add the token that ends a turn in the chat template of an adapter."""
        if name in self.chats and (end := end_of_turn(self.chats[name], self._added)) is not None:
            found = self.tokenizer.token_to_id(end)
            self._stops[name] = self._stops[name] | (set() if found is None else {found})

    def all(
        self, given: Sequence[JsonLine | str], where: str, *, keep_broken: bool = False
    ) -> list[Request]:
        """Return a request for each line, and one for every adapter for each plain text.

        With `keep_broken`, a line that cannot be used becomes a request with its error.
        """
        found: list[Request] = []
        for number, line in enumerate(given, 1):
            try:
                if isinstance(line, JsonLine):
                    found.append(self._of_line(line))
                else:
                    found += self._of_text(line, f"{where} {number}")
            except LoraError as error:
                if not keep_broken:
                    raise
                if not isinstance(line, JsonLine):
                    line = JsonLine({FIELD: line}, where, _size(line))
                found.append(Request("", "", Prompt([]), line.value, line.size, str(error)))
        return found

    def _of_text(self, text: str, where: str) -> list[Request]:
        names = self._served.names
        plain = (*names, *([BASE_NAME] if self._base_too or not names else []))
        *others, last = (self._request(name, text, {FIELD: text}, where) for name in plain)
        return [*others, dataclasses.replace(last, size=_size(text))]

    def _of_line(self, line: JsonLine) -> Request:
        if line.fault is not None:
            raise line.fault
        number = self._served.id_of(line.get("adapter", str, "") or None, line.where)
        name = BASE_NAME if number == BASE else self._served.slots[number].name
        if "messages" in line.value:
            text = self._conversation(line, name)
            return self._request(name, text, line.value, line.where, line.size, rendered=True)
        text = self._text_of(line, name)
        return self._request(name, text, line.value, line.where, line.size)

    def _conversation(self, line: JsonLine, name: str) -> str:
        """Return the text of a line's messages, by the chat template."""
        if name not in self.chats:
            raise LineError(
                f"{line.where} has messages, and {name!r} was not trained on conversations; give "
                f"it a text as {FIELD!r}"
            )
        try:
            found = conversation(line.value["messages"], line.where, line.value.get("tools"))
            found, _ = escaped(found, self._control)
            return self.chats[name].prompt(found.messages, found.tools, line.where)
        except DataError as error:
            raise LineError(str(error)) from error

    def _text_of(self, line: JsonLine, name: str) -> str:
        """Fill in the prompt that the adapter was trained on, or return the prompt of the line."""
        template = self.templates.get(name)
        lacking = [] if template is None else [f for f in template.fields if f not in line.value]
        if template is None or (lacking and FIELD in line.value):
            return line.get(FIELD, str)
        if lacking:
            raise LineError(
                f"{line.where} has no field {lacking[0]!r}: adapter {name!r} was trained on "
                f"prompts of the form {template.text!r}. The line's fields: {line.fields}. Give "
                f"it that, or the whole text as {FIELD!r}"
            )
        return template.fill(line.value, line.where)

    def _request(
        self,
        name: str,
        text: str,
        fields: Mapping[str, Any],
        where: str,
        size: int = 0,
        rendered: bool = False,
    ) -> Request:
        try:
            if text and not rendered and name in self.chats and name not in self.templates:
                asked, _ = escaped(
                    conversation([{"role": "user", "content": text}], where), self._control
                )
                text, rendered = self.chats[name].prompt(asked.messages, None, where), True
            start = () if rendered else self._encoder.start
            tokens = [*start, *self._encoder.plain([text])[0]]
        except DataError as error:
            raise LineError(f"{where}: {error}") from error
        if not tokens:
            raise LineError(f"{where}: the prompt is empty; give it at least one character")
        if len(tokens) >= self._room:
            raise LineError(
                f"{where}: the prompt has {len(tokens):,} tokens, and the model has positions for "
                f"{self._room:,}, of which at least one is to be written; shorten it"
            )
        number = self._served.id_of(name, where)
        return Request(name, text, Prompt(tokens, number, self._stops[name]), fields, size)


def _size(text: str) -> int:
    return len(text.encode(errors="replace")) + 1


def _template(member: SavedAdapter) -> Template | None:
    """Return the prompt template that the adapter was trained on, if it has fields."""
    said = member.about.get("prompt")
    if said is None:
        return None
    if not isinstance(said, str):
        raise LoraError(f"{member.folder} says that its prompt is {str(said)[:80]!r}")
    template = Template(said, "prompt")
    return template if template.fields else None


def _end_ids(tokenizer: Tokenizer, member: SavedAdapter) -> set[int]:
    """Return the token that ended its training examples, if there was one."""
    said = member.about.get("eos")
    if said is None or said == "":
        return set()
    found = tokenizer.token_to_id(said) if isinstance(said, str) else None
    if found is None:
        raise LoraError(
            f"{member.folder} says that its examples ended with {str(said)[:80]!r}, which is not a "
            "token of this base; is it the base that it was trained on?"
        )
    return {found}


def _stop_id(tokenizer: Tokenizer, text: str) -> int:
    """Return the one token of a text, given as text or as its entry in the vocabulary."""
    named = tokenizer.token_to_id(text)
    ids = tokenizer.encode(text, add_special_tokens=False).ids if named is None else [named]
    if len(ids) == 1:
        return int(ids[0])
    special = nearest(text, (x.content for x in tokenizer.get_added_tokens_decoder().values()), 1)
    near = f"; the special token nearest to it is {special[0]!r}" if special else ""
    raise LoraError(f"--stop {text!r} is {len(ids)} tokens; give a text that is one token{near}")
