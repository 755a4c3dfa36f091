"""The planner reads a compiled program, and compiles another dtype in place of bfloat16."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from lora_jax.planner import (
    bf16_lowering,
    collectives,
    hlo,
    measure,
    plan,
)
from lora_jax.training import mesh
from lora_jax.training.config import MeshConfig


def grid(data: int, fsdp: int, tensor: int) -> jax.sharding.Mesh:
    count = data * fsdp * tensor
    return mesh.make(MeshConfig(data, fsdp, tensor), plan.simulated(count))


# ---- reading HLO


def compiled(f: Any, on: jax.sharding.Mesh, *arrays: tuple[tuple[int, ...], P]) -> hlo.Module:
    shapes = [
        jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(on, spec))
        for shape, spec in arrays
    ]
    return hlo.parse(jax.jit(f).lower(*shapes).compile(measure.OPTIONS).as_text())


def test_collectives_of_a_product_with_a_known_placement() -> None:
    """Cut along the summed axis, a product has one sum of [32, 16] over `tensor`'s four devices."""
    on = grid(1, 2, 4)
    module = compiled(jnp.dot, on, ((32, 64), P(None, "tensor")), ((64, 16), P("tensor")))
    (found,) = collectives.collectives(module)
    assert (found.kind, found.operand.bytes, found.times) == ("all-reduce", 32 * 16 * 4, 1)
    assert found.group == (0, 1, 2, 3)


def test_collectives_in_a_loop_count_as_often_as_it_runs() -> None:
    """Each of 5 layers gathers its [64, 64] weight, of which a device holds a half."""

    def f(x: Any, w: Any) -> Any:
        rows = NamedSharding(on, P("fsdp"))
        step = lambda x, w: (jax.lax.with_sharding_constraint(jnp.tanh(x @ w), rows), None)  # noqa: E731
        return jax.lax.scan(step, x, w)[0]

    on = grid(1, 2, 1)
    module = compiled(f, on, ((4096, 64), P("fsdp")), ((5, 64, 64), P(None, "fsdp")))
    (found,) = collectives.collectives(module)
    assert (found.kind, found.group, found.times) == ("all-gather", (0, 1), 5)
    assert found.operand.bytes * 2 == 64 * 64 * 4
    assert sum(p.flops * p.times for p in hlo.products(module)) == 5 * 2 * 2048 * 64 * 64


def stack(x: Any, w: Any, scanned: bool) -> Any:
    layer = lambda x, w: jnp.tanh(jnp.tanh(x @ w) @ w.T)  # noqa: E731
    if scanned:
        return jax.lax.scan(lambda x, w: (layer(x, w), None), x, w)[0].sum()
    for each in w:
        x = layer(x, each)
    return x.sum()


def test_flops_of_a_scan_are_those_that_xla_counts_unrolled() -> None:
    shapes = [jax.ShapeDtypeStruct(s, jnp.float32) for s in ((512, 256), (4, 256, 512))]

    def gradient(scanned: bool) -> Any:
        f = jax.grad(functools.partial(stack, scanned=scanned), (0, 1))
        return jax.jit(f).lower(*shapes).compile(measure.OPTIONS)

    ours = sum(p.flops * p.times for p in hlo.products(hlo.parse(gradient(True).as_text())))
    assert ours == pytest.approx(gradient(False).cost_analysis()["flops"], rel=0.02)
    assert ours > 2 * gradient(True).cost_analysis()["flops"]


@pytest.mark.parametrize(
    ("text", "group"),
    [
        ("replica_groups={{0,4},{1,5}}, x", (0, 4)),
        ("replica_groups={}", tuple(range(8))),
        ("replica_groups=[2,4]<=[8]", (0, 1, 2, 3)),
        ("replica_groups=[2,4]<=[2,2,2]T(0,2,1)", (0, 2, 1, 3)),
        ("replica_groups=mesh['a'=2,'b'=4] {'a'}, x", (0, 4)),
        ("replica_groups=mesh['a'=2,'b'=4] {'a','b'}", tuple(range(8))),
        ("replica_groups=mesh['a'=4,'b'=2], device_ids=([2,4]T(1,0)) {'b'}, x", (0, 4)),
        ("replica_groups=mesh['a'=8] {'a':(2)2}", (0, 2)),
        ("source_target_pairs={{0,0},{1,4},{2,1}}, x", (1, 4)),
    ],
)
def test_groups_in_every_way_that_xla_writes_them(text: str, group: tuple[int, ...]) -> None:
    assert collectives.first_group(text, 8) == group


# ---- float16 in bfloat16's place


def test_half_has_no_bfloat16_left_and_the_same_shapes() -> None:
    def f(x: Any, w: Any) -> Any:
        x = jax.nn.gelu(x).astype(jnp.bfloat16) + jnp.bfloat16(-jnp.inf)
        body = jax.checkpoint(lambda x, w: (jnp.where(x > 0, x, 0) @ w, x.sum()))
        return jax.lax.scan(body, x, w)

    shapes = [
        jax.ShapeDtypeStruct((8, 16), jnp.float32, sharding=None),
        jax.ShapeDtypeStruct((3, 16, 16), jnp.bfloat16, sharding=None),
    ]
    halved = bf16_lowering.in_float16(f, *shapes)
    assert halved is not None
    lowered = jax.jit(halved).lower(*bf16_lowering.shapes(shapes))
    assert "bf16" in jax.jit(f).lower(*shapes).as_text()
    assert "bf16" not in lowered.as_text()
    assert jax.tree.map(jnp.shape, jax.eval_shape(f, *shapes)) == jax.tree.map(
        jnp.shape, jax.eval_shape(halved, *bf16_lowering.shapes(shapes))
    )
    assert bf16_lowering.in_float16(jnp.sin, shapes[0]) is None
