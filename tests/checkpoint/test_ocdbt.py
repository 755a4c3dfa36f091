"""Our parser of OCDBT's records finds what TensorStore's own finds."""

from __future__ import annotations

import pathlib
import random
from typing import Any
from urllib.parse import unquote

import pytest
import tensorstore

from lora_jax.checkpoint import database, ocdbt


def _spend(_: int) -> None:
    pass


def _content(folder: pathlib.Path, piece: ocdbt.Extent) -> bytes:
    with open(folder / piece.path.decode(), "rb") as file:
        file.seek(piece.offset)
        return database.unpacked(file.read(piece.length), ocdbt.NODE)


def manifest(folder: pathlib.Path) -> bytes:
    return database.unpacked((folder / database.NAME).read_bytes(), ocdbt.MANIFEST)


def _as_dumped(location: str) -> ocdbt.Extent:
    _, base, path, offset, length = location.split(":")
    return ocdbt.Extent(unquote(base + path).encode(), len(unquote(base)), int(offset), int(length))


def _equal_below(folder: pathlib.Path, store: Any, location: str, prefix: bytes) -> list[int]:
    """Compare a node and those below it; return the number of entries of each."""
    piece = _as_dumped(location)
    found = ocdbt.entries(_content(folder, piece), piece.path[: piece.base], prefix, _spend)
    dumped = tensorstore.ocdbt.dump(store, location).result()["entries"]
    counts = [len(found)]
    for ours, theirs in zip(found, dumped, strict=True):
        assert isinstance(ours[1], ocdbt.Node) == ("location" in theirs)
        if "location" in theirs:
            start = prefix + theirs["subtree_common_prefix"]
            assert ours == (start, _as_dumped(theirs["location"]))
            counts += _equal_below(folder, store, theirs["location"], start)
        elif "inline_value" in theirs:
            assert ours == (prefix + theirs["key"], theirs["inline_value"])
        else:
            place = _as_dumped(theirs["indirect_value"])
            assert ours == (prefix + theirs["key"], place)
    return counts


@pytest.mark.parametrize("compression", [None, {"id": "zstd"}], ids=["plain", "zstd"])
@pytest.mark.parametrize("size", [200, 8_000_000], ids=["tall", "one-node"])
def test_our_parser_finds_what_tensorstore_finds(
    tmp_path: pathlib.Path, compression: Any, size: int
) -> None:
    config = {
        "max_decoded_node_bytes": size,
        "compression": compression,
        "max_inline_value_bytes": 9,
    }
    base = {"driver": "file", "path": f"{tmp_path}/"}
    draw = random.Random(0)
    for _ in range(2):  # two versions, in two data files
        store = tensorstore.KvStore.open(
            {"driver": "ocdbt", "base": base, "config": config}
        ).result()
        with tensorstore.Transaction(atomic=False) as transaction:
            for _ in range(60):
                key = "/".join(draw.choice(["layer", "kernel", "a", "é"]) for _ in range(4))
                store.with_transaction(transaction)[key] = draw.randbytes(draw.choice([3, 40]))
    plain = tensorstore.KvStore.open(base).result()
    version = tensorstore.ocdbt.dump(plain).result()["versions"][-1]
    root = ocdbt.root(manifest(tmp_path), _spend)
    assert root == _as_dumped(version["root"]["location"])
    counts = _equal_below(tmp_path, plain, version["root"]["location"], b"")
    assert (len(counts) > 5) == (size == 200)


def test_an_empty_database_has_no_root(tmp_path: pathlib.Path) -> None:
    base = {"driver": "file", "path": f"{tmp_path}/"}
    store = tensorstore.KvStore.open({"driver": "ocdbt", "base": base}).result()
    store["key"] = b"value"
    store.delete_range(tensorstore.KvStore.KeyRange()).result()
    assert ocdbt.root(manifest(tmp_path), _spend) is None
