"""A run that is killed and started again ends as if it had never been stopped, bit for bit."""

from __future__ import annotations

import json
import pathlib
import signal
from typing import Any

import jax
import numpy as np
import pytest

from lora_jax.training import metrics
from tests.training.forks import Fork
from tests.training.runs import OWN, assert_same_run

LONG = ("--width", "16", "--batch-size", "32", "--steps", "400", "--evaluate-every", "60")
RUN = ("--config", OWN, *LONG, "--checkpoint-every", "40")


def checkpoints(path: pathlib.Path) -> list[int]:
    folder = path / "checkpoints"
    names = [p.name for p in folder.iterdir()] if folder.is_dir() else []
    return sorted(int(name) for name in names if name.isdigit())


def stop_after(fork: Fork, path: pathlib.Path, step: int, number: signal.Signals) -> None:
    """Send the signal as soon as there is a checkpoint of at least `step`."""
    assert fork.until(lambda: max(checkpoints(path), default=0) >= step), fork.log.read_text()
    fork.send(number)
    expected = 130 if number == signal.SIGINT else -number
    assert fork.wait() == expected, fork.log.read_text()


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[pathlib.Path, pathlib.Path, str]:
    """A run never stopped, a run killed and later interrupted, and the output of its last start."""
    folder = tmp_path_factory.mktemp("resume")
    whole, killed = folder / "whole", folder / "killed"

    def start(path: pathlib.Path, log: str) -> Fork:
        return Fork((*RUN, "--run-dir", str(path)), folder / log, cache=folder / "cache")

    assert start(whole, "whole.log").wait() == 0, (folder / "whole.log").read_text()
    for step, number in ((40, signal.SIGKILL), (160, signal.SIGINT)):
        fork = start(killed, f"{step}.log")
        stop_after(fork, killed, step, number)
        said = "The last checkpoint is kept" in fork.log.read_text()
        assert said == (number == signal.SIGINT)
        assert not (killed / "summary.json").exists(), "it was killed too late to test anything"
        held = [line["step"] for line in metrics.read(killed) if "split" not in line]
        assert held[: checkpoints(killed)[-1]] == list(range(1, checkpoints(killed)[-1] + 1))
    fork = start(killed, "last.log")
    assert fork.wait() == 0, fork.log.read_text()
    return whole, killed, fork.log.read_text()


def assert_same(x: Any, y: Any) -> None:
    assert jax.tree.structure(x) == jax.tree.structure(y)
    for a, b in zip(jax.tree.leaves(x), jax.tree.leaves(y), strict=True):
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


Runs = tuple[pathlib.Path, pathlib.Path, str]


def test_it_went_on_from_a_checkpoint(runs: Runs) -> None:
    text = runs[2]
    assert "Continuing from the checkpoint of step" in text
    assert int(text.partition("checkpoint of step ")[2].partition(".")[0]) >= 160


# Orbax warns that it takes the sharding from the file; two CPU arrays have no other.
@pytest.mark.filterwarnings("ignore:Sharding info not provided")
def test_record_checkpoint_and_adapters_have_the_same_bits(runs: Runs) -> None:
    assert_same_run(*runs[:2], 400)
    steps = [line["step"] for line in metrics.read(runs[0]) if "split" not in line]
    assert steps == list(range(1, 401))


def test_the_summaries_agree_in_all_but_the_clock(runs: Runs) -> None:
    found = [json.loads((path / "summary.json").read_text()) for path in runs[:2]]
    for name in ("steps", "before", "after", "best_step", "merged_difference", "optimizer_bytes"):
        assert found[0][name] == found[1][name], name


def test_nothing_half_written_is_left(runs: Runs) -> None:
    assert not [p for p in runs[1].rglob("*") if "tmp" in p.name]
