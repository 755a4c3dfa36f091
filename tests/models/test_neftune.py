"""The noise of NEFTune is uniform within its bound, in training only."""

from __future__ import annotations

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import numpy as np
import pytest

from lora_jax import models
from lora_jax.models.layers import noisy
from lora_jax.training import classification
from lora_jax.training.causal_lm import apply_of
from tests.serving import tiny


class Noise(nn.Module):
    """The noise alone."""

    @nn.compact
    def __call__(self, x: jax.Array, deterministic: bool) -> jax.Array:
        config = dataclasses.replace(tiny.CONFIG, neftune=5.0)
        return noisy(self, config, x, deterministic)


def test_it_is_uniform_within_alpha_over_the_root_of_the_numbers_of_a_row() -> None:
    x = np.zeros((8, 50, 16), np.float32)
    found = Noise().apply({}, x, False, rngs={"dropout": jax.random.key(0)})
    bound = 5 / np.sqrt(50 * 16)
    assert 0.99 * bound < np.abs(found).max() <= bound
    assert float(np.std(found)) == pytest.approx(bound / np.sqrt(3), rel=0.02)
    assert abs(float(np.mean(found))) < 0.02 * bound
    assert not np.any(Noise().apply({}, x, True))


@pytest.mark.parametrize("alpha", [0.0, 5.0])
def test_a_decoder_and_an_encoder_have_it_in_training_only(alpha: float) -> None:
    ids = np.arange(12, dtype=np.int32).reshape(2, 6)
    ones = np.ones_like(ids)
    config = dataclasses.replace(tiny.CONFIG, neftune=alpha)
    bert = models.BertConfig(
        vocab_size=20, hidden_size=8, num_layers=1, num_heads=2, mlp_size=8, max_positions=8,
        neftune=alpha,
    )  # fmt: skip
    classifier = models.BertClassifier(bert, 2)
    packed = {"input_ids": ids, "segment_ids": ones, "positions": ids % 6}
    cases: list[tuple[Any, Any, Any]] = [
        (apply_of(models.DecoderModel(config)), tiny.params(tiny.CONFIG), packed),
        (
            classification.apply_of(classifier),
            classifier.init(jax.random.key(0), ids)["params"],
            {"input_ids": ids, "mask": ones.astype(bool)},
        ),
    ]
    for apply, params, batch in cases:
        plain = apply(params, batch, train=False, key=None)
        one, two = (apply(params, batch, train=True, key=jax.random.key(i)) for i in (0, 1))
        assert np.array_equal(plain, one) == np.array_equal(one, two) == (alpha == 0)
