"""A kernel whose dtype is not floating is refused or handled right, never silently changed."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import lora_jax
from lora_jax import LoraError, LoraSpec
from tests import laws
from tests.cases import normal

X = normal(1, 3, 6)
CODES = jnp.asarray(np.random.default_rng(0).integers(-9, 9, (6, 8)), jnp.int8)
HEAD = normal(5, 8, 5)


def dequantised(p: Any, x: Any) -> Any:
    return jnp.tanh(x @ p["w"].astype(x.dtype)) @ p["head"]


def integer_product(p: Any, x: Any) -> Any:
    y = lax.dot(jnp.round(x).astype(jnp.int8), p["w"], preferred_element_type=jnp.int32)
    return jnp.tanh(y.astype(jnp.float32)) @ p["head"]


def spectral(p: Any, x: Any) -> Any:
    """A layer in the frequency domain, as Fourier neural operators have."""
    frequencies = jnp.fft.fft(x, axis=0) @ p["w"]
    return jnp.tanh(jnp.fft.ifft(frequencies, axis=0).real) @ p["head"]


COMPLEX = {"w": lax.complex(normal(2, 6, 8), normal(3, 6, 8)), "head": HEAD}
INTEGERS = {"w": CODES, "head": HEAD}
NOT_FLOAT = {
    "complex": (spectral, COMPLEX, "complex64"),
    "codes": (dequantised, INTEGERS, "int8"),
    "integer product": (integer_product, INTEGERS, "int8"),
}


@pytest.mark.parametrize("fold", [(), ("w",)], ids=["plain", "folded"])
@pytest.mark.parametrize("name", NOT_FLOAT)
def test_a_target_that_is_not_float_is_refused_by_its_dtype(name: str, fold: Any) -> None:
    """A target whose dtype is not floating is refused, and the error names the dtype."""
    f, params, dtype = NOT_FLOAT[name]
    with pytest.raises(LoraError, match=f"'w'(.|\n)*{dtype}"):
        lora_jax.resolve(LoraSpec(2, 4.0, "w", fold=fold), f, params, X)


@pytest.mark.parametrize("name", NOT_FLOAT)
def test_all_linear_names_what_is_not_float(name: str) -> None:
    f, params, dtype = NOT_FLOAT[name]
    params = {**params, "first": normal(7, 6, 6)}
    g = lambda p, x: f(p, jnp.tanh(x @ p["first"]))  # noqa: E731
    layout = lora_jax.resolve(LoraSpec(2, 4.0), g, params, X)
    assert [t.path for t in layout.targets] == ["first"]
    assert dtype in laws.left_out(layout)["w"]


def test_a_merge_into_integers_is_refused() -> None:
    params = {"w": CODES.astype(jnp.float32), "head": HEAD}
    layout = lora_jax.resolve(LoraSpec(2, 4.0, "w"), dequantised, params, X)
    adapters = laws.drawn_adapters(layout)
    for broken in (lora_jax.merge, lambda *a: lora_jax.adapt(a[0], dequantised)(*a[1:], X)):
        with pytest.raises(LoraError, match=r"'w'(.|\n)*int8"):
            broken(layout, {**params, "w": CODES}, adapters)


def mixed_dot(p: Any, x: Any) -> Any:
    """Multiply bfloat16 activations with a float32 weight in one product."""
    return lax.dot_general(
        x.astype(jnp.bfloat16), p["w"], (((1,), (0,)), ((), ())), preferred_element_type=jnp.float32
    )


def test_float32_weights_keep_their_factors_in_float32_against_bfloat16_inputs() -> None:
    """Factors stay in the dtype of W where the product itself casts x to the dtype of W."""
    f = lambda p, x: jnp.tanh(mixed_dot(p, x)) @ p["head"]  # noqa: E731
    params = {"w": normal(2, 6, 8), "head": HEAD}
    layout = lora_jax.resolve(LoraSpec(2, 4.0, "w"), f, params, X)
    laws.assert_adapt_equals_merge(layout, f, params, X)
