"""A conversation with one adapter, line by line: `lora-jax generate --chat`."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

from rich.text import Text

from lora_jax.errors import LoraError
from lora_jax.serving.sampling import Sampling
from lora_jax.serving.server import Server
from lora_jax.system.console import Console, printable, say

AGAIN = "/new"


def converse(
    server: Server, most: int, sampling: Sampling, console: Console, aside: Console
) -> None:
    """Answer each line of stdin, with the whole conversation before it, until stdin ends.

    A message that cannot be answered is forgotten, and the conversation goes on.
    """
    messages: list[dict[str, Any]] = []
    for line in _lines(console):
        if line == AGAIN:
            messages = []
            continue
        asked = [*messages, {"role": "user", "content": line}]
        answer = ""
        try:
            with server.stream(asked, max_new_tokens=most, sampling=sampling) as pieces:
                for piece in pieces:
                    answer += piece
                    console.print(Text(printable(piece)), end="", soft_wrap=True)
        except LoraError as error:
            say(aside, f"{error}\n{AGAIN} begins another conversation.")
            continue
        console.print()
        messages = [*asked, {"role": "assistant", "content": answer}]


def _lines(console: Console) -> Iterator[str]:
    """Yield the lines of stdin that are not empty, after a prompt on a terminal."""
    while True:
        if sys.stdin.isatty():
            console.print("> ", end="")
        line = sys.stdin.readline()
        if not line:
            return
        if line.strip():
            yield line.rstrip("\n")
