"""Files of safetensors as a header and bytes, which are changed separately."""

from __future__ import annotations

import struct
from random import Random
from typing import Any

import numpy as np

from tests.fuzz import mutate

_TAILS = (np.nan, np.inf, -np.inf, 1e38, 0.0)


def split(data: bytes) -> tuple[bytes, bytes]:
    """Return the JSON header and the bytes of the numbers of a safetensors file."""
    (length,) = struct.unpack("<Q", data[:8])
    return data[8 : 8 + length], data[8 + length :]


def joined(header: bytes, body: bytes, length: int | None = None) -> bytes:
    """Return the file; `length` may declare a wrong length of the header."""
    return struct.pack("<Q", len(header) if length is None else length) + header + body


def changed(random: Random, data: bytes) -> bytes:
    """Return the file with a changed header, changed numbers, or changed bytes anywhere."""
    header, body = split(data)
    match random.randrange(6):
        case 0 | 1 | 2:
            return joined(mutate.json_text(random, header), body)
        case 3:
            made = bytearray(body)
            at = random.randrange(0, max(len(made) - 3, 1), 4)
            made[at : at + 4] = np.float32(random.choice(_TAILS)).tobytes()
            return joined(header, bytes(made))
        case 4:
            length = random.choice(
                (0, 1, len(header) - 1, len(header) + 8, 2**26, 2**63, 2**64 - 1)
            )
            return joined(header, body, length)
        case _:
            return mutate.bytes_of(random, data)


def renamed(random: Random, data: bytes) -> bytes:
    """Return the file with changed metadata or a renamed tensor."""
    header, body = split(data)
    tree: Any = mutate.read(header)
    pair = random.choice(tree)
    if isinstance(pair[1], mutate.Pairs) and pair[0] == "__metadata__":
        pair[1] = mutate.tree_of(random, pair[1], 1)
    else:
        other = random.choice(tree)[0]
        pair[0] = random.choice((str(mutate.near(random, pair[0])), other, other + ".weight"))
    return joined(mutate.dump(tree).encode("utf-8", "surrogatepass"), body)
