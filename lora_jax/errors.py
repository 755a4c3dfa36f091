"""The errors that users meet, and the search for the name that they probably meant."""

from __future__ import annotations

import contextlib
import difflib
import errno
import itertools
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

# Comparing takes the product of the lengths: a stranger's file may have a million long names.
_CHARACTERS, _MOST = 200, 5_000
_NEAR = 0.6  # the least likeness of two segments of paths, from 0 to 1
_SHOWN = 200  # characters of a file's own text in a message, because a name may have millions


class LoraError(ValueError):
    """Input that LoRA cannot be applied to; the message names the place and the cure."""


class DataError(LoraError):
    """The data, or its config, cannot be used; the message says where and why."""


class DamagedError(LoraError):
    """The stored data differ from the saved data; the message names the array or the file."""


class ModelError(ValueError):
    """A model cannot be used; the message gives the reason and the cure."""


class ModelConfigError(ModelError):
    """A `config.json`, or GGUF metadata, does not describe a model that is supported here."""


class WeightsError(ModelError):
    """Stored tensors are damaged, or do not fit the model; the message names them."""


class TokenizerError(ModelError):
    """A tokenizer cannot be read from a file."""


class ModelReferenceError(ModelError):
    """A reference to a model cannot be read; the message shows the valid forms."""


class PackageError(ModelError):
    """A file of a published package cannot be found, downloaded or trusted."""


@contextlib.contextmanager
def writing(path: object) -> Iterator[None]:
    """Turn a system error of the block into a `LoraError` that names the file it writes.

    The system's error for a full disk names no file.
    """
    try:
        yield
    except BrokenPipeError:  # the reader has closed the pipe, which is not a failure
        raise
    except OSError as error:
        part = f": {error.filename}" if str(error.filename or path) != str(path) else ""
        said = f"{error.strerror or error}{part}"
        raise LoraError(f"{path} cannot be written: {said}. {cure(error)}") from error


@contextlib.contextmanager
def naming(file: object) -> Iterator[None]:
    """Put the file that the block reads in front of the message of a `LoraError`."""
    try:
        yield
    except LoraError as error:
        raise LoraError(f"{file}: {error}") from error


_WRITABLE = "Make the folder writable, or name another one"
_AWAY = "The disk or the network file system went away: see that it is back"
_UNABLE = "That file system cannot do this: name a folder on another one"
_TAKEN = "Something else has that name: give another one"
_CURES = {
    errno.ENOSPC: "Make room on that disk",
    errno.EDQUOT: "Your quota of that disk is used up (`quota -s`): delete files of yours",
    **dict.fromkeys((errno.EROFS, errno.EACCES, errno.EPERM), _WRITABLE),
    **dict.fromkeys((errno.ESTALE, errno.EIO, errno.ETIMEDOUT, errno.ENOTCONN), _AWAY),
    **dict.fromkeys((errno.EMFILE, errno.ENFILE), "Allow more open files (`ulimit -n`)"),
    **dict.fromkeys((errno.EBUSY, errno.ETXTBSY), "Another process has it open: end that one"),
    errno.EFBIG: "Allow larger files (`ulimit -f`)",
    errno.ENOLCK: "That file system has no locks: name a folder on another one",
    errno.ENOENT: "See that its spelling is right; for a file to write, make the folder first",
    errno.ENOTDIR: "See the path again: a part of the path is a file, not a folder",
    errno.EISDIR: "That is a folder: name a file",
    errno.ENAMETOOLONG: "Give it a shorter name",
    errno.ELOOP: "The symbolic links on that path lead in a circle: name another one",
    **dict.fromkeys((errno.EEXIST, errno.ENOTEMPTY), _TAKEN),
    errno.ENOMEM: "There is not enough memory: end other programs",
    **dict.fromkeys((errno.ENXIO, errno.ENODEV), "That is a pipe or a device: name a file"),
    **dict.fromkeys((errno.EXDEV, errno.EMLINK, errno.ENOSYS, errno.EOPNOTSUPP), _UNABLE),
    errno.EINVAL: "Give another path: the file system refuses this one, or its name",
}


def errno_of(error: BaseException) -> int | None:
    """Return the number of the system's error that this is or tells of, if it is a known one.

    Libraries in C++ raise other errors whose text holds the system's words.

    >>> errno_of(ValueError("writing 'x': No space left on device")) == errno.ENOSPC
    True
    """
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno
    return next((number for number in _CURES if os.strerror(number) in str(error)), None)


def cure(error: BaseException) -> str:
    """Return what to do about an error of the system, as a sentence without its full stop."""
    known = _CURES.get(errno_of(error) or 0, "Mend what the system names, or give another path")
    return f"{known}, and start the same command again"


def told(error: BaseException) -> str:
    """Return the text of an error for a user; one of the system gets its cure."""
    if not isinstance(error, OSError) or error.errno is None:
        return str(error)
    return f"{error.filename or 'the system says'}: {error.strerror}. {cure(error)}"


def nearest(name: str, candidates: Iterable[str], n: int = 3) -> list[str]:
    """Return the `n` candidates that are closest to a name, best first.

    >>> nearest("encoder/quary/kernel", ["encoder/query/kernel", "head/bias"], n=1)
    ['encoder/query/kernel']
    """
    known = {
        candidate[:_CHARACTERS]: candidate for candidate in itertools.islice(candidates, _MOST)
    }
    found = difflib.get_close_matches(name[:_CHARACTERS], list(known), n=n, cutoff=0.0)
    return [known[one] for one in found]


def near_paths(pattern: str, known: Iterable[str]) -> str:
    """Return "; the nearest paths are:" and three paths that resemble a pattern, "" if none does.

    A path does if most of the pattern's segments are like some of its own. Among equals the first
    of `known` come first.

    >>> near_paths("**/quary", ["layer/query/kernel", "head/kernel"]).split()[-1]
    'layer/query/kernel'
    >>> near_paths("**/lm_head", ["layer/query/kernel"])
    ''
    """
    words = [word[:_CHARACTERS] for word in pattern.split("/") if word.strip("*")]

    def alike(path: str) -> int:
        segments = path[:_CHARACTERS].split("/")
        return sum(bool(difflib.get_close_matches(word, segments, 1, _NEAR)) for word in words)

    likely = [(alike(path), path) for path in itertools.islice(known, _MOST)]
    most = max((count for count, _ in likely), default=0)
    found = [path for count, path in likely if count == most and 2 * count > len(words)]
    return f"; the nearest paths are:\n{listed(found[:3])}" if found else ""


def listed(items: Iterable[str], limit: int = 5) -> str:
    """Return items as an indented list for a message; a last line counts those above the limit.

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


def damaged(path: Path, what: str) -> WeightsError:
    """Return the error for a file of weights that contradicts itself."""
    return WeightsError(
        f"{path} is damaged, or is not what its name says: {what}\n"
        "Fetch the file again, from someone you trust."
    )


def is_failure(error: BaseException) -> bool:
    """Return whether an error means that something went wrong: not Ctrl-C, and not an exit.

    A crash in a Rust library (tokenizers) is not an `Exception`, and its type has no public name.
    """
    return isinstance(error, Exception) or type(error).__name__ == "PanicException"


def shown(value: object) -> str:
    """Return a value from a file as text, cut to the length of a message."""
    text = str(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}... ({len(text)} characters)"
