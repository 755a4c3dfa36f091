"""A decoder that prefills a cache and takes steps gives what one pass without a cache gives."""

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
from lora_jax.planner import hlo
from tests.models.options import FAMILIES, random_params
from tests.programs import equations

CAPACITY = 16
LENGTHS = (3, 7, 5)  # the prompts' lengths; each row then goes on for STEPS
STEPS = 4
FORMS = {
    "unrolled": {},
    "scanned": {"scan_layers": True, "remat": "full"},
    "window": {"sliding_window": 3},
    "scanned window": {"scan_layers": True, "sliding_window": 3},
    "biases, norms, an untied head": {"qkv_bias": True, "qk_norm": True, "tied": False},
    **FAMILIES,
    "gemma": {**FAMILIES["gemma"], "scan_layers": True},
}


@pytest.fixture(params=["unrolled", "scanned window"])
def config(
    request: pytest.FixtureRequest, llama_config: models.DecoderConfig
) -> models.DecoderConfig:
    return dataclasses.replace(llama_config, **FORMS[request.param])


@functools.partial(jax.jit, static_argnums=0, static_argnames="last")
def go_on(
    config: Any, params: Any, ids: Any, mask: Any, cache: Any, slot: Any, last: Any = None
) -> Any:
    """Return the logits, and the cache with the new tokens in it."""
    model = models.DecoderModel(config)
    logits, new = model.apply({"params": params}, ids, cache, mask, last=last, method=model.decode)
    return logits, caches.written(cache, new, slot)


def read(config: Any, params: Any, ids: Any, mask: Any, capacity: int = CAPACITY) -> Any:
    """Read prompts with an empty cache. This is fastest: there is no slot to attend to yet."""
    nothing = caches.empty(config, len(ids), 0)
    model = models.DecoderModel(config)
    decode = jax.jit(functools.partial(model.apply, method=model.decode))
    logits, new = decode({"params": params}, ids, nothing, mask)
    return logits, caches.written(caches.empty(config, len(ids), capacity), new, 0)


def rows(config: models.DecoderConfig) -> list[np.ndarray]:
    rng = np.random.default_rng(1)
    return [rng.integers(1, config.vocab_size, n + STEPS) for n in LENGTHS]


def padded(tokens: list[np.ndarray], length: int, side: str, fill: int) -> tuple[Any, Any]:
    ids, mask = np.full((len(tokens), length), fill), np.zeros((len(tokens), length), bool)
    for row, found in enumerate(tokens):
        where = slice(length - len(found), None) if side == "left" else slice(len(found))
        ids[row, where], mask[row, where] = found, True
    return jnp.asarray(ids), jnp.asarray(mask)


@pytest.mark.few(4)
@pytest.mark.parametrize(
    ("form", "side"), [*((form, "left") for form in FORMS), ("window", "right")]
)
def test_prefill_and_steps_are_one_whole_pass(
    llama_config: models.DecoderConfig, form: str, side: str
) -> None:
    config = dataclasses.replace(llama_config, **FORMS[form])
    params, tokens = random_params(config), rows(config)
    length = max(LENGTHS) + 1
    ids, mask = padded([t[:n] for t, n in zip(tokens, LENGTHS, strict=True)], length, side, 5)
    logits, cache = read(config, params, ids, mask)
    got = [list(np.asarray(logits[row])[np.asarray(mask[row])]) for row in range(len(tokens))]
    for i in range(STEPS):
        new = jnp.asarray([[t[n + i]] for t, n in zip(tokens, LENGTHS, strict=True)])
        logits, cache = go_on(config, params, new, None, cache, jnp.int32(length + i))
        assert logits.shape == (len(tokens), 1, config.vocab_size)
        for row in range(len(tokens)):
            got[row].append(np.asarray(logits[row, 0]))
    # This pass is padded on the right, where causality alone hides the padding.
    whole, real = padded(tokens, max(LENGTHS) + STEPS, "right", 0)
    want = jax.jit(models.DecoderModel(config).apply)({"params": params}, whole)
    for row in range(len(tokens)):
        alone = np.asarray(want[row])[np.asarray(real[row])]
        np.testing.assert_allclose(np.stack(got[row]), alone, atol=1e-5, rtol=1e-5)


def test_a_prompt_in_pieces(config: models.DecoderConfig) -> None:
    """A prompt may be read in pieces of several tokens, with padding between them."""
    params = random_params(config)
    ids, mask = padded(rows(config), max(LENGTHS) + STEPS, "left", 5)
    want, _ = read(config, params, ids, mask)
    cache = caches.empty(config, len(LENGTHS), CAPACITY)
    first, rest = slice(0, 6), slice(6, None)
    _, cache = go_on(config, params, ids[:, first], mask[:, first], cache, 0)
    got, _ = go_on(config, params, ids[:, rest], mask[:, rest], cache, 6, last=1)
    assert got.shape == (len(LENGTHS), 1, config.vocab_size)
    np.testing.assert_allclose(got, want[:, -1:], atol=1e-5, rtol=1e-5)


def test_a_cache_in_bfloat16(llama_config: models.DecoderConfig) -> None:
    params, ids = random_params(llama_config), jnp.ones((1, 6), jnp.int32)
    cache = caches.empty(llama_config, 1, 8, jnp.bfloat16)
    _, cache = go_on(llama_config, params, ids[:, :3], None, cache, 0)
    logits, cache = go_on(llama_config, params, ids[:, 3:], None, cache, 3)
    assert {leaf.dtype for leaf in jax.tree.leaves(cache.keys)} == {jnp.dtype(jnp.bfloat16)}
    want = models.DecoderModel(llama_config).apply({"params": params}, ids)[:, 3:]
    assert 0 < np.abs(logits - want).max() < 0.1 * np.abs(want).max()


def test_no_cache_no_trace_of_it(config: models.DecoderConfig) -> None:
    shapes = models.shapes(config)
    ids = jnp.ones((2, 6), jnp.int32)
    jaxpr = jax.make_jaxpr(lambda p: models.DecoderModel(config).apply({"params": p}, ids))(shapes)
    names = {eqn.primitive.name for eqn in equations(jaxpr)}
    assert "dot_general" in names and "dynamic_update_slice" not in names


@pytest.mark.parametrize(
    ("form", "mapped"), [("unrolled", False), ("unrolled", True), ("scanned", False)]
)
def test_a_step_writes_in_place(
    llama_config: models.DecoderConfig, form: str, mapped: bool
) -> None:
    """A step writes into the memory of its donated cache, and copies none of the cache's arrays."""
    config = dataclasses.replace(llama_config, **FORMS[form])
    capacity, rows = 1001, 4
    cache, ids = caches.empty(config, rows, capacity), jnp.ones((rows, 1), jnp.int32)

    def one(variables: Any, ids: Any, cache: Any) -> Any:
        model = models.DecoderModel(config)
        return model.apply(variables, ids, cache, method=model.decode)

    def each(variables: Any, ids: Any, cache: Any) -> Any:
        add, drop = (lambda x: x[:, None]), (lambda x: x[:, 0])
        found = jax.vmap(one, in_axes=(None, 0, 0))(variables, add(ids), jax.tree.map(add, cache))
        return jax.tree.map(drop, found)

    def run(cache: Any, variables: Any, slot: Any) -> Any:
        logits, new = (each if mapped else one)(variables, ids, cache)
        return logits, caches.written(cache, new, slot, after=logits.argmax(-1))

    arguments = (cache, {"params": random_params(config)}, jnp.int32(3))
    compiled = jax.jit(run, donate_argnums=0).lower(*arguments).compile()
    memory = compiled.memory_analysis()
    held = sum(leaf.nbytes for leaf in jax.tree.leaves(cache))
    assert memory.alias_size_in_bytes >= held
    # Temporary memory holds the scores, and one layer if scanned, but never the whole cache.
    assert memory.temp_size_in_bytes < (0.8 if config.scan_layers else 0.4) * held
    sizes = {leaf.size for leaf in jax.tree.leaves((cache.keys, cache.values))}
    instructions = hlo.parse(compiled.as_text()).instructions
    copied = {i.results[0].size for i in instructions if i.kind == "copy"}
    assert not sizes & copied
