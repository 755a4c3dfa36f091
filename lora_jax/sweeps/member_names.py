"""Readable names of a sweep's members, such as `rank=4,learning_rate=1e-3`; they name folders."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

_KEPT = 40  # at most this many characters of a text are kept


def names(points: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return a unique name for each point (path -> value).

    >>> names([{"lora.rank": 4, "seed": 0}, {"lora.rank": 4, "seed": 1}])
    ['rank=4,seed=0', 'rank=4,seed=1']
    """
    paths = list(dict.fromkeys(path for point in points for path in point))
    short = {path: shortest(path, paths) for path in paths}
    found = [
        ",".join(f"{short[path]}={label(value)}" for path, value in point.items()) or "base"
        for point in points
    ]
    seen, times = Counter[str](), Counter(found)
    for i, name in enumerate(found):
        if times[name] > 1:  # the values differ only after the characters that are kept
            seen[name] += 1
            found[i] = f"{name}#{seen[name]}"
    return found


def shortest(path: str, paths: Sequence[str], between: str = ".") -> str:
    """Return the last segments of a path, as many as no other path ends with.

    >>> shortest("lora.rank", ["lora.rank", "seed"]), shortest("a/x", ["a/x", "b/x"], "/")
    ('rank', 'a/x')
    """
    parts = path.split(between)
    ends = [between.join(parts[i:]) for i in range(len(parts) - 1, -1, -1)]
    others = [f"{between}{other}" for other in paths if other != path]
    free = (e for e in ends if not any(other.endswith(f"{between}{e}") for other in others))
    return next(free, path)


def label(value: Any) -> str:
    """Return a value as part of a name; different numbers have different labels.

    >>> label(1e-3), label(0.5), label(16.0), label(None), label(("a/{query,value}/kernel",))
    ('1e-3', '0.5', '16', 'None', 'query+value')
    """
    if isinstance(value, float):
        return number(value)
    if isinstance(value, tuple):
        return "+".join(map(label, value)) or "none"
    return _plain(value) if isinstance(value, str) else str(value)


def number(value: float) -> str:
    """Return the shorter of the plain and the scientific form, which reads as the same number.

    >>> [number(x) for x in (2e-3, 0.25, 100.0, 1e-5, 1e6, 1.5e-5)]
    ['2e-3', '0.25', '100', '1e-5', '1e6', '1.5e-5']
    """
    plain = repr(value).removesuffix(".0")
    short = np.format_float_scientific(value, trim="-", exp_digits=1).replace("e+", "e")
    return plain if len(plain) <= len(short) and "e" not in plain else short


def _plain(text: str) -> str:
    """Return a text, or for a parameter pattern its last segment that is a name."""
    pattern, at, settings = text.partition("@")
    segments = [s for s in pattern.split("/") if s.strip("*") and s != "kernel"] or [pattern]
    about = segments[-1] if "/" in pattern else pattern
    kept = re.sub(r"[^\w.+-]+", "-", about.replace(",", "+").strip("{}*")).strip("-")
    return (kept[:_KEPT] or "any") + at + settings.replace(",", "@").replace("=", "")
