"""The cache folder of the user, which only the user may write to.

It holds compiled programs, which run as they are, and models and data that were checked when they
were downloaded. Whoever can write to it could replace them. So it is used only if it and the
folders above it belong to the user or to root, and if nobody else can write to them.
"""

from __future__ import annotations

import os
import pathlib
import stat

from lora_jax.errors import LoraError


class CacheError(LoraError):
    """The cache folder cannot be trusted; the message says why, and names the cure."""


def folder(*names: str) -> pathlib.Path:
    """Return a folder in the user's cache, which is made if it does not exist.

    The cache is `LORA_JAX_CACHE`, or lora_jax in `XDG_CACHE_HOME` or in `~/.cache`. `CacheError`:
    another user owns it or a folder above it, or can write to one of them.
    """
    named, caches = os.environ.get("LORA_JAX_CACHE"), os.environ.get("XDG_CACHE_HOME")
    parent = pathlib.Path(caches) if caches else pathlib.Path.home() / ".cache"
    root = pathlib.Path(named).expanduser() if named else parent / "lora_jax"
    path = root.absolute().joinpath(*names)
    missing = [p for p in (path, *path.parents) if not os.path.lexists(p)]
    for each in reversed(missing):
        each.mkdir(exist_ok=True)
        each.chmod(0o700)  # for any umask
    check(path)
    return path


def check(path: pathlib.Path) -> None:
    """Raise `CacheError` unless only the user can write to a folder or replace it.

    Its path is absolute. Links to it and in it are checked, too.
    """
    real = path.resolve()
    # In a container, the owner of / may have a number that stands for several users.
    trusted = {os.getuid(), 0, os.stat("/").st_uid}
    for each in dict.fromkeys((path, *path.parents, real, *real.parents)):
        found = each.lstat()
        if found.st_uid not in trusted:
            _refuse(path, each, f"belongs to the user {found.st_uid}")
        # In a folder with the sticky bit, such as /tmp, only its owner can replace an entry. A
        # group with the user's own number has no other members.
        shared = stat.S_IWOTH | (stat.S_IWGRP if found.st_gid != os.getuid() else 0)
        sticky = found.st_mode & stat.S_ISVTX and each not in (path, real)
        if not stat.S_ISLNK(found.st_mode) and found.st_mode & shared and not sticky:
            _refuse(path, each, f"can be written by others (mode {stat.S_IMODE(found.st_mode):o})")


def _refuse(path: pathlib.Path, each: pathlib.Path, why: str) -> None:
    raise CacheError(
        f"the cache {path} is not used, since {each} {why}, who could have changed its programs, "
        "models and data. Let LORA_JAX_CACHE name a folder of your own, or change the owner and "
        "mode of this one (chown, chmod go-w)"
    )
