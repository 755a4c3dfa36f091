"""A mixed batch generates what each prompt generates alone with its adapter, and compiles once."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax
from lora_jax import models
from lora_jax.errors import LoraError
from lora_jax.models import cache as caches
from lora_jax.serving.generation import Decoder, rounded
from lora_jax.serving.jobs import Prompt
from lora_jax.serving.sampling import Sampling, choose
from tests.models.options import FAMILIES
from tests.serving import tiny
from tests.serving.tiny import CONFIG, PROMPTS, SCANNED, Generated, generate

NEW = 9
ADAPTERS = (0, 1, 2, lora_jax.multi.BASE, 1)
ALL = tuple(Prompt(tokens, adapter) for tokens, adapter in zip(PROMPTS, ADAPTERS, strict=True))
LIVELY = Sampling(temperature=1.5, top_k=20, top_p=0.95, seed=4)


@pytest.fixture(scope="module")
def decoder() -> Decoder:
    return Decoder(CONFIG, tiny.params(CONFIG), *tiny.stacked(CONFIG))


@pytest.fixture(scope="module")
def mixed(decoder: Decoder) -> list[Generated]:
    """The outputs for all prompts in one batch."""
    return generate(decoder, ALL, max_new_tokens=NEW)


def whole_greedy(config: models.DecoderConfig, params: Any, prompt: list[int]) -> list[int]:
    """Decode greedily by definition: the model reads the whole text again for every token."""
    apply = applied(config)
    tokens = list(prompt)
    for _ in range(NEW):
        padded = np.zeros((1, 24), np.int32)
        padded[0, : len(tokens)] = tokens
        tokens.append(int(np.argmax(apply({"params": params}, padded)[0, len(tokens) - 1])))
    return tokens[len(prompt) :]


@functools.cache
def applied(config: models.DecoderConfig) -> Any:
    """Return the model without a cache, compiled once for each shape."""
    return jax.jit(models.DecoderModel(config).apply)


def test_a_mixed_batch_is_each_merged_model_alone(mixed: list[Generated]) -> None:
    for found, prompt, adapter in zip(mixed, PROMPTS, ADAPTERS, strict=True):
        assert found.finish == "length"
        assert found.tokens == whole_greedy(CONFIG, tiny.merged(CONFIG, adapter), prompt)
    assert mixed[0].tokens != mixed[4].tokens  # one prompt, two adapters


def test_a_mixed_batch_is_each_row_alone(decoder: Decoder, mixed: list[Generated]) -> None:
    for found, prompt in zip(mixed, ALL, strict=True):
        assert [found] == generate(decoder, [prompt], max_new_tokens=NEW)


def test_batches_one_after_another(decoder: Decoder, mixed: list[Generated]) -> None:
    narrow = Decoder(CONFIG, tiny.params(CONFIG), *tiny.stacked(CONFIG), rows=2, capacity=18)
    assert generate(narrow, ALL, max_new_tokens=NEW) == mixed
    assert generate(narrow, ALL, max_new_tokens=NEW) == mixed  # where the ring goes on
    pieces = list(narrow.read(narrow.submit(ALL, NEW)))
    for row, found in enumerate(mixed):
        own = [piece for piece in pieces if piece.row == row]
        assert [piece.token for piece in own] == found.tokens
        assert [piece.finish for piece in own] == [None] * (NEW - 1) + ["length"]


def test_scanned_layers_and_no_adapters() -> None:
    decoder = Decoder(SCANNED, tiny.params(SCANNED), *tiny.stacked(SCANNED))
    mixed = generate(decoder, ALL, max_new_tokens=NEW)
    plain = generate(
        Decoder(SCANNED, tiny.merged(SCANNED, 1)), list(map(Prompt, PROMPTS)), max_new_tokens=NEW
    )
    for found, alone, adapter in zip(mixed, plain, ADAPTERS, strict=True):
        assert (found == alone) == (adapter == 1)


FORMS = {"unrolled": CONFIG, "scanned": SCANNED} | {
    name: dataclasses.replace(CONFIG, **FAMILIES[name]) for name in ("gemma", "mixture")
}


@pytest.mark.few(2)
@pytest.mark.parametrize("config", FORMS.values(), ids=FORMS)
def test_logits_of_a_mixed_batch(config: models.DecoderConfig) -> None:
    """Prefill and one step through `adapt` equal the merged weights without a cache."""
    layout, stacked = tiny.stacked(config)
    model, ids = models.DecoderModel(config), jnp.asarray([[1, 2, 3], [4, 5, 6], [7, 8, 9]])
    chosen = jnp.asarray([2, lora_jax.multi.BASE, 1])

    def read(params: Any, ids: Any, cache: Any) -> Any:
        return model.apply({"params": params}, ids, cache, method=model.decode)

    @jax.jit
    def run(params: Any, stacked: Any, chosen: Any) -> Any:
        selection, g = lora_jax.multi.select(stacked, chosen), lora_jax.adapt(layout, read)
        one, new = g(params, selection, ids[:, :2], caches.empty(config, 3, 0))
        cache = caches.written(caches.empty(config, 3, 8), new, 0)
        two, _ = g(params, selection, ids[:, 2:], cache)
        return jnp.concatenate([one, two], axis=1)

    got = run(tiny.params(config), stacked, chosen)
    for row, adapter in enumerate(chosen.tolist()):
        want = applied(config)({"params": tiny.merged(config, adapter)}, ids[row : row + 1])[0]
        np.testing.assert_allclose(got[row], want, atol=2e-5, rtol=1e-5)


def test_other_prompts_and_adapters_compile_nothing(
    decoder: Decoder, mixed: list[Generated], compilations: list[str]
) -> None:
    generate(decoder, ALL, max_new_tokens=NEW)  # the programs of `mixed` may have been dropped
    warm = dataclasses.replace(LIVELY, temperature=0.7)
    generate(decoder, ALL, max_new_tokens=NEW, sampling=warm)
    before, programs = len(compilations), dict(decoder.compiled)
    for shift in range(1, 4):
        prompts = [
            Prompt([*p.tokens[shift:], *p.tokens[:shift], shift], (p.adapter + shift) % 3)
            for p in ALL
        ]
        generate(decoder, prompts, max_new_tokens=NEW)
        other = dataclasses.replace(LIVELY, temperature=1.0 + shift, top_p=0.5, seed=shift)
        generate(decoder, prompts[::-1], max_new_tokens=NEW - shift, sampling=other)
    assert len(compilations) == before
    assert decoder.compiled == programs


def test_one_prefill_and_one_step(compilations: list[str]) -> None:
    """A decoder compiles two programs."""
    for _ in range(2):
        before = len(compilations)
        decoder = Decoder(CONFIG, tiny.params(CONFIG), *tiny.stacked(CONFIG))
        generate(decoder, ALL[:2], max_new_tokens=NEW)
        assert [key[0] for key in decoder.compiled] == ["prefill", "step"]
    assert len(compilations) - before == 2


def test_the_step_holds_one_cache_and_no_second_base(decoder: Decoder) -> None:
    """The cache is donated; the other memory of the step does not grow with the base."""
    cache = caches.empty(CONFIG, 8, CONFIG.max_positions)
    held = sum(leaf.nbytes for leaf in jax.tree.leaves(cache))
    generate(decoder, ALL, max_new_tokens=NEW)
    program = decoder._programs["step",]
    assert program.memory_analysis().alias_size_in_bytes >= held


def test_stop_tokens(decoder: Decoder, mixed: list[Generated]) -> None:
    """A row stops alone and without its stop token, and the others go on as before."""
    stop = mixed[1].tokens[3]
    prompts = [dataclasses.replace(p, stop=[stop] if p is not ALL[0] else [77]) for p in ALL]
    found = generate(decoder, prompts, max_new_tokens=NEW)
    assert found[0] == mixed[0]
    for got, whole in zip(found[1:], mixed[1:], strict=True):
        place = whole.tokens.index(stop) if stop in whole.tokens else NEW
        assert got == Generated(whole.tokens[:place], "stop" if place < NEW else "length")
    assert found[1].finish == "stop"


def test_the_last_position_ends_a_row(decoder: Decoder) -> None:
    room = CONFIG.max_positions
    (found,) = generate(decoder, [Prompt([1] * (room - 3), 0)], max_new_tokens=NEW)
    assert len(found.tokens) == 3 and found.finish == "length"


def test_a_row_draws_as_it_would_alone(decoder: Decoder) -> None:
    settings = {"max_new_tokens": NEW, "sampling": LIVELY}
    both = generate(decoder, ALL[:2], **settings)
    assert generate(decoder, ALL[:1], **settings) == both[:1]
    alone = Decoder(CONFIG, tiny.params(CONFIG), *tiny.stacked(CONFIG), rows=1)
    assert generate(alone, ALL[:2], **settings) == both
    twins = generate(decoder, [ALL[0]] * 2, **settings)
    assert twins[0] == both[0] and twins[1] != twins[0]
    other = dataclasses.replace(LIVELY, seed=5)
    assert generate(decoder, ALL[:1], max_new_tokens=NEW, sampling=other) != both[:1]


def of_rows(sampling: Sampling, count: int) -> dict[str, Any]:
    """The sampling of so many rows."""
    return {name: np.repeat(value, count) for name, value in sampling.numbers.items()}


PROBABILITIES = np.array([0.05, 0.4, 0.1, 0.3, 0.15], np.float32)


@pytest.mark.few(3)
@pytest.mark.parametrize(
    ("sampling", "kept"),
    [
        (Sampling(1.0), [0, 1, 2, 3, 4]),
        (Sampling(1.0, top_k=2), [1, 3]),
        (Sampling(1.0, top_k=99), [0, 1, 2, 3, 4]),
        (Sampling(1.0, top_p=0.41), [1, 3]),
        (Sampling(1.0, top_p=0.39), [1]),
        (Sampling(1.0, top_p=0.71), [1, 3, 4]),
        (Sampling(1.0, top_p=1.0), [0, 1, 2, 3, 4]),
        (Sampling(1.0, top_k=3, top_p=0.8), [1, 3]),
        (Sampling(), [1]),
    ],
)
def test_draws_have_the_probabilities(sampling: Sampling, kept: list[int]) -> None:
    """The shares of 20,000 draws are within five standard deviations of the probabilities."""
    count = 20_000
    logits = jnp.broadcast_to(jnp.log(PROBABILITIES) + 3, (count, 5))
    drawn = jax.jit(choose)(
        of_rows(sampling, count), logits, jnp.arange(count), jnp.zeros(count, jnp.int32)
    )
    shares = np.bincount(drawn, minlength=5) / count
    want = np.where(np.isin(np.arange(5), kept), PROBABILITIES, 0)
    want = want / want.sum() if sampling.temperature else np.eye(5)[1]
    np.testing.assert_array_equal(shares > 0, want > 0)
    np.testing.assert_allclose(shares, want, atol=5 * 0.5 / count**0.5)


def test_temperature_divides_the_logits() -> None:
    count, sampling = 20_000, Sampling(2.0)
    logits = jnp.broadcast_to(jnp.log(PROBABILITIES), (count, 5))
    steps = jnp.full(count, 7, jnp.int32)
    drawn = choose(of_rows(sampling, count), logits, jnp.arange(count), steps)
    want = PROBABILITIES**0.5 / (PROBABILITIES**0.5).sum()
    shares = np.bincount(drawn, minlength=5) / count
    np.testing.assert_allclose(shares, want, atol=5 * 0.5 / count**0.5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"temperature": -1.0}, "temperature must be at least 0, got -1.0"),
        ({"temperature": 1.0, "top_k": 0}, "top_k must be at least 1"),
        ({"temperature": 1.0, "top_p": 1.5}, r"top_p must be in \(0, 1\], got 1.5"),
        ({"top_p": 0.9}, "at temperature 0 nothing is sampled; give a temperature"),
        ({"seed": -1}, "seed must be from 0"),
    ],
)
def test_settings_that_make_no_sense(change: dict[str, Any], message: str) -> None:
    with pytest.raises(LoraError, match=message):
        Sampling(**change)


@pytest.mark.parametrize(
    ("prompt", "more", "message"),
    [
        (Prompt([]), {}, "prompt 0 has 0 tokens; expected from 1 to 63: there is room for 64"),
        (Prompt([1] * 64), {}, "prompt 0 has 64 tokens"),
        (Prompt([1], 3), {}, "no adapter 3: there are 3, counted from 0"),
        (Prompt([1]), {"max_new_tokens": 0}, "max_new_tokens must be at least 1"),
    ],
)
def test_wrong_calls(decoder: Decoder, prompt: Prompt, more: dict[str, int], message: str) -> None:
    with pytest.raises(LoraError, match=message):
        generate(decoder, [prompt], **more)


@pytest.mark.parametrize("sampling", [Sampling(), LIVELY])
@pytest.mark.parametrize("wrong", [np.nan, np.inf])
def test_numbers_that_are_not_finite_are_no_token(sampling: Sampling, wrong: float) -> None:
    logits = jnp.zeros((2, 9)).at[1, 3].set(wrong).at[0, 4].set(5.0)
    tokens = choose(of_rows(sampling, 2), logits, jnp.arange(2), jnp.zeros(2, jnp.int32))
    assert int(tokens[0]) >= 0 and int(tokens[1]) == -1


def test_an_adapter_that_is_not_finite(
    decoder: Decoder, mixed: list[Generated], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is an error of its own prompts; texts of other adapters in the batch go on."""
    broken = jax.tree.map(lambda x: x.at[0].mul(jnp.nan) if x.ndim > 1 else x, decoder.stacked)
    monkeypatch.setattr(decoder, "stacked", broken)
    with pytest.raises(LoraError, match=r"prompt 0: adapter 0 .* logits that are not finite"):
        generate(decoder, ALL[:1], max_new_tokens=NEW)
    others = decoder.submit(ALL[1:], NEW)
    broke = decoder.submit(ALL[:1], NEW)
    found = list(decoder.read(others))
    assert [p.token for p in found if p.row == 0] == mixed[1].tokens
    assert [p.token for p in found if p.row == 3] == mixed[4].tokens
    with pytest.raises(LoraError, match="not finite"):
        list(decoder.read(broke))


def test_nothing_to_write(decoder: Decoder) -> None:
    assert generate(decoder, []) == []


def test_lengths_are_few_and_none_is_too_short() -> None:
    lengths = [rounded(n) for n in range(1, 1025)]
    assert all(length >= n for n, length in enumerate(lengths, 1))
    assert sorted(set(lengths)) == [16, 32, 64, 128, 256, 512, 1024]
