"""`lora-jax predict`: a mixed file gives what each adapter alone and training's evaluation give."""

from __future__ import annotations

import dataclasses
import json
import pathlib
import shutil
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest

import lora_jax
from lora_jax.checkpoint.manifest import Manifest
from lora_jax.checkpoint.saved_adapter import SavedAdapter
from lora_jax.cli import predict
from lora_jax.serving import classifier, jsonl, served_adapters, text_classifier
from lora_jax.training.text import TextConfig
from tests.serving import classifiers
from tests.training import tiny

Opened = tuple[served_adapters.Served, text_classifier.TextClassifier]
WORDS = " ".join(tiny.WORDS[:6])


class Trained(NamedTuple):
    weights: pathlib.Path
    folder: pathlib.Path
    configs: dict[str, TextConfig]

    def given(self, *names: str) -> list[str]:
        """Return the option --adapter for each of the runs."""
        return [x for name in names for x in ("--adapter", str(self.folder / name))]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """Three runs: three classes, two (other rank, scale and targets, a trained norm), a number."""
    folder = tmp_path_factory.mktemp("serving")
    weights = tiny.write_model(folder / "model", tiny.ROBERTA)
    three = classifiers.examples(folder / "three", int)
    two = classifiers.examples(folder / "two", lambda kind: ("no", "yes")[kind % 2])
    number = classifiers.examples(folder / "number", lambda kind: kind / 2)
    norm = "bert/encoder/layer_1/attention_norm/scale"
    configs = {
        "three": classifiers.config_of(weights, three),
        "two": classifiers.config_of(
            weights,
            two,
            rank=1,
            alpha=3.0,
            targets=("**/mlp/*/kernel",),
            seed=1,
            trainable=("classifier/**", norm),
        ),
        "number": classifiers.config_of(weights, number, rank=2, seed=2),
    }
    for name, config in configs.items():
        make = classifiers.train_in if name == "two" else classifiers.export_in
        make(folder / "runs" / name, config)
    return Trained(weights, folder / "runs", configs)


def texts(trained: Trained, name: str) -> list[str]:
    file = trained.folder.parent / name / "validation.jsonl"
    return [json.loads(row)["text"] for row in file.read_text().splitlines()]


def mixed(trained: Trained) -> list[dict[str, Any]]:
    """Return all validation texts of all tasks, shuffled, each with its adapter and a number."""
    rows = [
        {"text": text, "adapter": name, "n": i}
        for name in trained.configs
        for i, text in enumerate(texts(trained, name))
    ]
    return [rows[i] for i in np.random.default_rng(0).permutation(len(rows))]


def predicted(
    folder: pathlib.Path, rows: list[dict[str, Any]], *arguments: str
) -> list[dict[str, Any]]:
    source, out = folder / "in.jsonl", folder / "out.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert predict.main(["--file", str(source), "--out", str(out), *arguments]) == 0
    return [json.loads(row) for row in out.read_text().splitlines()]


def scores(made: classifier.Classifier, ids: Any, texts: Any) -> dict[int, Any]:
    """The scores of each text."""
    return dict(made.read(made.submit(ids, texts)))


def assert_near(one: dict[str, Any], other: dict[str, Any]) -> None:
    assert one.keys() == other.keys()
    if isinstance(one["prediction"], float):
        assert one["prediction"] == pytest.approx(other["prediction"], abs=2e-5)
    else:
        assert one["prediction"] == other["prediction"]
        assert one["probabilities"] == pytest.approx(other["probabilities"], abs=2e-5)


@pytest.fixture(scope="module")
def opened(trained: Trained) -> Opened:
    served = served_adapters.BaseChoice().open(
        [str(trained.folder / name) for name in trained.configs], "predict"
    )
    return served, text_classifier.TextClassifier(served, 16)


@pytest.fixture(scope="module")
def answers(trained: Trained, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Return the outputs of the mixed file, in windows shorter than the file."""
    folder = tmp_path_factory.mktemp("mixed")
    given = trained.given("three", "two", "number")
    return predicted(folder, mixed(trained), *given, "--batch-size", "16", "--window", "50")


def test_mixed_is_what_training_evaluates(trained: Trained, opened: Opened) -> None:
    served, made = opened
    rows = mixed(trained)
    ids = [served.names.index(row["adapter"]) for row in rows]
    found = scores(made, ids, [row["text"] for row in rows])
    assert sorted(found) == list(range(len(rows)))
    expected = {
        name: classifiers.evaluated(trained.folder / name, config)
        for name, config in trained.configs.items()
    }
    assert {name: outputs.shape[1] for name, outputs in expected.items()} == {
        "three": 3,
        "two": 2,
        "number": 1,
    }
    for i, row in enumerate(rows):
        wanted = expected[row["adapter"]][row["n"]]
        assert found[i].shape == wanted.shape
        np.testing.assert_allclose(found[i], wanted, atol=1e-5 * np.abs(wanted).max() + 1e-6)
    # Outputs of another adapter are clearly different.
    two = scores(made, [1] * len(rows), [row["text"] for row in rows])
    assert max(np.abs(two[i][:1] - found[i][:1]).max() for i in range(len(rows))) > 0.05


def test_mixed_is_each_alone(
    trained: Trained, answers: list[dict[str, Any]], tmp_path: pathlib.Path
) -> None:
    """An exported folder is complete, and can be moved."""
    for name in ("three", "number"):
        own = [row for row in mixed(trained) if row["adapter"] == name]
        bare = [{"text": row["text"], "n": row["n"]} for row in own]  # one adapter needs no name
        moved = shutil.copytree(trained.folder / name / "adapters/best", tmp_path / name)
        alone = predicted(tmp_path, bare, "--adapter", str(moved))
        for one, other in zip(alone, [a for a in answers if a["adapter"] == name], strict=True):
            assert_near(one, other)


def test_order_and_fields_are_kept(trained: Trained, answers: list[dict[str, Any]]) -> None:
    rows = mixed(trained)
    assert [{name: a[name] for name in ("text", "adapter", "n")} for a in answers] == rows
    by_name = {a["adapter"]: a for a in answers}
    assert list(by_name["two"]["probabilities"]) == ["no", "yes"]
    assert list(by_name["three"]["probabilities"]) == ["0", "1", "2"]
    assert "probabilities" not in by_name["number"]
    for answer in answers:
        if "probabilities" in answer:
            shares = answer["probabilities"]
            assert sum(shares.values()) == pytest.approx(1.0, abs=1e-5)
            assert answer["prediction"] == max(shares, key=shares.__getitem__)


def test_one_program_for_each_length(opened: Opened) -> None:
    made = text_classifier.TextClassifier(opened[0], 4)
    short, long = "word1 word2", " ".join(["word3"] * 14)
    for ids in ([0, 1, 2, 0], [2, 2, 2], [1], [0, 1] * 9):
        for text in (short, long):
            assert len(scores(made, ids, [text] * len(ids))) == len(ids)
    assert sorted(made.compiled) == [(rows, n) for rows in (1, 4) for n in (8, 16)]
    assert made.cut.examples == 0
    scores(made, [0], [f"{long} {long}"])
    assert (made.cut.examples, made.cut.tokens) == (1, 14)
    assert len(made.compiled) == 4


def test_a_pair_is_read_from_its_two_fields(trained: Trained, tmp_path: pathlib.Path) -> None:
    fields = ("premise", "hypothesis")
    source = classifiers.examples(tmp_path / "data", int, fields)
    config = classifiers.config_of(trained.weights, source, fields=fields, pooling="roberta_head")
    run = classifiers.export_in(tmp_path / "pairs", config)
    rows = [json.loads(r) for r in (tmp_path / "data/validation.jsonl").read_text().splitlines()]
    found = predicted(tmp_path, rows, "--adapter", str(run))
    for row, outputs in zip(found, classifiers.evaluated(run, config), strict=True):
        shares = np.exp(outputs) / np.exp(outputs).sum()
        assert list(row["probabilities"].values()) == pytest.approx(shares.tolist(), abs=1e-5)
    status = predict.main([*trained.given("two"), "--adapter", str(run), "--text", "a"])
    assert status == 1  # their heads pool differently


def test_texts_of_the_command_line(trained: Trained, capsys: pytest.CaptureFixture[str]) -> None:
    given = trained.given("three", "two")
    assert predict.main([*given, "--text", "word1", "--text", WORDS]) == 0
    rows = [json.loads(row) for row in capsys.readouterr().out.splitlines()]
    assert [(row["text"], row["adapter"]) for row in rows] == [
        (text, name) for text in ("word1", WORDS) for name in ("three", "two")
    ]


GOOD = {"text": "word1", "adapter": "two"}


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"text": "a"}, r"line 2 does not say which adapter(.|\n)*three(.|\n)*two"),
        ({"text": "a", "adapter": "tow"}, r"line 2: no adapter is called 'tow'; nearest: 'two'"),
        ({"text": "a", "adapter": 1}, "line 2: 'adapter' is 1, expected a str"),
        ({"text": "a", "adapter": "base"}, "line 2: 'base' stands for no adapter, and the base"),
        (
            {"txt": "a", "adapter": "two"},
            "line 2 has no field 'text'; its fields: 'txt', 'adapter'",
        ),
        ({"text": ["a"], "adapter": "two"}, r"line 2: 'text' is \[\"a\"\], expected a str"),
        ({"text": None, "adapter": "two"}, "line 2: 'text' is null, expected a str"),
        ([], "line 2 holds a list, expected an object"),
    ],
)
def test_a_line_that_cannot_be_classified(
    row: Any, said: str, opened: Opened, tmp_path: pathlib.Path
) -> None:
    source = tmp_path / "in.jsonl"
    source.write_text("".join(json.dumps(r) + "\n" for r in (GOOD, row)))
    with pytest.raises(lora_jax.LoraError, match=said):
        list(classifier.predict(*opened, list(jsonl.read(str(source)))))


def test_progress_is_told_as_scores_come(opened: Opened) -> None:
    sized = [
        jsonl.JsonLine({"text": text, "adapter": "two"}, "here", size)
        for size, text in ((100, f"{WORDS} {WORDS}"), (1, "word1"))
    ]
    done: list[int] = []
    served, made = opened[0], text_classifier.TextClassifier(opened[0], 1)
    first = next(classifier.predict(served, made, sized, done.append))
    assert (first["text"], done) == (f"{WORDS} {WORDS}", [1, 100])


def test_errors_are_lines_on_stderr(
    trained: Trained, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """An error has exit status 1, and an existing output file stays as it was."""
    source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text('{"text": "a"}\n{"text"\n')
    out.write_text("kept")
    asked = ["--file", str(source), "--out", str(out)]
    cases = {
        "line 2 is not JSON": [*trained.given("two"), *asked],
        "no adapter: give --adapter PATH": asked,
        "--batch-size must be at least 1, got 0": [*trained.given("two"), "--batch-size", "0"],
        "exclude each other": [*trained.given("two"), *asked, "--text", "a"],
        "No such file": [*trained.given("two"), "--file", str(tmp_path / "none.jsonl")],
        "no adapter at nowhere": ["--adapter", "nowhere", "--text", "a"],
    }
    for said, arguments in cases.items():
        assert predict.main(arguments) == 1
        captured = capsys.readouterr()
        assert captured.err.startswith("error: "), captured.err
        assert said in captured.err
        assert captured.out == ""
    assert out.read_text() == "kept"


def test_scores_that_are_not_finite_are_an_error(trained: Trained, tmp_path: pathlib.Path) -> None:
    member = SavedAdapter.open_lora(trained.folder / "two/adapters/best", "broken")
    trainable = jax.tree.map(lambda x: x * np.nan, member.trainable)
    lora_jax.save(
        tmp_path / "broken",
        lora_jax.Adapter(member.layout, member.parameters, trainable),
        about=member.about,
    )
    opened = served_adapters.BaseChoice(allow_other_base=True).open(
        [str(tmp_path / "broken")], "predict"
    )
    made = text_classifier.TextClassifier(opened, 4)
    with pytest.raises(lora_jax.LoraError, match=r"--text: adapter 'broken' gives scores that are"):
        list(classifier.predict(opened, made, [jsonl.JsonLine({"text": "a"}, "--text")]))


@pytest.mark.parametrize("pooling", [[], {}, None, "max"])
def test_a_pooling_that_there_is_not(pooling: object) -> None:
    about = {"model": {"pooling": pooling}}
    member = SavedAdapter(pathlib.Path("here"), lora_jax.Layout(), Manifest({}, {}), about, "a")
    with pytest.raises(lora_jax.LoraError, match=r"'a' says model\.pooling is"):
        text_classifier._pooling([member])


@pytest.mark.parametrize(
    "change",
    [
        {"labels": None},
        {"labels": ["a", 1]},
        {"text_fields": []},
        {"text_fields": ["a", "b", "c"]},
        {"lengths": [16, 8]},
        {"lengths": [0]},
        {"lengths": "16"},
    ],
)
def test_an_adapter_that_does_not_say_what_it_classifies(
    change: dict[str, Any], trained: Trained
) -> None:
    """The description of an adapter may come from anybody, so it is checked."""
    member = SavedAdapter.open_lora(trained.folder / "two/adapters/best", "two")
    wrong = dataclasses.replace(member, about={**member.about, **change})
    with pytest.raises(lora_jax.LoraError, match=r"'two'(.|\n)*does not say what it"):
        text_classifier.TextClassifier.task_of(wrong)
    task = classifier.ClassifierTask(("no", "yes"), ("text",), (8, 16))
    assert text_classifier.TextClassifier.task_of(member) == task
    with pytest.raises(lora_jax.LoraError, match="a head of 3 outputs; it has 2"):
        served_adapters.check_head(member, 3)
