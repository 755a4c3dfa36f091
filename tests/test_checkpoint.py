"""`restore(save(x)) == x`, bit for bit, and never a base weight."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import chex
import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import lora_jax
from lora_jax import LoraError, LoraSpec, checkpoint

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


def test_restore_is_the_inverse_of_save(tmp_path: Path, trained: Any) -> None:
    """Red if a dtype, a factor or a field of the layout is lost on the way."""
    layout, adapters = trained
    lora_jax.save(tmp_path / "a", layout, adapters)
    again_layout, again = lora_jax.restore(tmp_path / "a")
    assert again_layout == layout
    chex.assert_trees_all_equal_shapes_and_dtypes(again, adapters)
    chex.assert_trees_all_equal(again, adapters)


def test_no_base_weight_is_on_disk(tmp_path: Path, trained: Any) -> None:
    """Noise does not compress: the folder holds the factors and little else."""
    layout, adapters = trained
    lora_jax.save(tmp_path / "a", layout, adapters)
    factors = sum(x.nbytes for x in jax.tree.leaves(adapters))
    assert folder_bytes(tmp_path / "a") < factors + 20_000 < PARAMS["enc"]["q"].nbytes


def test_the_head_travels_beside_the_adapters(tmp_path: Path, trained: Any) -> None:
    layout, adapters = trained
    head, _ = lora_jax.frozen.split(PARAMS, ("head",))
    lora_jax.save(tmp_path / "a", layout, adapters, base=head)
    chex.assert_trees_all_equal(checkpoint.restore_base(tmp_path / "a"), head)
    chex.assert_trees_all_equal(lora_jax.restore(tmp_path / "a")[1], adapters)


def test_an_empty_layout_and_a_head_alone(tmp_path: Path) -> None:
    layout = lora_jax.Layout()
    lora_jax.save(tmp_path / "none", layout, {})
    assert lora_jax.restore(tmp_path / "none") == (layout, {})
    lora_jax.save(tmp_path / "head", layout, {}, base={"head": PARAMS["head"]})
    assert lora_jax.restore(tmp_path / "head") == (layout, {})
    chex.assert_trees_all_equal(
        checkpoint.restore_base(tmp_path / "head"), {"head": PARAMS["head"]}
    )


def test_restore_onto_a_mesh(tmp_path: Path, trained: Any) -> None:
    """Red if the shardings argument is ignored."""
    layout, adapters = trained
    lora_jax.save(tmp_path / "a", layout, adapters)
    auto = (jax.sharding.AxisType.Auto,)
    mesh = jax.make_mesh((4,), ("fsdp",), axis_types=auto, devices=jax.devices()[:4])
    rows, whole = NamedSharding(mesh, P("fsdp")), NamedSharding(mesh, P())
    _, again = lora_jax.restore(tmp_path / "a", shardings=whole)
    assert all(x.sharding == whole for x in jax.tree.leaves(again))
    places = {
        "enc/q": lora_jax.Factors(rows, whole),
        "enc/v": lora_jax.Factors(whole, whole),
    }
    _, again = lora_jax.restore(tmp_path / "a", shardings=places)
    assert again["enc/q"].a.sharding == rows
    chex.assert_trees_all_equal(again, adapters)


def test_what_is_there_is_not_overwritten_unasked(tmp_path: Path, trained: Any) -> None:
    layout, adapters = trained
    lora_jax.save(tmp_path / "a", layout, adapters)
    with pytest.raises(LoraError, match="overwrite=True"):
        lora_jax.save(tmp_path / "a", layout, adapters)
    zeros = jax.tree.map(jnp.zeros_like, adapters)
    lora_jax.save(tmp_path / "a", layout, zeros, overwrite=True)
    chex.assert_trees_all_equal(lora_jax.restore(tmp_path / "a")[1], zeros)


def test_paths_without_an_adapter(tmp_path: Path, trained: Any) -> None:
    layout, adapters = trained
    lora_jax.save(tmp_path / "best", layout, adapters)
    with pytest.raises(LoraError, match=r"no adapter at .*bets(.|\n)*best"):
        lora_jax.restore(tmp_path / "bets")
    (tmp_path / "junk").mkdir()
    (tmp_path / "junk" / "file").write_text("x")
    with pytest.raises(LoraError, match="not an adapter"):
        lora_jax.restore(tmp_path / "junk")


def test_adapters_that_do_not_fit_are_not_written(tmp_path: Path, trained: Any) -> None:
    layout, adapters = trained
    with pytest.raises(LoraError, match="no factors"):
        lora_jax.save(tmp_path / "a", layout, {"enc/q": adapters["enc/q"]})
    assert not (tmp_path / "a").exists()
