"""Write files and folders whole or not at all, and through no link.

No link is followed below the folder that the user named. What a killed process left of a file or a
folder, `.writing-*`, is deleted by the next one that writes it.
"""

from __future__ import annotations

import contextlib
import errno
import glob
import json
import os
import pathlib
import secrets
import shutil
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import BinaryIO

from lora_jax.errors import LoraError, listed, writing

FileWriter = Callable[[pathlib.Path], object]
"""A function that writes one file to a given path."""

TEMPORARY = ".writing-"  # the beginning of the names of temporary files and folders


def check_links(folder: pathlib.Path, names: Iterable[str]) -> None:
    """Raise `LoraError` if an entry of a folder that a library will write is or holds a link."""
    found = [path for name in names if (path := folder / name).is_symlink()]
    for name in names:
        for parent, inner, files in os.walk(folder / name):
            inside = (pathlib.Path(parent, each) for each in (*inner, *files))
            found += [path for path in inside if path.is_symlink()]
    if found:
        raise LoraError(
            f"{folder} holds links, and nothing is written through a link:\n"
            f"{listed(f'{path} -> {os.readlink(path)}' for path in found)}\n"
            "Delete them, or name another folder"
        )


def check_place(path: pathlib.Path) -> None:
    """Make the folder of a file that is written after a long computation, or raise at once."""
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        kind = errno.EISDIR if path.is_dir() else errno.EACCES
        if path.is_dir() or not os.access(path.parent, os.W_OK):
            raise OSError(kind, os.strerror(kind))


def write(path: pathlib.Path, content: bytes, *, below: pathlib.Path | None = None) -> None:
    """Write a file completely or not at all. If it is a link, the link is replaced.

    `below` is the folder that the user named, in which `path` is: folders between the two are made,
    and may not be links. None: the folder of the file.
    """
    with writing(path), _folder(path.parent, path.parent if below is None else below) as folder:
        for name in os.listdir(folder):
            if name.startswith(f"{TEMPORARY}{path.name}-"):
                _delete_abandoned(name, folder)
        name = f"{TEMPORARY}{path.name}-{secrets.token_hex(4)}"
        try:
            with _created(name, folder) as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())  # before the rename: the power may fail
                os.replace(name, path.name, src_dir_fd=folder, dst_dir_fd=folder)
            _sync(folder)
        except BaseException:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(name, dir_fd=folder)
            raise


def write_json(path: pathlib.Path, value: object, *, below: pathlib.Path | None = None) -> None:
    """Write a JSON file with `write`."""
    write(path, (json.dumps(value, indent=2) + "\n").encode(), below=below)


def append(path: pathlib.Path) -> BinaryIO:
    """Open a file of its own to append to it; it is made if it does not exist."""

    def opener(name: str, flags: int) -> int:
        return os.open(name, flags | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)

    if path.is_symlink():
        raise LoraError(f"{path} is a link, through which nothing is written; delete it")
    file = open(path, "ab", opener=opener)  # noqa: SIM115
    found = os.fstat(file.fileno())
    if not stat.S_ISREG(found.st_mode) or found.st_nlink > 1:
        file.close()
        raise LoraError(f"{path} is not a file of its own, but also another one; delete it")
    return file


@contextlib.contextmanager
def _folder(path: pathlib.Path, below: pathlib.Path) -> Iterator[int]:
    """Make a folder, following no link below `below`, and yield its descriptor."""
    below.mkdir(parents=True, exist_ok=True)
    folder, place = os.open(below, os.O_RDONLY | os.O_DIRECTORY), below
    try:
        for name in path.relative_to(below).parts:
            place = place / name
            with contextlib.suppress(FileExistsError):
                os.mkdir(name, dir_fd=folder)
            if place.is_symlink():
                raise LoraError(
                    f"{place} is a link to {os.readlink(place)}, and nothing is written through a "
                    "link; delete it, or name another folder"
                )
            flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW
            outer, folder = folder, os.open(name, flags, dir_fd=folder)
            os.close(outer)
        yield folder
    finally:
        os.close(folder)


def _created(name: str, folder: int) -> BinaryIO:
    """Create and lock a file that does not exist yet."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
    file = open(os.open(name, flags, 0o666, dir_fd=folder), "wb")  # noqa: SIM115
    _lock(file.fileno())
    return file


def _sync(folder: int) -> None:
    """Write the names in an open folder to the disk; some file systems cannot, or need not."""
    with contextlib.suppress(OSError):
        os.fsync(folder)


def write_together(folder: pathlib.Path, writers: Mapping[str, FileWriter]) -> None:
    """Write several files so that either all of them appear or none (see `whole_folder`).

    `writers` is `{file name: function that writes the file to a given path}`; the last one is moved
    last.
    """
    with whole_folder(folder, last=list(writers)[-1]) as aside:
        for name, write_file in writers.items():
            write_file(aside / name)


@contextlib.contextmanager
def whole_folder(folder: pathlib.Path, last: str = "") -> Iterator[pathlib.Path]:
    """Yield a temporary folder that becomes `folder` when the block ends without an error.

    If `folder` does not exist or is empty, the temporary folder is renamed to it: even if the
    process is killed, `folder` is complete or unchanged. If it already holds files, is a mount
    point or is in a folder that cannot be written, the files are moved into it one by one, the one
    named `last` at the end.
    """
    folder = pathlib.Path(os.path.realpath(folder))
    with writing(folder):
        aside, lock = _make_aside(folder)
        try:
            yield aside
            for path in filter(pathlib.Path.is_file, aside.rglob("*")):
                with open(path, "rb") as file:
                    os.fsync(file.fileno())
            _sync(lock)
            if aside.parent == folder:
                for path in sorted(aside.iterdir(), key=lambda path: path.name == last):
                    os.replace(path, folder / path.name)
            else:
                _rename(aside, folder)
        finally:
            shutil.rmtree(aside, ignore_errors=True)
            os.close(lock)


def _make_aside(folder: pathlib.Path) -> tuple[pathlib.Path, int]:
    """Create and lock the temporary folder: next to `folder` if possible, otherwise inside it."""
    name = f"{TEMPORARY}{folder.name}-"
    folder.parent.mkdir(parents=True, exist_ok=True)
    taken = folder.is_dir() and (os.path.ismount(folder) or any(folder.iterdir()))
    for parent in (folder,) if taken else (folder.parent, folder):
        for path in parent.glob(f"{glob.escape(name)}*"):
            _delete_abandoned(str(path))
        aside = parent / f"{name}{secrets.token_hex(4)}"
        try:
            aside.mkdir()
        except OSError:
            if parent == folder or not folder.is_dir():
                raise
        else:
            lock = os.open(aside, os.O_RDONLY)
            _lock(lock)
            return aside, lock
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


def _lock(file: int) -> bool:
    """Lock an open file or folder until it is closed; False: another process has locked it."""
    import fcntl  # not on Windows, which can still import the core

    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _delete_abandoned(path: str, folder: int | None = None) -> None:
    """Delete a temporary file or folder, unless a process holds its lock."""
    with contextlib.suppress(OSError):  # a link, or deleted by another process in the meantime
        found = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=folder)
        try:
            if _lock(found):
                is_folder = stat.S_ISDIR(os.fstat(found).st_mode)
                delete = shutil.rmtree if is_folder else os.unlink
                delete(path, dir_fd=folder)
        finally:
            os.close(found)
