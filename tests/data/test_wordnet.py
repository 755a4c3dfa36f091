"""WordNet definitions: sizes, splits by word, clean texts."""

import itertools

import pytest

from lora_jax.data import open_source
from lora_jax.data.source import DataSource
from lora_jax.data.split import normalise
from lora_jax.data.wordnet import parse


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> DataSource:
    return open_source("wordnet", str(tmp_path_factory.mktemp("wordnet")))


@pytest.mark.slow
def test_sizes(source: DataSource) -> None:
    sizes = {split: len(source.examples(split)) for split in source.splits}
    assert sizes == {"train": 112_874, "validation": 2_363, "test": 2_422}
    assert sum(sizes.values()) == 117_659


@pytest.mark.slow
def test_no_word_is_on_two_sides(source: DataSource) -> None:
    words = {
        split: {normalise(row["word"]) for row in source.examples(split)} for split in source.splits
    }
    for one, other in itertools.combinations(words.values(), 2):
        assert not one & other


@pytest.mark.slow
def test_definitions_are_clean(source: DataSource) -> None:
    for row in source.examples("test"):
        assert row["word"].strip()
        assert "_" not in row["word"]
        assert row["definition"] == row["definition"].strip()
        assert row["definition"]
        assert '; "' not in row["definition"]
        assert row["part"] in ("noun", "verb", "adjective", "adverb")


@pytest.mark.parametrize(
    ("line", "word", "definition"),
    [
        ("1 00 n 01 sea_cow 0 000 | a mammal  \n", "sea cow", "a mammal"),
        ("1 00 a 01 afloat(ip) 0 000 | on the water; at sea; \n", "afloat", "on the water; at sea"),
        ('1 00 v 02 go 0 run 1 000 | move; "go on"; "run" \n', "go", "move"),
    ],
)
def test_lines(line: str, word: str, definition: str) -> None:
    assert parse(line) == ("1", {"word": word, "definition": definition})
