"""Show examples as a decoder learns them: their text with what is learned, and their lengths."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
from rich.text import Text

from lora_jax.data.catalogue import open_data
from lora_jax.data.config import DataConfig
from lora_jax.data.example_reader import Reader, Words, form_of
from lora_jax.data.forms import answers
from lora_jax.models.text.example import place_of
from lora_jax.models.text.tokens import TextTruncation, TokenRow
from lora_jax.system import table
from lora_jax.system.console import Console, say

_LEARNED, _READ = "bold green", "dim"
_MOST = 2_000  # examples whose lengths are counted
_BARS, _WIDTH = 8, 40


def show(data: DataConfig, words: Words, count: int, console: Console) -> None:
    """Print the first `count` examples of the training split, and a histogram of lengths."""
    source = open_data(data, set_apart=True)
    rows = source.examples(data.train_split)
    some = rows[: min(_MOST, len(rows))]
    where = f"{source.name}, split {data.train_split!r}"
    form = form_of(data, some[0], where)
    counts = TextTruncation()
    reader = Reader(data, words, form, where)
    said = [(one, row) for row in some for one in answers(form.of(row, where))]
    texts, places = zip(*((one, place_of(row, where)) for one, row in said), strict=True)
    read = [reader.within(row, counts) for row in reader.whole(texts, places, counts)]
    coloured = console.color_system is not None and console.is_terminal
    how = "learned is green" if coloured else "learned is in [[ ]]"
    say(console, f"{where}: {len(rows):,} examples of the form {form.name!r}; {how}\n")
    for number, row in enumerate(read[:count], 1):
        say(console, f"-- example {number}: {len(row[0])} tokens, {int(row[1].sum())} learned")
        console.print(_text(words, row, coloured), soft_wrap=True)
        say(console, "")
    say(console, "\n".join(_histogram([len(ids) for ids, _ in read if len(ids)])))
    lost = counts.remarks(len(some))
    if counts.examples:
        lost.append(f"max_length {data.max_length} cuts {counts.examples:,} examples")
    if counts.dropped:
        lost.append(f"{counts.dropped:,} examples have nothing to learn and are left out")
    say(console, "\n".join([*lost, *source.notes]))


def _text(words: Words, row: TokenRow, coloured: bool) -> Text:
    ids, marks = row
    edges = np.flatnonzero(np.diff(marks, prepend=2, append=2))
    found = Text()
    for start, end in itertools.pairwise(edges):
        text = words.tokenizer.decode(ids[start:end].tolist(), skip_special_tokens=False)
        learned = bool(marks[start])
        plain = text if coloured or not learned else f"[[{text}]]"
        found.append(plain, _LEARNED if learned else _READ)
    return found


def _histogram(lengths: Sequence[int]) -> list[str]:
    """Return lines with the number of examples by length in tokens."""
    if not lengths:
        return ["no example has anything to learn"]
    counts, edges = np.histogram(lengths, min(_BARS, len(set(lengths))))
    most = max(1, counts.max())
    rows = [
        (f"{int(np.ceil(low))} to {int(high)}", f"{count:,}", "#" * round(_WIDTH * count / most))
        for low, high, count in zip(edges, edges[1:], counts.tolist(), strict=False)
    ]
    return table.aligned([("tokens", "examples", ""), *rows], texts=(0, 2))
