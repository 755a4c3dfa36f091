"""A decoder with a cache is the decoder without: prefill and steps give one whole pass."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lora_jax import models
from lora_jax.models import cache as caches
from tests.programs import equations

CAPACITY = 16
LENGTHS = (3, 7, 5)  # of the prompts; each row then goes on for STEPS
STEPS = 4
FORMS = {
    "unrolled": {},
    "scanned": {"scan_layers": True},
    "remat": {"remat": "full"},
    "window": {"sliding_window": 3},
    "scanned window": {"scan_layers": True, "sliding_window": 3},
    "biases, norms, an untied head": {"qkv_bias": True, "qk_norm": True, "tied": False},
}


@pytest.fixture(params=["unrolled", "scanned window"])
def config(request: pytest.FixtureRequest, llama_config: models.LlamaConfig) -> models.LlamaConfig:
    return dataclasses.replace(llama_config, **FORMS[request.param])


def random_params(config: models.LlamaConfig) -> Any:
    """Weights in which every one matters."""

    def draw(path: Any, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        seed = sum(map(ord, jax.tree_util.keystr(path)))
        noise = 0.5 * np.random.default_rng(seed).standard_normal(leaf.shape)
        return jnp.asarray(noise + (path[-1].key == "scale"), leaf.dtype)

    return jax.tree_util.tree_map_with_path(draw, models.shapes(config))


@functools.partial(jax.jit, static_argnums=(0,), static_argnames=("slot", "last"))
def prefill(
    config: Any, params: Any, ids: Any, mask: Any, cache: Any, *, slot: int, last: Any
) -> Any:
    model = models.Llama(config)
    return model.apply({"params": params}, ids, mask, cache=cache, slot=slot, last=last)


@functools.partial(jax.jit, static_argnums=(0,))
def step(config: Any, params: Any, ids: Any, cache: Any, slot: Any) -> Any:
    return models.Llama(config).apply({"params": params}, ids, cache=cache, slot=slot)


def rows(config: models.LlamaConfig) -> list[np.ndarray]:
    rng = np.random.default_rng(1)
    return [rng.integers(1, config.vocab_size, n + STEPS) for n in LENGTHS]


def padded(tokens: list[np.ndarray], length: int, side: str, fill: int) -> tuple[Any, Any]:
    ids, mask = np.full((len(tokens), length), fill), np.zeros((len(tokens), length), bool)
    for row, found in enumerate(tokens):
        where = slice(length - len(found), None) if side == "left" else slice(len(found))
        ids[row, where], mask[row, where] = found, True
    return jnp.asarray(ids), jnp.asarray(mask)


@pytest.mark.parametrize(
    ("form", "side"), [*((form, "left") for form in FORMS), ("window", "right")]
)
def test_prefill_and_steps_are_one_whole_pass(
    llama_config: models.LlamaConfig, form: str, side: str
) -> None:
    """And padding changes nothing: every row is compared with itself alone."""
    config = dataclasses.replace(llama_config, **FORMS[form])
    params, tokens = random_params(config), rows(config)
    length = max(LENGTHS) + 1
    ids, mask = padded([t[:n] for t, n in zip(tokens, LENGTHS, strict=True)], length, side, 5)
    cache = caches.empty(config, len(tokens), CAPACITY)
    logits, cache = prefill(config, params, ids, mask, cache, slot=0, last=None)
    got = [list(np.asarray(logits[row])[np.asarray(mask[row])]) for row in range(len(tokens))]
    for i in range(STEPS):
        new = jnp.asarray([[t[n + i]] for t, n in zip(tokens, LENGTHS, strict=True)])
        logits, cache = step(config, params, new, cache, jnp.int32(length + i))
        assert logits.shape == (len(tokens), 1, config.vocab_size)
        for row in range(len(tokens)):
            got[row].append(np.asarray(logits[row, 0]))
    # Padded on the right, where causality alone keeps padding from being seen.
    whole, real = padded(tokens, max(LENGTHS) + STEPS, "right", 0)
    want = jax.jit(models.Llama(config).apply)({"params": params}, whole)
    for row in range(len(tokens)):
        alone = np.asarray(want[row])[np.asarray(real[row])]
        np.testing.assert_allclose(np.stack(got[row]), alone, atol=1e-5, rtol=1e-5)


def test_a_prompt_in_pieces(config: models.LlamaConfig) -> None:
    """Several tokens may follow at once, with padding between them."""
    params = random_params(config)
    ids, mask = padded(rows(config), max(LENGTHS) + STEPS, "left", 5)
    empty = caches.empty(config, len(LENGTHS), CAPACITY)
    want, _ = prefill(config, params, ids, mask, empty, slot=0, last=1)
    assert want.shape == (len(LENGTHS), 1, config.vocab_size)
    first, rest = slice(0, 6), slice(6, None)
    _, cache = prefill(config, params, ids[:, first], mask[:, first], empty, slot=0, last=1)
    got, _ = prefill(config, params, ids[:, rest], mask[:, rest], cache, slot=6, last=1)
    np.testing.assert_allclose(got, want, atol=1e-5, rtol=1e-5)


def test_a_prompt_looks_at_no_empty_slot(config: models.LlamaConfig) -> None:
    """With the slot known while tracing, no product is as wide as the capacity."""
    capacity, ids = 1001, jnp.ones((2, 8), jnp.int32)
    variables = {"params": models.shapes(config)}

    def widths(*slot: jax.Array) -> set[int]:
        def run(variables: Any, slot: Any = 0) -> Any:
            cache = caches.empty(config, 2, capacity)
            return models.Llama(config).apply(variables, ids, cache=cache, slot=slot)

        found = equations(jax.make_jaxpr(run)(variables, *slot))
        products = (eqn for eqn in found if eqn.primitive.name == "dot_general")
        return {size for eqn in products for size in eqn.outvars[0].aval.shape}

    assert capacity in widths(jnp.int32(0))
    assert capacity not in widths()


def test_a_cache_in_bfloat16(llama_config: models.LlamaConfig) -> None:
    params, ids = random_params(llama_config), jnp.ones((1, 6), jnp.int32)
    cache = caches.empty(llama_config, 1, 8, jnp.bfloat16)
    logits, cache = prefill(
        llama_config, params, ids, jnp.ones(ids.shape, bool), cache, slot=0, last=None
    )
    assert {leaf.dtype for leaf in jax.tree.leaves(cache.keys)} == {jnp.dtype(jnp.bfloat16)}
    want = models.Llama(llama_config).apply({"params": params}, ids)
    assert 0 < np.abs(logits - want).max() < 0.1 * np.abs(want).max()


def test_no_cache_no_trace_of_it(config: models.LlamaConfig) -> None:
    """A model that trains has no slot, and writes none."""
    shapes = models.shapes(config)
    ids = jnp.ones((2, 6), jnp.int32)
    jaxpr = jax.make_jaxpr(lambda p: models.Llama(config).apply({"params": p}, ids))(shapes)
    assert "dynamic_update_slice" not in {eqn.primitive.name for eqn in equations(jaxpr)}


def test_the_step_writes_in_place(config: models.LlamaConfig) -> None:
    """A donated cache is the new one's memory: a step holds no second."""
    params, cache = random_params(config), caches.empty(config, 2, CAPACITY)

    def run(cache: Any, slot: Any) -> Any:
        ids = jnp.ones((2, 1), jnp.int32)
        return models.Llama(config).apply({"params": params}, ids, cache=cache, slot=slot)

    compiled = jax.jit(run, donate_argnums=0).lower(cache, jnp.int32(3)).compile()
    held = sum(leaf.nbytes for leaf in jax.tree.leaves(cache))
    assert compiled.memory_analysis().alias_size_in_bytes >= held


@pytest.mark.parametrize("wrong", ["segment_ids", "targets"])
def test_what_does_not_go_with_a_cache(llama_config: models.LlamaConfig, wrong: str) -> None:
    ids, cache = jnp.ones((1, 4), jnp.int32), caches.empty(llama_config, 1, 8)
    apply = functools.partial(models.Llama(llama_config).apply, cache=cache, **{wrong: ids})
    with pytest.raises(ValueError, match="a cache goes with neither segment_ids nor targets"):
        jax.eval_shape(apply, {"params": models.shapes(llama_config)}, ids)
