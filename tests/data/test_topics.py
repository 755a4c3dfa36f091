"""Reuters and 20 Newsgroups: official sizes, classes and splits."""

import collections
from pathlib import Path

import pytest

from lora_jax.data import DataError, open_source
from lora_jax.data.source import DataSource
from lora_jax.data.split import normalise
from lora_jax.data.topics import CORPORA, read, with_validation

# The official numbers of training and test documents of the single-label versions.
OFFICIAL = {
    "reuters8": (5_485, 2_189, 8),
    "reuters52": (6_532, 2_568, 52),
    "newsgroups": (11_293, 7_528, 20),
}


@pytest.fixture(scope="module", params=CORPORA)
def source(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> DataSource:
    return open_source(request.param, str(tmp_path_factory.mktemp("topics")))


@pytest.mark.slow
def test_official_sizes_and_classes(source: DataSource) -> None:
    train, test, classes = OFFICIAL[source.name]
    sizes = {split: len(source.examples(split)) for split in source.splits}
    assert sizes["train"] + sizes["validation"] == train
    assert sizes["test"] == test
    assert sizes["validation"] == pytest.approx(train / 10, rel=0.05)
    names = source.classes("label")
    assert names is not None
    assert len(names) == classes
    assert list(names) == sorted(names)
    for split in ("train", "test"):  # each class is learned, and tested
        assert {row["label"] for row in source.examples(split)} == set(range(classes))


@pytest.mark.slow
def test_no_text_is_empty_and_the_sides_share_none(source: DataSource) -> None:
    texts = {
        split: {normalise(row["text"]) for row in source.examples(split)} for split in source.splits
    }
    assert all(all(found) for found in texts.values())
    assert all(row["text"] == row["text"].strip() for row in source.examples("validation"))
    assert not texts["train"] & texts["validation"]
    shared = (texts["train"] | texts["validation"]) & texts["test"]
    assert len(shared) == CORPORA[source.name].shared
    assert f"{len(shared)} texts are in both official splits" in source.notes[0]


def test_labels_are_those_of_the_file(tmp_path: Path) -> None:
    source = open_source("reuters8", str(tmp_path))
    names = source.classes("label")
    assert names is not None
    counts = collections.Counter(names[row["label"]] for row in source.examples("test"))
    largest = {"earn": 1083, "acq": 696, "crude": 121, "money-fx": 87}
    assert counts == largest | {"interest": 81, "trade": 75, "ship": 36, "grain": 10}


HEADER = "Category\tText\nd\tstring\nclass\t\n"


def test_rows_of_a_file(tmp_path: Path) -> None:
    file = tmp_path / "x.tab"
    file.write_text(HEADER + "\ntea\t a cup \n\t\n")
    assert list(read(file)) == [
        (4, {"text": "", "label": ""}),
        (5, {"text": "a cup", "label": "tea"}),
        (6, {"text": "", "label": ""}),
    ]


@pytest.mark.parametrize("line", ["tea", "tea\t ", "\ta cup", "tea\ta\tcup"])
def test_a_broken_row_is_an_error(tmp_path: Path, line: str) -> None:
    file = tmp_path / "x.tab"
    file.write_text(f"{HEADER}tea\tone\n{line}\n")
    with pytest.raises(DataError, match=r"x\.tab:5: expected a label, a tab and a text"):
        list(read(file))


def test_a_class_is_never_only_validated() -> None:
    rows = [(i, {"text": f"text {i}", "label": "many"}) for i in range(200)]
    rare = next(i for i, _ in with_validation(rows)["validation"])
    rows[rare][1]["label"] = "rare"
    found = with_validation(rows)
    assert rows[rare] in found["train"]
    assert sum(map(len, found.values())) == 200
    assert found["validation"]
