"""Changes to the OCDBT database of an adapter, and files that are not plain files."""

from __future__ import annotations

import json
import pathlib
import tempfile
from random import Random

from tests.checkpoint import ocdbt_bytes as ocdbt
from tests.fuzz import mutate
from tests.fuzz.kind import Files, Hole, Link, Pipe, write

PLACES = ("arrays", "arrays/ocdbt.process_0", "meta", "state", "")
NAMES = ("x", "meta/x", "arrays/x", "arrays/_sharding", "arrays/d/x", "arrays/array_metadatas/x")
TARGETS = (".", "..", "x", "arrays/d", "_CHECKPOINT_METADATA", "/etc/passwd", mutate.SECRET, "\n")


def with_special_file(random: Random, files: Files) -> Files:
    """Add a link, a pipe or a file that is one large hole."""
    made = random.choice(
        (Link(random.choice(TARGETS).encode()), Pipe(), Hole(10 ** random.randint(3, 11)))
    )
    return files | {random.choice((*NAMES, *sorted(files))): made}


def with_value(random: Random, files: Files) -> Files:
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        write(folder, files)
        place = random.choice((PLACES[0], *PLACES))
        store = ocdbt.opened(folder / place)
        keys = store.list().result() or [b"x/zarr.json"]
        key = random.choice((*keys, *keys, b"x/zarr.json", b"x/c/0", b"\0", b"k" * 3_000))
        store.write(key, _value(random, store.read(key).result().value)).result()
        found = (path for path in sorted(folder.rglob("*")) if path.is_file())
        return {str(path.relative_to(folder)): path.read_bytes() for path in found}


def _value(random: Random, data: bytes) -> bytes:
    match random.randrange(6):
        case 0:
            return b"[" * random.choice((90, 110, 20_000, 200_000))
        case 1:
            return random.choice((b" ", b"\0", b"[],")) * 10 ** random.randint(0, 6)
        case 2:
            return random.randbytes(random.randint(0, 2_000))
        case _ if data[:1] == b"{":
            return mutate.json_text(random, data)
        case _:
            return mutate.bytes_of(random, data or b"x")


def with_node(random: Random, files: Files) -> Files:
    """Put a database of one node, made by hand, in the place of another."""
    key = random.choice((b"adapters.q.a/zarr.json", b"x", b"k" * 60_000))
    path = random.choice(
        (ocdbt.FILE, "d/x", "../x", "/etc/passwd", mutate.SECRET, "meta", "p" * 300)
    )
    count, size = random.choice((1, 2, 1_000)), 10 ** random.randint(0, 8)
    keys = [b"%s%06d" % (key[:1_000], i) for i in range(count)]
    full = ocdbt.leaf(keys, [json.dumps({"i": i}).encode() for i in range(count)])
    data, compressed = random.choice(
        (
            (full, False),
            (ocdbt.packed(full), True),
            (ocdbt.packed(full[:20], (random.randrange(256), size)), True),
            (mutate.bytes_of(random, full), False),
            (ocdbt.packed(mutate.bytes_of(random, full)), True),
            (ocdbt.pointing(key, path, random.randrange(100), size), False),
            (ocdbt.interior(1, path, [(key, 0, size), (key + b"a", 0, size)]), False),
        )
    )
    node = ocdbt.record(ocdbt.NODE, data, compressed=compressed)
    height = random.choice((0, 0, 0, 1, 255))
    root = ocdbt.manifest(len(node), height=height, kind=random.choice((0,) * 9 + (1,)))
    place = random.choice(("arrays/", "arrays/", "arrays/ocdbt.process_0/", "meta/"))
    return files | {f"{place}{ocdbt.FILE}": node, f"{place}manifest.ocdbt": root}
