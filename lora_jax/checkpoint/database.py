"""The databases in which Orbax keeps arrays, measured before TensorStore opens them.

TensorStore has no limit for what it decompresses, writes out the keys that a node abbreviates, and
dies of deep JSON: a stranger's kilobyte could take gigabytes, or end the process. So each node is
parsed here before TensorStore reads it (checkpoint/ocdbt.py), and so is the description of each
array.
"""

from __future__ import annotations

import bisect
import math
import pathlib
import struct
from collections.abc import Iterator, Mapping
from typing import Any

from lora_jax.checkpoint import ocdbt
from lora_jax.checkpoint.ocdbt import Spend
from lora_jax.errors import DamagedError, LoraError, errno_of
from lora_jax.system import json_file

NAME = "manifest.ocdbt"
_CODECS = {"bytes", "crc32c", "sharding_indexed", "zstd"}  # each stops at the size of its chunk
_MANIFEST = 2**12  # bytes at most of a manifest
_DESCRIPTION = 2**16  # bytes at most of the description of an array
_NODE = 2**17  # bytes that a node counts, in addition to its own
_PACKED = 2**20, 1024  # bytes at most: of any node unpacked, and for each byte packed

FilePiece = tuple[str, int, int]  # a file of the checkpoint, an offset and a length


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

    def find(piece: ocdbt.Extent) -> FilePiece:
        name, end = place + piece.path.decode(), piece.offset + piece.length
        if end > files.get(name, -1):
            state = "is shorter" if name in files else "is not in its folder"
            raise DamagedError(f"damaged: a file that its database names {state}: {name[:200]!r}")
        return name, piece.offset, piece.length

    size = files[place + NAME]
    packed = _read(root, (place + NAME, 0, min(size, _MANIFEST)))
    manifest = b"" if size > _MANIFEST else unpacked(packed, ocdbt.MANIFEST)
    if max(size, len(manifest)) > _MANIFEST:
        raise DamagedError(f"damaged: its database has a large manifest: over {_MANIFEST} bytes")
    first, seen = ocdbt.root(manifest, spend), set[FilePiece]()
    left = [] if first is None else [(b"", first)]
    while left:
        prefix, node = left.pop()
        piece = find(node)
        if piece in seen:
            raise DamagedError("damaged: its database has a node twice")
        seen.add(piece)
        spend(_NODE + piece[2])
        body = unpacked(_read(root, piece), ocdbt.NODE)
        for key, value in ocdbt.entries(body, node.path[: node.base], prefix, spend):
            if isinstance(value, ocdbt.Node):
                left.append((key, value))
                continue
            size = len(value) if isinstance(value, bytes) else find(value)[2]
            name, described = key.decode(errors="replace")[:200], key.endswith(b"zarr.json")
            if described and size > _DESCRIPTION:
                raise DamagedError(f"{name} has {size:,} bytes; the limit is {_DESCRIPTION:,}")
            if isinstance(value, ocdbt.Extent):
                value = _read(root, find(value)) if described else b""
            yield name, value if described else b""


def _read(root: pathlib.Path, piece: FilePiece) -> bytes:
    with open(root / piece[0], "rb") as file:
        file.seek(piece[1])
        return file.read(piece[2])


def unpacked(data: bytes, kind: bytes) -> bytes:
    """Return the content of a record, a node or a manifest, which begins with `kind`.

    Zstandard is not in Python, and TensorStore's driver for zip files can decompress it. That
    reads one byte without keeping those before it, so bisection finds the size.
    """
    import tensorstore

    if data[:12] != kind + struct.pack("<Q", len(data)):
        raise DamagedError("damaged: its database has no whole record where one should be")
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
