"""Changes that a stranger can make to a file of a folder, so that reading it does harm.

Each attack changes one file. It must be refused with a documented error, or do nothing.
"""

from __future__ import annotations

import dataclasses
import os
import pathlib
import socket
from collections.abc import Callable

SIZE = 6 << 30  # of a sparse file, which takes no room on the disk


@dataclasses.dataclass(frozen=True)
class Attack:
    """One attack.

    do: changes the file; the second argument is a file outside of its folder, with the same bytes.
    refused: whether it must end in an error. Otherwise the file may also be read as before.
    """

    do: Callable[[pathlib.Path, pathlib.Path], object]
    refused: bool


def _link(file: pathlib.Path, target: str | pathlib.Path) -> None:
    file.unlink()
    file.symlink_to(target)


def _fifo(file: pathlib.Path, outside: pathlib.Path) -> None:
    file.unlink()
    os.mkfifo(file)


def _socket(file: pathlib.Path, outside: pathlib.Path) -> None:
    file.unlink()
    here = os.getcwd()
    os.chdir(file.parent)  # a socket's path may have 107 bytes
    try:
        with socket.socket(socket.AF_UNIX) as opened:
            opened.bind(file.name)
    finally:
        os.chdir(here)


def _folder(file: pathlib.Path, outside: pathlib.Path) -> None:
    file.unlink()
    file.mkdir()


def _hole(file: pathlib.Path, outside: pathlib.Path) -> None:
    file.write_bytes(b"")
    os.truncate(file, SIZE)


def _hard_link(file: pathlib.Path, outside: pathlib.Path) -> None:
    file.unlink()
    file.hardlink_to(outside)


def _other_owner(file: pathlib.Path, outside: pathlib.Path) -> None:
    if os.getuid() == 0:
        os.chown(file, 12345, 12345)


def _other_encoding(file: pathlib.Path, outside: pathlib.Path) -> None:
    file.write_bytes(file.read_bytes().decode("latin-1").encode("utf-16"))


ATTACKS = {
    "link-out": Attack(_link, True),
    "link-to-a-device": Attack(lambda file, _: _link(file, "/dev/zero"), True),
    "link-to-itself": Attack(lambda file, _: _link(file, file.name), True),
    "link-to-nothing": Attack(lambda file, _: _link(file, "nothing"), False),
    "fifo": Attack(_fifo, True),
    "socket": Attack(_socket, True),
    "folder": Attack(_folder, False),
    "hole": Attack(_hole, True),
    "hole-at-the-end": Attack(lambda file, _: os.truncate(file, SIZE), False),
    "hard-link": Attack(_hard_link, False),
    "other-owner": Attack(_other_owner, False),
    "no-permission": Attack(lambda file, _: file.chmod(0), False),
    "other-encoding": Attack(_other_encoding, False),
    "zeros": Attack(lambda file, _: file.write_bytes(bytes(file.stat().st_size)), False),
    "empty": Attack(lambda file, _: file.write_bytes(b""), False),
}
