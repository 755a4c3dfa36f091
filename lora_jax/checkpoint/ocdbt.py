"""The records of OCDBT databases, parsed with a limit of memory.

A manifest names the root of a tree of nodes. A node lists keys, each with its value, with the piece
of a file that is its value, or, above other nodes, with the piece of a file that is a node. Keys
and paths of files are abbreviated: each text begins as the one before it.

TensorStore has `ocdbt.dump` for this, which has no limit and keeps 3 to 5 kB at every call for as
long as the process lives. Format: https://google.github.io/tensorstore/kvstore/ocdbt/index.html
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import NamedTuple

from lora_jax.errors import DamagedError

MANIFEST, NODE = b"\x0c\xdb\x3a\x2a", b"\x0c\xdb\x20\xde"  # how a record begins
_PATH = 255  # bytes at most of the path by which a node names a file
_ENTRY = 2**9  # bytes that an entry counts, in addition to its own
_NOTHING = 2**64 - 1  # the offset and the length of the root of an empty database

Spend = Callable[[int], None]  # raises if it is called for too many bytes


class Extent(NamedTuple):
    """A piece of a file.

    base: how many bytes of the path the paths begin with that a node in this piece names.
    """

    path: bytes
    base: int
    offset: int
    length: int


class Node(Extent):
    """A piece of a file that is a node. All its keys begin with the key that it has above."""


Listed = tuple[bytes, bytes | Extent]


class _Reader:
    """Reads numbers and texts one after another, and spends the bytes that they take."""

    def __init__(self, data: bytes, spend: Spend):
        self.data, self.at, self.spend = data, 0, spend
        spend(len(data))

    def take(self, size: int) -> bytes:
        start, self.at = self.at, self.at + size
        if self.at > len(self.data):
            raise DamagedError("damaged: a record of its database is cut off")
        return self.data[start : self.at]

    def number(self) -> int:
        value = 0
        for shift in range(0, 70, 7):
            (byte,) = self.take(1)
            value |= (byte & 127) << shift
            if byte < 128:
                return value
        raise DamagedError("damaged: a record of its database has too large a number")

    def numbers(self, count: int) -> list[int]:
        return [self.number() for _ in range(count)]

    def lengths(self, before: int) -> tuple[list[int], list[int]]:
        """Return, for each text, how long its common part with the one before it and its rest are.

        `before` is the length of a text that is to be put before each.
        """
        count = self.number()
        self.spend(count * (_ENTRY + before))
        common, rest = [0, *self.numbers(count - 1)], self.numbers(count)
        self.spend(sum(common) + sum(rest))
        return common, rest

    def texts(self, common: list[int], rest: list[int]) -> list[bytes]:
        found, last = list[bytes](), b""
        for same, new in zip(common, rest, strict=False):  # without a text there is no rest
            if same > len(last):
                raise DamagedError("damaged: a record of its database has a key that is too short")
            last = last[:same] + self.take(new)
            found.append(last)
        return found

    def paths(self, base: bytes) -> list[tuple[bytes, int]]:
        """Return the paths of files, each with the length of the base that it gives to a node."""
        common, rest = self.lengths(len(base))
        if max(map(operator.add, common, rest), default=0) > _PATH:
            raise DamagedError(f"damaged: its database names a file with more than {_PATH} bytes")
        bases = self.numbers(len(rest))
        texts = self.texts(common, rest)
        return [(base + path, len(base) + size) for path, size in zip(texts, bases, strict=True)]

    def nodes(self, paths: list[tuple[bytes, int]], count: int) -> list[Node]:
        columns = zip(*(self.numbers(count) for _ in range(3)), strict=True)
        return [Node(*paths[i], *place) for i, *place in columns]


def root(manifest: bytes, spend: Spend) -> Node | None:
    """Return the place of the root of the newest version; None if the database is empty.

    Args:
      manifest: its content, not compressed.
      spend: is called with the bytes that parsing takes.

    Raises:
      DamagedError: it cannot be parsed, or it refers to further manifests.
    """
    reader = _Reader(manifest, spend)
    reader.take(16)  # the database's name
    if reader.number():
        raise DamagedError("damaged: its database has a manifest of another kind")
    reader.numbers(2)  # limits of values and nodes
    reader.take(1)  # how many versions a record holds
    if reader.number():
        reader.take(4)  # how well the nodes are compressed
    paths, count = reader.paths(b""), reader.number()
    reader.spend(count * _ENTRY)
    reader.numbers(count)  # the versions' numbers
    reader.take(count)  # the heights of their trees
    *_, last = reader.nodes(paths, count)
    return None if last.offset == last.length == _NOTHING else last


def entries(node: bytes, base: bytes, prefix: bytes, spend: Spend) -> list[Listed]:
    """Return the keys of a node, each with its value, or the place of its value or of a node.

    Args:
      node: its content, not compressed.
      base: the bytes with which the paths of its files begin.
      prefix: the bytes with which its keys begin.
      spend: is called with the bytes that parsing takes.

    Raises:
      DamagedError: it cannot be parsed.
    """
    reader = _Reader(node, spend)
    (height,) = reader.take(1)
    paths = reader.paths(base)
    lengths = reader.lengths(len(prefix))
    count = len(lengths[1])
    if not count:
        raise DamagedError("damaged: its database has an empty node")
    shared = reader.numbers(count) if height else []
    keys = [prefix + text for text in reader.texts(*lengths)]
    if height:
        below = zip(keys, shared, reader.nodes(paths, count), strict=True)
        return [(key[: len(prefix) + size], place) for key, size, place in below]
    sizes, elsewhere = reader.numbers(count), reader.take(count)
    files = [reader.number() if there else 0 for there in elsewhere]
    offsets = [reader.number() if there else 0 for there in elsewhere]
    values = zip(keys, sizes, elsewhere, files, offsets, strict=True)
    return [
        (key, Extent(*paths[file], at, size) if there else reader.take(size))
        for key, size, there, file, at in values
    ]
