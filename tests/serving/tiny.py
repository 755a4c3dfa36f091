"""A decoder small enough to compile quickly, and adapters that change its outputs."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import lora_jax
from lora_jax import models
from lora_jax.serving.generation import Decoder
from lora_jax.serving.jobs import Prompt
from tests.programs import compiled

CONFIG = models.DecoderConfig(
    vocab_size=61,
    hidden_size=16,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    mlp_size=20,
    max_positions=64,
)
SCANNED = models.DecoderConfig(**{**vars(CONFIG), "scan_layers": True})
RANKS = (1, 4, 2)
PROMPTS = ([3, 9, 27], [5, 25, 4, 20, 1, 7, 8], [11], [60, 2, 30, 7], [3, 9, 27])


def noise(shape: Any, seed: int) -> jax.Array:
    return jax.device_put(np.random.default_rng(seed).standard_normal(shape).astype(np.float32))


@functools.cache
def params(config: models.DecoderConfig) -> Any:
    """Return random weights; the head is unsure enough for adapters to change the outputs."""
    leaves, tree = jax.tree.flatten(models.shapes(config))
    drawn = [(1 + noise(s.shape, i)) / 2 if len(s.shape) == 1 else noise(s.shape, i) / 2
             for i, s in enumerate(leaves)]  # fmt: skip
    return jax.tree.unflatten(tree, drawn)


@functools.cache
def pairs(config: models.DecoderConfig) -> tuple[Any, ...]:
    """Return one (layout, adapters) for each rank; alpha and targets differ as well."""

    def apply(params: Any, ids: Any) -> Any:
        return models.DecoderModel(config).apply({"params": params}, ids)

    ids = jax.ShapeDtypeStruct((1, 4), jnp.int32)
    every = []
    for seed, rank in enumerate(RANKS):
        targets = ("layers*/attention/{q,v,qkv}/kernel", "layers*/{attention,mlp}/**/kernel")[
            seed % 2
        ]
        spec = lora_jax.LoraSpec(rank, 3.0 * rank, targets=(targets,))
        layout = lora_jax.resolve(spec, apply, models.shapes(config), ids)
        shapes = jax.eval_shape(lambda own=layout: lora_jax.init(jax.random.key(0), own))
        adapters = {
            path: lora_jax.Factors(noise(f.a.shape, i) / 4, 0.3 * noise(f.b.shape, seed + i))
            for i, (path, f) in enumerate(shapes.items())
        }
        every.append((layout, adapters))
    return tuple(every)


@functools.cache
def stacked(config: models.DecoderConfig) -> Any:
    """Return (layout, stacked) of `pairs`."""
    return compiled(lora_jax.multi.stack, pairs(config))


def merged(config: models.DecoderConfig, adapter: int) -> Any:
    """Return the weights with one adapter merged into them."""
    if adapter == lora_jax.multi.BASE:
        return params(config)
    layout, adapters = pairs(config)[adapter]
    return compiled(lora_jax.merge, layout, params(config), adapters)


@dataclasses.dataclass
class Generated:
    """All tokens that follow one prompt, without the stop token, and the reason why they ended."""

    tokens: list[int]
    finish: str | None


def generate(decoder: Decoder, prompts: Sequence[Prompt], **how: Any) -> list[Generated]:
    """Return the tokens of each prompt."""
    found = [Generated([], None) for _ in prompts]
    for piece in decoder.read(decoder.submit(prompts, **how)):
        if piece.token is not None:
            found[piece.row].tokens.append(piece.token)
        found[piece.row].finish = piece.finish
    return found
