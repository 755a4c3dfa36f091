"""Batches for classification: every example once, in buckets, in a seeded order."""

import collections
import dataclasses
import json
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer

from lora_jax.data import Batches, DataConfig, DataError, classification, describe
from tests.data.conftest import WORDS

Batch = dict[str, np.ndarray]
LENGTHS = (8, 16, 24)


def texts(count: int, longest: int = 20) -> list[dict[str, Any]]:
    random = np.random.default_rng(3)
    return [
        {"text": " ".join(random.choice(WORDS, random.integers(1, longest + 1))), "label": i % 3}
        for i in range(count)
    ]


@pytest.fixture
def config(jsonl: Callable[..., str]) -> DataConfig:
    source = jsonl(train=texts(43), validation=texts(11))
    return DataConfig(source, buckets=LENGTHS[:-1], max_length=LENGTHS[-1])


def kept(batches: Iterable[Batch]) -> list[int]:
    """Return the indices of the examples that have a weight."""
    return [i for b in batches for i, w in zip(b["index"].tolist(), b["weight"], strict=True) if w]


def same(one: Iterable[Batch], other: Iterable[Batch]) -> bool:
    pairs = list(zip(one, other, strict=True))
    return all(
        a.keys() == b.keys() and all(np.array_equal(a[k], b[k]) for k in a) for a, b in pairs
    )


def shuffled(config: DataConfig, tokenizer: Tokenizer, **kwargs: Any) -> Batches:
    return classification(config, tokenizer, "train", 4, **{"shuffle": True, "seed": 5} | kwargs)


@pytest.mark.parametrize("batch_size", [1, 4, 11, 43, 64])
@pytest.mark.parametrize("shuffle", [False, True])
def test_an_epoch_has_every_example_exactly_once(
    config: DataConfig, words: Tokenizer, batch_size: int, shuffle: bool
) -> None:
    batches = classification(config, words, "train", batch_size, shuffle=shuffle, seed=1)
    assert sorted(kept(batches)) == list(range(43))
    assert len(list(batches)) == batches.facts().batches == -(-43 // batch_size)


def test_batches_hold_the_tokens_and_labels_of_their_examples(
    config: DataConfig, words: Tokenizer
) -> None:
    rows = texts(43)
    for batch in shuffled(config, words):
        for i, index in enumerate(batch["index"]):  # rows that fill up a batch hold an example too
            mask = batch["mask"][i]
            assert batch["input_ids"][i][mask].tolist() == words.encode(rows[index]["text"]).ids
            assert not mask[mask.sum() :].any()
            assert batch["label"][i] == rows[index]["label"]
        kinds = {name: value.dtype for name, value in batch.items()}
        assert kinds.pop("mask") == np.bool_ and kinds.pop("weight") == np.float32
        assert set(kinds.values()) == {np.dtype(np.int32)}


def test_a_batch_has_the_smallest_bucket_that_holds_it(
    config: DataConfig, words: Tokenizer
) -> None:
    for batch in shuffled(config, words):
        longest = batch["mask"].sum(1).max()
        assert batch["input_ids"].shape[1] == min(n for n in LENGTHS if n >= longest)


def test_like_lengths_come_together(config: DataConfig, words: Tokenizer) -> None:
    mixed = 0
    for batch in shuffled(config, words):
        buckets = {int(np.searchsorted(LENGTHS, n)) for n in batch["mask"].sum(1)}
        mixed += len(buckets) > 1
    assert mixed <= len(LENGTHS) - 1


def test_batches_come_in_no_order_of_length(config: DataConfig, words: Tokenizer) -> None:
    widths = [b["input_ids"].shape[1] for b in shuffled(config, words)]
    assert sorted(set(widths)) == list(LENGTHS)
    assert widths not in (sorted(widths), sorted(widths, reverse=True))


def test_unshuffled_batches_go_from_short_to_long_and_by_place(
    config: DataConfig, words: Tokenizer
) -> None:
    order = kept(classification(config, words, "train", 4))
    rows = texts(43)
    keys = [(int(np.searchsorted(LENGTHS, len(rows[i]["text"].split()) + 2)), i) for i in order]
    assert keys == sorted(keys)


def test_facts_agree_with_the_batches(config: DataConfig, words: Tokenizer) -> None:
    batches = shuffled(config, words)
    used = sum(int(b["mask"][b["weight"] > 0].sum()) for b in batches)
    places = sum(b["mask"].size for b in batches)
    facts = batches.facts()
    assert (facts.tokens, facts.examples) == (used, 43)
    assert facts.padding == pytest.approx(1 - used / places)
    assert dict(facts.classes) == {"0": 15, "1": 14, "2": 14}
    assert "43 examples" in describe([facts])


def test_another_seed_and_another_epoch_give_another_order(
    config: DataConfig, words: Tokenizer
) -> None:
    one, other = kept(shuffled(config, words)), kept(shuffled(config, words, seed=6))
    assert one != other
    two_epochs = kept(shuffled(config, words, epochs=2))
    assert two_epochs[:43] == one
    assert sorted(two_epochs[43:]) == sorted(one)
    assert two_epochs[43:] != one


def test_resumed_at_any_batch_it_goes_on_as_uninterrupted(
    config: DataConfig, words: Tokenizer
) -> None:
    whole = list(shuffled(config, words, epochs=2))
    iterator = iter(shuffled(config, words, epochs=2))
    for cut in range(0, len(whole) + 1, 5):
        state = json.loads(json.dumps(iterator.get_state()))
        assert len(json.dumps(state)) < 200
        resumed = iter(shuffled(config, words, epochs=2))
        resumed.set_state(state)
        assert same(resumed, whole[cut:])
        for _ in range(5):
            next(iterator, None)


def test_an_endless_run_has_no_end(config: DataConfig, words: Tokenizer) -> None:
    iterator = iter(shuffled(config, words, epochs=None))
    counts = collections.Counter(kept(next(iterator) for _ in range(5 * 11)))
    assert set(counts.values()) == {5}


def test_truncation_is_counted(jsonl: Callable[..., str], words: Tokenizer) -> None:
    rows = [{"text": " ".join(WORDS[:n]), "label": n % 2} for n in (3, 10, 14, 30)]
    config = DataConfig(jsonl(train=rows), max_length=12, buckets=())
    batches = classification(config, words, "train", 4)
    assert (batches.facts().truncation.examples, batches.facts().truncation.tokens) == (2, 4 + 20)
    (batch,) = batches
    assert batch["mask"].sum(1).tolist() == [5, 12, 12, 12]
    assert (batch["input_ids"][1:, 11] == 3).all()  # [SEP] ends a cut text too
    assert "max_length cut 24 tokens off 2 examples" in str(batches.facts())


def test_a_tokenizer_keeps_its_own_settings(config: DataConfig, minilm: Tokenizer) -> None:
    before = minilm.to_str()
    facts = classification(config, minilm, "train", 4).facts()
    assert minilm.to_str() == before
    assert facts.padding < 0.9  # its own padding to 128 is off


def test_a_real_tokenizer(jsonl: Callable[..., str], minilm: Tokenizer) -> None:
    rows = [{"text": "A three-hour cinema master class.", "label": "fresh"}] * 2
    config = DataConfig(jsonl(train=rows), label_names=("rotten", "fresh"))
    (batch,) = classification(config, minilm, "train", 2)
    ids = [101, 1037, 2093, 1011, 3178, 5988, 3040, 2465, 1012, 102]
    assert batch["input_ids"].tolist() == [ids + [0] * 14] * 2
    assert batch["label"].tolist() == [1, 1]


def test_pairs(jsonl: Callable[..., str], words: Tokenizer) -> None:
    rows = [{"a": "w0 w1", "b": "w2", "label": 0.5}, {"a": "w3", "b": "w4 w5", "label": 2.0}]
    config = DataConfig(jsonl(train=rows), text_fields=("a", "b"), max_length=8, buckets=())
    batches = classification(config, words, "train", 2)
    (batch,) = batches
    assert batch["input_ids"].tolist() == [[2, 5, 6, 3, 7, 3, 0, 0], [2, 8, 3, 9, 10, 3, 0, 0]]
    assert batch["token_types"].tolist() == [[0, 0, 0, 0, 1, 1, 0, 0], [0, 0, 0, 1, 1, 1, 0, 0]]
    assert batch["label"].dtype == np.float32
    assert batch["label"].tolist() == [0.5, 2.0]
    assert batches.labels is not None
    assert batches.labels.regression


def test_limits(config: DataConfig, words: Tokenizer) -> None:
    config = dataclasses.replace(config, train_limit=10, eval_limit=3)
    assert sorted(kept(classification(config, words, "train", 4))) == list(range(10))
    assert sorted(kept(classification(config, words, "validation", 4))) == [0, 1, 2]


def test_errors(config: DataConfig, words: Tokenizer) -> None:
    def opened(**changes: Any) -> Batches:
        return classification(dataclasses.replace(config, **changes), words, "train", 4)

    with pytest.raises(DataError, match=r"(?s)no 'labl'.*data.label_field.*nearest: 'label'"):
        opened(label_field="labl")
    with pytest.raises(DataError, match=r"(?s)no 'sentence'.*data.text_fields"):
        opened(text_fields=("sentence",))
    with pytest.raises(DataError, match=r"train\.jsonl:3: label 2 is not one of the 2 classes"):
        opened(label_names=("a", "b"))
    with pytest.raises(DataError, match="leaves no room"):
        opened(max_length=2, buckets=())
