"""OCDBT databases byte by byte, as a stranger could write them.

Format: https://google.github.io/tensorstore/kvstore/ocdbt/index.html
"""

from __future__ import annotations

import pathlib
import struct
from collections.abc import Sequence

import tensorstore

MANIFEST, NODE = 0x0CDB3A2A, 0x0CDB20DE
BLOCK = 2**17  # bytes at most of a block of Zstandard
FILE = "d/stranger"


def _table() -> list[int]:
    found = list(range(256))
    for _ in range(8):
        found = [n >> 1 ^ (0x82F63B78 if n & 1 else 0) for n in found]
    return found


_CRC = _table()


def varint(*numbers: int) -> bytes:
    """Return numbers with seven bits a byte."""
    found = bytearray()
    for number in numbers:
        while number > 127:
            found.append(number & 127 | 128)
            number >>= 7
        found.append(number)
    return bytes(found)


def packed(*pieces: bytes | tuple[int, int]) -> bytes:
    """Return a frame of Zstandard; a piece is bytes, or (byte, how often)."""
    blocks: list[tuple[int, int, bytes]] = []
    for piece in pieces:
        if isinstance(piece, bytes):
            cuts = [piece[i : i + BLOCK] for i in range(0, len(piece), BLOCK)]
            blocks += [(0, len(cut), cut) for cut in cuts]
        else:
            byte, left = piece
            blocks += [(1, BLOCK, bytes([byte]))] * (left // BLOCK)
            blocks += [(1, left % BLOCK, bytes([byte]))]
    found = b"\x28\xb5\x2f\xfd\x00\x58"
    for i, (kind, size, data) in enumerate(blocks):
        found += (size << 3 | kind << 1 | (i == len(blocks) - 1)).to_bytes(3, "little") + data
    return found


def record(magic: int, data: bytes, *, compressed: bool = False) -> bytes:
    """Return a manifest or a node with its head and its checksum."""
    head = struct.pack(">I", magic) + struct.pack("<Q", len(data) + 18)
    found, crc = head + bytes([0, compressed]) + data, 0xFFFFFFFF
    for byte in found:
        crc = _CRC[(crc ^ byte) & 255] ^ crc >> 8
    return found + struct.pack("<I", crc ^ 0xFFFFFFFF)


def table(*paths: str) -> bytes:
    """Return the paths of files that a node names."""
    names = [path.encode() for path in paths]
    lengths = varint(*[0] * (len(names) - 1), *map(len, names), *[0] * len(names))
    return varint(len(names)) + lengths + b"".join(names)


def manifest(length: int, *, path: str = FILE, height: int = 0, kind: int = 0) -> bytes:
    """Return a manifest whose root is the first `length` bytes of a file."""
    config = bytes(16) + bytes([kind]) + varint(2**10, 2**23) + b"\x04\x00"
    root = varint(1, 1) + bytes([height]) + varint(0, 0, length, 2, length, 0)
    return record(MANIFEST, config + table(path) + root + bytes(8) + b"\x00")


def leaf(keys: Sequence[bytes], values: Sequence[bytes]) -> bytes:
    """Return the content of a leaf with its values."""
    same, sizes = varint(*[0] * (len(keys) - 1)), varint(*map(len, keys))
    ends = varint(*map(len, values)) + bytes(len(values)) + b"".join(values)
    return b"\x00\x00" + varint(len(keys)) + same + sizes + b"".join(keys) + ends


def pointing(key: bytes, path: str, offset: int, length: int) -> bytes:
    """Return the content of a leaf whose value is in another file."""
    head = b"\x00" + table(path) + varint(1, len(key)) + key
    return head + varint(length) + b"\x01" + varint(0, offset)


def interior(height: int, path: str, children: Sequence[tuple[bytes, int, int]]) -> bytes:
    """Return the content of a node above others: a key, an offset and a length for each."""
    keys, offsets, lengths = zip(*children, strict=True)
    n = len(children)
    found = bytes([height]) + table(path) + varint(n, *[0] * (n - 1), *map(len, keys))
    found += varint(*map(len, keys)) + b"".join(keys) + varint(*[0] * n)
    return found + varint(*offsets, *lengths, *[1] * n, *lengths, *[0] * n)


def put(folder: pathlib.Path, node: bytes, *, height: int = 0, path: str = FILE) -> None:
    """Replace the database of a folder by one with this root."""
    (folder / "d").mkdir(parents=True, exist_ok=True)
    (folder / FILE).write_bytes(node)
    (folder / "manifest.ocdbt").write_bytes(manifest(len(node), height=height, path=path))


def opened(folder: pathlib.Path) -> tensorstore.KvStore:
    """Return the store of a database, which may be changed."""
    base = {"driver": "file", "path": f"{folder}/"}
    return tensorstore.KvStore.open({"driver": "ocdbt", "base": base}).result()
