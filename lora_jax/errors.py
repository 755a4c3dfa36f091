"""The one error type users meet, and the search for what they probably meant."""

from __future__ import annotations

import contextlib
import difflib
from collections.abc import Iterable, Iterator


class LoraError(ValueError):
    """Input that LoRA cannot be applied to; the message names the place and the cure."""


@contextlib.contextmanager
def writing(path: object) -> Iterator[None]:
    """Turn an error of the system into a `LoraError` that names `path`, which the block writes.

    The system's error of a full disk names no file.
    """
    try:
        yield
    except BrokenPipeError:  # whoever reads wants no more: no error
        raise
    except OSError as error:
        raise LoraError(
            f"{path} cannot be written: {error.strerror or error}. Make room, or make the folder "
            "writable, and start the same command again"
        ) from error


def nearest(name: str, candidates: Iterable[str], n: int = 3) -> list[str]:
    """The `n` candidates closest to `name`, best first.

    >>> nearest("encoder/quary/kernel", ["encoder/query/kernel", "head/bias"], n=1)
    ['encoder/query/kernel']
    """
    return difflib.get_close_matches(name, list(candidates), n=n, cutoff=0.0)


def listed(items: Iterable[str], limit: int = 5) -> str:
    """Items as an indented list, cut after `limit` with the number left out."""
    items = list(items)
    lines = [f"  {item}" for item in items[:limit]]
    if len(items) > limit:
        lines.append(f"  ... and {len(items) - limit} more")
    return "\n".join(lines)
