"""JSONL and CSV files: what is read, and what is an error."""

import re
from pathlib import Path

import pytest

from lora_jax.data import DataError, open_source


def written(path: Path, text: str) -> str:
    path.write_text(text, encoding="utf-8")
    return str(path)


def test_jsonl(tmp_path: Path) -> None:
    name = written(tmp_path / "a.jsonl", '{"text": "é", "label": 1}\n\n{"label": 0, "text": "b"}\n')
    source = open_source(name)
    assert source.splits == ("train",)
    assert list(source.examples("train")) == [{"text": "é", "label": 1}, {"label": 0, "text": "b"}]


def test_csv_with_quotes_newlines_and_a_byte_order_mark(tmp_path: Path) -> None:
    name = written(tmp_path / "a.csv", '\ufefftext,label\n"a, ""b""\nc",pos\n')
    assert list(open_source(name).examples("train")) == [{"text": 'a, "b"\nc', "label": "pos"}]


def test_a_placeholder_finds_the_splits(tmp_path: Path) -> None:
    for split in ("train", "dev"):
        written(tmp_path / f"my_{split}.csv", f"text\n{split}\n")
    written(tmp_path / "my_.csv", "text\nnot a split\n")
    written(tmp_path / "other.csv", "text\nnot ours\n")
    source = open_source(str(tmp_path / "my_{split}.csv"))
    assert set(source.splits) == {"train", "dev"}
    assert list(source.examples("dev")) == [{"text": "dev"}]


def test_named_splits(tmp_path: Path) -> None:
    one, two = (
        written(tmp_path / "1.csv", "text\na\n"),
        written(tmp_path / "2.jsonl", '{"text": "b"}'),
    )
    source = open_source(f"train={one}, validation={two}")
    assert [list(source.examples(s)) for s in source.splits] == [[{"text": "a"}], [{"text": "b"}]]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.jsonl", '{"text": 1}\n{"text": 2\n', "a.jsonl:2: not JSON"),
        ("a.jsonl", '{"text": 1}\n\n[1]\n', "a.jsonl:3: expected an object"),
        ("a.jsonl", '{"text": 1}\n{"txet": 1}\n', "a.jsonl:2: fields ['txet']"),
        ("a.csv", "text,label\na,1\nb\n", "a.csv:3: 1 values, but the header names 2: text, label"),
        ("a.csv", 'text,label\na,1\n"b,2\n', "a.csv:3: unexpected end"),
        ("a.csv", "text\n", "no examples"),
        ("a.jsonl", "", "no examples"),
    ],
)
def test_errors_name_file_and_line(tmp_path: Path, name: str, text: str, message: str) -> None:
    source = open_source(written(tmp_path / name, text))
    with pytest.raises(DataError, match=re.escape(message)):
        source.examples("train")


def test_a_missing_file_names_its_neighbours(tmp_path: Path) -> None:
    written(tmp_path / "train.jsonl", "{}")
    with pytest.raises(DataError, match=r"(?s)trian.jsonl.*nearest: train.jsonl"):
        open_source(str(tmp_path / "trian.jsonl"))
    with pytest.raises(DataError, match="no file fits"):
        open_source(str(tmp_path / "{split}.csv"))


def test_one_file_has_no_validation_split(tmp_path: Path) -> None:
    source = open_source(written(tmp_path / "a.csv", "text\na\n"))
    with pytest.raises(DataError, match=r"(?s)no split 'validation'.*Name a file for each split"):
        source.examples("validation")


@pytest.mark.parametrize("name", ["revievs", "glue/sst2", "data.parquet", ""])
def test_unknown_sources(name: str) -> None:
    with pytest.raises(DataError, match=r"(?s)no data source.*nearest.*tfds:"):
        open_source(name)
