"""Folders that strangers made so that reading them takes memory or time, or ends the process.

All are read in one child process with a limit of memory, so that a regression ends only that.
"""

from __future__ import annotations

import json
import os
import pathlib
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import pytest
from orbax.checkpoint import v1 as ocp

import lora_jax
from lora_jax import LoraError
from tests.checkpoint import ocdbt_bytes as ocdbt
from tests.checkpoint.test_adapter import forge, saved

Make = Callable[[pathlib.Path], object]
DEEP = b"[" * 200_000 + b"]" * 200_000
ZARR = "adapters.enc/q.a/zarr.json"
RESTORE = """
import json, pathlib, resource, sys, time
import jax, lora_jax
from tests.fuzz.bounds import _peak, _reset_peak
jax.devices()
lora_jax.restore(sys.argv[1])
used = int(pathlib.Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 8 * 10**9,) * 2)
for path in sys.argv[2:]:
    limits = {"max_bytes": 1e6} if path.endswith("asked") else {}
    before, start = _reset_peak(), time.process_time()
    try:
        lora_jax.restore(path, **limits)
        error = None
    except lora_jax.LoraError as refused:
        error = str(refused)
    except BaseException as other:
        error = f"not ours: {other!r}"
    print(json.dumps([path, error, time.process_time() - start, _peak() - before]), flush=True)
"""


def add(name: str, data: bytes) -> Make:
    def make(folder: pathlib.Path) -> None:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)

    return make


def node(data: bytes, *, compressed: bool = True, height: int = 0) -> Make:
    found = ocdbt.record(ocdbt.NODE, data, compressed=compressed)
    return lambda folder: ocdbt.put(folder / "arrays", found, height=height)


def value(key: str, data: bytes) -> Make:
    return lambda folder: ocdbt.opened(folder / "arrays").write(key, data).result()


def described(change: Callable[[Any], object]) -> Make:
    def make(folder: pathlib.Path) -> None:
        store = ocdbt.opened(folder / "arrays")
        found = json.loads(store[ZARR])
        change(found)
        store[ZARR] = json.dumps(found).encode()

    return make


def deep_meta(folder: pathlib.Path) -> None:
    """Give "meta" an array, and describe it too deeply."""
    meta = json.loads((folder / "meta/_strings.json").read_text()) | {"x": jnp.zeros(3)}
    other = folder.with_name("other")
    ocp.save_checkpointables(other, {"meta": meta}, overwrite=True)
    shutil.rmtree(folder / "meta")
    shutil.move(other / "meta", folder / "meta")
    ocdbt.opened(folder / "meta").write("x/zarr.json", DEEP).result()


def bomb(folder: pathlib.Path) -> None:
    """3,500 descriptions of a megabyte, of which each takes 60 bytes."""
    count, size = 3_500, 1_000_000
    keys = [b"x%04d/zarr.json" % i for i in range(count)]
    head = ocdbt.leaf(keys, [b""] * count)
    head = head[: len(head) - 2 * count] + ocdbt.varint(*[size] * count) + bytes(count)
    blocks = [(ord(" "), size)] * count
    node(ocdbt.packed(head, *blocks))(folder)


def holes(folder: pathlib.Path) -> None:
    """Declare 2 GB in a small folder with a file of 20 GB that has no content."""

    def declare(data: Any) -> None:
        data["arrays"]["base/x"] = [[2**29], "float32", "0"]

    forge(folder, declare)
    with open(folder / "arrays" / "d" / "sparse", "wb") as file:
        file.truncate(20 * 10**9)


def linked_blocks(folder: pathlib.Path) -> None:
    """The same megabyte under many names."""
    holes(folder)
    (folder / "arrays" / "d" / "sparse").write_bytes(os.urandom(2**20))
    for i in range(50):
        os.link(folder / "arrays" / "d" / "sparse", folder / "arrays" / "d" / f"{i}")


def sparse_json(folder: pathlib.Path) -> None:
    """50 files of 60 MB without content where Orbax expects JSON."""
    for i in range(50):
        with open(folder / "arrays" / "array_metadatas" / f"process_{i + 1}", "wb") as file:
            file.truncate(60 * 10**6)


def sparse_manifest(folder: pathlib.Path) -> None:
    """A manifest of 60 MB."""
    os.truncate(folder / "arrays" / "manifest.ocdbt", 60 * 10**6)


def sparse_node(folder: pathlib.Path) -> None:
    """A root of 20 GB."""
    holes(folder)
    place = folder / "arrays" / "d" / "sparse"
    found = ocdbt.manifest(19 * 10**9, path="d/sparse")
    (folder / "arrays" / "manifest.ocdbt").write_bytes(found)
    assert place.stat().st_blocks < 10_000


def branches(folder: pathlib.Path) -> None:
    """A tree in which each node names the one below it twice: 2^60 keys."""
    data, nodes = b"", ocdbt.record(ocdbt.NODE, ocdbt.leaf([b"k"], [b"v"]))
    for height in range(1, 61):
        at, size, data = len(data), len(nodes), data + nodes
        children = [(b"a", at, size), (b"b", at, size)]
        nodes = ocdbt.record(ocdbt.NODE, ocdbt.interior(height, "d/nodes", children))
    ocdbt.put(folder / "arrays", nodes, height=60)
    (folder / "arrays" / "d" / "nodes").write_bytes(data)


def round_and_round(folder: pathlib.Path) -> None:
    """A node that names itself."""
    found = ocdbt.record(ocdbt.NODE, ocdbt.interior(1, ocdbt.FILE, [(b"a", 0, 100)]))
    found = ocdbt.record(ocdbt.NODE, ocdbt.interior(1, ocdbt.FILE, [(b"a", 0, len(found))]))
    ocdbt.put(folder / "arrays", found, height=1)


def bound(folder: pathlib.Path) -> None:
    place = os.getcwd()
    os.chdir(folder)
    with socket.socket(socket.AF_UNIX) as made:
        made.bind("socket")
    os.chdir(place)


def small_chunks(data: Any) -> None:
    data["shape"] = data["chunk_grid"]["configuration"]["chunk_shape"] = [2**22, 2]
    data["codecs"][0]["configuration"]["chunk_shape"] = [1, 1]


def many_chunks(data: Any) -> None:
    data["shape"] = [2**25, 2]
    data["codecs"][0]["configuration"]["chunk_shape"] = [1, 1]
    data["chunk_grid"]["configuration"]["chunk_shape"] = [1, 1]


def nested(data: Any) -> None:
    settings = data["codecs"][0]["configuration"]
    settings["codecs"] = [json.loads(json.dumps(data["codecs"][0]))]


def blosc(data: Any) -> None:
    settings = data["codecs"][0]["configuration"]
    settings["codecs"][1] = {"name": "blosc", "configuration": {"cname": "zstd", "clevel": 1}}


def plain_files(folder: pathlib.Path) -> None:
    """Say that arrays are plain files, whose path could lead out of the folder."""
    file = folder / "arrays" / "_METADATA"
    file.write_text(file.read_text().replace('"use_ocdbt": true', '"use_ocdbt": false'))


def long_keys(count: int) -> bytes:
    """Return a leaf in which each key repeats all but the end of the one before it."""
    same = ocdbt.varint(*[65_000] * (count - 1))
    ends = [b"x" * 65_000, *(i.to_bytes(2, "big") for i in range(count - 1))]
    ends = [ends[0] + b"\0", *ends[1:]]
    sizes = ocdbt.varint(*map(len, ends))
    values = ocdbt.varint(*[0] * count) + bytes(count)
    return b"\x00\x00" + ocdbt.varint(count) + same + sizes + b"".join(ends) + values


def long_paths(count: int) -> bytes:
    """Return a leaf that names many files by paths that repeat the one before."""
    ends = [b"p" * 65_000 + b"\0\0", *(i.to_bytes(2, "big") for i in range(1, count))]
    head = ocdbt.varint(count, *[65_000] * (count - 1), *map(len, ends), *[0] * count)
    return b"\x00" + head + b"".join(ends) + ocdbt.leaf([b"a"], [b"b"])[2:]


CASES: dict[str, tuple[Make, str]] = {
    "deep-meta": (deep_meta, "it holds a database in /meta/; expected one only in arrays"),
    "deep-process": (
        lambda f: ocdbt.put(
            f / "arrays/ocdbt.process_0",
            ocdbt.record(ocdbt.NODE, ocdbt.leaf([b"x/zarr.json"], [DEEP[:1_000] + DEEP[-1_000:]])),
        ),
        "x/zarr.json is nested too deeply",
    ),
    "bomb": (bomb, "takes more than|holds"),
    "bomb-asked": (bomb, "takes more than|holds"),
    "large-description": (value(ZARR, b" " * 10**6), "has 1,000,000 bytes; the limit is 65,536"),
    "garbage-description": (value(ZARR, b"{\x00"), "is not JSON"),
    "bomb-node": (node(ocdbt.packed(b"\0\0\x01\x01k", (0, 4 * 10**9))), "node of its database"),
    "bomb-manifest": (
        add(
            "arrays/manifest.ocdbt",
            ocdbt.record(ocdbt.MANIFEST, ocdbt.packed((0, 10**9)), compressed=True),
        ),
        "large manifest",
    ),
    "sparse-manifest": (sparse_manifest, "a large manifest"),
    "manifest-paths": (
        add(
            "arrays/manifest.ocdbt",
            ocdbt.record(
                ocdbt.MANIFEST,
                ocdbt.packed(bytes(17) + b"\x01\x01\x04\x00" + long_paths(60_000)[1:]),
                compressed=True,
            ),
        ),
        "a large manifest",
    ),
    "long-keys": (node(ocdbt.packed(long_keys(60_000))), "the index of its arrays takes more"),
    "long-paths": (node(ocdbt.packed(long_paths(60_000))), "the index of its arrays takes more"),
    "twice": (branches, "has a node twice"),
    "itself": (round_and_round, "has a node twice"),
    "outside": (
        node(ocdbt.pointing(b"x/zarr.json", "../../secret", 0, 2), compressed=False),
        "not in its folder: 'arrays/../../secret'",
    ),
    "absolute": (
        node(ocdbt.pointing(b"c/0", "/etc/passwd", 0, 2), compressed=False), "not in its folder"
    ),
    "too-long": (
        node(ocdbt.pointing(b"c/0", ocdbt.FILE, 0, 10**9), compressed=False), "is shorter"
    ),
    "other-manifest": (add("arrays/manifest.ocdbt", ocdbt.manifest(20, kind=1)), "of another kind"),
    "holes": (holes, "in a folder of"),
    "hard-links": (linked_blocks, "in a folder of"),
    "sparse-json": (sparse_json, "the limit of JSON is"),
    "sparse-node": (sparse_node, "the index of its arrays takes more"),
    "values": (add("arrays/array_metadatas/process_0", b"[" + b"[]," * 10**7 + b"[]]"), "values"),
    "deep-checkpoint": (add("_CHECKPOINT_METADATA", DEEP), "nested too deeply"),
    "deep-sharding": (add("arrays/_sharding", b" " * 10_000 + DEEP), "nested too deeply"),
    "deep-arrays": (add("arrays/array_metadatas/process_0", DEEP), "nested too deeply"),
    "deep-sealed": (add("meta/_strings.json", DEEP), "nested too deeply"),
    "fifo": (lambda f: os.mkfifo(f / "arrays/_sharding\n2"), "neither a file nor a folder"),
    "socket": (bound, "neither a file nor a folder"),
    "loop": (lambda f: (f / "arrays/loop").symlink_to("loop"), "is a link"),
    "upwards": (lambda f: (f / "arrays/d/up").symlink_to(".."), "is a link"),
    "small-chunks": (described(small_chunks), "one chunk a shard"),
    "many-chunks": (described(many_chunks), "chunks; it holds"),
    "nested-shards": (described(nested), "one chunk a shard"),
    "blosc": (described(blosc), "'blosc'"),
    "plain-files": (plain_files, "says that its arrays are not in a database"),
}  # fmt: skip


@pytest.fixture(scope="module")
def ends(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Return how reading each folder ended: its error, the seconds and the bytes."""
    root = tmp_path_factory.mktemp("hostile")
    sound = saved(root / "sound")
    (root / "secret").write_bytes(b"{}")
    for name, (make, _) in CASES.items():
        make(pathlib.Path(shutil.copytree(sound, root / name)))
    command = [sys.executable, "-c", RESTORE, str(sound), *(str(root / name) for name in CASES)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    found = {
        pathlib.Path(row[0]).name: row[1:] for row in map(json.loads, done.stdout.splitlines())
    }
    last = [name for name in CASES if name not in found][:1]
    found["died"] = f"{last}: {done.returncode} {done.stderr[-2_000:]}"
    return found


@pytest.mark.few(18)
@pytest.mark.parametrize("name", CASES)
def test_it_ends_in_an_error(ends: dict[str, Any], name: str) -> None:
    assert name in ends, ends["died"]
    error, seconds, size = ends[name]
    assert error is not None, "it was read"
    with pytest.raises(LoraError, match=CASES[name][1]):
        raise LoraError(error)
    assert "not ours" not in error and len(error) < 2_000
    assert seconds < 2 and size < 300e6


def test_what_is_saved_is_read(tmp_path: pathlib.Path) -> None:
    targets = tuple(
        lora_jax.Target(f"layer{i}/kernel", (4, 4), (), (0,), (1,), 1, 1.0) for i in range(200)
    )
    layout = lora_jax.Layout(targets)
    one = lora_jax.Factors(jnp.ones((4, 1)), jnp.ones((1, 4)))
    lora_jax.save(tmp_path / "a", (layout, {t.path: one for t in targets}))
    assert lora_jax.restore(tmp_path / "a", max_bytes=200 * 32).layout == layout


@pytest.mark.parametrize("make", [pathlib.Path.touch, pathlib.Path.mkdir])
def test_too_many_files_or_folders(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, make: Callable[[pathlib.Path], None]
) -> None:
    """Empty folders count as files do."""
    folder = saved(tmp_path / "a")
    for i in range(100):
        make(folder / str(i))
    monkeypatch.setattr("lora_jax.checkpoint.folder.ENTRIES", 100)
    with pytest.raises(LoraError, match="holds more than 100 files and folders"):
        lora_jax.restore(folder)
