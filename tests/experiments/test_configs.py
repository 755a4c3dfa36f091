"""The configs of the paper's experiments have the right settings, seeds and budgets."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import pytest

import lora_jax
from experiments.paper.configs import definitions, directions, matrices, rank
from lora_jax import models
from lora_jax.sweeps.config import Member
from lora_jax.training import causal_lm, classification
from measuring.published_models import SMOLLM2

# The shape of two layers of all-MiniLM-L6-v2.
MINILM = models.BertConfig(
    vocab_size=64, hidden_size=384, num_layers=2, num_heads=12, mlp_size=1536,
    max_positions=512,
)  # fmt: skip


def members(config: Any) -> tuple[Member, ...]:
    found: tuple[Member, ...] = config.expand().members
    return found


@functools.cache
def traced_once(apply: Any) -> Any:
    """Return `apply` jitted, so that it is traced once for all layouts."""
    return jax.jit(functools.partial(apply, train=False, key=None))


APPLY = classification.apply_of(models.BertClassifier(MINILM, 2, "mean"))


def layout(member: Member) -> lora_jax.Layout:
    params = models.shapes(MINILM, models.Head("mean", 2))
    batch = {
        "input_ids": jax.ShapeDtypeStruct((1, 8), jnp.int32),
        "mask": jax.ShapeDtypeStruct((1, 8), jnp.bool_),
    }
    spec = member.config.lora.spec
    return lora_jax.resolve(spec, traced_once(APPLY), params, batch)


@pytest.fixture(scope="module")
def layouts() -> dict[str, lora_jax.Layout]:
    every = (*members(matrices.config), *members(rank.config))
    return {m.name: layout(m) for m in every if m.config.seed == 0}


def test_all_choices_of_matrices_have_one_budget(layouts: dict[str, lora_jax.Layout]) -> None:
    names = [m.name for m in members(matrices.config) if m.config.seed == 0]
    assert len(names) == 10
    assert {layouts[name].size for name in names} == {2 * 15_360}
    assert {t.scale for name in names for t in layouts[name].targets} == {2.0}


def test_ranks_differ_in_nothing_else(layouts: dict[str, lora_jax.Layout]) -> None:
    found = [layouts[m.name] for m in members(rank.config) if m.config.seed == 0]
    counts = {(len(own.targets) // 2, own.targets[0].rank) for own in found}
    assert counts == {(n, r) for n in (1, 2, 4) for r in (1, 2, 4, 8, 64)}
    assert {t.scale for own in found for t in own.targets} == {2.0, 0.25}


def test_every_setting_has_three_seeds() -> None:
    assert len(members(matrices.config)) + len(members(rank.config)) == 66 + 9 + 9
    for config in (matrices.config, rank.config):
        assert {m.config.seed for m in members(config)} == {0, 1, 2}


def test_a_decoder_has_one_budget_over_its_matrices() -> None:
    two = dataclasses.replace(SMOLLM2, num_layers=2)
    apply = causal_lm.apply_of(models.DecoderModel(two))
    params, batch = models.shapes(two), causal_lm.batch_shapes(1, 8)
    found = [
        lora_jax.resolve(m.config.lora.spec, traced_once(apply), params, batch)
        for m in members(definitions.config)
        if m.config.seed == 0
    ]
    sizes = [own.size for own in found]
    assert sizes[:4] == [2 * 11_520] * 4
    assert [own.targets[0].rank for own in found[4:]] == [1, 8, 64]
    assert {t.scale for own in found for t in own.targets} == {4.0}


def test_directions_are_compared_at_one_alpha() -> None:
    both = (directions.encoder, 16.0, {(8, 1)}), (directions.decoder, 32.0, set())
    for config, alpha, more in both:
        found = members(config)
        pairs = {(m.config.lora.rank, m.config.seed) for m in found}
        assert pairs == {(4, 0), (8, 0), (64, 0), (64, 1)} | more
        assert {m.config.lora.alpha for m in found if m.config.lora.rank != 4} == {alpha}
