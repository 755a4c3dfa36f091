"""Files of every format: errors that name them, and writes that leave no half behind."""

from __future__ import annotations

import contextlib
import os
import pathlib
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping

from lora_jax.errors import LoraError, writing

FileWriter = Callable[[pathlib.Path], object]
"""Writes one file to the path that it is given."""


@contextlib.contextmanager
def naming(file: pathlib.Path) -> Iterator[None]:
    """Put the file's name before the message of an error."""
    try:
        yield
    except LoraError as error:
        raise LoraError(f"{file}: {error}") from error


def write_together(folder: pathlib.Path, writers: Mapping[str, FileWriter]) -> None:
    """Write files to a folder of their own first, so that no half of an adapter is left.

    Args:
      folder: where they are put; it is made if need be.
      writers: by the name of the file: a function that writes it to the path it is given. The
        last one is put in its place last.

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
