"""The errors of finding, reading and checking a model; a user can correct the cause of each."""

from pathlib import Path

_SHOWN = 200  # characters of a file's own text in a message: a name may have millions


class ModelError(ValueError):
    """A model that cannot be used; the message says why, and the cure."""


class ModelConfigError(ModelError):
    """A `config.json`, or GGUF metadata, that describes no model that is supported here."""


class WeightsError(ModelError):
    """Stored tensors that are damaged, or are not those of the model; the message names them."""


class TokenizerError(ModelError):
    """A tokenizer that cannot be read out of a file."""


class ModelReferenceError(ModelError):
    """A reference to a model that cannot be read; the message shows the forms there are."""


class PackageError(ModelError):
    """A file of a published package could not be found, fetched or trusted."""


def damaged(path: Path, what: str) -> WeightsError:
    """The error for a file of weights that contradicts itself."""
    return WeightsError(
        f"{path} is damaged, or is not what its name says: {what}\n"
        "Fetch the file again, from someone you trust."
    )


def is_failure(error: BaseException) -> bool:
    """Whether an error says that something went wrong: not Ctrl-C, nor an exit.

    A crash within a library in Rust (tokenizers) is not an `Exception` either, and its type has no
    public name.
    """
    return isinstance(error, Exception) or type(error).__name__ == "PanicException"


def shown(value: object) -> str:
    """A value out of a file, cut to what a message can hold."""
    text = str(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}... ({len(text)} characters)"
