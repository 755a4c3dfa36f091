"""A layout names the quantised weights that an operation needs as whole float arrays."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import pytest

import lora_jax

SPEC = lora_jax.LoraSpec(2, targets="w")
X = jnp.ones((2, 64))


def parameters(stacked: bool = False) -> dict[str, Any]:
    """Return two weights as NF4 codes: an adapted one, and another that may be a stack of three."""
    w = jax.random.normal(jax.random.key(0), (64, 64))
    other = jnp.stack([w, w, w]) if stacked else w
    roles = ((0,), (1,), (2,)) if stacked else ((), (0,), (1,))
    targets = (
        lora_jax.Target("w", w.shape, (), (0,), (1,), 1, 1.0),
        lora_jax.Target("other", other.shape, *roles, 1, 1.0),
    )
    return lora_jax.quantize({"w": w, "other": other}, "nf4", lora_jax.Layout(targets))


def scanned(params: Any, x: Any) -> Any:
    return jax.lax.scan(lambda h, w: (h @ w, None), x @ params["w"], params["other"])[0]


def scanned_along_inputs(params: Any, x: Any) -> Any:
    def body(h: Any, w: Any) -> Any:
        return h + (x @ params["w"] @ w.T).sum(), None

    return jax.lax.scan(body, 0.0, params["other"].swapaxes(0, 1))[0]


KEPT = {
    "product": lambda p, x: x @ p["w"] @ p["other"],
    "rearranged": lambda p, x: x @ p["w"] @ (2 * p["other"].T[:, :32]),
    "scan": scanned,
    "custom_jvp": lambda p, x: jax.nn.relu(x @ p["w"]) @ p["other"],
}
TAKEN = {
    "gather": lambda p, x: p["other"][jnp.array([1, 2])] @ p["w"],
    "sin": lambda p, x: x @ p["w"] @ jnp.sin(p["other"]),
    "scan": scanned_along_inputs,
    "the end": lambda p, x: (x @ p["w"], p["other"]),
}


@pytest.mark.parametrize("name", KEPT)
def test_operations_that_keep_the_codes_are_not_listed(name: str) -> None:
    assert lora_jax.resolve(SPEC, KEPT[name], parameters(name == "scan"), X).dequantised == ()


@pytest.mark.parametrize("name", TAKEN)
def test_operations_that_take_the_whole_weight_are_listed(name: str) -> None:
    params = parameters(name == "scan")
    (found,) = lora_jax.resolve(SPEC, TAKEN[name], params, X).dequantised
    assert (found.path, found.shape) == ("other", params["other"].shape)
    assert name in found.reason and "takes it as float32, 0.0" in found.reason


def test_a_folded_target_is_listed_and_floats_are_not() -> None:
    def f(params: Any, x: Any) -> Any:
        return x @ jnp.sin(params["w"]) @ params["w"] @ jnp.sin(params["other"])

    params = {**parameters(), "other": jnp.eye(64)}
    spec = lora_jax.LoraSpec(2, targets="w", fold="w")
    assert [found.path for found in lora_jax.resolve(spec, f, params, X).dequantised] == ["w"]
