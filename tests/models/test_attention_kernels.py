"""The TPU kernel gives the attention of plain products, on one device and on a mesh, and programs
for a TPU or a GPU have the kernel of their platform."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import Array
from jax.sharding import AxisType

import lora_jax
from lora_jax import models
from lora_jax.models import attention, attention_kernels
from lora_jax.models.sight import Sight, visible

ROWS, LENGTH, HEADS, KEY_HEADS, WIDTH = 4, 256, 4, 2, 64
REAL = np.arange(LENGTH)[None] < np.array([[LENGTH], [100], [131], [7]])
PACKED = np.arange(LENGTH)[None] // np.array([[50], [90], [128], [17]])
SIGHTS: dict[str, dict[str, Any]] = {
    "all see all": {},
    "causal": {"causal": True},
    "window": {"causal": True, "window": 40},
    "window on both sides": {"window": 40},
    "padding": {"mask": jnp.asarray(REAL)},
    "causal padding": {"mask": jnp.asarray(REAL), "causal": True},
    "packed rows": {"segment_ids": jnp.asarray(PACKED), "causal": True},
    "all at once": {
        "mask": jnp.asarray(REAL), "segment_ids": jnp.asarray(PACKED), "causal": True, "window": 9,
    },
}  # fmt: skip


def draw(seed: int, heads: int) -> Array:
    return jax.random.normal(jax.random.key(seed), (ROWS, LENGTH, heads, WIDTH))


def results(attend: Callable[..., Array], sight: Sight, cap: float | None) -> Any:
    """Return the outputs of real tokens, and the gradients of query, key and value."""
    real = 1.0 if sight.real is None else sight.real[:, :, None, None]

    def loss(*heads: Array) -> tuple[Array, Array]:
        out = attend(*heads, sight, scale=0.2, cap=cap) * real
        return jnp.sum(out * draw(3, HEADS)), out

    arrays = (draw(0, HEADS), draw(1, KEY_HEADS), draw(2, KEY_HEADS))
    return jax.jit(jax.grad(loss, (0, 1, 2), has_aux=True))(*arrays)


splash = functools.partial(attention_kernels.splash, interpret=True)
assert_close = functools.partial(chex.assert_trees_all_close, rtol=2e-4, atol=2e-5)


@pytest.mark.few(3)
@pytest.mark.parametrize("options", SIGHTS.values(), ids=SIGHTS)
def test_splash_is_the_whole(options: dict[str, Any]) -> None:
    sight = visible(LENGTH, **options)
    cap = 3.0 if "window" in options else None
    assert_close(results(splash, sight, cap), results(attention.attend, sight, cap))


@pytest.mark.few(1)
@pytest.mark.parametrize("sizes", [(2, 2, 2), (8, 1, 1), (1, 2, 4)], ids=str)
def test_splash_on_a_mesh(sizes: tuple[int, int, int]) -> None:
    """Rows or heads that do not divide are computed by every device."""
    sight = visible(LENGTH, **SIGHTS["packed rows"])
    want = results(attention.attend, sight, None)
    mesh = jax.make_mesh(sizes, ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)
    with jax.set_mesh(mesh):
        assert_close(results(splash, sight, None), want)


@functools.cache
def lowered(platform: str, dtype: str = "bfloat16") -> str:
    """Return the program of an adapted step of a decoder over a long row."""
    config = models.DecoderConfig(
        vocab_size=64, hidden_size=256, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=64,
        max_positions=2048, mlp_size=512, dtype=jnp.dtype(dtype), scan_layers=True, remat="full",
    )  # fmt: skip
    model, ids = models.DecoderModel(config), jnp.zeros((1, attention.LONG), jnp.int32)
    params = jax.eval_shape(lambda: model.init(jax.random.key(0), ids[:, :8]))

    def loss(params: Any, ids: Array) -> Array:
        out: Array = model.apply(params, ids)
        return out.mean()

    layout = lora_jax.resolve(lora_jax.LoraSpec(rank=2, targets="all-linear"), loss, params, ids)
    assert len(layout.targets) == 7, "the products of a layer"
    adapters = jax.eval_shape(lambda: lora_jax.init(jax.random.key(0), layout))
    step = jax.jit(jax.grad(lora_jax.adapt(layout, loss), argnums=1))
    return step.trace(params, adapters, ids).lower(lowering_platforms=(platform,)).as_text()


def test_a_tpu_program_has_the_kernel() -> None:
    """The adapted program keeps the kernel, forward and for each gradient; a CPU's has none."""
    assert lowered("tpu").count("tpu_custom_call") == 4  # the forward pass runs twice
    assert "custom_call @tpu" not in lowered("cpu")


def test_a_cuda_program_has_the_kernel() -> None:
    pytest.importorskip("jax_cuda12_plugin")
    assert "__cudnn$fmhaSoftmaxBackward" in lowered("cuda")


@pytest.mark.parametrize(
    ("options", "length", "taken"),
    [
        ({"causal": True}, 1024, True),
        ({"causal": True}, 1000, False),
        ({"causal": True, "window": 7}, 1024, True),
    ],
)
def test_splash_takes_whole_rows(options: dict[str, Any], length: int, taken: bool) -> None:
    shapes = [jax.ShapeDtypeStruct((1, length, n, 64), jnp.float32) for n in (4, 2)]
    sight = visible(length, **options)
    for seen in (sight, sight.block(jnp.int32(0), 128)):
        found = attention_kernels.fitting(*shapes, seen, scale=1.0, cap=None)
        assert ("tpu" in found) == (taken and seen is sight)
