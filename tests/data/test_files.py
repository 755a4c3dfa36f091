"""JSONL and CSV files: rows that are read, and rows that are errors."""

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

from lora_jax.data import DataConfig, DataError, classification, language_modelling, open_source
from lora_jax.data.catalogue import open_data


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
        ("a.jsonl", '{"text": 1}\n{"text": 2\n', "a.jsonl:2 is not JSON"),
        ("a.jsonl", '{"text": 1}\n{"text": 2, "text": 3}\n', "a.jsonl:2: the key 'text' is there"),
        ("a.jsonl", '{"text": "\\udc80"}\n', "a.jsonl:1 holds half a character"),
        ("a.jsonl", '{"text": NaN}\n', "a.jsonl:1: NaN is not a number"),
        ("a.jsonl", '{"text": "a"}\n{"text": ' + "[" * 100_000, "a.jsonl:2 is n"),
        ("a.csv", "text,label,text\na,1,b\n", "a.csv:1: 3 columns, 'text' more than once"),
        ("a.jsonl", '{"text": 1}\n\n[1]\n', "a.jsonl:3 holds a list, expected an object"),
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


@pytest.mark.parametrize("name", ["a.csv", "a.jsonl"])
def test_a_file_that_is_not_utf8(tmp_path: Path, name: str) -> None:
    """A file that is not UTF-8 is an error."""
    good = "text\nfirst\n" if name == "a.csv" else '{"text": "first"}\n'
    last = "caf\xe9\n" if name == "a.csv" else '{"text": "caf\xe9"}\n'
    (tmp_path / name).write_bytes(good.encode() + last.encode("latin-1"))
    line = 3 if name == "a.csv" else 2
    with pytest.raises(DataError, match=rf"{name}:{line} is not UTF-8"):
        open_source(str(tmp_path / name)).examples("train")


def test_a_field_that_nobody_uses_may_be_missing(tmp_path: Path, words: Tokenizer) -> None:
    rows = '{"text": "w1", "label": 0, "note": null}\n{"text": "w2", "label": 1}\n'
    config = DataConfig(written(tmp_path / "a.jsonl", rows))
    assert classification(config, words, "train", 2).facts().examples == 2
    config = DataConfig(written(tmp_path / "a.jsonl", rows + '{"label": 1}\n'))
    with pytest.raises(DataError, match=r"a\.jsonl:3 has no 'text', which data\.text_fields"):
        classification(config, words, "train", 2)


@pytest.mark.parametrize("value", [None, ["a", "b"], [{"role": "user", "content": "hi"}], {}])
def test_a_text_that_is_none(tmp_path: Path, words: Tokenizer, value: Any) -> None:
    rows = [{"text": "w1", "label": 0}, {"text": value, "label": 1}]
    name = written(tmp_path / "a.jsonl", "".join(f"{json.dumps(row)}\n" for row in rows))
    with pytest.raises(DataError, match=r"a\.jsonl:2: 'text', which data.text_fields names, is "):
        classification(DataConfig(name), words, "train", 2)
    config = DataConfig(name, prompt="{text}", eos="", train_limit=2)
    with pytest.raises(DataError, match=r"a\.jsonl:2: 'text', which data.prompt names, is "):
        list(language_modelling(config, words, "train", 2))


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


@pytest.mark.parametrize("name", ["revievs", "glue/sst2", "data.arrow", ""])
def test_unknown_sources(name: str) -> None:
    with pytest.raises(DataError, match=r"(?s)no data source.*nearest.*tfds:"):
        open_source(name)


def test_files_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are read from the hub's cache, whose files are links to its blobs."""
    asked, folder = [], tmp_path / "snapshots" / "abc" / "data"
    folder.mkdir(parents=True)
    (tmp_path / "blobs").mkdir()
    for split in ("train", "test"):
        written(tmp_path / "blobs" / split, json.dumps({"text": split}) + "\n")
        (folder / f"{split}.jsonl").symlink_to(f"../../../blobs/{split}")

    class Hub:
        __spec__ = "a stand-in"

        @staticmethod
        def snapshot_download(name: str, **how: Any) -> str:
            asked.append((name, how["repo_type"], how["revision"], how["allow_patterns"]))
            if name == "some/lost":
                raise OSError("no such data set")
            return str(folder.parent)

    monkeypatch.setitem(sys.modules, "huggingface_hub", Hub)
    source = open_data(DataConfig("hub:some/set@v1/data/{split}.jsonl"))
    assert set(source.splits) == {"train", "test"}
    assert list(source.examples("test")) == [{"text": "test"}]
    assert asked[0] == ("some/set", "dataset", "v1", ["data/*.jsonl"])
    assert list(open_source("hub:some/set/data/train.jsonl").examples("train")) != []
    with pytest.raises(DataError, match=r"some/lost/a.csv could not be downloaded:\n.*no such"):
        open_source("hub:some/lost/a.csv")
    with pytest.raises(DataError, match="expected hub:organisation/name"):
        open_source("hub:some.jsonl")
