"""Write files of conversations and of preferences about words, made from WordNet 3.0.

    python -m experiments.conversations --out words

writes words/conversations.jsonl, in which an assistant says what a word means, uses it in a
sentence and names its part of speech, in one or two exchanges; and words/pairs.jsonl, in which the
right definition is preferred to that of another word. Equal seeds give equal files.
"""

from __future__ import annotations

import dataclasses
import json
import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import tyro
from rich.console import Console

from lora_jax.data import wordnet
from lora_jax.system.console import say
from lora_jax.system.whole_files import write

_MEANING = ("What does {word!r} mean?", "Define {word!r}.", "Tell me the meaning of {word!r}.")
_USE = ("Use it in a sentence.", "Give me an example.", "How would I use it?")
_PART = ("What part of speech is it?", "Which part of speech is that?")


@dataclasses.dataclass(frozen=True)
class Options:
    """The options of the script."""

    out: Path = Path("words")
    """The folder to write to."""
    conversations: int = 4_000
    """The number of conversations."""
    pairs: int = 2_000
    """The number of pairs."""
    seed: int = 0
    """Seed of the choice of words and questions."""


def main(options: Options) -> None:
    """Write the files."""
    random_ = random.Random(options.seed)
    words = sorted({e["word"]: e for e in _entries()}.values(), key=lambda e: e["word"])
    random_.shuffle(words)
    options.out.mkdir(parents=True, exist_ok=True)
    used = words[: options.conversations]
    others = words[options.conversations : options.conversations + options.pairs]
    _write(options.out / "conversations.jsonl", (conversation(e, random_) for e in used))
    _write(options.out / "pairs.jsonl", (pair(e, random_.choice(used), random_) for e in others))


def conversation(entry: dict[str, str], random_: random.Random) -> dict[str, Any]:
    """Return a conversation of one or two exchanges about a word."""
    first = random_.choice(_MEANING).format(word=entry["word"])
    turns = [(first, _sentence(entry["definition"]))]
    more = [
        (random_.choice(_USE), _sentence(entry["example"])),
        (random_.choice(_PART), f"It is {_article(entry['part'])}."),
    ]
    random_.shuffle(more)
    turns += more[: random_.randrange(2)]
    messages = []
    for asked, answer in turns:
        messages.append({"role": "user", "content": asked})
        messages.append({"role": "assistant", "content": answer})
    return {"messages": messages}


def pair(entry: dict[str, str], other: dict[str, str], random_: random.Random) -> dict[str, Any]:
    """Return a question with its right answer, and the answer for another word."""
    asked = random_.choice(_MEANING).format(word=entry["word"])
    return {
        "prompt": [{"role": "user", "content": asked}],
        "chosen": [{"role": "assistant", "content": _sentence(entry["definition"])}],
        "rejected": [{"role": "assistant", "content": _sentence(other["definition"])}],
    }


def _entries() -> Iterator[dict[str, str]]:
    """Yield the single words that WordNet uses in a sentence."""
    for part, path in wordnet.files():
        with path.open(encoding="utf-8") as file:
            for line in file:
                example = re.search(r'; "([^"]+)"', line)
                if line.startswith(" ") or example is None:
                    continue
                _, row = wordnet.parse(line)
                if re.search(rf"\b{re.escape(row['word'])}\b", example.group(1)):
                    yield {**row, "part": part, "example": example.group(1)}


def _sentence(text: str) -> str:
    text = text.strip().rstrip(".;")
    return f"{text[:1].upper()}{text[1:]}."


def _article(noun: str) -> str:
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def _write(path: Path, rows: Iterator[dict[str, Any]]) -> None:
    write(path, "".join(json.dumps(row) + "\n" for row in rows).encode())
    say(Console(), f"written: {path}")


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
