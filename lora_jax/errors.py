"""The error type that users meet, and the search for the name that they probably meant."""

from __future__ import annotations

import contextlib
import difflib
import itertools
from collections.abc import Iterable, Iterator

# Comparing takes the product of the lengths: a stranger's file may have a million long names.
_CHARACTERS, _MOST = 200, 5_000


class LoraError(ValueError):
    """Input that LoRA cannot be applied to; the message names the place and the cure."""


@contextlib.contextmanager
def writing(path: object) -> Iterator[None]:
    """Turn a system error of the block into a `LoraError` that names the file it writes.

    The system's error for a full disk names no file.

    Args:
      path: the file that the block writes.

    Raises:
      LoraError: the file cannot be written.
    """
    try:
        yield
    except BrokenPipeError:  # the reader has closed the pipe, which is not a failure
        raise
    except OSError as error:
        raise LoraError(
            f"{path} cannot be written: {error.strerror or error}. Make room, or make the folder "
            "writable, and start the same command again"
        ) from error


def nearest(name: str, candidates: Iterable[str], n: int = 3) -> list[str]:
    """Return the candidates that are closest to a name, best first.

    Args:
      name: the name that was not found.
      candidates: the names that exist.
      n: the number of candidates to return.

    Returns:
      At most `n` of the candidates.

    >>> nearest("encoder/quary/kernel", ["encoder/query/kernel", "head/bias"], n=1)
    ['encoder/query/kernel']
    """
    known = {
        candidate[:_CHARACTERS]: candidate for candidate in itertools.islice(candidates, _MOST)
    }
    found = difflib.get_close_matches(name[:_CHARACTERS], list(known), n=n, cutoff=0.0)
    return [known[one] for one in found]


def listed(items: Iterable[str], limit: int = 5) -> str:
    """Return items as an indented list for a message.

    Args:
      items: one line each.
      limit: the number of items to show; a last line counts the others.

    Returns:
      The lines, joined.

    >>> print(listed("abc", limit=2))
      a
      b
      ... and 1 more
    """
    items = list(items)
    lines = [f"  {item}" for item in items[:limit]]
    if len(items) > limit:
        lines.append(f"  ... and {len(items) - limit} more")
    return "\n".join(lines)
