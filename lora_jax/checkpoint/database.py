"""The databases in which Orbax keeps arrays, measured before TensorStore opens them.

An OCDBT database is a tree of nodes. A node lists keys, each with its value or with the piece of a
file that is its value. TensorStore has no limit for what it decompresses, writes out the keys that
a node abbreviates, and dies of deep JSON: a stranger's kilobyte could take gigabytes, or end the
process. So each node is measured here before TensorStore reads it, and the description of each
array is parsed. Format: https://google.github.io/tensorstore/kvstore/ocdbt/index.html
"""

from __future__ import annotations

import bisect
import itertools
import math
import operator
import pathlib
import struct
from collections.abc import Callable, Iterator, Mapping
from typing import Any
from urllib.parse import unquote

from lora_jax.checkpoint.manifest import DamagedError
from lora_jax.errors import LoraError, errno_of
from lora_jax.system import json_file

NAME = "manifest.ocdbt"
_CODECS = {"bytes", "crc32c", "sharding_indexed", "zstd"}  # each stops at the size of its chunk
_PATH = 255  # bytes at most of the path by which a node names a file
_MANIFEST, _DESCRIPTION = (
    2**12,
    2**16,
)  # bytes at most: of a manifest, and of an array's description
_NODE, _ENTRY = 2**17, 2**9  # bytes that a node and an entry count, in addition to their own
_PACKED = 2**20, 1024  # bytes at most: of any node unpacked, and for each byte packed

FilePiece = tuple[str, int, int]  # a file of the checkpoint, an offset and a length
Spend = Callable[[int], None]  # raises if it is called for too many bytes


def check(root: pathlib.Path, place: str, files: Mapping[str, int], spend: Spend) -> None:
    """Raise unless TensorStore can open the database in the folder `place` ("arrays/") of `root`.

    `files` are the sizes of all files by their paths in `root`; `spend` is called with the bytes
    that reading takes.
    """
    try:
        counts = [_count_chunks(key, text) for key, text in _walk(root, place, files, spend)]
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        if isinstance(error, LoraError) or errno_of(error) is not None:
            raise
        raise DamagedError("damaged: the description of its arrays cannot be read") from error
    if sum(counts) > len(counts) and "/ocdbt.process_" not in place:  # each has a part of them
        raise DamagedError(f"its arrays have {sum(counts):,} chunks; it holds {len(counts):,}")


def _walk(
    root: pathlib.Path, place: str, files: Mapping[str, int], spend: Spend
) -> Iterator[tuple[str, bytes]]:
    """Yield every key, with its value if that describes an array."""
    import tensorstore  # comes with Orbax

    def find(location: str) -> tuple[int, FilePiece]:
        _, base, path, offset, length = location.split(":")
        name, end = place + unquote(base + path), int(offset) + int(length)
        if end > files.get(name, -1):
            state = "is shorter" if name in files else "is not in its folder"
            raise DamagedError(f"damaged: a file that its database names {state}: {name[:200]!r}")
        return len(unquote(base)), (name, int(offset), int(length))

    store = tensorstore.KvStore.open({"driver": "file", "path": f"{root}/{place}"}).result()
    size = files[place + NAME]
    manifest = _unpacked(_read(root, (place + NAME, 0, min(size, _MANIFEST))))
    if max(size, len(manifest)) > _MANIFEST or manifest[16]:  # 1: there are further manifests
        raise DamagedError("damaged: its database has a manifest of another kind, or a large one")
    left = [(b"", tensorstore.ocdbt.dump(store).result()["versions"][-1]["root"])]
    seen = set[FilePiece]()
    while left:
        prefix, node = left.pop()
        if "location" not in node:  # the database is empty
            continue
        base, piece = find(node["location"])
        if piece in seen:
            raise DamagedError("damaged: its database has a node twice")
        seen.add(piece)
        spend(_NODE + piece[2])
        _spend_lengths(_unpacked(_read(root, piece)), base, len(prefix), spend)
        for entry in tensorstore.ocdbt.dump(store, node["location"]).result()["entries"]:
            if "location" in entry:
                left.append((prefix + entry["subtree_common_prefix"], entry))
                continue
            key, value = prefix + entry["key"], entry.get("inline_value")
            piece = find(entry["indirect_value"])[1] if value is None else ("", 0, len(value))
            name, described = key.decode(errors="replace")[:200], key.endswith(b"zarr.json")
            if described and piece[2] > _DESCRIPTION:
                raise DamagedError(f"{name} has {piece[2]:,} bytes; the limit is {_DESCRIPTION:,}")
            yield name, (_read(root, piece) if value is None else value) if described else b""


def _read(root: pathlib.Path, piece: FilePiece) -> bytes:
    with open(root / piece[0], "rb") as file:
        file.seek(piece[1])
        return file.read(piece[2])


def _unpacked(data: bytes) -> bytes:
    """Return the content of a node or a manifest.

    Zstandard is not in Python, and TensorStore's driver for zip files can decompress it. That
    reads one byte without keeping those before it, so bisection finds the size.
    """
    import tensorstore

    how, body = data[12:14], data[14:-4]
    if how == b"\0\0":  # not compressed
        return body
    if how != b"\0\1":
        raise DamagedError("damaged: its database has a node of another format")
    most = max(_PACKED[0], _PACKED[1] * len(body))  # the driver allows no more
    fields = (20, 0, 93, 0, 33, 0, len(body), most, 1, 0)  # 93: Zstandard
    local = struct.pack("<4s5H3I2H", b"PK\3\4", *fields) + b"n"
    central = struct.pack("<4s6H3I5H2I", b"PK\1\2", 20, *fields, *[0] * 5) + b"n"
    end = struct.pack("<4s4H2IH", b"PK\5\6", 0, 0, 1, 1, len(central), len(local + body), 0)
    context, memory = tensorstore.Context(), {"driver": "memory", "path": "zip"}
    store = tensorstore.KvStore.open(memory, context=context).result()
    store.write("", local + body + central + end).result()
    unzipped = {"driver": "zip", "base": memory}
    store = tensorstore.KvStore.open(unzipped, context=context).result()

    def is_after_end(index: int) -> bool:
        try:
            return not store.read("n", byte_range=slice(index, index + 1)).result().value
        except ValueError:
            return True

    if not is_after_end(most - 1):
        raise DamagedError(f"a node of its database of {len(body):,} bytes holds {most:,} or more")
    size = bisect.bisect_left(range(most), True, key=is_after_end)
    return bytes(store.read("n", byte_range=slice(0, size)).result().value)


def _spend_lengths(body: bytes, base: int, prefix: int, spend: Spend) -> None:
    """Spend the bytes of a node, with its keys and its paths of files written out."""
    spend(len(body))
    rest = iter(body[1:])  # without the height

    def number() -> int:
        value = 0
        for shift in range(0, 70, 7):
            byte = next(rest, 128)
            value |= (byte & 127) << shift
            if byte < 128:
                return value
        raise DamagedError("damaged: a node of its database is cut off")

    def lengths(before: int) -> tuple[list[int], int]:
        """Return the lengths of abbreviated texts, and the bytes that are there of them."""
        count = number()
        spend(count * (_ENTRY + before))
        same, new = [0, *(number() for _ in range(count - 1))], [number() for _ in range(count)]
        found = list(map(operator.add, same, new))
        spend(sum(found))
        return found, sum(new)

    paths, size = lengths(base)
    if max(paths, default=0) > _PATH:
        raise DamagedError(f"damaged: its database names a file with more than {_PATH} bytes")
    for _ in paths:
        number()  # the length of a base path
    next(itertools.islice(rest, size, size), None)  # passes over the paths
    lengths(prefix)


def _count_chunks(key: str, text: bytes) -> int:
    """Return the number of chunks of an array; raise unless it is described as Orbax does it."""
    if not text:
        return 0
    found = json_file.parse_object(text, key, DamagedError, finite=False)
    chunk = found["chunk_grid"]["configuration"]["chunk_shape"]
    codecs = list(_codecs(found["codecs"]))
    names = [codec["name"] for codec in codecs]
    inner = [c["configuration"]["chunk_shape"] for c in codecs if c["name"] == "sharding_indexed"]
    if not _CODECS.issuperset(names) or inner not in ([], [chunk]):
        raise DamagedError(
            f"{key} has chunks {str(chunk)[:80]}, stored by {str(names)[:200]} in chunks "
            f"{str(inner)[:80]}; expected {', '.join(sorted(_CODECS))}, and one chunk a shard"
        )
    return math.prod(abs(-(-n // size)) for n, size in zip(found["shape"], chunk, strict=True))


def _codecs(codecs: Any) -> Iterator[Any]:
    for codec in codecs:
        yield codec
        for part in ("codecs", "index_codecs"):
            yield from _codecs(codec.get("configuration", {}).get(part, ()))
