"""Files of every format: errors that name them, and writes that leave no partial files."""

from __future__ import annotations

import contextlib
import os
import pathlib
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping

from lora_jax.errors import LoraError, writing

FileWriter = Callable[[pathlib.Path], object]
"""A function that writes one file to a given path."""


@contextlib.contextmanager
def naming(file: pathlib.Path) -> Iterator[None]:
    """Put the file's name in front of an error's message."""
    try:
        yield
    except LoraError as error:
        raise LoraError(f"{file}: {error}") from error


def write_together(folder: pathlib.Path, writers: Mapping[str, FileWriter]) -> None:
    """Write several files so that either all of them appear or none.

    They are written to a temporary folder first and then moved.

    Args:
      folder: the folder to write to; it is created if it does not exist.
      writers: `{file name: function that writes the file to a given path}`. The last one is moved
        last.

    Raises:
      LoraError: the folder cannot be written.
    """
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        aside = pathlib.Path(tempfile.mkdtemp(dir=folder, prefix=".writing-"))
        try:
            for name, write in writers.items():
                write(aside / name)
            for name in writers:
                os.replace(aside / name, folder / name)
        finally:
            shutil.rmtree(aside, ignore_errors=True)
