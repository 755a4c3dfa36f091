"""Attention in blocks of queries is attention of all queries at once, and so are its gradients."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import Array

from lora_jax.models import attention
from lora_jax.models.sight import visible

BATCH, HEADS, KEY_HEADS, WIDTH = 2, 4, 2, 8
OPTIONS: dict[str, dict[str, Any]] = {
    "all see all": {},
    "causal": {"causal": True},
    "window": {"causal": True, "window": 7},
    "padding": {"padding": True},
    "packed rows": {"causal": True, "segments": True},
    "cap": {"causal": True, "cap": 2.0, "scale": 0.7},
    "dropout": {"causal": True, "drop": True},
    "bias": {"bias": True},
}


def draw(seed: int, *shape: int) -> Array:
    """Return float32 numbers that bfloat16 holds exactly."""
    return jax.random.normal(jax.random.key(seed), shape).astype(jnp.bfloat16).astype(jnp.float32)


def inputs(length: int, dtype: Any) -> tuple[Array, Array, Array]:
    counts = enumerate((HEADS, KEY_HEADS, KEY_HEADS))
    query, key, value = (draw(i, BATCH, length, n, WIDTH).astype(dtype) for i, n in counts)
    return query, key, value


def settings(
    length: int,
    causal: bool = False,
    window: int | None = None,
    padding: bool = False,
    segments: bool = False,
    drop: bool = False,
    bias: bool = False,
    **rest: Any,
) -> dict[str, Any]:
    mask = jnp.arange(length)[None] < jnp.array([[length], [length // 2]]) if padding else None
    ids = jnp.arange(length)[None] // jnp.array([[5], [9]]) if segments else None
    pairs = (BATCH, HEADS, length, length)
    return rest | {
        "sight": visible(length, mask, ids, causal=causal, window=window),
        "drop": (draw(8, *pairs) > 0) * 2.0 if drop else None,
        "bias": draw(9, *pairs) if bias else None,
    }


def results(length: int, dtype: Any, option: dict[str, Any]) -> Any:
    """Return the output, and the gradients of query, key and value (and of the bias)."""
    given = settings(length, **option)
    weights = draw(7, BATCH, length, HEADS, WIDTH)

    def loss(bias: Array | None, *heads: Array) -> tuple[Array, Array]:
        out = attention.attend(*heads, **given | {"bias": bias})
        return jnp.sum(out * weights), out

    wanted = (0, 1, 2, 3) if given["bias"] is not None else (1, 2, 3)
    step = jax.jit(jax.grad(loss, wanted, has_aux=True))
    return step(given["bias"], *inputs(length, dtype))


@pytest.mark.few(6)
@pytest.mark.parametrize("length", [64, 67])
@pytest.mark.parametrize("option", OPTIONS.values(), ids=OPTIONS)
def test_blocks_are_the_whole(
    option: dict[str, Any], length: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = results(length, jnp.float32, option)
    monkeypatch.setattr(attention, "LONG", 16)
    monkeypatch.setattr(attention, "BLOCK", 16)
    blocks = results(length, jnp.float32, option)
    compare = functools.partial(np.testing.assert_allclose, rtol=2e-5, atol=2e-5)
    jax.tree.map(compare, blocks, whole)


def test_sums_over_blocks_are_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks give bfloat16 gradients of keys that are nearly as exact as without blocks."""
    length, option = 2048, {"causal": True}
    blocks = results(length, jnp.bfloat16, option)[0][1]
    monkeypatch.setattr(attention, "LONG", length + 1)
    exact = results(length, jnp.float32, option)[0][1]
    whole = results(length, jnp.bfloat16, option)[0][1]
    far = [float(jnp.abs(x.astype(jnp.float32) - exact).mean()) for x in (blocks, whole)]
    assert far[0] < 1.3 * far[1]  # 1.8 with sums in bfloat16


def test_memory_is_linear_in_the_length() -> None:
    """Without a mask, twice the queries and keys take at most 2.2 times the temporaries."""

    def temporaries(length: int) -> int:
        shapes = [
            jax.ShapeDtypeStruct((1, length, n, WIDTH), jnp.float32)
            for n in (HEADS, KEY_HEADS, KEY_HEADS)
        ]
        step = jax.jit(
            jax.grad(lambda *x: attention.attend(*x, visible(x[0].shape[1])).sum(), (0, 1, 2))
        )
        return step.lower(*shapes).compile().memory_analysis().temp_size_in_bytes

    assert temporaries(16384) < 2.2 * temporaries(8192)
