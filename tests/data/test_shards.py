"""The batches do not depend on the number of processes."""

import collections
import functools
import importlib
import itertools
import json
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer

from lora_jax.data import Batches, DataConfig, DataError, Shard, classification, language_modelling
from lora_jax.data.batches import BatchIterator
from lora_jax.data.files import Files
from lora_jax.data.packing import Packing, Streams
from lora_jax.models.text.tokens import TokenRow
from tests.data.test_classification import kept, texts
from tests.data.test_language_modelling import pairs, same, unpacked

ROOT = Path(__file__).parents[2]
Batch = dict[str, np.ndarray]
Make = Callable[[], Batches]
ROWS = 8  # of a batch
COUNTS = (2, 4)


def shards(count: int) -> list[Shard]:
    return [Shard((index,), count) for index in range(count)]


@pytest.fixture(params=["classification", "language_modelling"])
def pipeline(request: pytest.FixtureRequest, jsonl: Callable[..., str], words: Tokenizer) -> Any:
    """One of the two pipelines on 43 or 97 examples, with all its settings but the order."""
    if request.param == "classification":
        config = DataConfig(jsonl(train=texts(43)), buckets=(8, 16), max_length=24)
        return functools.partial(classification, config, words, "train", ROWS)
    return packing(jsonl, words, pairs(97))


def packing(jsonl: Callable[..., str], words: Tokenizer, rows: list[dict[str, str]]) -> Any:
    config = DataConfig(
        jsonl(train=rows), prompt="{question}", answer=" {answer}", eos="<end>", max_length=24
    )
    return functools.partial(language_modelling, config, words, "train", ROWS)


@pytest.fixture
def together(monkeypatch: pytest.MonkeyPatch) -> Callable[[Make, int], list[BatchIterator]]:
    """Return a function that makes the iterators of all shards, as several processes would."""

    def begin(make: Make, count: int) -> list[BatchIterator]:
        asked: list[list[int]] = [[] for _ in range(count)]

        def ask(shard: Shard, n: int) -> int:
            asked[shard.parts[0]].append(n)
            return max(n, 1)

        monkeypatch.setattr(Shard, "most", ask)
        for shard in shards(count):
            make().iterator(shard)
        most = [max(numbers) for numbers in zip(*asked, strict=True)]
        answers = [iter(most) for _ in range(count)]
        monkeypatch.setattr(Shard, "most", lambda shard, n: next(answers[shard.parts[0]]))
        batches = make()
        return [batches.iterator(shard) for shard in shards(count)]

    return begin


Together = Callable[[Make, int], list[BatchIterator]]


def whole(iterators: Iterable[Iterable[Batch]]) -> list[Batch]:
    """Return the global batches; every shard must give equally many, of the same shapes."""
    found = []
    for parts in zip(*iterators, strict=True):
        assert len({part[name].shape for part in parts for name in ("input_ids",)}) == 1
        found.append({name: np.concatenate([part[name] for part in parts]) for name in parts[0]})
    return found


@pytest.mark.matrix
@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize(
    "order",
    [
        {"shuffle": False, "epochs": 1},
        {"shuffle": True, "seed": 3, "epochs": 2},
        {"shuffle": True, "seed": 3, "epochs": None},
    ],
    ids=["once", "twice", "endless"],
)
def test_the_shards_together_are_the_global_batches(
    pipeline: Any, together: Together, order: dict[str, Any], count: int
) -> None:
    make = functools.partial(pipeline, **order)
    enough = 12
    expected = list(itertools.islice(make(), enough))
    parts = [itertools.islice(iterator, enough) for iterator in together(make, count)]
    assert same(whole(parts), expected)


@pytest.mark.parametrize("count", COUNTS)
def test_evaluation_has_every_example_exactly_once(
    jsonl: Callable[..., str], words: Tokenizer, together: Together, count: int
) -> None:
    config = DataConfig(jsonl(train=texts(43)), buckets=(8, 16), max_length=24)
    labelled = functools.partial(classification, config, words, "train", ROWS)
    assert sorted(kept(whole(together(labelled, count)))) == list(range(43))
    packed = packing(jsonl, words, pairs(97))
    tokens = [
        (2, *words.encode(f"{r['question']} {r['answer']}", add_special_tokens=False).ids, 4)
        for r in pairs(97)
    ]
    found = [example for example, _ in unpacked(whole(together(packed, count)))]
    assert collections.Counter(found) == collections.Counter(tokens)


NOTHING = {"question": " ".join(["w1"] * 30), "answer": "w2"}  # cut before its answer begins


@pytest.mark.parametrize("epochs", [1, None])
@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize(
    ("rows", "streams"),
    [(pairs(3), {0, 1, 2}), ([*[NOTHING] * 6, *pairs(2), *[NOTHING] * 5], {6, 7})],
    ids=["fewer examples than rows", "streams with nothing to learn"],
)
def test_streams_without_an_example_weigh_nothing(
    jsonl: Callable[..., str],
    words: Tokenizer,
    together: Together,
    rows: list[dict[str, str]],
    streams: set[int],
    count: int,
    epochs: int | None,
) -> None:
    make = functools.partial(packing(jsonl, words, rows), epochs=epochs)
    parts = [itertools.islice(iterator, 3) for iterator in together(make, count)]
    batches = whole(parts)
    assert len(batches) == (1 if epochs else 3)
    for batch in batches:
        assert set(np.flatnonzero(batch["loss_weight"].any(1)).tolist()) == streams
    if epochs:
        assert len(unpacked(batches)) == len(streams)


def test_each_stream_has_its_own_order(jsonl: Callable[..., str], words: Tokenizer) -> None:
    rows = [row for row in pairs(30) for _ in range(ROWS)]  # the same 30 examples in every stream
    make = packing(jsonl, words, rows)
    first = next(iter(make()))["input_ids"].tolist()
    assert first == first[:1] * ROWS
    shuffled = next(iter(make(shuffle=True, seed=1)))["input_ids"].tolist()
    assert len(set(map(tuple, shuffled))) == ROWS


def test_the_emptiest_rows_of_the_streams_come_apart() -> None:
    """The emptiest rows of the streams come at different times."""
    random = np.random.default_rng(0)

    def row() -> TokenRow:
        length = random.integers(10, 60)
        return np.ones(length, np.int32), np.ones(length, np.uint8)

    rows = {number: [row() for _ in range(200)] for number in range(ROWS)}
    packing = Packing(batch_size=ROWS, length=128, pad=0, seed=1, epochs=None)
    batches = itertools.islice(Streams(rows, packing, Shard(), "a split").begin(), 96)
    full = np.array([(batch["segment_ids"] > 0).mean(1) for batch in batches])
    assert full.mean(1).std() < 0.5 * full.std()  # independent: 1 / sqrt(ROWS)


def merged(states: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """Return the union of the states, passed through JSON as in a checkpoint."""

    def union(one: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
        both = {
            key: union(one[key], other[key]) if isinstance(one[key], dict) else one[key]
            for key in one.keys() & other.keys()
        }
        return {**one, **other, **both}

    found: dict[str, Any] = json.loads(json.dumps(functools.reduce(union, states)))
    return found


@pytest.mark.matrix
@pytest.mark.parametrize(("saved_by", "restored_by"), [(1, 2), (4, 2)])
@pytest.mark.parametrize("epochs", [1, None])
def test_a_state_saved_by_some_is_restored_by_others(
    pipeline: Any, together: Together, epochs: int | None, saved_by: int, restored_by: int
) -> None:
    make = functools.partial(pipeline, shuffle=True, seed=7, epochs=epochs)
    expected = list(itertools.islice(make(), 9))
    saving, going_on = together(make, saved_by), together(make, restored_by)
    for place in range(0, len(expected) + 1, 4):
        state = merged(iterator.get_state() for iterator in saving)
        for iterator in going_on:
            iterator.set_state(state)
        left = len(expected) - place
        assert same(whole(itertools.islice(i, left) for i in going_on), expected[place:])
        if epochs:
            assert all(next(iterator, None) is None for iterator in going_on)
        for iterator in saving:
            for _ in range(4):
                next(iterator, None)


def test_a_state_of_smaller_batches_is_refused(jsonl: Callable[..., str], words: Tokenizer) -> None:
    make = packing(jsonl, words, pairs(9))
    state = make().iterator(Shard((0,), 2)).get_state()
    with pytest.raises(DataError, match=r"(?s)lacks rows \[4, 5, 6, 7\].*it has 4 rows.*the batch"):
        make().iterator(Shard((1,), 2)).set_state(state)


def test_a_shard_reads_its_own_examples_only(
    jsonl: Callable[..., str], words: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: set[int] = set()

    class Watched(list[Any]):
        def __getitem__(self, index: Any) -> Any:
            places = range(len(self))[index]
            read.update(places if isinstance(places, range) else [places])
            return super().__getitem__(index)

    examples = Files.examples
    monkeypatch.setattr(Files, "examples", lambda self, split: Watched(examples(self, split)))
    batches = packing(jsonl, words, pairs(97))()
    assert read == {0}  # the first is read for its fields
    read.clear()
    list(batches.iterator(Shard((1,), 4)))
    assert read == {i for i in range(97) if i % ROWS in (2, 3)}


def test_lazily_read_shards_are_the_same(
    jsonl: Callable[..., str],
    words: Tokenizer,
    together: Together,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rows = pairs(60)
    rows[10:20] = [NOTHING] * 10
    make = functools.partial(packing(jsonl, words, rows), shuffle=True)
    expected = list(make())
    module = importlib.import_module(language_modelling.__module__)
    monkeypatch.setattr(module, "AHEAD", 20)
    assert same(whole(together(make, 4)), expected)  # 15 examples a shard: read at once
    monkeypatch.delattr(module, "collect")
    assert same(whole(together(make, 2)), expected)  # 30: read one by one


def test_facts_of_a_shard_speak_of_the_whole(jsonl: Callable[..., str], words: Tokenizer) -> None:
    batches = packing(jsonl, words, pairs(400))(shuffle=True, epochs=None)
    exact, scaled = batches.facts(), batches.facts(Shard((1,), 2))
    assert scaled.examples == exact.examples == 400
    for name in ("tokens", "batches", "padding"):
        assert getattr(scaled, name) == pytest.approx(getattr(exact, name), rel=0.1, abs=0.03)
        assert getattr(exact, name) > 0
    assert not exact.notes
    assert "0.5 of the examples" in scaled.notes[0]


def test_nothing_anywhere_is_an_error_and_nothing_here_is_not(
    jsonl: Callable[..., str], words: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    make = functools.partial(packing(jsonl, words, pairs(3)), epochs=None)
    with pytest.raises(DataError, match="'train': no example of it has anything to learn"):
        make().iterator(Shard((3,), 4))
    monkeypatch.setattr(Shard, "most", lambda shard, n: max(n, 1))
    assert not next(make().iterator(Shard((3,), 4)))["loss_weight"].any()


def test_rows_that_cannot_be_dealt_out(pipeline: Any) -> None:
    with pytest.raises(DataError, match=r"(?s)8 rows.*3 parts.*batch size to 6 or 9"):
        pipeline().iterator(Shard((0,), 3))
    with pytest.raises(DataError, match=r"batch size to 16\."):
        Shard((0,), 16).rows(8)
    with pytest.raises(DataError, match=r"no parts \(2,\) of 2"):
        Shard((2,), 2)


PROGRAM = """
import json, sys
import jax
from tokenizers import Tokenizer
rank, port, config, tokenizer = int(sys.argv[1]), *sys.argv[2:]
jax.config.update("jax_platforms", "cpu")
jax.distributed.initialize(f"127.0.0.1:{port}", 2, rank)
from lora_jax.data import DataConfig, Shard, language_modelling
shard = Shard((rank,), 2)
batches = language_modelling(
    DataConfig(config, eos="<end>", max_length=24), Tokenizer.from_str(tokenizer), "train", 2
)
# Longer in one process than in the other, and asked for facts in one of them only.
if rank:
    batches.facts(shard)
print(json.dumps([shard.most(5 - rank), len(list(batches.iterator(shard)))]))
"""


@pytest.mark.slow
def test_two_processes_agree(jsonl: Callable[..., str], words: Tokenizer, free_port: int) -> None:
    rows = [{"text": "w0 " * (20 if i % 2 else 2)} for i in range(20)]
    arguments = [str(free_port), jsonl(train=rows), words.to_str()]
    running = [
        subprocess.Popen(
            [sys.executable, "-c", PROGRAM, str(rank), *arguments],
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
        )
        for rank in range(2)
    ]
    try:
        said = [process.communicate(timeout=100)[0] for process in running]
    finally:
        for process in running:
            process.kill()
    assert [process.returncode for process in running] == [0, 0]
    assert [json.loads(text.splitlines()[-1]) for text in said] == [[5, 10], [5, 10]]
