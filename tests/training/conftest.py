"""Tiny models and examples that many tests share."""

from __future__ import annotations

import pathlib

import pytest

from tests.training import tiny

ONE_LAYER = {"num_hidden_layers": 1}


@pytest.fixture(scope="session")
def roberta(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    return tiny.write_model(tmp_path_factory.mktemp("models") / "roberta", tiny.ROBERTA | ONE_LAYER)


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    return tiny.write_model(tmp_path_factory.mktemp("models") / "llama", tiny.LLAMA | ONE_LAYER)


@pytest.fixture(scope="session")
def source(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Texts of three kinds, whose label is the number of their kind."""
    return tiny.write_examples(tmp_path_factory.mktemp("data"), ("text",), int)
