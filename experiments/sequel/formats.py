"""The loss of each format of the base, and of a start on it, before training: MiniLM's q and v."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax.numpy as jnp
import numpy as np

import lora_jax
from lora_jax import Layout, LoraSpec, models, paths
from lora_jax.bases.quantise import bytes_of

TARGETS = "**/attention/{query,value}/kernel"


@dataclasses.dataclass(frozen=True)
class Lost:
    """The loss of one format, summed over all matrices.

    bits: for each number, with its scales.
    frobenius, nuclear: norms of W minus what is stored, as shares of W's.
    outputs: the norm of the change of the encoder's outputs on 256 random tokens, as a share.
    """

    name: str
    bits: float
    frobenius: float
    nuclear: float
    outputs: float


def measure() -> tuple[Lost, ...]:
    """Quantise MiniLM in every format, and begin with PiSSA and LoftQ on NF4."""
    source = models.open(models.MINILM)
    config = source.config
    assert isinstance(config, models.BertConfig)
    params, encoder = source.load(), models.Bert(config)
    ids = jnp.asarray(np.random.default_rng(0).integers(1000, 20000, (8, 32)), jnp.int32)

    def f(params: Any, ids: Any) -> Any:
        return encoder.apply({"params": params}, ids)

    layout = lora_jax.resolve(LoraSpec(8, 16.0, TARGETS), f, params, ids)
    want = f(params, ids)
    return tuple(
        _lost(name, layout, params, stored, merged, f(merged, ids), want)
        for name, stored, merged in _stored(layout, params)
    )


def _stored(layout: Layout, params: Any) -> Iterator[tuple[str, Any, Any]]:
    """Yield the name of each format, its parameters, and the floats that they stand for."""
    leaves = paths.flatten(params)
    half = {t.path: leaves[t.path].astype(jnp.bfloat16) for t in layout.targets}
    yield "bfloat16", half, paths.replace(params, half)
    nf4 = lora_jax.quantize(params, "nf4", layout)
    for name, stored in (
        ("int8", lora_jax.quantize(params, "int8", layout)),
        ("int4", lora_jax.quantize(params, "int4", layout)),
        ("nf4", nf4),
        ("nf4 double", lora_jax.quantize(params, "nf4", layout, double=True)),
    ):
        yield name, stored, lora_jax.dequantize(stored)
    for method in ("pissa", "loftq"):
        start = lora_jax.init_from_base(layout, params, method, quantised=nf4)
        merged = lora_jax.merge(layout, start.params, start.adapters)
        yield f"nf4, {method} r8", start.params, merged


def _lost(
    name: str, layout: Layout, params: Any, stored: Any, merged: Any, got: Any, want: Any
) -> Lost:
    before, after, kept = (paths.flatten(x) for x in (params, merged, stored))
    size = sum(8 * bytes_of(kept[t.path]) for t in layout.targets)
    pairs = [
        (np.asarray(before[t.path], np.float64), np.asarray(after[t.path], np.float64))
        for t in layout.targets
    ]
    pairs = [(w.reshape(len(w), -1), x.reshape(len(w), -1)) for w, x in pairs]

    def share(order: Any) -> float:
        left = [np.linalg.norm(w - x, order) for w, x in pairs]
        return float(sum(left) / sum(np.linalg.norm(w, order) for w, _ in pairs))

    count = sum(w.size for w, _ in pairs)
    outputs = float(jnp.linalg.norm(got - want) / jnp.linalg.norm(want))
    return Lost(name, size / count, share("fro"), share("nuc"), outputs)
