"""`lora-jax generate`: prompts in, texts out, and errors."""

from __future__ import annotations

import io
import json
import pathlib
import sys
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

import lora_jax
from lora_jax import models
from lora_jax.cli import generate, text_sinks
from lora_jax.serving.jobs import Piece, Prompt
from lora_jax.serving.prompts import Request
from lora_jax.serving.texts import decoded
from tests.training import tiny

NEW = 6
TEMPLATE = "{% for m in messages %}word5 {{ m.content }} {% endfor %}"
TEMPLATE += "{% if add_generation_prompt %}word6{% endif %}"
EOS = "word14"


class Setup(NamedTuple):
    base: pathlib.Path
    encoder: pathlib.Path
    folder: pathlib.Path

    def given(self, *names: str) -> list[str]:
        """Return the option --adapter for each name."""
        return [x for name in names for x in ("--adapter", str(self.folder / name))]


@pytest.fixture(scope="module")
def setup(tmp_path_factory: pytest.TempPathFactory) -> Setup:
    """A base, and adapters of unequal rank; `one` stores its prompt and its end, `talks` a chat
    template."""
    folder = tmp_path_factory.mktemp("generate")
    base = tiny.write_model(folder / "base", tiny.LLAMA)
    source = models.open(str(base))
    params = source.load()

    def apply(params: Any, ids: Any) -> Any:
        return models.DecoderModel(source.config).apply({"params": params}, ids)

    ids = jax.ShapeDtypeStruct((1, 4), jnp.int32)
    about: dict[str, Any] = {"model": {"reference": str(base)}}
    chat = {"chat": True, "template": TEMPLATE}
    for name, rank, more in (
        ("one", 1, {"prompt": "{word} word2", "eos": EOS}),
        ("two", 3, {}),
        ("talks", 3, chat),
    ):
        spec = lora_jax.LoraSpec(rank, 2.0 * rank, targets=("layers_*/attention/*/kernel",))
        layout = lora_jax.resolve(spec, apply, params, ids)
        random = np.random.default_rng(rank)
        adapters = {
            path: lora_jax.Factors(f.a, jnp.asarray(random.normal(size=f.b.shape), jnp.float32))
            for path, f in lora_jax.init(jax.random.key(rank), layout).items()
        }
        lora_jax.save(
            folder / name,
            lora_jax.Adapter(layout, adapters),
            fingerprint=lora_jax.fingerprint(params),
            about={**about, **more},
        )
    return Setup(base, tiny.write_model(folder / "encoder", tiny.ROBERTA), folder)


def answers(tmp_path: pathlib.Path, rows: Any, *arguments: str) -> list[dict[str, Any]]:
    """Return the output as JSONL; the input rows are objects, or lines of text."""
    source, out = tmp_path / "in", tmp_path / "out.jsonl"
    source.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows))
    files = ("--file", str(source), "--out", str(out))
    assert generate.main([*files, "--max-new-tokens", str(NEW), *arguments]) == 0
    return [json.loads(line) for line in out.read_text().splitlines()]


def test_a_prompt_is_put_into_the_chat_template(
    setup: Setup, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def texts(rows: list[Any], *more: str) -> list[str]:
        return [row["text"] for row in answers(tmp_path, rows, *setup.given("talks"), *more)]

    (expected,) = texts(["word5 word1 word6"], "--no-template")
    messages = [{"role": "user", "content": "word1"}]
    assert texts(["word1"]) == texts([{"messages": messages}]) == [expected]
    source = tmp_path / "messages.jsonl"
    source.write_text(json.dumps({"messages": messages}))
    assert generate.main([*setup.given("two"), "--file", str(source)]) == 1
    assert "was not trained on conversations" in capsys.readouterr().err


def test_every_line_by_its_own_adapter(setup: Setup, tmp_path: pathlib.Path) -> None:
    rows = [
        {"prompt": "word1 word2", "adapter": "two", "n": 0},
        {"word": "word1", "adapter": "one"},
        {"prompt": "word1 word2", "adapter": "base"},
        {"prompt": "word3", "adapter": "two"},
    ]
    mixed = answers(tmp_path, rows, *setup.given("one", "two"))
    assert [(a["adapter"], a["prompt"]) for a in mixed] == [
        ("two", "word1 word2"),
        ("one", "word1 word2"),
        ("base", "word1 word2"),
        ("two", "word3"),
    ]
    assert list(mixed[0]) == ["prompt", "adapter", "n", "text", "tokens", "finish"]
    assert len({a["text"] for a in mixed[:3]}) == 3
    for answer in mixed:
        assert len(answer["text"].split()) == answer["tokens"] <= NEW
        assert (answer["finish"] == "length") == (answer["tokens"] == NEW)
    own = [a for a in mixed if a["adapter"] == "two"]
    alone = answers(tmp_path, [a["prompt"] for a in own], *setup.given("two"))
    assert [a["text"] for a in alone] == [a["text"] for a in own]


@pytest.mark.slow
def test_plain_prompts_are_for_every_adapter(
    setup: Setup, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    shared = [*setup.given("one", "two"), "--base-too", "--max-new-tokens", str(NEW)]
    assert generate.main([*shared, "--prompt", "word1", "--prompt", "word5 word6"]) == 0
    typed = capsys.readouterr()
    heads = ["[one] word1 ", "[two] word1 ", "[base] word1 "]
    heads += [head.replace("word1", "word5 word6") for head in heads]
    for line, head in zip(typed.out.splitlines(), heads, strict=True):
        assert line.startswith(head) and len(line) > len(head)
    assert "one: trained on prompts like '{word} word2'" in typed.err
    assert "6 prompts" in typed.err and "2 programs" in typed.err
    piped = io.BytesIO(b"word1\n\nword5 word6\n")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BufferedReader(piped)))
    assert generate.main(shared) == 0
    assert capsys.readouterr().out == typed.out


@pytest.mark.slow
def test_a_text_ends_where_training_ended_it(setup: Setup, tmp_path: pathlib.Path) -> None:
    """Adapter `one` stops at the end token that it stores, and `two` at the given `--stop`."""
    long = ["--max-new-tokens", "60"]
    rows = [{"prompt": f"word{i}", "adapter": name} for name in ("one", "two") for i in range(8)]
    free = answers(tmp_path, rows, *setup.given("one", "two"), *long, "--batch-size", "16")
    mine, others = free[:8], free[8:]
    assert any(EOS in a["text"].split() for a in others)  # for `two` it is a word like any other
    assert not any(EOS in a["text"].split() for a in mine)  # `one` ends there and leaves it out
    assert any(a["finish"] == "stop" for a in mine)
    word = next(a["text"].split()[1] for a in others if a["tokens"] > 2)
    again = answers(tmp_path, rows[8:], *setup.given("two"), *long, "--stop", word)
    for answer in again:
        assert word not in answer["text"].split()
    assert any(answer["finish"] == "stop" for answer in again)


@pytest.mark.parametrize("count", [1, 2])
def test_a_terminal_shows_texts_as_they_grow(count: int) -> None:
    """A single text is typed as it grows; several stand in a block that is removed at the end."""
    file = io.StringIO()
    console = Console(file=file, force_terminal=True, width=60, height=20)
    requests = [Request("one", "word1", Prompt([5], 0), {}) for _ in range(count)]
    sink: Any = text_sinks.TypedSink(console, requests[0])
    if count > 1:
        sink = text_sinks.BlockSink(console, requests)
    seen = []

    def pieces() -> Iterator[Piece]:
        for step, finish in ((8, None), (9, "length")):
            for row in reversed(range(count)):
                yield Piece(row, step + row, finish)
                seen.append(file.getvalue())

    with sink:
        texts = decoded(pieces(), requests, tiny.tokenizer(pair=False))
        text_sinks.transcribe(texts, range(len(requests)), requests, sink)
    assert all("word4" in text for text in seen) if count == 1 else "word5" in seen[2]
    assert "word4 word5" not in seen[0]
    text = seen[-1]
    assert text.index("word1") < text.index("word4")


def test_answers_wait_for_those_before_them() -> None:
    file = io.StringIO()
    requests = [Request(n, "word1", Prompt([5], 0), {}) for n in ("one", "two")]

    def pieces() -> Iterator[Piece]:
        yield Piece(1, None, "stop")
        assert file.getvalue() == ""
        yield Piece(0, 8, "length")

    with text_sinks.BlockSink(Console(file=file), requests) as sink:
        texts = decoded(pieces(), requests, tiny.tokenizer(pair=False))
        text_sinks.transcribe(texts, range(len(requests)), requests, sink)
    assert file.getvalue() == "[one] word1 word4\n[two] word1\n"


def said(capsys: pytest.CaptureFixture[str]) -> str:
    return " ".join(capsys.readouterr().err.split())


@pytest.mark.few(4)
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "no model: give --adapter PATH, a run directory of train.py, or --base"),
        (["--base", "BASE", "--prompt", "a", "--file", "b"], "exclude each other: drop one"),
        (["--base", "BASE", "--file", "nowhere.jsonl"], "nowhere.jsonl"),
        (["--base", "BASE", "--prompt", "a", "--batch-size", "0"], "--batch-size must be at least"),
        (["--base", "BASE", "--prompt", "a", "--top-k", "5"], "give a temperature above 0"),
        (["--base", "BASE", "--prompt", ""], "--prompt 1: the prompt is empty"),
        (["--base", "BASE", "--prompt", "w " * 70], "--prompt 1: the prompt has 70 tokens, and"),
        (["--base", "BASE", "--prompt", "a", "--stop", "word1 word2"], "is 2 tokens; give a text"),
        (["--base", "ENCODER", "--prompt", "a"], "is an encoder; `lora-jax predict"),
    ],
)  # fmt: skip
def test_what_a_user_can_do_wrong(
    setup: Setup, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    places = {"BASE": str(setup.base), "ENCODER": str(setup.encoder)}
    assert generate.main([places.get(a, a) for a in arguments]) == 1
    error = said(capsys)
    assert error.startswith("error: ") and message in error


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({"prompt": "a", "adapter": "tow"}, "no adapter is called 'tow'; nearest: 'two'"),
        ({"prompt": "a"}, "does not say which adapter it is for, and there are several"),
        ({"adapter": "one", "wrd": "a"}, "has no field 'word': adapter 'one' was trained on"),
        ({"adapter": "two", "text": "a"}, "has no field 'prompt'; its fields: 'adapter', 'text'"),
        ({"adapter": "two", "prompt": 3}, "'prompt' is 3, expected a str"),
    ],
)
def test_lines_that_cannot_be_used(
    setup: Setup,
    tmp_path: pathlib.Path,
    capsys: pytest.CaptureFixture[str],
    line: dict[str, Any],
    message: str,
) -> None:
    source = tmp_path / "in.jsonl"
    good = {"prompt": "a", "adapter": "two"}
    source.write_text(json.dumps(good) + "\n" + json.dumps(line) + "\n")
    assert generate.main([*setup.given("one", "two"), "--file", str(source)]) == 1
    error = said(capsys)
    assert f"{source}, line 2" in error and message in error


def test_broken_lines_are_skipped(setup: Setup, tmp_path: pathlib.Path) -> None:
    """With --skip-broken a line that cannot be used keeps its place, with the reason."""
    good = {"prompt": "word1", "adapter": "two"}
    rows = [good, {"n": 1, "adapter": "tow"}, '{"prompt"', {**good, "prompt": 3}, good]
    found = answers(tmp_path, rows, *setup.given("one", "two"), "--skip-broken")
    assert found[0] == found[4] and found[0]["tokens"] and "error" not in found[0]
    assert "nearest: 'two'" in found[1].pop("error") and found[1] == rows[1]
    assert list(found[2]) == ["error"] and "line 3 is not JSON" in found[2]["error"]
    assert "'prompt' is 3" in found[3]["error"] and "text" not in found[3]


def test_an_adapter_of_another_base(
    setup: Setup, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tiny.write_model(tmp_path / "other", {**tiny.LLAMA, "intermediate_size": 48})
    arguments = [*setup.given("one"), "--base", str(other), "--prompt", "word1"]
    assert generate.main(arguments) == 1
    assert "adapter 'one', trained on" in (error := said(capsys)) and "is not for the base" in error


@pytest.mark.slow
def test_a_conversation_goes_on(
    setup: Setup,
    tmp_path: pathlib.Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Each line is answered as a file of the messages so far would be."""
    lines = "word1 word6\n\nword2\n" + "word3 " * 99 + "\n/new\nword2\n"
    monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
    assert generate.main([*setup.given("talks"), "--chat", "--max-new-tokens", str(NEW)]) == 0
    out, err = capsys.readouterr()
    first, second, third = out.splitlines()
    assert (
        "Write a message; /new begins another conversation." in err
        and "has positions for 64" in err
    )

    def answer(*messages: str) -> str:
        roles = ("user", "assistant", "user")
        said = [{"role": r, "content": m} for r, m in zip(roles, messages, strict=False)]
        (row,) = answers(tmp_path, [{"messages": said}], *setup.given("talks"))
        return str(row["text"])

    assert first == answer("word1 word6")
    assert second == answer("word1 word6", first, "word2") != third
    assert third == answer("word2")


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--prompt", "a"], "--chat and --prompt"),
        (["--no-template"], "one adapter that was trained on conversations"),
    ],
)
def test_a_conversation_takes_no_prompts(
    setup: Setup, more: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert generate.main([*setup.given("talks"), "--chat", *more]) == 1
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("names", [("one",), ("talks", "two")])
def test_a_conversation_is_with_one_that_talks(
    setup: Setup, names: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    assert generate.main([*setup.given(*names), "--chat"]) == 1
    assert "one adapter that was trained on conversations" in capsys.readouterr().err
