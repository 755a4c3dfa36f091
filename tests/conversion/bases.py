"""The golden models, with a tokenizer that has one word for each token id."""

from __future__ import annotations

import pathlib
import shutil

import tokenizers
from tokenizers import models as kinds
from tokenizers import pre_tokenizers

GOLDEN = pathlib.Path(__file__).parents[1] / "golden"


def adapter(name: str) -> str:
    return str(GOLDEN / "golden_peft" / name)


def base(folder: pathlib.Path, name: str, vocabulary: int = 23) -> pathlib.Path:
    """Copy a golden model and add a tokenizer, whose word `t7` is the token 7."""
    made = shutil.copytree(GOLDEN / "golden_models" / name, folder / name)
    words = {f"t{i}": i for i in range(vocabulary)}
    tokenizer = tokenizers.Tokenizer(kinds.WordLevel(words, unk_token="t0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(made / "tokenizer.json"))
    return made


def text(ids: list[int]) -> str:
    """Return the text whose tokens are `ids`."""
    return " ".join(f"t{i}" for i in ids)
