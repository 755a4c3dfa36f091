"""Quantised weights that are gathered as codes."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import lora_jax
from lora_jax import sharding
from lora_jax.planner import collectives, hlo


@pytest.mark.parametrize("scheme", ["int8", "nf4"])
def test_gathered_codes_give_the_same_gradients(scheme: str) -> None:
    """Over fsdp codes and not floats are gathered, and outputs and gradients are the same."""
    mesh = jax.make_mesh((2, 2), ("fsdp", "tensor"), axis_types=(AxisType.Auto,) * 2)
    f = lambda params, x: jnp.tanh(x @ params["up"]) @ params["down"]  # noqa: E731
    keys = jax.random.split(jax.random.key(0), 3)
    params: Any = {
        "up": jax.random.normal(keys[0], (256, 512)),
        "down": jax.random.normal(keys[1], (512, 256)),
    }
    x = jax.random.normal(keys[2], (8, 256))
    spec = lora_jax.LoraSpec(rank=2, targets="**")
    params = lora_jax.quantize(params, scheme, lora_jax.resolve(spec, f, params, x))
    layout = lora_jax.resolve(spec, f, params, x)
    adapters = lora_jax.init(jax.random.key(1), layout)
    gradient = jax.grad(lambda a, p, x: jnp.sum(lora_jax.adapt(layout, f)(p, a, x) ** 2))
    expected = gradient(adapters, params, x)
    specs = {"up": P("fsdp", "tensor"), "down": P("tensor", "fsdp")}
    tree = sharding.tree_of(specs, params, dict(mesh.shape))
    placed = jax.tree.map(lambda x, s: jax.device_put(x, NamedSharding(mesh, s)), params, tree)
    rows = jax.device_put(x, NamedSharding(mesh, P("fsdp")))
    wrapped = sharding.gathered(placed)
    compiled = jax.jit(gradient).lower(adapters, wrapped, rows).compile()
    moved = collectives.collectives(hlo.parse(compiled.as_text()))
    gathers = {c.operand.dtype for c in moved if c.kind == "all-gather" and c.operand.size > 512}
    assert gathers == {"s8" if scheme == "int8" else "u8"}
    found = compiled(adapters, wrapped, rows)
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(x, y, atol=1e-6 * float(jnp.max(jnp.abs(y))))


def test_a_weight_that_is_not_sharded_stays_as_it_is() -> None:
    params = lora_jax.quantize({"w": jnp.ones((64, 64))}, "int8", "w")
    assert sharding.gathered(params)["w"] is params["w"]
