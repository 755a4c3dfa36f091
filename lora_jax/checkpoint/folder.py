"""The folder of a checkpoint that may come from a stranger: walked before Orbax opens it.

`check` refuses the following, and names the file and the limit:

    a link, and anything else that is neither a file nor a folder;
    more than 100,000 files and folders;
    files outside of databases with more than 64 MiB in all, or with JSON of too many values;
    a database in a folder that is not for arrays, and one that TensorStore cannot open safely
    (`lora_jax.checkpoint.database`).
"""

from __future__ import annotations

import math
import os
import pathlib
import re
import stat

from lora_jax.checkpoint import database
from lora_jax.errors import DamagedError, LoraError
from lora_jax.system import json_file, regular_files

ENTRIES = 100_000
JSON_BYTES = 2**26
_START = 2**12  # bytes that tell whether a file is JSON
_VALUES = 2**22  # of JSON; a list and an object count as four
_INDEX, _RATIO = 2**25, 16  # bytes for databases: of any folder, and for each byte on disk
_INDEX_ASKED = 2**23  # the same, of a folder with a limit of the caller


def check(folder: pathlib.Path, part: str, max_bytes: float | None) -> int:
    """Return the bytes that a local folder takes on disk, without holes; raise if it is not safe.

    Only `part` may have a database. `max_bytes` is the caller's limit for arrays, and for their
    descriptions too.
    """
    root = folder.resolve()
    files, on_disk = _walk(root)
    most = max(_INDEX, _RATIO * on_disk)
    if max_bytes is not None and max_bytes < math.inf:
        most = int(max(_INDEX_ASKED, max_bytes))
    left_json, left = JSON_BYTES, most

    def spend(size: int) -> None:
        nonlocal left
        left -= size
        if left < 0:
            raise DamagedError(
                f"the index of its arrays takes more than {most:,} bytes, in a folder of "
                f"{on_disk:,} bytes; if that is meant, pass a larger max_bytes"
            )

    for name, size in files.items():
        left_json -= 0 if _is_data(name) else size
        if left_json < 0:
            raise LoraError(
                f"{root / name} has {size:,} bytes; the limit of JSON is {JSON_BYTES:,} in all"
            )
        if size and not _is_data(name):
            _check_json(root / name)
    for name in files:
        place = name.removesuffix(database.NAME)
        if place == name:
            continue
        if not re.fullmatch(rf"{part}/(ocdbt\.process_[^/]*/)?", place):
            said = f"it holds a database in /{place[:200]}; expected one only in {part}"
            raise DamagedError(said)
        database.check(root, place, files, spend)
    return on_disk


def _walk(root: pathlib.Path) -> tuple[dict[str, int], int]:
    """Return the size of each file by its path in a folder, and the bytes that all take on disk."""
    sizes, linked, left, entries, on_disk = dict[str, int](), set[int](), [""], 0, 0
    while left:
        inside = left.pop()
        with os.scandir(root / inside) as found:
            for entry in found:
                state, name = entry.stat(follow_symlinks=False), f"{inside}{entry.name}"
                entries += 1
                if entries > ENTRIES:
                    raise LoraError(f"{root} holds more than {ENTRIES:,} files and folders")
                if stat.S_ISLNK(state.st_mode):
                    raise LoraError(
                        f"{root / name} is a link to {os.readlink(root / name)}, and could lead "
                        "out of its folder; if you trust it, copy the folder with its links "
                        "followed (cp -rL)"
                    )
                if stat.S_ISDIR(state.st_mode):
                    left.append(f"{name}/")
                    continue
                if not stat.S_ISREG(state.st_mode):
                    raise LoraError(f"{root / name} is neither a file nor a folder")
                sizes[name] = state.st_size
                if state.st_nlink == 1 or state.st_ino not in linked:
                    on_disk += regular_files.allocated(root / name)
                    linked.add(state.st_ino)
    return sizes, on_disk


def _is_data(name: str) -> bool:
    """Return whether a file is one in which a database keeps nodes and values."""
    return bool(re.fullmatch(r".+/d/[^/]*", name, re.DOTALL))


def _check_json(file: pathlib.Path) -> None:
    """Raise unless a file that begins as JSON is JSON that Orbax and TensorStore can read."""
    with open(file, "rb") as opened:
        data = opened.read(_START)
        if data.lstrip(b"\xef\xbb\xbf \t\r\n")[:1] not in (b"", b"{", b"["):
            return
        data += opened.read(JSON_BYTES)
    values = 4 * (data.count(b"[") + data.count(b"{")) + data.count(b",") + data.count(b"\\u")
    if values > _VALUES:
        raise LoraError(f"{file} holds JSON of more than {_VALUES:,} values")
    found = json_file.parse(data, str(file), DamagedError, finite=False)
    if file.name == "_METADATA" and not (found["use_ocdbt"] is found["use_zarr3"] is True):
        raise DamagedError(f"{file} says that its arrays are not in a database")
