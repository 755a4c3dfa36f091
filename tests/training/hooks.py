"""Audit hooks for the changes that a process makes to files: one of them kills it, or fails."""

from __future__ import annotations

import contextlib
import errno
import os
import pathlib
import signal
from collections.abc import Iterator
from typing import Any

from lora_jax.system.whole_files import TEMPORARY


class Before:
    """An audit hook that kills its process before a file gets a name that ends in `name`."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __call__(self, event: str, values: tuple[Any, ...]) -> None:
        if event == "os.rename" and os.fspath(values[1]).endswith(self._name):
            os.kill(os.getpid(), signal.SIGKILL)


class Changes:
    """An audit hook that kills its process before the n-th change in a folder."""

    _EVENTS = frozenset(f"os.{name}" for name in ("rename", "mkdir", "rmdir", "remove", "truncate"))

    def __init__(self, folder: pathlib.Path, killed_at: int, count: pathlib.Path) -> None:
        self._folder, self._at, self._file, self._count = str(folder), killed_at, str(count), 0

    def __call__(self, event: str, values: tuple[Any, ...]) -> None:
        if event != "open" and event not in self._EVENTS:
            return
        if event == "open" and not int(values[2] or 0) & (os.O_WRONLY | os.O_RDWR):
            return
        path = str(values[0])
        # When Python deletes a folder, the paths of the entries in it are relative.
        if path == self._file or (path.startswith("/") and not path.startswith(self._folder)):
            return
        self._count += 1
        if self._count == self._at:
            os.kill(os.getpid(), signal.SIGKILL)

    def write(self) -> None:
        """Write the count into a file."""
        pathlib.Path(self._file).write_text(str(self._count))


class FullDisk:
    """An audit hook that makes files and folders in a folder fail, as if its disk were full."""

    def __init__(self) -> None:
        self._folder, self._room, self.made = "", 0, 0

    @contextlib.contextmanager
    def full(self, folder: pathlib.Path, room: int) -> Iterator[None]:
        """Let the block make `room` files and folders in `folder`, and no more; count them."""
        self._folder, self._room, self.made = str(folder), room, 0
        try:
            yield
        finally:
            self._folder = ""

    def __call__(self, event: str, values: tuple[Any, ...]) -> None:
        if not self._folder or event not in ("open", "os.mkdir"):
            return
        if event == "open" and not int(values[2] or 0) & (os.O_WRONLY | os.O_RDWR):
            return
        # `whole_files.write` names its temporary file relative to an open folder.
        if str(values[0]).startswith((self._folder, TEMPORARY)):
            self.made += 1
            if self.made > self._room:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
