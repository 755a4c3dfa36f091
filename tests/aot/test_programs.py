"""Programs of a training step by the compilers of a TPU and of a GPU, which need neither.

Each test is skipped where the compiler is not installed (`lora-jax[plan-tpu,plan-cuda]`).
"""

from __future__ import annotations

import functools
import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

import lora_jax
from lora_jax.planner import real_compiler

pytestmark = [pytest.mark.slow, pytest.mark.standard_promotion]  # optax
LAYERS, WIDTH, HIDDEN = 4, 1024, 512  # of a scan over stacked weights
DEVICES = ("tpu-v5e", "h100-80gb")
BASES = ("bfloat16", "nf4")


class _Program(NamedTuple):
    text: str
    aliased: int
    state: int  # bytes of the adapters and of their optimizer's moments


def model(params: Any, x: jax.Array) -> jax.Array:
    def layer(h: jax.Array, w: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
        return h + jnp.tanh(h @ w[0]) @ w[1], None

    return jax.lax.scan(layer, x, (params["up"], params["down"]))[0]


@functools.cache
def program(device: str, base: str, kind: str) -> _Program:
    """Compile an Adam step of adapters on `up` and `down` for one device."""
    if said := real_compiler.missing(device):
        pytest.skip(said)
    target = real_compiler.target(device, 1, 1)
    shapes = {"up": (LAYERS, WIDTH, HIDDEN), "down": (LAYERS, HIDDEN, WIDTH)}
    params: Any = {name: jnp.zeros(shape, jnp.bfloat16) for name, shape in shapes.items()}
    x = jnp.ones((64, WIDTH), jnp.bfloat16)
    spec = lora_jax.LoraSpec(rank=4, targets=("up", "down"), kind=kind)
    layout = lora_jax.resolve(spec, model, params, x)
    if base == "nf4":
        params = lora_jax.quantize(params, "nf4", layout, double=True)
        layout = lora_jax.resolve(spec, model, params, x)
    adapters = lora_jax.init(jax.random.key(0), layout, params=params)
    tx, adapted = optax.adam(1e-3), lora_jax.adapt(layout, model)

    def loss(adapters: Any, params: Any, x: jax.Array) -> jax.Array:
        return jnp.sum(adapted(params, adapters, x).astype(jnp.float32) ** 2)

    def step(state: Any, params: Any, x: jax.Array) -> Any:
        adapters, moments = state
        updates, moments = tx.update(jax.grad(loss)(adapters, params, x), moments)
        return optax.apply_updates(adapters, updates), moments

    state = (adapters, tx.init(adapters))
    mesh = Mesh(np.array(target.devices).reshape(1), ("data",), axis_types=(AxisType.Auto,))
    place = NamedSharding(mesh, PartitionSpec())
    arguments = jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=place), (state, params, x)
    )
    traced = jax.jit(step, donate_argnums=0).trace(*arguments)
    made = traced.lower(lowering_platforms=(target.platform,)).compile()
    held = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    return _Program(made.as_text(), made.memory_analysis().alias_size_in_bytes, held)


every = pytest.mark.parametrize(
    ("device", "base", "kind"),
    [(d, b, k) for d in DEVICES for b in BASES for k in ("lora", "dora")],
)


@every
def test_a_quantised_stack_stays_in_codes(device: str, base: str, kind: str) -> None:
    """No float array has the shape of all layers' weights; a bfloat16 base is not widened."""
    text = program(device, base, kind).text
    wide = "f32" if base == "bfloat16" else "(?:f32|bf16|f16)"
    for shape in ((LAYERS, WIDTH, HIDDEN), (LAYERS, HIDDEN, WIDTH)):
        assert not re.search(rf"= {wide}\[{','.join(map(str, shape))}\]", text)


@every
def test_state_is_donated_and_nothing_goes_to_the_host(device: str, base: str, kind: str) -> None:
    found = program(device, base, kind)
    assert found.aliased >= found.state
    assert not re.search(r" (infeed|outfeed|send|recv)\(|MoveToHost", found.text)


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_a_tpu_gathers_no_single_numbers(kind: str) -> None:
    assert " gather(" not in program("tpu-v5e", "nf4", kind).text
