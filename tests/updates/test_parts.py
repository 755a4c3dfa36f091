"""Adapters of q and v in a fused kernel give the numbers of adapters of separate q and v."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax
from lora_jax import Factors, LoraSpec, Rule
from tests import cases
from tests.programs import compiled
from tests.test_transform import assert_close

D, RANK, ROWS = 12, 3, 5
Q_AND_V = ((0, D), (2 * D, D))


def attention(q: Any, k: Any, v: Any) -> Any:
    return jax.nn.softmax(q @ k.T) @ v


def fused(params: Any, x: Any) -> Any:
    return attention(*jnp.split(x @ params["qkv"], 3, axis=-1))


def separate(params: Any, x: Any) -> Any:
    return attention(*(x @ params[name] for name in "qkv"))


def by_heads(params: Any, x: Any) -> Any:
    """The fused kernel as [in, 3, out], whose parts are along the axis of 3."""
    q, k, v = jnp.einsum("bd,dpk->pbk", x, params["qkv"])
    return attention(q, k, v)


@pytest.mark.parametrize("f", [fused, by_heads])
def test_parts_of_a_fused_kernel_equal_separate_weights(f: Any) -> None:
    x, w = cases.normal(0, ROWS, D), cases.normal(1, D, 3 * D) / D**0.5
    draw = lambda seed: Factors(cases.normal(seed, D, RANK), cases.normal(seed + 1, RANK, D))  # noqa: E731
    q, v = draw(2), draw(4)
    both = {"q": q, "v": v}
    thirds = map(jax.device_put, np.split(np.asarray(w), 3, axis=1))
    names = dict(zip("qkv", thirds, strict=True))
    plain = lora_jax.resolve(LoraSpec(RANK, 2.0, ("q", "v")), separate, names, x)
    two = f is by_heads
    params = {"qkv": w.reshape(D, 3, D) if two else w}
    parts = ((0, 1), (2, 1)) if two else Q_AND_V
    rule = Rule("qkv", parts=parts, part_axis=0 if two else -1)
    layout = lora_jax.resolve(LoraSpec(RANK, 2.0, (rule,)), f, params, x)

    def joined(both: Any) -> Any:
        a = jnp.stack([both["q"].a, both["v"].a], axis=-2)
        b = [both[name].b for name in "qv"]
        return {"qkv": Factors(a, jnp.stack(b, 1) if two else jnp.concatenate(b, 1))}

    def of_parts(both: Any, x: Any) -> Any:
        return (lora_jax.adapt(layout, f)(params, joined(both), x) ** 2).sum()

    def of_two(both: Any, x: Any) -> Any:
        return (lora_jax.adapt(plain, separate)(names, both, x) ** 2).sum()

    got = jax.jit(jax.value_and_grad(of_parts, (0, 1)))(both, x)
    want = jax.jit(jax.value_and_grad(of_two, (0, 1)))(both, x)
    assert_close(got, want, 2e-5)
    merged = compiled(lambda both: lora_jax.merge(layout, params, joined(both)), both)["qkv"]
    k = np.asarray(merged).reshape(D, 3 * D)[:, D : 2 * D]
    assert (k == np.asarray(w)[:, D : 2 * D]).all()  # k is the base's, bit for bit
    assert layout.size == plain.size  # and has no trained numbers
