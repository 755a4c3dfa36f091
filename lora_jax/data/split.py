"""The split that a text belongs to: a function of its normalised text and of nothing else."""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections.abc import Iterable, Mapping
from typing import Any

KeyedRow = tuple[Any, dict[str, str]]  # a key that no other row has, fields

_SIGNS = re.compile(r"[\W_]+")


def normalise(text: str) -> str:
    """Return what is left of a text without case, white space, punctuation and accents.

    A text of nothing else is left as it is.

    >>> normalise("  A well-made  Film!") == normalise("a well made film")
    True
    """
    plain = unicodedata.normalize("NFKD", text)
    plain = "".join(c for c in plain if not unicodedata.combining(c))
    return _SIGNS.sub("", plain.casefold()) or text


def split_of(text: str, shares: Mapping[str, float]) -> str:
    """Return the split of `text`, drawn with probabilities `shares` by a hash of its `normalise`.

    It is the same on every machine and for ever; texts that `normalise` alike share a split.

    >>> split_of("Obvious.", {"train": 1.0})
    'train'
    """
    digest = hashlib.sha256(normalise(text).encode()).digest()
    position = int.from_bytes(digest[:8], "big") / 2**64
    reached = 0.0
    for name, share in shares.items():
        reached += share
        if position < reached:
            return name
    return name  # rounding: the shares add up to a hair below 1


def dealt(
    rows: Iterable[KeyedRow], shares: Mapping[str, float], field: str
) -> dict[str, list[KeyedRow]]:
    """Return the rows of each split, which `split_of` draws by a field of theirs."""
    splits: dict[str, list[KeyedRow]] = {name: [] for name in shares}
    for key, row in rows:
        splits[split_of(row[field], shares)].append((key, row))
    return splits
