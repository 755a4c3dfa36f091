"""Packed rows: every example whole and once, with its loss weights."""

import collections
import dataclasses
import importlib
import json
import math
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, processors

from lora_jax.data import Batches, DataConfig, DataError, language_modelling
from tests.data.conftest import WORDS

Batch = dict[str, np.ndarray]
Example = tuple[tuple[int, ...], tuple[int, ...]]  # tokens, and a 1 for each that is learned


def pairs(count: int) -> list[dict[str, str]]:
    random = np.random.default_rng(4)
    return [
        {
            "question": " ".join(random.choice(WORDS, random.integers(1, 9))),
            "answer": " ".join(random.choice(WORDS, random.integers(1, 6))),
        }
        for _ in range(count)
    ]


@pytest.fixture
def config(jsonl: Callable[..., str]) -> DataConfig:
    return DataConfig(
        jsonl(train=pairs(97)),
        prompt="{question} w0",
        answer=" {answer}",
        eos="<end>",
        max_length=24,
    )


def expected(words: Tokenizer, limit: int | None = None) -> list[Example]:
    """Return the expected examples, made without the code under test."""
    made = []
    for row in pairs(97)[:limit]:
        prompt = [2, *words.encode(row["question"] + " w0", add_special_tokens=False).ids]
        answer = [*words.encode(row["answer"], add_special_tokens=False).ids, 4]
        made.append(((*prompt, *answer), (*[0] * len(prompt), *[1] * len(answer))))
    return made


def unpacked(batches: Iterable[Batch]) -> list[Example]:
    """Return the examples in rows with a weight, from inputs, targets, segments and weights."""
    found = []
    for batch in batches:
        for i in range(len(batch["input_ids"])):
            segments = batch["segment_ids"][i]
            if not batch["loss_weight"][i].any():
                continue
            for segment in range(1, segments.max() + 1):
                (places,) = np.nonzero(segments == segment)
                assert (np.diff(places) == 1).all()
                assert batch["positions"][i][places].tolist() == list(range(len(places)))
                inputs, targets = batch["input_ids"][i][places], batch["targets"][i][places]
                assert inputs[1:].tolist() == targets[:-1].tolist()
                weights = batch["loss_weight"][i][places].astype(int)
                found.append(((int(inputs[0]), *targets.tolist()), (0, *weights.tolist())))
    return found


def opened(config: DataConfig, tokenizer: Tokenizer, **kwargs: Any) -> Batches:
    return language_modelling(
        config, tokenizer, "train", 4, **{"shuffle": True, "seed": 5} | kwargs
    )


def same(one: Iterable[Batch], other: Iterable[Batch]) -> bool:
    return all(
        a.keys() == b.keys() and all(np.array_equal(a[k], b[k]) for k in a)
        for a, b in zip(one, other, strict=True)
    )


@pytest.mark.parametrize(("batch_size", "epochs"), [(1, 3), (4, 1), (64, 3)])
@pytest.mark.parametrize("shuffle", [False, True])
def test_packed_rows_hold_every_example_once_an_epoch(
    config: DataConfig, words: Tokenizer, batch_size: int, epochs: int, shuffle: bool
) -> None:
    batches = language_modelling(
        config, words, "train", batch_size, shuffle=shuffle, seed=2, epochs=epochs
    )
    assert collections.Counter(unpacked(batches)) == collections.Counter(expected(words) * epochs)


@pytest.mark.parametrize("epochs", [1, 3])
def test_rows_of_one_example(config: DataConfig, words: Tokenizer, epochs: int) -> None:
    config = dataclasses.replace(config, pack=False)
    batches = opened(config, words, epochs=epochs)
    assert max(batch["segment_ids"].max() for batch in batches) == 1
    assert collections.Counter(unpacked(batches)) == collections.Counter(expected(words) * epochs)
    assert batches.facts().batches == len(list(opened(config, words))) == math.ceil(97 / 4)
    test_nothing_outside_the_segments(config, words)


def test_nothing_outside_the_segments(config: DataConfig, words: Tokenizer) -> None:
    for batch in opened(config, words):
        empty = batch["segment_ids"] == 0
        for name in ("input_ids", "targets", "loss_weight", "positions"):
            assert not batch[name][empty].any()


def test_types_and_shapes(config: DataConfig, words: Tokenizer) -> None:
    for batch in opened(config, words):
        assert {name: (value.dtype, value.shape) for name, value in batch.items()} == {
            "input_ids": (np.int32, (4, 24)),
            "targets": (np.int32, (4, 24)),
            "loss_weight": (np.float32, (4, 24)),
            "segment_ids": (np.int32, (4, 24)),
            "positions": (np.int32, (4, 24)),
        }


def test_rows_are_well_filled(config: DataConfig, words: Tokenizer) -> None:
    batches = opened(config, words)
    rows = np.concatenate([b["segment_ids"] for b in batches])
    used = sum(len(tokens) - 1 for tokens, _ in expected(words))
    assert (rows > 0).sum() >= used
    assert batches.facts().tokens == used
    assert batches.facts().batches == len(list(batches))
    assert batches.facts().padding < 0.15


def test_orders_differ_by_seed_and_epoch(config: DataConfig, words: Tokenizer) -> None:
    one, other = unpacked(opened(config, words)), unpacked(opened(config, words, seed=6))
    assert one != other
    two = unpacked(opened(config, words, epochs=2))
    assert two[: len(one)] != two[len(one) :]


def test_resumed_at_any_batch_it_goes_on_as_uninterrupted(
    config: DataConfig, words: Tokenizer
) -> None:
    whole = list(opened(config, words, epochs=2))
    iterator = iter(opened(config, words, epochs=2))
    for cut in range(0, len(whole) + 1, 3):
        state = json.loads(json.dumps(iterator.get_state()))
        assert len(json.dumps(state)) < 100 * 4  # one row
        resumed = iter(opened(config, words, epochs=2))
        resumed.set_state(state)
        assert same(resumed, whole[cut:])
        for _ in range(3):
            next(iterator, None)


def test_an_endless_run_has_no_end(config: DataConfig, words: Tokenizer) -> None:
    iterator = iter(opened(config, words, epochs=None))
    counts = collections.Counter(unpacked(next(iterator) for _ in range(100)))
    assert len(counts) == len(set(expected(words)))
    assert min(counts.values()) > 1


def test_what_is_left_out_is_left_out_lazily_too(
    config: DataConfig, words: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    short = dataclasses.replace(config, max_length=6)
    ahead = opened(short, words)
    lazily = _lazily(short, words, monkeypatch)
    assert collections.Counter(unpacked(lazily)) == collections.Counter(unpacked(ahead))
    assert lazily.facts().truncation.dropped >= ahead.facts().truncation.dropped > 0


def _lazily(config: DataConfig, words: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> Batches:
    module = importlib.import_module("lora_jax.data.language_modelling")
    monkeypatch.setattr(module, "AHEAD", 10)
    return opened(config, words)


def test_without_an_answer_everything_is_learned(config: DataConfig, words: Tokenizer) -> None:
    config = dataclasses.replace(config, prompt="{answer}", answer="")
    for tokens, learned in unpacked(opened(config, words)):
        assert learned == (0, *[1] * (len(tokens) - 1))
        assert tokens[0] == 2  # [CLS], from the tokenizer's post-processor
        assert tokens[-1] == 4


def test_without_an_end(config: DataConfig, words: Tokenizer) -> None:
    config = dataclasses.replace(config, eos="")
    without = {tokens[:-1] for tokens, _ in expected(words)}
    assert {tokens for tokens, _ in unpacked(opened(config, words))} == without


def test_an_end_spelled_out_in_the_answer(config: DataConfig, words: Tokenizer) -> None:
    spelled = dataclasses.replace(config, eos="", answer=" {answer} <end>")
    assert same(opened(spelled, words), opened(config, words))


def test_what_max_length_cuts_is_counted(config: DataConfig, words: Tokenizer) -> None:
    limit = 8
    batches = opened(dataclasses.replace(config, max_length=limit), words)
    cut = [(t[: limit + 1], m[: limit + 1]) for t, m in expected(words)]
    kept = [(t, m) for t, m in cut if any(m[1:])]
    assert collections.Counter(unpacked(batches)) == collections.Counter(kept)
    longer = [len(t) - limit - 1 for t, _ in expected(words) if len(t) > limit + 1]
    facts = batches.facts()
    assert (facts.truncation.examples, facts.truncation.tokens) == (len(longer), sum(longer))
    assert facts.truncation.dropped == len(cut) - len(kept) > 0
    assert facts.examples == len(kept)
    assert f"cut {sum(longer):,} tokens off {len(longer)} examples" in str(facts)


def test_an_example_as_long_as_a_row_is_not_cut(
    jsonl: Callable[..., str], words: Tokenizer
) -> None:
    rows = [{"text": " ".join(WORDS[:n])} for n in (22, 23, 24)]  # [CLS] and <end> are added
    config = DataConfig(jsonl(train=rows), eos="<end>", max_length=24)
    facts = opened(config, words).facts()
    assert (facts.truncation.examples, facts.truncation.tokens) == (1, 1)


def test_one_token_alone_teaches_nothing(jsonl: Callable[..., str], words: Tokenizer) -> None:
    bare = Tokenizer.from_str(words.to_str())
    bare.post_processor = processors.Sequence([])
    config = DataConfig(jsonl(train=[{"text": "w0"}, {"text": "w1 w2"}]), eos="")
    batches = opened(config, bare)
    assert unpacked(batches) == [((6, 7), (0, 1))]
    assert batches.facts().truncation.dropped == 1


def test_limit(config: DataConfig, words: Tokenizer) -> None:
    batches = opened(dataclasses.replace(config, train_limit=10), words)
    assert sorted(unpacked(batches)) == sorted(expected(words, 10))


@pytest.mark.parametrize(("examples", "batch_size"), [(97, 4), (10, 16)])
def test_padding_of_an_endless_run(
    config: DataConfig, words: Tokenizer, examples: int, batch_size: int
) -> None:
    config = dataclasses.replace(config, train_limit=examples)
    batches = language_modelling(config, words, "train", batch_size, shuffle=True, epochs=None)
    iterator = iter(batches)
    full = np.mean([next(iterator)["segment_ids"] > 0 for _ in range(32)])
    used = sum(len(tokens) - 1 for tokens, _ in expected(words, examples))
    facts = batches.facts()
    assert facts.tokens == used
    assert facts.padding == pytest.approx(1 - full, abs=0.05)
    assert facts.batches == pytest.approx(used / full / batch_size / 24, abs=1)


def test_errors(config: DataConfig, words: Tokenizer) -> None:
    def tried(**changes: Any) -> None:
        iter(opened(dataclasses.replace(config, **changes), words))

    with pytest.raises(
        DataError, match=r"(?s)data.eos must name.*\[PAD\], \[CLS\], \[SEP\], <end>"
    ):
        tried(eos=None)
    with pytest.raises(DataError, match=r"(?s)data.eos '<ned>' is not.*nearest: <end>"):
        tried(eos="<ned>")
    with pytest.raises(DataError, match=r"(?s)no 'qestion', which data.prompt names.*'question'"):
        tried(prompt="{qestion}")
    with pytest.raises(DataError, match="no example of it has anything to learn"):
        tried(max_length=2)
