"""Models of others from the package index, unchanged: `adapt == merge` holds on them too."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import pytest

import lora_jax
from lora_jax.models.weights import packages
from tests import programs
from tests.test_transform import assert_close, scalar

pytestmark = pytest.mark.standard_promotion
IDS = jnp.arange(24).reshape(2, 12) % 17


@pytest.fixture
def imported(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str, str], Any]:
    """Import a module of a pinned package without installing it or its dependencies."""

    def load(distribution: str, version: str, module: str) -> Any:
        init = packages.locate(distribution, version, f"{module}/__init__.py")
        monkeypatch.syspath_prepend(str(init.parent.parent))
        loaded = importlib.import_module(module)
        for name in [n for n in sys.modules if n.split(".")[0] == module]:
            monkeypatch.delitem(sys.modules, name, raising=False)
        return loaded

    return load


def check(f: Any, params: Any, *args: Any) -> lora_jax.Layout:
    """Check outputs and gradients of "all-linear", and that no product has a weight's shape."""
    layout = lora_jax.resolve(lora_jax.LoraSpec(2, 4.0), f, params, *args)
    adapters = lora_jax.init(jax.random.key(1), layout)
    adapters = jax.tree.map(
        lambda x: x + 0.05 * jax.random.normal(jax.random.key(2), x.shape), adapters
    )
    g = lora_jax.adapt(layout, f)
    fast = scalar(lambda p, ad: g(p, ad, *args))
    slow = scalar(lambda p, ad: f(lora_jax.merge(layout, p, ad), *args))
    got = jax.jit(jax.value_and_grad(fast, 1))(params, adapters)
    want = jax.jit(jax.value_and_grad(slow, 1))(params, adapters)
    # The loss sums thousands of terms that cancel, so the comparison of gradients is the sharper
    # one.
    assert_close(got[0], want[0], tolerance=1e-4)
    assert_close(got[1], want[1], tolerance=5e-5)
    sizes = {t.fan_in * t.fan_out for t in layout.targets}
    assert not programs.product_sizes(jax.grad(fast, 1), params, adapters) & sizes
    return layout


@pytest.mark.slow
def test_a_linen_mixture_of_experts(imported: Any) -> None:
    """The model has experts in a list, top-k routing, and an auxiliary loss next to the logits."""
    nano_moe = imported("nano-moe-jax", "0.1.0", "nano_moe")
    config = nano_moe.NanoMoEConfig(
        vocab_size=17, n_layers=2, n_heads=2, d_model=22, d_ff=46, n_experts=3, block_size=12
    )
    model = nano_moe.NanoMoE(config)
    params = model.init(jax.random.key(0), IDS)["params"]
    layout = check(lambda p, ids: model.apply({"params": p}, ids), params, IDS)
    paths = [t.path for t in layout.targets]
    assert "block_1/MoELayer_0/expert_2/Dense_0/kernel" in paths
    assert "Dense_0/kernel" not in paths  # the output head
    assert len(paths) == 2 * (2 + 1 + 3 * 2)  # attention, router, experts, in two layers


def test_an_nnx_state_space_model(imported: Any) -> None:
    """Mamba2 has a tied head, and a convolution kernel that it multiplies without a convolution."""
    mamba = imported("mamba2-jax", "1.1.2", "mamba2_jax")
    config = mamba.Mamba2Config(
        vocab_size=31, hidden_size=26, state_size=6, head_dim=13, chunk_size=4, num_hidden_layers=2
    )
    from flax import nnx

    f, params, state = lora_jax.from_nnx(mamba.Mamba2ForCausalLM(config, rngs=nnx.Rngs(0)))
    layout = check(lambda p, ids: f(p, state, ids)[0]["logits"], params, IDS)
    kinds = {t.path.split("/")[-2] for t in layout.targets}
    assert kinds == {"in_proj", "out_proj"}
    assert len(layout.targets) == 4
