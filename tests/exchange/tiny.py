"""Models and adapters of the exchange's tests."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import lora_jax
from lora_jax import LoraSpec, models
from lora_jax.models.hf_module import HfModule, HfNames
from tests import npz

GOLDEN = Path(__file__).parents[1] / "golden"
ADAPTERS = GOLDEN / "golden_peft"


@dataclasses.dataclass(frozen=True)
class Model:
    """A function of (params, input), with the names of its parameters."""

    f: Callable[..., Any]
    params: Any
    names: HfNames | None
    x: Any


@functools.cache
def built_in(name: str, scan: bool = False) -> Model:
    """Load one of the tiny models of golden_models."""
    source = models.open(str(GOLDEN / "golden_models" / name))
    config = dataclasses.replace(source.config, scan_layers=scan)
    ids = jnp.full((2, 7), 3, jnp.int32)
    if name in ("bert", "roberta"):
        head = models.Head("roberta_head", 3)
        encoder = models.BertClassifier(config, 3, "roberta_head")
        f = jax.jit(lambda p, ids: encoder.apply({"params": p}, ids))
        return Model(f, source.load(config, head=head), models.hf_names(config, head), ids)
    decoder = models.DecoderModel(config)
    f = jax.jit(lambda p, ids: decoder.apply({"params": p}, ids))
    return Model(f, source.load(config), models.hf_names(config), ids)


TOY_NAMES: HfNames = {
    "conv2/kernel": HfModule("conv2", layer="conv"),
    "conv1/kernel": HfModule("conv1", layer="conv"),
    "fused": HfModule("fused", transposed=False),
    "out/kernel": "out",
}


def conv(x: Any, kernel: Any, axes: tuple[str, str, str]) -> Any:
    return jax.lax.conv_general_dilated(
        x, kernel, (1,) * (x.ndim - 2), "VALID", dimension_numbers=axes, precision="highest"
    )


def toy_function(p: Any, x: Any) -> Any:
    """`Toy` of make_peft.py, on kernels in Flax's order."""
    x = conv(x, p["conv2"]["kernel"], ("NCHW", "HWIO", "NCHW"))
    x = jnp.tanh(x + p["conv2"]["bias"][None, :, None, None]).reshape(len(x), 4, -1)
    x = conv(x, p["conv1"]["kernel"], ("NCH", "HIO", "NCH"))
    x = jnp.tanh(x + p["conv1"]["bias"][None, :, None]).swapaxes(1, 2)
    fused = jnp.matmul(x, p["fused"], precision="highest") + p["fused_bias"][None, None]
    q, k, v = jnp.split(fused, 3, -1)
    mixed = jax.nn.softmax(q @ k.swapaxes(1, 2)) @ v
    return (mixed @ p["out"]["kernel"] + p["out"]["bias"][None, None]).mean(1)


def toy() -> Model:
    """The toy, with kernels in Flax's order."""
    w = npz.read(ADAPTERS / "toy.npz")
    params = {
        "conv2": {"kernel": w["conv2/weight"].transpose(2, 3, 1, 0), "bias": w["conv2/bias"]},
        "conv1": {"kernel": w["conv1/weight"].transpose(2, 1, 0), "bias": w["conv1/bias"]},
        "fused": w["fused/weight"],
        "fused_bias": w["fused/bias"],
        "out": {"kernel": w["out/weight"].T, "bias": w["out/bias"]},
    }
    return Model(toy_function, jax.tree.map(jnp.asarray, params), TOY_NAMES, jnp.ones((2, 3, 6, 6)))


def experts() -> tuple[Model, lora_jax.Adapter]:
    """Two layers of three experts in one array, and an adapter."""

    def f(p: Any, x: Any) -> Any:
        def layer(x: Any, w: Any) -> Any:
            each = jnp.broadcast_to(x, (3, *x.shape))
            return jnp.tanh(jnp.einsum("ebi,eio->ebo", each, w)).sum(0), None

        return jax.lax.scan(layer, x, p["up"]["kernel"])[0]

    w = np.random.default_rng(2).standard_normal((2, 3, 6, 6))
    names = {"up/kernel": "model.layers.{layer}.mlp.experts.{expert}.up_proj"}
    model = Model(f, {"up": {"kernel": jnp.asarray(w, jnp.float32)}}, names, jnp.ones((2, 6)))
    return model, drawn(model, LoraSpec(2, 3.0, "up/kernel"))


def scanned(name: str) -> Model:
    """Three layers in one array, whose module has this name."""

    def f(p: Any, x: Any) -> Any:
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, p["w"]["kernel"])[0]

    w = np.random.default_rng(2).standard_normal((3, 6, 6))
    return Model(
        f, {"w": {"kernel": jnp.asarray(w, jnp.float32)}}, {"w/kernel": name}, jnp.ones((2, 6))
    )


def drawn(model: Model, spec: LoraSpec, **trainable: Any) -> lora_jax.Adapter:
    """Draw an adapter of random numbers."""
    layout = lora_jax.resolve(spec, model.f, model.params, model.x)
    start = lora_jax.init(jax.random.key(0), layout, params=model.params)
    leaves, structure = jax.tree.flatten(start)
    draw = np.random.default_rng(5).standard_normal
    new = [x + jnp.asarray(0.3 * draw(x.shape), x.dtype) for x in leaves]
    return lora_jax.Adapter(layout, jax.tree.unflatten(structure, new), trainable)


def merged(model: Model, adapter: lora_jax.Adapter) -> dict[str, np.ndarray]:
    params = lora_jax.paths.replace(model.params, dict(adapter.trainable))
    whole = lora_jax.merge(adapter.layout, params, adapter.parameters)
    return {p: np.asarray(x) for p, x in lora_jax.paths.flatten(whole).items()}


def flat(params: Any) -> dict[str, Any]:
    return lora_jax.paths.flatten(params)


def assert_alike(model: Model, adapter: lora_jax.Adapter, again: lora_jax.Adapter) -> None:
    """Assert that two adapters give the same weights, and other ones than the base's."""
    want, got = merged(model, adapter), merged(model, again)
    moved = max(np.abs(want[p] - np.asarray(x)).max() for p, x in flat(model.params).items())
    assert moved > 1e-2, "the adapter changes no weight"
    for path in want:
        np.testing.assert_allclose(got[path], want[path], atol=2e-6, err_msg=path)
