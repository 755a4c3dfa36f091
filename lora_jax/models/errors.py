"""The errors of finding, reading and checking a model; a user can correct the cause of each."""

from pathlib import Path

_SHOWN = 200  # characters of a file's own text in a message, because a name may have millions


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


def damaged(path: Path, what: str) -> WeightsError:
    """Return the error for a file of weights that contradicts itself.

    Args:
      path: the file.
      what: the contradiction.
    """
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
