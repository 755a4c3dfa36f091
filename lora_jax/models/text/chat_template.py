"""A model's chat template: Jinja text that turns a conversation into the text the model reads.

The template is a program of whoever published the model, so a process of its own runs it, with
limits of time and memory (`lora_jax.models.text.template_process`).
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import pathlib
import select
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Mapping, Sequence
from typing import Any

from lora_jax.errors import DataError, shown
from lora_jax.system.extras import require

_SCRIPT = pathlib.Path(__file__).with_name("template_process.py")
SECONDS = 20.0  # the longest time for one conversation, with the start of the process
Span = tuple[int, int]  # characters of a text, from and to
Message = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Rendered:
    """A conversation as text.

    text: the text of all messages.
    spans: the characters to learn of each answer, in order.
    prefixes: what the model has read where each answer begins, and where it ends: texts that
        `text` begins with. Empty if the template marks the answers by itself.
    """

    text: str
    spans: tuple[Span, ...]
    prefixes: tuple[str, ...] = ()


class ChatTemplate:
    """A compiled template. It may be used from several threads, one at a time.

    >>> template = ChatTemplate("{% for m in messages %}[{{ m.content }}]{% endfor %}", {}, "here")
    >>> template.prompt([{"role": "user", "content": "hi"}])
    '[hi]'
    """

    def __init__(
        self,
        text: str,
        variables: Mapping[str, Any],
        where: str,
        tools: ChatTemplate | None = None,
        day: str | None = None,
    ) -> None:
        """Hold the template.

        Args:
          text: the Jinja text.
          variables: what it may name, such as the special tokens (`bos_token`, `eos_token`).
          where: the place of the template, for messages.
          tools: the template for conversations with tools. None: the same.
          day: the date that `strftime_now` tells, as 2026-12-03. None: today.
        """
        self._tools = tools
        self.text, self.where = text, where
        self._settings = {"template": text, "variables": dict(variables), "day": day}
        self._lock = threading.Lock()
        self._process: _Process | None = None
        self._marks = False

    def prompt(
        self, messages: Sequence[Message], tools: Sequence[Any] | None = None, where: str = ""
    ) -> str:
        """Return the text of a conversation, up to where the model's answer begins.

        Args:
          messages: the messages, of which the last one is not the model's.
          tools: the functions that the model may call.
          where: the place of the conversation, for messages.

        Raises:
          DataError: the template refuses the conversation, or takes too long.
        """
        if tools and self._tools is not None:
            return self._tools.prompt(messages, tools, where)
        ((text, _),) = self._ask(messages, tools, [(len(messages), True)], where)
        return text

    def example(
        self,
        messages: Sequence[Message],
        tools: Sequence[Any] | None,
        answers: Sequence[int],
        where: str = "",
    ) -> Rendered:
        """Return a conversation for training.

        Args:
          messages: the messages.
          tools: the functions that the model may call.
          answers: the numbers of the messages to learn, ascending.
          where: the place of the conversation, for messages.

        Raises:
          DataError: as `prompt`; or the text up to an answer is not what the whole text begins
            with, so that it cannot be told which part is the answer.
        """
        if tools and self._tools is not None:
            return self._tools.example(messages, tools, answers, where)
        with self._lock:
            marks = self._running(where) and self._marks
        whole = (len(messages), False)
        if marks:
            every = [i for i, m in enumerate(messages) if m.get("role") == "assistant"]
            ((text, spans),) = self._ask(messages, tools, [whole], where)
            if len(spans) == len(every):
                spans = [span for i, span in zip(every, spans, strict=True) if i in answers]
            elif list(answers) != every:
                raise DataError(
                    f"{where}: {self.where} marks {len(spans)} answers of {len(every)}, so it "
                    "cannot be told which ones to learn; learn all (data.train_on assistant)"
                )
            return Rendered(text, tuple(map(tuple, spans)))  # type: ignore[arg-type]
        cuts = [cut for i in answers for cut in ((i, True), (i + 1, False))]
        *parts, (text, _) = self._ask(messages, tools, [*cuts, whole], where)
        prefixes = tuple(part for part, _ in parts)
        for number, prefix in enumerate(prefixes):
            if not text.startswith(prefix):
                answer = answers[number // 2]
                raise DataError(
                    f"{where}: the text up to the {'end' if number % 2 else 'start'} of message "
                    f"{answer + 1} is not what the whole conversation begins with, by {self.where}"
                    f".\n  got: ...{shown(text[_common(text, prefix) - 20 :][:60])}\n"
                    f"  expected: ...{shown(prefix[_common(text, prefix) - 20 :][:60])}\n"
                    "Learn the last answer alone (data.train_on last), or give a template that "
                    "marks the answers with {% generation %} (data.template)."
                )
        pairs = zip(prefixes[::2], prefixes[1::2], strict=True)
        return Rendered(text, tuple((len(a), len(b)) for a, b in pairs), prefixes)

    def _ask(
        self,
        messages: Sequence[Message],
        tools: Sequence[Any] | None,
        cuts: Sequence[tuple[int, bool]],
        where: str,
    ) -> list[tuple[str, list[Span]]]:
        asked = {"messages": list(messages), "tools": tools or None, "cuts": cuts}
        with self._lock:
            process = self._running(where)
            found = process.ask(asked)
            if "error" in found:
                if process.ended:
                    self._process = None
                calls = bool(tools) or any("tool_calls" in message for message in messages)
                deaf = calls and "tool" not in self.text
                raise DataError(
                    f"{where or self.where}: {self.where} fails: {found['error']}"
                    + ("\nIt does not know tools; name one that does (data.template)." * deaf)
                )
        return [(text, spans) for text, spans in found["rendered"]]

    def _running(self, where: str) -> _Process:
        """Return the process, started if necessary; the caller holds the lock."""
        if self._process is None:
            process = _Process()
            found = process.ask(self._settings)
            if "error" in found:
                process.end()
                raise DataError(f"{self.where} is not a template: {found['error']}")
            self._process, self._marks = process, found["generation"]
        return self._process


def _common(text: str, other: str) -> int:
    """Return the length of the common beginning, at least 20."""
    pairs = enumerate(zip(text, other, strict=False))
    return max(20, next((i for i, (a, b) in pairs if a != b), 0))


class _Process:
    """The process that renders, and lines of JSON to and from it."""

    def __init__(self) -> None:
        self._child = subprocess.Popen(
            [sys.executable, "-I", "-S", str(_SCRIPT), *_packages()],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={},
        )
        self._rest = b""
        self.ended = False
        self.end = weakref.finalize(self, _end, self._child)

    def ask(self, value: Any) -> dict[str, Any]:
        """Send a value and return the answer; {"error": text} if none comes in time."""
        assert self._child.stdin is not None
        until = time.monotonic() + SECONDS
        try:
            self._child.stdin.write(json.dumps(value).encode() + b"\n")
            self._child.stdin.flush()
            line = self._line(until)
        except BrokenPipeError:
            line = b""
        if line is None:
            return self._failed(f"it has not come to an end in {SECONDS:.0f} seconds")
        if not line:
            return self._failed("its process has ended, probably for want of memory")
        found: dict[str, Any] = json.loads(line)
        return found

    def _line(self, until: float) -> bytes | None:
        """Return the next line; None if it is late, b"" if there will be none."""
        assert self._child.stdout is not None
        pieces = [self._rest]
        while b"\n" not in pieces[-1]:
            left = until - time.monotonic()
            if left <= 0 or not select.select([self._child.stdout], [], [], left)[0]:
                return None
            piece = os.read(self._child.stdout.fileno(), 2**20)
            if not piece:
                return b""
            pieces.append(piece)
        line, _, self._rest = b"".join(pieces).partition(b"\n")
        return line

    def _failed(self, message: str) -> dict[str, Any]:
        self.ended = True
        self.end()
        return {"error": message}


def _packages() -> list[str]:
    """Return the folders of the two packages that the process needs."""
    require("train", "a chat template", "jinja2")
    found = [importlib.util.find_spec(name) for name in ("jinja2", "markupsafe")]
    return [str(pathlib.Path(spec.origin or "").parents[1]) for spec in found if spec is not None]


def _end(child: subprocess.Popen[bytes]) -> None:
    child.kill()
    child.wait()
    for stream in (child.stdin, child.stdout):
        if stream is not None:
            stream.close()


def end_of_turn(template: ChatTemplate, tokens: Sequence[str]) -> str | None:
    """Return the one of the added `tokens` that ends an answer, at which generation stops.

    >>> text = "{% for m in messages %}<{{ m.role }}>{{ m.content }}<end>{% endfor %}"
    >>> end_of_turn(ChatTemplate(text, {}, "here"), ["<user>", "<end>"])
    '<end>'
    """
    asked = {"role": "user", "content": "question"}, {"role": "assistant", "content": "answer"}
    try:
        whole = template.example(asked, None, [], "a probe").text
    except DataError:  # it is told again, with its place, for the conversation that is asked for
        return None
    rest = whole[whole.rfind("answer") + len("answer") :].strip()
    return max((t for t in tokens if t and rest.startswith(t)), key=len, default=None)
