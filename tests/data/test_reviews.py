"""The movie reviews: sizes, balance and disjoint splits."""

import bz2
import collections
import csv
from pathlib import Path

import pytest

from lora_jax.data import open_source
from lora_jax.data.reviews import agreed, read
from lora_jax.data.source import DataSource
from lora_jax.data.split import normalise


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> DataSource:
    return open_source("reviews", str(tmp_path_factory.mktemp("reviews")))


def test_sizes_and_balance(source: DataSource) -> None:
    counts = {
        split: collections.Counter(row["label"] for row in source.examples(split))
        for split in source.splits
    }
    assert counts == {
        "train": {0: 4342, 1: 5947},
        "validation": {0: 547, 1: 713},
        "test": {0: 516, 1: 743},
    }
    assert source.classes("label") == ("rotten", "fresh")


def test_splits_are_disjoint_under_normalisation(source: DataSource) -> None:
    texts = {
        split: {normalise(row["text"]) for row in source.examples(split)} for split in source.splits
    }
    assert not texts["train"] & texts["validation"]
    assert not texts["train"] & texts["test"]
    assert not texts["validation"] & texts["test"]


def test_nothing_is_lost(source: DataSource) -> None:
    rows = [row for split in source.splits for row in source.examples(split)]
    assert len(rows) == 12_808
    # 58 texts occur more than once, each in one split alone; otherwise they would be a leak.
    assert len({row["text"] for row in rows}) < len(rows)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "corpus.csv.bz2"
    rows = [
        ("plot", "A long story", "a"),
        ("fresh", "Loved it.", "b"),
        ("rotten", "hated it", "c"),
        ("rotten", "  LOVED it", "b"),
        ("rotten", "Hated, it!", "d"),
    ]
    with bz2.open(path, "wt", encoding="utf-8", newline="") as out:
        writer = csv.writer(out)
        writer.writerow(["category", "text", "movie_name"])
        writer.writerows(rows)
    return path


def test_plots_are_not_reviews(file: Path) -> None:
    assert [key for key, _ in read(file)] == [1, 2, 3, 4]


def test_texts_with_both_labels_are_left_out(file: Path) -> None:
    assert [row["text"] for _, row in agreed(read(file))] == ["hated it", "Hated, it!"]
