"""A workload with quantised weights: the choice of these weights, and their placement."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import llama_1b
from lora_jax import paths
from lora_jax.base import is_base
from lora_jax.bases.quantise import bytes_of, quantize
from lora_jax.errors import LoraError
from lora_jax.frozen import join, split
from lora_jax.training import mesh, sizes, summary
from lora_jax.training.config import MeshConfig
from lora_jax.training.quantised import quantised
from lora_jax.training.workload import Workload

CONFIG = llama_1b.StepConfig(
    workload=llama_1b.workload, layers=2, hidden=256, vocabulary=512, rows=8, length=16
)


def floats() -> Workload:
    """Return a decoder in float32, so that its weights are quantised from the values drawn here."""
    workload = llama_1b.workload(CONFIG)
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.float32), workload.params)
    random = np.random.default_rng(0)
    drawn = jax.tree.map(lambda x: random.normal(size=x.shape).astype(np.float32), shapes)
    return dataclasses.replace(workload, params=shapes, load=lambda _: drawn)


@functools.cache
def loaded(fsdp: int = 2, tensor: int = 2) -> tuple[Workload, mesh.Placement, Any]:
    workload = quantised(floats(), "nf4", double=True)
    grid = mesh.make(MeshConfig(fsdp=fsdp, tensor=tensor))
    with jax.set_mesh(grid):
        place = mesh.place(workload, MeshConfig(), grid, workload.example)
        return workload, place, workload.arrays(place.params)


def test_the_products_of_the_layers_are_quantised_and_nothing_else() -> None:
    workload, _, params = loaded()
    found = {p for p, leaf in paths.flatten(workload.params).items() if is_base(leaf)}
    layer = {f"attention/{n}" for n in "qkvo"} | {f"mlp/{n}" for n in ("gate", "up", "down")}
    assert found == {f"layers/{name}/kernel" for name in layer}
    assert paths.shapes(params) == paths.shapes(workload.params) == paths.shapes(floats().params)


def test_the_codes_are_those_of_the_floats_wherever_they_lie() -> None:
    _, place, params = loaded()
    given = paths.flatten(floats().load(None))
    path = "layers/mlp/down/kernel"
    held = paths.flatten(params)[path]
    for layer in range(CONFIG.layers):
        alone = quantize({"w": jnp.asarray(given[path][layer])}, "nf4", "w", double=True)["w"]
        np.testing.assert_array_equal(held.codes[layer], alone.codes)
        np.testing.assert_array_equal(held.scales.codes[layer], alone.scales.codes)
    assert held.codes.sharding == paths.flatten(place.params)[path].codes
    assert held.codes.sharding.spec == jax.sharding.PartitionSpec(None, "fsdp", "tensor")


def test_a_device_holds_its_share_of_the_codes_and_no_floats() -> None:
    _, _, params = loaded()
    held = {p: leaf for p, leaf in paths.flatten(params).items() if is_base(leaf)}
    numbers = sizes.parameters(held)
    assert bytes_of(held) < 0.52 * numbers + 2**14  # 4.127 bits each, and tables of scales
    assert sizes.on_each_device(held) < bytes_of(held) / 4 + 2**14
    assert sizes.parameters(params) == summary.parameters(floats().params)


def test_what_is_trained_in_full_is_not_quantised() -> None:
    patterns = ("layers/mlp/down/kernel",)
    params = quantised(floats(), "int8", trainable=patterns).params
    trained, rest = split(params, patterns)
    assert not is_base(trained[patterns[0]])
    assert jax.tree.structure(join(trained, rest)) == jax.tree.structure(params)
    with pytest.raises(LoraError, match=r"'layers/attention/k/kernel' and 0 more are quantised"):
        split(params, ("layers/attention/k/kernel",))


def test_a_mesh_that_would_cut_a_block_says_which_would_do() -> None:
    with pytest.raises(
        LoraError, match=r"(?s)8 shards over fsdp would cut a block.* 1, 2, 4 shards"
    ):
        loaded(fsdp=8, tensor=1)
