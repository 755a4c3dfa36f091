"""`lora_jax.serving.open`: adapters in use from Python, by many threads, while they come and go."""

from __future__ import annotations

import concurrent.futures
import json
import pathlib
import random
import threading
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax
from lora_jax import LoraError, models, serving
from lora_jax.cli import generate
from lora_jax.serving.sampling import Sampling
from lora_jax.serving.server import Answer, Server
from tests.serving import classifiers
from tests.training import tiny

NEW = 6
RANKS = {"one": 1, "two": 3, "three": 2, "four": 3}
TEMPLATE = "{% for m in messages %}word5 {{ m.content }} {% endfor %}"
PROMPTS = [" ".join(tiny.WORDS[i : i + n]) for i, n in enumerate((1, 4, 2, 9, 1, 17, 3, 2))]


class Setup(NamedTuple):
    base: pathlib.Path
    folder: pathlib.Path

    def path(self, name: str) -> pathlib.Path:
        return self.folder / name


@pytest.fixture(scope="module")
def setup(tmp_path_factory: pytest.TempPathFactory) -> Setup:
    """A decoder and adapters of several ranks; "wide" and "others" do not fit among the rest."""
    folder = tmp_path_factory.mktemp("server")
    base = tiny.write_model(folder / "base", tiny.LLAMA)
    source = models.open(str(base))
    params = source.load()

    def apply(params: Any, ids: Any) -> Any:
        return models.DecoderModel(source.config).apply({"params": params}, ids)

    ids, more = jax.ShapeDtypeStruct((1, 4), jnp.int32), {"wide": 5, "others": 1, "talks": 2}
    for name, rank in (RANKS | more).items():
        part = "mlp" if name == "others" else "attention"
        spec = lora_jax.LoraSpec(rank, 2.0 * rank, targets=(f"layers_*/{part}/*/kernel",))
        layout = lora_jax.resolve(spec, apply, params, ids)
        draw = np.random.default_rng(len(name) + rank).normal
        adapters = {
            path: lora_jax.Factors(f.a, jnp.asarray(draw(size=f.b.shape), jnp.float32))
            for path, f in lora_jax.init(jax.random.key(rank), layout).items()
        }
        about: dict[str, Any] = {"model": {"reference": str(base)}}
        about |= {"chat": True, "template": TEMPLATE} if name == "talks" else {}
        adapter, own = lora_jax.Adapter(layout, adapters), lora_jax.fingerprint(params)
        lora_jax.save(folder / name, adapter, fingerprint=own, about=about)
    return Setup(base, folder)


def opened(setup: Setup, *names: str, **more: Any) -> Server:
    more = {"slots": 4, "batch_size": 4, "max_tokens": 32, **more}
    return serving.open(setup.base, {name: setup.path(name) for name in names}, **more)


@pytest.fixture(scope="module")
def alone(setup: Setup) -> dict[tuple[str, str], Answer]:
    """The answer to each prompt by each adapter, in a server that has no other."""
    found = {}
    for name in (*RANKS, "talks", "base"):
        server = opened(setup, *[name] * (name != "base"), slots=1, batch_size=1)
        for prompt in PROMPTS:
            (answer,) = server.generate([prompt], max_new_tokens=NEW)
            found[name, prompt] = answer
    return found


@pytest.fixture(scope="module")
def server(setup: Setup) -> Server:
    return opened(setup, "one", "two")


@pytest.mark.slow
def test_answers_are_those_of_the_command(
    setup: Setup, server: Server, tmp_path: pathlib.Path
) -> None:
    source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    rows = [{"prompt": p, "adapter": ("one", "two")[i % 2]} for i, p in enumerate(PROMPTS)]
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for sampling, more in (
        (Sampling(), []),
        (
            Sampling(0.8, 5, 0.9, 3),
            ["--temperature", ".8", "--top-k", "5", "--top-p", ".9", "--seed", "3"],
        ),
    ):
        options = ["--file", str(source), "--out", str(out), "--max-new-tokens", str(NEW), *more]
        given = [x for name in ("one", "two") for x in ("--adapter", str(setup.path(name)))]
        assert generate.main([*given, *options]) == 0
        wanted = [json.loads(line) for line in out.read_text().splitlines()]
        names = [row["adapter"] for row in rows]
        found = server.generate(PROMPTS, names, max_new_tokens=NEW, sampling=sampling)
        assert [a._asdict() for a in found] == [
            {name: row[name] for name in ("text", "tokens", "finish")} for row in wanted
        ]


def test_a_mixed_batch_is_each_alone(server: Server, alone: Any) -> None:
    names = [("one", "two", "base")[i % 3] for i in range(len(PROMPTS))]
    found = server.generate(PROMPTS, names, max_new_tokens=NEW)
    assert found == [alone[pair] for pair in zip(names, PROMPTS, strict=True)]


def test_a_stream_yields_the_text_in_pieces(server: Server, alone: Any) -> None:
    pieces = list(server.stream(PROMPTS[1], "two", max_new_tokens=NEW))
    assert all(isinstance(piece, str) for piece in pieces) and len(pieces) > 1
    answer = alone["two", PROMPTS[1]]
    assert ("".join(pieces), pieces[-1].finish) == (answer.text, answer.finish)


def test_conversations_and_fields(setup: Setup) -> None:
    server = opened(setup, "talks")
    messages = [{"role": "user", "content": "word1"}]
    one, two, three = server.generate(["word1", messages, {"prompt": "word1"}], max_new_tokens=NEW)
    assert one == two == three
    assert "".join(server.stream(messages, max_new_tokens=NEW)) == one.text


def test_nothing_compiles_after_warming_up(
    setup: Setup, alone: Any, compilations: list[str]
) -> None:
    """Prompts of all lengths, samplings, streams that are cancelled, and swaps of adapters."""
    server = opened(setup, "one", "two")
    assert server.warm_up() > 0
    before = len(compilations)
    for count in range(1, len(PROMPTS)):
        server.generate(PROMPTS[:count], "one", max_new_tokens=count)
    server.generate([" ".join(["word1"] * 31)], "base")
    server.generate(PROMPTS, "two", max_new_tokens=3, sampling=Sampling(0.7, 3, 0.9, 1))
    server.add("four", setup.path("four"))
    server.remove("one")
    server.add("other", setup.path("three"))
    with server.stream(PROMPTS[0], "four") as texts:
        next(texts)
    (answer,) = server.generate(PROMPTS[:1], "other", max_new_tokens=NEW)
    assert answer == alone["three", PROMPTS[0]]
    assert len(compilations) == before


def test_adapters_come_and_go_under_load(setup: Setup, alone: Any) -> None:
    """Every answer is of the adapter that its name stood for when the request came."""
    server = opened(setup, "one", "two")
    over, names = threading.Event(), {"swapped": "three"}
    server.add("swapped", setup.path("three"))

    def ask(seed: int) -> int:
        draw, count = random.Random(seed), 0
        while not over.is_set() or count < 3:
            name, prompt = draw.choice(["one", "two", "base"]), draw.choice(PROMPTS)
            (answer,) = server.generate([prompt], name, max_new_tokens=NEW)
            assert answer == alone[name, prompt]
            (answer,) = server.generate([prompt], "swapped", max_new_tokens=NEW)
            assert answer in (alone["three", prompt], alone["four", prompt])
            count += 1
        return count

    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        asked = [pool.submit(ask, seed) for seed in range(4)]
        try:
            for turn in range(6):
                names["swapped"] = ("four", "three")[turn % 2]
                server.add("swapped", setup.path(names["swapped"]))  # in place of the other
                (answer,) = server.generate(PROMPTS[:1], "swapped", max_new_tokens=NEW)
                assert answer == alone[names["swapped"], PROMPTS[0]]
                server.add("brief", setup.path("one")) if len(server.names) < 4 else None
                server.remove("brief")
        finally:
            over.set()
        assert all(future.result() >= 3 for future in asked)
    assert server.names == ("one", "two", "swapped") or {*server.names} == {"one", "two", "swapped"}


def test_a_removed_adapter_answers_what_came_before(setup: Setup, alone: Any) -> None:
    server = opened(setup, "two", slots=1)
    texts = server.stream(PROMPTS[1], "two", max_new_tokens=NEW)
    first = next(texts)
    server.remove("two")
    with pytest.raises(LoraError, match="no adapter is called 'two'"):
        server.generate(PROMPTS[:1], "two")
    server.add("new", setup.path("one"))  # waits until the only slot is free
    assert first + "".join(texts) == alone["two", PROMPTS[1]].text
    assert server.generate(PROMPTS[:1], "new", max_new_tokens=NEW) == [alone["one", PROMPTS[0]]]


@pytest.mark.parametrize("way", ["close", "with", "drop"])
def test_cancelling_frees_the_row(server: Server, alone: Any, way: str) -> None:
    decoder = server.decoder
    for _ in range(3 * decoder.rows):
        texts = server.stream(PROMPTS[0], "two", max_new_tokens=31)
        next(texts)
        if way == "close":
            texts.close()
            assert list(texts) == []
        elif way == "with":
            with texts:
                pass
        del texts
    assert decoder.busy() == set()
    assert server.generate(PROMPTS[:1], "two", max_new_tokens=NEW) == [alone["two", PROMPTS[0]]]
    decoder.turn()
    assert not decoder._running and not decoder._waiting


def test_a_slow_reader_stops_nobody(server: Server, alone: Any) -> None:
    slow = server.stream(PROMPTS[2], "one", max_new_tokens=NEW)
    first = next(slow)
    assert server.generate(PROMPTS, "two", max_new_tokens=NEW)[3] == alone["two", PROMPTS[3]]
    assert first + "".join(slow) == alone["one", PROMPTS[2]].text


def test_a_base_to_which_the_first_adapter_comes(setup: Setup, alone: Any) -> None:
    server = opened(setup)
    assert server.generate(PROMPTS[:1], max_new_tokens=NEW) == [alone["base", PROMPTS[0]]]
    server.add("two", setup.path("two"))
    server.add("one", setup.path("one"))
    found = server.generate(PROMPTS[:3], ["one", "base", "two"], max_new_tokens=NEW)
    pairs = zip(("one", "base", "two"), PROMPTS[:3], strict=True)
    assert found == [alone[pair] for pair in pairs]


def test_a_run_directory_is_opened_on_its_base(setup: Setup, alone: Any) -> None:
    server = serving.open(setup.path("one"), batch_size=1, max_tokens=32)
    assert server.names == ("one",)
    assert server.generate(PROMPTS[:1], max_new_tokens=NEW) == [alone["one", PROMPTS[0]]]


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda s, f: s.generate(["a"], "tow"), "1: no adapter is called 'tow'; nearest: 'two"),
        (lambda s, f: s.stream("a", "onee"), "nearest: 'one'"),
        (lambda s, f: s.generate(["a"]), "does not say which adapter it is for"),
        (lambda s, f: s.generate("a", "one"), "expected a list, got 'a' alone"),
        (lambda s, f: s.generate(["a"], ["one", "two"]), "1 were given, and the names of 2"),
        (lambda s, f: s.generate(["w " * 40], "one"), "has 40 tokens; expected from 1 to 31"),
        (lambda s, f: s.predict(["a"], "one"), r"writes texts: use generate\(\)"),
        (lambda s, f: s.remove("tow"), "no adapter is called 'tow'; nearest: 'two'"),
        (lambda s, f: s.remove("base"), "stands for no adapter"),
        (lambda s, f: s.add("base", f("one")), "cannot be called 'base'"),
        (lambda s, f: s.add("new", f("nowhere")), "no adapter at"),
        (lambda s, f: s.add("new", f("wide")), r"'new' does not fit into this server(.|\n)*rank 5"),
        (lambda s, f: s.add("new", f("others")), r"does not fit(.|\n)*no room for the target"),
    ],
)  # fmt: skip
def test_wrong_calls(server: Server, setup: Setup, call: Any, said: str) -> None:
    with pytest.raises(LoraError, match=said):
        call(server, setup.path)
    assert {*server.names} == {"one", "two"}


def test_no_slot_is_free(setup: Setup) -> None:
    server = opened(setup, "one", "two", slots=2)
    with pytest.raises(
        LoraError, match=r"no slot is free for 'new': there are 2, for\n  one\n  two"
    ):
        server.add("new", setup.path("one"))


# ---- classifiers


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """Runs "three", "two" and "again" (three classes too), and one of four classes."""
    folder = tmp_path_factory.mktemp("tasks")
    weights = tiny.write_model(folder / "model", tiny.ROBERTA)
    labels: dict[str, Any] = {"three": int, "two": lambda kind: ("no", "yes")[kind % 2]}
    for seed, (name, rank, label) in enumerate(
        (("three", 4, "three"), ("two", 1, "two"), ("again", 2, "three"))
    ):
        source = classifiers.examples(folder / f"{name}-data", labels[label])
        config = classifiers.config_of(weights, source, rank=rank, seed=seed)
        classifiers.export_in(folder / "runs" / name, config)
    return folder / "runs"


TEXTS = [*PROMPTS, " ".join(tiny.WORDS[:12])]


def same(found: list[dict[str, Any]], wanted: list[dict[str, Any]]) -> bool:
    return all(
        {**a, "probabilities": 0} == {**b, "probabilities": 0}
        and a["probabilities"] == pytest.approx(b["probabilities"], abs=2e-5)
        for a, b in zip(found, wanted, strict=True)
    )


@pytest.mark.slow
def test_predictions_of_many_threads(tasks: pathlib.Path, compilations: list[str]) -> None:
    """Each is what its text gets alone; swaps under load and sizes of all kinds compile nothing."""
    paths = {name: tasks / name for name in ("three", "two")}
    single = {}
    for name in (*paths, "again"):
        server = serving.open(tasks / name, slots=1, batch_size=1)
        single[name] = [server.predict([text])[0] for text in TEXTS]
    server = serving.open(tasks / "three", {"two": tasks / "two"}, slots=4)
    server.warm_up()
    before = len(compilations)

    def ask(seed: int) -> bool:
        draw, right = random.Random(seed), True
        for _ in range(8):
            rows = draw.choices(range(len(TEXTS)), k=draw.randint(1, 9))
            names = draw.choices([*paths], k=len(rows))
            found = server.predict([TEXTS[row] for row in rows], names)
            right &= same(found, [single[n][row] for n, row in zip(names, rows, strict=True)])
        return right

    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        asked = [pool.submit(ask, seed) for seed in range(4)]
        for _ in range(4):
            server.add("again", tasks / "again")
            found = server.predict(TEXTS, "again")
            assert same(found, single["again"])
            server.remove("again")
        assert all(future.result() for future in asked)
    assert len(compilations) == before
    with pytest.raises(LoraError, match=r"text 1: no adapter is called 'thre'; nearest: 'three'"):
        server.predict(["word1"], "thre")
    with pytest.raises(LoraError, match=r"is open as a classifier: use predict\(\)"):
        server.generate(["word1"], "three")


def test_an_example_that_fails_is_an_error_of_its_own(
    tasks: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = serving.open(tasks / "three")
    classifier = server.classifier
    arrays = classifier.arrays

    def broken(rows: Any) -> Any:
        if any(len(row.ids) == 4 for row in rows):
            raise LoraError("a row of four tokens")
        return arrays(rows)

    wanted = server.predict(["word1", "word2"])
    monkeypatch.setattr(classifier, "arrays", broken)
    bad = classifier.submit([0], ["word1 word2"])
    assert same(server.predict(["word1", "word2"]), wanted)
    with pytest.raises(LoraError, match="a row of four tokens"):
        list(classifier.read(bad))


def test_a_head_that_is_too_wide(tasks: pathlib.Path) -> None:
    server = serving.open(tasks / "two")
    with pytest.raises(LoraError, match=r"does not fit(.|\n)*3 outputs(.|\n)*room for 2 outputs"):
        server.add("three", tasks / "three")
