"""One trained run, a sweep made of it, and their reports."""

from __future__ import annotations

import dataclasses
import pathlib
from typing import NamedTuple

import pytest

from lora_jax.cli.report import main
from lora_jax.report import svg
from lora_jax.training.config import LoraConfig
from lora_jax.training.text import TextConfig
from tests.report import saved_runs
from tests.serving.classifiers import ATTENTION


class Written(NamedTuple):
    """The run directories; each has its report in its folder `report`."""

    solo: pathlib.Path
    sweep: pathlib.Path
    config: TextConfig


def of_rank(config: TextConfig, rank: int, seed: int) -> TextConfig:
    lora = LoraConfig(rank=rank, alpha=8.0, targets=(ATTENTION,))
    return dataclasses.replace(config, lora=lora, seed=seed)


@pytest.fixture(scope="session")
def written(tmp_path_factory: pytest.TempPathFactory) -> Written:
    folder = tmp_path_factory.mktemp("report")
    solo, config = saved_runs.trained(folder)
    sweep = folder / "sweep"
    members = {"r2": (2, 0, 0.5), "r4": (4, 0, 0.75), saved_runs.HOSTILE: (4, 1, 0.625)}
    for name, (rank, seed, score) in members.items():
        saved_runs.member(sweep / name, solo, of_rank(config, rank, seed), score)
    assert main([str(solo)]) == 0
    assert main([str(sweep)]) == 0
    return Written(solo, sweep, config)


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make figures empty: to draw them takes nearly all of a report's time."""
    monkeypatch.setattr(svg, "svg", lambda drawing: '<svg width="1pt"></svg>')
    monkeypatch.setattr(svg, "png", lambda drawing: b"")
