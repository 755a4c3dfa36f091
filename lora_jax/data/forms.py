"""The forms in which people write examples for a language model, found by their keys.

| form           | keys                                    | what is learned                      |
|----------------|-----------------------------------------|--------------------------------------|
| preference     | chosen, rejected (+ prompt)             | chosen rather than rejected          |
| preference_messages | chosen_messages, rejected_messages | the same                             |
| messages       | messages (+ tools)                      | the assistant's messages             |
| conversations  | conversations (+ system, tools)         | what gpt says (ShareGPT)             |
| judged         | prompt, completion, label               | what has a true label rather than    |
| judged_messages| messages, label                         | what has a false one (KTO)           |
| completion     | prompt, completion                      | the completion                       |
| instruction    | instruction, output (+ input, history)  | the output (Alpaca)                  |
| text           | text                                    | the whole text                       |

The first form whose keys a row has is its form. Every row of a source must have the same one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from lora_jax.errors import DataError
from lora_jax.models.text.conversation import Conversation, conversation, of_turns
from lora_jax.models.text.example import Example, place_of, shown


@dataclasses.dataclass(frozen=True)
class Continued:
    """A text that is continued by another, without a chat template."""

    prompt: str
    answer: str


# An example before its tokens is a conversation, or a text that is continued.
Said = Conversation | Continued


@dataclasses.dataclass(frozen=True)
class Preference:
    """Two answers to one prompt, of which the first is better."""

    chosen: Said
    rejected: Said

    @property
    def judged(self) -> tuple[tuple[Said, bool], ...]:
        """Its answers, and whether each of them is good."""
        return (self.chosen, True), (self.rejected, False)


@dataclasses.dataclass(frozen=True)
class Judged:
    """An answer, and whether it is good."""

    said: Said
    good: bool

    @property
    def judged(self) -> tuple[tuple[Said, bool], ...]:
        return ((self.said, self.good),)


def answers(said: Said | Preference | Judged) -> tuple[Said, ...]:
    """Return the one text of an example, or the better and the worse of a pair."""
    if isinstance(said, Preference | Judged):
        return tuple(answer for answer, _ in said.judged)
    return (said,)


@dataclasses.dataclass(frozen=True)
class Form:
    """A form of examples.

    name: its name in `data.form`.
    keys: the fields that a row must have.
    read: makes what a row says; arguments are the row and its place.
    learned: what of it is learned, for readers.
    """

    name: str
    keys: tuple[str, ...]
    read: Callable[[Example, str], Said | Preference | Judged]
    learned: str = "every answer"

    def of(self, example: Example, where: str) -> Any:
        """Return what an example says; `DataError`, with its place, if it is not of this form."""
        place = place_of(example, where)
        missing = [key for key in self.keys if key not in example]
        if missing:
            names = ", ".join(map(shown, list(example)[:20])) or "none"
            raise DataError(
                f"{place} has no {missing[0]!r}, which the form {self.name!r} needs.\n"
                f"  its fields: {names}\nAll examples of a source have the same form."
            )
        return self.read(example, place)


def _messages(row: Example, where: str) -> Conversation:
    return conversation(row["messages"], where, row.get("tools"))


def _turns(row: Example, where: str) -> Conversation:
    return of_turns(row["conversations"], where, row.get("system"), row.get("tools"))


def _instruction(row: Example, where: str) -> Conversation:
    asked, more = (_text(row, key, where) for key in ("instruction", "input"))
    system = _text(row, "system", where)
    messages: list[Any] = [{"role": "system", "content": system}] if system else []
    for pair in row.get("history") or ():
        if not isinstance(pair, Sequence) or len(pair) != 2:
            raise DataError(f"{where}: history is a list of pairs, got {shown(pair)}")
        messages += _turn(*pair)
    messages += _turn(f"{asked}\n{more}" if more else asked, _text(row, "output", where))
    return conversation(messages, where)


def _turn(asked: Any, answer: Any) -> list[Any]:
    return [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]


def _completion(row: Example, where: str) -> Said:
    return _continued(row["prompt"], row["completion"], where, row.get("tools"))


def _judged(row: Example, where: str) -> Judged:
    label = row["label"]
    known = {"true": True, "false": False, "1": True, "0": False, "1.0": True, "0.0": False}
    good = known.get(str(label).lower())
    if good is None:
        raise DataError(
            f"{where}: the label is {shown(label)}, expected true or false; if it does not judge "
            "the answer, name the form of the examples (data.form messages, or completion)"
        )
    return Judged((_messages if "messages" in row else _completion)(row, where), good)


def _preference(row: Example, where: str) -> Preference:
    both = "chosen", "rejected"
    chosen, rejected = (row[key if key in row else f"{key}_messages"] for key in both)
    prompt = row.get("prompt", row.get("conversations"))
    if prompt is None:
        if isinstance(chosen, str) and isinstance(rejected, str):
            raise DataError(f"{where} has no 'prompt', which texts in chosen and rejected need")
        prompt, chosen, rejected = _split(chosen, rejected, where)
    if chosen == rejected:
        raise DataError(f"{where}: chosen and rejected are the same")
    tools = row.get("tools")
    return Preference(*(_continued(prompt, answer, where, tools) for answer in (chosen, rejected)))


def _split(chosen: Any, rejected: Any, where: str) -> tuple[Any, Any, Any]:
    """Return the messages with which both begin, and the rest of each."""
    if not isinstance(chosen, list) or not isinstance(rejected, list):
        raise DataError(f"{where}: chosen and rejected must both be texts, or lists of messages")
    pairs = zip(chosen, rejected, strict=False)
    same = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(chosen), len(rejected)))
    if same == 0 or same in (len(chosen), len(rejected)):
        raise DataError(
            f"{where}: chosen and rejected must begin with the same messages and then differ; "
            f"they have {same} in common, of {len(chosen)} and {len(rejected)}"
        )
    return chosen[:same], chosen[same:], rejected[same:]


def _continued(prompt: Any, answer: Any, where: str, tools: Any = None) -> Said:
    if isinstance(prompt, str) and isinstance(answer, str):
        if not answer:
            raise DataError(f"{where}: the completion is empty")
        return Continued(prompt, answer)
    asked = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    said = {"role": "assistant", "content": answer} if isinstance(answer, str) else answer
    said = [said] if isinstance(said, Mapping) else said
    if not isinstance(asked, list) or not isinstance(said, list):
        raise DataError(
            f"{where}: the prompt is {shown(prompt)} and the completion {shown(answer)}; expected "
            "two texts, or two lists of messages"
        )
    whole = of_turns([*asked, *said], where, tools=tools)
    learned = [own and i >= len(asked) for i, own in enumerate(whole.learned)]
    return dataclasses.replace(whole, learned=tuple(learned))


def _whole(row: Example, where: str) -> Continued:
    return Continued("", _text(row, "text", where))


def _text(row: Example, key: str, where: str) -> str:
    value = row.get(key)
    if value is None:
        return ""
    if not isinstance(value, str | int | float):
        raise DataError(f"{where}: {key!r} is {shown(value)}, expected a text")
    return str(value)


FORMS: Mapping[str, Form] = {
    form.name: form
    for form in (
        Form("preference", ("chosen", "rejected"), _preference),
        Form("preference_messages", ("chosen_messages", "rejected_messages"), _preference),
        Form("judged_messages", ("messages", "label"), _judged),
        Form("messages", ("messages",), _messages),
        Form("conversations", ("conversations",), _turns),
        Form("judged", ("prompt", "completion", "label"), _judged),
        Form("completion", ("prompt", "completion"), _completion),
        Form("instruction", ("instruction", "output"), _instruction),
        Form("text", ("text",), _whole, "every token"),
    )
}


def form_of(example: Example, where: str) -> Form:
    """Return the form of an example, found by its keys; `DataError` names the forms."""
    for form in FORMS.values():
        if all(key in example for key in form.keys):
            return form
    known = "\n".join(f"  {f.name:14}{', '.join(f.keys)}" for f in FORMS.values())
    raise DataError(
        f"{place_of(example, where)}: no form of examples has these fields: "
        f"{', '.join(map(shown, list(example)[:20])) or 'none'}.\nThe forms and their fields:\n"
        f"{known}\nOr say how a text is made of the fields: --data.prompt 'Define {{word}}:' "
        "--data.answer ' {definition}'"
    )
