"""Assign a text to a split by a function of its normalised text only."""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections.abc import Iterable, Mapping
from typing import Any

KeyedRow = tuple[Any, dict[str, str]]  # a unique key, and the fields

_SIGNS = re.compile(r"[\W_]+")


def normalise(text: str) -> str:
    """Return a text without case, white space, punctuation and accents.

    A text that consists only of these is returned unchanged.

    >>> normalise("  A well-made  Film!") == normalise("a well made film")
    True
    """
    plain = unicodedata.normalize("NFKD", text)
    plain = "".join(c for c in plain if not unicodedata.combining(c))
    return _SIGNS.sub("", plain.casefold()) or text


def split_of(text: str, shares: Mapping[str, float]) -> str:
    """Return the split of a text, drawn with probabilities `shares` by a hash of `normalise(text)`.

    It is the same on every machine and for ever. Texts with equal `normalise` have the same split.

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
    return name  # through rounding the shares may add up to slightly less than 1


def dealt(
    rows: Iterable[KeyedRow], shares: Mapping[str, float], field: str
) -> dict[str, list[KeyedRow]]:
    """Return the rows of each split, which `split_of` assigns by one of their fields."""
    splits: dict[str, list[KeyedRow]] = {name: [] for name in shares}
    for key, row in rows:
        splits[split_of(row[field], shares)].append((key, row))
    return splits
