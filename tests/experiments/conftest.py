"""The folder of tiny models and examples that runs of other methods read."""

from __future__ import annotations

import pathlib

import pytest

from tests.training import tiny


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    path = tmp_path_factory.mktemp("methods")
    tiny.write_model(path / "roberta", tiny.ROBERTA)
    tiny.write_model(path / "llama", tiny.LLAMA)
    tiny.write_examples(path / "data", ("text",), int)
    return path
