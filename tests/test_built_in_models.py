"""The transform on the models of this package: targets of `"all-linear"`, and `adapt == merge`."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import pytest

import lora_jax
from lora_jax import models
from tests import cases
from tests.models.options import ENCODERS, FAMILIES, VIT
from tests.test_transform import assert_close, scalar

pytestmark = pytest.mark.standard_promotion
IDS = jnp.arange(12).reshape(2, 6)
MASK = jnp.arange(6)[None] < jnp.array([[6], [4]])

BERT = models.BertConfig(
    vocab_size=31, hidden_size=12, num_layers=2, num_heads=2, mlp_size=26, max_positions=16
)
LLAMA = models.DecoderConfig(
    vocab_size=31,
    hidden_size=12,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=6,
    mlp_size=26,
    max_positions=16,
)
# The targets of "all-linear" in a layer of each family.
KERNELS = {
    "gpt2": ("attention/qkv", "attention/o", "mlp/up", "mlp/down"),
    "gemma": (*(f"attention/{x}" for x in "qkvo"), "mlp/gate", "mlp/up", "mlp/down"),
    "phi": ("attention/qkv", "attention/o", "mlp/gate_up", "mlp/down"),
    "deberta": (
        *(f"attention/{x}" for x in ("query", "key", "value", "output")),
        *("mlp/up", "mlp/down"),
    ),
    "vit": (*(f"attention/{x}" for x in ("query", "key", "value", "output")), "mlp/up", "mlp/down"),
    "modernbert": ("attention/qkv", "attention/output", "mlp/gate_up", "mlp/down"),
    "mixture": (
        *(f"attention/{x}" for x in "qkvo"),
        "mlp/router",
        *(f"mlp/experts/{x}" for x in ("gate", "up", "down")),
    ),
}


def built(config: Any) -> tuple[Any, Any, tuple[Any, ...]]:
    """Return a function of (params, *args), its parameters and its arguments."""
    if isinstance(config, models.BertConfig):
        module: Any = models.BertClassifier(config, 3, "mean")
        args: tuple[Any, ...] = (IDS, MASK)
    elif isinstance(config, models.VitConfig):
        module = models.VitClassifier(config, 3)
        args = (jax.random.normal(jax.random.key(2), (2, *config.image_size, 3)),)
    else:
        module, args = models.DecoderModel(config), (IDS,)
    shapes = jax.eval_shape(module.init, jax.random.key(0), *args)["params"]
    params = cases.near_ones_and_zeros(shapes)
    return (lambda p, *a: module.apply({"params": p}, *a)), params, args


@pytest.mark.few(2)
@pytest.mark.parametrize(
    ("config", "scan_layers", "remat"),
    [
        pytest.param(BERT, False, "dots", id="bert-dots"),
        pytest.param(BERT, True, "none", id="bert-scanned"),
        pytest.param(LLAMA, False, "none", id="llama"),
        pytest.param(LLAMA, True, "full", id="llama-scanned-full"),
    ],
)
def test_adapted_equals_merged(config: Any, scan_layers: bool, remat: str) -> None:
    f, params, args = built(dataclasses.replace(config, scan_layers=scan_layers, remat=remat))
    layout = lora_jax.resolve(lora_jax.LoraSpec(2, 4.0), f, params, *args)
    assert len(layout.targets) == (6 if config is BERT else 7) * (1 if scan_layers else 2)
    shapes = jax.eval_shape(lambda: lora_jax.init(jax.random.key(1), layout))
    adapters = cases.near_ones_and_zeros(shapes)
    g = lora_jax.adapt(layout, f)
    fast = scalar(lambda p, ad: g(p, ad, *args))
    slow = scalar(lambda p, ad: f(lora_jax.merge(layout, p, ad), *args))
    got = jax.jit(jax.grad(fast, 1))(params, adapters)
    assert_close(got, jax.jit(jax.grad(slow, 1))(params, adapters), tolerance=5e-5)


@pytest.mark.few(3)
@pytest.mark.parametrize("family", [*FAMILIES, *ENCODERS, "vit"])
def test_families_adapted_equal_merged(family: str) -> None:
    encoder = family in ENCODERS
    base, options = (BERT, ENCODERS[family]) if encoder else (LLAMA, FAMILIES.get(family, {}))
    config: Any = VIT if family == "vit" else dataclasses.replace(base, **options)
    f, params, args = built(config)
    layout = lora_jax.resolve(lora_jax.LoraSpec(2, 4.0), f, params, *args)
    found = {t.path: t for t in layout.targets}
    layer = "bert/encoder/layer_" if encoder else "layers_"
    layer = "vit/encoder/layer_" if family == "vit" else layer
    wanted = {f"{layer}{i}/{x}/kernel" for i in range(2) for x in KERNELS[family]}
    wanted |= {"bert/encoder/convolution/conv/kernel"} if family == "deberta" else set()
    wanted |= {"vit/embeddings/patch/kernel"} if family == "vit" else set()
    assert found.keys() == wanted
    stacks = {path: t.stack for path, t in found.items() if "experts" in path}
    assert set(stacks.values()) <= {(0,)}
    shapes = jax.eval_shape(lambda: lora_jax.init(jax.random.key(1), layout))
    adapters = cases.near_ones_and_zeros(shapes)
    fast = scalar(lambda p, ad: lora_jax.adapt(layout, f)(p, ad, *args))
    slow = scalar(lambda p, ad: f(lora_jax.merge(layout, p, ad), *args))
    got = jax.jit(jax.grad(fast, 1))(params, adapters)
    assert_close(got, jax.jit(jax.grad(slow, 1))(params, adapters), tolerance=5e-5)


@pytest.mark.parametrize("tied", [True, False])
def test_all_linear_leaves_out_the_language_models_head(tied: bool) -> None:
    f, params, args = built(dataclasses.replace(LLAMA, tied=tied))
    layout = lora_jax.resolve(lora_jax.LoraSpec(2), f, params, *args)
    assert {t.path.split("/")[0] for t in layout.targets} == {"layers_0", "layers_1"}


def test_profiles_name_the_users_modules() -> None:
    f, params, args = built(LLAMA)
    layout = lora_jax.resolve(lora_jax.LoraSpec(2), f, params, *args)
    adapters = lora_jax.init(jax.random.key(1), layout)
    compiled = jax.jit(lora_jax.adapt(layout, f)).lower(params, adapters, *args).compile()
    assert "/layers_1/attention/q/jit(_add)/lora/" in compiled.as_text()
