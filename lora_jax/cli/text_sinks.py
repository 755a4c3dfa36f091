"""Write texts while they are generated: to a terminal, as plain lines, or as JSONL.

Finished texts are written in the order of their prompts. On a terminal a single text grows token by
token; if there are several, the unfinished ones grow below the finished ones.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Self

from rich.console import Group
from rich.live import Live
from rich.text import Text

from lora_jax.cli.adapter_options import FileBar
from lora_jax.serving.jsonl import Writer, in_order
from lora_jax.serving.prompts import FIELD, Request
from lora_jax.serving.texts import TextPiece
from lora_jax.system.console import Console, printable


class Sink(contextlib.ExitStack):
    """A context manager that receives texts and drops them; subclasses show or write them."""

    def grow(self, number: int, text: str) -> None:
        """Receive the next part of the text of prompt `number`."""

    def finish(self, number: int, answer: Mapping[str, Any]) -> None:
        """Receive the finished text of prompt `number`; those before it are finished as well."""


def transcribe(
    texts: Iterable[TextPiece], numbers: Sequence[int], requests: Sequence[Request], sink: Sink
) -> None:
    """Pass the texts to `sink` as they come; row i of them is the request `numbers[i]`."""

    def finished() -> Iterator[tuple[int, dict[str, Any]]]:
        for number, request in enumerate(requests):
            if request.error:
                yield number, {"error": request.error}
        going: dict[int, dict[str, Any]] = {}
        for piece in texts:
            number = numbers[piece.row]
            answer = going.setdefault(number, {"text": "", "tokens": 0})
            if piece.token is not None:
                answer["text"] += piece
                answer["tokens"] += 1
                sink.grow(number, piece)
            if piece.finish is not None:
                yield number, {**going.pop(number), "finish": piece.finish}

    for number, answer in enumerate(in_order(finished())):
        sink.finish(number, answer)


class TypedSink(Sink):
    """Shows one text on a terminal while it grows."""

    def __init__(self, console: Console, request: Request) -> None:
        super().__init__()
        self._console, self._request = console, request

    def __enter__(self) -> Self:
        self._say(Text(printable(self._request.text), style="dim"))
        self.callback(self._say, Text("\n"))
        return self

    def grow(self, number: int, text: str) -> None:
        self._say(Text(printable(text)))

    def _say(self, text: Text) -> None:
        self._console.print(text, end="", soft_wrap=True)


class BlockSink(Sink):
    """Shows several texts as blocks, each after the name of its adapter if there are several.

    Unfinished texts are shown on a terminal only.
    """

    def __init__(self, console: Console, requests: Sequence[Request]) -> None:
        super().__init__()
        self._console, self._requests = console, requests
        several = len({request.name for request in requests if not request.error}) > 1
        self._labels = [f"[{printable(request.name)}] " * several for request in requests]
        self._growing: dict[int, str] = {}
        self._last = -1  # the number of the text that grew last
        self._live = Live(console=console, transient=True, auto_refresh=False)

    def __enter__(self) -> Self:
        self.enter_context(self._live)  # shows nothing unless stdout is a terminal
        self.callback(self._live.update, Group(), refresh=True)
        return self

    def grow(self, number: int, text: str) -> None:
        if self._console.is_terminal:
            self._growing[number] = self._growing.get(number, "") + text
            # Refresh once for each step, at its first row.
            self._live.update(self._unfinished(), refresh=number <= self._last)
            self._last = number

    def finish(self, number: int, answer: Mapping[str, Any]) -> None:
        self._growing.pop(number, None)
        request, label = self._requests[number], self._labels[number]
        if request.error:
            return
        if self._console.is_terminal:
            self._live.update(self._unfinished())
            parts = ((label, "bold"), (printable(request.text), "dim"), printable(answer["text"]))
            self._console.print(Text.assemble(*parts), soft_wrap=True)
        else:
            self._console.file.write(f"{label}{request.text}{answer['text']}\n")
            self._console.file.flush()

    def _unfinished(self) -> Group:
        """Return a line for each unfinished text, with as much of its end as fits."""
        shown = []
        for number, text in sorted(self._growing.items())[: max(1, self._console.height - 2)]:
            label = self._labels[number]
            room = max(8, self._console.width - len(label) - 1)
            line = " ".join(printable(self._requests[number].text + text).split())
            line = line if len(line) <= room else f"…{line[1 - room :]}"
            shown.append(Text.assemble((label, "bold"), (line, "dim"), no_wrap=True))
        return Group(*shown)


class JsonlSink(Sink):
    """Writes JSONL, and shows a progress bar."""

    def __init__(self, writer: Writer, bar: FileBar, requests: Sequence[Request]) -> None:
        super().__init__()
        self._writer, self._bar = self.enter_context(writer), self.enter_context(bar)
        self._requests = requests

    def finish(self, number: int, answer: Mapping[str, Any]) -> None:
        request = self._requests[number]
        own = {} if request.error else {FIELD: request.text, "adapter": request.name}
        self._writer.write([{**request.fields, **own, **answer}])
        self._bar.count(request.size)
