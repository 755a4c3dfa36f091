"""A folder may hold only the arrays of its manifest: others would take unexpected memory."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import pytest
import tensorstore
from orbax.checkpoint import v1 as ocp

import lora_jax
from lora_jax import LoraError
from lora_jax.checkpoint import adapter

LAYOUT = lora_jax.Layout((lora_jax.Target("w", (4, 4), (), (0,), (1,), 2, 4.0),))
ADAPTERS = {"w": lora_jax.Factors(jnp.ones((4, 2)), jnp.ones((2, 4)))}
CHUNK = 2**22  # numbers
RESTORE = """
import resource, sys
import jax, lora_jax
jax.devices()
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
before = peak()
try:
    lora_jax.restore(sys.argv[1], max_bytes=1000)
except lora_jax.LoraError as error:
    print((peak() - before) * 1024, error)
"""


def saved(folder: Path, *, meta: dict[str, Any] | None = None, **parts: Any) -> Path:
    """Save an adapter with more in it than `lora_jax.save` writes."""
    lora_jax.save(folder.with_name("sound"), lora_jax.Adapter(LAYOUT, ADAPTERS))
    sealed = json.loads((folder.with_name("sound") / "meta" / "_strings.json").read_text())
    arrays = {"adapters": {"w": {"a": ADAPTERS["w"].a, "b": ADAPTERS["w"].b}}}
    parts = {"meta": {**sealed, **(meta or {})}, "arrays": arrays, **parts}
    ocp.save_checkpointables(folder, parts)
    return folder


def grow(part: Path, name: str, numbers: int) -> None:
    """Change a stored array of zeros to `numbers` numbers, with at most 64 chunks on disk."""
    store = tensorstore.KvStore.open({"driver": "ocdbt", "base": f"file://{part}/"}).result()
    zarr = json.loads(store.read(f"{name}/zarr.json").result().value)
    zarr["shape"] = [numbers]
    store.write(f"{name}/zarr.json", json.dumps(zarr).encode()).result()
    chunk = store.read(f"{name}/c/0").result().value
    for i in range(1, min(numbers // CHUNK, 64)):
        store.write(f"{name}/c/{i}", chunk).result()
    metadata = part / "_METADATA"
    metadata.write_text(metadata.read_text().replace(f"[{CHUNK}]", f"[{numbers}]"))


@pytest.mark.few(1)
@pytest.mark.parametrize("numbers", [2**28, 10**13])
def test_an_array_beside_the_manifest_takes_no_memory(tmp_path: Path, numbers: int) -> None:
    """An array that the manifest does not list takes no memory."""
    folder = saved(tmp_path / "a", meta={"x": jnp.zeros(CHUNK)})
    grow(folder / "meta", "x", numbers)
    command = [sys.executable, "-c", RESTORE, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    grown, _, said = done.stdout.partition(" ")
    assert int(grown) < 100e6
    assert said.startswith(f"{folder}: it holds a database in /meta/; expected one only in arrays")


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"meta": {"y": "z"}}, "its meta does not hold"),
        ({"state": {"x": jnp.ones(3)}}, "it holds .*state"),
        ({"arrays": {"adapters": {"w": {"a": jnp.ones((4, 2)), "b": jnp.ones((2, 4)),
          "c": jnp.ones(3)}}}}, r"does not list:\n  adapters/w/c"),
        ({"arrays": {"adapters": {"w": {"a": jnp.ones((4, 2)), "b": jnp.ones((3, 4))}}}},
         r"w/b is float32\[3, 4\], and was saved as float32\[2, 4\]"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("read", [lora_jax.restore, adapter.restore_about])
def test_what_is_not_listed_is_refused(
    tmp_path: Path, more: dict[str, Any], said: str, read: Any
) -> None:
    folder = saved(tmp_path / "a", **more)
    with pytest.raises(LoraError, match=said) as caught:
        read(folder)
    assert str(folder) in str(caught.value)


def test_the_helper_writes_what_is_read(tmp_path: Path) -> None:
    layout, adapters, _ = lora_jax.restore(saved(tmp_path / "a"))
    assert layout == LAYOUT and (adapters["w"].b == 1).all()
    (tmp_path / "a" / ".cache").mkdir()  # some tools leave one
    lora_jax.restore(tmp_path / "a")
