"""The shapes of published models, and random weights for them: times do not depend on values."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax import models

MINILM = models.BertConfig(
    vocab_size=30_522,
    hidden_size=384,
    num_layers=6,
    num_heads=12,
    mlp_size=1536,
    max_positions=512,
)
SMOLLM2 = models.DecoderConfig(
    vocab_size=49_152,
    hidden_size=576,
    num_layers=30,
    num_heads=9,
    num_kv_heads=3,
    head_dim=64,
    mlp_size=1536,
    max_positions=2048,
    rope_theta=100_000.0,
)
# The shapes of GPT-2 medium as an encoder: see `experiments.paper.latency`.
MEDIUM = models.BertConfig(
    vocab_size=50_257,
    hidden_size=1024,
    num_layers=24,
    num_heads=16,
    mlp_size=4096,
    max_positions=1024,
    num_token_types=0,
    norm_eps=1e-5,
    activation="gelu_tanh",
)


def normal(shapes: Any, seed: int) -> Any:
    """Return arrays of these shapes, drawn from N(0, 0.02^2)."""
    random = np.random.default_rng(seed)  # jax.random would compile a program for each shape
    return jax.tree.map(
        lambda s: jnp.asarray(0.02 * random.standard_normal(s.shape, np.float32), s.dtype), shapes
    )
