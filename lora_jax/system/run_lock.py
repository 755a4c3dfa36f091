"""The lock of a run directory, which only one command at a time may write."""

from __future__ import annotations

import contextlib
import pathlib
from collections.abc import Iterator

import filelock

from lora_jax.errors import LoraError, writing


@contextlib.contextmanager
def hold(path: pathlib.Path, busy: LoraError) -> Iterator[None]:
    """Make the directory and lock it until the block ends; raise `busy` if another process does.

    The operating system holds the lock and releases it when the process ends, even if it is killed.
    Folders that are made here, and stay without a file, are deleted again.
    """
    lock = filelock.FileLock(path / "lock")
    with writing(path):
        made = [folder for folder in (path, *path.parents) if not folder.exists()]
        path.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(timeout=0)
        except filelock.Timeout:  # an OSError
            raise busy from None
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            if made and [entry.name for entry in path.iterdir()] == ["lock"]:
                (path / "lock").unlink()
                for folder in made:
                    folder.rmdir()
        lock.release()
