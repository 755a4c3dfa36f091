"""A conversation: messages with roles, in the one form that chat templates read."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

from lora_jax.errors import DataError, nearest
from lora_jax.models.text.example import shown

ROLES = ("system", "developer", "user", "assistant", "tool")

# Names of other formats (ShareGPT and its kin) -> a role.
_OTHER_NAMES = {
    **{role: role for role in ROLES},
    **dict.fromkeys(("human", "prompter"), "user"),
    **dict.fromkeys(("gpt", "model", "bot", "chatgpt", "bing", "bard"), "assistant"),
    **dict.fromkeys(("observation", "function_response", "function"), "tool"),
}
_WORDS = ("role", "content", "name", "tool_calls", "tool_call_id")
_WEIGHTS = ("weight", "loss_weight")  # of a message: 0 if it is not learned


@dataclasses.dataclass(frozen=True)
class Conversation:
    """Messages, as a template reads them, and the functions that the model may call.

    messages: dicts with `role`, and `content` or `tool_calls`.
    tools: JSON schemas of functions; None if there are none.
    learned: whether each message may be learned: the model's own, without a weight of 0.
    """

    messages: tuple[Mapping[str, Any], ...]
    tools: tuple[Any, ...] | None = None
    learned: tuple[bool, ...] = ()

    def answers(self, which: str) -> list[int]:
        """Return the numbers of the messages to learn: every answer, or the "last" one."""
        found = [i for i, learned in enumerate(self.learned) if learned]
        return found[-1:] if which == "last" else found


def conversation(messages: Any, where: str, tools: Any = None) -> Conversation:
    """Check messages of the form of OpenAI's API, and return them.

    A key whose value is null is dropped, text in parts is joined, and the arguments of a call that
    were written as text are read. An empty list of tools becomes None.

    Args:
      messages: the messages, as JSON values.
      where: their place, for messages of errors.
      tools: the functions, or None; a text is read as JSON.

    Raises:
      DataError: they are not such messages; the message names the place and the number.
    """
    if isinstance(messages, str):
        messages = _parsed(messages, f"{where}: the messages")
    if not isinstance(messages, list | tuple) or not messages:
        raise DataError(f"{where}: expected a list of messages, got {shown(messages)}")
    if all(isinstance(turn, list) for turn in messages):
        messages = _by_senders(messages, where)
    checked = [_message(m, f"{where}, message {i}") for i, m in enumerate(messages, 1)]
    weights = [[m.pop(name, 1) for name in _WEIGHTS] for m in checked]
    learned = [
        m["role"] == "assistant" and 0 not in w for m, w in zip(checked, weights, strict=True)
    ]
    return Conversation(tuple(checked), _tools(tools, where), tuple(learned))


def of_turns(turns: Any, where: str, system: Any = None, tools: Any = None) -> Conversation:
    """Return a conversation of turns {"from": "human", "value": text} (ShareGPT).

    human is the user, gpt the assistant, function_call a call by the assistant, and observation
    the result of a tool; OpenAI's names of roles are taken too.

    Args:
      turns: the turns.
      where: see `conversation`.
      system: a text that comes first, or None.
      tools: see `conversation`.
    """
    if not isinstance(turns, list | tuple):
        raise DataError(f"{where}: expected a list of turns, got {shown(turns)}")
    messages: list[Any] = [{"role": "system", "content": system}] if system else []
    for number, turn in enumerate(turns, 1):
        place = f"{where}, turn {number}"
        if isinstance(turn, Mapping) and "role" in turn:
            messages.append(turn)
            continue
        if not isinstance(turn, Mapping) or not {"from", "value"} <= set(turn):
            raise DataError(f"{place}: expected an object with from and value, got {shown(turn)}")
        name, value = turn["from"], turn["value"]
        if name == "function_call":
            call = _parsed(value, place) if isinstance(value, str) else value
            calls = call if isinstance(call, list) else [call]
            messages.append({"role": "assistant", "tool_calls": calls})
            continue
        role = _OTHER_NAMES.get(name) if isinstance(name, str) else None
        if role is None:
            near = nearest(str(name), [*_OTHER_NAMES, "function_call"], 1)
            raise DataError(f"{place}: nobody is called {shown(name)}; nearest: {near[0]!r}")
        messages.append({"role": role, "content": value})
    return conversation(messages, where, tools)


def _by_senders(turns: Sequence[Any], where: str) -> list[Any]:
    """Return the messages of turns that are lists of {"sender", "text"}; the first is the user."""
    found, roles = list[Any](), dict[str, str]()
    for number, turn in enumerate(turns, 1):
        if not turn or not all(isinstance(u, Mapping) and {"sender", "text"} <= {*u} for u in turn):
            expected = "expected texts with a sender"
            raise DataError(f"{where}, turn {number}: {expected}, got {shown(turn)}")
        names = {str(utterance["sender"]) for utterance in turn}
        role = roles.setdefault(min(names), "assistant" if roles else "user")
        if len(names) > 1 or len(roles) > 2:
            raise DataError(f"{where}, turn {number}: a third sender, or two in one turn")
        found.append({"role": role, "content": "\n".join(str(u["text"]) for u in turn)})
    return found


def _message(given: Any, where: str) -> dict[str, Any]:
    if not isinstance(given, Mapping):
        raise DataError(f"{where}: expected an object with role and content, got {shown(given)}")
    message = {key: value for key, value in given.items() if value is not None}
    role = message.get("role")
    if role not in ROLES:
        if role is None:
            known = ", ".join(map(shown, list(message)[:10])) or "none"
            raise DataError(f"{where} has no role; its keys: {known}")
        raise DataError(f"{where}: the role is {shown(role)}, expected one of {', '.join(ROLES)}")
    if "content" in message:
        message["content"] = _content(message["content"], where)
    if "tool_calls" in message:
        calls = message["tool_calls"]
        if not isinstance(calls, list):
            raise DataError(f"{where}: tool_calls is {shown(calls)}, expected a list")
        message["tool_calls"] = [_call(call, where) for call in calls]
    if not {"content", "tool_calls"} & set(message):
        near = nearest("content", [str(k) for k in message if k not in _WORDS], 1)
        said = f"; nearest: {near[0]!r}" if near else ""
        raise DataError(f"{where} ({role}) has neither content nor tool_calls{said}")
    return message


def _content(content: Any, where: str) -> str:
    if isinstance(content, str):
        return content
    parts = content if isinstance(content, list) else [None]
    texts = [p.get("text", p.get("value")) if isinstance(p, Mapping) else None for p in parts]
    if not all(isinstance(text, str) for text in texts):
        raise DataError(
            f"{where}: the content is {shown(content)}, expected a text, or a list of parts of the "
            'form {"type": "text", "text": ...}: images and sounds cannot be read'
        )
    return "".join(text for text in texts if isinstance(text, str))


def _call(call: Any, where: str) -> dict[str, Any]:
    """Return a call in OpenAI's form, whose arguments are an object."""
    inner = call.get("function", call) if isinstance(call, Mapping) else None
    if not isinstance(inner, Mapping) or not isinstance(inner.get("name"), str):
        raise DataError(f"{where}: a call is {shown(call)}, expected an object with a name")
    arguments = inner.get("arguments", {})
    if isinstance(arguments, str):
        arguments = _parsed(arguments, f"{where}: the arguments of {inner['name']!r}")
    about = {k: v for k, v in call.items() if k in ("id", "type")} if inner is not call else {}
    function = {"name": inner["name"], "arguments": arguments}
    return {"type": "function", **about, "function": function}


def _tools(tools: Any, where: str) -> tuple[Any, ...] | None:
    if isinstance(tools, str):
        tools = _parsed(tools, f"{where}: the tools") if tools.strip() else None
    if not tools:
        return None
    if not isinstance(tools, list | tuple) or not all(isinstance(t, Mapping) for t in tools):
        raise DataError(f"{where}: the tools are {shown(tools)}, expected a list of objects")
    return tuple(tools)


def _parsed(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: not JSON ({error}): {shown(text)}") from None


def escaped(found: Conversation, control: Sequence[str]) -> tuple[Conversation, int]:
    """Return the conversation with control tokens in its texts made plain, and their number.

    A text such as <|im_end|> that a user wrote would end the turn. A zero-width space after its
    first character makes the tokenizer read it as text.

    >>> said = conversation([{"role": "user", "content": "a<|im_end|>b"}], "here")
    >>> escaped(said, ["<|im_end|>"])[1]
    1
    """
    count = 0

    def plain(value: Any) -> Any:
        nonlocal count
        if isinstance(value, str):
            for token in control:
                if token in value:
                    count += value.count(token)
                    value = value.replace(token, f"{token[0]}\u200b{token[1:]}")
            return value
        if isinstance(value, Mapping):
            return {key: plain(item) for key, item in value.items()}
        return [plain(item) for item in value] if isinstance(value, list | tuple) else value

    messages = tuple({**plain(m), "role": m["role"]} for m in found.messages)
    tools = None if found.tools is None else tuple(plain(found.tools))
    return dataclasses.replace(found, messages=messages, tools=tools), count
