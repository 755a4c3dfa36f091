"""A run that is killed at twenty random moments ends bit for bit as one that is never killed."""

from __future__ import annotations

import json
import pathlib
import random
import signal
import time

import jax
import numpy as np
import pytest

from lora_jax.checkpoint.storage import orbax
from lora_jax.training import export, metrics
from tests.training.forks import Fork
from tests.training.runs import OWN
from tests.training.test_resume import assert_same, checkpoints

pytestmark = pytest.mark.slow
STEPS, EVERY = 600, 10
# The model learns slowly, so that each evaluation is the best so far and exports an adapter.
SLOWLY = ("--optimizer.schedule", "constant", "--optimizer.learning-rate", "5e-4")
SMALL = ("--width", "8", "--batch-size", "8", "--evaluate-every", "30", *SLOWLY)
RUN = ("--config", OWN, *SMALL, "--steps", str(STEPS), "--checkpoint-every", str(EVERY))
# The moments of the kills; the seed decides the order of the first sixteen. The name of a file
# stands for the moment before it is written: an adapter replaces an earlier one in three renames.
MOMENTS = ["start-up"] * 3 + ["training"] * 5 + ["checkpoint"] * 5
MOMENTS += ["adapters/best.new", "adapters/best.old", "adapters/best"]
ENDING = ["start-up", "last export", "after the last export", "summary.json"]


class Runs:
    """A run that was never stopped, and one that was killed twenty times.

    steps: the newest checkpoint after each kill.
    torn: the number of kills that left a half-written checkpoint.
    """

    def __init__(self, folder: pathlib.Path) -> None:
        self.whole, self.killed, self._cache = (folder / n for n in ("whole", "killed", "cache"))
        self._random = random.Random(7)
        began = time.monotonic()
        assert self._start(self.whole).wait() == 0
        self._seconds = time.monotonic() - began
        self.steps: list[int] = []
        self.torn = 0
        self._random.shuffle(MOMENTS)
        for moment in (*MOMENTS, *ENDING):
            self._kill(moment)
        self.finished = self._start(self.killed)
        assert self.finished.wait() == 0, self.finished.log.read_text()

    def _start(self, path: pathlib.Path, killed_before: str | None = None) -> Fork:
        log = path.with_suffix(".log")
        arguments = (*RUN, "--run-dir", str(path))
        return Fork(arguments, log, cache=self._cache, killed_before=killed_before)

    def _kill(self, moment: str) -> None:
        named = moment == "summary.json" or moment.startswith("adapters/")
        fork = self._start(self.killed, moment if named else None)
        if named:
            assert fork.wait() == -signal.SIGKILL, fork.log.read_text()
        elif moment == "start-up":
            time.sleep(self._random.uniform(0, 0.3) * self._seconds)
            fork.send(signal.SIGKILL)
            assert fork.wait() == -signal.SIGKILL, fork.log.read_text()
        else:
            self._kill_when(fork, moment)
        torn = [p for p in self._glob("checkpoints/*") if not p.name.isdigit()]
        self.torn += bool(torn)
        self.steps.append(max(checkpoints(self.killed), default=0))

    def _kill_when(self, fork: Fork, moment: str) -> None:
        """Let the run go on for a random number of steps, and then kill it at `moment`."""
        before = max(checkpoints(self.killed), default=0)
        wanted = before + EVERY * self._random.randint(1, 2)
        if moment == "last export":
            fork.kill_when(lambda: self._glob("adapters/last*"))
        elif moment == "after the last export":
            assert fork.until(lambda: (self.killed / "adapters/last/meta").is_dir())
            fork.kill_when(lambda: True)
        elif moment == "training":
            lines = wanted + self._random.randint(1, EVERY - 1)
            fork.kill_when(lambda: self._lines() > lines)
        else:
            reached = fork.until(lambda: max(checkpoints(self.killed), default=0) >= wanted)
            assert reached, fork.log.read_text()
            fork.kill_when(lambda: self._glob("checkpoints/*tmp*"))

    def _lines(self) -> int:
        return sum("split" not in line for line in metrics.read(self.killed))

    def _glob(self, pattern: str) -> list[pathlib.Path]:
        return list(self.killed.glob(pattern))


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(tmp_path_factory.mktemp("kills"))


def test_the_kills_were_spread_over_the_run(runs: Runs) -> None:
    assert len(runs.steps) == 20
    assert len(set(runs.steps)) > 8, runs.steps
    assert runs.steps == sorted(runs.steps), "a checkpoint was lost"
    assert runs.torn >= 3, "too few kills while a checkpoint was being written"
    assert not (runs.killed / "summary.json.tmp").exists()


@pytest.mark.parametrize("name", ["best", "last"])
def test_the_adapters_are_bit_identical(runs: Runs, name: str) -> None:
    assert_same(export.load(runs.whole, name), export.load(runs.killed, name))


def test_the_record_is_byte_identical(runs: Runs) -> None:
    texts = [(path / "metrics.jsonl").read_bytes() for path in (runs.whole, runs.killed)]
    assert texts[0] == texts[1]
    steps = [json.loads(line) for line in texts[0].splitlines()]
    assert [x["step"] for x in steps if "split" not in x] == list(range(1, STEPS + 1))


@pytest.mark.filterwarnings("ignore:Sharding info not provided")
def test_the_optimizer_is_bit_identical(runs: Runs) -> None:
    paths = (runs.whole, runs.killed)
    states = [orbax().load_checkpointables(p / f"checkpoints/{STEPS}")["state"] for p in paths]
    kept = [{k: v for k, v in state.items() if k != "key"} for state in states]
    assert any(np.any(leaf) for leaf in jax.tree.leaves(kept[0]["optimizer"]))
    assert_same(kept[0], kept[1])


def test_nothing_half_written_is_left(runs: Runs) -> None:
    assert not [p for p in runs.killed.rglob("*") if "tmp" in p.name]
    assert [p.name for p in (runs.killed / "adapters").iterdir()] == ["best", "last"]
