"""openpi's checkpoints: the adapter gives the outputs of openpi's own einsums."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax
from lora_jax.exchange import openpi as exchange
from tests.foreign.copies import openpi
from tests.test_transform import assert_close

ARGS = openpi.example()
ALPHAS = {"**/attn/*_1/w": 6.0, "**/attn/*/w": 3.0}  # of the actions' tower, and of the language's


@functools.cache
def trained(rslora: bool = False) -> tuple[Any, dict[str, Any]]:
    """The outputs of a model with openpi's LoRA, and its parameters by path."""
    power = 0.5 if rslora else 1.0
    scales = [(2, 3.0 / 2**power), (1, 6.0)]
    experts = [
        dataclasses.replace(e, rank=r, scale=s)
        for e, (r, s) in zip(openpi.EXPERTS, scales, strict=True)
    ]
    f, params, state = lora_jax.from_nnx(openpi.create(tuple(experts)))
    leaves = lora_jax.paths.flatten(params)
    return jax.jit(f)(params, state, *ARGS)[0], leaves


def base(leaves: dict[str, Any]) -> tuple[Any, Any, Any]:
    """The model without LoRA, with the same weights, and another vision tower's head."""
    f, params, state = lora_jax.from_nnx(openpi.create())
    same = {p: x for p, x in leaves.items() if p in lora_jax.paths.flatten(params)}
    same["PaliGemma/img/head/kernel"] = 2 * same["PaliGemma/img/head/kernel"]
    return f, lora_jax.paths.replace(params, same), state


@pytest.mark.few(1)
@pytest.mark.parametrize("form", ["alpha/r", "alpha/sqrt(r)", "nested"])
def test_the_outputs_are_those_of_openpi(form: str) -> None:
    scaling = "alpha/r" if form == "nested" else form
    want, leaves = trained(scaling != "alpha/r")
    f, params, state = base(leaves)
    checkpoint: Any = leaves
    if form == "nested":  # as NNX saves it
        checkpoint = {}
        for path, x in leaves.items():
            *above, last = path.split("/")
            inside = checkpoint
            for key in above:
                inside = inside.setdefault(key, {})
            inside[last] = {"value": x}
    adapter = exchange.load(checkpoint, f, params, state, *ARGS, alpha=ALPHAS, scaling=scaling)
    assert list(adapter.trainable) == ["PaliGemma/img/head/kernel"]
    whole = lora_jax.paths.replace(params, dict(adapter.trainable))
    got = jax.jit(lora_jax.adapt(adapter.layout, f))(whole, adapter.parameters, state, *ARGS)[0]
    assert_close(got, want, 2e-5)
    ranks = {t.path.split("/", 2)[2]: t.rank for t in adapter.layout.targets}
    assert ranks["layers/attn/q_einsum/w"] == 3 * 2 and ranks["layers/attn/q_einsum_1/w"] == 3
    assert ranks["layers/attn/kv_einsum/w"] == 2 * 2
    assert ranks["layers/attn/attn_vec_einsum/w"] == ranks["layers/mlp/gating_einsum"] == 2


def test_weights_that_were_frozen_in_bfloat16_are_the_base() -> None:
    _, leaves = trained()
    f, params, state = base(leaves)
    rounded = {p: x if "lora" in p else x.astype(jnp.bfloat16) for p, x in leaves.items()}
    adapter = exchange.load(rounded, f, params, state, *ARGS)
    assert list(adapter.trainable) == ["PaliGemma/img/head/kernel"]


Q = "PaliGemma/llm/layers/attn/q_einsum"


@pytest.mark.parametrize(
    ("changed", "settings", "message"),
    [
        ({f"{Q}/lora_a": np.zeros((2, 3, 8, 5))}, {}, r"q_einsum/w.*do not fit; expected"),
        ({f"{Q}/lora_b": None}, {}, r"lora_b \(0,\) do not fit"),
        ({f"{Q}/lora_a": np.full((2, 3, 8, 2), np.nan)}, {}, "q_einsum/lora_a.*no finite floats"),
        ({f"{Q}/w": np.zeros((2, 3, 8, 4))}, {}, "has factors, so openpi froze it.*weight_loader"),
        ({"PaliGemma/llm/layers/attn/q_einsun/lora_a": np.zeros(1)}, {}, "nearest.*q_einsum/w"),
        ({}, {"alpha": {"**/mlp/*": 2.0}}, "matches no factors of attention"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_named(changed: Any, settings: Any, message: str) -> None:
    _, leaves = trained()
    f, params, state = base(leaves)
    given = {p: x for p, x in {**leaves, **changed}.items() if x is not None}
    with pytest.raises(lora_jax.LoraError, match=f"(?s){message}"):
        exchange.load(given, f, params, state, *ARGS, **settings)
