"""TensorStore reads the arrays that Orbax reads, and an adapter is checked once."""

from __future__ import annotations

import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax
from lora_jax.checkpoint import storage, stored_arrays
from lora_jax.serving import served_adapters

DTYPES = ("float32", "bfloat16", "float16", "int8", "uint32", "bool")


def test_both_readers_read_the_same(tmp_path: pathlib.Path) -> None:
    shapes = ((), (3,), (2, 0), (4, 2))
    names = {f"a.b/{d}.{len(s)}": jnp.full(s, 1, d) for d in DTYPES for s in shapes}
    tree = {"adapters": {"x/y.z": {"a": jnp.arange(6.0)}}, "base": names}
    folder = storage.absolute(tmp_path / "a")
    storage.write(folder, {"meta": {"text": "", "sha256": ""}, "arrays": tree})
    assert storage._described(folder, "arrays")[1] == stored_arrays.described(folder / "arrays")
    target = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree
    )
    theirs = storage.orbax().load_checkpointables(folder, {"arrays": target})["arrays"]
    ours = stored_arrays.load(folder / "arrays", target)
    for one, two in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        assert (one.shape, one.dtype, one.sharding) == (two.shape, two.dtype, two.sharding)
        np.testing.assert_array_equal(one, two)


def saved(folder: pathlib.Path, count: int) -> list[str]:
    layout = lora_jax.Layout((lora_jax.Target("w", (4, 4), (), (0,), (1,), 2, 4.0),))
    for i in range(count):
        adapters = lora_jax.init(jax.random.key(i), layout)
        lora_jax.save(folder / str(i), (layout, adapters), about={"number": i})
    return [str(folder / str(i)) for i in range(count)]


def test_each_manifest_is_read_once(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Opening three adapters reads three manifests, counts each, and gives what each alone is."""
    folders, read, steps = saved(tmp_path, 3), list[str](), list[tuple[int, int]]()
    plain = storage.read_manifest

    def counted(folder: Any, *rest: Any) -> Any:
        read.append(str(folder))
        return plain(folder, *rest)

    monkeypatch.setattr(storage, "read_manifest", counted)
    members = served_adapters._members([str(tmp_path)], False, lambda *step: steps.append(step))
    assert read == folders and steps == [(0, 3), (1, 3), (2, 3), (3, 3)]
    for member, folder in zip(members, folders, strict=True):
        layout, adapters, _ = lora_jax.restore(folder)
        assert member.layout == layout and member.about == {"number": int(member.name)}
        np.testing.assert_array_equal(member.parameters["w"].a, adapters["w"].a)


def test_the_first_bad_adapter_is_named(tmp_path: pathlib.Path) -> None:
    folders = saved(tmp_path, 3)
    (pathlib.Path(folders[1]) / "arrays" / "manifest.ocdbt").unlink()
    with pytest.raises(lora_jax.LoraError, match=rf"{folders[1]} is damaged"):
        served_adapters._members([str(tmp_path)], False, lambda number, total: None)
