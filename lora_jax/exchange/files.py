"""Files of every format: errors that name them, and writes that leave no partial files."""

from __future__ import annotations

import contextlib
import errno
import glob
import os
import pathlib
import secrets
import shutil
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
    """Write several files so that either all of them appear or none (see `whole_folder`).

    Args:
      folder: the folder to write to; it is created if it does not exist.
      writers: `{file name: function that writes the file to a given path}`. The last one is moved
        last.

    Raises:
      LoraError: the folder cannot be written.
    """
    with whole_folder(folder, last=list(writers)[-1]) as aside:
        for name, write in writers.items():
            write(aside / name)


@contextlib.contextmanager
def whole_folder(folder: pathlib.Path, last: str = "") -> Iterator[pathlib.Path]:
    """Yield a temporary folder that becomes `folder` when the block ends without an error.

    If `folder` does not exist or is empty, the temporary folder is renamed to it: even if the
    process is killed, `folder` is complete or unchanged. If it already holds files, is a mount
    point or is in a folder that cannot be written, the files are moved into it one by one.
    Temporary folders that a killed process left, `.writing-*`, are deleted by the next call.

    Args:
      folder: the folder to write to; it is created if it does not exist.
      last: the name of the file that is moved last, if they are moved one by one.

    Raises:
      LoraError: the folder cannot be written, or another process wrote to it at the same time.
    """
    folder = pathlib.Path(os.path.realpath(folder))
    with writing(folder):
        aside = _make_aside(folder)
        lock = _locked(aside)
        try:
            yield aside
            if aside.parent == folder:
                for path in sorted(aside.iterdir(), key=lambda path: path.name == last):
                    os.replace(path, folder / path.name)
            else:
                _rename(aside, folder)
        finally:
            shutil.rmtree(aside, ignore_errors=True)
            if lock is not None:
                os.close(lock)


def _make_aside(folder: pathlib.Path) -> pathlib.Path:
    """Create the temporary folder: next to `folder` if possible, otherwise inside it."""
    name = f".writing-{folder.name}-"
    folder.parent.mkdir(parents=True, exist_ok=True)
    taken = folder.is_dir() and (os.path.ismount(folder) or any(folder.iterdir()))
    for parent in (folder,) if taken else (folder.parent, folder):
        for path in parent.glob(f"{glob.escape(name)}*"):
            _delete_abandoned(path)
        aside = parent / f"{name}{secrets.token_hex(4)}"
        try:
            aside.mkdir()
        except OSError:
            if parent == folder or not folder.is_dir():
                raise
        else:
            return aside
    raise AssertionError("the last place either has it or raises")


def _rename(aside: pathlib.Path, folder: pathlib.Path) -> None:
    try:
        os.replace(aside, folder)  # also onto an empty folder
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
        raise LoraError(
            f"{folder} was written by another process at the same time, whose files were kept; "
            "choose another folder"
        ) from error


def _locked(folder: pathlib.Path) -> int | None:
    """Lock a folder until this process ends, and return the open file; None: it cannot be."""
    try:
        import fcntl

        file = os.open(folder, os.O_RDONLY)
    except (ImportError, OSError):  # Windows has neither
        return None
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(file)
        return None
    return file


def _delete_abandoned(folder: pathlib.Path) -> None:
    """Delete a folder unless a process holds its lock or it cannot be locked."""
    lock = _locked(folder)
    if lock is not None:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(lock)
