"""Quantised weights on a mesh: the axis of their arrays that each mesh axis shards."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from lora_jax import sharding
from lora_jax.base import Base
from lora_jax.bases.quantise import quantize
from lora_jax.errors import LoraError
from lora_jax.layout import Layout, Target
from lora_jax.training.quantised import weight_spec

SIZES = {"fsdp": 4, "tensor": 2}
Axes = tuple[int, ...]


def layout(shape: Axes, stack: Axes, inputs: Axes, outputs: Axes) -> Layout:
    return Layout((Target("w", shape, stack, inputs, outputs, 1, 1.0),))


def quantised(scheme: str, shape: Axes, *roles: Axes, **options: Any) -> Any:
    """Quantise by shape alone, as a plan does."""
    params = {"w": jax.ShapeDtypeStruct(shape, jnp.bfloat16)}
    found = jax.eval_shape(lambda p: quantize(p, scheme, layout(shape, *roles), **options), params)
    return found["w"]


def specs(base: Any, spec: P) -> list[P]:
    placed = sharding.tree_of({"w": spec}, {"w": base}, SIZES)["w"]
    assert type(placed) is type(base)
    return jax.tree.leaves(placed, is_leaf=is_spec)


def is_spec(x: Any) -> bool:
    return isinstance(x, P)


STACK = ((3, 1024, 512), (0,), (1,), (2,))
HEADS = ((256, 8, 16), (), (0,), (1, 2))
BOTH, LEAD = P(None, "tensor", "fsdp"), P(None)


def test_outputs_are_rows_and_inputs_are_columns() -> None:
    placed = P(None, "fsdp", "tensor")
    assert specs(quantised("nf4", *STACK), placed) == [BOTH, BOTH]
    assert specs(quantised("nf4", *STACK, double=True), placed) == [BOTH, BOTH, LEAD, LEAD, LEAD]
    assert specs(quantised("int8", *STACK), placed) == [BOTH, P(None, "tensor", None)]
    assert (
        specs(quantised("int4", *STACK), P("tensor", None, "fsdp"))
        == [P("tensor", "fsdp", None)] * 2
    )


def test_the_first_of_several_output_axes_cuts_the_rows() -> None:
    base = quantised("nf4", *HEADS)
    assert specs(base, P("fsdp", "tensor")) == [P("tensor", "fsdp")] * 2
    with pytest.raises(LoraError, match=r"(?s)'w' is stored.*\[8, 16\].*only the first of them"):
        specs(base, P(None, None, "tensor"))


def test_a_block_is_never_cut() -> None:
    base = quantised("nf4", (128, 64), (), (0,), (1,))
    with pytest.raises(LoraError, match=r"4 shards over fsdp would cut a block.* 1, 2 shards"):
        specs(base, P("fsdp", "tensor"))
    # With 100 inputs, blocks of 64 run across the ends of the outputs. Four shards of the outputs
    # still end between two blocks.
    base = quantised("nf4", (100, 64), (), (0,), (1,))
    assert specs(base, P(None, "fsdp")) == [P(None, "fsdp")] * 2
    with pytest.raises(LoraError, match="8 shards over fsdp and tensor would cut a block"):
        specs(base, P(None, ("fsdp", "tensor")))


@pytest.mark.parametrize("spec", [P(None, "fsdp", "tensor"), P("tensor"), P(None, None, "fsdp")])
def test_the_placement_of_the_floats_is_found_again(spec: P) -> None:
    grid = jax.make_mesh((4, 2), ("fsdp", "tensor"), axis_types=(AxisType.Auto,) * 2)
    shape, *roles = (4, 256, 512), (0,), (1,), (2,)
    for scheme in ("nf4", "int8"):
        base = quantised(scheme, shape, *roles)
        tree = sharding.tree_of({"w": spec}, {"w": base}, SIZES)["w"]
        where = jax.tree.map(lambda s: NamedSharding(grid, s), tree, is_leaf=is_spec)
        assert weight_spec(base, where) == P(*spec, *[None] * (3 - len(spec)))


@dataclasses.dataclass(frozen=True)
class Doubled(Base):
    """A base that the package does not know: half the weight, and a number for each layer."""

    half: Any
    layer: Any

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.half.shape)

    @property
    def dtype(self) -> Any:
        return self.half.dtype

    def dense(self) -> Any:
        return 2 * self.half


jax.tree_util.register_dataclass(Doubled, ["half", "layer"], [])


def test_a_base_of_another_kind() -> None:
    base = Doubled(jnp.ones((4, 8, 2)), jnp.ones(4))
    assert specs(base, P("tensor", "fsdp")) == [P("tensor", "fsdp"), P("tensor")]


def test_each_device_dequantises_its_own_part() -> None:
    grid = jax.make_mesh((4, 2), ("fsdp", "tensor"), axis_types=(AxisType.Auto,) * 2)
    shape, *roles = (2, 512, 64), (0,), (1,), (2,)
    w = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    alone = quantize({"w": jnp.asarray(w)}, "nf4", layout(shape, *roles), double=True)
    tree = sharding.tree_of({"w": P(None, "fsdp", "tensor")}, alone, dict(grid.shape))
    where = jax.tree.map(lambda s: NamedSharding(grid, s), tree, is_leaf=is_spec)
    placed = jax.device_put(alone, where)["w"]
    assert placed.codes.addressable_shards[0].data.size * 8 == placed.codes.size
    dense = jax.jit(lambda base: base.dense())
    np.testing.assert_array_equal(dense(placed), dense(alone["w"]))
