"""Write texts while they are generated: to a terminal, as plain lines, or as JSONL.

Finished texts are written in the order of their prompts. On a terminal a single text grows token by
token; if there are several, the unfinished ones grow below the finished ones.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Self

from rich.console import Group
from rich.live import Live
from rich.text import Text
from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

from lora_jax.cli.adapter_options import FileBar
from lora_jax.serving.generation import Piece
from lora_jax.serving.jsonl import Writer, in_order
from lora_jax.serving.prompts import FIELD, Request
from lora_jax.system.console import Console, printable


class Sink:
    """A context manager that receives texts and drops them; subclasses show or write them."""

    def grow(self, number: int, text: str) -> None:
        """Receive the next part of the text of prompt `number`."""

    def finish(self, number: int, answer: Mapping[str, Any]) -> None:
        """Receive the finished text of prompt `number`; those before it are finished as well."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        pass


def transcribe(
    pieces: Iterable[Piece], requests: Sequence[Request], tokenizer: Tokenizer, sink: Sink
) -> None:
    """Decode the tokens of all texts, and pass the text to `sink` as it comes."""

    def finished() -> Iterator[tuple[int, dict[str, Any]]]:
        for number, request in enumerate(requests):
            if request.error:
                yield number, {"error": request.error}
        # The text of a token may depend on the token before it (a space at the start of a word).
        going: dict[int, tuple[DecodeStream, dict[str, Any]]] = {}
        for row, token, finish in pieces:
            if row not in going:
                read = list(requests[row].prompt.tokens)
                stream = DecodeStream(ids=read, skip_special_tokens=True)
                going[row] = stream, {"text": "", "tokens": 0}
            stream, answer = going[row]
            if token is not None:
                more = stream.step(tokenizer, token) or ""
                answer["text"] += more
                answer["tokens"] += 1
                sink.grow(row, more)
            if finish is not None:
                del going[row]
                yield row, {**answer, "finish": finish}

    for number, answer in enumerate(in_order(finished())):
        sink.finish(number, answer)


class TypedSink(Sink):
    """Shows one text on a terminal while it grows."""

    def __init__(self, console: Console, request: Request) -> None:
        """Make a sink for one request."""
        self._console, self._request = console, request

    def __enter__(self) -> Self:
        self._say(Text(printable(self._request.text), style="dim"))
        return self

    def grow(self, number: int, text: str) -> None:
        """See `Sink`."""
        self._say(Text(printable(text)))

    def __exit__(self, *error: object) -> None:
        self._say(Text("\n"))

    def _say(self, text: Text) -> None:
        self._console.print(text, end="", soft_wrap=True)


class BlockSink(Sink):
    """Shows several texts as blocks, each after the name of its adapter if there are several."""

    def __init__(self, console: Console, requests: Sequence[Request]) -> None:
        """Make a sink for several requests; unfinished texts are shown on a terminal only."""
        self._console, self._requests = console, requests
        self._named = len({request.name for request in requests}) > 1
        self._growing: dict[int, str] = {}
        self._last = -1  # the number of the text that grew last
        self._live = Live(console=console, transient=True, auto_refresh=False)

    def __enter__(self) -> Self:
        self._live.start()  # shows nothing unless stdout is a terminal
        return self

    def grow(self, number: int, text: str) -> None:
        """See `Sink`."""
        if self._console.is_terminal:
            self._growing[number] = self._growing.get(number, "") + text
            # Refresh once for each step, at its first row.
            self._live.update(self._unfinished(), refresh=number <= self._last)
            self._last = number

    def finish(self, number: int, answer: Mapping[str, Any]) -> None:
        """See `Sink`."""
        self._growing.pop(number, None)
        request = self._requests[number]
        if request.error:
            return
        label = f"[{printable(request.name)}] " if self._named else ""
        if self._console.is_terminal:
            self._live.update(self._unfinished())
            parts = ((label, "bold"), (printable(request.text), "dim"), printable(answer["text"]))
            self._console.print(Text.assemble(*parts), soft_wrap=True)
        else:
            self._console.file.write(f"{label}{request.text}{answer['text']}\n")
            self._console.file.flush()

    def __exit__(self, *error: object) -> None:
        self._live.update(Group(), refresh=True)
        self._live.stop()

    def _unfinished(self) -> Group:
        """Return a line for each unfinished text, with as much of its end as fits."""
        shown = []
        for number, text in sorted(self._growing.items())[: max(1, self._console.height - 2)]:
            request = self._requests[number]
            label = f"[{printable(request.name)}] " if self._named else ""
            room = max(8, self._console.width - len(label) - 1)
            line = " ".join(printable(request.text + text).split())
            line = line if len(line) <= room else f"…{line[1 - room :]}"
            shown.append(Text.assemble((label, "bold"), (line, "dim"), no_wrap=True))
        return Group(*shown)


class JsonlSink(Sink):
    """Writes JSONL, and shows a progress bar."""

    def __init__(self, writer: Writer, bar: FileBar, requests: Sequence[Request]) -> None:
        """Make a sink that writes to an open file."""
        self._writer, self._bar, self._requests = writer, bar, requests

    def __enter__(self) -> Self:
        self._writer.__enter__()
        self._bar.__enter__()
        return self

    def finish(self, number: int, answer: Mapping[str, Any]) -> None:
        """See `Sink`."""
        request = self._requests[number]
        own = {} if request.error else {FIELD: request.text, "adapter": request.name}
        self._writer.write([{**request.fields, **own, **answer}])
        self._bar.advance(request.size)

    def __exit__(self, *error: object) -> None:
        self._bar.__exit__(*error)
        self._writer.__exit__(*error)
