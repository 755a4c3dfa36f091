"""The data's config: values that it refuses."""

import dataclasses
import inspect
from typing import Any

import pytest
import tyro

from lora_jax.data import DataConfig, DataError, ImageDataConfig
from lora_jax.data.config import ExamplesConfig
from lora_jax.models.text.templates import Template
from lora_jax.system.checked import ConfigError


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("source", ""),
        ("max_length", 0),
        ("batch_size", -1),
        ("eval_batch_size", 0),
        ("train_limit", 0),
        ("text_fields", ()),
        ("text_fields", ("a", "b", "c")),
        ("buckets", (0, 8)),
    ],
)
def test_values_that_cannot_be(field: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=f"data.{field} must be"):
        DataConfig(**{field: value})


def test_regression_has_no_classes() -> None:
    with pytest.raises(DataError, match="exclude each other"):
        DataConfig(regression=True, label_names=("a",))


def test_limits_go_with_their_splits() -> None:
    config = DataConfig(train_limit=1, eval_limit=2, test_limit=3, test_split="extra")
    names = ("train", "validation", "extra", "test")
    assert [config.limit(s) for s in names] == [1, 2, 3, None]


@pytest.mark.parametrize("kind", [DataConfig, ImageDataConfig])
def test_every_field_is_explained(kind: Any, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        tyro.cli(kind, args=["--help"])
    text = " ".join(capsys.readouterr().out.split())
    source = inspect.getsource(kind) + inspect.getsource(ExamplesConfig)
    for field in dataclasses.fields(kind):
        assert f"--{field.name.replace('_', '-')}" in text
        assert f"\n    {field.name}: " in source
        after = source.split(f"\n    {field.name}: ")[1].split("\n", 1)[1]
        assert after.startswith('    """')


def test_templates() -> None:
    assert Template("{a} {{x}} {b}", "prompt").fill({"a": 1, "b": "{c}"}, "here") == "1 {x} {c}"
    with pytest.raises(DataError, match=r"(?s)here has no 'wrod'.*data.prompt.*nearest: 'word'"):
        Template("{wrod}", "prompt").fill({"word": "a", "definition": "b"}, "here")


@pytest.mark.parametrize("text", ["{", "{}", "{0}", "{a.b}", "{a[0]}", "{a:>3}", "{a!r}", "a } b"])
def test_not_templates(text: str) -> None:
    with pytest.raises(DataError, match=r"data.answer .*brace"):
        Template(text, "answer")
