"""Codes and scales are placed as the weight is, and no block is divided."""

from typing import Any

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import lora_jax
from lora_jax.bases.placement import placed
from lora_jax.bases.quantise import quantize

MESH = {"data": 1, "fsdp": 4, "tensor": 2}


def base(scheme: str, shape: tuple[int, ...] = (256, 24), lead: int = 0, **how: Any) -> Any:
    w = jax.random.normal(jax.random.key(0), shape)
    axes = range(len(shape))
    target = lora_jax.Target(
        "w", shape, tuple(axes[:lead]), tuple(axes[lead:-1]), (axes[-1],), 1, 1.0
    )
    return quantize({"w": w}, scheme, lora_jax.Layout((target,)), **how)["w"]


def test_rows_and_blocks() -> None:
    got = placed(base("nf4"), P("fsdp", "tensor"), MESH, "w")
    assert (got.codes, got.scales) == (P("tensor", "fsdp"), P("tensor", "fsdp"))
    got = placed(base("int8"), P("fsdp", "tensor"), MESH, "w")
    assert (got.codes, got.scales) == (P("tensor", "fsdp"), P("tensor", None))
    got = placed(base("int8", (3, 256, 24), 1), P("data", ("fsdp", "tensor")), MESH, "w")
    assert (got.codes, got.scales) == (P("data", None, ("fsdp", "tensor")), P("data", None, None))
    got = placed(base("nf4", double=True), P("fsdp"), MESH, "w")
    assert (got.scales.codes, got.scales.scales, got.scales.offset) == (P(None, "fsdp"), P(), P())
    across = base("nf4", (96, 128))  # blocks run on over the outputs: only these can be sharded
    assert placed(across, P(None, "fsdp"), MESH, "w").codes == P(None, "fsdp")


@pytest.mark.parametrize(
    ("weight", "spec", "says"),
    [
        (("nf4", (192, 24)), P("fsdp"), "4 shards over fsdp would cut a block.*1, 3 shards"),
        (("nf4", (96, 42)), P(None, "fsdp"), "4 shards over fsdp would cut a block"),
        (("nf4", (96, 128)), P("fsdp"), r"axes of sizes \[128, 96\] are one"),
        (("int8", (4, 64, 24)), P(None, "fsdp"), r"axes of sizes \[4, 64\] are one"),
        (("int8", (256, 6)), P(None, "fsdp"), "1, 2, 3, 6 shards would do"),
    ],
)
def test_what_would_cut_a_block_is_refused(
    weight: tuple[str, tuple[int, ...]], spec: P, says: str
) -> None:
    with pytest.raises(lora_jax.LoraError, match=f"^'w'.*{says}"):
        placed(base(*weight), spec, MESH, "w")


@pytest.mark.parametrize("scheme", ["nf4", "int8", "int4", "fp8"])
def test_a_sharded_base_gives_the_same_floats(scheme: str) -> None:
    mesh = jax.make_mesh((2, 4), ("tensor", "fsdp"), axis_types=(AxisType.Auto,) * 2)
    w = base(scheme, (3, 256, 24), 1)
    specs = placed(w, P(None, "fsdp", "tensor"), mesh.shape, "w")
    shardings = jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs)
    spread = jax.device_put(w, shardings)
    assert spread.codes.addressable_shards[0].data.size == w.codes.size // 8
    dense = jax.jit(lambda w: w.dense())
    np.testing.assert_array_equal(dense(spread), dense(w))
