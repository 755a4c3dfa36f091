"""`restore(save(x)) == x`, bit for bit and without base weights; or an error that says why not."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import shutil
from pathlib import Path
from typing import Any

import chex
import jax
import jax.numpy as jnp
import pytest
import tensorstore
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import lora_jax
from lora_jax import Adapter, LoraError, LoraSpec
from lora_jax.checkpoint import adapter
from lora_jax.checkpoint.saved_adapter import SavedAdapter
from lora_jax.errors import DamagedError

PARAMS = {
    "enc": {"q": jnp.ones((512, 512)), "v": jnp.ones((2, 512, 256))},
    "head": jnp.ones((256, 3)),
}


def model(p: Any, x: Any) -> Any:
    return jnp.einsum("lbd,ldk->lbk", x @ p["enc"]["q"], p["enc"]["v"]) @ p["head"]


@pytest.fixture
def trained() -> tuple[lora_jax.Layout, lora_jax.adapters.Adapters]:
    layout = lora_jax.resolve(LoraSpec(4, 8.0, "enc/*"), model, PARAMS, jnp.ones((2, 3, 512)))
    adapters = lora_jax.init(jax.random.key(0), layout)
    adapters = jax.tree.map(lambda x: x + jax.random.normal(jax.random.key(1), x.shape), adapters)
    adapters["enc/v"] = jax.tree.map(lambda x: x.astype(jnp.bfloat16), adapters["enc/v"])
    return layout, adapters


def folder_bytes(path: Path) -> int:
    return sum(os.path.getsize(p) for p in path.rglob("*") if p.is_file())


@pytest.mark.parametrize("full", [False, True], ids=["factors", "none"])
@pytest.mark.parametrize("head", [{}, {"head": PARAMS["head"]}], ids=["", "head"])
def test_restore_is_the_inverse_of_save(
    head: Any, full: bool, tmp_path: Path, trained: Any
) -> None:
    layout, adapters = (lora_jax.Layout(), {}) if full else trained
    lora_jax.save(tmp_path / "a", Adapter(layout, adapters, head))
    again_layout, *again = lora_jax.restore(tmp_path / "a")
    assert again_layout == layout
    chex.assert_trees_all_equal_shapes_and_dtypes(again, [adapters, head])
    chex.assert_trees_all_equal(again, [adapters, head])


def test_no_base_weight_is_on_disk(tmp_path: Path, trained: Any) -> None:
    """The folder holds the factors and little else: noise does not compress."""
    layout, adapters = trained
    lora_jax.save(tmp_path / "a", Adapter(layout, adapters))
    factors = sum(x.nbytes for x in jax.tree.leaves(adapters))
    assert folder_bytes(tmp_path / "a") < factors + 20_000 < PARAMS["enc"]["q"].nbytes


def test_restore_onto_a_mesh(tmp_path: Path, trained: Any) -> None:
    layout, adapters = trained
    lora_jax.save(tmp_path / "a", Adapter(layout, adapters))
    auto = (jax.sharding.AxisType.Auto,)
    mesh = jax.make_mesh((4,), ("fsdp",), axis_types=auto, devices=jax.devices()[:4])
    rows, whole = NamedSharding(mesh, P("fsdp")), NamedSharding(mesh, P())
    _, again, _ = lora_jax.restore(tmp_path / "a", shardings=whole)
    assert all(x.sharding == whole for x in jax.tree.leaves(again))
    places = {
        "enc/q": lora_jax.Factors(rows, whole),
        "enc/v": lora_jax.Factors(whole, whole),
    }
    _, again, _ = lora_jax.restore(tmp_path / "a", shardings=places)
    assert again["enc/q"].a.sharding == rows
    chex.assert_trees_all_equal(again, adapters)


def test_what_is_there_is_not_overwritten_unasked(tmp_path: Path, trained: Any) -> None:
    layout, adapters = trained
    lora_jax.save(tmp_path / "a", Adapter(layout, adapters))
    with pytest.raises(LoraError, match="overwrite=True"):
        lora_jax.save(tmp_path / "a", Adapter(layout, adapters))
    zeros = jax.tree.map(jnp.zeros_like, adapters)
    lora_jax.save(tmp_path / "a", Adapter(layout, zeros), overwrite=True)
    chex.assert_trees_all_equal(lora_jax.restore(tmp_path / "a")[1], zeros)


def test_paths_without_an_adapter(tmp_path: Path, trained: Any) -> None:
    layout, adapters = trained
    lora_jax.save(tmp_path / "best", Adapter(layout, adapters))
    with pytest.raises(LoraError, match=r"no adapter at .*bets(.|\n)*best"):
        lora_jax.restore(tmp_path / "bets")
    (tmp_path / "junk").mkdir()
    (tmp_path / "junk" / "file").write_text("x")
    with pytest.raises(LoraError, match="not an adapter"):
        lora_jax.restore(tmp_path / "junk")


def test_adapters_that_do_not_fit_are_not_written(tmp_path: Path, trained: Any) -> None:
    layout, adapters = trained
    with pytest.raises(LoraError, match="no factors"):
        lora_jax.save(tmp_path / "a", Adapter(layout, {"enc/q": adapters["enc/q"]}))
    assert not (tmp_path / "a").exists()


# ---- damage

# If several reads fail, Orbax raises the first error, and Python warns of the others later.
ABANDONED = "ignore::pytest.PytestUnraisableExceptionWarning"


def saved(folder: Path, **options: Any) -> Path:
    """Save a small adapter and a head."""
    lora_jax.save(folder, Adapter(SMALL, small_adapters(), {"head": jnp.arange(3.0)}), **options)
    return folder


SMALL = lora_jax.Layout((lora_jax.Target("enc/q", (6, 4), (), (0,), (1,), 2, 2.0),))
BASE = {"enc": {"q": jnp.ones((6, 4)), "b": jnp.zeros(4)}, "head": jnp.zeros(3)}


def small_adapters() -> dict[str, lora_jax.Factors]:
    return {"enc/q": lora_jax.Factors(jnp.arange(12.0).reshape(6, 2), jnp.ones((2, 4), "bfloat16"))}


@pytest.mark.filterwarnings(ABANDONED)
def test_whatever_is_damaged_is_an_error_or_the_same_numbers(tmp_path: Path) -> None:
    """A file that is missing, cut or has a flipped bit gives an error or the same numbers."""
    whole = saved(tmp_path / "whole")
    refused = set()
    for file in sorted(p.relative_to(whole) for p in whole.rglob("*") if p.is_file()):
        data = (whole / file).read_bytes()
        changed = [
            bytes([*data[:i], data[i] ^ 4, *data[i + 1 :]]) for i in range(0, len(data), 131)
        ]
        for damaged in (None, data[: len(data) // 2], *changed[:4]):
            copy = Path(shutil.copytree(whole, tmp_path / "copy"))
            (copy / file).unlink()
            if damaged is not None:
                (copy / file).write_bytes(damaged)
            try:
                chex.assert_trees_all_equal(lora_jax.restore(copy), lora_jax.restore(whole))
            except LoraError:
                refused.add(file.parts[0])
            shutil.rmtree(copy)
    assert {"arrays", "meta"} <= refused


def test_an_array_of_another_adapter_is_named(tmp_path: Path) -> None:
    ours, other = saved(tmp_path / "ours"), tmp_path / "other"
    zeros = jax.tree.map(jnp.zeros_like, small_adapters())
    lora_jax.save(
        other,
        Adapter(SMALL, {"enc/q": zeros["enc/q"]._replace(b=small_adapters()["enc/q"].b)}),
    )
    shutil.rmtree(ours / "arrays")
    shutil.copytree(other / "arrays", ours / "arrays")
    with pytest.raises(DamagedError, match="base/head is missing"):
        lora_jax.restore(ours)
    lora_jax.save(other, Adapter(SMALL, zeros, {"head": jnp.arange(3.0)}), overwrite=True)
    shutil.rmtree(ours / "arrays")
    shutil.copytree(other / "arrays", ours / "arrays")
    with pytest.raises(DamagedError, match=r"adapters/enc/q/a holds other bits(.|\n)*q/b holds"):
        lora_jax.restore(ours)


# ---- the base


def test_another_base_is_refused(tmp_path: Path) -> None:
    folder = saved(tmp_path / "a", fingerprint=lora_jax.fingerprint(BASE))
    lora_jax.restore(folder, params=BASE)
    narrow = jax.tree.map(lambda x: x.astype(jnp.bfloat16), BASE)
    lora_jax.restore(folder, params=narrow)
    other = {**BASE, "enc": {**BASE["enc"], "b": jnp.ones(4)}}
    with pytest.raises(LoraError, match=r"another base: 1 of 2 (.|\n)*enc/b: other values"):
        lora_jax.restore(folder, params=other)
    lora_jax.restore(folder, params=other, allow_other_base=True)


def test_what_was_trained_beside_is_not_the_base(tmp_path: Path) -> None:
    folder = saved(tmp_path / "a", fingerprint=lora_jax.fingerprint(BASE))
    lora_jax.restore(folder, params={**BASE, "head": jnp.ones(9)})
    lora_jax.restore(folder, params={"enc": BASE["enc"]})
    with pytest.raises(LoraError, match="pooler: there was none of that name"):
        lora_jax.restore(folder, params={**BASE, "pooler": jnp.ones(2)})


def test_no_fingerprint_to_compare_with(tmp_path: Path) -> None:
    folder = saved(tmp_path / "a")
    with pytest.raises(LoraError, match="no fingerprint"):
        lora_jax.restore(folder, params=BASE)
    lora_jax.restore(folder, params=BASE, allow_other_base=True)


def test_a_fingerprint_taken_before_is_as_good_as_the_base(tmp_path: Path) -> None:
    folder = saved(tmp_path / "a", fingerprint=lora_jax.fingerprint(BASE))
    SavedAdapter.open(folder).check_base(lora_jax.fingerprint({**BASE, "head": jnp.ones(9)}))
    other = lora_jax.fingerprint({**BASE, "enc": {**BASE["enc"], "b": jnp.ones(4)}})
    with pytest.raises(LoraError, match=r"enc/b: other values"):
        SavedAdapter.open(folder).check_base(other)
    assert SavedAdapter.open(folder).trainable_shapes == {"head": tuple(BASE["head"].shape)}
    fresh = lora_jax.fingerprint({**BASE, "new": jnp.ones(2)})
    SavedAdapter.open(folder).check_base(fresh, fresh={"new", "enc/b"})
    with pytest.raises(LoraError, match="new: there was none of that name"):
        SavedAdapter.open(folder).check_base(fresh)
    with pytest.raises(LoraError, match=r"enc/b: other values"):  # it was there
        SavedAdapter.open(folder).check_base(other, fresh={"enc/b"})


def test_what_the_writer_says_comes_back(tmp_path: Path) -> None:
    about = {"labels": ["no", "yes"], "model": {"reference": "hub:a/b"}}
    folder = saved(tmp_path / "a", about=about)
    assert adapter.restore_about(folder) == about
    assert adapter.restore_about(saved(tmp_path / "b")) == {}


# ---- forged folders


def forge(folder: Path, change: Any) -> Path:
    """Rewrite the sealed text, as anyone can who knows the format."""
    file = folder / "meta" / "_strings.json"
    stored = json.loads(file.read_text())
    data = json.loads(stored["text"])
    change(data)
    text = json.dumps(data)
    sealed = {"text": text, "sha256": hashlib.sha256(text.encode()).hexdigest()}
    file.write_text(json.dumps(sealed))
    return folder


def declare(path: str, row: Any) -> Any:
    return lambda data: data["arrays"].update({path: row})


def huge_layout(data: Any) -> None:
    layout = json.loads(data["notes"]["layout"])
    layout["targets"][0]["shape"] = [2**40, 4]
    data["notes"]["layout"] = json.dumps(layout)
    data["arrays"]["adapters/enc/q/a"] = [[2**40, 2], "float32", "0" * 16]


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (
            huge_layout,
            r"arrays of 8,796,[\d,]+ bytes in a folder of (.|\n)*the limit is 268,435,456",
        ),
        (declare("base/x", [[2**28], "float32", "0"]), r"the limit is (.|\n)*base/x: float32\["),
        (declare("base/x", [[2] * 40, "float32", "0"]), "at most 32 dimensions"),
        (declare("base/x", [[-1], "float32", "0"]), "at least 0"),
        (declare("base/x", [[1.5], "float32", "0"]), "an integer"),
        (declare("base/x", [["9" * 99], "float32", "0"]), "an integer"),
        (declare("base/x", [[1], "no dtype", "0"]), "no dtype"),
        (declare("base/x", [[1], "O", "0"]), "."),
        (declare("base/x", "row"), "."),
        (declare("base/x", [[1], "float32", "0"]), "array base/x is missing"),
        (declare("base/../../x", [[1], "float32", "0"]), "lead out of its folder"),
        (declare("/etc/passwd", [[1], "float32", "0"]), "lead out of its folder"),
        (lambda data: data["notes"].update(base=["../../x"]), "contradict"),
        (lambda data: data["notes"].update(layout="{"), "not a layout"),
        (lambda data: data["notes"].update(layout="[" * 200_000), "."),
        (lambda data: data.pop("notes"), "notes"),
        (lambda data: data.update(format=3), "format 3"),
    ],
)
def test_forged_texts_are_refused(tmp_path: Path, change: Any, match: str) -> None:
    folder = forge(saved(tmp_path / "a"), change)
    with pytest.raises(LoraError, match=match) as caught:
        lora_jax.restore(folder)
    assert str(folder) in str(caught.value) and len(str(caught.value)) < 2000


def test_the_limit_is_the_callers(tmp_path: Path) -> None:
    folder = saved(tmp_path / "a")
    with pytest.raises(LoraError, match=r"declares arrays of 76 bytes(.|\n)*max_bytes=76"):
        lora_jax.restore(folder, max_bytes=75)
    lora_jax.restore(folder, max_bytes=76)


def test_a_chunk_larger_than_its_array_is_refused(tmp_path: Path) -> None:
    """A chunk that would unpack into 4 GB is refused, although the shape is as declared."""
    folder = saved(tmp_path / "a")
    spec = {"driver": "ocdbt", "base": f"file://{folder}/arrays/"}
    store = tensorstore.KvStore.open(spec).result()
    key = "adapters.enc/q.a/zarr.json"
    zarr = json.loads(store.read(key).result().value)
    zarr["chunk_grid"]["configuration"]["chunk_shape"] = [2**15, 2**15]
    for codec in zarr["codecs"]:
        if codec["name"] == "sharding_indexed":
            codec["configuration"]["chunk_shape"] = [2**15, 2**15]
    store.write(key, json.dumps(zarr).encode()).result()
    with pytest.raises(LoraError, match=r"enc/q/a(.|\n)*32768"):
        lora_jax.restore(folder)


def test_links_and_special_files_are_refused(tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("x")
    for name, make in (
        ("file", lambda p: p.symlink_to(secret)),
        ("folder", lambda p: p.symlink_to(tmp_path)),
        ("pipe", lambda p: os.mkfifo(p)),
    ):
        folder = saved(tmp_path / name)
        make(folder / "arrays" / "extra")
        with pytest.raises(LoraError, match=r"out of its folder|neither a file nor a folder"):
            lora_jax.restore(folder)
    folder = saved(tmp_path / "inside")
    (tmp_path / "alias").symlink_to(folder)
    lora_jax.restore(tmp_path / "alias")


def test_too_much_json_is_not_read(tmp_path: Path) -> None:
    folder = saved(tmp_path / "a")
    with open(folder / "arrays" / "_METADATA", "r+b") as file:
        file.truncate(2**26 + 1)
    with pytest.raises(LoraError, match="the limit of JSON is 67,108,864"):
        lora_jax.restore(folder)


def test_restoring_neither_unpickles_nor_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = saved(tmp_path / "a", fingerprint=lora_jax.fingerprint(BASE))
    before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")}

    def poison(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("something was unpickled")

    for name in ("load", "loads", "Unpickler", "_load", "_loads", "_Unpickler"):
        monkeypatch.setattr(pickle, name, poison)
    lora_jax.restore(folder, params=BASE)
    lora_jax.restore(folder)
    assert {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")} == before
