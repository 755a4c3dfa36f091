"""EVA: `a` spans the main directions that NumPy finds in the collected inputs of each weight."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax
from lora_jax import Layout, LoraError, LoraSpec, Target
from lora_jax.analysis.from_inputs import input_moments
from tests import cases
from tests.cases import normal

L, IN, OUT = 3, 10, 14


def stretched(seed: int, *shape: int) -> jax.Array:
    """Rows whose directions differ in length, so that some of them are the main ones."""
    return jnp.einsum("...i,i->...i", normal(seed, *shape), jnp.linspace(3.0, 0.1, shape[-1]))


def scanned(remat: bool) -> Any:
    """A stack of layers that also returns the inputs of the two weights of each layer."""

    def f(p: Any, x: Any) -> Any:
        def layer(x: Any, w: Any) -> Any:
            h = jnp.tanh(x @ w["up"])
            return x + h @ w["down"], (x, h)

        return jax.lax.scan(jax.checkpoint(layer) if remat else layer, x, p)

    params = {"up": normal(0, L, IN, OUT) / 4, "down": normal(1, L, OUT, IN) / 4}
    return f, params


@pytest.mark.parametrize("remat", [False, True])
def test_the_main_directions_of_every_layer(remat: bool) -> None:
    f, params = scanned(remat)
    batches = [(stretched(i, 4, 5, IN),) for i in range(3)]
    layout = lora_jax.resolve(LoraSpec(2, 4.0, ("up", "down")), f, params, *batches[0])
    only_y = lambda p, x: f(p, x)[0]  # noqa: E731
    adapters = lora_jax.init_from_inputs(jax.random.key(0), layout, only_y, params, batches)
    seen = [f(params, x)[1] for (x,) in batches]
    for path, which in (("up", 0), ("down", 1)):
        width = params[path].shape[1]
        rows = np.concatenate([np.asarray(s[which]).reshape(L, -1, width) for s in seen], axis=1)
        assert (adapters[path].b == 0).all() and adapters[path].a.dtype == jnp.float32
        for a, x in zip(np.asarray(adapters[path].a), rows.astype(np.float64), strict=True):
            right = np.linalg.svd(x)[2][:2].T
            np.testing.assert_allclose(a.T @ a, np.eye(2), atol=1e-5)
            np.testing.assert_allclose(np.abs(right.T @ a), np.eye(2), atol=1e-3)
    merged = lora_jax.merge(layout, params, adapters)
    jax.tree.map(np.testing.assert_array_equal, merged, params)


def patches(x: Any) -> Any:
    """The inputs of a convolution: [rows, spatial * channels], in the order of its kernel."""
    found = jax.lax.conv_general_dilated_patches(
        x, (3, 2), (2, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    channels = x.shape[-1]
    split = found.reshape(-1, channels, 3 * 2)  # channels come first here
    return split.swapaxes(1, 2).reshape(-1, 3 * 2 * channels)


def expected(name: str, case: Any) -> np.ndarray:
    x = np.asarray(case.args[0], np.float64)
    if name == "linen_conv_2d_strided":
        rows = np.asarray(patches(case.args[0]), np.float64)
        return rows.T @ rows
    if name == "bare_vmap_over_weights":
        return np.einsum("sbi,sbj->sij", x, x)
    rows = x.reshape(-1, 10)
    return rows.T @ rows


@pytest.mark.standard_promotion
@pytest.mark.parametrize(
    "name", ["bare_matmul", "linen_dense", "linen_conv_2d_strided", "bare_vmap_over_weights"]
)
def test_second_moments(name: str) -> None:
    case = cases.REGISTRY[name]()
    layout = lora_jax.resolve(LoraSpec(2, 4.0, case.targets), case.f, case.params, *case.args)
    (moment,) = input_moments(layout, case.f, case.params, [case.args] * 2).values()
    want = 2 * expected(name, case)
    np.testing.assert_allclose(moment, want, rtol=1e-4, atol=1e-4 * np.abs(want).max())


@pytest.mark.standard_promotion
@pytest.mark.parametrize("name", ["bare_ragged_dot", "nnx_attention", "bare_while", "bare_cond"])
def test_other_programs(name: str) -> None:
    case = cases.REGISTRY[name]()
    if not case.reverse:
        return  # the inputs are read in the backward pass, which a while loop does not have
    args = case.args
    layout = lora_jax.resolve(LoraSpec(2, 4.0, case.targets), case.f, case.params, *args)
    adapters = lora_jax.init_from_inputs(jax.random.key(0), layout, case.f, case.params, [args])
    for t in layout.targets:
        a = np.asarray(adapters[t.path].a).reshape(-1, t.fan_in, 2)
        np.testing.assert_allclose(a.mT @ a, np.tile(np.eye(2), (len(a), 1, 1)), atol=1e-5)


def test_a_quantised_base_and_dora() -> None:
    f, params = scanned(remat=True)
    x = stretched(0, 4, 5, IN)
    layout = lora_jax.resolve(LoraSpec(2, 4.0, ("up", "down"), kind="dora"), f, params, x)
    q = lora_jax.quantize(params, "int8", layout)
    one = lora_jax.init_from_inputs(jax.random.key(0), layout, f, q, [(x,)])
    two = lora_jax.init_from_inputs(jax.random.key(0), layout, f, lora_jax.dequantize(q), [(x,)])
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-4), one, two)
    np.testing.assert_allclose(
        one["up"].magnitude, jnp.linalg.norm(lora_jax.dequantize(q)["up"], axis=1), rtol=1e-5
    )


def test_what_has_no_inputs_to_look_at() -> None:
    f = lambda p, x: x @ p["w"] + p["bias"][None]  # noqa: E731
    params, x = {"w": jnp.ones((IN, OUT)), "bias": jnp.ones(OUT)}, normal(0, 2, IN)
    w = Target("w", (IN, OUT), (), (0,), (1,), 2, 4.0)
    bias = Target("bias", (OUT,), (), (), (0,), 1, 1.0, kind="bias")
    key = jax.random.key(0)
    both = lora_jax.init_from_inputs(key, Layout((w, bias)), f, params, [(x,)])
    assert (both["bias"].delta == 0).all()
    with pytest.raises(LoraError, match="EVA needs batches"):
        lora_jax.init_from_inputs(key, Layout((w,)), f, params, [])
    with pytest.raises(LoraError, match="no floating output"):
        lora_jax.init_from_inputs(
            key, Layout((w,)), lambda p, x: f(p, x).argmax(-1), params, [(x,)]
        )
    hidden = lambda p, x: x.sum() + (x @ p["w"]).argmax().astype(jnp.float32)  # noqa: E731
    with pytest.raises(LoraError, match="'w': no product with it reaches a floating output"):
        lora_jax.init_from_inputs(key, Layout((w,)), hidden, params, [(x,)])
    vera = Target("w", (IN, OUT), (), (0,), (1,), 2, 4.0, kind="vera")
    with pytest.raises(LoraError, match="kind 'vera' has no factor `a`"):
        lora_jax.init_from_inputs(key, Layout((vera,)), f, params, [(x,)])
    wide = Target("w", (2**16, OUT), (), (0,), (1,), 2, 4.0)
    with pytest.raises(LoraError, match="65536 inputs"):
        lora_jax.init_from_inputs(key, Layout((wide,)), f, params, [(x,)])
