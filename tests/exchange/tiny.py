"""Models and adapters of the exchange's tests."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from lora_jax import models
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
