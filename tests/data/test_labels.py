"""Labels: classes from a source, from a config or from the data, and real numbers."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

from lora_jax.data import DataConfig, DataError, Labels, classification, labels_of, open_source
from tests.data import stand_in


def found(jsonl: Callable[..., str], values: list[Any], **options: Any) -> Labels:
    config = DataConfig(jsonl(train=[{"text": "a", "label": v} for v in values]), **options)
    return labels_of(config, open_source(config.source))


@pytest.mark.parametrize(
    ("values", "names"),
    [
        ([2, 0], ("0", "1", "2")),
        ([True, False], ("0", "1")),
        (["b", "a", "b"], ("a", "b")),
        (["10", "9"], ("9", "10")),
        (["--5", "²"], ("--5", "²")),  # not a number, although `isdigit` accepts one of them
        ([0.5, 1.0], ()),
    ],
)
def test_found(jsonl: Callable[..., str], values: list[Any], names: tuple[str, ...]) -> None:
    labels = found(jsonl, values)
    assert labels.names == names
    assert labels.regression == (names == ())
    assert labels.outputs == max(1, len(names))


def test_said(jsonl: Callable[..., str]) -> None:
    assert found(jsonl, ["b", "a"], label_names=("b", "a")).names == ("b", "a")
    assert found(jsonl, [1, 2], regression=True).names == ()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (["a", 1], "more than one kind: int, str"),
        ([0, -1], "class ids start at 0"),
        ([f"{i / 7:.4f}" for i in range(1200)], "data.regression=True"),
        ([0, 5_000_000], r"class ids up to 5000000\. .*data.label_names"),
        (["a", ["b"]], r"jsonl:2: label \['b'\], expected a text or a number"),
        ([None, None], "jsonl:1: label None, expected a text or a number"),
        (["a", "a"], "every label is 'a', and from one class there is nothing to learn"),
        ([0, 0], "every label is '0'"),
    ],
)
def test_not_to_be_found(jsonl: Callable[..., str], values: list[Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        found(jsonl, values)


@pytest.mark.parametrize(("value", "id"), [(0, 0), (1, 1), ("no", 0), ("yes", 1), (True, 1)])
def test_encoding(value: Any, id: int) -> None:
    found = Labels(("no", "yes")).encode(value, "here")
    assert (type(found), found) == (int, id)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (2, "here: label 2 is not one of the 2 classes no, yes"),
        ("yess", r"(?s)label 'yess' is not.*nearest: yes"),
        (-1, "hidden labels"),
        (0.5, "data.regression=True"),
    ],
)
def test_not_a_class(value: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        Labels(("no", "yes")).encode(value, "here")


def test_not_a_number() -> None:
    assert Labels(()).encode("1.5", "here") == 1.5
    for value in ("x", "nan", None, [], "inf", 10**400):
        with pytest.raises(DataError, match=r"here: label .* is not a number \(data.regression"):
            Labels(()).encode(value, "here")


def test_glue_shapes(tmp_path: Path, words: Tokenizer) -> None:
    assert stand_in.SIZES["train"] == 150  # importing it registers the data set
    fields = {"text_fields": ("sentence1", "sentence2"), "data_dir": str(tmp_path)}
    pair = DataConfig("tfds:glue_stand_in/pair", **fields)  # type: ignore[arg-type]
    batches = classification(pair, words, "train", 32, shuffle=True)
    assert batches.labels == Labels(("different", "same"))
    assert dict(batches.facts().classes) == {"different": 75, "same": 75}
    assert sum(b["label"][b["weight"] > 0].sum() for b in batches) == 75
    with pytest.raises(DataError, match=r"split 'test', example 0: label -1 means hidden"):
        classification(pair, words, "test", 32)
    score = DataConfig("tfds:glue_stand_in/score", **fields)  # type: ignore[arg-type]
    batches = classification(score, words, "validation", 4)
    assert batches.labels == Labels(())
    assert sorted(x for b in batches for x in b["label"][b["weight"] > 0]) == [
        i / 8 for i in range(7)
    ]
